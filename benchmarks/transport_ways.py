"""The processes of benchmarks/transport.py: one publisher and n workers, over bare sockets, redis-py, or refleet."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import secrets
import socket
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import redis
from refleet.common.limits import LIMITS
from refleet.common.redis_stream import RedisStream

_FORK = multiprocessing.get_context("fork")
_WARM = 2  # payloads before the clock starts: the server's memory is touched, connections are made
_PATIENCE_S = 120.0
_TTL_S = 600.0


@dataclass(frozen=True, slots=True)
class Shape:
    """How much is moved: payloads of so many chunks."""

    chunks: int
    payloads: int

    @property
    def payload_bytes(self) -> int:
        return self.chunks * LIMITS.chunk_bytes

    @property
    def moved_bytes(self) -> int:
        """What every worker receives while the clock runs."""
        return self.payloads * self.payload_bytes


class Place:
    """What one process knows: its pipe to the parent, and pipes between publisher and workers."""

    def __init__(self, shape: Shape, url: str, parent: Connection, others: list[Connection]):
        self.shape, self.url, self._parent, self.others = shape, url, parent, others

    def rounds(self) -> range:
        return range(_WARM + self.shape.payloads)

    def announce(self, payload_id: str) -> None:
        for other in self.others:
            other.send(payload_id)

    def all_done(self) -> None:
        for other in self.others:
            other.recv()

    def at(self, number: int) -> None:
        """Called at the start of each round: waits for the go when warm, and starts counting CPU."""
        if number == _WARM:
            self._parent.send("ready")
            self._parent.recv()
            self._spent = cpu_s()

    def end(self) -> None:
        self._parent.send(cpu_s() - self._spent)


Role = Callable[[Place], None]


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def chunks_of(shape: Shape) -> list[memoryview]:
    """Random bytes, touched; the same for every payload."""
    data = random.Random(1).randbytes(LIMITS.chunk_bytes)
    return [memoryview(bytearray(data)) for _ in range(shape.chunks)]


def room_for(shape: Shape) -> list[memoryview]:
    """A worker's staging memory for one payload, touched."""
    return [memoryview(bytearray(b"\1" * LIMITS.chunk_bytes)) for _ in range(shape.chunks)]


# ---------------------------------------------------------------------- parent


def start(count: int, shape: Shape, publisher: Role, worker: Role, url: str) -> list[tuple[BaseProcess, Connection]]:
    """Publisher first, then workers; returns when all of them are warm."""
    parts = []
    theirs, ours = zip(*(_FORK.Pipe() for _ in range(count)), strict=True)
    for role, others in [(publisher, list(ours)), *[(worker, [one]) for one in theirs]]:
        here, there = _FORK.Pipe()
        process = _FORK.Process(target=_run, args=(role, Place(shape, url, there, others)), daemon=True)
        process.start()
        parts.append((process, here))
    for answer in hear(parts):
        assert answer == "ready", answer
    return parts


def tell(parts: list[tuple[BaseProcess, Connection]], what: str) -> None:
    for _, pipe in parts:
        pipe.send(what)


def hear(parts: list[tuple[BaseProcess, Connection]]) -> list[object]:
    found = []
    for _, pipe in parts:
        assert pipe.poll(_PATIENCE_S), "a process said nothing"
        found.append(pipe.recv())
    broken = [each for each in found if isinstance(each, BaseException)]
    if broken:
        raise broken[0]
    return found


def end(parts: list[tuple[BaseProcess, Connection]]) -> None:
    for process, _ in parts:
        process.join(5)
        if process.is_alive():
            process.kill()


def _run(role: Role, place: Place) -> None:
    try:
        role(place)
    except BaseException as error:
        traceback.print_exc()
        place._parent.send(RuntimeError(str(error)))
    os._exit(0)


# ---------------------------------------------------------------------- no server


def raw_publisher(place: Place) -> None:
    chunks = chunks_of(place.shape)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        links = []
        for other in place.others:
            other.send(listener.getsockname()[1])
            links.append(listener.accept()[0])
        for number in place.rounds():
            place.at(number)
            for chunk in chunks:
                for link in links:
                    link.sendall(chunk)
        place.all_done()
    place.end()


def raw_worker(place: Place) -> None:
    (parent,) = place.others
    buffers = room_for(place.shape)
    with socket.create_connection(("127.0.0.1", parent.recv())) as link:
        for number in place.rounds():
            place.at(number)
            for buffer in buffers:
                assert link.recv_into(buffer, 0, socket.MSG_WAITALL) == len(buffer)
    parent.send("done")
    place.end()


# ---------------------------------------------------------------------- through a server


def _publish(place: Place, put: Callable[[str, int, memoryview], None], drop: Callable[[str], None]) -> None:
    """One payload ahead of the workers: while they read one, the next is written. The last one nobody reads."""
    chunks = chunks_of(place.shape)

    def write() -> str:
        payload_id = secrets.token_hex(16)
        for index, chunk in enumerate(chunks):
            put(payload_id, index, chunk)
        return payload_id

    following = write()
    for number in place.rounds():
        place.at(number)
        now = following
        place.announce(now)
        following = write()
        place.all_done()
        drop(now)
    place.end()


def _work(place: Place, read: Callable[[str, list[memoryview]], None]) -> None:
    buffers = room_for(place.shape)
    (parent,) = place.others
    for number in place.rounds():
        place.at(number)
        read(parent.recv(), buffers)
        parent.send("done")
    place.end()


def publisher(carrier: str) -> Role:
    def role(place: Place) -> None:
        stream = RedisStream(place.url, "m", carrier=carrier)
        _publish(
            place, lambda payload, n, data: stream.put_chunk(payload, n, data, ttl_s=_TTL_S, carrier=carrier),
            stream.drop_payload,
        )  # fmt: skip

    return role


def worker(carrier: str) -> Role:
    def role(place: Place) -> None:
        stream = RedisStream(place.url, "m")
        numbers = range(place.shape.chunks)

        def read(payload_id: str, buffers: list[memoryview]) -> None:
            with stream.payload_reader(payload_id, numbers, carrier=carrier) as reader:
                for number in numbers:
                    assert reader.read(number, buffers[number]) == len(buffers[number])

        _work(place, read)

    return role


def stock_publisher(place: Place) -> None:
    client = redis.Redis.from_url(place.url)

    def put(payload_id: str, number: int, data: memoryview) -> None:
        client.xadd(payload_id, {"c": data}, id=f"{number + 1}-0")

    _publish(place, put, client.unlink)


def stock_worker(place: Place) -> None:
    client = redis.Redis.from_url(place.url)

    def read(payload_id: str, buffers: list[memoryview]) -> None:
        last: bytes | str = "0-0"
        for buffer in buffers:
            ((_, ((last, fields),)),) = client.xread({payload_id: last}, count=1)
            buffer[:] = fields[b"c"]

    _work(place, read)
