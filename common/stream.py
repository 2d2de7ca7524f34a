"""What publishers and workers say to each other through: the `Stream` protocol, its facts, and the table of keys.

Keys of model `m`. Braces make one Cluster slot of each model; payloads spread over slots.

    refleet:{m}:log                  stream  signed releases; entry id = epoch-seq; field r = record; never expires
    refleet:{m}:control              stream  offers, verify requests; automatic ids; field r; about control_entries
    refleet:{m}:epoch                string  the highest claimed epoch, decimal
    refleet:{m}:lease                hash    publisher = its id, record = packed Lease; expires unless renewed
    refleet:{m:<payload id>}:chunks  stream  one payload; chunk n = entry (n+1)-0, field c; expires or goes as a whole
    refleet:{m}:ack:<worker>         stream  evidence of one worker; automatic ids; field r; about ack_entries; expires
                                             a day after the worker's last heartbeat
    refleet:{m}:worker:<worker>      string  8 bytes big-endian: its own lifetime in ms; then the worker's status
    refleet:{m}:members              set     ids of workers that ever sent a heartbeat and did not leave

Two forms pass one contract suite (tests/test_stream.py): `RedisStream` and `MemoryStream`. The carrier is never the
authority: it may lose everything at any time, and both sides find out through `last_ids`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from .errors import LimitExceeded, PublisherBusy, StaleEpoch, StreamError, StreamGap, UsageError
from .limits import Limits
from .messages import Lease
from .types import MODEL_NAME, PAYLOAD_ID, WORKER_ID

if TYPE_CHECKING:
    from typing_extensions import Buffer

#: (epoch, seq) of a release: the explicit id `epoch-seq` of its log entry
LogId = tuple[int, int]

#: what `last_ids` says of streams that do not exist
NOTHING: tuple[LogId, str] = ((0, 0), "0-0")

#: a worker's acks outlive its last heartbeat by this much, so that ids that never return do not fill the server
ACK_KEEP_S = 86400.0


@dataclass(frozen=True, slots=True)
class Entries:
    """What `read` found; ids are the cursors to go on from."""

    log: list[tuple[LogId, bytes]]
    control: list[tuple[str, bytes]]


@dataclass(frozen=True, slots=True)
class Member:
    """A worker and its heartbeat. Both are None when the heartbeat expired or never came."""

    worker: str
    status: bytes | None
    seen_s: float | None  # seconds since its last heartbeat, by the server's clock


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """The server behind a stream; None where it does not tell (managed services, ACL)."""

    server: str  # e.g. "Valkey 9.1.2"
    used_bytes: int
    max_bytes: int  # 0: no limit, or not told
    policy: str | None  # maxmemory-policy
    aof: bool | None
    run_id: str | None  # changes with every start of the server


@dataclass(frozen=True, slots=True)
class Keys:
    """The names in the table above. Raises UsageError for a name that could reach another model's or worker's key."""

    model: str

    def __post_init__(self) -> None:
        if not MODEL_NAME.match(self.model):
            raise UsageError(f"model name {self.model!r} is not [a-z0-9][a-z0-9._-]{{0,63}}")

    def _key(self, name: str) -> str:
        return f"refleet:{{{self.model}}}:{name}"

    @property
    def log(self) -> str:
        return self._key("log")

    @property
    def control(self) -> str:
        return self._key("control")

    @property
    def epoch(self) -> str:
        return self._key("epoch")

    @property
    def lease(self) -> str:
        return self._key("lease")

    @property
    def members(self) -> str:
        return self._key("members")

    def ack(self, worker: str) -> str:
        return self._key(f"ack:{_worker_id(worker)}")

    def worker(self, worker: str) -> str:
        return self._key(f"worker:{_worker_id(worker)}")

    def chunks(self, payload_id: str) -> str:
        if not PAYLOAD_ID.match(payload_id):
            raise UsageError(f"payload id {payload_id!r} is not 32 hex digits")
        return f"refleet:{{{self.model}:{payload_id}}}:chunks"


def _worker_id(worker: str) -> str:
    if not WORKER_ID.match(worker):
        raise UsageError(f"worker id {worker!r} is not [A-Za-z0-9][A-Za-z0-9._-]{{0,63}}")
    return worker


class Stream(Protocol):
    """One model's log, control stream, payloads, acks and members. Every method may be called from any thread.

    All methods raise StreamUnavailable (unreachable, refused), OverBudget (the server is full) and StreamError.
    A bad implementation loses entries between two reads, repeats an append, or lets a fenced-off publisher write.
    """

    model: str

    def read(self, log_after: LogId, control_after: str, *, block_s: float, count: int = 256) -> Entries:
        """Entries after both cursors, oldest first, at most `count` of each; waits up to `block_s` for the first."""
        ...

    def last_ids(self) -> tuple[LogId, str]:
        """Last ids ever used, as in `NOTHING` for a missing stream. A cursor above them: the server lost data."""
        ...

    def history(self, count: int) -> list[tuple[LogId, bytes]]:
        """The newest `count` log entries, oldest first."""
        ...

    def claim(self, lease: Lease, *, floor: int, ttl_s: float, take_over: bool) -> int:
        """The epoch to publish under, above `floor` and every claimed one; 0 in `lease.epoch` means none so far.

        The same publisher keeps `lease.epoch` while nothing newer is known. Raises PublisherBusy, naming the holder,
        while another publisher holds the lease, unless `take_over`.
        """
        ...

    def renew(self, lease: Lease, *, ttl_s: float) -> None:
        """Hold the lease for another `ttl_s`. Fenced: StaleEpoch when another publisher or a higher epoch is there.

        So are `append` and `offer`, which renew as well. Where the server lost the epoch, it is written again.
        """
        ...

    def append(self, lease: Lease, seq: int, record: bytes, *, ttl_s: float) -> None:
        """Append release (lease.epoch, seq) to the log. Fenced. The same bytes again are a no-op.

        Raises StreamError when the id holds other bytes or the log has gone past it.
        """
        ...

    def offer(self, lease: Lease, record: bytes, *, ttl_s: float) -> None:
        """Append to the control stream. Fenced."""
        ...

    def ask(self, record: bytes) -> None:
        """Append to the control stream; not fenced (verify requests)."""
        ...

    def lease(self) -> Lease | None:
        """Who publishes now."""
        ...

    def put_chunk(self, payload_id: str, number: int, data: Buffer, *, ttl_s: float) -> None:
        """Write chunk `number` (from 0, in order) and let the payload live `ttl_s` from now. No copy of `data`.

        The same bytes again are a no-op. Raises StreamError for other bytes or a number that was passed over,
        StreamGap when the payload's earlier chunks are gone (`number` > 0): write it again from 0.
        """
        ...

    def chunks(self, payload_id: str, first: int, count: int) -> list[bytes]:
        """Exactly the chunks `first` ... `first + count - 1`, all in memory at once: keep `count` at 1-4.

        On a quick link 1 is fastest: each call then reuses the memory of the one before, and no new pages are faulted.

        Raises StreamGap naming the missing ones.
        """
        ...

    def payload_chunks(self, payload_id: str) -> int:
        """How many chunks are there; 0 when the payload is gone."""
        ...

    def keep_payload(self, payload_id: str, *, ttl_s: float) -> None:
        """Let a payload live `ttl_s` from now; nothing happens if it is gone."""
        ...

    def drop_payload(self, payload_id: str) -> None: ...

    def ack(self, worker: str, record: bytes) -> None:
        """Append to the worker's own ack stream, which keeps about LIMITS.ack_entries."""
        ...

    def acks(self, after: Mapping[str, str], *, block_s: float) -> dict[str, list[tuple[str, bytes]]]:
        """Acks after each worker's cursor ("0-0": from the start), only of workers that have any; waits like `read`."""
        ...

    def last_acks(self, worker: str, count: int) -> list[tuple[str, bytes]]:
        """The newest `count` acks of one worker, newest first."""
        ...

    def beat(self, worker: str, status: bytes, *, keep_s: float = 86400) -> None:
        """Heartbeat: become a member and show `status` for `keep_s`."""
        ...

    def members(self) -> list[Member]:
        """All members, sorted by id. Raises LimitExceeded above LIMITS.members."""
        ...

    def member(self, worker: str) -> Member: ...

    def leave(self, worker: str) -> None:
        """Take a worker off the members, with its status. Its acks stay until they expire."""
        ...

    def facts(self) -> ServerFacts: ...

    def close(self) -> None:
        """Drop all connections; calls that wait in other threads end with StreamUnavailable."""
        ...


def next_epoch(lease: Lease, *, held: Lease | None, epoch: int, floor: int, take_over: bool) -> int:
    """The rule of `claim`, given who holds the lease and the highest claimed epoch (0: none, or the server lost it)."""
    foreign = held is not None and held.publisher != lease.publisher
    if foreign and not take_over:
        raise PublisherBusy(
            f"another publisher holds the lease: {held}",
            next="its lease expires 30 s after its last command: wait, or publish with --take-over to fence it off",
        )
    if lease.epoch > 0 and max(epoch, floor) <= lease.epoch and not foreign:
        return lease.epoch
    return max(epoch, floor, lease.epoch) + 1


def fenced_off(lease: Lease, *, held: Lease | None, epoch: int) -> StaleEpoch:
    """The error for a write under `lease` that the fence refused."""
    newer = held is not None and (held.publisher != lease.publisher or held.epoch > lease.epoch)
    by = f"taken over by {held}" if newer else f"a newer publisher raised the epoch to {epoch}"
    return StaleEpoch(
        f"epoch {lease.epoch} may not publish any more: {by}",
        about=f"{lease}; nothing was written",
        next="publish from the store that took over, or claim a new epoch with --take-over",
    )


def not_next(order: LogId, *, last: str) -> StreamError:
    """The error for an append below the end of the log; `last` is the log's last id."""
    return StreamError(
        f"release {order[0]}-{order[1]} can't be appended: the log has gone on to {last}",
        next="publish again: it takes the next number",
    )


def id_taken(what: str, *, there: bool = True) -> StreamError:
    """The error for an explicit id that holds other bytes, or (not `there`) lies below the end without being used."""
    why = "is already there with other bytes" if there else "was passed over: later ones are there"
    return StreamError(f"{what} {why}", next="publish again: it takes new numbers")


def gap(payload_id: str, missing: list[int]) -> StreamGap:
    shown = ", ".join(map(str, missing[:8])) + (" ..." if len(missing) > 8 else "")
    return StreamGap(
        f"payload {payload_id} lacks chunk {shown}: expired, dropped, never written, or lost by the server",
        next="workers ask for a new payload by themselves; `refleet serve` or the publisher answers",
    )


def check_size(size_bytes: int, limit_bytes: int, what: str) -> None:
    """Raises LimitExceeded before anything is sent that no reader would accept."""
    if size_bytes > limit_bytes:
        raise LimitExceeded(f"{what} of {size_bytes} bytes exceeds the limit of {limit_bytes}")


def check_members(count: int, limits: Limits, model: str) -> None:
    """Raises LimitExceeded before their statuses are read."""
    if count > limits.members:
        raise LimitExceeded(
            f"{count} members of {model} exceed the limit of {limits.members}",
            next="see who adds workers to this model, and remove those that are not yours",
        )
