"""The digest of a tensor, as `common.digest.tensor_digest` gives it, computed where the tensor lies.

A leaf of 64 KiB is what XXH3 calls 64 blocks of 16 stripes of 8 lanes (u64). Within a block its accumulation is a sum:

    key = lane ^ secret;   acc[i] += low32(key) * high32(key);   acc[i ^ 1] += lane

so the sums of all blocks of all leaves are computed at once. Only between blocks the 8 accumulators are scrambled, 63
times one after another, for many leaves at once. They leave the device, 64 bytes a leaf, and are merged on the host.
Everything is integer arithmetic modulo 2**64: neither order nor device, nor the size of a piece can change a bit.

What limits it on a GPU: a piece of 16 MiB is read or written 13 times by 9 kernels, mostly within the L2 cache, which
takes about as long as starting them; and the scrambles are 315 starts of small kernels, 1 to 2 ms however few leaves
there are. So tensors are better given together (`device_digests`): they share the scrambles of up to 768 MiB.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import accumulate, pairwise

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from ..common.digest import LEAF_BYTES, TENSOR_LABEL, digest_of, tensor_digest_of
from ..common.limits import MIB
from ..common.tensors import bits_of, spec_of, tensor_blocks

BLOCKS, STRIPES, LANES = 64, 16, 8  # of a leaf, of a block, of a stripe
assert LEAF_BYTES == BLOCKS * STRIPES * LANES * 8

#: Read at a time. Scratch: twice as much; twice more where it has to be gathered first.
PIECE_BYTES = 16 * MIB
#: Scrambled at a time, after 768 MiB of tensors. Scratch: 4 KiB each, 48 MiB in all.
SCRAMBLED_LEAVES = 12 * 1024
#: Of the ends of tensors, each less than a leaf, that are copied to the host at once.
TAIL_BYTES = 4 * MIB

_LOW32 = 0xFFFFFFFF
_PRIME32 = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D
_PRIME64 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5
_START = _PRIME32[2], _PRIME64[0], _PRIME64[1], _PRIME64[2], _PRIME64[3], _PRIME32[1], _PRIME64[4], _PRIME32[0]
#: XXH3's default secret, which is its key for seed 0
_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221"
    "b8084674f743248ee03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb"
    "170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)


def device_digest(tensor: Tensor) -> bytes:
    """32 bytes: `tensor_digest` of the bytes in C order; for one tensor, what `device_digests` is for several."""
    (digest,) = device_digests([tensor])
    return digest


def device_digests(tensors: Iterable[Tensor]) -> Iterator[bytes]:
    """`tensor_digest` of each tensor's bytes in C order, in their order; any dtypes, shapes, strides and devices.

    On CUDA they are computed there, on the current stream; 64 bytes a leaf and each tensor's last bytes (less than a
    leaf) come to the host. Scratch there: at most 128 MiB and 1/1024 of the largest tensor. Elsewhere on the host.
    Raises: UnreadableCheckpoint for a tensor without plain bytes.
    """
    for group in _groups(tensors):
        if group[0].is_cuda:
            yield from _computed(group)
        else:
            yield from (tensor_digest_of(tensor_blocks(tensor)) for tensor in group)


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


def _groups(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours on one device, that share one run of scrambles and one copy of tails; a large tensor is alone."""
    group: list[Tensor] = []
    leaves = tail = 0
    for tensor in tensors:
        whole, rest = divmod(spec_of("tensor", tensor).size_bytes, LEAF_BYTES)
        full = leaves + whole > SCRAMBLED_LEAVES or tail + rest > TAIL_BYTES
        if group and (full or tensor.device != group[0].device):
            yield group
            group, leaves, tail = [], 0, 0
        group.append(tensor)
        leaves, tail = leaves + whole, tail + rest
    if group:
        yield group


def _computed(tensors: list[Tensor]) -> Iterator[bytes]:
    """The digests of tensors of one device by the arithmetic above."""
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    tails: list[Tensor] = []
    leaves = _leaf_digests(_whole_leaves(tensors, tails), [size // LEAF_BYTES for size in sizes])
    ends = torch.cat(tails).cpu().numpy().data if tails else memoryview(b"")
    # where each tensor's part of both begins and ends
    of_leaves = pairwise(accumulate((size // LEAF_BYTES * 16 for size in sizes), initial=0))
    of_ends = pairwise(accumulate((size % LEAF_BYTES for size in sizes), initial=0))
    for size, (first, last), (start, stop) in zip(sizes, of_leaves, of_ends, strict=True):
        end = xxhash.xxh3_128_digest(ends[start:stop]) if start < stop else b""
        yield digest_of(TENSOR_LABEL, leaves[first:last], end, struct.pack("<Q", size))


def _whole_leaves(tensors: list[Tensor], tails: list[Tensor]) -> Iterator[Tensor]:
    """All whole leaves in pieces of [n, 64, 16, 8] int64; what is left of each tensor is added to `tails` as uint8.

    A piece is valid until the next is taken.
    """
    for tensor in tensors:
        for piece in _pieces(bits_of(tensor)):
            count = piece.numel() // LEAF_BYTES
            if count:
                yield piece[: count * LEAF_BYTES].view(torch.int64).view(count, BLOCKS, STRIPES, LANES)
            if piece.numel() % LEAF_BYTES:
                tails.append(piece[count * LEAF_BYTES :].clone())  # of a piece that is filled again


def _pieces(bits: Tensor) -> Iterator[Tensor]:
    """The bytes in C order as rows of uint8 that can be viewed as int64: PIECE_BYTES each, but for the last one.

    A piece is valid until the next is taken.
    """
    size = bits.numel() * bits.element_size()
    # torch wants the offset in the storage to fit, kernels the address; they differ where the storage is foreign memory
    aligned = bits.data_ptr() % 8 == 0 and bits.storage_offset() * bits.element_size() % 8 == 0
    if bits.is_contiguous() and aligned:
        yield from torch.split(flat_bytes(bits), PIECE_BYTES) if size else ()
        return
    piece, filled = torch.empty(min(PIECE_BYTES, size), dtype=torch.uint8, device=bits.device), 0
    for part in c_order_pieces(bits, PIECE_BYTES):
        data = flat_bytes(part)
        while data.numel():
            some = data[: piece.numel() - filled]
            piece[filled : filled + some.numel()].copy_(some)
            filled, data = filled + some.numel(), data[some.numel() :]
            if filled == piece.numel():
                yield piece
                filled = 0
        del data, some  # any view of a copy keeps all of it, while the next one is made
    if filled:
        yield piece[:filled]


def _leaf_digests(pieces: Iterator[Tensor], counts: list[int]) -> bytes:
    """XXH3-128 of every leaf, 16 bytes each. `counts`: how many leaves each tensor has. Uses up `pieces`."""
    total, filled = sum(counts), 0
    sums = scratch = None
    accumulators: list[Tensor] = []
    for piece in pieces:
        if sums is None or scratch is None:
            sums = piece.new_empty(min(total, SCRAMBLED_LEAVES), BLOCKS, LANES)
            most = min(max(counts), PIECE_BYTES // LEAF_BYTES)
            scratch = piece.new_empty(2, most, BLOCKS, STRIPES, LANES)
        while piece.size(0):
            some = piece[: sums.size(0) - filled]
            _sum_blocks(some, scratch[:, : some.size(0)], into=sums[filled : filled + some.size(0)])
            filled, piece = filled + some.size(0), piece[some.size(0) :]
            if filled == sums.size(0):
                accumulators.append(_scrambled(sums))
                filled = 0
    if sums is not None and filled:
        accumulators.append(_scrambled(sums[:filled]))
    del sums, scratch
    return _merged(torch.cat(accumulators).cpu().numpy().view(np.uint64)) if accumulators else b""


def _sum_blocks(lanes: Tensor, scratch: Tensor, *, into: Tensor) -> None:
    """What each block adds to the accumulators: [n, 64, 16, 8] -> [n, 64, 8], int64. `scratch`: two like `lanes`."""
    key, low = scratch[0], scratch[1]
    torch.bitwise_xor(lanes, _keys(lanes.device), out=key)
    torch.bitwise_and(key, _LOW32, out=low)
    key.bitwise_right_shift_(32).bitwise_and_(_LOW32).mul_(low)  # the shift is arithmetic: the mask makes it unsigned
    torch.sum(key, dim=2, out=into)
    plain = torch.sum(lanes, dim=2)
    into.add_(plain.view(-1, BLOCKS, LANES // 2, 2).flip(-1).view_as(plain))


def _scrambled(sums: Tensor) -> Tensor:
    """The accumulators of each leaf before the last merge: [n, 64, 8] -> [n, 8], int64."""
    start, key = _constants(sums.device)
    acc = sums[:, 0] + start
    high = torch.empty_like(acc)
    for block in range(1, BLOCKS):
        torch.bitwise_right_shift(acc, 47, out=high)
        acc.bitwise_xor_(high.bitwise_and_((1 << 17) - 1)).bitwise_xor_(key)
        torch.add(sums[:, block], acc, alpha=_PRIME32[0], out=acc)  # the scramble's product and the next block's sum
    return acc


@cache
def _keys(device: torch.device) -> Tensor:
    """What every lane of a leaf is combined with: [64, 16, 8] int64.

    The same in each block, but for the last stripe, which XXH3 reads apart from the others, with a place of its own.
    """
    words = np.stack([np.frombuffer(_SECRET, "<i8", LANES, 8 * stripe) for stripe in range(STRIPES)])
    keys = np.repeat(words[None], BLOCKS, axis=0)
    keys[-1, -1] = np.frombuffer(_SECRET, "<i8", LANES, len(_SECRET) - 64 - 7)
    # made on the CPU: a kernel that made it there would still have to be waited for by every other stream
    return torch.from_numpy(keys).to(device)


@cache
def _constants(device: torch.device) -> tuple[Tensor, Tensor]:
    """What accumulators start with, and the key of a scramble: [8] int64 each."""
    start = np.array(_START, np.uint64).view(np.int64)
    key = np.frombuffer(_SECRET, "<i8", LANES, len(_SECRET) - 64).copy()
    return torch.from_numpy(start).to(device), torch.from_numpy(key).to(device)


def _merged(acc: NDArray[np.uint64]) -> bytes:
    """XXH3-128 in canonical form of leaves with these accumulators: [n, 8] -> 16 bytes each."""
    low = _merge(acc, 11, LEAF_BYTES * _PRIME64[0])
    high = _merge(acc, len(_SECRET) - 64 - 11, ~(LEAF_BYTES * _PRIME64[1]))
    return np.stack([high, low], axis=1).astype(">u8").tobytes()


def _merge(acc: NDArray[np.uint64], at: int, start: int) -> NDArray[np.uint64]:
    """One half: `at` is its place in the secret. [n, 8] -> [n]"""
    mixed = acc ^ np.frombuffer(_SECRET, "<u8", LANES, at)
    one, two = mixed[:, 0::2], mixed[:, 1::2]
    (one_low, one_high), (two_low, two_high) = (_halves(one), _halves(two))
    # the upper 64 bits of a product of 128; no sum in here is larger than 2**64 - 1
    cross, other = one_low * two_high, one_high * two_low
    middle = _halves(one_low * two_low)[1] + _halves(cross)[0] + other
    upper = one_high * two_high + _halves(cross)[1] + _halves(middle)[1]
    folded = (one * two) ^ upper
    found: NDArray[np.uint64] = folded.sum(axis=1, dtype=np.uint64) + np.uint64(start % (1 << 64))
    found ^= found >> np.uint64(37)
    found *= np.uint64(0x165667919E3779F9)
    found ^= found >> np.uint64(32)
    return found


def _halves(values: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    return values & np.uint64(_LOW32), values >> np.uint64(32)
