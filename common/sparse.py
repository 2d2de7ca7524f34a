"""The codec `sparse`: which elements of a block differ from the base, and by how much.

A training step flips an element when it crosses a rounding boundary, so the probability doubles with every exponent
down, and the receiver knows the base's exponents. Elements are put into classes by the exponent of the base, and each
class has its own list of changes: gaps (unchanged elements of the class before each change) whose low `shift` bits are
noise and go raw, and steps in units in the last place: floats are mapped to integers in their own order first, so that
+-1 ulp is +-1, whatever the sign and exponent. All arithmetic wraps at the element's width: every bit pattern survives.
Without thresholds there is one class, and the base is only looked at where it changes. Layout:

    number of thresholds u8 | thresholds u8, rising: class c has the keys from threshold c - 1 to below threshold c
    per class: count varint; where it is not 0: shift u8, flags u8 (see `_FLAGS`), the varints that the flags announce
    per class: fields | gap symbols, escapes, wide | step symbols, escapes, wide      (`kernels_types.Streams`)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from . import kernels, zstd
from .errors import MalformedRecord
from .kernels_types import (
    BLOCK_BYTES_MAX,
    CLASSES_MAX,
    KEYS,
    KINDS,
    NO_STREAMS,
    PLANES,
    SYMBOL_BITS,
    Bytes,
    Counts,
    Kind,
    Streams,
    Symbols,
)
from .limits import KIB
from .varint import Reader, varint

if TYPE_CHECKING:
    from typing_extensions import Buffer

SAMPLE_PIECES, SAMPLE_BYTES = 64, 4 * KIB  # the density check reads 256 KiB of a block
CLASSES_AIM = 16  # a class holds at least this part of the changes
CLASS_CHANGES_MIN = 1024  # and about this many: each has a header and code tables of its own
FRAME_BYTES_MIN = 24  # no frame of fewer bytes pays

# flags: bits 0-1 mode of the gaps, 2-3 mode of the steps, then which varints follow, in this order
_GAP_ESCAPES, _STEP_ESCAPES = 0x10, 0x20  # number of escapes, size of their frame (0: raw), number of wide values
_GAP_FRAME, _STEP_FRAME = 0x40, 0x80  # size of the frame that holds the symbols


class Sampled(NamedTuple):
    """Elements and changed elements by key [256], in spread samples of a block."""

    seen: Counts
    changed: Counts

    @property
    def share(self) -> float:
        """Of elements that changed."""
        return float(self.changed.sum()) / max(float(self.seen.sum()), 1)


def sampled(new: Bytes, base: Bytes, kind: Kind) -> Sampled:
    """Samples of `SAMPLE_PIECES` places; all of the block where it is small."""
    elements, piece = new.size // kind.width, SAMPLE_BYTES // kind.width
    if elements <= SAMPLE_PIECES * piece:
        return Sampled(*kernels.active().sample(new, base, kind, pieces=1, piece=elements, stride=0))
    stride = elements // SAMPLE_PIECES
    return Sampled(*kernels.active().sample(new, base, kind, pieces=SAMPLE_PIECES, piece=piece, stride=stride))


def thresholds_for(sample: Sampled, elements: int) -> bytes:
    """Where classes end: each holds about a sixteenth of the changes, what lies above the last ones is a class too."""
    total = int(sample.changed.sum())
    floor = CLASS_CHANGES_MIN * float(sample.seen.sum()) / max(elements, 1)
    quota = max(total / CLASSES_AIM, floor, 1.0)
    found, held = bytearray(), 0
    for key in np.flatnonzero(sample.changed).tolist():
        held += int(sample.changed[key])
        if held >= quota and key + 1 < KEYS and len(found) < CLASSES_MAX - 1:
            found.append(key + 1)
            held = 0
    if found and not sample.seen[found[-1] :].any():
        del found[-1]
    return bytes(found)


class Sparse:
    """The codec `sparse`. Needs the base."""

    id = 4
    name = "sparse"

    def encode(self, new: Bytes, base: Bytes | None, *, dtype: str) -> bytes | None:
        """The changes; None without a base."""
        kind = KINDS[dtype]
        if base is None or not 0 < new.size < BLOCK_BYTES_MAX:
            return None
        return self.encode_sampled(new, base, kind, sampled(new, base, kind), limit=new.size // kind.width)

    @staticmethod
    def encode_sampled(new: Bytes, base: Bytes, kind: Kind, sample: Sampled, *, limit: int) -> bytes | None:
        """The changes, in classes that `sample` suggests; None where more than `limit` elements changed."""
        elements = new.size // kind.width
        thresholds = thresholds_for(sample, elements)
        classes = kernels.active().extract(new, base, kind, thresholds, limit)
        return None if classes is None else _join(thresholds, classes)

    def decode(self, encoded: Buffer, out: Bytes, base: Bytes | None, *, dtype: str) -> None:
        """Fills `out` from `base` and the changes; `out` may be `base`. Raises: MalformedRecord, LimitExceeded."""
        kind = KINDS[dtype]
        if base is None or base.size != out.size:
            raise MalformedRecord("a sparse block without a base of its size")
        if out.size % kind.width or out.size >= BLOCK_BYTES_MAX:
            raise MalformedRecord(f"a block of {out.size} bytes can't be sparse {dtype}")
        thresholds, classes = _take_apart(memoryview(encoded).cast("B"), out.size // kind.width, kind.width)
        kernels.active().apply(out, base, kind, thresholds, classes)


def is_unchanged(encoded: bytes) -> bool:
    """Whether a block that `encode` wrote holds no change."""
    return not any(encoded[1 + encoded[0] :])


def _join(thresholds: bytes, classes: list[Streams]) -> bytes:
    head: list[bytes | memoryview] = [bytes([len(thresholds)]), thresholds]
    body: list[bytes | memoryview] = []
    for count, shift, fields, gaps, steps in classes:
        head.append(varint(count))
        if count == 0:
            continue
        body.append(fields)
        flags, sizes = gaps[0] | steps[0] << 2, b""
        frame_sizes = b""
        for (_, packed, escapes, wide), has_escapes, has_frame in (
            (gaps, _GAP_ESCAPES, _GAP_FRAME),
            (steps, _STEP_ESCAPES, _STEP_FRAME),
        ):
            part, frame_size = _squeezed(packed)
            body.append(part)
            if frame_size:
                flags |= has_frame
                frame_sizes += varint(frame_size)
            escape_count = memoryview(escapes).nbytes
            if escape_count:
                flags |= has_escapes
                part, frame_size = _squeezed(escapes)
                sizes += varint(escape_count) + varint(frame_size) + varint(memoryview(wide).nbytes)
                body += [part, wide]
        head += [bytes([shift, flags]), sizes, frame_sizes]
    return b"".join(head + body)


def _squeezed(data: bytes | memoryview) -> tuple[bytes | memoryview, int]:
    """`data` as a frame and the frame's size, or as it is and 0."""
    size = memoryview(data).nbytes
    if size < FRAME_BYTES_MIN:
        return data, 0
    frame = zstd.compress_skewed(data)
    return (frame, len(frame)) if len(frame) < size else (data, 0)


class _Sizes(NamedTuple):
    """One stream of symbols in the header: bytes, and 0 for a frame that there is not."""

    mode: int
    escapes: int
    escape_frame: int
    wide: int
    frame: int


def _take_apart(view: memoryview, elements: int, width: int) -> tuple[bytes, list[Streams]]:
    """Thresholds and streams, frames opened: every count and size is checked before anything is allocated for it."""
    reader = Reader(view, "sparse")
    number = reader.byte()
    if number >= CLASSES_MAX:
        raise MalformedRecord(f"a sparse block with {number} thresholds")
    thresholds = bytes(reader.take(number))
    if any(now <= before for before, now in zip(b"\0" + thresholds, thresholds, strict=False)):
        raise MalformedRecord("a sparse block whose thresholds do not rise")
    heads: list[tuple[int, int, _Sizes, _Sizes] | None] = []
    left = elements
    for _ in range(number + 1):
        count = reader.varint()
        if count > left:
            raise MalformedRecord(f"a sparse block with {elements - left + count} changes of {elements} elements")
        left -= count
        heads.append(_head(reader, count) if count else None)
    classes = []
    for head in heads:
        if head is None:
            classes.append(NO_STREAMS)
            continue
        count, shift, gaps, steps = head
        fields = reader.take(-(-count * (shift + 1) // 8))
        classes.append(
            Streams(count, shift, fields, _symbols(reader, gaps, count, 0), _symbols(reader, steps, count, width))
        )
    reader.finish()
    return thresholds, classes


def _head(reader: Reader, count: int) -> tuple[int, int, _Sizes, _Sizes]:
    shift, flags = reader.byte(), reader.byte()
    if shift > 31 or flags & 3 == PLANES:
        raise MalformedRecord(f"a sparse block with shift {shift}, flags {flags:#x}")
    escapes = [
        (reader.varint(), reader.varint(), reader.varint()) if flags & has else (0, 0, 0)
        for has in (_GAP_ESCAPES, _STEP_ESCAPES)
    ]
    if any(number > count for number, _, _ in escapes):
        raise MalformedRecord(f"a sparse block with more escapes than its {count} changes")
    frames = [reader.varint() if flags & has else 0 for has in (_GAP_FRAME, _STEP_FRAME)]
    gaps, steps = (_Sizes(flags >> 2 * n & 3, *escapes[n], frames[n]) for n in (0, 1))
    return count, shift, gaps, steps


def _symbols(reader: Reader, sizes: _Sizes, count: int, width: int) -> Symbols:
    packed = count * width if sizes.mode == PLANES else -(-count * SYMBOL_BITS[sizes.mode] // 8)
    return Symbols(
        sizes.mode,
        _opened(reader, sizes.frame, packed),
        _opened(reader, sizes.escape_frame, sizes.escapes),
        reader.take(sizes.wide),
    )


def _opened(reader: Reader, frame: int, size: int) -> bytes | memoryview:
    """`size` bytes: the content of a frame of `frame` bytes, or raw where that is 0."""
    part = reader.take(frame or size)
    return zstd.decompress(part, size_bytes=size) if frame else part
