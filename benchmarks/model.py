"""The benchmark's model: Llama-like shapes in bf16, and the changes that a publish sees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import nn

Weights = dict[str, NDArray[np.uint16]]

#: changes by name: the share of the elements that move
CHANGES = {"0 %": 0.0, "1 %": 0.01, "100 %": 1.0}


def shapes(layers: int, width: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes: `layers` 7 and `width` 1024 make 123 M elements, 247 MB."""
    made: dict[str, tuple[int, ...]] = {"embed": (32 * width, width), "norm": (width,)}
    wide = width * 11 // 4
    for n in range(layers):
        made |= {f"layer_{n}_{name}": (width, width) for name in ("q", "k", "v", "o")}
        made |= {f"layer_{n}_up": (wide, width), f"layer_{n}_gate": (wide, width), f"layer_{n}_down": (width, wide)}
        made |= {f"layer_{n}_norm": (width,)}
    return made


def size_bytes(layers: int, width: int) -> int:
    return sum(int(np.prod(shape)) * 2 for shape in shapes(layers, width).values())


class Served(nn.Module):
    """Holds the tensors; what a worker serves here is their first sum."""

    def __init__(self, layers: int, width: int):
        super().__init__()
        for name, shape in shapes(layers, width).items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16), requires_grad=False))


def fresh(layers: int, width: int, *, seed: int) -> Weights:
    """Weights ~ N(0, 0.02) in bf16, as bit patterns."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in shapes(layers, width).items():
        values = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        made[name] = values.view(torch.int16).numpy().view(np.uint16)
    return made


def changed(weights: Weights, share: float, *, seed: int) -> Weights:
    """A copy in which `share` of the elements of every tensor moved by one unit in the last place (all: by up to 3)."""
    rng = np.random.default_rng(seed)
    made = {}
    for name, bits in weights.items():
        new = bits.copy()
        flat = new.reshape(-1)
        if share >= 1:
            flat += rng.integers(1, 4, flat.size, np.uint16)  # a fine-tune step: everything moves a little
        elif share > 0:
            flat[rng.integers(0, flat.size, int(flat.size * share))] ^= 1
        made[name] = new
    return made


def save(weights: Weights, path: Path) -> None:
    save_file({n: torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16) for n, bits in weights.items()}, path)
