"""Blocks survive every codec bit for bit, and cost what they should."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from codec_blocks import kernel_form, noise, peak_bytes, roundtrip, stepped, weights
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from refleet.common import codec, zstd
from refleet.common.limits import KIB, LIMITS, MIB
from refleet.common.types import DTYPE_BYTES

DTYPES = sorted(DTYPE_BYTES)


@pytest.fixture(params=["numpy", "c"], autouse=True, scope="module")
def form(request: pytest.FixtureRequest) -> Iterator[None]:
    """The reference, and the fastest kernels in C."""
    with kernel_form(request.param):
        yield


# every bit pattern survives


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 4099])
def test_random_bits_survive_without_a_base_and_after_no_few_or_all_changes(dtype: str, count: int) -> None:
    base = noise(count * DTYPE_BYTES[dtype])
    roundtrip(base, None, dtype)
    for share in (0, 0.05, 0.5, 1):
        roundtrip(stepped(base, dtype, share), base, dtype)
    roundtrip(noise(base.size, seed=2), base, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_change_of_only_the_first_the_last_or_a_middle_element_survives(dtype: str) -> None:
    width, count = DTYPE_BYTES[dtype], 5003
    base = noise(count * width)
    for element in (0, 1, count // 2, count - 2, count - 1):
        for byte in range(width):
            new = base.copy()
            new[element * width + byte] ^= 0x80
            number, size = roundtrip(new, base, dtype)
            assert number == codec.SPARSE and size < 32


@pytest.mark.parametrize(
    ("dtype", "special"),
    [
        ("BF16", [0x0000, 0x8000, 0x0001, 0x8001, 0x007F, 0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0xFFFF, 0xFFC1]),
        ("F16", [0x0000, 0x8000, 0x0001, 0x83FF, 0x7C00, 0xFC00, 0x7E00, 0x7C01, 0xFE55, 0xFFFF]),
        ("F32", [0, 1 << 31, 1, 0x807FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0xFFC12345, 0xFFFFFFFF]),
        ("F64", [0, 1 << 63, 1, 0x7FF0 << 48, 0xFFF0 << 48, 0x7FF8 << 48, (0x7FF0 << 48) + 1, (1 << 64) - 1]),
        ("C64", [0, 1 << 63, 1 << 31, 0x7F800001_FFC12345, (1 << 64) - 1, 0x80000000_7FC00000]),
        ("F8_E5M2", [0x00, 0x80, 0x7C, 0x7D, 0x7F, 0xFF, 0x01, 0x81]),
        ("F8_E4M3FNUZ", [0x00, 0x80, 0x7F, 0xFF, 0x01]),
        ("I64", [0, 1 << 63, (1 << 63) - 1, (1 << 64) - 1, 1]),
    ],
)
def test_zeros_of_both_signs_subnormals_infinities_and_nan_payloads_turn_into_each_other(
    dtype: str, special: list[int]
) -> None:
    kind = f"<u{DTYPE_BYTES[dtype]}"
    pairs = [(before, after) for before in special for after in special]
    before, after = (np.array(column, kind) for column in zip(*pairs, strict=True))
    quiet = np.zeros(len(pairs) * 9, kind)  # so that few enough change for `sparse`
    base, new = np.concatenate((before, quiet)).view(np.uint8), np.concatenate((after, quiet)).view(np.uint8)
    sparse = codec.CODECS[codec.SPARSE].encode(new, base, dtype=dtype)
    assert sparse is not None
    out = np.full_like(new, 0xAA)
    codec.decode_block(codec.SPARSE, sparse, out, base, dtype=dtype)
    assert np.array_equal(out, new)
    roundtrip(new, base, dtype)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 1 << 32))
def test_any_edit_of_any_block_survives(data: st.DataObject, dtype: str, seed: int) -> None:
    width = DTYPE_BYTES[dtype]
    count = data.draw(st.integers(1, 3000))
    base = data.draw(st.sampled_from([noise(count * width, seed), np.zeros(count * width, np.uint8)]))
    new = base.copy()
    for at in data.draw(st.lists(st.integers(0, count - 1), max_size=40)):
        element = data.draw(st.binary(min_size=width, max_size=width))
        new[at * width : (at + 1) * width] = np.frombuffer(element, np.uint8)
    roundtrip(new, base, dtype)
    roundtrip(new, None, dtype)


@pytest.mark.parametrize("share", [0.001, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6])
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_training_steps_of_every_density_survive(dtype: str, share: float) -> None:
    base = weights(200_003, dtype)
    number, _ = roundtrip(stepped(base, dtype, share), base, dtype)
    assert number == codec.SPARSE or (share > 0.05 and number == codec.DENSE)


def test_gaps_and_steps_too_large_for_a_byte_survive() -> None:
    base = weights(3_000_000, "F32")
    new = base.copy()
    view = new.view("<u4")
    view[:2000] += np.arange(2000, dtype=np.uint32) * 77_777  # small gaps make a small shift
    view[-1] ^= 0xFFFFFFFF  # one gap of nearly everything
    assert roundtrip(new, base, "F32")[0] == codec.SPARSE


def test_unaligned_and_read_only_arrays_are_encoded_and_decoded() -> None:
    base, new = weights(50_001), stepped(weights(50_001), "BF16", 0.01)
    for offset in range(1, 8):
        shifted = [np.zeros(new.size + 8, np.uint8)[offset : offset + new.size] for _ in range(3)]
        shifted[0][:], shifted[1][:] = new, base
        shifted[0].flags.writeable = shifted[1].flags.writeable = False
        for before in (shifted[1], None):
            number, encoded = codec.encode_block(shifted[0], before, dtype="BF16")
            codec.decode_block(number, encoded, shifted[2], before, dtype="BF16")
            assert np.array_equal(shifted[2], new)
            shifted[2][:] = 0


def test_a_block_can_be_decoded_over_its_own_base() -> None:
    base, new = weights(50_001), stepped(weights(50_001), "BF16", 0.05)
    number, encoded = codec.encode_block(new, base, dtype="BF16")
    codec.decode_block(number, encoded, base, base, dtype="BF16")
    assert number == codec.SPARSE and np.array_equal(base, new)


def test_threads_encode_and_decode_at_once() -> None:
    def work(seed: int) -> None:
        base = weights(100_000, seed=seed)
        for n in range(6):
            roundtrip(stepped(base, "BF16", 0.02, seed=n), base, "BF16")
            roundtrip(base, None, "BF16")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


def test_each_thread_has_its_own_zstd_tools() -> None:
    both_there = threading.Barrier(2)

    def tools() -> tuple[object, object]:
        both_there.wait(timeout=20)
        zstd.decompress(zstd.compress(b"x" * 100), size_bytes=100)
        return zstd._tools.compressor, zstd._tools.decompressor

    with ThreadPoolExecutor(2) as pool:
        first, second = (future.result() for future in [pool.submit(tools), pool.submit(tools)])
    assert first[0] is not second[0] and first[1] is not second[1]


# what a block costs


@pytest.mark.parametrize("count", [1, 5000, MIB])
def test_an_unchanged_block_costs_nothing(count: int) -> None:
    base = weights(count)
    assert roundtrip(base.copy(), base, "BF16") == (codec.SAME, 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_change_in_a_tiny_block_costs_a_few_bytes(dtype: str) -> None:
    base = noise(64 * DTYPE_BYTES[dtype])
    new = base.copy()
    new[24 * DTYPE_BYTES[dtype]] ^= 1
    number, size = roundtrip(new, base, dtype)
    assert number == codec.SPARSE and size <= 7


def test_noise_costs_its_own_size_and_is_not_copied() -> None:
    new = noise(1 * MIB)
    number, encoded = codec.encode_block(new, None, dtype="BF16")
    assert number == codec.RAW and np.shares_memory(np.frombuffer(encoded, np.uint8), new)
    assert roundtrip(new, noise(1 * MIB, seed=1), "F32") == (codec.RAW, new.size)


def test_an_empty_block_is_raw_and_empty() -> None:
    empty = np.zeros(0, np.uint8)
    assert roundtrip(empty, empty, "F32") == (codec.RAW, 0)
    assert roundtrip(empty, None, "F32") == (codec.RAW, 0)


def test_a_training_step_costs_little_more_than_its_entropy() -> None:
    share, count = 0.01, 4 * MIB
    base = weights(count)
    _, size = roundtrip(stepped(base, "BF16", share), base, "BF16")
    positions = -(share * math.log2(share) + (1 - share) * math.log2(1 - share))
    step = 1 + -(0.85 * math.log2(0.85) + 0.15 * math.log2(0.15)) / 0.85  # sign, and the entropy of geometric(0.85)
    assert size * 8 < 1.06 * count * (positions + share * step)


def test_steps_of_weights_cost_less_where_their_exponents_tell_how_likely_they_are() -> None:
    """A step of the same absolute size everywhere changes small weights more often than large ones."""
    values = np.random.default_rng(0).standard_normal(4 * MIB).astype(np.float32) * 0.02
    moved = values + np.random.default_rng(1).standard_normal(values.size).astype(np.float32) * 1e-6
    base, new = ((v.view(np.uint32) >> 16).astype(np.uint16) for v in (values, moved))
    exponents, steps = base >> 7 & 0xFF, new.astype(np.int64) - base
    steps[base >= 0x8000] *= -1  # no weight crosses zero

    def bits(of: NDArray[np.int64]) -> float:
        counts = np.unique(of, return_counts=True)[1]
        return float(counts @ np.log2(counts.sum() / counts))

    given_exponent = sum(bits(steps[exponents == exponent]) for exponent in np.unique(exponents))
    number, size = roundtrip(new.view(np.uint8), base.view(np.uint8), "BF16")
    assert number == codec.SPARSE and size * 8 < 1.06 * given_exponent < 0.8 * bits(steps)


def test_a_change_across_zero_is_a_single_step_in_the_order_of_floats() -> None:
    base = np.zeros(100_000, np.uint16)
    new = base.copy()
    random = np.random.default_rng(0)
    new[random.choice(base.size, 5000, replace=False)] = random.choice([0x8000, 0x0001], 5000)
    sizes = {dtype: roundtrip(new.view(np.uint8), base.view(np.uint8), dtype)[1] for dtype in ("BF16", "U16")}
    assert sizes["BF16"] < 0.9 * sizes["U16"]


def test_without_a_base_the_exponents_of_weights_are_compressed() -> None:
    number, size = roundtrip(weights(MIB), None, "BF16")
    assert number == codec.SPLIT and size < 0.68 * 2 * MIB
    number, size = roundtrip(weights(MIB, "F32"), None, "F32")
    assert number == codec.SPLIT and size < 0.84 * 4 * MIB


def test_where_every_element_changed_a_little_the_differences_are_sent() -> None:
    base = weights(MIB, "F32")
    new = base.copy()
    new.view("<u4")[:] += np.random.default_rng(0).integers(0, 1 << 12, MIB, np.uint32)
    number, size = roundtrip(new, base, "F32")
    assert number == codec.DENSE and size < 0.45 * new.size


def test_an_unrelated_base_costs_nothing() -> None:
    new, base = weights(MIB), weights(MIB, seed=9)
    number, size = roundtrip(new, base, "BF16")
    assert number == codec.SPLIT and size == roundtrip(new, None, "BF16")[1]


def test_zstd_is_taken_where_it_beats_sparse() -> None:
    base, new = noise(2 * MIB), np.zeros(2 * MIB, np.uint8)
    new[: 2 * MIB // 8 * 7] = 7
    base[:] = new
    base[:: 2 * 7] ^= noise(base[:: 2 * 7].size)  # the new block is constant, its base is not
    number, size = roundtrip(new, base, "BF16")
    assert number in (codec.ZSTD, codec.SPLIT) and size < 1000


def test_what_does_not_pay_is_found_out_from_samples_without_touching_the_block() -> None:
    new, base = noise(LIMITS.block_bytes), noise(LIMITS.block_bytes, seed=1)
    assert peak_bytes(lambda: codec.encode_block(new, base, dtype="BF16")) < 2 * MIB


def test_too_many_changes_that_the_samples_miss_are_found_by_the_scan() -> None:
    base = weights(4 * MIB)
    new = base.copy().reshape(64, -1)
    hidden = new[:, 8 * KIB :]  # samples are the first 4 KiB of 64 pieces
    hidden[:] = noise(hidden.size, seed=3).reshape(64, -1)
    roundtrip(new.reshape(-1), base, "BF16")  # whatever it takes: the probe sees nothing of it either


def test_a_plane_that_the_probe_took_for_compressible_stays_raw_if_it_is_not() -> None:
    new = noise(LIMITS.block_bytes).reshape(16, -1)
    new[:, : 4 * KIB] = 0  # all that the probe sees
    assert codec.CODECS[codec.ZSTD].encode(new.reshape(-1), None, dtype="U8") is None


def test_a_plane_that_hardly_shrinks_stays_raw() -> None:
    new = np.zeros((100_000, 2), np.uint8)
    new[:, 0] = np.random.default_rng(0).integers(0, 224, 100_000)  # 7.8 bits a byte: 2.4 % to gain
    encoded = codec.CODECS[codec.ZSTD].encode(new.reshape(-1), None, dtype="BF16")
    assert encoded is not None and encoded[0] == 0b10


# the formats


def test_the_sparse_layout_is_fixed() -> None:
    base = np.zeros(1000, "<u2")
    new = base.copy()
    new[[3, 4, 999]] = [2, 0x8000, 500]  # steps +2, -1, +500 in the order of bf16; gaps 3, 0, 994
    golden = bytes([
        0,  # no thresholds: one class
        3, 5,  # count, shift: mean gap 332 -> 10
        2 | 3 << 2,  # gaps of 8 bits, steps as byte planes; no escapes, no frames
        3 | 32 << 6 & 0xFF, 32 >> 2 | (2 << 4 & 0xFF), 0,  # 6 bits each: low bits of 3, 0, 994 = 31 * 32 + 2, and signs
        0, 0, 31,  # gaps >> 5
        1, 0, 0xF3, 0, 0, 0x01,  # |step| - 1: low bytes, high bytes
    ])  # fmt: skip
    number, encoded = codec.encode_block(new.view(np.uint8), base.view(np.uint8), dtype="BF16")
    assert (number, bytes(encoded)) == (codec.SPARSE, golden)


def test_the_sparse_layout_with_classes_and_escapes_is_fixed() -> None:
    base = np.array([0x0080, 0x4000] * 50, "<u2")  # bf16 exponents 1 and 128
    new = base.copy()
    new[0::2] += 1  # every small one: gaps 0, steps +1
    new[[11, 99]] -= 20  # ranks 5 and 49 of the large ones, steps -20
    encoded = bytes([
        1, 2,  # one threshold: keys below 2, keys from 2
        50, 0, 0 | 0 << 2,  # small: symbols of 2 bits
        2, 1, 2 | 1 << 2 | 0x20, 2, 0, 0,  # large: gaps of 8 bits, steps of 4 bits with 2 escapes, raw, none wide
        *bytes(7), *bytes(13), *bytes(13),  # small: 50 signs, gaps, steps
        0b11 | 0b11 << 2, 2, 21, 0xFF, 4, 4,  # large: low bits and signs; gaps 5 and 43, |step| - 1 = 15 + 4
    ])  # fmt: skip
    out = base.copy()
    codec.decode_block(codec.SPARSE, encoded, out.view(np.uint8), out.view(np.uint8), dtype="BF16")
    assert out.tolist() == new.tolist()


def test_the_zstd_layout_is_fixed() -> None:
    frame = bytes.fromhex("28b52ffd2008410000") + bytes(range(8))  # 8 literal bytes, declared
    out = np.zeros(16, np.uint8)
    codec.decode_block(codec.ZSTD, bytes([0b10, len(frame), 0, 0, 0]) + b"abcdefgh" + frame, out, None, dtype="F16")
    assert out.tobytes() == b"a\0b\1c\2d\3e\4f\5g\6h\7"


def test_codec_numbers_are_fixed() -> None:
    names = {0: "raw", 1: "zstd", 3: "same", 4: "sparse", 5: "dense", 6: "split", 7: "lowrank"}
    assert {number: known.name for number, known in codec.CODECS.items()} == names
    assert all(number == known.id for number, known in codec.CODECS.items())
    based = [codec.SAME, codec.SPARSE, codec.DENSE, codec.LOWRANK]
    assert [number for number in names if codec.needs_base(number)] == based
