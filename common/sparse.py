"""The codec `sparse`: which elements of a block differ from the base, and by how much.

Positions are gaps (unchanged elements before each changed one). A gap is split: its low `shift` bits are noise and go
raw, the rest fits a byte almost always and goes through zstd-1. Values are differences in units in the last place:
floats are mapped to integers in their own order first, so that +-1 ulp is +-1, whatever the sign and exponent; other
dtypes are integers already. All arithmetic wraps at the element's width, so every bit pattern survives. Layout:

    count varint; nothing more when it is 0
    shift u8 | varints: gap escapes, step escapes, size of the gap frame, size of the step frame (0: raw, `count` bytes)
    sign bit of each step | `shift` bit planes of the gaps, lowest first              (each plane ceil(count / 8) bytes)
    escaped gaps >> shift, u32 each | escaped |step| - 1, one element's width each
    gaps >> shift, u8 each, 255: escaped | |step| - 1, u8 each, 255: escaped                   (frames, or raw)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import zstd
from .errors import MalformedRecord
from .limits import KIB
from .types import DTYPE_BYTES

if TYPE_CHECKING:
    from typing_extensions import Buffer

Bytes = NDArray[np.uint8]
Unsigned = NDArray[np.unsignedinteger[Any]]
Positions = NDArray[np.int64]

BLOCK_BYTES_MAX = 1 << 31  # positions fit u32, and sums of gaps below it fit int64
SHARE_MAX = 0.5  # of elements changed; beyond that the numpy form costs more time and memory than it saves
SAMPLE_PIECES, SAMPLE_BYTES = 64, 4 * KIB  # the density check reads 256 KiB of a block
GAP_MEAN_MAX = 16  # mean of gap >> shift: 8 to 16 leaves no escapes, and cost least on real RL steps among 16 to 100
ESCAPE = 255

# two 4-byte floats per C64 element: closer to what changes than one 8-byte integer
_WIDTHS = DTYPE_BYTES | {"C64": 4}
_FLOATS = frozenset({"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F16", "BF16", "F32", "F64", "C64"})


class Sparse:
    """The codec `sparse`. Needs the base."""

    id = 2
    name = "sparse"

    def encode(self, new: Bytes, base: Bytes | None, *, dtype: str) -> bytes | None:
        """The changes, or None without a base or where too much changed."""
        if base is None or not 0 < new.size < BLOCK_BYTES_MAX:
            return None
        width = _WIDTHS[dtype]
        if sampled_share(new, base, width) > SHARE_MAX:
            return None
        found = changes(new, base, width, limit=int(SHARE_MAX * (new.size // width)))
        if found is None:
            return None
        positions, after, before = found
        count = positions.size
        if count == 0:
            return b"\0"
        gaps = (np.diff(positions, prepend=-1) - 1).astype(np.uint32)
        shift = _shift(int(positions[-1]) + 1 - count, count)
        signs, steps = _steps(after, before, dtype)
        gap_bytes, gap_escapes = _narrow(gaps >> np.uint32(shift))
        step_bytes, step_escapes = _narrow(steps)
        gap_frame, step_frame = _frame(gap_bytes), _frame(step_bytes)
        sizes = (gap_escapes.size, step_escapes.size, len(gap_frame), len(step_frame))
        planes = [signs, *((gaps >> bit & 1).astype(np.uint8) for bit in range(shift))]
        return b"".join(
            (
                _varint(count), bytes([shift]), *map(_varint, sizes),
                *(np.packbits(plane, bitorder="little").data for plane in planes),
                gap_escapes.data, step_escapes.data, gap_frame or gap_bytes.data, step_frame or step_bytes.data,
            )
        )  # fmt: skip

    def decode(self, encoded: Buffer, out: Bytes, base: Bytes | None, *, dtype: str) -> None:
        """Fills `out` from `base` and the changes; `out` may be `base`. Raises: MalformedRecord, LimitExceeded."""
        width = _WIDTHS[dtype]
        if base is None or base.size != out.size:
            raise MalformedRecord("a sparse block without a base of its size")
        if out.size % width or out.size >= BLOCK_BYTES_MAX:
            raise MalformedRecord(f"a block of {out.size} bytes can't be sparse {dtype}")
        reader = _Reader(memoryview(encoded).cast("B"))
        elements = out.size // width
        count = reader.varint()
        if count > elements:
            raise MalformedRecord(f"a sparse block with {count} changes of {elements} elements")
        if count == 0:
            reader.finish()
            out[:] = base
            return
        shift = reader.take(1)[0]
        if shift > 31:
            raise MalformedRecord(f"a sparse block with shift {shift}")
        sizes = [reader.varint() for _ in range(4)]
        signs = _bits(reader, count)
        gaps = np.zeros(count, np.uint32)
        for bit in range(shift):
            gaps |= _bits(reader, count).astype(np.uint32) << bit
        gap_escapes = np.frombuffer(reader.take(4 * sizes[0]), "<u4")
        step_escapes = np.frombuffer(reader.take(width * sizes[1]), f"<u{width}")
        gap_bytes = _open(reader, sizes[2], count)
        step_bytes = _open(reader, sizes[3], count)
        reader.finish()
        high = _widen(gap_bytes, gap_escapes, np.dtype(np.uint32))
        if int(high.max()) > elements >> shift:  # so that the shift below loses no bits
            raise MalformedRecord("a sparse block changes elements beyond its end")
        gaps |= high << np.uint32(shift)
        if int(gaps.sum(dtype=np.int64)) + count > elements:  # both below 2**32: no overflow
            raise MalformedRecord("a sparse block changes elements beyond its end")
        positions = np.cumsum(gaps, dtype=np.int64) + np.arange(count)
        steps = _widen(step_bytes, step_escapes, np.dtype(f"<u{width}"))
        out[:] = base
        target = out.view(f"<u{width}")
        target[positions] = _step(target.take(positions), signs, steps, dtype)


def sampled_share(new: Bytes, base: Bytes, width: int) -> float:
    """Share of changed elements in spread samples of a block; all of it where it is small."""
    stride = new.size // SAMPLE_PIECES // 8 * 8
    if stride > SAMPLE_BYTES:
        end, shape = stride * SAMPLE_PIECES, (SAMPLE_PIECES, stride)
        new, base = (block[:end].reshape(shape)[:, :SAMPLE_BYTES] for block in (new, base))
    return float(np.count_nonzero(new.view(f"<u{width}") != base.view(f"<u{width}"))) / (new.size // width)


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
    if inside.size > limit:
        return None
    positions = (words.take(inside >> log_items) << log_items) + (inside & (1 << log_items) - 1)
    after, before = after.take(inside), before.take(inside)
    if whole < new.size:
        new_rest, base_rest = new[whole:].view(kind), base[whole:].view(kind)
        inside = np.flatnonzero(new_rest != base_rest)
        positions = np.concatenate((positions, inside + whole // width))
        after = np.concatenate((after, new_rest[inside]))
        before = np.concatenate((before, base_rest[inside]))
    return positions, after, before


def _shift(skipped: int, count: int) -> int:
    """The smallest shift that brings the mean gap down to `GAP_MEAN_MAX`."""
    shift = 0
    while skipped > GAP_MEAN_MAX * count << shift:
        shift += 1
    return shift


def _ordered(bits: Unsigned, dtype: str) -> Unsigned:
    """Bits as integers in the order of the numbers they stand for; what is not a float stays as it is.

    Masks instead of `np.where` here and below: signs are coin flips, which cost a branch 5 times the arithmetic.
    """
    return bits ^ (_top_mask(bits) | _top(bits)) if dtype in _FLOATS else bits


def _unordered(ordered: Unsigned, dtype: str) -> Unsigned:
    """Inverse of `_ordered`."""
    return ordered ^ (~_top_mask(ordered) | _top(ordered)) if dtype in _FLOATS else ordered


def _steps(after: Unsigned, before: Unsigned, dtype: str) -> tuple[Bytes, Unsigned]:
    """Sign (1: down) and |step| - 1 from `before` to `after`, which differ everywhere."""
    step = _ordered(after, dtype) - _ordered(before, dtype)
    down = _top_mask(step)
    return (down & 1).astype(np.uint8), (step ^ down) - (down + 1)  # ~step = -step - 1 if down, else step - 1


def _step(before: Unsigned, down: Bytes, steps: Unsigned, dtype: str) -> Unsigned:
    """Inverse of `_steps`: the new bits."""
    mask = -down.astype(steps.dtype)
    return _unordered(_ordered(before, dtype) + ((steps + (mask + 1)) ^ mask), dtype)


def _top(bits: Unsigned) -> np.unsignedinteger[Any]:
    """The highest bit of this width."""
    return bits.dtype.type(1 << 8 * bits.itemsize - 1)


def _top_mask(bits: Unsigned) -> Unsigned:
    """All ones where the highest bit is set, else 0."""
    return (bits.view(f"<i{bits.itemsize}") >> 8 * bits.itemsize - 1).view(bits.dtype)


def _narrow(values: Unsigned) -> tuple[Bytes, Unsigned]:
    """Values as bytes, and those that do not fit."""
    return np.minimum(values, ESCAPE).astype(np.uint8), values[values >= ESCAPE]


def _widen(narrow: Bytes, escapes: Unsigned, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Inverse of `_narrow`. Raises: MalformedRecord where the number of escapes is wrong."""
    values = narrow.astype(dtype)
    escaped = np.flatnonzero(narrow == ESCAPE)
    if escaped.size != escapes.size:
        raise MalformedRecord(f"a sparse block with {escaped.size} escapes and {escapes.size} values for them")
    values[escaped] = escapes
    return values


def _frame(data: Bytes) -> bytes:
    """`data` as a frame, empty where that does not pay."""
    frame = zstd.compress(data.data)
    return frame if len(frame) < data.size else b""


def _open(reader: _Reader, frame_bytes: int, count: int) -> Bytes:
    """`count` bytes: the content of a frame, or raw where `frame_bytes` is 0."""
    part = reader.take(frame_bytes or count)
    return np.frombuffer(zstd.decompress(part, size_bytes=count) if frame_bytes else part, np.uint8)


def _bits(reader: _Reader, count: int) -> Bytes:
    packed = np.frombuffer(reader.take(-(-count // 8)), np.uint8)
    return np.unpackbits(packed, count=count, bitorder="little")


def _varint(value: int) -> bytes:
    """LEB128."""
    data = bytearray()
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    data.append(value)
    return bytes(data)


class _Reader:
    """Takes an encoded block apart from front to back, never beyond its end."""

    def __init__(self, rest: memoryview):
        self._rest = rest

    def take(self, size: int) -> memoryview:
        if size > len(self._rest):
            raise MalformedRecord(f"a sparse block ends {size - len(self._rest)} bytes early")
        taken, self._rest = self._rest[:size], self._rest[size:]
        return taken

    def varint(self) -> int:
        value = 0
        for shift in range(0, 35, 7):
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise MalformedRecord("a sparse block with an endless number")

    def finish(self) -> None:
        if len(self._rest):
            raise MalformedRecord(f"a sparse block with {len(self._rest)} bytes too many")
