"""What publishers and workers say to each other through: the `Stream` protocol, its facts, and the table of keys.

Keys of model `m`. Braces make one Cluster slot of each model; payloads spread over slots.

    refleet:{m}:log                  stream  signed releases; entry id = epoch-seq; field r = record; never expires
    refleet:{m}:control              stream  announcements, offers, verify requests; automatic ids; field r; about
                                             control_entries
    refleet:{m}:epoch                string  the highest claimed epoch, decimal
    refleet:{m}:lease                hash    publisher = its id, record = packed Lease; expires unless renewed
    refleet:{m:<payload id>}:chunks  stream  one payload; chunk n = entry (n+1)-0, field c; expires or goes as a whole.
                                             Carrier blobs: field b, empty; the chunk itself is a blob
    refleet:{m:<payload id>}:blob:<n>  string  chunk n of carrier blobs; expires a little after the stream that names it
    refleet:{m}:ack:<worker>         stream  evidence of one worker; automatic ids; field r; about ack_entries; expires
                                             a day after the worker's last heartbeat
    refleet:{m}:worker:<worker>      string  8 bytes big-endian: its own lifetime in ms; then the worker's status
    refleet:{m}:members              set     ids of workers that ever sent a heartbeat and did not leave

Two forms pass one contract suite (tests/test_stream.py): `RedisStream` and `MemoryStream`. The carrier is never the
authority: it may lose everything at any time, and both sides find out through `last_ids`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from .errors import UsageError
from .messages import Lease
from .types import MODEL_NAME, PAYLOAD_ID, STREAM, WORKER_ID

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

    def blob(self, payload_id: str, number: int) -> str:
        return f"{self.chunks(payload_id)[: -len('chunks')]}blob:{number}"


def _worker_id(worker: str) -> str:
    if not WORKER_ID.match(worker):
        raise UsageError(f"worker id {worker!r} is not [A-Za-z0-9][A-Za-z0-9._-]{{0,63}}")
    return worker


class PayloadReader(Protocol):
    """Reads chunks of one payload over a connection of its own; used by one thread at a time. Leaving it frees that."""

    def read(self, number: int, into: memoryview, *, wait_s: float = 0.0) -> int:
        """Receive chunk `number` into the start of `into` (writable, contiguous bytes); returns its size in bytes.

        `wait_s`: for about this long, and at most half the reply timeout, wait for a chunk that is not there yet, and
        for a payload that was not begun yet. Nothing is requested ahead then.
        What lies in `into` after an error is undefined, as is what lies behind the chunk's end: a reply may end in the
        middle. The reader may be used again after every error. Raises: StreamGap (the chunk is not there),
        LimitExceeded (it is larger than `into`), StreamUnavailable (reset, timeout, refused, closed), StreamError (no
        such reply exists).
        """
        ...

    def __enter__(self) -> PayloadReader: ...

    def __exit__(self, *_: object) -> None: ...


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

    def carrier(self) -> str:
        """The carrier for new payloads: BLOBS where the server replies by reference (Valkey 9), or as configured."""
        ...

    def put_chunk(self, payload_id: str, number: int, data: Buffer, *, ttl_s: float, carrier: str = STREAM) -> None:
        """Write chunk `number` (from 0, in order) and let the payload live `ttl_s` from now. No copy of `data`.

        The same bytes again are a no-op. Raises StreamError for other bytes or a number that was passed over,
        StreamGap when the payload's earlier chunks are gone (`number` > 0): write it again from 0.
        """
        ...

    def payload_reader(
        self, payload_id: str, numbers: Sequence[int] | None = None, *, carrier: str = STREAM
    ) -> PayloadReader:
        """A reader of this payload. Makes no connection yet.

        `numbers`: what will be read, in this order; None: 0, 1, 2 and so on, from any start. The chunk after the one
        being read is requested ahead. Reading in another order is right too, but throws away what was requested.
        """
        ...

    def read_chunk(self, payload_id: str, number: int, into: memoryview, *, carrier: str = STREAM) -> int:
        """One chunk, as PayloadReader.read says, with nothing requested ahead."""
        ...

    def chunks(self, payload_id: str, first: int, count: int, *, carrier: str = STREAM) -> list[bytes]:
        """Exactly the chunks `first` ... `first + count - 1`, all in memory at once: keep `count` at 1-4.

        On a quick link 1 is fastest: each call then reuses the memory of the one before, and no new pages are faulted.

        Raises StreamGap naming the missing ones.
        """
        ...

    def payload_chunks(self, payload_id: str) -> int:
        """How many chunks are there; 0 when the payload is gone. This and the next two find the carrier themselves."""
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

    def facts(self) -> ServerFacts:
        """The server of log and acks."""
        ...

    def payload_facts(self) -> ServerFacts:
        """The server that payloads are written to: the same one unless configured otherwise."""
        ...

    def close(self) -> None:
        """Drop all connections; calls that wait in other threads end with StreamUnavailable."""
        ...
