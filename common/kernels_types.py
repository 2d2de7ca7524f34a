"""What kernels take and give: dtypes as numbers, streams of changes, and the reasons why bytes are refused."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from .errors import MalformedRecord
from .limits import KIB
from .types import DTYPE_BYTES

Bytes = NDArray[np.uint8]
Unsigned = NDArray[np.unsignedinteger[Any]]
Counts = NDArray[np.uint32]
Data = bytes | memoryview | NDArray[Any]

CLASSES_MAX = 16
KEYS = 256
LEAF_BYTES = 64 * KIB  # of a tensor's digest
BLOCK_BYTES_MAX = 1 << 31  # positions fit u32, and sums of gaps below it fit int64

#: symbol mode -> bits of a symbol; PLANES stands for the numbers' byte planes
SYMBOL_BITS = (2, 4, 8)
PLANES = 3

#: transforms before elements are taken apart into byte planes
PLAIN, ROTATED, STEPPED = 0, 1, 2

# Mantissa bits of the float dtypes. E8M0 has no sign and no mantissa: its bits are an integer already.
_MANTISSAS = {
    "F8_E4M3": 3, "F8_E4M3FNUZ": 3, "F8_E5M2": 2, "F8_E5M2FNUZ": 2, "F16": 10, "BF16": 7, "F32": 23, "F64": 52,
    "C64": 23,
}  # fmt: skip
# two 4-byte floats per C64 element: closer to what changes than one 8-byte integer
_WIDTHS = DTYPE_BYTES | {"C64": 4}


class Kind(NamedTuple):
    """A dtype as kernels see it: bytes of an element and mantissa bits; 0 for what is no float."""

    width: int
    mantissa: int

    @property
    def number(self) -> int:
        """The same in one integer, for C."""
        return self.width | self.mantissa << 8


KINDS = {dtype: Kind(width, _MANTISSAS.get(dtype, 0)) for dtype, width in _WIDTHS.items()}


class Symbols(NamedTuple):
    """Numbers as packed symbols of `SYMBOL_BITS[mode]` bits, lowest bits first.

    A symbol of all ones is an escape: the next byte of `escapes` is added to it; 255 there: the next value of `wide`
    (the number's width, little endian) is the number. Mode PLANES: `packed` holds byte planes, the rest is empty.
    """

    mode: int
    packed: bytes | memoryview
    escapes: bytes | memoryview
    wide: bytes | memoryview


class Streams(NamedTuple):
    """The changes of one class. `fields`: low `shift` bits of the gap, then the step's sign (1: down), per change.

    `gaps`: gap >> shift (4 bytes wide), a gap being the unchanged elements of the class before the change.
    `steps`: |step| - 1 in units in the last place, as wide as the element.
    """

    changes: int
    shift: int
    fields: bytes | memoryview
    gaps: Symbols
    steps: Symbols


NO_SYMBOLS = Symbols(0, b"", b"", b"")
NO_STREAMS = Streams(0, 0, b"", NO_SYMBOLS, NO_SYMBOLS)

WRONG_SIZES, WRONG_ESCAPES, BEYOND_END = 2, 3, 4
_REFUSALS = {
    WRONG_SIZES: "a sparse block whose streams have other sizes than its counts say",
    WRONG_ESCAPES: "a sparse block with another number of escapes than of values for them",
    BEYOND_END: "a sparse block changes elements beyond its end",
}


def refused(reason: int) -> MalformedRecord:
    """The error for a kernel's refusal."""
    return MalformedRecord(_REFUSALS.get(reason, f"a damaged sparse block ({reason})"))


class Kernels(Protocol):
    """What the codecs need done fast. Blocks are flat uint8 arrays, maybe unaligned; all forms give the same bytes."""

    name: str

    def first_difference(self, new: Data, base: Data) -> int:
        """Index of the first byte that differs or that only one of them has; -1: none."""

    def sample(
        self, new: Bytes, base: Bytes, kind: Kind, *, pieces: int, piece: int, stride: int
    ) -> tuple[Counts, Counts]:
        """Elements and changed elements per key [256], in `pieces` pieces of `piece` elements, `stride` apart."""

    def extract(self, new: Bytes, base: Bytes, kind: Kind, thresholds: bytes, limit: int) -> list[Streams] | None:
        """The changes by class, `len(thresholds) + 1` of them; None where more than `limit` elements changed."""

    def apply(self, out: Bytes, base: Bytes, kind: Kind, thresholds: bytes, classes: list[Streams]) -> None:
        """Fills `out` (may be `base`) from `base` and the changes. Raises: MalformedRecord for any that do not fit."""

    def to_planes(self, new: Bytes, base: Bytes | None, kind: Kind, how: int) -> Bytes:
        """[width, elements]: byte k of every transformed element. STEPPED needs `base`."""

    def from_planes(self, planes: list[Bytes], base: Bytes | None, out: Bytes, kind: Kind, how: int) -> None:
        """Inverse of `to_planes`: `width` planes of one byte per element; `out` may be `base`."""

    def leaves(self, data: Data) -> bytes:
        """XXH3-128 (seed 0, canonical form) of each LEAF_BYTES of `data`. Raises: ValueError where a part is left."""
