"""The kernels in numpy: the reference for those in C, and what runs where no compiler was at hand.

Every function here says what the C form has to give, byte for byte (`tests/test_kernels.py` runs both).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from . import kernels_symbols as symbols
from .kernels_types import (
    BEYOND_END,
    KEYS,
    LEAF_BYTES,
    NO_STREAMS,
    ROTATED,
    STEPPED,
    Bytes,
    Counts,
    Data,
    Kind,
    Streams,
    Unsigned,
    refused,
)
from .limits import KIB

Positions = NDArray[np.int64]

COMPARE_BYTES = 256 * KIB  # compared at a time: an early difference ends the search early
GAP_MEAN_MAX = 16  # mean of gap >> shift: 8 to 16 leaves no escapes, and cost least on real RL steps among 16 to 100


class NumpyKernels:
    """All kernels in numpy."""

    name = "numpy"

    def first_difference(self, new: Data, base: Data) -> int:
        one, other = np.frombuffer(new, np.uint8), np.frombuffer(base, np.uint8)
        size = min(one.size, other.size)
        for start in range(0, size, COMPARE_BYTES):
            end = min(start + COMPARE_BYTES, size)
            differs = one[start:end] != other[start:end]
            if differs.any():
                return start + int(differs.argmax())
        return -1 if one.size == other.size else size

    def sample(
        self, new: Bytes, base: Bytes, kind: Kind, *, pieces: int, piece: int, stride: int
    ) -> tuple[Counts, Counts]:
        one, other = (
            np.lib.stride_tricks.as_strided(
                block.view(f"<u{kind.width}"), (pieces, piece), (stride * kind.width, kind.width), writeable=False
            )
            for block in (new, base)
        )
        keys = _keys(np.ascontiguousarray(other), kind)
        seen, changed = (np.bincount(k.reshape(-1), minlength=KEYS) for k in (keys, keys[one != other]))
        return seen.astype(np.uint32), changed.astype(np.uint32)

    def extract(self, new: Bytes, base: Bytes, kind: Kind, thresholds: bytes, limit: int) -> list[Streams] | None:
        found = changes(new, base, kind.width, limit=limit)
        if found is None:
            return None
        positions, after, before = found
        steps = _ordered(after, kind) - _ordered(before, kind)
        if not thresholds:
            return [_streams(positions, steps)]
        table = _class_table(thresholds)
        own = table[_keys(before, kind)]
        every = table[_keys(base.view(f"<u{kind.width}"), kind)]
        classes = []
        for number in range(len(thresholds) + 1):
            mine = own == number
            ranks = np.searchsorted(np.flatnonzero(every == number), positions[mine])
            classes.append(_streams(ranks, steps[mine]))
        return classes

    def apply(self, out: Bytes, base: Bytes, kind: Kind, thresholds: bytes, classes: list[Streams]) -> None:
        elements = out.size // kind.width
        for streams in classes:
            symbols.check_sizes(streams, elements, kind.width)
        if sum(streams.changes for streams in classes) > elements:
            raise refused(BEYOND_END)
        every = _class_table(thresholds)[_keys(base.view(f"<u{kind.width}"), kind)] if thresholds else None
        places: list[tuple[Positions, Unsigned]] = []
        for number, streams in enumerate(classes):
            if streams.changes == 0:
                continue
            ranks = np.cumsum(symbols.unpack_gaps(streams, elements) + 1) - 1
            steps = symbols.unpack_steps(streams, kind.width)
            members = None if every is None else np.flatnonzero(every == number)
            if int(ranks[-1]) >= (elements if members is None else members.size):
                raise refused(BEYOND_END)
            places.append((ranks if members is None else members[ranks], steps))
        if out.ctypes.data != base.ctypes.data:
            out[:] = base
        target = out.view(f"<u{kind.width}")
        for positions, steps in places:
            target[positions] = _unordered(_ordered(target.take(positions), kind) + steps, kind)

    def to_planes(self, new: Bytes, base: Bytes | None, kind: Kind, how: int) -> Bytes:
        bits: Unsigned = new.view(f"<u{kind.width}")
        top = 8 * kind.width - 1
        if how == ROTATED:
            bits = bits << bits.dtype.type(1) | bits >> bits.dtype.type(top)
        elif how == STEPPED:
            assert base is not None
            step = _ordered(bits, kind) - _ordered(base.view(bits.dtype), kind)
            bits = step << bits.dtype.type(1) ^ _top_mask(step)
        return np.ascontiguousarray(bits.view(np.uint8).reshape(-1, kind.width).T)

    def from_planes(self, planes: list[Bytes], base: Bytes | None, out: Bytes, kind: Kind, how: int) -> None:
        bits: Unsigned = np.stack(planes, axis=1).reshape(-1).view(f"<u{kind.width}")
        top = 8 * kind.width - 1
        if how == ROTATED:
            bits = bits >> bits.dtype.type(1) | bits << bits.dtype.type(top)
        elif how == STEPPED:
            assert base is not None
            one = bits.dtype.type(1)
            step = bits >> one ^ -(bits & one)
            bits = _unordered(_ordered(base.view(bits.dtype), kind) + step, kind)
        out[:] = bits.view(np.uint8)

    def leaves(self, data: Data) -> bytes:
        view = np.frombuffer(data, np.uint8)
        if view.size % LEAF_BYTES:
            raise ValueError("no whole number of leaves of 64 KiB")
        leaves = view.reshape(-1, LEAF_BYTES)
        return b"".join(xxhash.xxh3_128_digest(leaf.data) for leaf in leaves)


def changes(new: Bytes, base: Bytes, width: int, *, limit: int) -> tuple[Positions, Unsigned, Unsigned] | None:
    """Positions of changed elements, their new and their old bits; None where more than `limit` changed.

    Two levels: 8-byte words are compared first, and only differing words are taken apart.
    """
    kind, whole = f"<u{width}", new.size // 8 * 8
    log_items = 4 - width.bit_length()  # of the elements in a word
    new_words, base_words = new[:whole].view("<u8"), base[:whole].view("<u8")
    words = np.flatnonzero(new_words != base_words)
    after, before = new_words.take(words).view(kind), base_words.take(words).view(kind)
    inside = np.flatnonzero(after != before)
    positions = (words.take(inside >> log_items) << log_items) + (inside & (1 << log_items) - 1)
    after, before = after.take(inside), before.take(inside)
    if whole < new.size:
        new_rest, base_rest = new[whole:].view(kind), base[whole:].view(kind)
        inside = np.flatnonzero(new_rest != base_rest)
        positions = np.concatenate((positions, inside + whole // width))
        after = np.concatenate((after, new_rest[inside]))
        before = np.concatenate((before, base_rest[inside]))
    return (positions, after, before) if positions.size <= limit else None


def _streams(ranks: Positions, steps: Unsigned) -> Streams:
    """The changes of one class whose elements `ranks` changed by `steps` (wrapped)."""
    count = ranks.size
    if count == 0:
        return NO_STREAMS
    gaps = (np.diff(ranks, prepend=-1) - 1).astype(np.uint32)
    shift, skipped = 0, int(ranks[-1]) + 1 - count
    while skipped > GAP_MEAN_MAX * count << shift:
        shift += 1
    down = _top_mask(steps)
    sizes = (steps ^ down) - (down + 1)  # ~step = -step - 1 if down, else step - 1
    fields = symbols.pack_fields(gaps, (down & 1).astype(np.uint32), shift)
    packed = symbols.pack(gaps >> np.uint32(shift), planes=False), symbols.pack(sizes, planes=True)
    return Streams(count, shift, fields.data, *packed)


def _class_table(thresholds: bytes) -> Bytes:
    """Key -> class: the number of thresholds at or below it."""
    return np.searchsorted(np.frombuffer(thresholds, np.uint8), np.arange(KEYS), side="right").astype(np.uint8)


def _keys(bits: Unsigned, kind: Kind) -> Bytes:
    """The exponent of floats in 8 bits: as it is, or for 11 bits the middle of its range; 0 for integers."""
    if not kind.mantissa:
        return np.zeros(bits.shape, np.uint8)
    exponents = bits >> kind.mantissa & (1 << 8 * kind.width - 1 - kind.mantissa) - 1
    if kind.width == 8:
        exponents = np.clip(exponents.view(np.int64) - 895, 0, KEYS - 1)
    return exponents.astype(np.uint8)


def _ordered(bits: Unsigned, kind: Kind) -> Unsigned:
    """Bits as integers in the order of the numbers they stand for; what is not a float stays as it is.

    Masks instead of `np.where` here and below: signs are coin flips, which cost a branch 5 times the arithmetic.
    """
    return bits ^ (_top_mask(bits) | _top(bits)) if kind.mantissa else bits


def _unordered(ordered: Unsigned, kind: Kind) -> Unsigned:
    """Inverse of `_ordered`."""
    return ordered ^ (~_top_mask(ordered) | _top(ordered)) if kind.mantissa else ordered


def _top(bits: Unsigned) -> np.unsignedinteger[Any]:
    """The highest bit of this width."""
    return bits.dtype.type(1 << 8 * bits.itemsize - 1)


def _top_mask(bits: Unsigned) -> Unsigned:
    """All ones where the highest bit is set, else 0."""
    return (bits.view(f"<i{bits.itemsize}") >> 8 * bits.itemsize - 1).view(bits.dtype)
