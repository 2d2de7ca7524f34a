"""Low-rank updates come back bit for bit, are computed in one fixed order, and refuse what does not fit."""

from __future__ import annotations

import numpy as np
import pytest
from codec_blocks import Bytes, noise
from refleet.common import codec
from refleet.common.errors import LimitExceeded, MalformedRecord
from refleet.common.lowrank import DTYPES, RANK_MAX, Factors, pack_factors, predict

ROWS, COLS, RANK = 96, 160, 8


def encode_lowrank(new: Bytes, base: Bytes, factors: Factors, *, dtype: str) -> bytes:
    """As the codec `lowrank`, whatever else were shorter."""
    number, rest = codec.encode_block(new, predict(base, factors, dtype=dtype), dtype=dtype)
    return pack_factors(factors) + bytes([number]) + bytes(rest)


def decode_lowrank(encoded: bytes, out: Bytes, base: Bytes, *, dtype: str) -> None:
    codec.decode_block(codec.LOWRANK, encoded, out, base, dtype=dtype)


def narrow(values: np.ndarray, dtype: str) -> Bytes:
    if dtype == "BF16":
        bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16).reshape(-1).view(np.uint8)
    return values.astype(np.float16 if dtype == "F16" else np.float32).reshape(-1).view(np.uint8)


def widen(data: Bytes, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return data.view(np.float16 if dtype == "F16" else np.float32).astype(np.float32)


def case(
    dtype: str, factor_dtype: str, rows: int = ROWS, cols: int = COLS, scale: float = 2.0
) -> tuple[Bytes, Factors]:
    random = np.random.default_rng(0)
    a, b = (narrow(random.standard_normal(shape) * 0.02, factor_dtype) for shape in ((RANK, cols), (rows, RANK)))
    base = narrow(random.standard_normal((rows, cols)) * 0.02, dtype)
    return base, Factors(a, b, factor_dtype, rows, cols, RANK, scale)


def merged(base: Bytes, factors: Factors, dtype: str) -> Bytes:
    """As a trainer merges: BLAS, in its own order."""
    a = widen(factors.a, factors.dtype).reshape(RANK, factors.cols)
    b = widen(factors.b, factors.dtype).reshape(factors.rows, RANK)
    return narrow(widen(base, dtype).reshape(factors.rows, factors.cols) + factors.scale * (b @ a), dtype)


@pytest.mark.parametrize("factor_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_merged_adapter_comes_back_for_little_more_than_its_factors(dtype: str, factor_dtype: str) -> None:
    base, factors = case(dtype, factor_dtype)
    kept, new = base.copy(), merged(base, factors, dtype)
    encoded = encode_lowrank(new, base, factors, dtype=dtype)
    out = np.full_like(new, 0xAA)
    decode_lowrank(encoded, out, base, dtype=dtype)
    assert np.array_equal(out, new) and np.array_equal(base, kept)
    if dtype != "F32":  # where the last bits of a float32 sum are rounded away
        assert len(encoded) < factors.a.size + factors.b.size + 200
        assert len(encoded) < len(memoryview(codec.encode_block(new, base, dtype=dtype)[1]))


def test_the_order_of_roundings_is_fixed() -> None:
    """One element by hand: 1 + 2**-24 is 1 in float32, so the order of the sum shows."""
    tiny, one = 2.0**-24, 1.0
    base = np.zeros(1, np.float32).view(np.uint8)
    for values, expected in (((one, tiny, tiny), 1.0), ((tiny, tiny, one), 1.0 + 2.0**-23)):
        a, b = np.array(values, np.float32).view(np.uint8), np.ones(3, np.float32).view(np.uint8)
        found = predict(base, Factors(a, b, "F32", 1, 1, 3), dtype="F32")
        assert found.view(np.float32)[0] == np.float32(expected)


def test_strips_do_not_change_the_result() -> None:
    base, factors = case("F32", "F32", rows=700, cols=300)  # several strips
    whole = predict(base, factors, dtype="F32").view(np.float32).reshape(700, 300)
    a, b = factors.a.view(np.float32).reshape(RANK, 300), factors.b.view(np.float32).reshape(700, RANK)
    total = np.float32(0)
    for k in range(RANK):
        total = np.float32(total + np.float32(b[651, k] * a[k, 17]))
    expected = np.float32(np.float32(total * np.float32(2)) + base.view(np.float32).reshape(700, 300)[651, 17])
    assert whole[651, 17] == expected


def test_any_bits_survive_whatever_is_predicted() -> None:
    base, factors = noise(ROWS * COLS * 2), case("BF16", "BF16")[1]
    wild = Factors(noise(factors.a.size, 5), noise(factors.b.size, 6), "BF16", ROWS, COLS, RANK, 1.0)
    new = noise(base.size, seed=7)
    predicted = predict(base, wild, dtype="BF16").view(np.uint16)
    nans = (predicted & 0x7FFF) > 0x7F80
    assert nans.any() and (predicted[nans] == 0x7FC0).all()
    out = np.zeros_like(new)
    decode_lowrank(encode_lowrank(new, base, wild, dtype="BF16"), out, base, dtype="BF16")
    assert np.array_equal(out, new)


@pytest.mark.parametrize("factor_dtype", DTYPES)
def test_what_the_encoder_makes_is_never_larger_than_without_factors(factor_dtype: str) -> None:
    base, factors = case("BF16", factor_dtype, rows=400, cols=300)
    for new, codec_id in (
        (merged(base, factors, "BF16"), codec.LOWRANK), (base, codec.SAME), (noise(base.size, seed=9), codec.RAW),
    ):  # fmt: skip
        number, encoded = codec.encode_factored(new, base, factors, dtype="BF16")
        plain = memoryview(codec.encode_block(new, base, dtype="BF16")[1]).nbytes
        assert number == codec_id or codec_id != codec.LOWRANK
        assert memoryview(encoded).nbytes <= plain
        for out in (np.zeros_like(new), base.copy()):
            codec.decode_block(number, encoded, out, base if out[0] == 0 and not out.any() else out, dtype="BF16")
            assert np.array_equal(out, new)


def test_rows_of_factors_predict_the_rows_of_the_tensor() -> None:
    base, factors = case("BF16", "F16")
    whole, row = predict(base, factors, dtype="BF16"), COLS * 2
    for first, last in ((0, 1), (5, 40), (ROWS - 3, ROWS)):
        part = predict(base[first * row : last * row], factors.of_rows(first, last), dtype="BF16")
        assert np.array_equal(part, whole[first * row : last * row])


def test_a_block_that_is_a_chain_of_predictions_is_refused() -> None:
    base, factors = case("BF16", "BF16")
    inner = encode_lowrank(base, base, factors, dtype="BF16")
    with pytest.raises(MalformedRecord, match="lowrank block in a lowrank block"):
        decode_lowrank(pack_factors(factors) + bytes([codec.LOWRANK]) + inner, base.copy(), base, dtype="BF16")


def test_more_than_the_highest_rank_is_refused() -> None:
    """What a block may cost is bounded."""
    rank = RANK_MAX + 1
    factors = Factors.__new__(Factors)
    for name, value in {
        "a": np.zeros(rank * 600 * 2, np.uint8), "b": np.zeros(600 * rank * 2, np.uint8), "dtype": "BF16", "rows": 600,
        "cols": 600, "rank": rank, "scale": 1.0,
    }.items():  # fmt: skip
        object.__setattr__(factors, name, value)
    out = np.zeros(600 * 600 * 2, np.uint8)
    with pytest.raises(MalformedRecord, match=str(rank)):
        decode_lowrank(pack_factors(factors) + b"\0", out, out.copy(), dtype="BF16")


def test_factors_that_do_not_fit_are_refused() -> None:
    a = b = np.zeros(16, np.uint8)
    for wrong in (
        {"dtype": "I32"}, {"rank": 0}, {"rank": 3}, {"rows": 3}, {"cols": 0}, {"scale": float("nan")}, {"scale": 0.1},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"factors|scale"):
            Factors(**{"a": a, "b": b, "dtype": "F32", "rows": 2, "cols": 2, "rank": 2, **wrong})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="base"):
        predict(np.zeros(15, np.uint8), Factors(a, b, "F32", 2, 2, 2), dtype="F32")


def test_damaged_updates_are_refused_or_fill_the_tensor() -> None:
    random = np.random.default_rng(0)
    base, factors = case("BF16", "BF16", rows=12, cols=20)
    new = merged(base, factors, "BF16")
    new.view(np.uint16)[::7] += 1
    valid = encode_lowrank(new, base, factors, dtype="BF16")
    for n in range(len(valid)):
        with pytest.raises(MalformedRecord):
            decode_lowrank(valid[:n], np.zeros_like(new), base, dtype="BF16")
    for _ in range(3000):
        bad = bytearray(valid)
        for _ in range(int(random.integers(1, 4))):
            at = int(random.integers(12)) if random.random() < 0.4 else int(random.integers(len(bad)))
            bad[at] = int(random.integers(256))
        outs = [np.full(new.size, fill, np.uint8) for fill in (0, 0xFF)]
        try:
            for out in outs:
                decode_lowrank(bytes(bad), out, base, dtype="BF16")
        except (MalformedRecord, LimitExceeded):
            continue
        assert np.array_equal(*outs)
