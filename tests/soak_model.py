"""The model of the long run: small, and every version of it is other bytes in every tensor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

Array = NDArray[np.float32]
SHAPES = {"embed": (400, 64), "head": (64,), "layer": (256, 128)}


class Versions:
    """Checkpoints by number: each is the one before with about one element of a hundred changed."""

    def __init__(self, seed: int):
        self._random = np.random.default_rng(seed)
        self._state = {name: self._random.standard_normal(shape, np.float32) for name, shape in SHAPES.items()}

    def next(self) -> dict[str, Array]:
        for array in self._state.values():
            flat = array.reshape(-1)
            flat[self._random.integers(0, flat.size, max(flat.size // 100, 1))] *= np.float32(1.001)
            flat[0] += 1
        return {name: array.copy() for name, array in self._state.items()}


def tensors_digest(state: Mapping[str, Array]) -> str:
    """One digest of all of them."""
    hasher = blake3()
    for name, array in sorted(state.items()):
        hasher.update(name.encode())
        hasher.update(np.ascontiguousarray(array).tobytes())
    return hasher.hexdigest()


def make_known(folder: Path, version: str, digest: str) -> None:
    """Before the version is published."""
    with open(folder / "known", "a") as file:
        file.write(json.dumps([version, digest]) + "\n")


def known_contents(folder: Path) -> dict[str, str]:
    """Digest of every version that was or will be published."""
    lines = (folder / "known").read_text().splitlines(keepends=True)
    return dict(json.loads(line) for line in lines if line.endswith("\n"))
