"""Makes the models that a TensorRT engine serves: the first one, and others beside the one that serves."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import fx

from ..common.errors import RefleetError, UsageError
from ..common.types import TensorSpec
from . import official, trt_live
from .bundle import Bundle
from .engine import StagedVersion
from .recipe import Recipe, as_recipe
from .resident import Resident
from .torch_engine import TorchEngine
from .torch_trt import Compiled, compiled
from .trt_model import Load, Model, OnStep, build_model, warm

Factory = Callable[..., object]
Build = Callable[[Recipe], Mapping[str, Compiled]]


@dataclass(frozen=True)
class Maker:
    """How models are made here. `load`, `build`: from a compiled engine to a live one, from a recipe to engines."""

    device: torch.device
    contexts: int
    on_step: OnStep
    factory: Factory | None = None
    load: Load | None = None
    build: Build = compiled

    @property
    def concurrent(self) -> bool:
        return self.contexts > 1

    def model(self, recipe: Recipe, *, engines: Mapping[str, Compiled] | None = None) -> Model:
        """Compiled from the recipe's module as it is, or around `engines` that were; proven. Raises: NotRefittable."""
        return build_model(
            recipe, device=self.device, load=self._load, concurrent=self.concurrent, on_step=self.on_step,
            build=self.build, engines=engines,
        )  # fmt: skip

    def bundled(self, bundle: Bundle, recipe: Recipe | None = None) -> Model:
        """The bundle's model, with the recipe's module beside it if there is one; proven. Raises: NotRefittable."""
        return bundle.model(
            device=self.device, load=self._load, concurrent=self.concurrent, recipe=recipe, on_step=self.on_step
        )

    def resident(self, graph: fx.GraphModule, engines: Mapping[str, Compiled]) -> Resident:
        """Live engines of `engines`, called by `graph`."""
        lives = {name: self._load(engine, name) for name, engine in engines.items()}
        return Resident(graph, lives, device=self.device, concurrent=self.concurrent)

    def reference(self, model: Model) -> Model:
        """A second engine with the weights that the model's module has now, made by `refit_module_weights`, and proven.

        Raises: RefitFailed, ProbeMismatch, NotRefittable.
        """
        assert model.lower is not None
        self.on_step("refit_module_weights makes a second engine")
        engines, graph = official.refitted(model.recipe, model.lower(), model.engines)
        other = proven(replace(model, resident=self.resident(graph, engines), holds=None))
        if other.plan is not None and not other.plan.unknown:
            warm(other)
        return other

    def rebuilt(self, model: Model) -> Model:
        """A second engine, compiled anew from the model's module as it is now, and proven."""
        self.on_step("compiling a second engine")
        return proven(self.model(model.recipe))

    def restructured(self, staged: StagedVersion) -> Model:
        """An engine for a version of another structure, with its weights, proven. Raises: NotRefittable, UsageError."""
        assert self.factory is not None
        self.on_step(f"building an engine for the structure of {staged.serving.version}")
        recipe = called(self.factory, {entry.spec.name: entry.spec for entry in staged.manifest.tensors})
        recipe.module.to(self.device)
        tensors = TorchEngine(recipe.module)
        tensors.check(staged.manifest)
        tensors.apply(staged, frozenset(staged.manifest.by_name))
        return proven(self.model(recipe))

    @property
    def _load(self) -> Load:
        return self.load or partial(_load, contexts=self.contexts)


def proven(model: Model) -> Model:
    """The model, after its answers were compared with PyTorch's; otherwise it is freed. Raises: ProbeMismatch."""
    try:
        model.compare(model.probe(), model.reference())
    except BaseException:
        model.close()
        raise
    return model


def called(factory: Factory, specs: Mapping[str, TensorSpec] | None = None) -> Recipe:
    """The factory's recipe. One with a parameter `tensors` gets those that the module must have, by name, or None.

    Raises: UsageError.
    """
    takes = "tensors" in inspect.signature(factory).parameters
    try:
        return as_recipe(factory(tensors=specs) if takes else factory())
    except RefleetError:
        raise
    except Exception as error:  # the factory is the user's code
        raise UsageError(
            f"the factory raised {type(error).__name__}: {error}",
            next="a factory takes no argument, or `tensors` that the module must have, and returns a Recipe",
        ) from error


def _load(engine: Compiled, name: str, *, contexts: int) -> trt_live.TensorRTLive:
    return trt_live.TensorRTLive(engine.plan, engine.inputs, engine.outputs, name=name, contexts=contexts)
