"""A plan's values are what lowering gives, bit for bit, for every family; and it knows what depends on what."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from families import FAMILIES
from refleet.common.errors import NotRefittable
from refleet.worker.lowering import Lowering, Network
from refleet.worker.plan_build import Sources, _same, build_plan, prove
from refleet.worker.refit_plan import Address, Kind
from torch import Tensor

BIG = {
    "deep_transformer",
    "resnet18",
    "resnet18_eps_1e3",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "swin",
    "gru_used_twice",
}
SMALL = sorted(FAMILIES.keys() - BIG)


def weights(network: Network) -> dict[Address, Tensor]:
    parts = network.weights | network.attributes
    return {(part, name): value for part, found in parts.items() for name, value in found.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_values_of_a_plan_are_those_of_a_fresh_lowering(name: str) -> None:
    torch.manual_seed(1)
    lowering = Lowering(FAMILIES[name]())
    plan = build_plan(lowering)
    assert not plan.unknown
    sources = Sources.of(lowering)
    prove(plan, lowering, sources, seed=77)  # draws that had no part in building it
    for source in plan.sources - plan.unproven.keys():
        assert plan.affected([source]), f"nothing depends on {source}"
    kept = {plan.ties.get(source, source) for source in lowering.recipe.module.state_dict()}
    assert kept == plan.sources | plan.unused


@pytest.mark.parametrize("name", SMALL)
def test_each_tensor_alone_changes_exactly_the_weights_that_the_plan_says(name: str) -> None:
    torch.manual_seed(2)
    lowering = Lowering(FAMILIES[name]())
    plan, sources = build_plan(lowering), Sources.of(lowering)
    one, two = sources.drawn(5, signed=True), sources.drawn(6, signed=True)
    before = weights(lowering.network(one))
    chosen = sorted(sources.random)
    for source in chosen if len(chosen) <= 8 else chosen[:: len(chosen) // 8]:
        tied = {alias for alias, kept in sources.ties.items() if kept == source} | {source}
        after = weights(lowering.network(one | {alias: two[alias] for alias in tied if alias in two}))
        moved = {address for address in before if not _same(before[address], after[address])}
        assert moved <= set(plan.affected([source])), source
        assert moved, source


@pytest.mark.parametrize("name", ["mlp", "batchnorm_eps_1e3", "folded_exp", "tied", "gpt2", "parts_in_torch", "unet"])
def test_a_plan_with_one_rule_changed_is_not_proven(name: str) -> None:
    torch.manual_seed(3)
    lowering = Lowering(FAMILIES[name]())
    plan, sources = build_plan(lowering), Sources.of(lowering)
    by_size: dict[tuple[torch.dtype, int], list[Address]] = {}
    for address, item in plan.items.items():
        if item.kind is not Kind.CONST:
            by_size.setdefault((item.dtype, item.numel), []).append(address)
    pairs = [found[:2] for found in by_size.values() if len({plan.items[a].origin for a in found[:2]}) == 2]
    for one, two in pairs:
        wrong = {**plan.items, one: dataclasses.replace(plan.items[one], origin=plan.items[two].origin)}
        with pytest.raises(NotRefittable, match="other bits"):
            prove(dataclasses.replace(plan, items=wrong), lowering, sources)
    frozen = next(address for address, item in plan.items.items() if item.kind is not Kind.CONST)
    constant = dataclasses.replace(plan.items[frozen], kind=Kind.CONST, origin="constant")
    wrong_plan = dataclasses.replace(
        plan,
        items={**plan.items, frozen: constant},
        constants={**plan.constants, "constant": weights(lowering.network())[frozen]},
    )
    with pytest.raises(NotRefittable, match="other bits"):
        prove(wrong_plan, lowering, sources)
    removed = {address: item for address, item in plan.items.items() if address != frozen}
    with pytest.raises(NotRefittable, match="lacks 1 weights"):
        prove(dataclasses.replace(plan, items=removed), lowering, sources)


def test_batch_norm_rules_use_the_eps_of_their_layer() -> None:
    """Two models that differ in nothing but eps must not share a rule's value."""
    torch.manual_seed(4)
    usual, other = (Lowering(FAMILIES[name]()) for name in ("batchnorm", "batchnorm_eps_1e3"))
    plans = [build_plan(lowering) for lowering in (usual, other)]
    folded = [a for a, item in plans[0].items.items() if item.kind is Kind.BATCHNORM and a[1].endswith("SCALE")]
    if not folded:
        pytest.skip("this torch_tensorrt does not fold batch norms on TensorRT-RTX")
    values = Sources.of(usual).drawn(9)
    one, two = (plan.values(values.__getitem__)(folded[0]) for plan in plans)
    assert not torch.equal(one, two)


def test_lowering_leaves_the_users_module_alone() -> None:
    recipe = FAMILIES["gpt2"]()
    before = {name: tensor.clone() for name, tensor in recipe.module.state_dict().items()}
    pointers = [tensor.data_ptr() for tensor in recipe.module.state_dict().values()]
    build_plan(Lowering(recipe))
    assert [tensor.data_ptr() for tensor in recipe.module.state_dict().values()] == pointers
    for name, tensor in recipe.module.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_integers_that_the_model_reads_are_covered_only_while_they_are_the_same() -> None:
    recipe = FAMILIES["bias_table"]()
    plan = build_plan(Lowering(recipe))
    digest = plan.unproven["index"]
    assert plan.affected(["index"], {"index": digest}) == []
    assert plan.outdated({"index": digest}) is None
    assert plan.outdated({"index": bytes(32)}) == "index"
    with pytest.raises(NotRefittable, match="index"):
        plan.affected(["index"], {"index": bytes(32)})


def test_a_module_that_can_not_be_exported_is_refused_with_the_reason() -> None:
    class Branches(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) if x.sum() > 0 else x

    from families import recipe

    with pytest.raises(NotRefittable, match="can't be exported"):
        Lowering(recipe(Branches(), torch.randn(2, 4)))


def test_a_module_that_writes_to_its_buffers_is_refused_by_name() -> None:
    class Counts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.linear = torch.nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.linear(x) + self.calls

    from families import recipe

    with pytest.raises(NotRefittable, match="calls"):
        Lowering(recipe(Counts(), torch.randn(2, 4)))
