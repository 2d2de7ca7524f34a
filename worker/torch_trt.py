"""torch_tensorrt, looked at: what refleet uses of it, found by names and signatures and never by version numbers.

2.11 to 2.14 were tried, on standard TensorRT's API and on TensorRT-RTX. Only importing it and `compiled` need a GPU.
torch_tensorrt keeps settings of the process in globals, so only one thread may use it at a time: `LOCK`.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from ..common.errors import NotRefittable, RefleetError, UsageError
from .recipe import Recipe

LOCK = threading.RLock()


@dataclass(frozen=True, slots=True)
class Compiled:
    """A serialized engine and the names of its bindings, in the order in which the graph passes and takes tensors."""

    plan: bytes
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Compiler:
    """The parts of torch_tensorrt that are used here."""

    lowering: ModuleType
    partitioning: ModuleType
    folding: ModuleType
    norms: ModuleType
    converters: Any
    interpreter: Any
    output_dtypes: Any
    repair_double_inputs: Any
    to_torch_device: Any
    settings: Any
    compile: Any
    trt: Any


def torch_tensorrt() -> Compiler:
    """Raises: UsageError when it isn't installed, or doesn't import."""
    try:
        from torch_tensorrt import dynamo  # makes tensorrt_rtx importable as tensorrt
        from torch_tensorrt.dynamo import lowering, partitioning
        from torch_tensorrt.dynamo._settings import CompilationSettings
        from torch_tensorrt.dynamo.conversion._conversion import infer_module_output_dtypes
        from torch_tensorrt.dynamo.conversion._ConverterRegistry import DYNAMO_CONVERTERS
        from torch_tensorrt.dynamo.conversion._TRTInterpreter import TRTInterpreter
        from torch_tensorrt.dynamo.conversion.impl.normalization import ops
        from torch_tensorrt.dynamo.conversion.truncate_double import repair_double_inputs
        from torch_tensorrt.dynamo.lowering.passes import constant_folding
        from torch_tensorrt.dynamo.utils import to_torch_device
        import tensorrt  # isort: skip
    except Exception as error:  # without a driver it raises RuntimeError
        raise UsageError(
            f"torch_tensorrt can't be imported: {type(error).__name__}: {short(error)}",
            next="pip install 'refleet[tensorrt]' (or tensorrt-rtx); `refleet-worker doctor` says what is missing",
        ) from error
    return Compiler(
        lowering, partitioning, constant_folding, ops, DYNAMO_CONVERTERS, TRTInterpreter, infer_module_output_dtypes,
        repair_double_inputs, to_torch_device, CompilationSettings, dynamo.compile, tensorrt,
    )  # fmt: skip


def arguments(tt: Compiler, options: Mapping[str, object]) -> dict[str, object]:
    """Arguments of `compile` for a refittable engine, those of the recipe included. Raises: UsageError."""
    takes = inspect.signature(tt.compile).parameters
    for name in options:
        if name not in takes:
            raise UsageError(f"torch_tensorrt.dynamo.compile has no option {name!r}", next="leave it out of the recipe")
    ours: dict[str, object] = {"immutable_weights": False, "use_python_runtime": True}
    if "enabled_precisions" not in options:
        ours["use_explicit_typing"] = True  # the module's own dtypes; newer versions know nothing else
    return {name: value for name, value in {**ours, **options}.items() if name in takes}


def settings_of(tt: Compiler, options: Mapping[str, object]) -> Any:
    known = inspect.signature(tt.settings).parameters
    return tt.settings(**{name: value for name, value in arguments(tt, options).items() if name in known})


def call(function: Callable[..., Any], offered: Mapping[str, object]) -> Any:
    """Call `function` with those of the offered arguments that it takes: their number differs between versions."""
    takes = inspect.signature(function).parameters
    return function(**{name: value for name, value in offered.items() if name in takes})


def graph_of(result: Any) -> fx.GraphModule:
    graph: fx.GraphModule = result[0] if isinstance(result, tuple) else result
    return graph


def exported(recipe: Recipe) -> torch.export.ExportedProgram:
    """The recipe's module as it is now. Raises: whatever torch.export raises."""
    with torch.no_grad():
        return torch.export.export(
            recipe.module, recipe.args, dict(recipe.kwargs), dynamic_shapes=recipe.dynamic_shapes, strict=False
        )


def compiled(recipe: Recipe, *, strip_weights: bool = False) -> dict[str, Compiled]:
    """Engines of the recipe's module by part, built by `torch_tensorrt.dynamo.compile`.

    Raises: NotRefittable with torch_tensorrt's own reason, out of memory included. Needs a GPU.
    """
    with LOCK:
        tt = torch_tensorrt()
        given = arguments(tt, recipe.options) | {"strip_engine_weights": strip_weights}
        try:
            module = tt.compile(exported(recipe), arg_inputs=recipe.args, kwarg_inputs=dict(recipe.kwargs), **given)
            engines = engines_of(module)
        except RefleetError:
            raise
        except Exception as error:
            raise NotRefittable(f"TensorRT can't build the engine: {type(error).__name__}: {short(error)}") from error
        if not engines:
            raise NotRefittable("torch_tensorrt made no engine of the module: everything would run in PyTorch")
        return engines


def engines_of(module: Any) -> dict[str, Compiled]:
    """The serialized engines in a module that torch_tensorrt compiled; none in a module without."""
    return {
        name: Compiled(bytes(child.serialized_engine), *(_bindings(child, kind) for kind in ("input", "output")))
        for name, child in module.named_children()
        if getattr(child, "serialized_engine", None)
    }


def _bindings(child: Any, kind: str) -> tuple[str, ...]:
    """The names of an engine module's inputs or outputs: the Python and the C++ runtime call them differently."""
    names = getattr(child, f"{kind}_names", None)
    return tuple(getattr(child, f"{kind}_binding_names") if names is None else names)


def layer_weights(trt: Any, net: Any, recorded: Mapping[str, object]) -> dict[str, object]:
    """Name -> value of every weight that the network's layers have: recorded by the converter, else the layer's own.

    A converted ConvTranspose is recorded as a convolution while its layer is a deconvolution.
    """
    found: dict[str, object] = {}
    for number in range(net.num_layers):
        layer = net.get_layer(number)
        kind, name = layer.type.name, layer.name
        if kind not in _WEIGHTS:
            continue
        layer_class, weights = _WEIGHTS[kind]
        layer.__class__ = getattr(trt, layer_class)  # as torch_tensorrt does: the binding gives the base class only
        for attribute, suffix in weights:
            own = getattr(layer, attribute)
            if own.size == 0:
                continue  # a convolution without bias, or with a kernel that the network computes
            full = f"{name} {suffix}"
            if full in found:
                raise NotRefittable(f"two layers of the network are called {name!r}: their weights can't be told apart")
            alias = full.replace("[DECONVOLUTION]", "[CONVOLUTION]", 1)
            found[full] = next((recorded[known] for known in (full, alias) if known in recorded), own)
    return found


_WEIGHTS = {
    "CONSTANT": ("IConstantLayer", (("weights", "CONSTANT"),)),
    "CONVOLUTION": ("IConvolutionLayer", (("kernel", "KERNEL"), ("bias", "BIAS"))),
    "DECONVOLUTION": ("IDeconvolutionLayer", (("kernel", "KERNEL"), ("bias", "BIAS"))),
    "SCALE": ("IScaleLayer", (("scale", "SCALE"), ("shift", "SHIFT"), ("power", "POWER"))),
}


def cpu_tensor(value: Any) -> Tensor:
    # a copy: a network's own weights go away with it
    tensor = value if isinstance(value, Tensor) else torch.tensor(np.asarray(value))
    return tensor.detach().cpu().contiguous()


def short(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else "no message")[:300]
