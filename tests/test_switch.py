"""A switch in two halves: what is prepared and proven while requests are answered, and what happens when that fails."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import pytest
from refleet.common.errors import RefitFailed, WorkerFailed
from refleet.common.messages import Evidence
from refleet.publisher import Publisher
from refleet.publisher.verify import verify
from refleet.worker.engine import StagedVersion
from refleet.worker.memory_engine import MemoryEngine
from refleet.worker.worker import Worker
from world import State, World, checkpoint, holds, reason, served

Until = Callable[..., None]
V1, V2 = checkpoint(1), checkpoint(2)
#: only one tensor differs from V1
V3 = V1 | {"scale": V1["scale"] + 1}


class Preparing(MemoryEngine):
    """`spoil`: what was prepared has a flipped bit, once. `stuck`: the next so many undoings fail. `wait`: `prepare`
    waits for it."""

    spoil = False
    stuck = 0
    wait: threading.Event | None = None

    def __init__(self) -> None:
        super().__init__(prepares=True)
        self.prepares_seen: list[str] = []
        self.preparing = threading.Event()

    def prepare(self, staged: StagedVersion, changed: frozenset[str]) -> bool:
        undoes = staged.serving.version == "v1" and bool(self.written)
        self.prepares_seen.append(staged.serving.version)
        if self.wait is not None:
            self.preparing.set()
            assert self.wait.wait(30)
        if undoes and self.stuck:
            self.stuck -= 1
            raise RefitFailed("stuck with what was prepared")
        told = super().prepare(staged, changed)
        if self.spoil:
            self.spoil = False
            self._side["steps"] = bytes(len(self._side["steps"]))
        return told


@dataclass
class Scene:
    """A worker that serves V1 and notes every closing of its gate."""

    world: World
    publisher: Publisher
    worker: Worker
    engine: Preparing
    closed: list[str]

    def fails(self, state: State, *words: str) -> None:
        """Publishing `state` as v2 fails on the worker with these words, and v1 goes on being served, bit for bit."""
        bad = self.publisher.publish(state, version="v2")
        error = reason(lambda: bad.wait(workers=1, timeout_s=20))
        assert isinstance(error, WorkerFailed)
        for word in words:
            assert word in error.what
        assert served(self.worker).version == "v1"  # type: ignore[union-attr]
        assert holds(self.worker, V1)
        assert max(a.evidence for a in self.world.acks("w0") if a.order == bad.release.order) == Evidence.STAGED

    def told(self) -> dict[str, bytes]:
        return dict(self.engine.read_back(sorted(self.engine.tensors)))


@pytest.fixture
def scene(small_world: World, monkeypatch: pytest.MonkeyPatch) -> Scene:
    engine, publisher = Preparing(), small_world.publisher()
    worker = small_world.worker(engine=engine, drain_s=0.3)
    publisher.publish(V1, version="v1").wait(workers=1)
    closed: list[str] = []
    switching = worker.gate.switching

    def noted(**options: float):  # type: ignore[no-untyped-def]
        closed.append(served(worker).version)  # type: ignore[union-attr]
        return switching(**options)

    monkeypatch.setattr(worker.gate, "switching", noted)
    return Scene(small_world, publisher, worker, engine, closed)


@pytest.fixture(params=[True, False], ids=["prepares", "at-once"])
def prepares(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def test_requests_are_answered_while_the_next_version_is_prepared(scene: Scene) -> None:
    scene.engine.wait = threading.Event()
    two = scene.publisher.publish(V2, version="v2")
    assert scene.engine.preparing.wait(20)
    with scene.worker.serving(timeout_s=0.1) as version:
        assert version.id == "v1"
    scene.engine.wait.set()
    two.wait(workers=1, timeout_s=20)
    assert holds(scene.worker, V2)


def test_what_was_prepared_is_proven_before_the_gate_closes_and_not_again_behind_it(
    small_world: World, prepares: bool
) -> None:
    open_at: list[bool] = []

    class Watched(MemoryEngine):
        def read_back(self, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
            open_at.append(worker.gate._switch is None)
            return super().read_back(names)

    worker = small_world.worker(engine=Watched(prepares=prepares))
    ack = small_world.publisher().publish(V1, version="v1").wait(workers=1)["w0"]
    assert open_at == [prepares]
    assert {"prepare", "apply", "read_back", "probe", "persist", "pause"} <= ack.timings_ms.keys()
    assert (ack.evidence, ack.fingerprint) == (Evidence.SERVING, served(worker).fingerprint)  # type: ignore[union-attr]


def test_a_failing_prepare_never_closes_the_gate(scene: Scene) -> None:
    before = scene.told()
    scene.engine.fail_prepare = True
    with scene.worker.serving():
        scene.fails(V2, "failing while preparing")
    assert scene.closed == []
    assert scene.told() == before, "what was prepared by then was undone"
    scene.publisher.publish(V3, version="v3").wait(workers=1)
    assert holds(scene.worker, V3)


def test_a_wrong_bit_in_what_was_prepared_is_found_before_the_gate_closes(scene: Scene) -> None:
    before = scene.told()
    scene.engine.spoil = True
    with scene.worker.serving():
        scene.fails(V2, "other bytes in 'steps'")
    assert scene.closed == []
    assert scene.told() == before
    scene.publisher.publish(V3, version="v3").wait(workers=1)
    assert holds(scene.worker, V3)


def test_requests_that_do_not_end_in_time_undo_what_was_prepared(scene: Scene) -> None:
    before = scene.told()
    with scene.worker.serving():
        scene.fails(V2, "did not end within")
    assert scene.closed == ["v1"]
    assert scene.engine.prepares_seen[-2:] == ["v2", "v1"]
    assert scene.told() == before
    assert verify(scene.publisher.stream, timeout_s=20).ok
    scene.publisher.publish(V3, version="v3").wait(workers=1)
    assert holds(scene.worker, V3)


def test_what_could_not_be_undone_never_gets_into_a_later_version(scene: Scene) -> None:
    """V3 changes one tensor: without writing everything, the others would be V2's, prepared and left behind."""
    scene.engine.stuck, before = 1, scene.told()
    with scene.worker.serving():
        scene.fails(V2, "did not end within", "undoing what was prepared failed: stuck with")
    assert scene.told() != before, "v2 is still in there"
    scene.publisher.publish(V3, version="v3").wait(workers=1)
    assert holds(scene.worker, V3)
    written = len(scene.engine.written)
    scene.publisher.publish(V1, version="v4").wait(workers=1)
    assert len(scene.engine.written) == written + 1, "from then on only what changed is written"


def test_the_first_error_is_told_also_when_undoing_fails(scene: Scene) -> None:
    scene.engine.fail_prepare, scene.engine.stuck = True, 1
    scene.fails(V2, "failing while preparing", "stuck with what was prepared")
    assert scene.closed == []


def test_a_swap_that_fails_half_way_restores_the_version_before(scene: Scene) -> None:
    """I5, from the moment the gate is closed as ever."""
    scene.engine.fail_after = 2
    scene.fails(V2, "failing after 2 tensors")
    assert scene.closed == ["v1"]
    scene.publisher.publish(V3, version="v3").wait(workers=1)
    assert holds(scene.worker, V3)


def test_a_first_version_that_can_not_be_prepared_is_why_nothing_is_served(small_world: World) -> None:
    engine = Preparing()
    engine.fail_prepare = True
    worker, publisher = small_world.worker(engine=engine), small_world.publisher()
    one = publisher.publish(V1, version="v1")
    assert "failing while preparing" in str(reason(lambda: one.wait(workers=1, timeout_s=20)))
    assert served(worker) is None
    assert "the first version could not be applied" in (worker.gate.reason or "")
    publisher.publish(V3, version="v3").wait(workers=1)
    assert holds(worker, V3)
