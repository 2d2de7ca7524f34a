"""The TensorRT engine's decisions and failures, on twins that compute with torch: no GPU, no TensorRT."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import pytest
import torch
from engine_cases import Staged, version
from refleet.common.errors import NotRefittable, ProbeMismatch, Quarantined, RefitFailed, UsageError
from refleet.common.store import Store
from refleet.common.tensors import spec_of, tensor_bytes
from refleet.worker.apply import switch
from refleet.worker.gate import Gate
from refleet.worker.refit_plan import Formula, Item, Kind, RefitPlan
from refleet.worker.tensorrt_engine import TensorRTEngine
from torch import Tensor
from twin_engine import CPU, INPUTS, TORCH, A, B, Two, twins, two_model, two_plan, two_recipe

Answer = dict[str, Tensor]


def engine_of(plan: RefitPlan | None = None, **arguments: object) -> TensorRTEngine:
    return TensorRTEngine(two_model(two_recipe(), plan=plan), device=CPU, **arguments)  # type: ignore[arg-type]


def staged_of(module: torch.nn.Module, name: str, seq: int) -> Staged:
    state = {n: t.detach().clone() for n, t in module.state_dict().items()}
    specs = [spec_of(n, t) for n, t in state.items()]
    return version({n: bytes(tensor_bytes(t)) for n, t in state.items()}, specs, name=name, seq=seq)


def versions(count: int = 3) -> list[tuple[Staged, Answer]]:
    """Versions with other weights each, and what PyTorch answers with them."""
    made = []
    for n in range(count):
        torch.manual_seed(n)
        module = Two().eval()
        with torch.no_grad():
            made.append((staged_of(module, f"v{n}", n + 1), module(*INPUTS[0], **INPUTS[1])))
    return made


def changed(base: Staged, name: str, value: Tensor) -> Staged:
    tensors = {**base.tensors, name: bytes(tensor_bytes(value))}
    specs = [entry.spec for entry in base.manifest.tensors]
    return version(tensors, specs, name=f"{base.serving.version}-{name}", seq=base.serving.seq + 10)


def put(engine: TensorRTEngine, staged: Staged, names: frozenset[str] | None = None) -> None:
    engine.prepare(staged, staged.names if names is None else names)
    engine.apply(staged, staged.names if names is None else names)


def asked(engine: TensorRTEngine) -> Answer:
    answer: Answer = engine(*INPUTS[0], **INPUTS[1])
    return answer


def near(answer: Answer, expected: Answer) -> bool:
    return all(torch.allclose(answer[key], expected[key], atol=1e-5) for key in expected)


def same(one: Answer, two: Answer) -> bool:
    return all(torch.equal(one[key], two[key]) for key in two)


def test_versions_go_in_and_come_back_bit_for_bit() -> None:
    engine, made = engine_of(), versions(2)
    seen = []
    for staged, expected in [*made, made[0]]:
        put(engine, staged)
        engine.probe()
        assert near(asked(engine), expected)
        assert dict(engine.read_back(sorted(staged.names))) == staged.digests
        seen.append((asked(engine), engine.content_digest(), engine.probe()))
    assert same(seen[0][0], seen[2][0])
    assert seen[0][1:] == seen[2][1:] != seen[1][1:]


def test_a_changed_tensor_moves_only_the_weights_that_depend_on_it() -> None:
    engine, ((first, _), (second, _), *_) = engine_of(), versions()
    put(engine, first)
    one, two = twins(engine.model)
    one.refits, two.refits = [], []
    value = torch.frombuffer(bytearray(second.tensors["log_scale"]), dtype=torch.float32).view(())
    third = changed(first, "log_scale", value)
    put(engine, third, frozenset({"log_scale"}))
    engine.probe()
    assert one.refits == []
    assert "second/weight CONSTANT" in two.refits[0]
    assert engine.applied == "fast: 1 of 5 engine weights refitted"


def test_a_torch_executed_part_switches_with_the_engines_and_not_before() -> None:
    engine, ((first, expected), (second, _), *_) = engine_of(), versions()
    put(engine, first)
    value = torch.frombuffer(bytearray(second.tensors["shift"]), dtype=torch.float32)
    third = changed(first, "shift", value)
    engine.prepare(third, frozenset({"shift"}))
    assert near(asked(engine), expected)
    engine.apply(third, frozenset({"shift"}))
    engine.probe()
    assert not near(asked(engine), expected)


def test_preparing_changes_no_answer_and_can_be_undone() -> None:
    engine, ((first, expected), (second, _), *_) = engine_of(), versions()
    put(engine, first)
    before, held = asked(engine), engine.content_digest()
    assert engine.prepare(second, second.names)
    assert dict(engine.read_back(["shift"])) == {"shift": second.digests["shift"]}
    assert same(asked(engine), before)
    engine.prepare(first, first.names)
    assert dict(engine.read_back(sorted(first.names))) == first.digests
    assert engine.content_digest() == held
    assert near(asked(engine), expected)


def test_what_an_abandoned_version_left_behind_is_overwritten_by_the_next() -> None:
    """The caller counts changes from what the engine holds, and knows nothing of a version that was only prepared."""
    engine, ((first, _), (second, _), *_) = engine_of(), versions()
    put(engine, first)
    engine.prepare(second, second.names)
    third = changed(first, "first.bias", torch.ones(5))
    put(engine, third, frozenset({"first.bias"}))
    engine.probe()
    assert dict(engine.read_back(sorted(third.names))) == third.digests


def test_an_adapter_leaves_nothing_behind() -> None:
    """A, then B, both relative to the base: B must not be on top of A."""
    engine, ((base, _), *_) = engine_of(), versions()
    put(engine, base)
    with_a, with_b = changed(base, "first.weight", torch.ones(5, 6)), changed(base, "second.bias", torch.ones(3))
    put(engine, with_a, frozenset({"first.weight"}))
    put(engine, with_b, frozenset({"first.weight", "second.bias"}))
    fresh = engine_of()
    put(fresh, with_b)
    assert same(asked(engine), asked(fresh))
    assert engine.content_digest() == fresh.content_digest()


def test_a_tensor_that_nothing_reads_needs_no_refit() -> None:
    engine, ((first, _), *_) = engine_of(), versions()
    put(engine, first)
    put(engine, changed(first, "seen", torch.tensor(7)), frozenset({"seen"}))
    assert engine.applied == "fast: 0 of 5 engine weights refitted"


def test_weights_that_go_in_together_are_set_together() -> None:
    engine, ((first, _), *_) = engine_of(), versions()
    one, _ = twins(engine.model)
    one.needs = (frozenset(one.weights),)
    put(engine, first)
    one.refits.clear()
    put(engine, changed(first, "first.bias", torch.ones(5)), frozenset({"first.bias"}))
    engine.probe()
    assert one.refits == [one.weights]


# ---------------------------------------------------------------------- what the plan does not cover


@pytest.mark.parametrize(
    ("plan", "name", "words"),
    [
        (two_plan(), "order", "integers"),
        (dataclasses.replace(two_plan(), items={k: v for k, v in two_plan().items.items() if k != (TORCH, "shift")}),
         "shift", "no engine weight is known"),
        (dataclasses.replace(two_plan(), items={
            **two_plan().items,
            (A, "first/bias CONSTANT"): Item(Kind.UNKNOWN, "", torch.float32, (5,), "no rule"),
        }), "shift", "first/bias CONSTANT"),
    ],
    ids=["integer", "entry removed", "unknown"],
)  # fmt: skip
def test_a_change_that_the_plan_does_not_cover_is_refused_on_the_fast_path(
    plan: RefitPlan, name: str, words: str
) -> None:
    engine, ((first, _), *_) = engine_of(plan, apply="fast"), versions()
    live = Two().state_dict()[name]
    other = changed(first, name, live.flip(-1))
    held = engine.content_digest()
    for way in ("fast", "auto"):
        engine = engine_of(plan, apply=way)
        with pytest.raises(NotRefittable, match=words):
            engine.prepare(other, frozenset({name}))
        assert engine.content_digest() == held


def test_a_plan_without_an_engine_weight_does_not_cover_the_engine() -> None:
    items = {k: v for k, v in two_plan().items.items() if k != (B, "second/bias CONSTANT")}
    plan = dataclasses.replace(two_plan(), items=items)
    with pytest.raises(NotRefittable, match="second/bias CONSTANT"):
        two_model(two_recipe()).resident.check_covered(plan)


def test_a_weight_of_another_size_than_the_plan_says_is_not_covered() -> None:
    items = {**two_plan().items, (B, "second/bias CONSTANT"): Item(Kind.DIRECT, "second.bias", torch.float16, (3,))}
    plan = dataclasses.replace(two_plan(), items=items)
    with pytest.raises(NotRefittable, match="second/bias CONSTANT"):
        two_model(two_recipe()).resident.check_covered(plan)


def test_a_rule_that_can_not_be_computed_is_no_rule() -> None:
    plan = dataclasses.replace(
        two_plan(), formulas={"fold": Formula(two_plan().formulas["fold"].graph, ("shift", "order"))}
    )
    values = Two().state_dict()
    values["shift"] = torch.zeros(2, 2, 7)
    with pytest.raises(NotRefittable, match="'fold' can't be computed"):
        plan.values({**values, "order": torch.zeros(2, 3, 5)}.__getitem__)((B, "second/weight CONSTANT"))


def test_the_reference_path_needs_a_factory() -> None:
    engine, ((first, _), *_) = engine_of(apply="reference"), versions()
    with pytest.raises(NotRefittable, match="no other"):
        engine.prepare(first, first.names)


def test_an_unknown_way_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="auto, fast, reference"):
        engine_of(apply="quick")


# ---------------------------------------------------------------------- failures, through the worker's own switch


class Bench:
    """An engine behind a gate, switched as the worker does."""

    def __init__(self, folder: Path, engine: TensorRTEngine):
        self.engine, self.gate, self.store = engine, Gate(), Store(folder)
        self.serving: Staged | None = None

    def to(self, staged: Staged) -> None:
        switch(
            self.engine, self.gate, self.store, staged, holds=self.serving.manifest if self.serving else None,
            previous=self.serving, persist=lambda: None, drain_s=5,
            on_remnant=lambda: None,
        )  # fmt: skip
        self.serving = staged
        self.engine.served(staged.serving)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    made = Bench(tmp_path / "store", engine_of())
    made.to(versions()[0][0])
    return made


def test_a_rejected_weight_leaves_the_previous_version_bit_for_bit(bench: Bench) -> None:
    before, held = asked(bench.engine), bench.engine.content_digest()
    one, two = twins(bench.engine.model)
    one.rejects, two.rejects = set(), {"second/bias CONSTANT"}
    for live in (one, two):
        for name in list(live.weights):
            live.unset(name)
    bench.engine.model.resident._set = {A: {}, B: {}}
    other = versions()[1][0]
    with pytest.raises((RefitFailed, Quarantined)) as caught:
        bench.to(other)
    assert "second/bias CONSTANT" in str(caught.value)
    # the rejected weight can't be put back either as long as it is rejected: then nothing is served
    if isinstance(caught.value, Quarantined):
        assert bench.gate.current is None
    else:
        assert same(asked(bench.engine), before)
        assert bench.engine.content_digest() == held


def test_a_weight_rejected_once_leaves_the_previous_version_bit_for_bit(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, held = asked(bench.engine), bench.engine.content_digest()
    _, two = twins(bench.engine.model)
    bench.engine.model.resident._set[B].clear()
    real, refusals = two.set, iter([False])
    monkeypatch.setattr(two, "set", lambda name, value: next(refusals, True) and real(name, value))
    with pytest.raises(RefitFailed, match="rejected"):
        bench.to(versions()[1][0])
    assert bench.gate.current is not None
    assert bench.gate.current.version == "v0"
    assert same(asked(bench.engine), before)
    assert bench.engine.content_digest() == held


def test_a_failure_between_two_engines_is_healed_by_putting_in_everything(bench: Bench) -> None:
    before, held = asked(bench.engine), bench.engine.content_digest()
    one, two = twins(bench.engine.model)
    two.fail_refit = True  # the first engine has the new weights by then, the second half of them
    one.refits.clear()
    two.refits.clear()
    with pytest.raises(RefitFailed, match=B):
        bench.to(versions()[1][0])
    assert bench.gate.current is not None
    assert bench.gate.current.version == "v0"
    assert same(asked(bench.engine), before)
    assert bench.engine.content_digest() == held
    assert one.refits[-1] == one.weights
    assert two.refits[-1] == two.weights


def test_after_a_failed_refit_the_restore_does_not_trust_what_the_engine_holds(bench: Bench) -> None:
    """One tensor changed, but a failed refit may have hit any weight: all of them are put in again."""
    _, two = twins(bench.engine.model)
    two.fail_refit = True
    two.refits.clear()
    base = versions()[0][0]
    with pytest.raises(RefitFailed):
        bench.to(changed(base, "second.bias", torch.ones(3)))
    assert two.refits[-1] == two.weights


def swapped() -> RefitPlan:
    """Two rules confused, as a map by value would where two tensors were equal."""
    bias, shift = (A, "first/bias CONSTANT"), (TORCH, "shift")
    items = two_plan().items
    wrong = {
        bias: dataclasses.replace(items[bias], origin="shift"),
        shift: dataclasses.replace(items[shift], origin="first.bias"),
    }
    return dataclasses.replace(two_plan(), items={**items, **wrong})


def test_a_wrong_rule_in_the_plan_is_caught_by_the_probe(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "store", engine_of(swapped()))
    with pytest.raises(ProbeMismatch, match="away from PyTorch"):
        bench.to(versions()[0][0])
    assert bench.gate.current is None  # there is no earlier version to go back to


def test_a_wrong_rule_that_shows_only_later_brings_the_previous_version_back(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "store", engine_of(swapped()))
    base, other = versions()[0][0], versions()[1][0]
    equal = changed(base, "first.bias", torch.frombuffer(bytearray(base.tensors["shift"]), dtype=torch.float32))
    bench.to(equal)  # both tensors are equal, so that the confusion does not matter
    before, held = asked(bench.engine), bench.engine.content_digest()
    with pytest.raises(ProbeMismatch, match="away from PyTorch"):
        bench.to(other)
    assert bench.gate.current is not None
    assert bench.gate.current.version == equal.serving.version
    assert same(asked(bench.engine), before)
    assert bench.engine.content_digest() == held


def test_when_going_back_fails_too_nothing_is_served(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    _, two = twins(bench.engine.model)
    monkeypatch.setattr(two, "refit", lambda: False)
    with pytest.raises(Quarantined, match="content is unknown"):
        bench.to(versions()[1][0])
    assert bench.gate.current is None


def test_answers_that_differ_from_the_first_time_are_not_served(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal weights and build, other bits: within tolerance of PyTorch, and still not the version that was proven."""
    one, two = versions()[0][0], versions()[1][0]
    bench.to(two)
    live, _ = twins(bench.engine.model)
    real = live._compute
    monkeypatch.setattr(live, "_compute", lambda held, inputs: [real(held, inputs)[0] * (1 + 1e-6)])
    with pytest.raises((ProbeMismatch, Quarantined), match="differently"):
        bench.to(one)


def test_no_answer_mixes_two_versions_while_updates_stream(bench: Bench) -> None:
    made = versions(4)
    expected = {staged.serving.version: answer for staged, answer in made}
    wrong: list[str] = []
    answered: set[str] = set()
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            with bench.gate.serving() as serving:
                if not near(asked(bench.engine), expected[serving.version]):
                    wrong.append(serving.version)
                answered.add(serving.version)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(10):
            for staged, _ in made:
                bench.to(staged)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong
    assert len(answered) > 1


# ---------------------------------------------------------------------- calls and structure


def test_a_call_with_other_arguments_is_a_type_error() -> None:
    engine = engine_of()
    with pytest.raises(TypeError, match="compiled for"):
        engine(*INPUTS[0])


def test_another_structure_is_refused_by_name_unless_a_factory_can_build_it() -> None:
    engine, ((first, _), *_) = engine_of(), versions()
    specs = [entry.spec for entry in first.manifest.tensors if entry.spec.name != "shift"]
    other = version({n: d for n, d in first.tensors.items() if n != "shift"}, specs, name="other", seq=9)
    for restructure in (False, True):
        with pytest.raises(NotRefittable, match="shift") as caught:
            engine.check(other.manifest, restructure=restructure)
    assert "factory" in caught.value.next
    with pytest.raises(NotRefittable, match="shift"):
        engine.prepare(other, other.names)
