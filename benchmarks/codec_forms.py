"""The codecs that are compared, block by block: refleet's own, and the plain forms that others ship, in numpy."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray
from refleet.common import codec

Bytes = NDArray[np.uint8]

#: block, its base, dtype -> what would be sent, and its size in bytes
Encode = Callable[[Bytes, Bytes, str], tuple[Any, int]]
#: what was sent, where the block goes, its base, dtype. In place: `out` is the base
Decode = Callable[[Any, Bytes, Bytes, str], None]


@dataclass(frozen=True, slots=True)
class Form:
    """One codec. `in_place`: it can turn the base into the new block where it lies."""

    name: str
    encode: Encode
    decode: Decode
    in_place: bool = False
    missing: str = ""  # why it can't run here


def words(data: Bytes, dtype: str) -> NDArray[Any]:
    return data.view("<u4" if dtype == "F32" else "<u2")


def squeeze(data: Any) -> bytes:
    return zstandard.ZstdCompressor(level=1).compress(data)


def expand(data: bytes, size: int) -> Bytes:
    return np.frombuffer(zstandard.ZstdDecompressor().decompress(data, max_output_size=size), np.uint8)


# ---------------------------------------------------------------------- refleet


def _refleet_encode(new: Bytes, base: Bytes, dtype: str) -> tuple[Any, int]:
    number, data = codec.encode_block(new, base, dtype=dtype)
    return (number, data), len(memoryview(data).cast("B"))


def _refleet_decode(sent: Any, out: Bytes, base: Bytes, dtype: str) -> None:
    codec.decode_block(sent[0], sent[1], out, base, dtype=dtype)


# ---------------------------------------------------------------------- plain forms


def _xor_encode(new: Bytes, base: Bytes, _dtype: str) -> tuple[Any, int]:
    sent = squeeze(np.bitwise_xor(new, base).data)
    return sent, len(sent)


def _xor_decode(sent: Any, out: Bytes, base: Bytes, _dtype: str) -> None:
    np.bitwise_xor(base, expand(sent, out.size), out=out)


def _zstd_encode(new: Bytes, _base: Bytes, _dtype: str) -> tuple[Any, int]:
    sent = squeeze(new.data)
    return sent, len(sent)


def _zstd_decode(sent: Any, out: Bytes, _base: Bytes, _dtype: str) -> None:
    out[:] = expand(sent, out.size)


def _index_encode(new: Bytes, base: Bytes, dtype: str) -> tuple[Any, int]:
    after = words(new, dtype)
    at = np.flatnonzero(after != words(base, dtype)).astype("<u4")
    return (at, after[at]), at.nbytes + at.size * after.itemsize


def _index_decode(sent: Any, out: Bytes, base: Bytes, dtype: str) -> None:
    _start(out, base)
    words(out, dtype)[sent[0]] = sent[1]


def _gap_encode(new: Bytes, base: Bytes, dtype: str) -> tuple[Any, int]:
    """Distances as u16, 65535: go on by 65535 without a change; then the values. One zstd frame for each."""
    after = words(new, dtype)
    at = np.flatnonzero(after != words(base, dtype))
    gaps = np.diff(at, prepend=-1) - 1
    if gaps.size and gaps.max() >= 65535:
        skips = gaps // 65535
        long = np.full(gaps.size + int(skips.sum()), 65535)
        long[np.cumsum(skips + 1) - 1] = gaps % 65535
        gaps = long
    parts = squeeze(gaps.astype("<u2").data), squeeze(after[at].data)
    return (parts, gaps.size, at.size), sum(map(len, parts))


def _gap_decode(sent: Any, out: Bytes, base: Bytes, dtype: str) -> None:
    (packed_gaps, packed_values), gap_count, count = sent
    target = words(out, dtype)
    gaps = expand(packed_gaps, 2 * gap_count).view("<u2")
    at = np.cumsum(gaps, dtype=np.int64)
    real = gaps != 65535
    at = (at if real.all() else at[real]) + np.arange(count)
    _start(out, base)
    target[at] = expand(packed_values, count * target.itemsize).view(target.dtype)


def _patch(name: str, *flags: str) -> Form:
    """`zstd --patch-from` of the command line, by way of files in memory where there are any."""
    shared = Path("/dev/shm")
    place = shared if shared.is_dir() else None

    def run(data: Any, base: Bytes, *how: str) -> bytes:
        with tempfile.TemporaryDirectory(dir=place) as folder:
            names = {what: Path(folder) / what for what in ("in", "base", "out")}
            names["in"].write_bytes(data)
            names["base"].write_bytes(base.data)
            command = ["zstd", "-q", *how, "--patch-from", names["base"], names["in"], "-o", names["out"]]
            subprocess.run(command, check=True)
            return names["out"].read_bytes()

    def encode(new: Bytes, base: Bytes, _dtype: str) -> tuple[Any, int]:
        sent = run(new.data, base, "-1", "--long=25", *flags)
        return sent, len(sent)

    def decode(sent: Any, out: Bytes, base: Bytes, _dtype: str) -> None:
        out[:] = np.frombuffer(run(sent, base, "-d", "--long=25"), np.uint8)

    return Form(name, encode, decode, missing="" if shutil.which("zstd") else "there is no zstd command")


def _start(out: Bytes, base: Bytes) -> None:
    if out is not base:
        np.copyto(out, base)


OWN = Form("refleet", _refleet_encode, _refleet_decode, in_place=True)
PLAIN = [
    Form("idx32 + value", _index_encode, _index_decode, in_place=True),
    Form("gap16 + value + zstd-1", _gap_encode, _gap_decode, in_place=True),
    Form("XOR + zstd-1", _xor_encode, _xor_decode, in_place=True),
    _patch("zstd -1 --patch-from"),
    _patch("zstd -1 --patch-from, big tables", "--zstd=hashLog=24,chainLog=24"),
    Form("zstd-1 of the whole", _zstd_encode, _zstd_decode),
]
