"""The benchmarks' model: Llama-like shapes in bf16, as bit patterns, and the checkpoint file of them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

Bits = NDArray[np.uint16]
Weights = dict[str, Bits]

#: elements that are worked on at a time, so that a step takes little more memory than the model itself
PIECE = 1 << 22
_LEAST_LAYERS = 6
_EMBED, _LAYER = 32, 12.25  # elements, in squares of the width


def layers_and_width(megabytes: float) -> tuple[int, int]:
    """The widest model of at least six layers: 256 MB are 7 layers of 1024, 2000 MB are 17 of 2048."""
    layers, width = 1, 32
    while (fits := round((megabytes * 1e6 / (2 * (2 * width) ** 2) - _EMBED) / _LAYER)) >= _LEAST_LAYERS:
        layers, width = fits, 2 * width
    return layers, width


def shapes(megabytes: float) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model of about this size."""
    layers, width = layers_and_width(megabytes)
    made: dict[str, tuple[int, ...]] = {"embed": (_EMBED * width, width), "norm": (width,)}
    wide = width * 11 // 4
    for n in range(layers):
        made |= {f"layer_{n}_{name}": (width, width) for name in ("q", "k", "v", "o")}
        made |= {f"layer_{n}_up": (wide, width), f"layer_{n}_gate": (wide, width), f"layer_{n}_down": (width, wide)}
        made |= {f"layer_{n}_norm": (width,)}
    return made


def size_bytes(megabytes: float) -> int:
    return sum(int(np.prod(shape)) * 2 for shape in shapes(megabytes).values())


class Served(nn.Module):
    """Holds the tensors; what a worker serves here is that it has them."""

    def __init__(self, megabytes: float):
        super().__init__()
        for name, shape in shapes(megabytes).items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16), requires_grad=False))


def fresh(megabytes: float, *, seed: int) -> Weights:
    """Weights ~ N(0, 0.02)."""
    rng, made = np.random.default_rng(seed), {}
    for name, shape in shapes(megabytes).items():
        made[name] = bits = np.empty(shape, np.uint16)
        for piece in pieces(bits):
            piece[:] = rounded(np.float32(0.02) * rng.standard_normal(piece.size, np.float32))
    return made


def pieces(bits: Bits) -> Iterator[Bits]:
    """Views of all elements, in order."""
    flat = bits.reshape(-1)
    for start in range(0, flat.size, PIECE):
        yield flat[start : start + PIECE]


def exact(bits: Bits) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(values: NDArray[np.float32]) -> Bits:
    """bf16: to nearest, ties to even."""
    wide = values.view(np.uint32)
    return ((wide + 0x7FFF + (wide >> 16 & 1)) >> 16).astype(np.uint16)


def as_tensor(bits: Bits) -> torch.Tensor:
    """The same memory."""
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)


def as_tensors(weights: Weights) -> dict[str, torch.Tensor]:
    return {name: as_tensor(bits) for name, bits in weights.items()}


def save(weights: Weights, path: Path) -> None:
    """A safetensors file, on the disk when this returns: what is measured next must not wait for it."""
    header, end = {}, 0
    for name, bits in weights.items():
        header[name] = {"dtype": "BF16", "shape": bits.shape, "data_offsets": (end, end := end + bits.nbytes)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for bits in weights.values():
            file.write(bits.data)
        file.flush()
        os.fsync(file.fileno())
