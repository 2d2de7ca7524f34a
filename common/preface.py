"""What stands before each block of a body, so that the block can be decoded before the index is there.

    sizes     of the preface with the encoded bytes (u32), and of the preface alone (u16)
    codec, decoded size, number of tensors: varints; for blocks relative to a base, where there are not too many,
    the tensors: position of the first in the base's manifest, its bytes in earlier blocks, and the steps to the next

Nobody believes it: what was decoded by it has to have the digests that the index names.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from .errors import MalformedRecord
from .limits import LIMITS
from .varint import Reader, varint

if TYPE_CHECKING:
    from typing_extensions import Buffer

SIZES = struct.Struct("<IH")
_FEW = LIMITS.preface_bytes - 64  # room for everything but the tensors


@dataclass(frozen=True, slots=True)
class Preface:
    """`numbers`: positions in the base's manifest of the tensors in the block, none where they were not told; `start`:
    bytes of the first of them that are in earlier blocks.
    """

    codec: int
    size_bytes: int
    numbers: tuple[int, ...]
    start: int


def packed(codec: int, size_bytes: int, numbers: Sequence[int], start: int, encoded_bytes: int) -> bytes:
    """The preface of a block of `encoded_bytes`; `numbers` rise."""
    tensors = b"".join(map(varint, (numbers[0], start, *(b - a for a, b in pairwise(numbers))))) if numbers else b""
    if len(tensors) > _FEW:
        numbers, tensors = (), b""
    rest = b"".join(map(varint, (codec, size_bytes, len(numbers)))) + tensors
    preface_bytes = SIZES.size + len(rest)
    return SIZES.pack(preface_bytes + encoded_bytes, preface_bytes) + rest


def behind(data: Buffer) -> memoryview:
    """The encoded bytes behind a preface. Raises: MalformedRecord."""
    view = memoryview(data).cast("B")
    size = SIZES.unpack_from(view)[1] if len(view) >= SIZES.size else SIZES.size
    if not SIZES.size <= size <= len(view):
        raise MalformedRecord(f"a block of {len(view)} bytes with a preface of {size}")
    return view[size:]


def unpacked(data: Buffer) -> Preface:
    """The preface that `data` begins with. Raises: MalformedRecord."""
    view = memoryview(data).cast("B")
    encoded = behind(view)
    reader = Reader(view[SIZES.size : len(view) - len(encoded)], "prefaced")
    codec, size_bytes, count = reader.varint(), reader.varint(), reader.varint()
    numbers: list[int] = []
    start = 0
    if count:
        numbers, start = [reader.varint()], reader.varint()
        for _ in range(count - 1):  # as many as there are bytes: the reader ends where they do
            numbers.append(numbers[-1] + reader.varint())
    reader.finish()
    return Preface(codec, size_bytes, tuple(numbers), start)
