"""An engine bundle: a folder from which a model is served and refitted without compiling it, and without its factory.

What it holds is in `bundle_record`; `save` writes it. Nothing in it is believed: sizes and digests are checked before
anything is used, graphs are read by `graph_text`, and the engine is proven against PyTorch before it serves.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as tensors_in
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..common import wire
from ..common.digest import digest_of
from ..common.errors import (
    DigestMismatch,
    LimitExceeded,
    MalformedRecord,
    NotRefittable,
    ProbeMismatch,
    RefitFailed,
    RefleetError,
    StoreError,
    UsageError,
)
from ..common.limits import LIMITS
from ..common.tensors import dtype_text, torch_dtype
from . import graph_text
from .bundle_fit import NEXT, check_fits
from .bundle_record import RECORD, BundleRecord, Platform, StoredFile, StoredGraph, StoredPlan
from .bundle_reference import bundled_module
from .bundle_save import save
from .lowering import Lowering
from .recipe import Recipe
from .refit_plan import Formula, Item, Kind, RefitPlan
from .resident import Resident
from .signature import Signature
from .torch_trt import Compiled, short
from .trt_model import Load, Model, OnStep, build_digest, on_device, prove_on_engine

__all__ = ["Bundle", "save"]

_AGAIN = "build it again: refleet-worker build"
_DIGEST_BYTES = 32


@dataclass(frozen=True)
class Bundle:
    """A bundle as it was read from `folder`: complete, and with the digests that its record names."""

    folder: Path
    record: BundleRecord
    engines: Mapping[str, Compiled]
    values: Mapping[str, Tensor]  # by use, see BundleRecord

    @classmethod
    def open(cls, folder: Path | str) -> Bundle:
        """Reads and checks everything but this machine.

        Raises: UsageError when there is no bundle; MalformedRecord, DigestMismatch naming the file that is damaged.
        """
        folder = Path(folder).expanduser().absolute()
        if not folder.is_dir():
            raise UsageError(
                f"there is no bundle at {folder}", next="refleet-worker build --engine tensorrt:... --out makes one"
            )
        record = _record(folder / RECORD)
        engines = {}
        for engine in record.engines:
            plan = _checked(folder, engine.file)
            engines[engine.part] = Compiled(plan, engine.inputs, engine.outputs)
        if build_digest(engines) != record.build:
            raise _damaged(folder / RECORD, "it names other engines than it has")
        return cls(folder, record, engines, _values(folder, record))

    def misfit(self) -> str | None:
        """Why it can't be used on this machine: another TensorRT, another kind of GPU. None if it can."""
        return self.record.platform.misfit(Platform.here())

    def model(
        self, *, device: torch.device, load: Load, concurrent: bool = False, recipe: Recipe | None = None,
        on_step: OnStep = lambda _text: None,
    ) -> Model:  # fmt: skip
        """Live engines, refitted and proven against PyTorch with random weights: with the module of `recipe`, which the
        factory made, or else with the bundle's own graph. The probe inputs are the bundle's, so that all workers that
        load it answer the same probe.

        Raises: NotRefittable when it is of another model than the recipe's, when it can't be used, or not be proven.
        """
        lives: dict[str, Any] = {}
        try:
            return self._model(device, load, concurrent, recipe, on_step, lives)
        except BaseException as error:
            for live in lives.values():
                live.close()
            if isinstance(error, RefleetError):
                error.about = error.about or f"bundle {self.folder}"
                raise
            if not isinstance(error, Exception):
                raise
            raise NotRefittable(  # torch and TensorRT raise what they like, out of memory included
                f"the bundle can't be used: {type(error).__name__}: {short(error)}", about=f"bundle {self.folder}",
                next=_AGAIN,
            ) from error  # fmt: skip

    def _model(
        self, device: torch.device, load: Load, concurrent: bool, given: Recipe | None, on_step: OnStep,
        lives: dict[str, Any],
    ) -> Model:  # fmt: skip
        record = self.record
        signature = Signature.from_data(list(record.signature))
        leaves = self._leaves(device)
        args, kwargs = pytree.tree_unflatten(leaves, signature.inputs)
        if given is None:
            if record.plan is None:
                raise NotRefittable(
                    f"the bundle has no refit plan, so it can only be used with its factory: {record.why_not_fast}",
                    next="start the worker with --engine tensorrt:package.module:factory --bundle",
                )
            recipe, lower = self._own_recipe(args, kwargs, signature, device), None
        else:
            moved = on_device(given, device)
            check_fits(record, moved, signature, leaves)
            recipe = Recipe(moved.module, args, kwargs, moved.dynamic_shapes, moved.options, moved.tolerance)
            lower = functools.cache(lambda: Lowering(recipe))
        graph = self._graph((), device)
        on_step("loading the engines of the bundle")
        for part, engine in self.engines.items():
            lives[part] = load(engine, part)
        resident = Resident(graph, lives, device=device, concurrent=concurrent)
        plan = None if record.plan is None else self._plan(record.plan, device)
        measured = dict(record.measured)
        model = Model(
            recipe, signature, resident, self.engines, plan, record.why_not_fast, lower, record.build, measured
        )
        if plan is not None:
            resident.check_covered(plan)
            on_step("proving the engines of the bundle")
            try:
                prove_on_engine(model, as_built=False)
            except (ProbeMismatch, RefitFailed) as error:
                raise NotRefittable(
                    f"the engines of the bundle fail their proof{' with this factory' if given else ''}: {error.what}",
                    next=NEXT if given else _AGAIN,
                ) from error
        return model

    # ------------------------------------------------------------------ parts

    def _leaves(self, device: torch.device) -> list[Any]:
        inputs = enumerate(self.record.inputs)
        return [
            self._value(f"input:{number}", device) if leaf.kind == "tensor" else leaf.value for number, leaf in inputs
        ]

    def _own_recipe(
        self, args: tuple[object, ...], kwargs: dict[str, object], signature: Signature, device: torch.device
    ) -> Recipe:
        record = self.record
        attributes = {name: self._value(f"attribute:{name}", device) for name in record.reference.tensors}
        integers = {use.partition(":")[2]: value for use, value in self.values.items() if use.startswith("integers:")}
        graph = _parsed(record.reference, device)
        module = bundled_module(record.model_class, record.state, integers, graph, attributes, signature, device)
        return Recipe(module, args, kwargs, tolerance=record.tolerance)

    def _graph(self, path: tuple[str, ...], device: torch.device) -> fx.GraphModule:
        """The graph of a part with the parts that it calls; engines are empty modules."""
        stored = next((graph for graph in self.record.graphs if graph.path == path), None)
        if stored is None:
            raise MalformedRecord(f"the bundle has no graph of the part {'/'.join(path)!r}")
        graph = _parsed(stored, device)
        values: dict[str, Tensor | nn.Module] = {}
        for target, spec in stored.tensors.items():
            use = f"part:{'/'.join(path)}:{target}"
            if use in self.values:
                values[target] = self._value(use, device)
            else:  # one that the plan computes for each version
                values[target] = torch.zeros(spec.shape, dtype=torch_dtype(spec.dtype), device=device)
        for node in graph.find_nodes(op="call_module"):
            target = str(node.target)
            engine = not path and target in self.engines
            values[target] = nn.Module() if engine else self._graph((*path, target), device)
        return graph_text.bound(graph, values=values)

    def _plan(self, stored: StoredPlan, device: torch.device) -> RefitPlan:
        formulas = {}
        for formula in stored.formulas:
            graph = _parsed(StoredGraph((), formula.text, {}), device)
            graph_text.bound(graph, values={})
            if len(graph.find_nodes(op="placeholder")) != len(formula.inputs):
                raise MalformedRecord(f"the formula {formula.name[:80]!r} takes another number of inputs than it has")
            formulas[formula.name] = Formula(graph, formula.inputs)
        items = {
            (rule.part, rule.weight): Item(Kind(rule.kind), rule.origin, torch_dtype(rule.dtype), rule.shape)
            for rule in stored.rules
        }
        constants = {name: self._value(f"constant:{name}", device) for name in stored.constants}
        return RefitPlan(
            items, formulas, constants, frozenset(stored.sources), frozenset(stored.unused), stored.unproven,
            stored.ties, tuple(self.engines),
        )  # fmt: skip

    def _value(self, use: str, device: torch.device) -> Tensor:
        """On the device, unless it was on the host when it was stored: an operator may ask for that."""
        if use not in self.values:
            raise MalformedRecord(f"the bundle has no tensor for {use[:80]!r}")
        return self.values[use] if use in self.record.host else self.values[use].to(device)


# ---------------------------------------------------------------------- reading


def _record(path: Path) -> BundleRecord:
    data = _read(path, LIMITS.bundle_record_bytes + _DIGEST_BYTES, None)
    if digest_of(memoryview(data)[_DIGEST_BYTES:]) != data[:_DIGEST_BYTES]:
        raise _damaged(path, "its bytes do not match their checksum")
    try:
        return wire.unpack(data[_DIGEST_BYTES:], BundleRecord, max_bytes=LIMITS.bundle_record_bytes)
    except (MalformedRecord, LimitExceeded) as error:
        error.about, error.next = str(path), _AGAIN
        raise


def _checked(folder: Path, file: StoredFile) -> bytes:
    path = folder / file.name
    data = _read(path, file.size_bytes, file.size_bytes)
    if digest_of(data) != file.digest:
        raise _damaged(path, "its bytes do not match the digest in the bundle's record")
    return data


def _read(path: Path, most: int, exactly: int | None) -> bytes:
    """Raises: DigestMismatch, before anything is read, for a file that is missing or of another size."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > most or (exactly is not None and size != exactly):
                raise _damaged(path, f"it has {size} bytes, not {'at most ' if exactly is None else ''}{most}")
            data = file.read(size)
            if len(data) != size:
                raise _damaged(path, "it ends while it is read")
            return data
    except FileNotFoundError:
        raise _damaged(path, "it is missing") from None
    except OSError as error:
        raise StoreError(f"the bundle can't be read: {error.strerror}", about=str(path)) from error


def _values(folder: Path, record: BundleRecord) -> dict[str, Tensor]:
    path = folder / record.tensors.name
    try:
        held = tensors_in(_checked(folder, record.tensors))
    except RefleetError:
        raise
    except Exception as error:  # of the library: a header that is none
        raise _damaged(path, f"it is no safetensors file ({short(error)})") from error
    for use, spec in record.values.items():
        tensor = held.get(spec.name)
        if tensor is None or (dtype_text(tensor.dtype), tuple(tensor.shape)) != (spec.dtype, spec.shape):
            raise _damaged(path, f"it has no {spec} for {use[:80]!r}")
    return {use: held[spec.name] for use, spec in record.values.items()}


def _damaged(path: Path, why: str) -> DigestMismatch:
    return DigestMismatch(f"the bundle is damaged: {path.name}: {why}", about=str(path), next=_AGAIN)


def _parsed(stored: StoredGraph, device: torch.device) -> fx.Graph:
    try:
        data = json.loads(stored.text)
    except (ValueError, RecursionError) as error:
        raise MalformedRecord(f"a graph of the bundle is no JSON: {short(error)}") from None
    return graph_text.from_data(data, device=device if device.type == "cuda" else None)
