"""Versions with other names, dtypes or shapes on their way to engines: whole, durable, and revocable.

That publishers refuse them unless told otherwise is in test_structure_publish.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engine_cases import Zoo
from hostile import Outsider, craft, raw_lines
from refleet.common.errors import RefitFailed, WorkerFailed
from refleet.worker.engine import StagedVersion
from refleet.worker.file_engine import FileEngine
from refleet.worker.memory_engine import MemoryEngine
from refleet.worker.torch_engine import TorchEngine
from safetensors.torch import load_file, save_file
from world import State, World, checkpoint, holds, reason, restructured, served

Until = Callable[..., None]
OLD = checkpoint(1)
NEW = restructured(OLD)
#: NEW with other values
NEWER = NEW | {"head": NEW["head"] + 1}


def is_in(path: Path, state: State) -> bool:
    """Whether the file holds exactly this."""
    found = load_file(path)
    return found.keys() == state.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in state.items()
    )


@pytest.fixture(params=[True, False], ids=["prepares", "at-once"])
def engine(request: pytest.FixtureRequest) -> MemoryEngine:
    return MemoryEngine(prepares=request.param)


# ---------------------------------------------------------------------- the whole path


def test_an_allowed_structure_is_served_exactly_and_only_what_is_new_travels(
    world: World, engine: MemoryEngine, tmp_path: Path
) -> None:
    publisher, worker = world.publisher(), world.worker(engine=engine)
    world.worker("file", engine=FileEngine(tmp_path / "served.safetensors"))
    publisher.publish(OLD, version="v1").wait(workers=2)
    two = publisher.publish(NEW, version="v2", allow_structure_change=True)
    two.wait(workers=2, timeout_s=20)
    assert two.release.restructure
    assert holds(worker, NEW)
    assert is_in(tmp_path / "served.safetensors", NEW)
    whole = sum(NEW[name].nbytes for name in ("head", "layer.0.bias", "scale"))
    assert 0 < two.release.payload_bytes < whole + 2000, "the renamed and the unchanged ones are there already"
    publisher.publish(NEWER, version="v3").wait(workers=2, timeout_s=20)
    assert holds(worker, NEWER)
    back = publisher.rollback("v1", allow_structure_change=True)
    back.wait(workers=2, timeout_s=20)
    assert back.release.payload_bytes == 0
    assert holds(worker, OLD)
    assert is_in(tmp_path / "served.safetensors", OLD)


def test_a_late_joiner_gets_the_new_structure(small_world: World) -> None:
    publisher = small_world.publisher()
    publisher.publish(OLD, version="v1")
    publisher.publish(NEW, version="v2", allow_structure_change=True)
    late = small_world.worker()
    late.wait("v2", timeout_s=20)
    assert holds(late, NEW)


@pytest.mark.parametrize("left", ["new", "old"])
def test_a_restarted_worker_resumes_the_new_structure_whatever_its_engine_holds_then(
    small_world: World, tmp_path: Path, left: str
) -> None:
    """`old`: as after a crash between the worker's record and the disk of an engine that is not the file system."""
    path, publisher = tmp_path / "served.safetensors", small_world.publisher()
    small_world.worker(engine=FileEngine(path))
    publisher.publish(OLD, version="v1").wait(workers=1)
    publisher.publish(NEW, version="v2", allow_structure_change=True).wait(workers=1, timeout_s=20)
    small_world.stop("w0")
    publisher.close()
    if left == "old":
        save_file(OLD, path)
    again = small_world.worker(engine=FileEngine(path))
    again.wait("v2", timeout_s=20)
    assert is_in(path, NEW)
    assert not [event.text for event in small_world.events["w0"] if event.failure]


class FailsOnce(FileEngine):
    """Refuses the first apply after its start: what a worker resumes."""

    refused = False

    def apply(self, staged: StagedVersion, changed: frozenset[str]) -> None:
        if not self.refused:
            self.refused = True
            raise RefitFailed("not yet")
        super().apply(staged, changed)


@pytest.mark.parametrize("target", ["v2", "v3"])
def test_what_was_served_is_accepted_again_also_when_resuming_it_failed(
    small_world: World, tmp_path: Path, target: str, until: Until
) -> None:
    """As the target (v2), and as what is served when the target can't be: v3 changes no structure, but the engine
    came back with the old one."""
    path, publisher = tmp_path / "served.safetensors", small_world.publisher()
    small_world.worker(engine=FileEngine(path))
    publisher.publish(OLD, version="v1").wait(workers=1)
    publisher.publish(NEW, version="v2", allow_structure_change=True).wait(workers=1, timeout_s=20)
    small_world.stop("w0")
    save_file(OLD, path)
    if target == "v3":
        publisher.publish(NEWER, version="v3")
    again = small_world.worker(engine=FailsOnce(path))
    again.wait("v2", timeout_s=20)
    assert is_in(path, NEW)
    until(lambda: again.board.status.state == ("SERVING" if target == "v2" else "FAILED"), "it says so")


def test_a_worker_that_was_away_follows_a_change_of_structure_that_was_overtaken(small_world: World) -> None:
    """The release that it goes to does not change the structure, the one that it never saw did."""
    publisher, engine = small_world.publisher(), MemoryEngine()
    small_world.worker(engine=engine)
    publisher.publish(OLD, version="v1").wait(workers=1)
    small_world.stop("w0")
    publisher.publish(NEW, version="v2", allow_structure_change=True)
    assert not publisher.publish(NEWER, version="v3").release.restructure
    again = small_world.worker(engine=MemoryEngine())
    again.wait("v3", timeout_s=20)
    assert holds(again, NEWER)


def test_an_accepted_change_of_structure_is_remembered_over_a_restart_until_it_is_served(
    small_world: World, tmp_path: Path, until: Until
) -> None:
    path, publisher = tmp_path / "served.safetensors", small_world.publisher(answer=False)
    small_world.worker(engine=FileEngine(path))
    publisher.publish(OLD, version="v1").wait(workers=1)
    small_world.stop("w0")
    two = publisher.publish(NEW, version="v2", allow_structure_change=True)
    assert two.release.payload is not None
    small_world.carrier.stream().drop_payload(two.release.payload.payload_id)
    first = small_world.worker(engine=FileEngine(path))
    until(lambda: first.board.status.want is not None, "v2 was accepted, and its bytes are nowhere")
    small_world.stop("w0")
    small_world.publisher().publish(NEWER, version="v3")
    again = small_world.worker(engine=FileEngine(path))
    again.wait("v3", timeout_s=20)
    assert is_in(path, NEWER)
    assert not again._pursuit._state.restructure, "the permission is used up"


# ---------------------------------------------------------------------- engines that can't follow, or fail


def test_a_torch_module_refuses_another_structure_and_serves_on(small_world: World) -> None:
    module, publisher = Zoo().eval(), small_world.publisher()
    worker = small_world.worker(engine=TorchEngine(module))
    first = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    publisher.publish(first, version="v1").wait(workers=1)
    wider = first | {"norm": torch.ones(5, dtype=torch.bfloat16)}
    two = publisher.publish(wider, version="v2", allow_structure_change=True)
    error = reason(lambda: two.wait(workers=1, timeout_s=20))
    assert isinstance(error, WorkerFailed)
    assert "NotRefittable" in error.what and "[5]" in error.what and error.tensor == "norm"
    assert served(worker).version == "v1"  # type: ignore[union-attr]
    assert two.release.fingerprint not in worker.store.manifests(), "refused before bytes moved"
    small_world.stop("w0")
    other = Zoo().eval()
    other.norm = torch.nn.Parameter(torch.zeros(5, dtype=torch.bfloat16))
    small_world.worker(engine=TorchEngine(other)).wait("v2", timeout_s=20)
    assert torch.equal(other.norm, wider["norm"]), "restarted with the new module"


def test_an_apply_that_fails_across_structures_restores_the_old_one_whole(
    small_world: World, engine: MemoryEngine
) -> None:
    """I5."""
    publisher, worker = small_world.publisher(), small_world.worker(engine=engine)
    publisher.publish(OLD, version="v1").wait(workers=1)
    engine.fail_after = 4
    bad = publisher.publish(NEW, version="v2", allow_structure_change=True)
    assert isinstance(reason(lambda: bad.wait(workers=1, timeout_s=20)), WorkerFailed)
    assert served(worker).version == "v1"  # type: ignore[union-attr]
    assert holds(worker, OLD)


def test_a_rebuild_that_loses_a_tensor_which_did_not_change_is_found(small_world: World) -> None:
    """I4: after a change of structure everything is read back, not only what changed."""

    class Forgetful(MemoryEngine):
        def apply(self, staged: StagedVersion, changed: frozenset[str]) -> None:
            super().apply(staged, changed)
            if "head" in staged.manifest.by_name:
                self.tensors["layer.0.weight"] = bytes(len(self.tensors["layer.0.weight"]))

    publisher, worker = small_world.publisher(), small_world.worker(engine=Forgetful())
    publisher.publish(OLD, version="v1").wait(workers=1)
    bad = publisher.publish(NEW, version="v2", allow_structure_change=True)
    assert "'layer.0.weight'" in str(reason(lambda: bad.wait(workers=1, timeout_s=20)))
    assert holds(worker, OLD)


# ---------------------------------------------------------------------- deltas that lie about what went


@pytest.mark.parametrize(
    ("removed", "because"),
    [(("embed.weight", "no.such", "steps"), "MalformedRecord"), (("embed.weight",), "DigestMismatch")],
    ids=["what was never there", "too little"],
)
def test_a_delta_that_removes_the_wrong_tensors_is_refused(
    small_world: World, removed: tuple[str, ...], because: str, until: Until
) -> None:
    publisher = small_world.publisher(answer=False)
    small_world.worker()
    publisher.publish(OLD, version="v1").wait(workers=1)
    small_world.stop("w0")
    two = publisher.publish(NEW, version="v2", allow_structure_change=True)
    base, target = (publisher.store.manifest(release.fingerprint) for release in publisher.book.releases())
    assert two.release.payload is not None
    small_world.carrier.stream().drop_payload(two.release.payload.payload_id)
    outsider = Outsider(small_world.carrier)
    lines = raw_lines(publisher, target, base)
    bad = craft(outsider, lines, base=base.fingerprint, target=target.fingerprint, removed=removed)
    outsider.offer(publisher, bad)
    again = small_world.worker()
    until(lambda: again.board.status.want and bad.payload_id in again.board.status.want.refused, "it is refused")
    assert because in [e.failure.code for e in small_world.events["w0"] if e.failure]
    good = craft(
        outsider, lines, base=base.fingerprint, target=target.fingerprint, removed=("embed.weight", "steps")
    )  # fmt: skip
    outsider.offer(publisher, good)
    again.wait("v2", timeout_s=20)
    assert holds(again, NEW), "the deltas of this test are well-formed"
