"""Payloads that workers receive while they are written. What goes wrong then is in test_early_faults.py."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from carriers import InMemory
from early_scene import CHUNK, FIRST, SECOND, Reads, Slow, early_bytes, quiet
from refleet.common.limits import LIMITS
from refleet.common.redis_stream import RedisStream
from refleet.publisher.compare import Comparison
from refleet.worker.metrics import Metrics
from servers import Server
from test_broadcast import big
from world import World, holds, served

Until = Callable[..., None]


def test_chunks_are_received_before_the_last_tensor_was_read(
    world: World, monkeypatch: pytest.MonkeyPatch, until: Until
) -> None:
    """A slow checkpoint, real chunk sizes."""
    publisher, worker = world.publisher(), world.worker()
    first = big(1)
    publisher.publish(first, version="v1").wait(workers=1, timeout_s=60)
    before, go, inputs = early_bytes(worker), threading.Event(), Comparison.inputs

    def slowly(self: Comparison) -> Any:
        for number, each in enumerate(inputs(self)):
            if number == 9:
                assert go.wait(60)
            yield each

    monkeypatch.setattr(Comparison, "inputs", slowly)
    second = big(2, base=first)
    with ThreadPoolExecutor(1) as pool:
        published = pool.submit(publisher.publish, second, version="v2")
        try:
            until(lambda: early_bytes(worker) - before >= 2 * LIMITS.chunk_bytes, "two chunks came early")
            assert worker.board.status.target.version == "v1"  # type: ignore[union-attr]
        finally:
            go.set()
        published.result(60).wait(workers=1, timeout_s=60)
    assert holds(worker, second)
    assert quiet(world)


@pytest.fixture(params=["memory", "valkey", "redis_server"])
def place(request: pytest.FixtureRequest, tmp_path: Path, model: str, kind: str) -> Iterator[World]:
    """A fleet over each form of `Stream` and each carrier of payloads."""
    if request.param == "memory":
        made = World(InMemory(model), tmp_path, model)
    else:
        made = World(_OfKind(request.getfixturevalue(request.param), model, kind), tmp_path, model)
    yield made
    made.close()
    made.carrier.close()


class _OfKind(InMemory):
    """Streams on a real server, whose payloads all lie in one way."""

    def __init__(self, server: Server, model: str, kind: str):
        super().__init__(model)
        self._server, self._kind = server, kind

    def stream(self, **_: Any) -> Any:
        return RedisStream(self._server.url, self.model, carrier=self._kind)


@pytest.mark.usefixtures("small_chunks")
def test_what_came_early_is_not_fetched_again(place: World, slow: Callable[..., Slow], until: Until) -> None:
    publisher, worker = place.publisher(), place.worker()
    publisher.publish(FIRST, version="v1").wait(workers=1, timeout_s=20)
    reads, before, gate = Reads(worker), early_bytes(worker), slow(publisher)
    published = gate.publish(SECOND, "v2")
    until(lambda: early_bytes(worker) - before == 8 * CHUNK, "all chunks that were sent came early")
    assert served(worker).version == "v1"  # type: ignore[union-attr]
    assert worker.store.manifests() == [publisher.book.manifest_of("v1").fingerprint], "nothing of it is in the store"
    gate.go.set()
    release = published.result(60).release
    assert published.result().wait(workers=1, timeout_s=20)["w0"].payload_bytes == release.payload_bytes
    assert holds(worker, SECOND)
    assert quiet(place)
    assert release.payload is not None
    assert not reads.fetched
    assert set(reads.early) >= set(range(release.payload.body_chunks))
    assert set(reads.early.values()) == {1}
    assert f"refleet_worker_early_bytes_total {float(early_bytes(worker))}" in Metrics(worker).text().decode()


@pytest.mark.usefixtures("small_chunks")
def test_a_first_version_comes_early_too(small_world: World, slow: Callable[..., Slow], until: Until) -> None:
    publisher, worker = small_world.publisher(), small_world.worker()
    gate = slow(publisher)
    published = gate.publish(FIRST, "v1")
    until(lambda: early_bytes(worker) == 8 * CHUNK, "all chunks that were sent came early")
    gate.go.set()
    published.result(60).wait(workers=1, timeout_s=20)
    assert holds(worker, FIRST)


@pytest.mark.usefixtures("small_chunks")
def test_several_workers_receive_it_at_once_and_one_that_serves_something_else_does_not(
    small_world: World, slow: Callable[..., Slow], until: Until
) -> None:
    publisher = small_world.publisher(answer=False)
    workers = [small_world.worker(f"w{number}") for number in range(3)]
    one = publisher.publish(FIRST, version="v1")
    one.wait(workers=3, timeout_s=20)
    before = early_bytes(*workers)
    assert one.release.payload is not None
    publisher.stream.drop_payload(one.release.payload.payload_id)
    nothing = small_world.worker("w3")  # nobody gives it v1
    until(lambda: nothing.board.status.want, "it asks for v1")
    gate = slow(publisher)
    published = gate.publish(SECOND, "v2")
    until(lambda: early_bytes(*workers) - before == 3 * 8 * CHUNK, "all three received it")
    assert early_bytes(nothing) == 0
    gate.go.set()
    published.result(60)
    for worker in workers:
        worker.wait("v2", timeout_s=20)
        assert holds(worker, SECOND)


@pytest.mark.usefixtures("small_chunks")
def test_workers_that_share_a_store_receive_it_once(
    small_world: World, slow: Callable[..., Slow], until: Until, tmp_path: Path
) -> None:
    publisher = small_world.publisher()
    workers = [small_world.worker(f"w{number}", share=tmp_path / "host") for number in range(2)]
    publisher.publish(FIRST, version="v1").wait(workers=2, timeout_s=20)
    before, gate = early_bytes(*workers), slow(publisher)
    reads = [Reads(worker) for worker in workers]
    published = gate.publish(SECOND, "v2")
    until(lambda: early_bytes(*workers) - before == 8 * CHUNK, "one of them received it")
    gate.go.set()
    published.result(60).wait(workers=2, timeout_s=20)
    assert all(holds(worker, SECOND) for worker in workers)
    assert not any(each.fetched for each in reads), "whoever had it staged it for both"
