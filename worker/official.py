"""The reference path: `torch_tensorrt.dynamo.refit_module_weights`, and modules that torch_tensorrt itself can save.

Nothing that it returns is believed: it is slow and can be wrong without an error, so the caller probes the result.
"""

from __future__ import annotations

import dataclasses
import inspect
import secrets
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from ..common.errors import NotRefittable, RefitFailed
from .lowering import Lowering
from .recipe import Recipe
from .torch_trt import LOCK, Compiled, call, engines_of, exported, short


def as_compiled(
    lowering: Lowering, engines: Mapping[str, Compiled], *, to_save: bool = False, **settings: object
) -> fx.GraphModule:
    """The module as `torch_tensorrt.dynamo.compile` returns it, around engines that exist already. Needs a GPU.

    `to_save`: with the C++ runtime's engines, the only ones that a file can hold. `settings` replace the lowering's.
    """
    graph = lowering.network(interpret=False).graph
    known = {field.name for field in dataclasses.fields(lowering.settings)}
    wanted = {"use_python_runtime": not to_save, **settings}
    made = dataclasses.replace(lowering.settings, **{n: value for n, value in wanted.items() if n in known})
    for node in graph.graph.nodes:
        name = str(node.target)
        if node.op == "call_module" and name in engines:
            output = next(n for n in graph.get_submodule(name).graph.nodes if n.op == "output")  # type: ignore[union-attr]
            node.meta["val"] = [result.meta["val"] for result in output.all_input_nodes]  # what saving it asks for
            part = graph.get_submodule(name)
            setattr(graph, name, _engine_module(engines[name], name, made, part if to_save else None))
    return graph


def save_program(lowering: Lowering, engines: Mapping[str, Compiled], path: Path) -> None:
    """Write a file that `torch_tensorrt.load` reads, with these engines; it is read again before it gets its name.

    Raises: RefitFailed with torch_tensorrt's own reason, or when the file holds other engines. Needs a GPU.
    """
    temp = path.with_name(f".{path.stem}.{secrets.token_hex(8)}{path.suffix}")  # torch looks at the suffix
    try:
        with LOCK:
            import torch_tensorrt

            recipe, module = lowering.recipe, as_compiled(lowering, engines, to_save=True)
            offered = {
                "arg_inputs": list(recipe.args), "kwarg_inputs": dict(recipe.kwargs),
                "dynamic_shapes": recipe.dynamic_shapes, "output_format": "exported_program",
            }  # fmt: skip
            try:
                call(partial(torch_tensorrt.save, module, str(temp)), offered)
                held = from_compiled(torch_tensorrt.load(str(temp)))
            except Exception as error:  # it raises what torch.export and it like
                raise RefitFailed(
                    f"torch_tensorrt can't save the module: {type(error).__name__}: {short(error)}",
                    next="export a bundle instead: leave the suffix of --out away",
                ) from error
        if sorted(e.plan for e in held.values()) != sorted(e.plan for e in engines.values()):
            raise RefitFailed("the file that torch_tensorrt wrote holds other engines than it was given")
        temp.replace(path)
    finally:
        temp.unlink(missing_ok=True)


def refitted(
    recipe: Recipe, lowering: Lowering, engines: Mapping[str, Compiled]
) -> tuple[dict[str, Compiled], fx.GraphModule]:
    """New engines with the weights that the recipe's module has now, and the graph with its torch-executed parts.

    `lowering` and `engines` are those of the engine that serves, which stays as it is. Takes seconds.
    Raises: RefitFailed with torch_tensorrt's own reason.
    """
    with LOCK:
        from torch_tensorrt.dynamo import refit_module_weights

        arguments: dict[str, Any] = {"in_place": True}
        if "use_weight_map_cache" in inspect.signature(refit_module_weights).parameters:
            arguments["use_weight_map_cache"] = False  # the map takes equal tensors for one another
        try:
            result = refit_module_weights(as_compiled(lowering, engines), exported(recipe), **arguments)
        except Exception as error:  # it raises AssertionError, RuntimeError, KeyError
            raise RefitFailed(
                f"torch_tensorrt.dynamo.refit_module_weights failed: {type(error).__name__}: {error}"
            ) from error
        return engines_of(result), result


def from_compiled(module: nn.Module | torch.export.ExportedProgram) -> dict[str, Compiled]:
    """Engines of a module that was compiled by `torch_tensorrt.dynamo.compile`, or loaded by `torch_tensorrt.load`.

    Raises: NotRefittable when there are none, or when they can't be refitted.
    """
    if isinstance(module, torch.export.ExportedProgram):
        module = module.module()
    engines = engines_of(module)
    for name, value in [*vars(module).items(), *_engine_attributes(module)]:
        if name.endswith("_engine") and hasattr(value, "__getstate__"):
            engines[name.removesuffix("_engine")] = _from_state(value)
    if not engines:
        raise NotRefittable(
            "the compiled module holds no TensorRT engine",
            next="compile it with torch_tensorrt.dynamo.compile(..., immutable_weights=False)",
        )
    return engines


def _engine_attributes(module: nn.Module) -> list[tuple[str, Any]]:
    """Engines of a module that was exported again: each sits in a plain module of the name of its part."""
    return [
        (f"{name}_engine", vars(child)["engine"]) for name, child in module.named_children() if "engine" in vars(child)
    ]


def _from_state(engine: Any) -> Compiled:
    import base64

    from torch_tensorrt.dynamo.runtime import _TorchTensorRTModule as layout

    state = engine.__getstate__()[0]
    plan = base64.b64decode(state[layout.ENGINE_IDX])
    names = [
        tuple(state[index].split("%")) for index in (layout.INPUT_BINDING_NAMES_IDX, layout.OUTPUT_BINDING_NAMES_IDX)
    ]
    return Compiled(plan, *names)


def _engine_module(engine: Compiled, name: str, settings: Any, part: nn.Module | None) -> nn.Module:
    """torch_tensorrt's own module around the engine; with the `part` that was lowered, one that can be saved."""
    from torch_tensorrt.dynamo import runtime

    # the Python runtime's own class is gone in newer versions, where the other one does both
    python: Any = None if part is not None else getattr(runtime, "PythonTorchTensorRTModule", None)
    kind = python or runtime.TorchTensorRTModule
    made: nn.Module = kind(
        serialized_engine=engine.plan, input_binding_names=list(engine.inputs),
        output_binding_names=list(engine.outputs), name=name, settings=settings,
        **({} if part is None else _shape_expressions(part)),
    )  # fmt: skip
    return made


def _shape_expressions(part: nn.Module) -> dict[str, Any]:
    """How shapes of outputs follow from those of inputs: what export asks an engine for since torch_tensorrt 2.11."""
    try:
        from torch_tensorrt.dynamo.conversion import _symbolic_shape_capture as capture
    except ImportError:
        return {}
    return {"symbolic_shape_expressions": capture.extract_symbolic_shape_expressions(part)}
