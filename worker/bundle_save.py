"""Write an engine bundle: a folder that is there whole or not at all."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as safetensors_of
from torch import Tensor, fx

from ..common import wire
from ..common.digest import digest_of
from ..common.errors import NotRefittable, RefleetError, UnreadableCheckpoint
from ..common.tensors import dtype_text, spec_of, tensor_bytes
from ..common.types import TensorSpec
from . import graph_text
from .bundle_fit import layers_digest, options_text, ties_of
from .bundle_place import check_place, replace_folder
from .bundle_record import (
    FORMAT,
    RECORD,
    TENSORS,
    BundleRecord,
    Platform,
    Spread,
    StoredEngine,
    StoredFile,
    StoredFormula,
    StoredGraph,
    StoredLeaf,
    StoredPlan,
    StoredRule,
    StoredTensor,
    engine_file,
)
from .graph_capture import attribute_of
from .refit_plan import Kind, RefitPlan
from .torch_state import live_state
from .torch_trt import Compiled
from .trt_model import Model, build_digest


def save(
    model: Model, folder: Path | str, *, stripped: bool = False, engines: Mapping[str, bytes] | None = None,
    version: str = "", fingerprint: bytes | None = None,
) -> BundleRecord:  # fmt: skip
    """Write the model's bundle to `folder`, in place of one that is there.

    Args: `stripped`: without the weights that can be refitted. `engines`: plans in place of those that were compiled,
    by part; `version` and `fingerprint` say whose weights are in them.
    Raises: NotRefittable for a model that can't be stored, UsageError when `folder` is something else, StoreError.
    """
    folder = check_place(folder)
    if stripped:
        # The engine that was proven is written without its weights, instead of compiling a stripped one: compiling
        # again may choose other kernels, and nothing can be proven of an engine without weights.
        if model.plan is None:
            raise NotRefittable(f"without a refit plan an engine needs its weights: {model.why_not_fast}")
        engines = {name: live.serialize(with_weights=False) for name, live in model.resident.engines.items()}
    try:
        values = _Values()
        plans = {name: engines[name] if engines else engine.plan for name, engine in model.engines.items()}
        record = _record(model, plans, values, stripped=stripped, version=version, fingerprint=fingerprint)
    except UnreadableCheckpoint as error:  # a tensor of a kind that no file can hold
        raise NotRefittable(f"the model can't be stored in a bundle: {error.what}", tensor=error.tensor) from error
    except RefleetError as error:
        error.about = error.about or f"bundle {folder}"
        raise
    body = wire.pack(record)
    files = {engine.file.name: plans[engine.part] for engine in record.engines}
    replace_folder(folder, {**files, TENSORS: values.data, RECORD: digest_of(body) + body})
    return record


# ---------------------------------------------------------------------- what is in it


class _Values:
    """Tensors on their way into the file. Equal ones are stored once."""

    def __init__(self) -> None:
        self.specs: dict[str, TensorSpec] = {}
        self.host: list[str] = []
        self._by_content: dict[tuple[str, tuple[int, ...], bytes], TensorSpec] = {}
        self._tensors: dict[str, Tensor] = {}

    def add(self, use: str, tensor: Tensor) -> None:
        """Raises: UnreadableCheckpoint for a tensor that no file can hold."""
        spec_of(use[:80], tensor)
        # torch writes neither shared memory nor strides to safetensors
        own = tensor.detach().cpu().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
        content = (dtype_text(own.dtype), tuple(own.shape), digest_of(tensor_bytes(own)))
        if content not in self._by_content:
            spec = self._by_content[content] = TensorSpec(str(len(self._tensors)), *content[:2])
            self._tensors[spec.name] = own
        self.specs[use] = self._by_content[content]
        if tensor.device.type == "cpu":
            self.host.append(use)

    @property
    def data(self) -> bytes:
        return bytes(safetensors_of(self._tensors))


def _record(
    model: Model, plans: Mapping[str, bytes], values: _Values, *, stripped: bool, version: str,
    fingerprint: bytes | None,
) -> BundleRecord:  # fmt: skip
    recipe, module = model.recipe, model.recipe.module
    engines = []
    for number, (part, engine) in enumerate(model.engines.items()):
        file = StoredFile(engine_file(number), len(plans[part]), digest_of(plans[part]))
        engines.append(StoredEngine(part, file, engine.inputs, engine.outputs))
    leaves = []
    for number, leaf in enumerate(model.signature.flatten(recipe.args, recipe.kwargs)):
        stored = StoredLeaf.of(leaf)
        if stored is None:
            raise NotRefittable(f"a probe input of class {type(leaf).__name__} can't be stored in a bundle")
        leaves.append(stored)
        if isinstance(leaf, Tensor):
            values.add(f"input:{number}", leaf)
    graphs = tuple(_graphs(model, model.resident.graph, (), values))
    plan = None if model.plan is None else _plan(model.plan, values)
    state = live_state(module)
    ties = ties_of(state)
    for name in () if model.plan is None else model.plan.unproven:
        values.add(f"integers:{name}", state.tensors[name])
    reference = _reference(model, values, frozenset(state.tensors))
    tensors = tuple(
        StoredTensor(state.specs[name], ties.get(name, ""), _spread(tensor)) for name, tensor in state.tensors.items()
    )
    data = values.data
    now = Platform.here()
    build = build_digest({part: Compiled(plans[part], e.inputs, e.outputs) for part, e in model.engines.items()})
    return BundleRecord(
        FORMAT, int(time.time() * 1000), now, type(module).__qualname__, build, tuple(engines),
        StoredFile(TENSORS, len(data), digest_of(data)), values.specs, tuple(values.host),
        graphs, plan, model.why_not_fast, reference,
        tuple(model.signature.to_data()), tuple(leaves), tensors, model.measured, recipe.tolerance,
        options_text(recipe.options), layers_digest(module), stripped, version, fingerprint,
    )  # fmt: skip


def graph_json(graph: fx.Graph) -> str:
    """Raises: NotRefittable for a graph that can't be stored."""
    return json.dumps(graph_text.to_data(graph), separators=(",", ":"))


def _graphs(model: Model, module: fx.GraphModule, path: tuple[str, ...], values: _Values) -> Iterator[StoredGraph]:
    """The graph of `module`, and those of the torch-executed parts that it calls.

    A tensor that the plan computes for each version is stored as its spec alone.
    """
    specs, calls = {}, []
    for node in module.graph.nodes:
        target = str(node.target)
        if node.op == "get_attr":
            tensor = _attribute(module, target)
            specs[target] = spec_of(target, tensor)
            item = None
            if path and model.plan is not None:
                item = model.plan.items.get((path[0], ".".join((*path[1:], target))))
            if item is None or item.kind is Kind.CONST:
                values.add(f"part:{'/'.join(path)}:{target}", tensor)
        elif node.op == "call_module" and target not in calls and (path or target not in model.engines):
            calls.append(target)
    yield StoredGraph(path, graph_json(module.graph), specs)
    for target in calls:
        called: Any = module.get_submodule(target)
        yield from _graphs(model, called, (*path, target), values)


def _reference(model: Model, values: _Values, state: frozenset[str]) -> StoredGraph:
    """What PyTorch computes, with flat inputs and outputs: a model from a bundle without factory has it already."""
    from .bundle_reference import BundledModule

    module = model.recipe.module
    if isinstance(module, BundledModule):
        graph, attributes = module.reference
    elif model.lower is not None:
        lowered = model.lower().reference()
        graph = lowered.graph
        names = [str(node.target) for node in graph.nodes if node.op == "get_attr"]
        attributes = {name: _attribute(lowered, name) for name in names if name not in state}
    else:
        raise NotRefittable("the model has no reference graph")
    for name, tensor in attributes.items():
        values.add(f"attribute:{name}", tensor)
    return StoredGraph((), graph_json(graph), {name: spec_of(name, tensor) for name, tensor in attributes.items()})


def _attribute(module: fx.GraphModule, target: str) -> Tensor:
    try:
        return attribute_of(module, target)
    except AttributeError:
        raise NotRefittable(f"the graph refers to {target!r}, which is no tensor: a bundle can't hold it") from None


def _plan(plan: RefitPlan, values: _Values) -> StoredPlan:
    for name, tensor in plan.constants.items():
        values.add(f"constant:{name}", tensor)
    rules = (
        StoredRule(part, weight, item.kind.value, item.origin, dtype_text(item.dtype), item.shape)
        for (part, weight), item in plan.items.items()
    )
    order: dict[str, None] = {}
    for name in plan.formulas:
        _after_its_inputs(plan, name, order)
    formulas = ((name, plan.formulas[name]) for name in order)
    return StoredPlan(
        tuple(rules), tuple(StoredFormula(name, graph_json(f.graph), f.inputs) for name, f in formulas),
        tuple(plan.constants), tuple(sorted(plan.sources)), tuple(sorted(plan.unused)), dict(plan.unproven),
        dict(plan.ties),
    )  # fmt: skip


def _after_its_inputs(plan: RefitPlan, name: str, order: dict[str, None]) -> None:
    if name not in order:
        for used in plan.formulas[name].inputs:
            if used in plan.formulas:
                _after_its_inputs(plan, used, order)
        order[name] = None


def _spread(tensor: Tensor) -> Spread | None:
    """What a random tensor needs to be plausible in its place."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return None
    with torch.no_grad():
        plain = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
        wide = plain.float()
        finite = wide[wide.isfinite()]
        if not finite.numel():
            return Spread(0.0, 0.0, False)
        finite = finite.double() if finite.numel() < 1 << 20 else finite
        return Spread(float(finite.mean()), float(finite.std(correction=0)), bool(finite.min() > 0))
