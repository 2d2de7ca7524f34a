"""The same contract, in two halves and across structures: preparing while requests are answered, and being rebuilt."""

from __future__ import annotations

import pytest
from engine_cases import Case, Staged, one_changed, with_spec, without, zoo_version
from refleet.common.errors import DigestMismatch, NotRefittable, RefitFailed
from refleet.worker.engine import Engine
from refleet.worker.memory_engine import MemoryEngine


@pytest.mark.parametrize("staged", [with_spec("norm", "F16", (4,)), without("mask")], ids=["dtype", "missing"])
def test_an_allowed_structure_change_changes_nothing_for_an_engine_that_can_not_be_rebuilt(
    case: Case, staged: Staged
) -> None:
    first = zoo_version(1)
    case.engine.apply(first, first.names)
    staged.restructure = True
    if case.kind == "file":
        case.engine.check(staged.manifest, restructure=True)
        return
    attempts = (
        lambda: case.engine.check(staged.manifest, restructure=True),
        lambda: case.engine.apply(staged, staged.names),
    )
    for attempt in attempts:
        with pytest.raises(NotRefittable) as caught:
            attempt()
        assert case.kind == "memory" or "restart the worker with a factory" in caught.value.next
        assert case.read_back(first.names) == first.digests


@pytest.mark.parametrize(
    "staged",
    [with_spec("norm", "F16", (4,)), with_spec("norm", "BF16", (2, 2)), with_spec("new", "I8", (3,)), without("mask")],
    ids=["dtype", "shape", "extra", "missing"],
)
@pytest.mark.parametrize("prepared", [True, False])
def test_an_engine_that_can_be_rebuilt_holds_exactly_the_new_structure_and_then_the_old_one_again(
    follower: Engine, staged: Staged, prepared: bool
) -> None:
    first = zoo_version(1)
    follower.apply(first, first.names)
    with pytest.raises(NotRefittable):
        follower.check(staged.manifest)
    staged.restructure = first.restructure = True
    for version_, gone in ((staged, first.names - staged.names), (first, staged.names - first.names)):
        follower.check(version_.manifest, restructure=True)
        if prepared:
            follower.prepare(version_, version_.names)
        follower.apply(version_, version_.names)
        assert dict(follower.read_back(sorted(version_.names))) == version_.digests
        for name in gone:
            with pytest.raises(DigestMismatch):
                list(follower.read_back([name]))


def test_preparing_changes_no_answer_and_applying_then_gives_the_version(case: Case) -> None:
    one, two = zoo_version(1), zoo_version(2)
    case.engine.apply(one, one.names)
    answer = case.engine.probe()
    tells = case.engine.prepare(two, two.names)
    assert case.engine.probe() == answer
    assert case.read_back(two.names) == (two if tells else one).digests
    case.engine.apply(two, two.names)
    assert case.read_back(two.names) == two.digests
    assert case.engine.probe() != answer or case.kind == "file"


def test_what_was_prepared_and_undone_leaves_no_trace(case: Case) -> None:
    one, two = zoo_version(1), zoo_version(2)
    case.engine.apply(one, one.names)
    case.engine.prepare(two, two.names)
    case.engine.prepare(one, two.names)
    assert case.read_back(one.names) == one.digests
    three = one_changed(one, "norm")
    case.engine.prepare(three, frozenset({"norm"}))
    case.engine.apply(three, frozenset({"norm"}))
    assert case.read_back(three.names) == three.digests


def test_applying_another_version_than_the_prepared_one_leaves_nothing_of_that(case: Case) -> None:
    """What a restore does after a switch that failed."""
    one, two = zoo_version(1), zoo_version(2)
    case.engine.apply(one, one.names)
    answer = case.engine.probe()
    case.engine.prepare(two, two.names)
    case.engine.apply(one, frozenset({"norm"}))
    assert case.read_back(one.names) == one.digests
    assert case.engine.probe() == answer


@pytest.mark.parametrize("failing", ["columns", "wide"])
def test_a_failed_prepare_raises_what_apply_would_and_is_undone_by_preparing_the_old_version(
    case: Case, failing: str
) -> None:
    old, new = zoo_version(1), zoo_version(2)
    case.engine.apply(old, old.names)
    new.broken = {failing: OSError("disk gone")}
    try:
        assert case.engine.prepare(new, new.names) is False, "it read nothing, so it can't tell what it will hold"
    except RefitFailed as error:
        assert error.tensor == failing
    case.engine.prepare(old, new.names)
    assert case.read_back(old.names) == old.digests


@pytest.mark.parametrize("done", [0, 3])
def test_a_prepared_memory_engine_fails_half_swapped_and_is_restored(done: int) -> None:
    engine, old, new = MemoryEngine(prepares=True), zoo_version(1), zoo_version(2)
    engine.apply(old, old.names)
    assert engine.prepare(new, new.names)
    engine.fail_after = done
    with pytest.raises(RefitFailed):
        engine.apply(new, new.names)
    assert {name for name, data in engine.tensors.items() if data == new.tensors[name]} >= set(sorted(new.names)[:done])
    engine.apply(old, new.names)
    assert dict(engine.read_back(old.names)) == old.digests


def test_the_memory_engine_fails_to_prepare_once_when_it_is_told_to() -> None:
    engine, old, new = MemoryEngine(prepares=True), zoo_version(1), zoo_version(2)
    engine.apply(old, old.names)
    engine.fail_prepare = True
    with pytest.raises(RefitFailed):
        engine.prepare(new, new.names)
    assert dict(engine.read_back(old.names)) != old.digests, "half prepared"
    assert engine.prepare(old, new.names)
    assert dict(engine.read_back(old.names)) == old.digests
