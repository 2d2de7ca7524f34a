"""Fast, reference, rebuilt: which way a version takes, and what happens when a way does not lead there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import Staged
from refleet.common.errors import ProbeMismatch, RefitFailed
from refleet.worker import official
from refleet.worker.recipe import Recipe
from refleet.worker.tensorrt_engine import TensorRTEngine
from refleet.worker.torch_trt import Compiled
from refleet.worker.trt_make import Maker
from refleet.worker.trt_model import Model
from test_tensorrt_engine import Bench, asked, changed, near, same, versions
from twin_engine import CPU, TORCH, TwinEngine, twins, two_model, two_recipe

#: changes the integers that the model reads, which no plan covers
ORDER = torch.tensor([1, 2, 0])
#: what to do to the engines that the official way returns
Spoil = Callable[[dict[str, TwinEngine]], None]


class Ways:
    """An engine whose other ways lead to twins as well; counts how often each is taken."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, apply: str = "auto", plan: bool = True):
        self.taken: list[str] = []
        self.closed: list[Model] = []
        self.spoil: Spoil = lambda _engines: None
        self.raises: Exception | None = None
        self._next: dict[str, TwinEngine] = {}
        model = two_model(two_recipe())
        model.lower = lambda: None  # type: ignore[assignment,return-value] - only handed on
        if not plan:
            model.plan, model.why_not_fast = None, "no plan could be made"
        monkeypatch.setattr(official, "refitted", self._official)
        monkeypatch.setattr(Maker, "model", lambda _maker, recipe, **_: self._built(recipe))
        monkeypatch.setattr(Model, "close", lambda closed: self.closed.append(closed))
        self.engine = TensorRTEngine(model, apply=apply, device=CPU, load=lambda _compiled, name: self._next[name])

    def _official(self, recipe: Recipe, _lowering: object, engines: dict[str, Compiled]) -> tuple[Any, Any]:
        self.taken.append("reference")
        if self.raises is not None:
            raise self.raises
        made = two_model(recipe)
        self._next = made.resident.engines  # type: ignore[assignment]
        self.spoil(self._next)
        return engines, made.resident.graph

    def _built(self, recipe: Recipe) -> Model:
        self.taken.append("rebuilt")
        return two_model(recipe)


def wrong(engines: dict[str, TwinEngine]) -> None:
    """As if the official way had left an old weight in, and said nothing."""
    for engine in engines.values():
        for name in engine.weights:
            if "weight" in name:
                engine._held[name] = engine._held[name].roll(1)


def integers(base: Staged) -> Staged:
    return changed(base, "order", ORDER)


@pytest.fixture
def first() -> Staged:
    return versions(1)[0][0]


def test_without_a_plan_the_official_way_is_taken_and_the_ack_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ways = Ways(monkeypatch, plan=False)
    bench = Bench(tmp_path, ways.engine)
    for staged, expected in versions(2):
        bench.to(staged)
        assert near(asked(ways.engine), expected)
        assert ways.engine.applied == "reference: no plan could be made"
    assert ways.taken == ["reference"] * 2


def test_requests_are_answered_by_the_old_engine_until_the_new_one_is_proven(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ways = Ways(monkeypatch, plan=False)
    (one, expected), (two, other) = versions(2)
    Bench(tmp_path, ways.engine).to(one)
    ways.engine.prepare(two, two.names)
    assert near(asked(ways.engine), expected)
    ways.engine.apply(two, two.names)
    assert near(asked(ways.engine), other)


def test_an_official_way_that_is_silently_wrong_is_found_by_the_probe_and_the_engine_rebuilt(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ways = Ways(monkeypatch, plan=False)
    ways.spoil = wrong
    staged, expected = versions(1)[0]
    Bench(tmp_path, ways.engine).to(staged)
    assert near(asked(ways.engine), expected)
    assert ways.engine.applied.startswith("rebuilt: no plan could be made; refit_module_weights: output")
    assert ways.taken == ["reference", "rebuilt"]


def test_an_official_way_that_raises_is_followed_by_a_rebuild(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, first: Staged
) -> None:
    ways = Ways(monkeypatch, plan=False)
    ways.raises = RefitFailed("refit_module_weights failed: KeyError: 'x'")
    Bench(tmp_path, ways.engine).to(first)
    assert ways.taken == ["reference", "rebuilt"]


def test_where_only_the_official_way_is_allowed_a_wrong_one_keeps_the_old_version(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ways = Ways(monkeypatch, apply="reference")
    bench = Bench(tmp_path, ways.engine)
    (one, expected), (two, _) = versions(2)
    bench.to(one)
    assert ways.engine.applied == "reference: asked for"
    before = asked(ways.engine)
    ways.spoil = wrong
    with pytest.raises(ProbeMismatch, match="away from PyTorch"):
        bench.to(two)
    assert bench.gate.current is not None
    assert bench.gate.current.version == "v0"
    assert same(asked(ways.engine), before)
    assert near(asked(ways.engine), expected)


def test_after_a_change_that_the_plan_does_not_cover_the_next_one_is_fast_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, first: Staged
) -> None:
    ways = Ways(monkeypatch)
    bench = Bench(tmp_path, ways.engine)
    bench.to(first)
    plan = ways.engine.model.plan
    assert plan is not None
    known = {address: item for address, item in plan.items.items() if address != (TORCH, "shift")}
    ways.engine.model.plan = dataclasses.replace(plan, items=known)
    second = changed(first, "shift", torch.linspace(-1, 1, 5))
    bench.to(second)
    assert ways.engine.applied.startswith("reference: the refit plan does not cover a change of 'shift'")
    one, two = twins(ways.engine.model)
    assert one.refits == [one.weights]  # the slow first refit of the new engine, before it took over
    assert two.refits == [two.weights]
    bench.to(changed(second, "first.bias", torch.ones(5)))
    assert ways.engine.applied == "fast: 1 of 5 engine weights refitted"
    assert ways.taken == ["reference"]


def test_other_integers_rebuild_the_engine_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, first: Staged
) -> None:
    ways = Ways(monkeypatch)
    bench = Bench(tmp_path, ways.engine)
    bench.to(first)
    assert ways.engine.applied.startswith("fast: ")
    bench.to(integers(first))
    assert ways.engine.applied.startswith("rebuilt: the refit plan does not cover a change of 'order'")
    assert ways.taken == ["rebuilt"]


def test_a_failure_after_the_new_engine_took_over_takes_the_old_one_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ways = Ways(monkeypatch, plan=False)
    bench = Bench(tmp_path, ways.engine)
    (one, _), (two, _) = versions(2)
    bench.to(one)
    served, before, held = ways.engine.model, asked(ways.engine), ways.engine.content_digest()
    ways.taken.clear()
    real, calls = ways.engine.probe, iter([ProbeMismatch("as asked")])

    def probe() -> bytes:
        for error in calls:
            raise error
        return real()

    monkeypatch.setattr(ways.engine, "probe", probe)
    with pytest.raises(ProbeMismatch, match="as asked"):
        bench.to(two)
    assert ways.engine.model is served
    assert ways.engine.applied == "back to the engine of v0"
    assert same(asked(ways.engine), before)
    assert ways.engine.content_digest() == held
    assert ways.taken == ["reference"]  # no second one for going back


def test_engines_that_are_not_needed_any_more_are_freed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ways = Ways(monkeypatch, plan=False)
    bench = Bench(tmp_path, ways.engine)
    (one, _), (two, _) = versions(2)
    bench.to(one)
    served = ways.engine.model
    ways.closed.clear()
    ways.engine.prepare(two, two.names)
    prepared = ways.engine._prepared
    assert prepared is not None
    ways.engine.prepare(one, one.names)  # given up
    assert ways.closed == [prepared.model]
    bench.to(two)
    assert ways.closed == [prepared.model, served]
