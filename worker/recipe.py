"""What a factory of `--engine tensorrt:package.module:factory` returns: a module and what is needed to compile it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..common.errors import UsageError

HOW = "return Recipe(module, args=(x,), kwargs={...}), (module, args) or (module, args, kwargs)"
#: arguments of `torch_tensorrt.dynamo.compile` that a recipe can't set, and who decides them
_OURS = {
    "immutable_weights": "an engine that can't be refitted can't be updated",
    "refit_identical_engine_weights": "other weights would be undefined behaviour",
    "strip_engine_weights": "refleet-worker build --strip-weights decides it",
    "device": "refleet-worker runs on the current CUDA device",
    "arg_inputs": "the recipe's args are the inputs",
    "kwarg_inputs": "the recipe's kwargs are the inputs",
    "inputs": "the recipe's args are the inputs",
    "cache_built_engines": "bundles replace the engine cache, which mixes up engines that differ in node arguments",
    "reuse_cached_engines": "bundles replace the engine cache, which mixes up engines that differ in node arguments",
    "use_python_runtime": "refleet runs the engines itself",
    "dryrun": "an engine is needed",
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """A module in evaluation mode and example inputs, which also are the probe inputs.

    `args`, `kwargs`: tensors (or nested tuples, lists, dicts of them) as the module is called with; their shapes are
    the engine's unless `dynamic_shapes`, as `torch.export.export` takes it, says otherwise. `options`: further keyword
    arguments of `torch_tensorrt.dynamo.compile`, for example `{"min_block_size": 1}`. `tolerance`: how far an output
    may be from PyTorch's, as ||engine - torch|| / ||torch||; None: by dtype and what was measured when it was built.
    Raises: UsageError saying what is wrong with which part.
    """

    module: nn.Module
    args: tuple[object, ...] = ()
    kwargs: Mapping[str, object] = field(default_factory=dict)
    dynamic_shapes: Any = None
    options: Mapping[str, object] = field(default_factory=dict)
    tolerance: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.module, nn.Module):
            raise UsageError(f"a recipe's module is a {type(self.module).__name__}, not a torch.nn.Module", next=HOW)
        if not isinstance(self.args, tuple) or not isinstance(self.kwargs, Mapping):
            raise UsageError("a recipe's args are a tuple and its kwargs a dict", next=HOW)
        if any(part.training for part in self.module.modules()):
            raise UsageError("the recipe's module is in training mode", next="return module.eval()")
        if not any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves((self.args, dict(self.kwargs)))):
            raise UsageError("the recipe has no example input that is a tensor", next=HOW)
        for name, why in _OURS.items():
            if name in self.options:
                raise UsageError(f"a recipe can't set the compile option {name!r}: {why}", next=f"leave {name!r} out")
        if self.tolerance is not None and not 0 < self.tolerance < 1:
            raise UsageError(f"tolerance {self.tolerance}: it is a share, above 0 and below 1")


#: what a factory may return
Made: TypeAlias = (
    Recipe | tuple[nn.Module, tuple[object, ...]] | tuple[nn.Module, tuple[object, ...], dict[str, object]]
)


def as_recipe(made: object) -> Recipe:
    """What a factory returned, as a recipe. Raises: UsageError saying what it may return."""
    match made:
        case Recipe():
            return made
        case (nn.Module() as module, tuple() as args):
            return Recipe(module, args)
        case (nn.Module() as module, tuple() as args, dict() as kwargs):
            return Recipe(module, args, kwargs)
    found = f"a tuple of {', '.join(type(part).__name__ for part in made)}" if isinstance(made, tuple) else ""
    raise UsageError(f"the factory returned {found or 'a ' + type(made).__name__}, not a recipe", next=HOW)
