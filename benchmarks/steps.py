"""What a training step does to bf16 weights, by kind. Every change is a function of the seed, whatever the threads.

first   nothing: the first version of a model, sent whole
rl      a step of RL: noise on fp32 masters, so that 1.4 % of the elements move by one unit in the last place, the
        more likely the smaller they are
lora    a low-rank update of q and v in every layer: nearly every element of these moves
tune    a step of fine-tuning: noise that moves half of all elements
none    nothing: the same weights under another version id
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from model import Bits, Weights, exact, fresh, pieces, rounded, save

KINDS = ("first", "rl", "lora", "tune", "none")
#: standard deviation of the noise on masters of weights ~ N(0, 0.02)
RL_NOISE, TUNE_NOISE = 8.4e-7, 4.9e-5
LORA_RANK, LORA_SCALE = 16, 2e-3
LORA_ON = ("_q", "_v")


class Trainer:
    """Weights in memory, and the checkpoint file that holds them."""

    def __init__(self, megabytes: float, path: Path, *, seed: int = 1):
        self.weights, self.path, self._steps = fresh(megabytes, seed=seed), path, 0

    def step(self, kind: str) -> float:
        """One step, saved; returns the share of the elements that it changed."""
        self._steps += 1
        changed = change(kind, self.weights, seed=self._steps)
        save(self.weights, self.path)
        return changed


def change(kind: str, weights: Weights, *, seed: int) -> float:
    """Change `weights` in place; returns the share of the elements that came out different."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        changed = sum(pool.map(lambda work: work(), _work(kind, weights, seed)))
    return changed / sum(bits.size for bits in weights.values())


def _work(kind: str, weights: Weights, seed: int) -> Iterator[Callable[[], int]]:
    """Functions that change a piece each, and say how many elements that were."""
    for number, (name, bits) in enumerate(weights.items()):
        if kind == "lora":
            if name.endswith(LORA_ON):
                yield partial(_low_rank, bits, _rng(seed, number))
        elif kind in ("rl", "tune"):
            noise = RL_NOISE if kind == "rl" else TUNE_NOISE
            for part, piece in enumerate(pieces(bits)):
                yield partial(_noise, piece, noise, _rng(seed, number, part))


def _rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def _noise(piece: Bits, noise: float, rng: np.random.Generator) -> int:
    """Masters somewhere inside what rounds to these weights, moved a little, and rounded again."""
    master = exact(piece)
    master *= 1 + (rng.random(piece.size, np.float32) - 0.5) / 256
    master += np.float32(noise) * rng.standard_normal(piece.size, np.float32)
    return _put(piece, rounded(master))


def _low_rank(bits: Bits, rng: np.random.Generator) -> int:
    rows, columns = bits.shape
    b, a = (rng.standard_normal(shape, np.float32) for shape in ((rows, LORA_RANK), (LORA_RANK, columns)))
    return _put(bits, rounded(exact(bits) + np.float32(LORA_SCALE / LORA_RANK**0.5) * (b @ a)))


def _put(bits: Bits, new: Bits) -> int:
    changed = int(np.count_nonzero(bits != new))
    bits[...] = new
    return changed
