"""Versions and engines that the engine tests share, and fixtures that give each engine in turn."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from refleet.common.digest import tensor_digest
from refleet.common.messages import Serving
from refleet.common.types import Manifest, TensorEntry, TensorSpec
from refleet.worker.engine import Engine
from refleet.worker.file_engine import FileEngine
from refleet.worker.memory_engine import MemoryEngine
from refleet.worker.torch_engine import TorchEngine
from torch import nn

SPECS = {
    spec.name: spec
    for spec in (
        TensorSpec("columns", "F16", (3, 5)),
        TensorSpec("embed.weight", "F32", (8, 4)),
        TensorSpec("empty", "F16", (0, 3)),
        TensorSpec("fp8", "F8_E4M3", (6,)),
        TensorSpec("mask", "BOOL", (5,)),
        TensorSpec("norm", "BF16", (4,)),
        TensorSpec("rotary", "C64", (3,)),
        TensorSpec("steps", "I64", ()),
        TensorSpec("wide", "F64", (2, 1)),
    )
}
#: a signalling NaN, a NaN with a payload, -0.0, and the smallest subnormal: what float copies lose
ODD_F32 = np.array([0x7F800001, 0xFFC12345, 0x80000000, 0x00000001], dtype="<u4").view(np.uint8)


class Zoo(nn.Module):
    """One tensor of every kind: bf16, fp8, complex, bool, 0-d, zero-size, and one that is not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.norm = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
        self.columns = nn.Parameter(torch.zeros(5, 3, dtype=torch.float16).t())
        self.register_buffer("empty", torch.zeros(0, 3, dtype=torch.float16))
        self.register_buffer("fp8", torch.zeros(6).to(torch.float8_e4m3fn))
        self.register_buffer("mask", torch.zeros(5, dtype=torch.bool))
        self.register_buffer("rotary", torch.zeros(3, dtype=torch.complex64))
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("wide", torch.zeros(2, 1, dtype=torch.float64))
        self.register_buffer("cache", torch.zeros(2), persistent=False)

    def forward(self, ids: torch.Tensor, *, scale: float) -> dict[str, object]:
        hidden = self.embed(ids) * self.norm.float() * scale
        return {"hidden": hidden, "rest": (self.columns.sum(0), [self.rotary, self.wide], self.fp8, self.steps, None)}


ZOO_INPUTS = ((torch.tensor([0, 3, 5]),), {"scale": 0.5})


def zoo() -> tuple[nn.Module, object]:
    """A factory as `torch:engine_cases:zoo` names it."""
    return Zoo().eval(), ZOO_INPUTS


@dataclass
class Staged:
    """A staged version in memory; reading a name in `broken` raises that error."""

    serving: Serving
    manifest: Manifest
    tensors: dict[str, bytes]
    broken: Mapping[str, Exception] = dataclasses.field(default_factory=dict)
    restructure: bool = False

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self.tensors)

    @property
    def digests(self) -> dict[str, bytes]:
        return {entry.spec.name: entry.digest for entry in self.manifest.tensors}

    def read(self, name: str) -> memoryview:
        if name in self.broken:
            raise self.broken[name]
        return memoryview(bytearray(self.tensors[name]))


def version(tensors: Mapping[str, bytes], specs: Iterable[TensorSpec], *, name: str = "v1", seq: int = 1) -> Staged:
    specs = list(specs)
    manifest = Manifest.of(TensorEntry(spec, tensor_digest(tensors[spec.name])) for spec in specs)
    return Staged(Serving(name, 1, seq, manifest.fingerprint), manifest, dict(tensors))


def zoo_version(seed: int) -> Staged:
    """Random finite embeddings with odd bits in the last row, random bits everywhere else."""
    random = np.random.default_rng(seed)
    tensors = {name: random.bytes(spec.size_bytes) for name, spec in SPECS.items()}
    tensors["mask"] = random.integers(0, 2, 5, dtype=np.uint8).tobytes()
    rows = random.standard_normal((8, 4), dtype=np.float32)
    rows[7] = np.roll(ODD_F32.view("<f4"), seed)
    tensors["embed.weight"] = rows.tobytes()
    tensors["norm"] = torch.from_numpy(rows[0]).bfloat16().view(torch.int16).numpy().tobytes()
    return version(tensors, SPECS.values(), name=f"v{seed}", seq=seed)


def one_changed(base: Staged, name: str) -> Staged:
    """`base` with other bytes in one tensor."""
    tensors = {**base.tensors, name: zoo_version(99).tensors[name]}
    assert tensors[name] != base.tensors[name]
    return version(tensors, SPECS.values(), name="next", seq=base.serving.seq + 1)


def with_spec(name: str, dtype: str, shape: tuple[int, ...]) -> Staged:
    base, spec = zoo_version(2), TensorSpec(name, dtype, shape)
    specs = [*(s for n, s in SPECS.items() if n != name), spec]
    return version({**base.tensors, name: bytes(spec.size_bytes)}, specs, name="v2", seq=2)


def without(name: str) -> Staged:
    base = zoo_version(2)
    return version({n: d for n, d in base.tensors.items() if n != name}, [s for n, s in SPECS.items() if n != name])


@dataclass
class Case:
    engine: Engine
    kind: str

    def read_back(self, names: frozenset[str]) -> dict[str, bytes]:
        return dict(self.engine.read_back(sorted(names)))

    def spoil(self, name: str) -> None:
        """Flip one bit of what the engine holds, behind its back."""
        match self.engine:
            case TorchEngine(module=module):
                module.state_dict()[name].view(torch.uint8).view(-1)[0] ^= 1
            case FileEngine(path=path):
                data = bytearray(path.read_bytes())
                held = zoo_version(1).tensors[name]
                data[data.index(held)] ^= 1
                path.write_bytes(data)
            case MemoryEngine(tensors=tensors):
                tensors[name] = bytes([tensors[name][0] ^ 1]) + tensors[name][1:]


KINDS = ["torch", "file", "memory", "memory-prepares", *(["torch-cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=KINDS)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    if request.param == "torch":
        return Case(TorchEngine(zoo), "torch")
    if request.param == "torch-cuda":
        return Case(TorchEngine(Zoo().cuda().eval(), probe_inputs=((torch.arange(3).cuda(),), {"scale": 2.0})), "torch")
    if request.param == "file":
        return Case(FileEngine(tmp_path / "model.safetensors"), "file")
    return Case(MemoryEngine(SPECS.values(), prepares=request.param == "memory-prepares"), "memory")


@pytest.fixture(params=["file", "memory", "memory-prepares"])
def follower(request: pytest.FixtureRequest, tmp_path: Path) -> Engine:
    """An engine that can be rebuilt for other names, dtypes and shapes."""
    if request.param == "file":
        return FileEngine(tmp_path / "model.safetensors")
    return MemoryEngine(prepares=request.param == "memory-prepares")
