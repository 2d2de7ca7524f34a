"""What is written down in an engine bundle: one strict record, and the names of the files beside it.

    bundle.msgpack      BLAKE3 of the rest, then the record
    engine-N.plan       a serialized engine each
    tensors.safetensors tensors that belong to the engines and not to a version: constants, probe inputs

Graphs are `graph_text` data as JSON: a reader of JSON allocates nothing that the text does not hold.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass

import torch

from ..common import wire
from ..common.errors import UsageError
from ..common.limits import LIMITS
from ..common.types import TensorSpec, require, require_counts, require_digest, require_time
from . import trt_live

RECORD, TENSORS = "bundle.msgpack", "tensors.safetensors"
FORMAT = 1
_ENGINE = re.compile(r"engine-(0|[1-9][0-9]{0,3})\.plan\Z")
_KINDS = ("const", "direct", "folded", "batchnorm")
_LEAVES = ("tensor", "none", "bool", "int", "float", "str")
_DEPTH = 4  # of torch-executed parts in each other


def is_bundle_file(name: str) -> bool:
    return name in (RECORD, TENSORS) or bool(_ENGINE.match(name))


def engine_file(number: int) -> str:
    return f"engine-{number}.plan"


@dataclass(frozen=True, slots=True)
class Platform:
    """What engines are built with and for. "" where there is none."""

    torch: str
    torch_tensorrt: str
    tensorrt: str  # name and version: standard TensorRT and TensorRT-RTX can't load each other's engines
    gpu: str
    capability: str  # compute capability, "9.0"

    @classmethod
    def here(cls) -> Platform:
        tensorrt = ""
        with suppress(UsageError):
            tensorrt = trt_live.version()
        if not torch.cuda.is_available():
            return cls(str(torch.__version__), _torch_tensorrt(), tensorrt, "", "")
        major, minor = torch.cuda.get_device_capability()
        name = torch.cuda.get_device_name()
        return cls(str(torch.__version__), _torch_tensorrt(), tensorrt, name, f"{major}.{minor}")

    def misfit(self, here: Platform) -> str | None:
        """Why engines of this machine can't be used on `here`, or None. GPUs of equal capability are equal."""
        if self.capability and not here.capability:
            return f"torch sees no CUDA device here; its engines are for {self.gpu}"
        if self.tensorrt != here.tensorrt:
            return f"its engines are for {self.tensorrt or 'no TensorRT'}, here is {here.tensorrt or 'no TensorRT'}"
        if self.capability != here.capability:
            wanted = f"{self.gpu} (compute capability {self.capability})" if self.capability else "no GPU"
            return f"its engines are for {wanted}, here is {here.gpu} ({here.capability})"
        return None


def _torch_tensorrt() -> str:
    """Its version as it is installed; "" without it. Standard and RTX builds are packages of different names."""
    from importlib.metadata import PackageNotFoundError, version

    for name in ("torch_tensorrt", "torch_tensorrt_rtx"):
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    return ""


@dataclass(frozen=True, slots=True)
class StoredFile:
    name: str
    size_bytes: int
    digest: bytes

    def __post_init__(self) -> None:
        require(is_bundle_file(self.name) and self.name != RECORD, f"file name {self.name[:40]!r}")
        require_counts(self.size_bytes)
        require_digest(self.digest, f"digest of {self.name}")


@dataclass(frozen=True, slots=True)
class StoredEngine:
    part: str
    file: StoredFile
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StoredGraph:
    """`path` () is the graph that calls the parts, (part, ...) one of them. `tensors`: what it reads, by target."""

    path: tuple[str, ...]
    text: str
    tensors: dict[str, TensorSpec]

    def __post_init__(self) -> None:
        require(len(self.path) <= _DEPTH, f"parts in parts, {len(self.path)} deep")


@dataclass(frozen=True, slots=True)
class StoredRule:
    """The rule of one weight of a part: `refit_plan.Item`."""

    part: str
    weight: str
    kind: str
    origin: str
    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        require(self.kind in _KINDS, f"rule of {self.weight[:80]!r}: kind {self.kind[:20]!r}")
        TensorSpec("x", self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class StoredFormula:
    name: str
    text: str
    inputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StoredPlan:
    """A refit plan. `formulas`: each after those that it uses. The values of `constants` are in the tensors' file."""

    rules: tuple[StoredRule, ...]
    formulas: tuple[StoredFormula, ...]
    constants: tuple[str, ...]
    sources: tuple[str, ...]
    unused: tuple[str, ...]
    unproven: dict[str, bytes]
    ties: dict[str, str]

    def __post_init__(self) -> None:
        sources = set(self.sources)
        known = sources | set(self.constants)
        for formula in self.formulas:
            unknown = [name for name in formula.inputs if name not in known]
            require(not unknown, f"formula {formula.name[:80]!r} uses {unknown[:1]}, which is not before it")
            require(formula.name not in known, f"{formula.name[:80]!r} is named twice")
            known.add(formula.name)
        formulas = {formula.name for formula in self.formulas}
        origins = {"const": set(self.constants), "direct": sources, "folded": formulas, "batchnorm": formulas}
        for rule in self.rules:
            require(rule.origin in origins[rule.kind], f"rule of {rule.weight[:80]!r}: origin {rule.origin[:80]!r}")
        addresses = {(rule.part, rule.weight) for rule in self.rules}
        require(len(addresses) == len(self.rules), "two rules for one weight")
        require(self.unproven.keys() <= sources, "an unproven tensor is not among those that the engines use")
        for digest in self.unproven.values():
            require_digest(digest, "digest of an unproven tensor")


@dataclass(frozen=True, slots=True)
class Spread:
    """What the elements of a floating tensor were like. `positive`: all of them were above 0."""

    mean: float
    deviation: float
    positive: bool

    def __post_init__(self) -> None:
        require(self.deviation >= 0, f"deviation {self.deviation}")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a version. `same_as`: the first of the names that share its memory; "" if none does."""

    spec: TensorSpec
    same_as: str
    spread: Spread | None  # None: not floating


@dataclass(frozen=True, slots=True)
class StoredLeaf:
    """One probe input in the order of the graph's inputs; the tensors are in the tensors' file."""

    kind: str
    text: str

    def __post_init__(self) -> None:
        require(self.kind in _LEAVES, f"probe input of kind {self.kind[:20]!r}")
        self.value  # noqa: B018  is it one?

    @classmethod
    def of(cls, value: object) -> StoredLeaf | None:
        """None for an object that can't be stored."""
        if isinstance(value, torch.Tensor):
            return cls("tensor", "")
        if value is None:
            return cls("none", "")
        kind = type(value).__name__
        if kind not in _LEAVES:
            return None
        return cls(kind, value.hex() if isinstance(value, float) else str(value))

    @property
    def value(self) -> object:
        """Raises: ValueError. None for a tensor."""
        match self.kind:
            case "bool":
                require(self.text in ("True", "False"), f"a bool {self.text[:20]!r}")
                return self.text == "True"
            case "int":
                require(len(self.text) < 25, "a probe input of more than 64 bits")
                return int(self.text)
            case "float":
                try:
                    return float.fromhex(self.text)
                except OverflowError as error:
                    raise ValueError(str(error)) from error
            case "str":
                return self.text
        return None


@wire.record("engine-bundle")
@dataclass(frozen=True, slots=True)
class BundleRecord:
    """Everything but plans and tensors. `values`: what is in the tensors' file, by use, under which spec there.

    Uses: `constant:NAME` of the plan; `part:PATH:NAME`; `attribute:NAME` of the reference graph; `integers:NAME`, a
    version's tensor that the engines were built with for good; `input:N`.
    """

    format: int
    created_at_ms: int
    platform: Platform
    model_class: str
    build: bytes  # digest of the engines: equal for whoever loads this bundle
    engines: tuple[StoredEngine, ...]
    tensors: StoredFile
    values: dict[str, TensorSpec]
    host: tuple[str, ...]  # uses of those that were in host memory
    graphs: tuple[StoredGraph, ...]
    plan: StoredPlan | None
    why_not_fast: str
    reference: StoredGraph
    signature: tuple[str, ...]
    inputs: tuple[StoredLeaf, ...]
    state: tuple[StoredTensor, ...]
    measured: dict[str, float]
    tolerance: float | None
    options: str  # the recipe's compile options
    layers: bytes  # digest of the module's layers and their settings
    stripped: bool  # the plans are without the weights that can be refitted
    version: str  # version id whose weights the plans hold; "": those that the factory made, or an id is not known
    fingerprint: bytes | None  # of that version

    def __post_init__(self) -> None:
        require(self.format == FORMAT, f"a bundle of format {self.format}, this refleet reads {FORMAT}")
        require_time(self.created_at_ms)
        require_digest(self.build, "digest of the engines")
        require_digest(self.layers, "digest of the layers")
        require_digest(self.fingerprint, "fingerprint")
        parts = [engine.part for engine in self.engines]
        names = [engine.file.name for engine in self.engines]
        require(bool(parts) and len(set(parts)) == len(parts), "it has no engine, or two of one name")
        require(names == [engine_file(number) for number in range(len(names))], "engines are not in their own files")
        require(self.tensors.name == TENSORS, f"tensors in {self.tensors.name!r}")
        paths = [graph.path for graph in self.graphs]
        require(len(paths) <= LIMITS.bundle_graphs and len(set(paths)) == len(paths), "two graphs of one part")
        require(() in paths, "no graph calls the engines")
        keys = [entry.spec.name for entry in self.state]
        require(len(set(keys)) == len(keys) <= LIMITS.tensors, "two tensors of one name")
        require({entry.same_as for entry in self.state} <= {"", *keys}, "a tensor is tied to one that is not there")
        require(len(self.inputs) <= LIMITS.tensors, f"{len(self.inputs)} probe inputs")
        require(self.tolerance is None or 0 < self.tolerance < 1, f"tolerance {self.tolerance}")
        if self.plan is not None:
            _check_plan(self.plan, self.values, set(keys))
        require(self.plan is not None or not self.stripped, "without weights and without a refit plan")


def _check_plan(plan: StoredPlan, values: dict[str, TensorSpec], state: set[str]) -> None:
    lacking = [name for name in plan.constants if f"constant:{name}" not in values]
    require(not lacking, f"constants without value: {lacking[:1]}")
    named = {*plan.sources, *plan.unused, *plan.ties, *plan.ties.values()}
    require(named <= state, f"the plan names {sorted(named - state)[:1]}, which no version has")
