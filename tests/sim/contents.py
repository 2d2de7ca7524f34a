"""What the simulated trainer makes: tiny models of many dtypes, and the truth about every one of them."""

from __future__ import annotations

import json
import random
import struct
from dataclasses import dataclass

from refleet.common.digest import tensor_digest
from refleet.common.types import Manifest, TensorEntry, TensorSpec

_SHAPES: dict[str, tuple[str, tuple[int, ...]]] = {
    "embed.weight": ("BF16", (16, 8)),
    "layer.bias": ("F16", (7,)),
    "layer.weight": ("F32", (10, 6)),
    "mask": ("U8", (5,)),
    "nothing": ("F32", (0, 4)),
    "quantized": ("F8_E4M3", (9,)),
    "scale": ("F32", ()),
    "steps": ("I64", (3,)),
}
_OTHER: dict[str, tuple[str, tuple[int, ...]]] = {
    **{name: shape for name, shape in _SHAPES.items() if name not in ("steps", "mask")},
    "head": ("F32", (3, 4)),
    "layer.bias": ("F16", (5,)),
}
_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "U8": 1, "F8_E4M3": 1, "I64": 8}


@dataclass(frozen=True)
class Content:
    """One complete state of the model."""

    tensors: dict[str, bytes]
    manifest: Manifest
    file: bytes  # as safetensors
    other: bool  # another structure than the usual one

    @property
    def fingerprint(self) -> bytes:
        return self.manifest.fingerprint


def new_content(rng: random.Random, base: Content | None, *, other: bool = False) -> Content:
    """A state in which some elements of some tensors of `base` are different."""
    shapes, tensors = (_OTHER if other else _SHAPES), {}
    share = rng.choice((0.02, 0.2, 1.0))
    for name, (dtype, shape) in shapes.items():
        size = _BYTES[dtype]
        for side in shape:
            size *= side
        before = base.tensors.get(name) if base else None
        if before is None or len(before) != size:
            tensors[name] = rng.randbytes(size)  # any bits: NaNs with payloads, subnormals, -0.0
        elif (chance := rng.random()) < 0.4:
            tensors[name] = before
        elif size and chance < 0.5:  # one sign: +0.0 becomes -0.0
            at = rng.randrange(size // _BYTES[dtype]) * _BYTES[dtype] + _BYTES[dtype] - 1
            tensors[name] = before[:at] + bytes([before[at] ^ 0x80]) + before[at + 1 :]
        else:
            data = bytearray(before)
            for start in range(0, size, _BYTES[dtype]):
                if rng.random() < share:
                    data[start : start + _BYTES[dtype]] = rng.randbytes(_BYTES[dtype])
            tensors[name] = bytes(data)
    return _content(tensors, shapes, other=other)


def _content(tensors: dict[str, bytes], shapes: dict[str, tuple[str, tuple[int, ...]]], *, other: bool) -> Content:
    specs = {name: TensorSpec(name, *shapes[name]) for name in tensors}
    manifest = Manifest.of(TensorEntry(specs[name], tensor_digest(data)) for name, data in tensors.items())
    header, at = {}, 0
    for name, data in tensors.items():
        dtype, shape = shapes[name]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
    head = json.dumps(header).encode()
    head = head.ljust(-(-len(head) // 8) * 8)
    return Content(tensors, manifest, struct.pack("<Q", len(head)) + head + b"".join(tensors.values()), other)
