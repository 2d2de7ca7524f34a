"""`lin128`: a digest of a tensor's bytes that is computed where the tensor lies, with the same result on CPU and CUDA.

    level n: bytes in C order, as int8 rows of 4096, the last row filled up with zeros
             x the n-th [4096 x 16] int8 key matrix
             = 16 int32 sums a row, whose little-endian bytes (64 a row) are the input of level n + 1
    until one row is left; a tensor without bytes has 64 zero bytes there
    digest:  BLAKE3 of a label, dtype text, shape, number of bytes and that row

A sum is at most 4096 * 128 * 128 = 2**26 and every way to compute it here is exact, so neither the order of summation
nor the device, the kernel or the size of a block can change a bit. Rows stay rows from level to level: what moves to
another place changes the digest as much as what changes in place.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import cache

import torch
from blake3 import blake3
from torch import Tensor

from ..common.digest import digest_of
from ..common.limits import KIB, MIB
from ..common.tensors import bits_of, spec_of

LABEL = b"refleet lin128 1\0"
KEY_LABEL = b"refleet lin128 1 key\0"
ROW, COLUMNS = 4096, 16  # bytes of a row; int32 sums of a row
SUMS_BYTES = 4 * COLUMNS

#: Any multiple of this is a size for blocks: the rows that level 0 makes of one fill rows of level 1.
_BLOCK_STEP = ROW * ROW // SUMS_BYTES
assert _BLOCK_STEP == 256 * KIB
#: Read in place, at most so much at a time. Scratch: 4 MiB of sums.
BLOCK_BYTES = 256 * MIB
#: What can't be read in place is gathered first. Scratch: a block, and a piece of the tensor on its way there.
GATHER_BYTES = 32 * MIB
#: Without an alignment in its arguments, cuBLASLt may choose a kernel for pointers aligned so far.
_ALIGNMENT = 256
#: `_int_mm` refuses 16 rows and fewer; its kernels work on 32.
_LEAST_ROWS = 32


def device_digest(tensor: Tensor) -> bytes:
    """32 bytes, equal for tensors of equal dtype, shape and bytes: any device, any strides. Only a row of 64 bytes
    leaves the device. Scratch there: less than 128 MiB and 1/2048 of the tensor.

    Two tensors that were made without regard to the key collide with probability below 2**-125, over the choice of the
    key. In a row that differs anywhere, each of the 16 sums is the same for at most one of the 256 values that one byte
    of its key can have, so all of them are with at most 2**-128. Each of the at most 7 levels has a key of its own, so
    this holds at each.

    It finds accidental corruption: bit flips, lost or misplaced blocks, wrong arithmetic. The key is a constant in this
    file, and whoever knows it can make another tensor with the same digest by solving linear equations: it is no proof
    against an adversary. That takes BLAKE3 of the bytes.

    Raises: UnreadableCheckpoint for a tensor without plain bytes.
    """
    spec = spec_of("tensor", tensor)
    row = _last_row(bits_of(tensor)) if spec.size_bytes else bytes(SUMS_BYTES)
    dtype, dims = spec.dtype.encode(), len(spec.shape)
    layout = f"<B{len(dtype)}sB{dims}QQ{SUMS_BYTES}s"  # every field has a length, so no two tensors share an input
    return digest_of(LABEL, struct.pack(layout, len(dtype), dtype, dims, *spec.shape, spec.size_bytes, row))


def c_order_pieces(bits: Tensor, limit_bytes: int) -> Iterator[Tensor]:
    """Views of `bits` that together are its elements in C order, each at most `limit_bytes` (or one element) large."""
    most = max(1, limit_bytes // bits.element_size())
    if bits.numel() <= most:
        if bits.numel():
            yield bits
    elif bits.is_contiguous():
        yield from torch.split(bits.view(-1), most)
    elif (inner := bits[0].numel()) <= most:
        yield from torch.split(bits, most // inner)
    else:
        for part in bits:
            yield from c_order_pieces(part, limit_bytes)


def flat_bytes(bits: Tensor) -> Tensor:
    """The bytes as one row of uint8, in the same memory if `bits` is contiguous."""
    plain = bits.contiguous()
    # as_strided, not view(-1): one element counts as contiguous with any stride, and keeps it in a view.
    return plain.as_strided((plain.numel(),), (1,)).view(torch.uint8)


def _last_row(bits: Tensor) -> bytes:
    several = bits.numel() * bits.element_size() > ROW
    parts = []
    for block in _blocks(bits):
        sums = _level(block, 0)
        parts.append(_level(sums, 1) if several else sums)
    data, level = torch.cat(parts), 2
    while data.numel() > SUMS_BYTES:
        data, level = _level(data, level), level + 1
    return data.cpu().numpy().tobytes()


def _blocks(bits: Tensor) -> Iterator[Tensor]:
    """The bytes in C order as rows of uint8 whose size is a multiple of `_BLOCK_STEP`, except for the last one's.

    A block is valid until the next is taken.
    """
    if bits.is_contiguous() and (bits.device.type == "cpu" or bits.data_ptr() % _ALIGNMENT == 0):
        yield from torch.split(flat_bytes(bits), BLOCK_BYTES)
        return
    size = min(GATHER_BYTES, bits.numel() * bits.element_size())
    block, filled = torch.empty(size, dtype=torch.uint8, device=bits.device), 0
    for piece in c_order_pieces(bits, GATHER_BYTES):
        data = flat_bytes(piece)
        while data.numel():
            part = data[: size - filled]
            block[filled : filled + part.numel()].copy_(part)
            filled, data = filled + part.numel(), data[part.numel() :]
            if filled == size:
                yield block
                filled = 0
        del data, part  # any view of a copy keeps all of it, while the next one is made
    if filled:
        yield block[:filled]


def _level(data: Tensor, level: int) -> Tensor:
    """The bytes of one level's sums of `data`, a row of bytes."""
    whole = data.numel() // ROW * ROW
    parts = [_sums(data[:whole].view(torch.int8).view(-1, ROW), level)] if whole else []
    if whole < data.numel():
        row = torch.zeros(1, ROW, dtype=torch.uint8, device=data.device)
        row[0, : data.numel() - whole].copy_(data[whole:])
        parts.append(_sums(row.view(torch.int8), level))
    return torch.cat(parts).view(-1).view(torch.uint8)


def _sums(rows: Tensor, level: int) -> Tensor:
    """`rows` x the key of this level, as int32."""
    if rows.is_cuda and _int_mm_is_exact(rows.device):
        return _int_mm(rows, level)
    return _float_sums(rows, level)


def _int_mm(rows: Tensor, level: int) -> Tensor:
    count = rows.size(0)
    if count < _LEAST_ROWS:
        rows = torch.cat((rows, rows.new_zeros(_LEAST_ROWS - count, ROW)))
    # a transposed view: int8 kernels want the second matrix in columns
    return torch._int_mm(rows, _key(level, rows.device).t())[:count]


def _float_sums(rows: Tensor, level: int) -> Tensor:
    """Exact without integer kernels, which are slow on most CPUs, and may saturate at int16 on those without VNNI.

    float32, a quarter of a row at a time: 1024 products of at most 2**14 add up to at most 2**24, and so does any part
    of such a sum. All of these are integers that float32 holds exactly, so nothing is ever rounded, in any order, with
    or without FMA. Inputs in bfloat16, which torch may be told to use, change nothing: it holds every int8.
    float64 elsewhere, where float32 may be TF32 with accumulators of fewer bits: whole rows, up to 2**26 of its 2**53.
    """
    on_cpu = rows.device.type == "cpu"
    width, dtype, tile = (ROW // 4, torch.float32, 256) if on_cpu else (ROW, torch.float64, 1024)
    key = _float_key(level, rows.device, dtype)
    sums = torch.zeros(rows.size(0), COLUMNS, dtype=torch.int32, device=rows.device)
    scratch = torch.empty(min(tile, rows.size(0)), ROW, dtype=dtype, device=rows.device)
    with torch.autocast(rows.device.type, enabled=False):  # it would round the results to bfloat16
        for some, into in zip(torch.split(rows, tile), torch.split(sums, tile), strict=True):
            values = scratch[: some.size(0)].copy_(some)
            for start in range(0, ROW, width):
                into += (values[:, start : start + width] @ key[start : start + width]).to(torch.int32)
    return sums


@cache
def _int_mm_is_exact(device: torch.device) -> bool:
    """Whether `torch._int_mm` runs on this device and gives the CPU's integers: few and many rows, the largest sums.

    Some builds refuse its shapes, and some versions of cuBLAS were wrong in silence.
    """
    key = _key(0, device)
    largest = torch.where(key > 0, 127, -128).to(torch.int8)  # row n makes the largest n-th sum
    noise = (torch.arange(1024 * ROW, dtype=torch.int32, device=device) * 0x3C6EF372 >> 24).to(torch.int8)
    rows = torch.cat((largest, noise.view(-1, ROW)))
    wanted = _float_sums(rows.cpu(), 0)
    try:
        return all(torch.equal(_int_mm(rows[:count], 0).cpu(), wanted[:count]) for count in (1, COLUMNS, rows.size(0)))
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, RuntimeError):  # not in this build, or not for this device
        return False


@cache
def _key(level: int, device: torch.device) -> Tensor:
    """The key matrix of a level, transposed: [16 x 4096] int8, the next 64 KiB of BLAKE3's output for one label."""
    size = COLUMNS * ROW
    stream = bytearray(blake3(KEY_LABEL).digest(length=size, seek=level * size))
    return torch.frombuffer(stream, dtype=torch.int8).view(COLUMNS, ROW).to(device)


@cache
def _float_key(level: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    # made on the CPU: a kernel that made it here would still have to be waited for by every other stream
    return _key(level, torch.device("cpu")).t().to(dtype).contiguous().to(device)
