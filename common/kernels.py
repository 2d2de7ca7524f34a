"""The kernels that run: in C for the best instruction set of this machine where they were built, else in numpy.

    numpy    kernels_numpy.py, the reference
    c-scalar, c-avx2, c-avx512    _kernels.c, built at install where a compiler is at hand

All give the same bytes. `use` forces one; the choice is the process's, not the thread's.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .kernels_numpy import NumpyKernels
from .kernels_types import STEPPED, Bytes, Counts, Data, Kernels, Kind, Streams, Symbols, refused

_c: Any
try:
    from . import _kernels as _c  # type: ignore[attr-defined,no-redef,unused-ignore]
except ImportError:  # installed without a compiler
    _c = None


class CKernels:
    """The kernels in C for one instruction set. The interpreter lock is free while they run."""

    def __init__(self, level: int, name: str):
        self._level, self.name = level, name

    def first_difference(self, new: Data, base: Data) -> int:
        found: int = _c.first_difference(new, base)
        return found

    def sample(
        self, new: Bytes, base: Bytes, kind: Kind, *, pieces: int, piece: int, stride: int
    ) -> tuple[Counts, Counts]:
        counts = np.frombuffer(_c.sample(self._level, new, base, kind.number, pieces, piece, stride), np.uint32)
        return counts[:256], counts[256:]

    def extract(self, new: Bytes, base: Bytes, kind: Kind, thresholds: bytes, limit: int) -> list[Streams] | None:
        found = _c.extract(self._level, new, base, kind.number, thresholds, limit)
        if found is None:
            return None
        return [
            Streams(changes, shift, fields, Symbols(*gaps), Symbols(*steps))
            for changes, shift, fields, gaps, steps in found
        ]

    def apply(self, out: Bytes, base: Bytes, kind: Kind, thresholds: bytes, classes: list[Streams]) -> None:
        reason = _c.apply(self._level, out, base, kind.number, thresholds, classes)
        if reason:
            raise refused(reason)

    def to_planes(self, new: Bytes, base: Bytes | None, kind: Kind, how: int) -> Bytes:
        assert base is not None or how != STEPPED
        planes = np.empty(new.size, np.uint8)
        _c.to_planes(self._level, new, new if base is None else base, planes, how, kind.number)
        return planes.reshape(kind.width, -1)

    def from_planes(self, planes: list[Bytes], base: Bytes | None, out: Bytes, kind: Kind, how: int) -> None:
        assert base is not None or how != STEPPED
        _c.from_planes(self._level, planes, out if base is None else base, out, how, kind.number)

    def leaves(self, data: Data) -> bytes:
        digests: bytes = _c.leaves(self._level, data)
        return digests


_known: dict[str, Kernels] = {"numpy": NumpyKernels()}
if _c is not None:
    _known.update((name, CKernels(level, name)) for level, name in enumerate(_c.levels()))
_active: Kernels = _known[next(reversed(_known))]


def available() -> list[str]:
    """The kernels that this machine runs, slowest first."""
    return list(_known)


def active() -> Kernels:
    """The kernels in use: the fastest, unless `use` chose others."""
    return _active


def use(name: str) -> str:
    """Use the kernels `name` from now on, in all threads; returns the name of those used before.

    Raises: KeyError for kernels that this machine does not run.
    """
    global _active
    before, _active = _active.name, _known[name]
    return before


def changed(new: Data, base: Data) -> bool:
    """Whether two buffers differ in any bit or in size; ends at the first difference. Floats compare as bits."""
    return _active.first_difference(new, base) >= 0


def leaves(data: Data) -> bytes:
    """XXH3-128 of each 64 KiB of `data`, 16 bytes each, one after the other.

    Raises: ValueError where the size of `data` is no multiple of 64 KiB.
    """
    return _active.leaves(data)
