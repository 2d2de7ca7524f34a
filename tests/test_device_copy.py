"""From host bytes into live tensors: every bit, any strides, blocks that are never overwritten too early."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from refleet.common.errors import DigestMismatch, NotRefittable, UnreadableCheckpoint, UsageError
from refleet.common.tensors import tensor_bytes, tensor_from, torch_dtype
from refleet.common.types import DTYPE_BYTES, TensorSpec
from refleet.worker import device_copy as module
from refleet.worker.device_copy import Staging, changed_elements, put_changed, put_elements

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
SHAPES = [(), (0,), (3, 0), (1,), (5,), (7, 3), (3, 5, 7), (1, 13, 1), (67, 31)]
#: what floats lose first: -0.0, infinities, quiet and signalling NaNs with payloads, denormals; and bools beyond 1
SPECIAL = {1: [0x80, 0x7F, 0xFF, 2], 2: [0x8000, 0x7FC1, 0xFF81, 1], 4: [0x80000000, 0x7F800001, 0xFFC00123, 1],
           8: [1 << 63, (0x7FF << 52) + 1, 0x7F80000180000000, 1]}  # fmt: skip


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def noise(size: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def bits(data: NDArray[np.uint8], width: int) -> NDArray[np.unsignedinteger]:
    return data.view(f"<u{width}")


def zeros(text: str, shape: tuple[int, ...], device: str) -> torch.Tensor:
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[DTYPE_BYTES[text]]
    return torch.zeros(shape, dtype=integers, device=device).view(torch_dtype(text))


def layouts(text: str, shape: tuple[int, ...], device: str) -> Iterator[torch.Tensor]:
    """Zeros of this shape, lying in memory in several ways."""
    yield zeros(text, shape, device)
    yield zeros(text, shape[::-1], device).permute(tuple(range(len(shape)))[::-1])
    yield zeros(text, (2, *shape), device)[1]
    if shape:
        yield zeros(text, (*shape, 3), device)[..., 1]
        yield zeros(text, (*shape[:-1], shape[-1] + 3), device)[..., 2:-1]


@pytest.mark.parametrize("text", DTYPE_BYTES)
@pytest.mark.parametrize("block_bytes", [8, 24, 1000])
def test_every_bit_arrives(device: str, text: str, block_bytes: int) -> None:
    staging = Staging(block_bytes=block_bytes, count=2)
    for shape in SHAPES:
        spec = TensorSpec("w", text, shape)
        data = noise(spec.size_bytes)
        special = SPECIAL[spec.item_bytes][: data.size // spec.item_bytes]
        bits(data, spec.item_bytes)[: len(special)] = special
        for into in layouts(text, shape, device):
            staging.copy(data.data.toreadonly(), into)
            staging.finish()
            assert bytes(tensor_bytes(into)) == data.tobytes()


def test_only_the_tensor_itself_is_written(device: str) -> None:
    whole = torch.zeros(6, 8, dtype=torch.bool, device=device)
    Staging(block_bytes=8).copy(bytes([255] * 9), whole[1:4, 2:7:2])
    wanted = np.zeros((6, 8), np.uint8)
    wanted[1:4, 2:7:2] = 255
    assert bytes(tensor_bytes(whole)) == wanted.tobytes()


def test_a_ring_is_used_again_and_again(device: str) -> None:
    staging = Staging(block_bytes=16, count=3)
    tensors = [torch.zeros(n, dtype=torch.int16, device=device) for n in (1000, 7, 50, 1, 333)]
    datas = [noise(2 * tensor.numel(), seed=tensor.numel()) for tensor in tensors]
    for tensor, data in zip(tensors, datas, strict=True):
        staging.copy(data.data, tensor)
        data ^= 0xFF  # the source belongs to the caller again
    staging.finish()
    staging.finish()
    for tensor, data in zip(tensors, datas, strict=True):
        assert bytes(tensor_bytes(tensor)) == (data ^ 0xFF).tobytes()


def test_a_block_is_waited_for_before_it_is_overwritten(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block left its event behind, and that one is waited for, just before the block's turn comes again."""
    count, sent, done = 3, [], []

    class Event:
        def __init__(self) -> None:
            self.number = len(sent)
            sent.append(self)
            assert done == list(range(max(0, len(sent) - count)))  # so the block just filled had been free

        def synchronize(self) -> None:
            done.append(self.number)

    monkeypatch.setattr(module, "_event", lambda stream: Event())
    staging = Staging(block_bytes=16, count=count)
    for _ in range(2):
        staging.copy(noise(16 * 5), torch.zeros(16 * 5, dtype=torch.uint8, device=device))
    assert (len(sent), len(done)) == (10, 7)


@needs_cuda
def test_blocks_in_flight_are_not_overwritten_while_the_stream_is_busy() -> None:
    size = 1 << 20
    staging = Staging(block_bytes=size, count=2)
    into = torch.zeros(8 * size, dtype=torch.uint8, device="cuda")
    data = noise(8 * size)
    for stream in (None, torch.cuda.Stream()):
        into.zero_()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream or torch.cuda.current_stream()):
            torch.cuda._sleep(200_000_000)  # about 0.1 s in which nothing is copied
        staging.copy(data.data, into, stream=stream)
        staging.finish()
        assert torch.equal(into.cpu(), torch.from_numpy(data))


@needs_cuda
def test_the_blocks_are_pinned_and_a_stream_belongs_to_the_device_of_the_tensor() -> None:
    staging = Staging(block_bytes=64)
    assert all(block.memory.is_pinned() for block in staging._ring)
    if torch.cuda.device_count() > 1:
        with pytest.raises(UsageError, match="a stream of cuda:1"):
            staging.copy(bytes(4), torch.zeros(4, dtype=torch.uint8, device="cuda:0"), stream=torch.cuda.Stream(1))


@pytest.mark.parametrize("size", [0, 7, 9, 16])
def test_other_sizes_are_refused_before_anything_is_written(device: str, size: int) -> None:
    into, staging = torch.zeros(2, dtype=torch.float32, device=device), Staging(block_bytes=8)
    ones, spec = bytes([255] * size), TensorSpec("layer.w", "F32", (2,))
    with pytest.raises(DigestMismatch, match=rf"{size} bytes for layer.w F32\[2\], which has 8") as caught:
        staging.copy(ones, into, name="layer.w")
    assert caught.value.tensor == "layer.w"
    for old, new in ((bytes(8), ones), (ones, bytes([255] * 8)), (ones, ones)):
        with pytest.raises(DigestMismatch, match=rf"{size} bytes for layer.w F32\[2\], which has 8"):
            put_changed(into, old, new, spec, staging)
    staging.finish()
    assert into.tolist() == [0, 0]


def test_another_dtype_or_shape_is_refused_before_anything_is_written(device: str) -> None:
    into = torch.zeros(2, 3, dtype=torch.bfloat16, device=device)
    for text, shape in (("F16", (2, 3)), ("BF16", (3, 2)), ("BF16", (6,))):
        with pytest.raises(NotRefittable, match=r"layer.w .* does not fit a tensor BF16\[2, 3\]"):
            put_changed(into, bytes(12), bytes([1] * 12), TensorSpec("layer.w", text, shape), Staging())
    assert not into.any()


def test_what_can_not_be_written_in_place_is_refused(device: str) -> None:
    number = torch.zeros(2, dtype=torch.complex64, device=device)
    for into in (number.conj(), number.conj().imag, torch.zeros(1, device=device).expand(4)):
        with pytest.raises(NotRefittable, match="in place"):
            Staging().copy(bytes([1] * into.numel() * into.element_size()), into)
    with pytest.raises(UnreadableCheckpoint, match="sparse_coo"):
        Staging().copy(b"", torch.zeros(2, device=device).to_sparse())
    assert not number.any()


@pytest.mark.parametrize(("block_bytes", "count"), [(7, 1), (8, 0), (-1, 2)])
def test_a_ring_without_room_for_an_element_is_refused(block_bytes: int, count: int) -> None:
    with pytest.raises(UsageError, match="no ring"):
        Staging(block_bytes=block_bytes, count=count)


def test_parameters_are_written_although_they_have_gradients(device: str) -> None:
    parameter, staging = torch.nn.Parameter(torch.zeros(50, 4, device=device)), Staging(block_bytes=16)
    data = noise(800)
    staging.copy(data.data, parameter)
    staging.finish()
    assert bytes(tensor_bytes(parameter)) == data.tobytes()
    put_changed(parameter, data.data, bytes(4) + data[4:].tobytes(), TensorSpec("w", "F32", (50, 4)), staging)
    staging.finish()
    assert bytes(tensor_bytes(parameter)) == bytes(4) + data[4:].tobytes()


@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("elements", [0, 1, 3, 4, 1001, (3 << 20) // 8 + 3])
@pytest.mark.parametrize("share", [0, 0.01, 0.5, 1])
def test_changed_elements_are_those_whose_bytes_differ(width: int, elements: int, share: float) -> None:
    rng = np.random.default_rng(elements)
    old = noise(elements * width)
    new = old.copy()
    where = np.flatnonzero(rng.random(elements) < share)
    bits(new, width)[where] ^= np.array(1, f"<u{width}") << rng.integers(0, 8 * width, where.size).astype(f"<u{width}")
    positions, values = changed_elements(old.data, new.data.toreadonly(), width)
    assert (positions.dtype, values.dtype) == (np.int64, np.dtype(f"<u{width}"))
    assert np.array_equal(positions, where)
    assert np.array_equal(values, bits(new, width)[where])


def test_elements_at_the_seams_of_blocks_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SCAN_BYTES", 64)
    old = np.zeros(64 * 5 + 6, np.uint8)
    for at in [0, 31, 32, 63, 64, 95, 159, 160, 161, 162]:
        new = old.copy()
        bits(new, 2)[at] = 0x8000
        positions, values = changed_elements(old, new, 2)
        assert (positions.tolist(), values.tolist()) == ([at], [0x8000])


@pytest.mark.parametrize(("old", "new", "width"), [(4, 6, 2), (0, 2, 2), (7, 7, 2), (12, 12, 8)])
def test_what_is_not_equally_many_elements_is_refused(old: int, new: int, width: int) -> None:
    with pytest.raises(DigestMismatch, match=f"{old} and {new} bytes"):
        changed_elements(bytes(old), bytes(new), width)


@pytest.mark.parametrize("text", DTYPE_BYTES)
@pytest.mark.parametrize("staged", [False, True])
def test_elements_are_put_where_they_belong(
    device: str, text: str, staged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PUT_ELEMENTS", 100)
    spec = TensorSpec("w", text, (33, 31))
    old = noise(spec.size_bytes)
    into, staging = tensor_from(old.tobytes(), spec).to(device), Staging(block_bytes=24)
    positions = np.sort(np.random.default_rng(1).choice(1023, 450, replace=False))
    new = old.copy()
    special = np.resize(np.array(SPECIAL[spec.item_bytes], f"<u{spec.item_bytes}"), 450)
    bits(new, spec.item_bytes)[positions] = special
    travelled = put_elements(into, positions, special, staging=staging if staged else None)
    staging.finish()
    assert travelled == 450 * (4 + spec.item_bytes)
    assert bytes(tensor_bytes(into)) == new.tobytes()


@pytest.mark.parametrize(
    ("positions", "values", "match"),
    [
        ([0, 6], np.uint16([1, 1]), "from 0 to 6 in 6 elements"),
        ([-1], np.uint16([1]), "from -1"),
        ([0, 1], np.uint16([1]), r"\[1\] values"),
        ([0], np.uint32([1]), "values of 4 bytes"),
        ([[0]], np.uint16([[1]]), r"\[1, 1\] positions"),
    ],
)
def test_elements_that_the_tensor_does_not_have_are_refused(
    device: str, positions: list[int], values: NDArray[np.unsignedinteger], match: str
) -> None:
    into = torch.zeros(2, 3, dtype=torch.bfloat16, device=device)
    with pytest.raises(UsageError, match=match):
        put_elements(into, np.array(positions), values)
    with pytest.raises(UsageError, match="contiguous"):
        put_elements(into.t(), np.array([0]), np.uint16([1]))
    assert not into.any()


@pytest.mark.parametrize("text", DTYPE_BYTES)
@pytest.mark.parametrize("share", [0, "one", 0.01, 0.5, 1])
def test_put_changed_leaves_what_a_whole_copy_leaves(device: str, text: str, share: float | str) -> None:
    spec, staging = TensorSpec("w", text, (403, 101)), Staging(block_bytes=1 << 10)
    width, elements = spec.item_bytes, 403 * 101
    old = noise(spec.size_bytes)
    bits(old, width)[[0, 5, 6, 7, elements - 1]] = 0  # +0.0
    new, rng = old.copy(), np.random.default_rng(3)
    where = np.array([], int) if share == "one" else np.flatnonzero(rng.random(elements) < float(share))
    bits(new, width)[where] ^= np.array(1, f"<u{width}")  # the payload of a NaN, the last place of a number
    if share:
        bits(new, width)[elements - 1] = 1 << 8 * width - 1  # -0.0
        where = np.union1d(where, [elements - 1])
    turned = zeros(text, spec.shape[::-1], device).t()
    staging.copy(old.data, turned)
    for into in (tensor_from(old.tobytes(), spec).to(device), turned):
        travelled = put_changed(into, old.data, new.data.toreadonly(), spec, staging)
        staging.finish()
        assert bytes(tensor_bytes(into)) == new.tobytes()
        few = into.is_contiguous() and where.size <= module.ELEMENTS_SHARE_MAX * elements
        assert travelled == (where.size * (4 + width) if few else spec.size_bytes)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0), (9,)])
@pytest.mark.parametrize("text", ["BOOL", "BF16", "F64"])
def test_small_tensors_change_too(device: str, text: str, shape: tuple[int, ...]) -> None:
    spec, staging = TensorSpec("w", text, shape), Staging(block_bytes=8)
    old, new = bytes(spec.size_bytes), bytes([7] * spec.size_bytes)
    into = tensor_from(old, spec).to(device)
    for before, after in ((old, old), (old, new), (new, new)):
        put_changed(into, before, after, spec, staging)
        staging.finish()
        assert bytes(tensor_bytes(into)) == after


def test_many_changes_in_one_place_are_copied_as_a_whole(device: str) -> None:
    """The sample misses them; the search gives up."""
    spec, staging = TensorSpec("w", "U8", (4 << 20,)), Staging()
    old = noise(spec.size_bytes)
    new = old.copy()
    for start in range(0, new.size, new.size // 64):
        new[start + 6000 : start + 20000] ^= 1
    into = torch.from_numpy(old.copy()).to(device)
    assert put_changed(into, old.data, new.data, spec, staging) == spec.size_bytes
    staging.finish()
    assert bytes(tensor_bytes(into)) == new.tobytes()


def test_what_was_not_looked_at_is_not_repaired(device: str) -> None:
    """The caller's digest of the tensor has to tell: only changed elements travel."""
    spec, staging = TensorSpec("w", "I16", (1000,)), Staging()
    into = torch.ones(1000, dtype=torch.int16, device=device)
    put_changed(into, bytes(2000), bytes(1998) + b"\5\0", spec, staging)
    staging.finish()
    assert into.tolist() == [1] * 999 + [5]
