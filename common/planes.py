"""The codecs that take a block apart into byte planes: plane k holds byte k of every element.

    zstd   the elements as they are: integers, and anything with repetitions
    split  floats rotated left by one bit, which moves the sign to the end: the exponent of bf16 and fp32 is one plane,
           compressed by a third to a half; sign and mantissa are noise and go raw
    dense  zigzag differences to the base in units in the last place: for blocks of which most elements changed

Each plane is a zstd frame where that pays and raw bytes where it does not. One layout:

    mask u8 (bit k: plane k is a frame) | u32 size of each frame | planes 0, 1, ... in order
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import numpy as np

from . import kernels, zstd
from .errors import MalformedRecord
from .kernels_types import KINDS, PLAIN, ROTATED, STEPPED, Bytes, Kind
from .limits import KIB
from .types import DTYPE_BYTES

if TYPE_CHECKING:
    from typing_extensions import Buffer

FRAME_BYTES_MAX = 1 << 31  # their sizes are u32, and kernels count elements in 31 bits
PROBE_BYTES, PROBE_PIECES = 64 * KIB, 16  # of each plane: enough for the ratio to within about a percent
PAYS = 0.97  # a plane that shrinks less costs more time on both sides than its bytes cost on the wire


class Planes:
    """The codecs `zstd`, `split` and `dense`: one layout, three transforms."""

    def __init__(self, number: int, name: str, how: int):
        self.id, self.name, self._how = number, name, how

    def encode(self, new: Bytes, base: Bytes | None, *, dtype: str) -> bytes | None:
        """The block's planes, or None where no plane pays or the transform does not apply."""
        kind = self._kind(dtype)
        if not 0 < new.size < FRAME_BYTES_MAX or (self._how == ROTATED and not kind.mantissa):
            return None
        if self._how == STEPPED and base is None:
            return None
        before = base if self._how == STEPPED else None
        count = new.size // kind.width
        if count <= 2 * PROBE_BYTES:
            ratios = [0.0] * kind.width
        else:
            sampled = kernels.active().to_planes(
                _sample(new, kind), None if before is None else _sample(before, kind), kind, self._how
            )
            ratios = [len(self._compress(plane)) / plane.size for plane in sampled]
            if min(ratios) > PAYS:
                return None  # before the block is taken apart
        planes = kernels.active().to_planes(new, before, kind, self._how)
        mask, frame_sizes = 0, b""
        parts: list[bytes | memoryview] = []
        for number, (plane, ratio) in enumerate(zip(planes, ratios, strict=True)):
            frame = self._compress(plane) if ratio <= PAYS else b""
            if frame and len(frame) + 4 <= PAYS * count:
                mask |= 1 << number
                frame_sizes += struct.pack("<I", len(frame))
                parts.append(frame)
            else:
                parts.append(plane.data)
        return b"".join((bytes([mask]), frame_sizes, *parts)) if mask else None

    def decode(self, encoded: Buffer, out: Bytes, base: Bytes | None, *, dtype: str) -> None:
        """Fills `out`, which may be `base`. Raises: MalformedRecord, LimitExceeded."""
        kind, view = self._kind(dtype), memoryview(encoded).cast("B")
        if out.size % DTYPE_BYTES[dtype] or out.size >= FRAME_BYTES_MAX:
            raise MalformedRecord(f"a block of {out.size} bytes can't hold {dtype} elements")
        if self._how == STEPPED and (base is None or base.size != out.size):
            raise MalformedRecord(f"a {self.name} block without a base of its size")
        count = out.size // kind.width
        mask = view[0] if len(view) else 0
        if mask >> kind.width:
            raise MalformedRecord(f"a {self.name} block of {dtype} with plane mask {mask:#x}")
        start = 1 + 4 * mask.bit_count()
        if len(view) < start:
            raise MalformedRecord(f"a {self.name} block ends inside its header")
        frame_sizes = iter(struct.unpack(f"<{mask.bit_count()}I", view[1:start]))
        sizes = [next(frame_sizes) if mask >> number & 1 else count for number in range(kind.width)]
        if start + sum(sizes) != len(view):
            raise MalformedRecord(f"a {self.name} block of {len(view)} bytes whose header says {start + sum(sizes)}")
        planes = []
        for number, size in enumerate(sizes):
            part = view[start : start + size]
            content = zstd.decompress(part, size_bytes=count) if mask >> number & 1 else part
            planes.append(np.frombuffer(content, np.uint8))
            start += size
        kernels.active().from_planes(planes, base if self._how == STEPPED else None, out, kind, self._how)

    def _kind(self, dtype: str) -> Kind:
        # codec 1 is older than kinds: its planes of C64 are those of 8-byte elements
        return Kind(DTYPE_BYTES[dtype], 0) if self._how == PLAIN else KINDS[dtype]

    def _compress(self, plane: Bytes) -> bytes:
        return zstd.compress(plane.data) if self._how == PLAIN else zstd.compress_skewed(plane.data)


def _sample(block: Bytes, kind: Kind) -> Bytes:
    """`PROBE_BYTES` elements, spread over a larger block: layers' statistics differ along it."""
    stride, piece = block.size // kind.width // PROBE_PIECES * kind.width, PROBE_BYTES // PROBE_PIECES * kind.width
    spread = block[: stride * PROBE_PIECES].reshape(PROBE_PIECES, stride)[:, :piece]
    return np.ascontiguousarray(spread).reshape(-1)
