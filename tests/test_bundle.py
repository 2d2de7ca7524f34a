"""Engine bundles on twins: what is written is what is served, with and without the factory. No GPU, no TensorRT."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from bundle_twin import built, load_empty, loaded
from refleet.common.errors import NotRefittable, UsageError
from refleet.common.limits import LIMITS
from refleet.worker.bundle import Bundle, save
from refleet.worker.bundle_record import Spread, StoredLeaf, StoredTensor
from refleet.worker.bundle_reference import bundled_module
from refleet.worker.compare import differences
from refleet.worker.graph_text import from_data, to_data
from refleet.worker.recipe import Recipe
from refleet.worker.refit_plan import Item, Kind
from refleet.worker.signature import Signature
from refleet.worker.tensorrt_engine import TensorRTEngine
from refleet.worker.torch_state import live_state
from test_tensorrt_engine import asked, changed, near, put, same, versions
from torch import nn
from torch.utils import _pytree as pytree
from twin_engine import CPU, INPUTS, TORCH, A, B, two_load, two_plan, two_recipe


def test_an_engine_from_a_bundle_is_the_engine_that_was_built(saved_bundle: Path) -> None:
    engines = [TensorRTEngine(built(), device=CPU), loaded(saved_bundle), loaded(saved_bundle, recipe=two_recipe(5))]
    made = versions(2)
    for staged, expected in [*made, made[0]]:
        for engine in engines:
            put(engine, staged)
            assert near(asked(engine), expected)
            assert dict(engine.read_back(sorted(staged.names))) == staged.digests
            assert engine.applied.startswith("fast: ")
        assert len({(engine.build, engine.content_digest(), engine.probe()) for engine in engines}) == 1


def test_one_changed_tensor_is_one_changed_tensor_after_loading_too(saved_bundle: Path) -> None:
    (first, _), *_ = versions(1)
    fresh, engine = TensorRTEngine(built(), device=CPU), loaded(saved_bundle)
    for name, value in [("shift", torch.ones(5)), ("log_scale", torch.tensor(0.5)), ("first.bias", torch.ones(5))]:
        third = changed(first, name, value)
        put(engine, first)
        put(engine, third, frozenset({name}))
        put(fresh, third)
        assert same(asked(engine), asked(fresh))
        assert engine.content_digest() == fresh.content_digest()


def test_without_the_factory_the_module_has_the_names_and_computes_the_same(saved_bundle: Path) -> None:
    model, original = Bundle.open(saved_bundle).model(device=CPU, load=two_load), two_recipe().module
    module = model.recipe.module
    assert live_state(module).specs == live_state(original).specs
    assert type(module).__qualname__ == "Two"
    with torch.no_grad():
        module.load_state_dict(original.state_dict())
        answer, expected = module(*INPUTS[0], **INPUTS[1]), original(*INPUTS[0], **INPUTS[1])
        assert max(d.error for d in differences(answer, expected)) < 1e-6
        other = {name: torch.ones_like(tensor) for name, tensor in original.state_dict().items()}
        other["order"] = original.state_dict()["order"]
        swapped = torch.func.functional_call(module, other, *INPUTS)
        assert near(swapped, torch.func.functional_call(original, other, *INPUTS))
        assert near(module(*INPUTS[0], **INPUTS[1]), expected), "it was only for that call"


def test_drawn_weights_are_the_same_every_time_and_like_those_that_were_there(
    saved_bundle: Path,
) -> None:
    one, two = (Bundle.open(saved_bundle).model(device=CPU, load=two_load).tensors() for _ in range(2))
    original = two_recipe().module.state_dict()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name])
    assert torch.equal(one["order"], original["order"]), "another one might be no index"
    assert not torch.equal(one["first.weight"], original["first.weight"])
    assert one["first.weight"].std() == pytest.approx(float(original["first.weight"].std()), rel=0.5)


def drawn(state: list[StoredTensor], **values: torch.Tensor) -> nn.Module:
    graph = torch.fx.Graph()
    graph.output((graph.placeholder("x"),))
    spec = pytree.tree_structure(((torch.ones(1),), {}))
    signature = Signature(spec, pytree.tree_structure((torch.ones(1),)))
    return bundled_module("Made", state, values, graph, {}, signature, CPU)


def stored(name: str, tensor: torch.Tensor, same_as: str = "", spread: Spread | None = None) -> StoredTensor:
    from refleet.common.tensors import spec_of

    return StoredTensor(spec_of(name, tensor), same_as, spread)


def test_ties_names_and_dtypes_of_every_kind_are_kept_in_a_drawn_module() -> None:
    weight, positive = torch.ones(4, 3), Spread(2.0, 0.0, True)
    module = drawn([
        stored("head.weight", weight, "embed.weight", Spread(0.0, 1.0, False)),
        stored("embed.weight", weight, "embed.weight", Spread(0.0, 1.0, False)),
        stored("type", torch.ones(2), spread=positive),  # names that nn.Module would not register
        stored("keys.0.forward", torch.ones(2, dtype=torch.bfloat16), spread=Spread(0.0, 0.0, False)),
        stored("rotary", torch.ones(2, dtype=torch.complex64), spread=positive),
        stored("steps", torch.tensor(3)), stored("index", torch.tensor([1])),
    ], index=torch.tensor([7]))  # fmt: skip
    state = module.state_dict(keep_vars=True)
    assert state["head.weight"] is state["embed.weight"]
    assert bool((state["type"] > 0).all())
    assert bool(state["keys.0.forward"].any()), "zeros would prove nothing"
    assert (int(state["steps"]), int(state["index"])) == (0, 7)
    assert live_state(module).specs["rotary"].dtype == "C64"
    assert set(live_state(module).ties) == {"head.weight", "embed.weight"}


def test_a_bundle_without_weights_gets_all_of_them_before_it_answers(tmp_path: Path) -> None:
    normal, bare = tmp_path / "normal", tmp_path / "bare"
    records = [save(built(), normal), save(built(), bare, stripped=True)]
    assert [record.stripped for record in records] == [False, True]
    assert records[0].build != records[1].build
    (staged, expected), *_ = versions(1)
    engines = [loaded(bare, load=load_empty), loaded(bare, load=load_empty, recipe=two_recipe(3))]
    for engine in engines:
        put(engine, staged)
        engine.probe()
        assert near(asked(engine), expected)


def test_no_weight_of_a_version_is_in_the_tensors_of_a_bundle(tmp_path: Path) -> None:
    recipe = two_recipe()
    save(built(recipe), tmp_path / "b")
    held = Bundle.open(tmp_path / "b").values.values()
    for name, tensor in recipe.module.state_dict().items():
        if tensor.is_floating_point():
            assert not any(torch.equal(tensor, value) for value in held), name


def test_a_bundle_can_be_saved_again_with_other_engines(saved_bundle: Path, tmp_path: Path) -> None:
    engine = loaded(saved_bundle)
    (staged, _), *_ = versions(1)
    put(engine, staged)
    plans = {name: live.serialize() for name, live in engine.model.resident.engines.items()}
    record = save(engine.model, tmp_path / "b", engines=plans, version="v0", fingerprint=staged.manifest.fingerprint)
    again = Bundle.open(tmp_path / "b")
    before = Bundle.open(saved_bundle).record
    assert {part: compiled.plan for part, compiled in again.engines.items()} == plans
    assert (again.record.version, again.record.fingerprint) == ("v0", staged.manifest.fingerprint)
    assert (record.plan, record.graphs, record.reference) == (before.plan, before.graphs, before.reference)
    other = loaded(tmp_path / "b")
    put(other, staged)
    assert same(asked(other), asked(engine))


def test_the_measured_errors_and_the_tolerance_come_along(tmp_path: Path) -> None:
    model = built(Recipe(two_recipe().module, *INPUTS, tolerance=0.03))
    model.measured = {"['y']": 1e-7}
    save(model, tmp_path / "b")
    found = Bundle.open(tmp_path / "b").model(device=CPU, load=two_load)
    assert found.recipe.tolerance == 0.03
    assert found.measured["['y']"] >= 1e-7


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))


def test_probe_inputs_of_every_kind_are_stored_and_others_refused() -> None:
    for value in (None, True, False, 3, -(1 << 62), 0.1, float("inf"), "text"):
        stored_leaf = StoredLeaf.of(value)
        assert stored_leaf is not None
        assert stored_leaf.value == value
        assert type(stored_leaf.value) is type(value)
    assert StoredLeaf.of(torch.ones(1)) == StoredLeaf("tensor", "")
    assert StoredLeaf.of(object()) is None


def test_complex_and_strided_and_shared_constants_survive(tmp_path: Path) -> None:
    wide = torch.arange(12.0).view(3, 4)
    constants = {
        "axes": torch.tensor([-1], dtype=torch.int32), "rotary": torch.tensor([1 + 2j]), "column": wide[:, 1],
        "whole": wide, "nothing": torch.zeros(0, 3), "half": torch.ones(2, dtype=torch.bfloat16),
    }  # fmt: skip
    items = {**two_plan().items}
    for name, tensor in constants.items():
        items[(A, f"{name} CONSTANT x")] = Item(Kind.CONST, name, tensor.dtype, tuple(tensor.shape))
    model = built(plan=dataclasses.replace(two_plan(), constants=constants, items=items))
    save(model, tmp_path / "b")
    plan = Bundle.open(tmp_path / "b").model(device=CPU, load=two_load).plan
    assert plan is not None
    for name, tensor in constants.items():
        assert torch.equal(plan.constants[name], tensor)
        assert plan.constants[name].dtype == tensor.dtype


def test_a_tensor_that_no_file_can_hold_is_refused_by_name(tmp_path: Path) -> None:
    constants = {"axes": torch.tensor([1 + 2j], dtype=torch.complex128)}
    with pytest.raises(NotRefittable, match="complex128"):
        save(built(plan=dataclasses.replace(two_plan(), constants=constants)), tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_graph_that_can_not_be_stored_is_refused(tmp_path: Path) -> None:
    model = built()
    part = model.resident.graph.get_submodule(TORCH)
    node = next(node for node in part.graph.nodes if node.op == "call_function")  # type: ignore[union-attr]
    node.target = torch.add
    with pytest.raises(NotRefittable, match="can't be stored") as caught:
        save(model, tmp_path / "b")
    assert str(tmp_path / "b") in caught.value.about
    assert not (tmp_path / "b").exists()


def test_a_model_without_refit_plan_needs_its_factory_and_its_weights(tmp_path: Path) -> None:
    model = built()
    model.plan, model.why_not_fast = None, "no rule for a weight"
    with pytest.raises(NotRefittable, match="no rule for a weight"):
        save(model, tmp_path / "b", stripped=True)
    save(model, tmp_path / "b")
    with pytest.raises(NotRefittable, match=r"with its factory.*no rule for a weight"):
        Bundle.open(tmp_path / "b").model(device=CPU, load=two_load)
    with_factory = Bundle.open(tmp_path / "b").model(device=CPU, load=two_load, recipe=two_recipe())
    assert (with_factory.plan, with_factory.why_not_fast) == (None, "no rule for a weight")
    assert with_factory.lower is not None


def test_the_rules_of_a_plan_must_cover_the_engines_that_are_loaded(tmp_path: Path) -> None:
    items = {k: v for k, v in two_plan().items.items() if k != (B, "second/bias CONSTANT")}
    save(built(plan=dataclasses.replace(two_plan(), items=items)), tmp_path / "b")
    with pytest.raises(NotRefittable, match="second/bias CONSTANT"):
        Bundle.open(tmp_path / "b").model(device=CPU, load=two_load)


# ---------------------------------------------------------------------- where it is written


def test_what_is_no_bundle_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    (tmp_path / "file").write_text("")
    for path, words in [("mine", "thesis.tex"), ("file", "no folder"), ("nowhere/b", "there is no folder")]:
        with pytest.raises(UsageError, match=words):
            save(built(), tmp_path / path)
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_a_bundle_takes_the_place_of_an_empty_folder_and_of_another_bundle(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    save(built(), tmp_path / "b")
    save(built(), tmp_path / "b", stripped=True)
    assert Bundle.open(tmp_path / "b").record.stripped
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_file_system_that_can_not_exchange_folders_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ctypes

    monkeypatch.setattr(ctypes, "CDLL", lambda *_args, **_kwargs: object())
    save(built(), tmp_path / "b")
    save(built(), tmp_path / "b", stripped=True)
    assert Bundle.open(tmp_path / "b").record.stripped
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_graphs_are_stored_as_their_nodes_and_nothing_else(saved_bundle: Path) -> None:
    import json

    for graph in Bundle.open(saved_bundle).record.graphs:
        data = json.loads(graph.text)
        assert to_data(from_data(data)) == data
    assert LIMITS.bundle_record_bytes > 1 << 20
