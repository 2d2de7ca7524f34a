"""zstd in two forms: frames that are safe to open, and the codec `zstd`, which compresses the byte planes of a block.

Plane k of a block holds byte k of every element. Exponents compress well and mantissas hardly at all, so each plane
is a zstd-1 frame where that pays and raw bytes where it does not. Layout:

    mask u8 (bit k: plane k is a frame) | u32 size of each frame | planes 0, 1, ... in order
"""

from __future__ import annotations

import struct
import threading
from typing import TYPE_CHECKING

import numpy as np
import zstandard
from numpy.typing import NDArray

from .errors import LimitExceeded, MalformedRecord
from .limits import KIB
from .types import DTYPE_BYTES

if TYPE_CHECKING:
    from typing_extensions import Buffer

Bytes = NDArray[np.uint8]

FRAME_BYTES_MAX = 1 << 32  # their sizes are u32
PROBE_BYTES = 64 * KIB  # of each plane: enough for the ratio to within about a percent, 0.1 ms at zstd-1's speed
PROBE_PIECES = 16  # spread over the block: layers' statistics differ along a tensor
PAYS = 0.97  # a plane that shrinks less costs more time on both sides than its bytes cost on the wire
STRIP_ELEMENTS = 64 * KIB  # planes are merged strip by strip, so that the output stays in the cache between planes


class _Tools(threading.local):
    """One compressor and one decompressor per thread: creating one costs more than a small frame, sharing is unsafe."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=1, write_content_size=True)
        self.decompressor = zstandard.ZstdDecompressor()


_tools = _Tools()


def compress(data: bytes | memoryview) -> bytes:
    """One zstd-1 frame that declares its content size."""
    return _tools.compressor.compress(data)


def decompress(frame: bytes | memoryview, *, size_bytes: int) -> bytes:
    """The content of exactly one frame, which must declare and hold exactly `size_bytes`.

    The declared size is checked before anything is decompressed: `max_output_size` is ignored for frames that declare
    one, and a few kilobytes can declare and hold gigabytes.
    Raises: LimitExceeded for a larger declared size, MalformedRecord for anything else that is not such a frame.
    """
    try:
        declared = zstandard.frame_content_size(frame)
    except zstandard.ZstdError as error:
        raise MalformedRecord(f"not a zstd frame: {error}") from None
    if declared > size_bytes:
        raise LimitExceeded(f"a zstd frame declares {declared} bytes where {size_bytes} belong")
    if declared != size_bytes:
        found = f"{declared} bytes" if declared >= 0 else "no size"
        raise MalformedRecord(f"a zstd frame declares {found} where {size_bytes} bytes belong")
    try:
        return _tools.decompressor.decompress(frame, allow_extra_data=False)  # also refuses what the header lied about
    except zstandard.ZstdError as error:
        raise MalformedRecord(f"damaged zstd frame: {error}") from None


class Zstd:
    """The codec `zstd`. Needs no base."""

    id = 1
    name = "zstd"

    def encode(self, new: Bytes, base: Bytes | None, *, dtype: str) -> bytes | None:  # noqa: ARG002
        """The block's planes, or None where no plane pays."""
        if not 0 < new.size < FRAME_BYTES_MAX:
            return None
        elements = new.reshape(-1, DTYPE_BYTES[dtype])
        ratios = _probe(elements)
        if min(ratios) > PAYS:
            return None  # before any plane is taken out of the block
        mask, frame_sizes = 0, b""
        parts: list[bytes | memoryview] = []
        for number, ratio in enumerate(ratios):
            plane = np.ascontiguousarray(elements[:, number])
            frame = compress(plane.data) if ratio <= PAYS else b""
            if frame and len(frame) + 4 <= PAYS * plane.size:
                mask |= 1 << number
                frame_sizes += struct.pack("<I", len(frame))
                parts.append(frame)
            else:
                parts.append(plane.data)
        return b"".join((bytes([mask]), frame_sizes, *parts)) if mask else None

    def decode(self, encoded: Buffer, out: Bytes, base: Bytes | None, *, dtype: str) -> None:  # noqa: ARG002
        """Fills `out`. Raises: MalformedRecord, LimitExceeded."""
        width = DTYPE_BYTES[dtype]
        if out.size % width:
            raise MalformedRecord(f"a block of {out.size} bytes can't hold {dtype} elements")
        elements, view = out.reshape(-1, width), memoryview(encoded).cast("B")
        count = elements.shape[0]
        mask = view[0] if len(view) else 0
        if mask >> width:
            raise MalformedRecord(f"a zstd block of {dtype} with plane mask {mask:#x}")
        start = 1 + 4 * mask.bit_count()
        if len(view) < start:
            raise MalformedRecord("a zstd block ends inside its header")
        frame_sizes = iter(struct.unpack(f"<{mask.bit_count()}I", view[1:start]))
        sizes = [next(frame_sizes) if mask >> number & 1 else count for number in range(width)]
        if start + sum(sizes) != len(view):
            raise MalformedRecord(f"a zstd block of {len(view)} bytes whose header says {start + sum(sizes)}")
        planes = []
        for number, size in enumerate(sizes):
            part = view[start : start + size]
            planes.append(np.frombuffer(decompress(part, size_bytes=count) if mask >> number & 1 else part, np.uint8))
            start += size
        for first in range(0, count, STRIP_ELEMENTS):
            strip = slice(first, first + STRIP_ELEMENTS)
            for number, plane in enumerate(planes):
                elements[strip, number] = plane[strip]


def estimate_bytes(new: Bytes, *, dtype: str) -> int:
    """About how many bytes the codec `zstd` makes of a block, from a probe of it; at most its size."""
    elements = new.reshape(-1, DTYPE_BYTES[dtype])
    return int(sum(min(ratio, 1.0) for ratio in _probe(elements)) * elements.shape[0])


def _probe(elements: NDArray[np.uint8]) -> list[float]:
    """Compressed size / size of a sample of each plane of `elements` [count, width]."""
    count, width = elements.shape
    if count <= PROBE_BYTES:
        sample = elements
    else:
        stride, piece = count // PROBE_PIECES, PROBE_BYTES // PROBE_PIECES
        spread = elements[: stride * PROBE_PIECES].reshape(PROBE_PIECES, stride, width)[:, :piece]
        sample = spread.reshape(-1, width)
    planes = (np.ascontiguousarray(sample[:, number]) for number in range(width))
    return [len(compress(plane.data)) / plane.size for plane in planes]
