"""The twin model with what a bundle needs besides: the program that PyTorch computes, exported; and a saved bundle."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from refleet.worker.bundle import Bundle, save
from refleet.worker.recipe import Recipe
from refleet.worker.tensorrt_engine import TensorRTEngine
from refleet.worker.torch_trt import Compiled
from refleet.worker.trt_model import Model
from torch import Tensor, fx
from twin_engine import CPU, TwinEngine, two_load, two_model, two_recipe


class TwinLowering:
    """Stands in for `lowering.Lowering`, which needs torch_tensorrt."""

    def __init__(self, recipe: Recipe):
        self._recipe = recipe

    def reference(self) -> fx.GraphModule:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.export warns of its own future
            exported = torch.export.export(
                self._recipe.module, self._recipe.args, dict(self._recipe.kwargs), strict=False
            ).run_decompositions()
            module: fx.GraphModule = exported.module()
        module.graph.set_codegen(fx.graph.CodeGen())
        for node in list(module.graph.nodes):
            if node.op == "call_module":  # a guard
                module.graph.erase_node(node)
        module.recompile()
        return module


def lowering(recipe: Recipe) -> Callable[[], Any]:
    return lambda: TwinLowering(recipe)


def built(recipe: Recipe | None = None, **arguments: Any) -> Model:
    """The twin model as compiling gives it."""
    recipe = recipe or two_recipe()
    return two_model(recipe, lower=lowering(recipe), **arguments)


def loaded(folder: Path, **arguments: Any) -> TensorRTEngine:
    """The engine in a bundle."""
    return TensorRTEngine(Bundle.open(folder).model(device=CPU, **{"load": two_load} | arguments), device=CPU)


class Empty(TwinEngine):
    """An engine without weights: it can't answer before every one was put in."""

    def run(self, inputs: Sequence[Tensor | int]) -> list[Tensor]:
        assert frozenset().union(*self.refits) == self.weights, "it was asked before it had all of its weights"
        return super().run(inputs)


def load_empty(compiled: Compiled, name: str) -> TwinEngine:
    made = two_load(compiled, name)
    return Empty(made._held, made._compute, outputs=len(made.outputs))


@pytest.fixture(scope="session")
def saved_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the twin model; don't change it."""
    folder = tmp_path_factory.mktemp("bundle") / "two"
    save(built(), folder)
    return folder


@pytest.fixture
def own_bundle(saved_bundle: Path, tmp_path: Path) -> Path:
    """A bundle of one's own."""
    return Path(shutil.copytree(saved_bundle, tmp_path / "two"))
