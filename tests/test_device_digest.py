"""`lin128`: the same digest on every device, for any strides and block sizes; another one for any other bytes."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from blake3 import blake3
from numpy.typing import NDArray
from refleet.common.errors import UnreadableCheckpoint
from refleet.common.tensors import tensor_from
from refleet.common.types import DTYPE_BYTES, TensorSpec
from refleet.worker import device_digest as module
from refleet.worker.device_digest import COLUMNS, KEY_LABEL, ROW, c_order_pieces, device_digest

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
KIB = 1 << 10
#: around one row, one row of level 1 (64 rows) and one row of level 2, and below 32 rows, where `_int_mm` needs more
SIZES = [1, 63, 4095, 4096, 4097, 17 * ROW, 31 * ROW + 5, 256 * KIB, 256 * KIB + 1, 300 * ROW + 1, 2 * 1024 * KIB]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest blocks there are."""
    monkeypatch.setattr(module, "BLOCK_BYTES", 256 * KIB)
    monkeypatch.setattr(module, "GATHER_BYTES", 256 * KIB)


def noise(size: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def on(device: str, data: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(data.copy()).to(device)


def defined(data: bytes, dtype: str, shape: tuple[int, ...]) -> bytes:
    """The definition once more, in int64 and without blocks."""
    key = np.frombuffer(blake3(KEY_LABEL).digest(length=8 * COLUMNS * ROW), np.int8).reshape(8, COLUMNS, ROW)
    size, level = len(data), 0
    while data and (level == 0 or len(data) > 64):
        rows = np.frombuffer(data.ljust(-(-len(data) // ROW) * ROW, b"\0"), np.int8).reshape(-1, ROW)
        data = (rows.astype(np.int64) @ key[level].T.astype(np.int64)).astype("<i4").tobytes()
        level += 1
    fields = [bytes([len(dtype)]), dtype.encode(), bytes([len(shape)])]
    fields += [n.to_bytes(8, "little") for n in (*shape, size)]
    return blake3(b"refleet lin128 1\0" + b"".join(fields) + data.ljust(64, b"\0")).digest()


@pytest.mark.parametrize("size", SIZES)
def test_it_is_what_its_definition_says(device: str, size: int) -> None:
    data = noise(size, seed=size)
    assert device_digest(on(device, data)) == defined(data.tobytes(), "U8", (size,))


@pytest.mark.parametrize("fill", [0x80, 0x7F, 0xFF])
def test_sums_of_the_largest_bytes_are_exact(device: str, fill: int) -> None:
    data = np.full(40 * ROW, fill, np.uint8)
    assert device_digest(on(device, data)) == defined(data.tobytes(), "U8", data.shape)


def test_the_largest_sums_there_can_be_are_exact(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    at = torch.device(device, 0) if device == "cuda" else torch.device(device)
    key = torch.full((COLUMNS, ROW), -128, dtype=torch.int8)
    key[:, 1] = -127
    monkeypatch.setattr(module, "_key", lambda level, device: key.to(device))
    monkeypatch.setattr(module, "_float_key", lambda level, device, dtype: key.to(device).t().to(dtype))
    rows = torch.full((33, ROW), -128, dtype=torch.int8, device=at)
    rows[1:, 1] = -127  # odd sums: what is lost first where 26 bits are not enough
    for sums in [module._float_sums(rows, 0), module._int_mm(rows, 0)]:
        assert sums.cpu().tolist() == [[(1 << 26) - 128] * COLUMNS] + [[(1 << 26) - 255] * COLUMNS] * 32


@needs_cuda
def test_int_mm_is_used_where_there_is_cuda() -> None:
    assert module._int_mm_is_exact(torch.device("cuda", 0))


def test_an_int_mm_with_wrong_results_or_none_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    check, cpu = module._int_mm_is_exact.__wrapped__, torch.device("cpu")
    right = torch._int_mm
    assert check(cpu)
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: right(a, b) + (a.size(0) > 1000))
    assert not check(cpu)
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: right(a, b).clamp(-(1 << 24), 1 << 24))
    assert not check(cpu)

    def refuse(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")

    monkeypatch.setattr(torch, "_int_mm", refuse)
    assert not check(cpu)
    monkeypatch.delattr(torch, "_int_mm")
    assert not check(cpu)


def test_every_way_to_the_sums_gives_the_same(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = on(device, noise(70 * ROW + 9))
    expected = device_digest(tensor)
    for way in (module._float_sums, module._int_mm):
        monkeypatch.setattr(module, "_sums", way)
        assert device_digest(tensor) == expected


def test_neither_autocast_nor_reduced_precision_nor_inference_mode_change_it(device: str) -> None:
    tensor = on(device, noise(70 * ROW + 9))
    expected = device_digest(tensor)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert device_digest(tensor) == expected
    with torch.inference_mode():
        assert device_digest(tensor) == expected
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert device_digest(tensor) == expected
    finally:
        torch.set_float32_matmul_precision(before)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert device_digest(tensor) == expected
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("size", [*SIZES, 3 * 1024 * KIB + 77])
def test_the_size_of_a_block_is_no_part_of_it(device: str, size: int, small_blocks: None) -> None:
    data = noise(size, seed=size)
    assert device_digest(on(device, data)) == defined(data.tobytes(), "U8", (size,))


@pytest.mark.parametrize("offset", [1, 2, 16, 128])
def test_a_tensor_may_begin_at_any_address(device: str, offset: int) -> None:
    data = noise(100 * ROW + 300)
    assert device_digest(on(device, data)[offset:]) == device_digest(on(device, data[offset:]))


@pytest.mark.parametrize("text", DTYPE_BYTES)
def test_every_dtype_has_every_bit_in_it(device: str, text: str) -> None:
    every_pair = np.arange(1 << 16, dtype=np.uint16).tobytes()
    shape = (2, len(every_pair) // DTYPE_BYTES[text] // 2)
    tensor = tensor_from(every_pair, TensorSpec("w", text, shape)).to(device)
    assert device_digest(tensor) == defined(every_pair, text, shape)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("text", ["BOOL", "F8_E4M3", "BF16", "F32", "C64"])
def test_strides_do_not_change_it(device: str, text: str) -> None:
    shape = (3, 70, 5, 400)
    spec = TensorSpec("w", text, shape)
    tensor = tensor_from(noise(spec.size_bytes), spec).to(device)
    views = [tensor.permute(3, 1, 0, 2), tensor[:, 1::3, :, 5:-2:2], tensor[1, 3:9]]
    views += [tensor.transpose(0, 3), tensor[..., 7], tensor[:1].expand(4, -1, -1, -1), tensor[1:2, 1:2, 1:2, 1:2]]
    for view in views:
        bits = view.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[view.element_size()])
        data = bits.cpu().contiguous().numpy().tobytes()
        assert device_digest(view) == defined(data, text, tuple(view.shape))


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
    assert device_digest(scalar) == defined(b"\2\1", "I16", ())
    assert device_digest(torch.nn.Parameter(torch.zeros(1, device=device))) == defined(bytes(4), "F32", (1,))
    digests = {device_digest(torch.empty(shape, device=device)) for shape in [(0,), (0, 1), (0, 2), (2, 0), (1, 2, 0)]}
    assert len(digests) == 5
    assert defined(b"", "F32", (0, 2)) in digests


def test_dtype_shape_and_length_count(device: str) -> None:
    zeros = torch.zeros(64, dtype=torch.uint8, device=device)
    others = [zeros.view(torch.int8), zeros.view(torch.bfloat16), zeros.view(torch.float16), zeros.view(8, 8)]
    others += [zeros.view(1, 64), zeros.view(64, 1), zeros[:63], torch.zeros(65, dtype=torch.uint8, device=device)]
    others += [
        torch.zeros(ROW, dtype=torch.uint8, device=device),
        torch.zeros(9 * ROW, dtype=torch.uint8, device=device),
    ]
    assert len({device_digest(tensor) for tensor in [zeros, *others]}) == 1 + len(others)


def changed(data: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    """One thing changed, moved or swapped."""
    for place in (0, 1, 1000, ROW - 1, ROW, 64 * ROW, 64 * ROW + 5, data.size - 1):
        for bit in range(8):
            other = data.copy()
            other[place] ^= 1 << bit
            yield other
    swaps = [(slice(0, 1), slice(1, 2)), (slice(7, 8), slice(ROW + 7, ROW + 8)), (slice(2, 4), slice(4, 6))]
    swaps += [(slice(0, ROW), slice(ROW, 2 * ROW)), (slice(3 * ROW, 4 * ROW), slice(70 * ROW, 71 * ROW))]
    half = data.size // 2 // ROW * ROW
    swaps += [(slice(0, 64 * ROW), slice(64 * ROW, 128 * ROW)), (slice(0, half), slice(half, 2 * half))]
    for one, two in swaps:
        other = data.copy()
        other[one], other[two] = data[two], data[one]
        yield other
    for shift in (1, 2, 64, ROW, 64 * ROW):
        yield np.roll(data, shift)
    for piece in (slice(0, 1), slice(0, 64), slice(0, ROW), slice(ROW, 65 * ROW)):  # lost in transit
        other = data.copy()
        other[piece] = 0
        yield other
    yield data[::-1].copy()
    yield ~data


def test_whatever_changes_moves_or_swaps_changes_it(device: str) -> None:
    data = noise(200 * ROW + 123)
    everything = [data, *changed(data)]
    assert len({device_digest(on(device, each)) for each in everything}) == len(everything)


def test_the_order_of_rows_counts_also_where_their_sum_is_the_same(device: str) -> None:
    rows = np.zeros((130, ROW), np.uint8)
    digests = set()
    for at in (0, 1, 63, 64, 65, 128, 129):
        only = rows.copy()
        only[at, 5] = 1
        digests.add(device_digest(on(device, only.reshape(-1))))
    assert len(digests) == 7


def test_the_sign_of_zero_and_the_payload_of_a_nan_count(device: str) -> None:
    bits = [0x00000000, 0x80000000, 0x7FC00000, 0x7FC00001, 0xFFC00000, 0x7F800001, 0x00000001]
    tensors = [torch.from_numpy(np.array([n, 0], np.uint32).view(np.float32)).to(device) for n in bits]
    assert len({device_digest(tensor) for tensor in tensors}) == len(bits)
    bools = [torch.tensor([n], dtype=torch.uint8, device=device).view(torch.bool) for n in (0, 1, 2, 255)]
    assert len({device_digest(tensor) for tensor in bools}) == 4


GOLDEN = {
    "empty": "acb8ab978489273cf7018bcbe2c4ea178c894bc48f09dcfad72f334c824c2783",
    "one byte": "51b24b0365f8cd1e2c7e8fbfb0135aab78c9e00e04d5000409e965e6cc50bf75",
    "bf16": "a1e541177846aced08a11979a23db4db0b89f23ca3db29bb0042316c0d0e1fc5",
    "rows": "4ea427d8f7780c1d60b9879d97150f493a8c7d24e7ad0499610f369fa1228d16",
    "levels": "fe8015047228df429484a83ebd9a7e8bd55b9f2f7567e626b954b9760ae44a73",
}


def golden_tensor(name: str) -> torch.Tensor:
    if name == "empty":
        return torch.empty(0, dtype=torch.float32)
    if name == "one byte":
        return torch.tensor([1], dtype=torch.uint8)
    size = {"bf16": 24, "rows": 12345, "levels": 5 * 1024 * KIB + 3}[name]
    data = torch.frombuffer(bytearray(blake3(b"golden").digest(length=size)), dtype=torch.uint8)
    return data.view(torch.bfloat16).view(3, 4) if name == "bf16" else data


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_values(device: str, name: str) -> None:
    assert device_digest(golden_tensor(name).to(device)).hex() == GOLDEN[name]


def test_the_golden_key() -> None:
    keys = [module._key(level, torch.device("cpu")) for level in range(7)]
    assert keys[0][0, :8].tolist() == [-57, 113, 114, -37, 44, 23, -64, 94]
    digest = hashlib.sha256(b"".join(key.numpy().tobytes() for key in keys)).hexdigest()
    assert digest == "85770946e7d93ef4d61dcf3a3933f26a0bb6c8c03197bd4afd57a666edd02fb3"
    assert all(key.eq(0).all(0).sum() == 0 for key in keys)  # no byte of a row goes unseen


def test_what_has_no_plain_bytes_is_refused() -> None:
    with pytest.raises(UnreadableCheckpoint, match="sparse_coo"):
        device_digest(torch.ones(2).to_sparse())
    with pytest.raises(UnreadableCheckpoint, match="complex128"):
        device_digest(torch.ones(2, dtype=torch.complex128))


def test_scratch_is_bounded() -> None:
    code = (
        "import torch; from refleet.worker.device_digest import device_digest\n"
        "device_digest(torch.ones(300, 4096).t())\n"
        "peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) >> 10\n"
        "plain = torch.ones(256 << 20, dtype=torch.uint8); before = peak()\n"
        "device_digest(plain); device_digest(plain.view(-1, 4096)[:, ::2]); print(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 90  # 64 to gather; a copy has 128, or 256


@needs_cuda
def test_scratch_on_the_device_is_bounded() -> None:
    device_digest(torch.ones(ROW * ROW, device="cuda")[::2])
    plain = torch.ones(1 << 30, dtype=torch.uint8, device="cuda")
    for tensor, most in ((plain, 64), (plain.view(1 << 15, 1 << 15).t(), 128), (plain[1:], 128)):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        device_digest(tensor)
        assert torch.cuda.max_memory_allocated() - before <= most << 20
