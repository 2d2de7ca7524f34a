"""Blocks of tensor bytes <-> encoded bytes: which codecs there are, and which one a block gets.

A block is at most `LIMITS.block_bytes` of one tensor, a flat uint8 array (it may be read-only and need not be aligned),
encoded by itself. Everything works on bit patterns, never on float values: -0.0 and NaN payloads survive, and a change
from +0.0 to -0.0 is a change. The functions are safe to call from several threads at once.

    raw     the bytes
    zstd    byte planes, compressed where that pays     zstd.py
    sparse  changed elements relative to the base       sparse.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from . import zstd
from .errors import MalformedRecord
from .sparse import Sparse
from .zstd import Zstd

if TYPE_CHECKING:
    from typing_extensions import Buffer

Bytes = NDArray[np.uint8]


class Codec(Protocol):
    """Encodes one block. A decoder meets arbitrary bytes: it must check every count and size before it allocates."""

    id: int
    name: str

    def encode(self, new: Bytes, base: Bytes | None, *, dtype: str) -> bytes | memoryview | None:
        """`new` encoded, relative to `base` where there is one; None: the codec does not pay or does not apply."""

    def decode(self, encoded: Buffer, out: Bytes, base: Bytes | None, *, dtype: str) -> None:
        """Fills `out` completely, or raises MalformedRecord or LimitExceeded; never touches anything beyond it.

        After an error the content of `out` is undefined.
        """


class Raw:
    """The codec `raw`: always applies."""

    id = 0
    name = "raw"

    def encode(self, new: Bytes, base: Bytes | None, *, dtype: str) -> memoryview:  # noqa: ARG002
        """The block itself, without a copy."""
        return new.data

    def decode(self, encoded: Buffer, out: Bytes, base: Bytes | None, *, dtype: str) -> None:  # noqa: ARG002
        """Copies. Raises: MalformedRecord for another size."""
        view = memoryview(encoded).cast("B")
        if len(view) != out.size:
            raise MalformedRecord(f"a raw block of {len(view)} bytes where {out.size} belong")
        out[:] = np.frombuffer(view, np.uint8)


_RAW, _ZSTD, _SPARSE = Raw(), Zstd(), Sparse()
RAW, ZSTD, SPARSE = _RAW.id, _ZSTD.id, _SPARSE.id
#: codec id on the wire -> codec
CODECS: dict[int, Codec] = {RAW: _RAW, ZSTD: _ZSTD, SPARSE: _SPARSE}


def encode_block(new: Bytes, base: Bytes | None, *, dtype: str) -> tuple[int, Buffer]:
    """Codec id and bytes of `new`, relative to `base` (same size) where that pays; never larger than `new`.

    A result of codec `raw` is a view of `new`.
    """
    assert base is None or base.size == new.size, "base and new differ in size"
    sparse = _SPARSE.encode(new, base, dtype=dtype)
    if sparse is not None and len(sparse) < zstd.estimate_bytes(new, dtype=dtype):
        return SPARSE, sparse
    planes = _ZSTD.encode(new, None, dtype=dtype)
    # a tie goes to the simpler codec
    candidates: list[tuple[int, bytes | memoryview | None]] = [(RAW, new.data), (ZSTD, planes), (SPARSE, sparse)]
    return min(((codec, data) for codec, data in candidates if data is not None), key=lambda found: len(found[1]))


def decode_block(codec: int, encoded: Buffer, out: Bytes, base: Bytes | None, *, dtype: str) -> None:
    """Fills `out` from an encoded block; `base` as it was given to `encode_block`, same size as `out`.

    Raises: MalformedRecord for an unknown codec or anything that its encoder did not write, LimitExceeded for a
    zstd frame that declares more than belongs there. After an error the content of `out` is undefined.
    """
    if codec not in CODECS:
        known = ", ".join(f"{number} {known.name}" for number, known in CODECS.items())
        raise MalformedRecord(
            f"a block of codec {codec}, this refleet knows {known}",
            next="run the same refleet version on publisher and workers",
        )
    CODECS[codec].decode(encoded, out, base, dtype=dtype)
