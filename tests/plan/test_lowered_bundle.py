"""Bundles of really lowered models: graphs, plans and probes survive, with and without the factory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from lowered_twins import twin_engines
from refleet.worker.bundle import Bundle, save
from refleet.worker.compare import differences
from refleet.worker.plan_build import Sources, build_plan
from refleet.worker.recipe import Recipe
from refleet.worker.tensorrt_engine import TensorRTEngine
from refleet.worker.torch_trt import Compiled
from refleet.worker.trt_model import Model, build_model, same_bits
from test_lowered_engine import staged
from twin_engine import CPU, TwinEngine

NAMES = [
    "mlp", "equal_zeros", "tied", "lstm", "merged_lora", "bf16", "bias_table", "several_outputs_and_keywords",
    "parts_in_torch", "rope_buffers", "gpt2", "llama", "swin",
]  # fmt: skip
NORMS = ["batchnorm_eps_1e3", "batchnorm_without_affine", "dynamic_batch", "resnet18"]


class Twins:
    """Builds a recipe, and loads its engines again without any weight that means anything."""

    def __init__(self, recipe: Recipe):
        self.engines: dict[str, TwinEngine] = {}
        self.model: Model = build_model(
            recipe, device=CPU, build=self._build, load=lambda _, name: self.engines[name], on_step=lambda _: None
        )

    def _build(self, recipe: Recipe) -> dict[str, Compiled]:
        compiled, self.engines = twin_engines(recipe)
        return compiled

    def load(self, _compiled: Compiled, name: str) -> Any:
        built = self.engines[name]
        weights = {name: torch.full_like(value, 99) for name, value in built._held.items()}
        return TwinEngine(weights, built._compute, outputs=len(built.outputs))


@pytest.mark.parametrize("name", NAMES)
def test_versions_go_into_what_was_loaded_as_into_what_was_built(name: str, tmp_path: Path) -> None:
    torch.manual_seed(5)
    recipe = FAMILIES[name]()
    twins = Twins(recipe)
    record = save(twins.model, tmp_path / "b")
    bundle = Bundle.open(tmp_path / "b")
    models = [twins.model, *(bundle.model(device=CPU, load=twins.load, recipe=r) for r in (None, FAMILIES[name]()))]
    again = save(models[1], tmp_path / "again")
    assert (again.plan, again.graphs, again.reference) == (record.plan, record.graphs, record.reference)
    engines = [TensorRTEngine(model, apply="fast", device=CPU) for model in models]
    for version in (staged(recipe, 1), staged(recipe, 2)):
        for engine in engines:
            engine.prepare(version, version.names)
            engine.apply(version, version.names)
            assert dict(engine.read_back(sorted(version.names))) == version.digests
        assert len({(engine.build, engine.content_digest(), engine.probe()) for engine in engines}) == 1


@pytest.mark.parametrize("name", NORMS)
def test_formulas_and_the_reference_graph_give_the_same_bits_after_loading(name: str, tmp_path: Path) -> None:
    """Folded batch norms: the twin can't compute with them, but their rules and graphs are stored like all others."""
    torch.manual_seed(5)
    recipe = FAMILIES[name]()
    model = Twins(recipe).model
    assert model.lower is not None
    lowering = model.lower()
    plan = model.plan = build_plan(lowering)
    save(model, tmp_path / "b")
    bundle = Bundle.open(tmp_path / "b")
    assert bundle.record.plan is not None
    found = bundle._plan(bundle.record.plan, CPU)
    assert list(found.items) == list(plan.items)
    assert (found.ties, found.unused, found.unproven) == (plan.ties, plan.unused, plan.unproven)
    sources = Sources.of(lowering)
    values = sources.drawn(99)
    one, two = (p.values(lambda n: sources.value(n, values)) for p in (plan, found))
    for address in plan.items:
        assert same_bits(one(address), two(address))
    args, kwargs = recipe.args, dict(recipe.kwargs)
    own = bundle._own_recipe(args, kwargs, model.signature, CPU)
    own.module.load_state_dict(recipe.module.state_dict())
    with torch.no_grad():
        answers = [module(*args, **kwargs) for module in (own.module, recipe.module)]
    assert max(difference.error for difference in differences(*answers)) < 1e-5
