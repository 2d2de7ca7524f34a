"""The whole TensorRT engine over really lowered models, with twins in place of engines that only a GPU can build."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from engine_cases import Staged, version
from families import FAMILIES
from lowered_twins import twin_engines
from refleet.common.tensors import spec_of, tensor_bytes
from refleet.worker.recipe import Recipe
from refleet.worker.tensorrt_engine import TensorRTEngine
from refleet.worker.torch_trt import Compiled
from refleet.worker.trt_model import perturbed, same_bits
from twin_engine import CPU, TwinEngine

NAMES = [
    "mlp", "equal_zeros", "tied", "lstm", "gru_used_twice", "weight_norm", "conv_transpose2d", "merged_lora", "fp16",
    "bf16", "bias_table", "several_outputs_and_keywords", "parts_in_torch", "position_and_class_tokens", "gpt2", "bert",
    "llama", "vision_transformer", "deep_transformer",
]  # fmt: skip


def engine_of(recipe: Recipe) -> TensorRTEngine:
    twins: dict[str, TwinEngine] = {}

    def build(made: Recipe) -> dict[str, Compiled]:
        compiled, engines = twin_engines(made)
        twins.update(engines)
        return compiled

    return TensorRTEngine(recipe, apply="fast", device=CPU, build=build, load=lambda _compiled, name: twins[name])


def staged(recipe: Recipe, seed: int) -> Staged:
    """A version with other weights of the same kind."""
    state = recipe.module.state_dict()
    values = {name: perturbed(f"{name} {seed}", tensor) for name, tensor in state.items()}
    by_place = {tensor.data_ptr(): name for name, tensor in state.items() if tensor.numel()}
    values = {name: values[by_place.get(state[name].data_ptr(), name)] for name in state}  # ties stay tied
    specs = [spec_of(name, tensor) for name, tensor in values.items()]
    data = {name: bytes(tensor_bytes(tensor.contiguous())) for name, tensor in values.items()}
    return version(data, specs, name=f"v{seed}", seq=seed)


@pytest.mark.parametrize("name", NAMES)
def test_versions_go_in_on_the_fast_path_and_come_back(name: str) -> None:
    torch.manual_seed(5)
    recipe = FAMILIES[name]()
    one, two = staged(recipe, 1), staged(recipe, 2)
    engine = engine_of(recipe)
    seen = []
    for version_ in (one, two, one):
        engine.prepare(version_, version_.names)
        engine.apply(version_, version_.names)
        probe = engine.probe()  # every output against PyTorch with the same weights
        seen.append((probe, engine.content_digest(), engine.model.probe()))
        assert dict(engine.read_back(sorted(version_.names))) == version_.digests
        assert engine.applied.startswith("fast: ")
    assert seen[0][:2] == seen[2][:2] != seen[1][:2]
    assert same_bits(seen[0][2], seen[2][2])


@pytest.mark.parametrize("name", ["lstm", "merged_lora", "parts_in_torch", "tied", "llama"])
def test_one_tensor_at_a_time_gives_what_all_at_once_gives(name: str) -> None:
    torch.manual_seed(6)
    recipe = FAMILIES[name]()
    base, goal = staged(recipe, 1), staged(recipe, 2)
    engine = engine_of(recipe)
    engine.prepare(goal, goal.names)
    engine.apply(goal, goal.names)
    expected, held = engine.probe(), engine.content_digest()
    engine.prepare(base, base.names)
    engine.apply(base, base.names)
    tensors, specs = dict(base.tensors), [entry.spec for entry in base.manifest.tensors]
    ties = engine.model.plan.ties if engine.model.plan else {}
    for number, tensor in enumerate(sorted(goal.names, reverse=True)):
        together = {other for other, kept in ties.items() if kept == ties.get(tensor)} | {tensor}
        tensors |= {other: goal.tensors[other] for other in together}
        step = version(tensors, specs, name=f"step{number}", seq=10 + number)
        engine.prepare(step, frozenset(together))
        engine.apply(step, frozenset(together))
        engine.probe()
    assert (engine.probe(), engine.content_digest()) == (expected, held)


def test_an_engine_that_fails_its_proof_is_served_as_it_was_built() -> None:
    """The proof puts other weights in. Where it does not end, nobody may find them there."""
    torch.manual_seed(7)
    recipe = FAMILIES["mlp"]()
    compiled, twins = twin_engines(recipe)
    (part,) = twins
    loads = []

    def load(_compiled: Compiled, name: str) -> TwinEngine:
        loads.append(name)
        twin = twin_engines(recipe)[1][part]
        real, calls = twin.refit, iter([True, True, False])  # fails on the way back from the other weights
        twin.refit = lambda: real() and next(calls)  # type: ignore[method-assign]
        return twin

    engine = TensorRTEngine(recipe, device=CPU, build=lambda _: compiled, load=load)
    assert engine.plan_summary.startswith("reference path only: TensorRT failed to refit")
    assert loads == [part, part]
    engine.model.compare(engine.model.probe(), engine.model.reference())


def test_an_engine_that_differs_from_pytorch_right_after_building_is_refused() -> None:
    recipe = FAMILIES["mlp"]()
    compiled, twins = twin_engines(recipe)
    ((part, twin),) = twins.items()
    bias = next(name for name in twin.weights if "bias" in name)
    twin._held[bias] = twin._held[bias] * 0  # a build that dropped a bias
    from refleet.common.errors import NotRefittable

    with pytest.raises(NotRefittable, match="right after building"):
        TensorRTEngine(recipe, device=CPU, build=lambda _: compiled, load=lambda _compiled, name: twins[name])
    assert dataclasses.is_dataclass(compiled[part])
