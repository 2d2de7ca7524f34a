"""Low-rank updates (LoRA): send the factors, and what the product of the factors does not hit exactly.

A merged adapter changes every element of a matrix, but all of the change is in two small factors: both sides compute
`W0 + scale * B A` in one fixed order of single roundings, which gives the same bits on every machine, and the
difference to the true tensor goes through another codec: a handful of steps per million elements, because trainers add
in an order of their own. W0 is the version before any adapter. Layout of factors:

    dtype u8 | rows, cols, rank varint | scale, float32 | A [rank, cols] | B [rows, rank]

The order: per element one float32 sum from zero over the rank, ascending, product and sum rounded by themselves; times
`scale`; plus W0; rounded to the tensor's dtype, half to even. NaNs all become the same quiet one.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .errors import MalformedRecord
from .kernels_types import Bytes
from .limits import KIB
from .types import DTYPE_BYTES
from .varint import Reader, varint

Floats = NDArray[np.float32]

DTYPES = ("BF16", "F16", "F32")  # of factors and of tensors; the place is the number on the wire
RANK_MAX = 256
STRIP_ELEMENTS = 64 * KIB  # of the product at a time: they stay in the cache while the rank is summed up
_NANS = {"BF16": 0x7FC0, "F16": 0x7E00, "F32": 0x7FC00000}


@dataclass(frozen=True, slots=True)
class Factors:
    """`a` [rank, cols] and `b` [rows, rank] as flat bytes of `dtype`, and the scale of their product."""

    a: Bytes
    b: Bytes
    dtype: str
    rows: int
    cols: int
    rank: int
    scale: float = 1.0

    def __post_init__(self) -> None:
        """Raises: ValueError for sizes, a dtype or a scale that can't be."""
        if self.dtype not in DTYPES or not 1 <= self.rank <= RANK_MAX or self.rows < 1 or self.cols < 1:
            raise ValueError(f"factors {self.dtype} of {self.rows} x {self.rank} x {self.cols}")
        width = DTYPE_BYTES[self.dtype]
        if self.a.size != self.rank * self.cols * width or self.b.size != self.rows * self.rank * width:
            raise ValueError(
                f"factors of {self.a.size} and {self.b.size} bytes, not {self.rows} x {self.rank} x {self.cols}"
            )
        if not math.isfinite(self.scale) or float(np.float32(self.scale)) != self.scale:
            raise ValueError(f"scale {self.scale} is no finite float32")

    def of_rows(self, first: int, last: int) -> Factors:
        """Those of the rows from `first` to before `last`."""
        row = self.rank * DTYPE_BYTES[self.dtype]
        return replace(self, b=self.b[first * row : last * row], rows=last - first)


def predict(base: Bytes, factors: Factors, *, dtype: str) -> Bytes:
    """`base + scale * B A`, flat bytes of `dtype`, the same bits on every machine. `base` [rows * cols] of `dtype`.

    Raises: ValueError for a base of another size or a dtype that is no float of 2 or 4 bytes.
    """
    if dtype not in DTYPES or base.size != factors.rows * factors.cols * DTYPE_BYTES[dtype]:
        raise ValueError(f"a base of {base.size} bytes {dtype} for {factors.rows} x {factors.cols}")
    a = _widened(factors.a, factors.dtype).reshape(factors.rank, factors.cols)
    b = _widened(factors.b, factors.dtype).reshape(factors.rows, factors.rank)
    out = np.empty(base.size, np.uint8)
    row_bytes = factors.cols * DTYPE_BYTES[dtype]
    rows = max(1, STRIP_ELEMENTS // factors.cols)
    with np.errstate(all="ignore"):  # infinities are values like others
        for first in range(0, factors.rows, rows):
            own = b[first : first + rows]
            total = np.zeros((own.shape[0], factors.cols), np.float32)
            product = np.empty_like(total)
            for k in range(factors.rank):  # no matmul: its order and its fused roundings differ between machines
                np.multiply(own[:, k : k + 1], a[k], out=product)
                np.add(total, product, out=total)
            total *= np.float32(factors.scale)
            part = slice(first * row_bytes, (first + own.shape[0]) * row_bytes)
            total += _widened(base[part], dtype).reshape(total.shape)
            out[part] = _narrowed(total.reshape(-1), dtype)
    return out


def pack_factors(factors: Factors) -> bytes:
    """See the layout above."""
    head = [bytes([DTYPES.index(factors.dtype)]), *map(varint, (factors.rows, factors.cols, factors.rank))]
    return b"".join([*head, struct.pack("<f", factors.scale), factors.a.tobytes(), factors.b.tobytes()])


def unpack_factors(reader: Reader, *, size_bytes: int, dtype: str) -> Factors:
    """Those of a matrix of `size_bytes` bytes of `dtype`. Raises: MalformedRecord."""
    number = reader.byte()
    if dtype not in DTYPES or number >= len(DTYPES):
        raise MalformedRecord(f"a lowrank block of {dtype} with factors of dtype {number}")
    rows, cols, rank = reader.varint(), reader.varint(), reader.varint()
    if rows * cols * DTYPE_BYTES[dtype] != size_bytes or rank > min(RANK_MAX, rows * cols):
        raise MalformedRecord(f"a lowrank block of {rows} x {rank} x {cols} for {size_bytes} bytes {dtype}")
    (scale,) = struct.unpack("<f", reader.take(4))
    width = DTYPE_BYTES[DTYPES[number]]
    a, b = (np.frombuffer(reader.take(size * rank * width), np.uint8) for size in (cols, rows))
    try:
        return Factors(a, b, DTYPES[number], rows, cols, rank, scale)
    except ValueError as error:
        raise MalformedRecord(f"a lowrank block: {error}") from None


def _widened(data: Bytes, dtype: str) -> Floats:
    """Flat bytes as float32, exactly."""
    if dtype == "BF16":
        return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return data.view("<f2" if dtype == "F16" else "<f4").astype(np.float32)


def _narrowed(values: Floats, dtype: str) -> Bytes:
    """float32 rounded half to even, as flat bytes."""
    if dtype == "BF16":
        bits = values.view(np.uint32)
        rounded: NDArray[np.uint16 | np.uint32] = (bits + (0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    elif dtype == "F16":
        rounded = values.astype(np.float16).view(np.uint16)
    else:
        rounded = values.view(np.uint32).copy()
    rounded[np.isnan(values)] = _NANS[dtype]  # payload and sign of a computed NaN depend on the machine
    return rounded.view(np.uint8)
