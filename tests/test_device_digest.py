"""The digest computed where a tensor lies is `tensor_digest` of its bytes: any dtype, strides, sizes and addresses."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import xxhash
from numpy.typing import NDArray
from refleet.common.digest import LEAF_BYTES, tensor_digest
from refleet.common.errors import UnreadableCheckpoint
from refleet.common.tensors import tensor_bytes, tensor_from
from refleet.common.types import DTYPE_BYTES, TensorSpec
from refleet.worker import device_digest as module
from refleet.worker.device_digest import c_order_pieces, device_digest, device_digests

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
LEAF, BLOCK, STRIPE = LEAF_BYTES, 1024, 64
#: around a leaf, a piece of the smallest size and the leaves that are scrambled at once in these tests
SIZES = [0, 1, 7, 8, 63, 64, 65, 240, 241, BLOCK, LEAF - 1, LEAF, LEAF + 1, LEAF + BLOCK, 2 * LEAF - 1, 2 * LEAF]
SIZES += [2 * LEAF + 1, 3 * LEAF, 3 * LEAF + 5, 4 * LEAF, 7 * LEAF - 8, 7 * LEAF + 9, 13 * LEAF + 333]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of two leaves, three leaves scrambled at once: borders everywhere."""
    monkeypatch.setattr(module, "PIECE_BYTES", 2 * LEAF)
    monkeypatch.setattr(module, "SCRAMBLED_LEAVES", 3)


def computed(*tensors: torch.Tensor) -> list[bytes]:
    """By the arithmetic of the device, on the CPU too."""
    return list(module._computed(list(tensors)))


def noise(size: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def on(device: str, data: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(data.copy()).to(device)


@pytest.mark.parametrize("size", SIZES)
def test_it_is_the_tensor_digest(device: str, size: int) -> None:
    data = noise(size, seed=size)
    assert computed(on(device, data)) == [tensor_digest(data)]
    assert device_digest(on(device, data)) == tensor_digest(data)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("size", SIZES)
def test_the_size_of_a_piece_is_no_part_of_it(device: str, size: int) -> None:
    data = noise(size, seed=size)
    assert computed(on(device, data)) == [tensor_digest(data)]


@pytest.mark.parametrize("fill", [0x00, 0xFF, 0x7F, 0x80])
def test_the_largest_lanes_wrap_as_they_must(device: str, fill: int) -> None:
    data = np.full(3 * LEAF + 8, fill, np.uint8)
    assert computed(on(device, data)) == [tensor_digest(data)]


def test_accumulators_are_merged_with_every_carry() -> None:
    """The product of 128 bits, against Python's integers, where its sums are largest."""
    acc = np.random.default_rng(1).integers(0, 1 << 64, (64, 8), dtype=np.uint64)
    secret = np.frombuffer(module._SECRET, "<u8", 8, 11)
    acc[0], acc[1] = ~secret, secret  # every factor 2**64 - 1, every factor 0
    for row, found in zip(acc, module._merge(acc, 11, 5), strict=True):
        mixed = [int(a) ^ int(s) for a, s in zip(row, secret, strict=True)]
        products = [mixed[n] * mixed[n + 1] for n in range(0, 8, 2)]
        value = (5 + sum((p & (1 << 64) - 1) ^ (p >> 64) for p in products)) % (1 << 64)
        value = (value ^ value >> 37) * 0x165667919E3779F9 % (1 << 64)
        assert int(found) == value ^ value >> 32


def test_several_tensors_share_scrambles_and_tails_and_keep_their_order(device: str) -> None:
    data = [noise(size, seed=size) for size in SIZES]
    wanted = [tensor_digest(each) for each in data]
    assert computed(*(on(device, each) for each in data)) == wanted
    assert list(device_digests(on(device, each) for each in data)) == wanted


@pytest.mark.usefixtures("small")
def test_groups_are_bounded_and_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TAIL_BYTES", LEAF)
    tensors = [torch.from_numpy(noise(size)) for size in SIZES]
    groups = list(module._groups(tensors))
    assert [id(t) for group in groups for t in group] == [id(t) for t in tensors]
    for group in groups:
        sizes = [t.numel() for t in group]
        assert len(group) == 1 or sum(size // LEAF for size in sizes) <= 3
        assert len(group) == 1 or sum(size % LEAF for size in sizes) <= LEAF
    assert any(len(group) > 1 for group in groups)
    assert [d for group in groups for d in computed(*group)] == [tensor_digest(tensor_bytes(t)) for t in tensors]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("offset", [1, 2, 4, 8, 16, 129])
def test_a_tensor_may_begin_at_any_address(device: str, offset: int) -> None:
    data = noise(5 * LEAF + 300)
    assert computed(on(device, data)[offset:]) == [tensor_digest(data[offset:])]


def test_memory_of_others_may_begin_at_any_address() -> None:
    """Storage whose own address is odd: an offset that makes it even, and none."""
    memory = bytearray(2 * LEAF + 64)
    first = torch.frombuffer(memory, dtype=torch.uint8)
    start = (-first.data_ptr()) % 8 + 3
    odd = torch.frombuffer(memory, dtype=torch.uint8, offset=start)
    odd.copy_(torch.from_numpy(noise(odd.numel())))
    for tensor in (odd, odd[5:], odd[8:]):
        assert computed(tensor) == [tensor_digest(tensor_bytes(tensor))]


@pytest.mark.parametrize("text", DTYPE_BYTES)
def test_every_dtype_has_every_bit_in_it(device: str, text: str) -> None:
    every_pair = np.arange(1 << 16, dtype=np.uint16).tobytes()
    shape = (2, len(every_pair) // DTYPE_BYTES[text] // 2)
    tensor = tensor_from(every_pair, TensorSpec("w", text, shape)).to(device)
    assert computed(tensor) == [tensor_digest(every_pair)]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("text", ["BOOL", "F8_E4M3", "BF16", "F32", "C64"])
def test_strides_do_not_change_it(device: str, text: str) -> None:
    spec = TensorSpec("w", text, (3, 70, 5, 400))
    tensor = tensor_from(noise(spec.size_bytes), spec).to(device)
    views = [tensor.permute(3, 1, 0, 2), tensor[:, 1::3, :, 5:-2:2], tensor[1, 3:9]]
    views += [tensor.transpose(0, 3), tensor[..., 7], tensor[:1].expand(4, -1, -1, -1), tensor[1:2, 1:2, 1:2, 1:2]]
    assert computed(*views) == [tensor_digest(tensor_bytes(view)) for view in views]


@pytest.mark.parametrize("shape", [(3,), (2, 3), (3, 2), (7, 5, 3), (1, 30), (30, 1)])
@pytest.mark.parametrize("limit", [1, 4, 8, 12, 40, 1000])
def test_pieces_are_the_elements_in_order_and_no_larger_than_asked(shape: tuple[int, ...], limit: int) -> None:
    plain = torch.arange(2 * int(np.prod(shape)), dtype=torch.int32).view(*shape, 2)
    for tensor in (plain, plain[..., 0], plain.permute(*reversed(range(plain.ndim))), plain[1:]):
        pieces = list(c_order_pieces(tensor, limit))
        assert torch.equal(
            torch.cat([piece.reshape(-1) for piece in pieces] or [tensor.reshape(-1)]), tensor.reshape(-1)
        )
        assert all(0 < piece.numel() * 4 <= max(limit, 4) for piece in pieces)


def test_scalars_parameters_and_zero_size_tensors_have_one(device: str) -> None:
    scalar = torch.tensor(258, dtype=torch.int16, device=device)
    parameter = torch.nn.Parameter(torch.zeros(1, device=device))
    empty = torch.empty(0, 3, device=device)
    assert computed(scalar, parameter, empty) == [tensor_digest(b"\2\1"), tensor_digest(bytes(4)), tensor_digest()]
    assert list(device_digests([])) == []


def changed(data: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    """One thing changed, moved or swapped, of every unit that there is: lane, stripe, block, leaf."""
    for place in (0, 1, STRIPE, BLOCK - 1, BLOCK, LEAF - STRIPE, LEAF - 1, LEAF, 2 * LEAF + 5, data.size - 1):
        for bit in range(8):
            other = data.copy()
            other[place] ^= 1 << bit
            yield other
    for unit in (1, 8, STRIPE, BLOCK, LEAF):
        for one, two in ((0, 1), (0, 2), (data.size // unit - 2, data.size // unit - 1)):
            other = data.copy()
            first, second = slice(one * unit, (one + 1) * unit), slice(two * unit, (two + 1) * unit)
            other[first], other[second] = data[second], data[first]
            yield other
        for at in sorted({0, 1, LEAF // unit - 1}):  # lost in transit
            other = data.copy()
            other[at * unit : (at + 1) * unit] = 0
            yield other
        yield np.roll(data, unit)
        yield data[unit:]
        yield data[:-unit]
    yield ~data


def test_whatever_changes_moves_or_swaps_changes_it(device: str) -> None:
    data = noise(4 * LEAF + 123)
    everything = [data, *changed(data)]
    found = computed(*(on(device, each) for each in everything))
    assert len(set(found)) == len(everything)
    assert found == [tensor_digest(np.ascontiguousarray(each)) for each in everything]


def test_every_stripe_of_a_leaf_counts_at_its_place() -> None:
    """A single bit in each stripe in turn: no two leaves alike, each the library's."""
    leaves = np.zeros((LEAF // STRIPE, LEAF), np.uint8)
    leaves[np.arange(LEAF // STRIPE), np.arange(LEAF // STRIPE) * STRIPE + 9] = 1
    lanes = torch.from_numpy(leaves).view(torch.int64).view(-1, module.BLOCKS, module.STRIPES, module.LANES)
    digests = module._leaf_digests(iter(torch.split(lanes, 256)), [len(leaves)])
    assert digests == b"".join(xxhash.xxh3_128_digest(leaf) for leaf in leaves)
    assert len({digests[n : n + 16] for n in range(0, len(digests), 16)}) == len(leaves)


def test_neither_autocast_nor_inference_mode_change_it(device: str) -> None:
    data = noise(2 * LEAF + 9)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert computed(on(device, data)) == [tensor_digest(data)]
    module._keys.cache_clear()
    module._constants.cache_clear()
    with torch.inference_mode():  # what is cached there is used outside
        assert computed(on(device, data)) == [tensor_digest(data)]
    assert computed(on(device, data).requires_grad_(False)) == [tensor_digest(data)]


def test_what_has_no_plain_bytes_is_refused() -> None:
    with pytest.raises(UnreadableCheckpoint, match="sparse_coo"):
        device_digest(torch.ones(2).to_sparse())
    with pytest.raises(UnreadableCheckpoint, match="complex128"):
        device_digest(torch.ones(2, dtype=torch.complex128))


@needs_cuda
def test_on_cuda_no_more_than_the_accumulators_and_the_tail_come_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.from_numpy(noise(64 * LEAF + 77)).cuda()
    copied: list[int] = []
    cpu = torch.Tensor.cpu

    def counted(self: torch.Tensor) -> torch.Tensor:
        copied.append(self.nbytes)
        return cpu(self)

    wanted = tensor_digest(tensor_bytes(tensor))
    monkeypatch.setattr(torch.Tensor, "cpu", counted)
    assert device_digest(tensor) == wanted
    assert sorted(copied) == [77, 64 * 64]


@needs_cuda
def test_it_runs_on_the_current_stream() -> None:
    data = noise(300 * LEAF + 5)
    source, stream = torch.from_numpy(data).pin_memory(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        target = torch.zeros(data.size, dtype=torch.uint8, device="cuda")
        torch.cuda._sleep(50_000_000)  # only this stream knows when the bytes are there
        target.copy_(source, non_blocking=True)
        assert device_digest(target) == tensor_digest(data)


@needs_cuda
def test_a_tensor_of_more_leaves_than_are_scrambled_at_once() -> None:
    size = module.SCRAMBLED_LEAVES * LEAF + 3 * LEAF + 1
    tensor = torch.arange(size, dtype=torch.int32, device="cuda").mul_(0x3C6EF372).view(torch.uint8)[:size]
    assert device_digest(tensor) == tensor_digest(tensor_bytes(tensor))


@needs_cuda
def test_scratch_on_the_device_is_bounded() -> None:
    device_digest(torch.ones(LEAF * 64, device="cuda")[::2])
    plain = torch.ones(1 << 30, dtype=torch.uint8, device="cuda")
    for tensor in (plain, plain.view(1 << 15, 1 << 15).t(), plain[1:]):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        device_digest(tensor)
        assert torch.cuda.max_memory_allocated() - before <= (128 << 20) + tensor.nbytes // 1024
