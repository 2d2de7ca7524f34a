"""How few bytes a step can take: entropies of the same data that the codecs get.

A step is taken element by element as a flag (changed or not) and, where changed, a difference d in units in the last
place: floats are mapped to integers in their own order, d = new - base. All probabilities are the frequencies of this
very step, and describing them costs nothing here. Where things lie is left out: a codec that notices that changes
gather in some rows or tensors can go below.

    order 0         n (h(p) + p H(d)), with p the share that changed, h the entropy of a flag in bits, H that of d
    given exponent  the sum over exponents e of the base of n_e (h(p_e) + p_e H(d | e)); the receiver has the base
    alone           the new values by themselves: H(sign and exponent) + raw mantissa bits (16 bits: H of the value)

|d| below 256 is a symbol of its own. Above, the symbol is sign and bit length, and the bits below the leading one count
as noise (1 bit each): with a symbol of its own for each of 2**24 values, frequencies would say nothing.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[np.unsignedinteger[Any]]

EXACT = 256  # |d| below it
MANTISSA = {"BF16": 7, "F16": 10, "F32": 23}
EXPONENT = {"BF16": 8, "F16": 5, "F32": 8}


def bounds(new: NDArray[np.uint8], base: NDArray[np.uint8], dtype: str) -> dict[str, float]:
    """The three entropies in bytes, by name."""
    kind = np.dtype("<u2" if dtype != "F32" else "<u4")
    after, before = new.view(kind), base.view(kind)
    exponents = 1 << EXPONENT[dtype]
    exponent = (before >> MANTISSA[dtype]).astype(np.uint16) & (exponents - 1)
    moved = np.flatnonzero(after != before)
    symbols, noise = _symbols(after[moved], before[moved])
    of_moved = exponent[moved]
    total, counts = np.bincount(exponent, minlength=exponents), np.bincount(of_moved, minlength=exponents)
    joint = np.bincount(of_moved.astype(np.int64) << 10 | symbols, minlength=exponents << 10).reshape(exponents, -1)
    given = sum(
        _flag(int(n), int(k)) + _entropy(row) for n, k, row in zip(total, counts, joint, strict=True) if n
    )  # fmt: skip
    plain = _flag(after.size, moved.size) + _entropy(joint.sum(0))
    return {
        "order 0": (plain + noise) / 8,
        "given exponent": (given + noise) / 8,
        "alone": _alone(after, dtype) / 8,
    }


def _symbols(after: Bits, before: Bits) -> tuple[NDArray[np.int64], int]:
    """What each difference is, as a number below 1024, and the bits of noise in all of them."""
    step = _ordered(after) - _ordered(before)
    size = np.abs(step)
    length = np.frexp(size.astype(np.float64))[1].astype(np.int64)  # exact: below 2**53
    large = size >= EXACT
    kind = np.where(large, EXACT + length, size)
    return kind << 1 | (step < 0), int((length[large] - 1).sum())


def _ordered(bits: Bits) -> NDArray[np.int64]:
    width = 8 * bits.itemsize
    wide = bits.astype(np.int64)
    return np.where(wide >> width - 1 == 0, wide + (1 << width - 1), (1 << width) - 1 - wide)


def _alone(bits: Bits, dtype: str) -> float:
    raw = 0 if bits.itemsize == 2 else MANTISSA[dtype]
    return _entropy(np.bincount(bits >> raw)) + raw * bits.size


def _flag(total: int, moved: int) -> float:
    return _entropy(np.array([moved, total - moved]))


def _entropy(counts: NDArray[Any]) -> float:
    """Bits for all symbols together."""
    some = counts[counts > 0].astype(np.float64)
    return 0.0 if some.size < 2 else float(some.sum() * math.log2(some.sum()) - (some * np.log2(some)).sum())
