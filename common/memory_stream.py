"""`Stream` in one process: the twin of `RedisStream`, for tests and for trying things out. Promises: stream.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from .errors import StreamUnavailable
from .limits import LIMITS, Limits
from .memory_server import MemoryServer
from .messages import Lease
from .stream import (
    ACK_KEEP_S,
    Entries,
    Keys,
    LogId,
    Member,
    PayloadReader,
    ServerFacts,
)
from .stream_rules import check_members, check_size, fenced_off, gap, id_taken, next_epoch, not_next, too_large
from .types import BLOBS, STREAM

if TYPE_CHECKING:
    from typing_extensions import Buffer

T = TypeVar("T")


class MemoryStream:
    """One model on a `MemoryServer`."""

    def __init__(self, server: MemoryServer, model: str, *, limits: Limits = LIMITS, carrier: str = STREAM):
        """`carrier`: what `carrier()` says; payloads of either kind lie in the same place here."""
        self.model, self._server, self._keys, self._limits = model, server, Keys(model), limits
        self._carrier = carrier
        self._closed = False

    def close(self) -> None:
        with self._server.changed:
            self._closed = True
            self._server.changed.notify_all()

    def read(self, log_after: LogId, control_after: str, *, block_s: float, count: int = 256) -> Entries:
        def find() -> Entries | None:
            log = self._server.entries(self._keys.log).after(log_after, count)
            control = self._server.entries(self._keys.control).after(_id(control_after), count)
            return Entries(log, _with_text_ids(control)) if log or control else None

        return self._wait(find, block_s) or Entries([], [])

    def last_ids(self) -> tuple[LogId, str]:
        with self._open() as server:
            return server.entries(self._keys.log).last, _text(server.entries(self._keys.control).last)

    def history(self, count: int) -> list[tuple[LogId, bytes]]:
        with self._open() as server:
            return list(server.entries(self._keys.log).by_id.items())[-count:]

    def claim(self, lease: Lease, *, floor: int, ttl_s: float, take_over: bool) -> int:
        with self._open() as server:
            held, epoch = server.get(self._keys.lease), server.get(self._keys.epoch) or 0
            claimed = next_epoch(lease, held=held, epoch=epoch, floor=floor, take_over=take_over)
            self._hold(replace(lease, epoch=claimed), ttl_s)
            return claimed

    def renew(self, lease: Lease, *, ttl_s: float) -> None:
        with self._fence(lease):
            self._hold(lease, ttl_s)

    def append(self, lease: Lease, seq: int, record: bytes, *, ttl_s: float) -> None:
        check_size(len(record), self._limits.record_bytes, "a release record")
        order = (lease.epoch, seq)
        with self._fence(lease) as server:
            log = server.entries(self._keys.log)
            if log.by_id.get(order, record) != record:
                raise id_taken(f"release {_text(order)}")
            if order not in log.by_id:
                if order <= log.last:
                    raise not_next(order, last=_text(log.last))
                log.add(order, record, self._limits.log_entries)
                server.put(self._keys.log, log)
                server.changed.notify_all()
            self._hold(lease, ttl_s)

    def offer(self, lease: Lease, record: bytes, *, ttl_s: float) -> None:
        check_size(len(record), self._limits.record_bytes, "an offer record")
        with self._fence(lease) as server:
            server.add(self._keys.control, record, self._limits.control_entries)
            self._hold(lease, ttl_s)

    def ask(self, record: bytes) -> None:
        check_size(len(record), self._limits.record_bytes, "a record")
        with self._open() as server:
            server.add(self._keys.control, record, self._limits.control_entries)

    def lease(self) -> Lease | None:
        with self._open() as server:
            held: Lease | None = server.get(self._keys.lease)
            return held

    def carrier(self) -> str:
        return self._carrier

    def put_chunk(self, payload_id: str, number: int, data: Buffer, *, ttl_s: float, carrier: str = STREAM) -> None:
        _check(carrier)
        body = memoryview(data).cast("B")
        check_size(len(body), self._limits.chunk_bytes_max, f"chunk {number}")
        key, entry_id = self._keys.chunks(payload_id), (number + 1, 0)
        with self._open() as server:
            if number > 0 and server.get(key) is None:
                raise gap(payload_id, list(range(number)))
            payload = server.entries(key)
            if entry_id > payload.last:
                payload.add(entry_id, bytes(body))
                server.put(key, payload)
                server.changed.notify_all()
            elif payload.by_id.get(entry_id) != bytes(body):
                raise id_taken(f"chunk {number} of payload {payload_id}", there=entry_id in payload.by_id)
            server.expire(key, ttl_s)

    def payload_reader(
        self,
        payload_id: str,
        numbers: Sequence[int] | None = None,  # noqa: ARG002 - nothing has to be asked for ahead here
        *,
        carrier: str = STREAM,
    ) -> PayloadReader:
        self._keys.chunks(payload_id)
        return _Reader(self, payload_id, carrier)

    def read_chunk(
        self, payload_id: str, number: int, into: memoryview, *, carrier: str = STREAM, wait_s: float = 0.0
    ) -> int:
        if wait_s > 0:
            key = self._keys.chunks(payload_id)
            self._wait(lambda: (number + 1, 0) in self._server.entries(key).by_id, wait_s)
        (data,) = self.chunks(payload_id, number, 1, carrier=carrier)
        if len(data) > len(into):
            raise too_large(payload_id, number, len(data), len(into))
        into[: len(data)] = data
        return len(data)

    def chunks(self, payload_id: str, first: int, count: int, *, carrier: str = STREAM) -> list[bytes]:
        _check(carrier)
        with self._open() as server:
            there = server.entries(self._keys.chunks(payload_id)).by_id
            missing = [number for number in range(first, first + count) if (number + 1, 0) not in there]
            if missing:
                raise gap(payload_id, missing)
            return [there[number + 1, 0] for number in range(first, first + count)]

    def payload_chunks(self, payload_id: str) -> int:
        with self._open() as server:
            return len(server.entries(self._keys.chunks(payload_id)).by_id)

    def keep_payload(self, payload_id: str, *, ttl_s: float) -> None:
        with self._open() as server:
            server.expire(self._keys.chunks(payload_id), ttl_s)

    def drop_payload(self, payload_id: str) -> None:
        with self._open() as server:
            server.drop(self._keys.chunks(payload_id))

    def ack(self, worker: str, record: bytes) -> None:
        check_size(len(record), self._limits.record_bytes, "a record")
        with self._open() as server:
            server.add(self._keys.ack(worker), record, self._limits.ack_entries)

    def acks(self, after: Mapping[str, str], *, block_s: float) -> dict[str, list[tuple[str, bytes]]]:
        def find() -> dict[str, list[tuple[str, bytes]]]:
            new = {w: self._server.entries(self._keys.ack(w)).after(_id(cursor), 256) for w, cursor in after.items()}
            return {worker: _with_text_ids(entries) for worker, entries in new.items() if entries}

        return (self._wait(find, block_s) or {}) if after else {}

    def last_acks(self, worker: str, count: int) -> list[tuple[str, bytes]]:
        with self._open() as server:
            return _with_text_ids(list(server.entries(self._keys.ack(worker)).by_id.items()))[: -count - 1 : -1]

    def beat(self, worker: str, status: bytes, *, keep_s: float = 86400) -> None:
        check_size(len(status), self._limits.record_bytes, "a worker's status")
        with self._open() as server:
            server.put(self._keys.members, (server.get(self._keys.members) or frozenset()) | {worker})
            server.put(self._keys.worker(worker), (status, server.clock()))
            server.expire(self._keys.worker(worker), keep_s)
            server.expire(self._keys.ack(worker), max(keep_s, ACK_KEEP_S))

    def members(self) -> list[Member]:
        with self._open() as server:
            workers = server.get(self._keys.members) or ()
            check_members(len(workers), self._limits, self.model)
            return [self.member(worker) for worker in sorted(workers)]

    def member(self, worker: str) -> Member:
        with self._open() as server:
            status, beaten_at = server.get(self._keys.worker(worker)) or (None, None)
            return Member(worker, status, None if beaten_at is None else server.clock() - beaten_at)

    def leave(self, worker: str) -> None:
        with self._open() as server:
            server.put(self._keys.members, (server.get(self._keys.members) or frozenset()) - {worker})
            server.drop(self._keys.worker(worker))

    def facts(self) -> ServerFacts:
        with self._open() as server:
            return ServerFacts("memory", 0, 0, "noeviction", False, server.run_id)

    def payload_facts(self) -> ServerFacts:
        return self.facts()

    @contextmanager
    def _open(self) -> Iterator[MemoryServer]:
        with self._server.changed:
            if self._closed:
                raise StreamUnavailable("the stream in memory was closed", about=f"model {self.model}")
            yield self._server

    @contextmanager
    def _fence(self, lease: Lease) -> Iterator[MemoryServer]:
        assert lease.epoch > 0, "claim an epoch before writing"
        with self._open() as server:
            held, epoch = server.get(self._keys.lease), server.get(self._keys.epoch) or 0
            if epoch > lease.epoch or (held is not None and held.publisher != lease.publisher):
                raise fenced_off(lease, held=held, epoch=epoch)
            yield server

    def _hold(self, lease: Lease, ttl_s: float) -> None:
        self._server.put(self._keys.epoch, lease.epoch)
        self._server.put(self._keys.lease, lease)
        self._server.expire(self._keys.lease, ttl_s)

    def _wait(self, find: Callable[[], T], block_s: float) -> T:
        """What `find` finds, within `block_s`; the wait is real time whatever the server's clock says."""
        with self._open() as server:
            server.changed.wait_for(lambda: self._closed or find(), timeout=max(block_s, 0.0))
            with self._open():
                return find()


class _Reader:
    """`PayloadReader` in memory."""

    def __init__(self, stream: MemoryStream, payload_id: str, carrier: str):
        self._stream, self._payload_id, self._carrier = stream, payload_id, carrier

    def read(self, number: int, into: memoryview, *, wait_s: float = 0.0) -> int:
        return self._stream.read_chunk(self._payload_id, number, into, carrier=self._carrier, wait_s=wait_s)

    def __enter__(self) -> PayloadReader:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def _check(carrier: str) -> None:
    assert carrier in (STREAM, BLOBS), carrier


def _id(text: str) -> LogId:
    first, second = text.split("-")
    return int(first), int(second)


def _text(entry_id: LogId) -> str:
    return f"{entry_id[0]}-{entry_id[1]}"


def _with_text_ids(entries: list[tuple[LogId, bytes]]) -> list[tuple[str, bytes]]:
    return [(_text(entry_id), data) for entry_id, data in entries]
