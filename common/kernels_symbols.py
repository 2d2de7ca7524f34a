"""Numbers <-> packed symbols with escapes, in numpy: the entropy coder's input (see `kernels_types.Symbols`).

Huffman codes spend at least one bit a symbol. Most steps are +-1 and cost less than that when several of them share a
byte; larger numbers fill a byte by themselves.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .kernels_types import (
    BEYOND_END,
    PLANES,
    SYMBOL_BITS,
    WRONG_ESCAPES,
    WRONG_SIZES,
    Bytes,
    Streams,
    Symbols,
    Unsigned,
    refused,
)

ESCAPE = 255


def pack(numbers: Unsigned, *, planes: bool) -> Symbols:
    """`numbers` in the fewest bits that leave few escapes; `planes`: large ones may go as byte planes."""
    mode = _mode(numbers)
    if mode == PLANES and planes:
        return Symbols(PLANES, _contiguous(numbers.view(np.uint8).reshape(-1, numbers.itemsize).T).data, b"", b"")
    mode = min(mode, 2)
    bits = SYMBOL_BITS[mode]
    escape, per = (1 << bits) - 1, 8 // bits
    narrow = np.zeros(-(-numbers.size // per) * per, np.uint8)
    narrow[: numbers.size] = np.minimum(numbers, escape)
    packed = np.bitwise_or.reduce(narrow.reshape(-1, per) << np.arange(0, 8, bits, dtype=np.uint8), axis=1)
    escaped = numbers[numbers >= escape]
    rest = escaped - numbers.dtype.type(escape)
    narrow = np.minimum(rest, ESCAPE).astype(np.uint8)
    return Symbols(mode, packed.data, narrow.data, escaped[rest >= ESCAPE].data)


def _mode(numbers: Unsigned) -> int:
    count = numbers.size
    if 8 * np.count_nonzero(numbers >= 3) <= count:
        return 0
    if 64 * np.count_nonzero(numbers >= 15) <= count:
        return 1
    return 2 if 8 * np.count_nonzero(numbers >= ESCAPE) <= count else PLANES


def unpack(symbols: Symbols, count: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Inverse of `pack`; sizes are checked already. Raises: MalformedRecord for a wrong number of escapes."""
    packed = np.frombuffer(symbols.packed, np.uint8)
    if symbols.mode == PLANES:
        return _contiguous(packed.reshape(dtype.itemsize, count).T).view(dtype)
    bits = SYMBOL_BITS[symbols.mode]
    escape = (1 << bits) - 1
    narrow = (packed[:, None] >> np.arange(0, 8, bits, dtype=np.uint8) & np.uint8(escape)).reshape(-1)[:count]
    numbers = narrow.astype(dtype)
    escapes = np.frombuffer(symbols.escapes, np.uint8)
    escaped, wider = np.flatnonzero(narrow == escape), np.flatnonzero(escapes == ESCAPE)
    if escaped.size != escapes.size or wider.size * dtype.itemsize != memoryview(symbols.wide).nbytes:
        raise refused(WRONG_ESCAPES)
    numbers[escaped] += escapes
    numbers[escaped[wider]] = np.frombuffer(symbols.wide, dtype)
    return numbers


def pack_fields(gaps: NDArray[np.uint32], down: NDArray[np.uint32], shift: int) -> Bytes:
    """Per change the low `shift` bits of its gap, then its sign: `shift + 1` bits, lowest first."""
    low = gaps & np.uint32((1 << shift) - 1) | down << np.uint32(shift)
    return np.packbits((low[:, None] >> np.arange(shift + 1, dtype=np.uint32) & 1).astype(np.uint8), bitorder="little")


def _fields(streams: Streams) -> Bytes:
    """[count, shift + 1] bits."""
    bits = streams.changes * (streams.shift + 1)
    packed = np.frombuffer(streams.fields, np.uint8)
    return np.unpackbits(packed, count=bits, bitorder="little").reshape(streams.changes, streams.shift + 1)


def unpack_gaps(streams: Streams, elements: int) -> NDArray[np.int64]:
    """The gaps of a class. Raises: MalformedRecord for one that reaches beyond `elements`."""
    gaps = unpack(streams.gaps, streams.changes, np.dtype("<u4")).astype(np.int64)
    if int(gaps.max()) > elements >> streams.shift:  # so that the shift below loses no bits
        raise refused(BEYOND_END)
    gaps <<= streams.shift
    fields = _fields(streams)
    for bit in range(streams.shift):
        gaps |= fields[:, bit].astype(np.int64) << bit
    if int(gaps.sum()) + streams.changes > elements:  # all below 2**32: no overflow
        raise refused(BEYOND_END)
    return gaps


def unpack_steps(streams: Streams, width: int) -> Unsigned:
    """The wrapped steps of a class."""
    sizes: Unsigned = unpack(streams.steps, streams.changes, np.dtype(f"<u{width}"))
    down = -_fields(streams)[:, streams.shift].astype(sizes.dtype)
    return (sizes + (down + 1)) ^ down


def check_sizes(streams: Streams, elements: int, width: int) -> None:
    """Raises: MalformedRecord where a stream has another size than the class's counts say."""
    count, shift = streams.changes, streams.shift
    if not 0 <= count <= elements or shift > 31:
        raise refused(WRONG_SIZES)
    if count == 0:
        return
    fits = _size(streams.fields) == -(-count * (shift + 1) // 8)
    for stream, item, planes in ((streams.gaps, 4, False), (streams.steps, width, True)):
        if stream.mode == PLANES:
            fits &= planes and _size(stream.packed) == item * count and not _size(stream.escapes) + _size(stream.wide)
        else:
            fits &= stream.mode < PLANES and _size(stream.packed) == -(-count * SYMBOL_BITS[min(stream.mode, 2)] // 8)
    if not fits:
        raise refused(WRONG_SIZES)


def _size(buffer: Any) -> int:
    return memoryview(buffer).nbytes


def _contiguous(planes: NDArray[np.uint8]) -> Bytes:
    return np.ascontiguousarray(planes).reshape(-1)
