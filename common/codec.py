"""Blocks of tensor bytes <-> encoded bytes: which codecs there are, and which one a block gets.

A block is at most `LIMITS.block_bytes` of elements of one dtype, a flat uint8 array (it may be read-only, need not be
aligned, and may hold several small tensors), encoded by itself. Everything works on bit patterns, never on float
values: -0.0 and NaN payloads survive, and a change from +0.0 to -0.0 is a change. The functions are safe to call from
several threads at once.

    raw     the bytes
    same    nothing: the block is its base
    sparse  changed elements relative to the base, by class of their exponent      sparse.py
    dense   byte planes of the differences to the base                             planes.py
    split   byte planes, the exponent by itself                                    planes.py
    lowrank factors of the difference to the base, and what they miss              lowrank.py
    zstd    byte planes                                                            planes.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from . import kernels
from .errors import MalformedRecord
from .kernels_types import KINDS, PLAIN, ROTATED, STEPPED, Bytes, Kind
from .limits import KIB
from .lowrank import Factors, pack_factors, predict, unpack_factors
from .planes import Planes
from .sparse import Sparse, is_unchanged, sampled
from .varint import Reader

if TYPE_CHECKING:
    from typing_extensions import Buffer

RAW_ABOVE = 0.98  # of the block's size: what saves less goes raw
# Up to this share of changed elements `sparse` beats everything else whatever the values are; above, a probe decides.
SPARSE_SHARE_2_BYTES, SPARSE_SHARE = 0.12, 0.05
PROBE_PIECES, PROBE_PIECE_BYTES = 64, 1 * KIB  # the probe encodes 64 KiB of a block with every codec
PROBE_ALL_BYTES = 2 * PROBE_PIECES * PROBE_PIECE_BYTES  # smaller blocks are encoded whole with every codec


class Codec(Protocol):
    """Encodes one block. A decoder meets arbitrary bytes: it must check every count and size before it allocates."""

    @property
    def id(self) -> int: ...

    @property
    def name(self) -> str: ...

    def encode(self, new: Bytes, base: Bytes | None, *, dtype: str) -> bytes | memoryview | None:
        """`new` encoded, relative to `base` where there is one; None: the codec does not pay or does not apply."""

    def decode(self, encoded: Buffer, out: Bytes, base: Bytes | None, *, dtype: str) -> None:
        """Fills `out` completely, or raises MalformedRecord or LimitExceeded; never touches anything beyond it.

        `out` may be the same memory as `base`. After an error the content of `out` is undefined.
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


class Same:
    """The codec `same`: the block is its base, bit for bit."""

    id = 3
    name = "same"

    def encode(self, new: Bytes, base: Bytes | None, *, dtype: str) -> bytes | None:  # noqa: ARG002
        """No bytes at all; None where there is no base or anything differs."""
        return b"" if base is not None and not kernels.changed(new, base) else None

    def decode(self, encoded: Buffer, out: Bytes, base: Bytes | None, *, dtype: str) -> None:  # noqa: ARG002
        """Copies the base, unless `out` is its memory. Raises: MalformedRecord."""
        if base is None or base.size != out.size:
            raise MalformedRecord("a same block without a base of its size")
        if memoryview(encoded).nbytes:
            raise MalformedRecord(f"a same block with {memoryview(encoded).nbytes} bytes too many")
        if out.size and out.ctypes.data != base.ctypes.data:
            out[:] = base


class Lowrank:
    """The codec `lowrank`: factors, the codec of what they miss (u8), and that. Only where factors are known."""

    id = 7
    name = "lowrank"

    def encode(self, new: Bytes, base: Bytes | None, *, dtype: str) -> None:
        """None: the factors are not in the bytes. See `encode_factored`."""

    def decode(self, encoded: Buffer, out: Bytes, base: Bytes | None, *, dtype: str) -> None:
        """Predicts, and puts right. Raises: MalformedRecord, LimitExceeded."""
        if base is None or base.size != out.size:
            raise MalformedRecord("a lowrank block without a base of its size")
        reader = Reader(memoryview(encoded).cast("B"), self.name)
        factors = unpack_factors(reader, size_bytes=out.size, dtype=dtype)
        number = reader.byte()
        if number == self.id:  # a chain of them would take time without end
            raise MalformedRecord("a lowrank block in a lowrank block")
        rest = reader.rest()
        out[:] = predict(base, factors, dtype=dtype)
        decode_block(number, rest, out, out, dtype=dtype)


_RAW, _SAME, _SPARSE, _LOWRANK = Raw(), Same(), Sparse(), Lowrank()
_ZSTD, _DENSE, _SPLIT = Planes(1, "zstd", PLAIN), Planes(5, "dense", STEPPED), Planes(6, "split", ROTATED)
RAW, ZSTD, SAME, SPARSE, DENSE, SPLIT = _RAW.id, _ZSTD.id, _SAME.id, _SPARSE.id, _DENSE.id, _SPLIT.id
LOWRANK = _LOWRANK.id
#: codec id on the wire -> codec; 2 was an earlier layout of `sparse`
CODECS: dict[int, Codec] = {c.id: c for c in (_RAW, _ZSTD, _SAME, _SPARSE, _DENSE, _SPLIT, _LOWRANK)}
_WITH_BASE = frozenset({SAME, SPARSE, DENSE, LOWRANK})


def needs_base(codec_id: int) -> bool:
    """Whether decoding a block of this codec takes the base's bytes."""
    return codec_id in _WITH_BASE


def encode_block(new: Bytes, base: Bytes | None, *, dtype: str) -> tuple[int, Buffer]:
    """Codec id and bytes of `new`, relative to `base` (same size) where that pays; never larger than `new`.

    A result of codec `raw` is a view of `new`.
    """
    assert base is None or base.size == new.size, "base and new differ in size"
    if new.size == 0:
        return RAW, new.data
    tried: bytes | None = None
    if base is not None:
        kind = KINDS[dtype]
        sample = sampled(new, base, kind)
        sparse_share = _sparse_share(kind)
        if sample.share <= sparse_share:
            limit = int(2 * sparse_share * (new.size // kind.width)) + 1  # samples can miss where most changed
            tried = _SPARSE.encode_sampled(new, base, kind, sample, limit=limit)
            if tried is not None and is_unchanged(tried):
                return SAME, b""
            if tried is not None and len(tried) <= sparse_share * new.size:
                return SPARSE, tried
    found = _best(new, base, dtype, tried)
    return found if found is not None else (RAW, new.data)


def encode_factored(new: Bytes, base: Bytes, factors: Factors, *, dtype: str) -> tuple[int, Buffer]:
    """Codec id and bytes of `new`, which is about `base + scale * B A`: never more than `encode_block` makes of it.

    Raises: ValueError for factors of another size than the block's.
    """
    predicted = predict(base, factors, dtype=dtype)
    number, rest = encode_block(new, predicted, dtype=dtype)
    encoded = pack_factors(factors) + bytes([number]) + memoryview(rest).tobytes()
    if 2 * len(encoded) < new.size * SPARSE_SHARE:  # hardly anything does better
        return LOWRANK, encoded
    plain = encode_block(new, base, dtype=dtype)
    return (LOWRANK, encoded) if len(encoded) < memoryview(plain[1]).nbytes else plain


def _sparse_share(kind: Kind) -> float:
    return SPARSE_SHARE_2_BYTES if kind.width == 2 and kind.mantissa else SPARSE_SHARE


def _best(new: Bytes, base: Bytes | None, dtype: str, tried: bytes | None) -> tuple[int, Buffer] | None:
    """The codec that makes the least of a probe, and what it makes of the block; None where that is no gain.

    `tried` is what `sparse` made of the block, where that is known.
    """
    whole = new.size <= PROBE_ALL_BYTES
    probe, before = (new, base) if whole else (_probe(new), None if base is None else _probe(base))
    sizes: dict[int, float] = {}
    results: dict[int, Buffer | None] = {}
    for codec in (_SPARSE, _DENSE, _SPLIT, _ZSTD):
        known = tried is not None and codec is _SPARSE
        encoded: Buffer | None = tried if known else codec.encode(probe, before, dtype=dtype)
        if encoded is not None:
            sizes[codec.id] = memoryview(encoded).nbytes / (new.size if known else probe.size)
        if whole or known:
            results[codec.id] = encoded
    # a probe is too short for the tables of some codes: what it makes of a block is tried in this order
    for number in sorted(sizes, key=lambda number: sizes[number])[:2]:
        if sizes[number] >= RAW_ABOVE:
            break
        encoded = results[number] if number in results else CODECS[number].encode(new, base, dtype=dtype)
        if encoded is not None and memoryview(encoded).nbytes < RAW_ABOVE * new.size:
            return number, encoded
    return None


def _probe(block: Bytes) -> Bytes:
    """Pieces spread over a block, elements whole."""
    stride = block.size // PROBE_PIECES // 8 * 8
    spread = block[: stride * PROBE_PIECES].reshape(PROBE_PIECES, stride)[:, :PROBE_PIECE_BYTES]
    return np.ascontiguousarray(spread).reshape(-1)


def decode_block(codec: int, encoded: Buffer, out: Bytes, base: Bytes | None, *, dtype: str) -> None:
    """Fills `out` from an encoded block; `base` as it was given to `encode_block`, same size as `out`.

    `out` may be the same memory as `base`: then a delta is applied in place, and after an error the base is lost.
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
