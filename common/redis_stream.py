"""`Stream` over Redis 6.2 ... 8 or Valkey 7.2 ... 9, through redis-py. Keys and promises: stream.py."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from redis.exceptions import NoPermissionError, ResponseError

from . import redis_scripts as scripts
from .errors import StreamError, UsageError
from .limits import LIMITS, Limits
from .messages import Lease
from .redis_link import Link, send_all
from .redis_payload import RedisPayloads
from .redis_replies import (
    LIFETIME,
    Argument,
    epoch_number,
    facts_of,
    fence_arguments,
    log_id,
    member_of,
    milliseconds,
    records,
    replies_by_reference,
    text_id,
    with_text_ids,
)
from .stream import (
    ACK_KEEP_S,
    NOTHING,
    Entries,
    Keys,
    LogId,
    Member,
    PayloadReader,
    ServerFacts,
)
from .stream_rules import check_members, check_size, fenced_off, id_taken, next_epoch, not_next
from .types import BLOBS, STREAM, WORKER_ID
from .wire import unpack

if TYPE_CHECKING:
    from typing_extensions import Buffer

AUTO = "auto"  # the carrier that suits the server
TIMEOUT_S = 20.0  # the longest wait for a reply, beyond which a server counts as lost
CLAIM_TRIES = 100  # only publishers that claim in the same instant cost tries; one of them wins each round
ACKS_AT_ONCE = 256
MEMBERS_AT_ONCE = 1000


class RedisStream:
    """One model on one server. Connects on first use; close it when done."""

    def __init__(
        self, url: str, model: str, *, read_from: str | None = None, payload_url: str | None = None,
        carrier: str = AUTO, timeout_s: float = TIMEOUT_S, limits: Limits = LIMITS,
    ):  # fmt: skip
        """Urls: redis://, rediss:// or unix://. `read_from`: a replica, from which log and payloads are read;
        `payload_url`: another server for payloads; `carrier` of new payloads: AUTO, STREAM or BLOBS.
        Raises: UsageError for a bad url, carrier or model name.
        """
        if carrier not in (AUTO, STREAM, BLOBS):
            wrong = f"carrier {carrier!r} is none of {AUTO}, {STREAM}, {BLOBS}"
            raise UsageError(wrong, next=f"set REFLEET_CARRIER to {AUTO}: it suits every server")
        self.model = model
        self._keys = Keys(model)
        self._limits = limits
        self._carrier = carrier
        link = partial(Link, model=model, timeout_s=timeout_s)
        self._link = link(url, given="--redis")
        self._log = link(read_from, given="--read-from") if read_from else self._link
        self._payload_link = link(payload_url, given="--payload-redis") if payload_url else self._link
        # without a payload server, chunks and the release that names them come in order over one replication
        source = self._payload_link if payload_url else self._log
        self._payloads = RedisPayloads(self._payload_link, self._keys, limits, read=source)
        self._slice_s = timeout_s / 2  # one blocking read: well below the reply timeout, so that silence is an error

    def close(self) -> None:
        for link in {self._link, self._log, self._payload_link}:
            link.close()

    def read(self, log_after: LogId, control_after: str, *, block_s: float, count: int = 256) -> Entries:
        cursors = {self._keys.log: text_id(log_after), self._keys.control: control_after}
        found = self._wait(self._log, "reading log and control", cursors, block_s, count)
        log = found.get(self._keys.log.encode(), [])
        return Entries([(log_id(i), r) for i, r in log], with_text_ids(found.get(self._keys.control.encode(), [])))

    def last_ids(self) -> tuple[LogId, str]:
        doing = "asking for the last ids"
        last = []
        with self._log.use(doing) as redis:
            for reply in send_all(
                redis, lambda pipe: pipe.xinfo_stream(self._keys.log).xinfo_stream(self._keys.control)
            ):
                if isinstance(reply, ResponseError) and "no such key" in str(reply):
                    last.append(NOTHING[0])
                elif isinstance(reply, Exception):
                    raise self._log.refuse(reply, doing)
                else:
                    last.append(log_id(reply["last-generated-id"]))
        return last[0], text_id(last[1])

    def history(self, count: int) -> list[tuple[LogId, bytes]]:
        with self._log.use("reading the log's history") as redis:
            newest = records(redis.xrevrange(self._keys.log, count=count))
            return [(log_id(entry_id), record) for entry_id, record in reversed(newest)]

    def claim(self, lease: Lease, *, floor: int, ttl_s: float, take_over: bool) -> int:
        keys = [self._keys.epoch, self._keys.lease]
        for _ in range(CLAIM_TRIES):
            doing = "claiming the epoch"
            with self._link.use(doing) as redis:
                seen_epoch, seen_lease = redis.get(keys[0]) or b"", redis.hget(keys[1], "record") or b""
                held = unpack(seen_lease, Lease) if seen_lease else None
                epoch = next_epoch(lease, held=held, epoch=epoch_number(seen_epoch), floor=floor, take_over=take_over)
            mine = replace(lease, epoch=epoch)
            # the decision is made here, where the memory twin shares it; the server only compares and sets
            args = [seen_epoch, seen_lease, *fence_arguments(mine, ttl_s)]
            with self._link.use(doing) as redis:
                if scripts.run(redis, scripts.CLAIM, keys, args) == 1:
                    return epoch
        raise StreamError(
            f"the lease of {self.model} changed {CLAIM_TRIES} times while claiming it",
            next="look for publishers that fight over it",
        )

    def renew(self, lease: Lease, *, ttl_s: float) -> None:
        self._fenced("renewing the lease", scripts.RENEW, lease, ttl_s)

    def append(self, lease: Lease, seq: int, record: bytes, *, ttl_s: float) -> None:
        check_size(len(record), self._limits.record_bytes, "a release record")
        order, keep = (lease.epoch, seq), self._limits.log_entries
        doing = f"appending release {text_id(order)}"
        # repeated where the reply was lost: the script compares what is there
        verdict, last = self._fenced(
            doing, scripts.APPEND, lease, ttl_s, self._keys.log, text_id(order), record, keep, tries=2
        )
        if verdict == b"behind":
            raise not_next(order, last=last.decode())
        if verdict == b"other":
            raise id_taken(f"release {text_id(order)}")

    def offer(self, lease: Lease, record: bytes, *, ttl_s: float) -> None:
        check_size(len(record), self._limits.record_bytes, "an offer record")
        keep = self._limits.control_entries
        self._fenced("offering a payload", scripts.OFFER, lease, ttl_s, self._keys.control, record, keep)

    def ask(self, record: bytes) -> None:
        self._add("asking the workers", self._keys.control, record, self._limits.control_entries)

    def lease(self) -> Lease | None:
        with self._link.use("asking who publishes") as redis:
            record = redis.hget(self._keys.lease, "record")
            return unpack(record, Lease) if record is not None else None

    def _fenced(
        self, doing: str, script: str, lease: Lease, ttl_s: float, key: str = "", *more_args: Argument, tries: int = 1
    ) -> tuple[bytes, bytes]:
        """The script's verdict and what it adds to it. Raises StaleEpoch when the fence refused."""
        keys = [self._keys.epoch, self._keys.lease, *([key] if key else [])]
        args = [*fence_arguments(lease, ttl_s), *more_args]

        def run(redis: Any) -> tuple[bytes, bytes]:
            verdict, *more = scripts.run(redis, script, keys, args)
            if verdict == b"stale":
                held = unpack(more[1], Lease) if more[1] else None
                raise fenced_off(lease, held=held, epoch=epoch_number(more[0]))
            return verdict, more[0] if more else b""

        return self._link.run(doing, run, tries=tries)

    def carrier(self) -> str:
        if self._carrier == AUTO:
            self._carrier = BLOBS if replies_by_reference(self.payload_facts()) else STREAM
        return self._carrier

    def put_chunk(self, payload_id: str, number: int, data: Buffer, *, ttl_s: float, carrier: str = STREAM) -> None:
        self._payloads.put(payload_id, number, data, ttl_s=ttl_s, carrier=carrier)

    def payload_reader(
        self, payload_id: str, numbers: Sequence[int] | None = None, *, carrier: str = STREAM
    ) -> PayloadReader:
        return self._payloads.reader(payload_id, numbers, carrier=carrier)

    def read_chunk(self, payload_id: str, number: int, into: memoryview, *, carrier: str = STREAM) -> int:
        with self.payload_reader(payload_id, (number,), carrier=carrier) as reader:
            return reader.read(number, into)

    def chunks(self, payload_id: str, first: int, count: int, *, carrier: str = STREAM) -> list[bytes]:
        return self._payloads.chunks(payload_id, first, count, carrier=carrier)

    def payload_chunks(self, payload_id: str) -> int:
        return self._payloads.count(payload_id)

    def keep_payload(self, payload_id: str, *, ttl_s: float) -> None:
        self._payloads.keep(payload_id, ttl_s=ttl_s)

    def drop_payload(self, payload_id: str) -> None:
        self._payloads.drop(payload_id)

    def ack(self, worker: str, record: bytes) -> None:
        self._add(f"acknowledging as {worker}", self._keys.ack(worker), record, self._limits.ack_entries)

    def acks(self, after: Mapping[str, str], *, block_s: float) -> dict[str, list[tuple[str, bytes]]]:
        if not after:
            return {}
        workers = {self._keys.ack(worker).encode(): worker for worker in after}
        cursors = {self._keys.ack(worker): cursor for worker, cursor in after.items()}
        found = self._wait(self._link, "reading acks", cursors, block_s, ACKS_AT_ONCE)
        return {workers[key]: with_text_ids(entries) for key, entries in found.items() if key in workers}

    def last_acks(self, worker: str, count: int) -> list[tuple[str, bytes]]:
        with self._link.use(f"reading the last acks of {worker}") as redis:
            return with_text_ids(records(redis.xrevrange(self._keys.ack(worker), count=count)))

    def beat(self, worker: str, status: bytes, *, keep_s: float = 86400) -> None:
        check_size(len(status), self._limits.record_bytes, "a worker's status")
        value = LIFETIME.pack(milliseconds(keep_s)) + status
        doing = f"sending the heartbeat of {worker}"

        def fill(pipe: Any) -> None:
            pipe.sadd(self._keys.members, worker)
            pipe.set(self._keys.worker(worker), value, px=milliseconds(keep_s))
            pipe.pexpire(self._keys.ack(worker), milliseconds(max(keep_s, ACK_KEEP_S)))

        self._all(doing, fill)

    def members(self) -> list[Member]:
        with self._link.use("listing the members") as redis:
            check_members(int(redis.scard(self._keys.members)), self._limits, self.model)
            names = [name.decode("utf-8", "replace") for name in redis.smembers(self._keys.members)]
        workers = sorted(name for name in names if WORKER_ID.match(name))  # anything else is not of our making
        members: list[Member] = []
        for start in range(0, len(workers), MEMBERS_AT_ONCE):
            members += self._statuses(workers[start : start + MEMBERS_AT_ONCE])
        return members

    def member(self, worker: str) -> Member:
        return self._statuses([worker])[0]

    def leave(self, worker: str) -> None:
        doing = f"taking {worker} off the members"
        self._all(doing, lambda pipe: pipe.srem(self._keys.members, worker).unlink(self._keys.worker(worker)))

    def _statuses(self, workers: list[str]) -> list[Member]:
        def fill(pipe: Any) -> None:
            for worker in workers:
                key = self._keys.worker(worker)
                # a worker may write what it likes there: never take more than a reader may unpack
                pipe.getrange(key, 0, LIFETIME.size + self._limits.record_bytes)
                pipe.pttl(key)

        doing = "reading heartbeats"
        replies = self._all(doing, fill)
        with self._link.use(doing):
            return [member_of(*each) for each in zip(workers, replies[::2], replies[1::2], strict=True)]

    def facts(self) -> ServerFacts:
        return _facts(self._link)

    def payload_facts(self) -> ServerFacts:
        return _facts(self._payload_link)

    def _add(self, doing: str, key: str, record: bytes, keep: int) -> None:
        check_size(len(record), self._limits.record_bytes, "a record")
        with self._link.use(doing) as redis:
            redis.xadd(key, {b"r": record}, maxlen=keep, approximate=True)

    def _all(self, doing: str, fill: Callable[[Any], object]) -> list[Any]:
        """One round trip; the first error among the replies is raised."""
        replies = self._link.run(doing, lambda redis: send_all(redis, fill))
        for reply in replies:
            if isinstance(reply, Exception):
                raise self._link.refuse(reply, doing)
        return replies

    def _wait(
        self, link: Link, doing: str, cursors: dict[str, str], block_s: float, count: int
    ) -> dict[bytes, list[tuple[bytes, bytes]]]:
        """XREAD in slices shorter than the reply timeout; BLOCK 0 would wait for ever on a server that lost data."""
        deadline = time.monotonic() + block_s
        while True:
            left_s = min(deadline - time.monotonic(), self._slice_s)
            with link.use(doing) as redis:
                reply = redis.xread(cursors, count=count, block=milliseconds(left_s) if left_s > 0 else None)
                if reply or time.monotonic() >= deadline:
                    return {key: records(entries) for key, entries in reply}


def _facts(link: Link) -> ServerFacts:
    with link.use("asking the server about itself") as redis:
        try:
            return facts_of(redis.info())
        except NoPermissionError:
            return ServerFacts("unknown (INFO is not permitted)", 0, 0, None, None, None)
