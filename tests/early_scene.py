"""Payloads on their way: a publisher that stops in the middle of one, and what a worker reads of it meanwhile."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from refleet.common.delta import Encoder
from refleet.common.limits import LIMITS
from refleet.publisher import Publisher, payloads
from refleet.publisher.published import Published
from refleet.worker.worker import Worker
from world import State, World, checkpoint

#: the model of these tests fills about twenty of these
CHUNK = 16 << 10
FIRST = checkpoint(1)
SECOND = checkpoint(2, base=FIRST)


class Slow:
    """Publishes in a thread of its own, and stops before chunk `stop` of the payload until `go` is set."""

    def __init__(self, publisher: Publisher, *, stop: int):
        self.publisher, self.stop = publisher, stop
        self.go = threading.Event()
        self.payload_ids: list[str] = []
        self._pool = ThreadPoolExecutor(1)
        self._put = publisher.stream.put_chunk
        publisher.stream.put_chunk = self._put_chunk  # type: ignore[method-assign]

    def publish(self, state: State, version: str) -> Future[Published]:
        return self._pool.submit(self.publisher.publish, state, version=version)

    def close(self) -> None:
        self.go.set()
        self._pool.shutdown()

    def _put_chunk(self, payload_id: str, number: int, *args: Any, **options: Any) -> None:
        if payload_id not in self.payload_ids:
            self.payload_ids.append(payload_id)
        if number == self.stop:
            assert self.go.wait(60)
        self._put(payload_id, number, *args, **options)


class Reads:
    """Counts what a worker reads: chunks that it waited for, and those that it fetched after the release."""

    def __init__(self, worker: Worker, *, spoil: Callable[[int, memoryview], None] = lambda _number, _chunk: None):
        self.early, self.fetched = Counter[int](), Counter[int]()
        self._make, self._spoil = worker._stream.payload_reader, spoil
        worker._stream.payload_reader = self._reader  # type: ignore[method-assign]

    def _reader(self, *args: Any, **options: Any) -> Any:
        reader = self._make(*args, **options)
        read = reader.read

        def counted(number: int, into: memoryview, *, wait_s: float = 0.0) -> int:
            size = read(number, into, wait_s=wait_s)
            (self.early if wait_s else self.fetched)[number] += 1
            if wait_s:
                self._spoil(number, into[:size])
            return size

        reader.read = counted  # type: ignore[method-assign]
        return reader


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Payloads of many chunks out of a small model."""
    monkeypatch.setitem(Encoder.__init__.__kwdefaults__, "chunk_bytes", CHUNK)
    monkeypatch.setattr(payloads, "LIMITS", replace(LIMITS, chunk_bytes=CHUNK))


@pytest.fixture
def slow() -> Iterator[Callable[..., Slow]]:
    made: list[Slow] = []

    def make(publisher: Publisher, *, stop: int = 8) -> Slow:
        made.append(Slow(publisher, stop=stop))
        return made[-1]

    yield make
    for each in made:
        each.close()


def early_bytes(*workers: Worker) -> int:
    return sum(worker.board.early_total for worker in workers)


def quiet(world: World, worker_id: str = "w0") -> bool:
    """Whether the worker told of no failure and refused nothing."""
    status = world.workers[worker_id].board.status
    failures = [e for e in world.events[worker_id] if e.failure]
    return not failures and status.failure is None and status.refused == 0
