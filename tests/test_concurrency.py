"""Requests under load while versions change, and several publishers at once."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from refleet.common.delta import Input
from refleet.common.errors import CheckpointChanged, RefitFailed, VersionExists, WorkerFailed
from refleet.publisher.compare import Comparison
from refleet.publisher.published import Published
from refleet.worker.torch_engine import TorchEngine
from refleet.worker.worker import Worker
from safetensors.torch import save_file
from torch import Tensor, nn
from world import World, checkpoint, holds, reason, served

Until = Callable[..., None]
PARTS = 5


class Chorus(nn.Module):
    """Every part holds the number of the version: an answer from a mixture has more than one number in it."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ParameterList([nn.Parameter(torch.zeros(100, 20)) for _ in range(PARTS)])
        self.register_buffer("steps", torch.zeros(3, dtype=torch.int64))

    def forward(self, scale: Tensor) -> Tensor:
        """Least and greatest number in any part; many small kernels, so that a switch has time to get in between."""
        seen = [part * scale for part in self.parts] + [self.steps.float() * scale]
        return torch.stack([bound for one in seen for bound in (one.min(), one.max())])


@pytest.fixture(autouse=True)
def eager_threads() -> Iterator[None]:
    """Python changes threads every 0.2 ms instead of every 5: more interleavings, and busy threads starve nobody."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.0002)
    yield
    sys.setswitchinterval(before)


def chorus(number: int) -> Mapping[str, Tensor]:
    state = {f"parts.{n}": torch.full((100, 20), float(number)) for n in range(PARTS)}
    return state | {"steps": torch.full((3,), number, dtype=torch.int64)}


class Load:
    """Threads that ask all the time; `wrong` collects answers that are not the named version's."""

    def __init__(self, worker: Worker, module: nn.Module, threads: int = 2):
        self._worker, self._module = worker, module
        self.wrong: list[str] = []
        self.answered: set[str] = set()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(threads)]

    def _ask(self) -> None:
        one = torch.ones(())
        while not self._stop.is_set():
            try:
                with self._worker.serving(timeout_s=20) as version, torch.inference_mode():
                    answer = {float(number) for number in self._module(one)}
            except BaseException as error:
                self.wrong.append(f"{type(error).__name__}: {error}")
                return
            self.answered.add(version.id)
            if answer != {float(version.id.removeprefix("v"))}:
                self.wrong.append(f"{version.id} answered {sorted(answer)}")

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(30)


class Stumbling(TorchEngine):
    """Fails in the middle of every third switch, after some tensors were written."""

    switches = failures = 0

    def apply(self, staged, changed):  # type: ignore[no-untyped-def]
        self.switches += 1
        if self.switches % 3:
            return super().apply(staged, changed)
        super().apply(staged, frozenset(sorted(changed)[: PARTS // 2]))
        self.failures += 1
        raise RefitFailed("stumbled, as asked")


def test_requests_during_quick_versions_never_see_a_mixture(small_world: World) -> None:
    """I1."""
    world = small_world
    module, publisher = Chorus(), world.publisher()
    worker = world.worker(engine=TorchEngine(module, probe_inputs=(torch.ones(()),)))
    publisher.publish(chorus(0), version="v0").wait(workers=1, timeout_s=20)
    with Load(worker, module) as load:
        for number in range(1, 31):
            published = publisher.publish(chorus(number), version=f"v{number}")
        published.wait(workers=1, timeout_s=30)
        publisher.rollback("v20").wait(workers=1, timeout_s=20)
    assert load.wrong == []
    assert len(load.answered) >= 3, load.answered


def test_requests_during_failing_switches_never_see_a_mixture(small_world: World) -> None:
    """I1, I5."""
    world, module = small_world, Chorus()
    publisher, engine = world.publisher(), Stumbling(module)
    worker = world.worker(engine=engine)
    publisher.publish(chorus(0), version="v0").wait(workers=1, timeout_s=20)
    outcomes = []
    with Load(worker, module) as load:
        for number in range(1, 16):
            published = publisher.publish(chorus(number), version=f"v{number}")
            outcomes.append(outcome(published))
    assert load.wrong == []
    assert {"served", "failed"} <= set(outcomes)
    assert engine.failures >= 3
    assert len(load.answered) >= 3


def outcome(published: Published) -> str:
    try:
        published.wait(workers=1, timeout_s=20)
    except WorkerFailed as error:
        assert "stumbled" in str(error)
        return "failed"
    return "served"


# ---------------------------------------------------------------------- a checkpoint that changes while it is read


@contextmanager
def changing_between_tensors(change: Callable[[], None]) -> Iterator[None]:
    """Calls `change` once, when a publish has read its second tensor."""
    inputs = Comparison.inputs

    def changed(self: Comparison) -> Iterator[Input]:
        for number, each in enumerate(inputs(self)):
            yield each
            if number == 1:
                change()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Comparison, "inputs", changed)
        yield


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("how", ["rewritten in place", "truncated", "replaced"])
def test_a_file_that_changes_while_it_is_read_is_not_published(
    small_world: World, tmp_path: Path, first: bool, how: str
) -> None:
    """I16."""
    world, path = small_world, tmp_path / "model.safetensors"
    publisher, worker = world.publisher(), world.worker()
    before = []
    if not first:  # compared with a version before it
        save_file(checkpoint(1), path)
        publisher.publish(path, version="v1").wait(workers=1, timeout_s=20)
        before = ["v1"]
    save_file(checkpoint(2), path)
    other = tmp_path / "other.safetensors"
    save_file(checkpoint(3), other)

    def change() -> None:
        if how == "rewritten in place":
            with path.open("r+b") as file:
                file.write(other.read_bytes())
        elif how == "truncated":
            with path.open("r+b") as file:
                file.truncate(path.stat().st_size // 2)
        else:
            other.replace(path)

    with changing_between_tensors(change):
        error = reason(lambda: publisher.publish(path, version="v2"))
    assert isinstance(error, CheckpointChanged), error
    assert [r.version for r in publisher.book.releases()] == before
    assert publisher.book.version("v2") is None
    now = served(worker)
    assert ([now.version] if now else []) == before
    save_file(checkpoint(4), path)
    publisher.publish(path, version="v2").wait(workers=1, timeout_s=20)
    assert holds(worker, checkpoint(4))


def test_a_state_dict_that_a_trainer_changes_meanwhile_is_not_published(small_world: World) -> None:
    """I16: the optimizer's step in another thread."""
    publisher, state = small_world.publisher(), checkpoint(1)

    def step() -> None:
        for tensor in state.values():
            tensor.add_(1)

    with changing_between_tensors(step):
        error = reason(lambda: publisher.publish(state, version="v1"))
    assert isinstance(error, CheckpointChanged), error
    assert publisher.book.releases() == []
    assert publisher.publish(state, version="v1").release.seq == 1


# ---------------------------------------------------------------------- several publishers of one store


@pytest.mark.parametrize("shared", [True, False], ids=["one publisher", "a publisher each"])
def test_publishing_from_several_threads_is_one_order_of_releases(world: World, shared: bool) -> None:
    worker, common = world.worker(), world.publisher()
    errors: list[BaseException] = []

    def publish(thread: int) -> None:
        publisher = common if shared else own[thread]
        try:
            for n in range(3):
                publisher.publish(checkpoint(10 * thread + n), version=f"t{thread}-{n}")
        except BaseException as error:
            errors.append(error)

    own = [world.publisher(answer=False) for _ in range(2)]
    threads = [threading.Thread(target=publish, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    releases = common.book.releases()
    assert [r.order for r in releases] == [(1, n) for n in range(1, 7)]
    assert [order for order, _ in world.carrier.stream().history(9)] == [r.order for r in releases]
    last = releases[-1].version
    worker.wait(last, timeout_s=20)
    thread_number, n = (int(part) for part in last.removeprefix("t").split("-"))
    assert holds(worker, checkpoint(10 * thread_number + n))
    assert last[-1] == "2", "each thread's versions are in its own order"


def test_one_id_for_two_contents_at_once_is_given_to_one_of_them(small_world: World) -> None:
    world, results = small_world, []
    publishers = [world.publisher() for _ in range(2)]
    barrier = threading.Barrier(2)

    def publish(n: int) -> None:
        barrier.wait(20)
        try:
            results.append(publishers[n].publish(checkpoint(n), version="same"))
        except VersionExists as error:
            results.append(error)

    threads = [threading.Thread(target=publish, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(type(result).__name__ for result in results) == ["Published", "VersionExists"]
    assert len(publishers[0].book.releases()) == 1
