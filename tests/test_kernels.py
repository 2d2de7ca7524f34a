"""The kernels in C give what the reference in numpy gives, byte for byte, and refuse what it refuses."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from codec_blocks import Bytes, kernel_form, noise, stepped, weights
from refleet.common import codec, kernels
from refleet.common.errors import MalformedRecord
from refleet.common.kernels_numpy import NumpyKernels
from refleet.common.kernels_types import KINDS, LEAF_BYTES, PLAIN, ROTATED, STEPPED, Streams, Symbols
from refleet.common.sparse import sampled, thresholds_for

REFERENCE = NumpyKernels()
SOURCES = Path(__file__).parent.parent / "common"
# bf16: close together, far apart, one at each end, the most there may be
THRESHOLDS = [
    b"",
    b"\x70",
    bytes(range(112, 122)),
    bytes([1, 60, 118, 120, 255]),
    bytes(range(108, 123)),
    b"\x01",
    b"\xff",
]


@pytest.fixture(params=kernels.available()[1:] or ["c"], autouse=True, scope="module")
def form(request: pytest.FixtureRequest) -> Iterator[None]:
    with kernel_form(request.param):
        yield


def plain(value: Any) -> Any:
    """Streams as tuples of bytes and numbers."""
    if isinstance(value, (list, tuple)):
        return tuple(plain(item) for item in value)
    return value if value is None or isinstance(value, int) else bytes(memoryview(value).cast("B"))


def blocks(dtype: str) -> Iterator[tuple[Bytes, Bytes]]:
    """New and base: sizes around tiles (64) and strips (4096), every density, steps of every size."""
    width = KINDS[dtype].width
    for count in (1, 63, 64, 65, 4095, 4096, 4097, 20_000):
        base = noise(count * width, seed=count)
        if dtype in ("BF16", "F32"):
            base = weights(count, dtype, seed=count)
        yield base, base
        for share in (0.002, 0.05, 0.4, 1):
            yield (
                stepped(base, dtype, share, seed=count) if dtype != "C64" else base ^ (noise(base.size, 1) > 250),
                base,
            )
        yield noise(base.size, seed=3), base


@pytest.mark.parametrize("dtype", sorted(KINDS))
def test_changes_are_found_and_applied_as_in_numpy(dtype: str) -> None:
    kind, active = KINDS[dtype], kernels.active()
    for new, base in blocks(dtype):
        elements = new.size // kind.width
        assert sampled(new, base, kind).seen.sum() == elements
        for ours, theirs in zip(
            active.sample(new, base, kind, pieces=1, piece=elements, stride=0),
            REFERENCE.sample(new, base, kind, pieces=1, piece=elements, stride=0),
            strict=True,
        ):
            assert ours.tolist() == theirs.tolist()
        for thresholds in {*THRESHOLDS, thresholds_for(sampled(new, base, kind), elements)}:
            expected = REFERENCE.extract(new, base, kind, thresholds, elements)
            found = active.extract(new, base, kind, thresholds, elements)
            assert expected is not None and found is not None and plain(found) == plain(expected)
            for applied in (active, REFERENCE):
                out = np.full_like(new, 0xAA)
                applied.apply(out, base, kind, thresholds, found)
                assert np.array_equal(out, new)
                out = base.copy()
                applied.apply(out, out, kind, thresholds, found)
                assert np.array_equal(out, new), "not the same in place"


@pytest.mark.parametrize("dtype", sorted(KINDS))
@pytest.mark.parametrize("how", [PLAIN, ROTATED, STEPPED])
def test_planes_are_those_of_numpy(dtype: str, how: int) -> None:
    kind = KINDS[dtype]
    for new, base in blocks(dtype):
        planes = kernels.active().to_planes(new, base, kind, how)
        assert np.array_equal(planes, REFERENCE.to_planes(new, base, kind, how))
        for form in (kernels.active(), REFERENCE):
            out = base.copy()
            form.from_planes(list(planes), out, out, kind, how)
            assert np.array_equal(out, new)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64", "U8", "I64"])
def test_blocks_are_the_same_bytes(dtype: str) -> None:
    for new, base in blocks(dtype):
        for before in (base, None):
            ours = codec.encode_block(new, before, dtype=dtype)
            with kernel_form("numpy"):
                theirs = codec.encode_block(new, before, dtype=dtype)
            assert (ours[0], bytes(ours[1])) == (theirs[0], bytes(theirs[1]))


def test_a_large_block_with_classes_is_the_same_bytes() -> None:
    base = weights(1_500_000)
    new = stepped(base, "BF16", 0.02)
    ours = codec.encode_block(new, base, dtype="BF16")
    with kernel_form("numpy"):
        theirs = codec.encode_block(new, base, dtype="BF16")
    assert ours[0] == theirs[0] == codec.SPARSE and bytes(ours[1]) == bytes(theirs[1])
    assert bytes(ours[1])[0] > 4, "no classes"


def test_a_block_is_applied_over_memory_that_overlaps_its_base() -> None:
    kind, base = KINDS["BF16"], weights(10_000)
    new = stepped(base, "BF16", 0.1)
    classes = kernels.active().extract(new, base, kind, bytes([118, 120]), 10_000)
    assert classes is not None
    for shift in (2, -2, 128, -128, 19_998):
        room = np.zeros(3 * base.size, np.uint8)
        before, out = (room[at : at + base.size] for at in (base.size, base.size + shift))
        before[:] = base
        kernels.active().apply(out, before, kind, bytes([118, 120]), classes)
        assert np.array_equal(out, new)


def test_more_changes_than_wanted_end_the_search() -> None:
    base = weights(100_000)
    new = stepped(base, "BF16", 0.1)
    for form in (kernels.active(), REFERENCE):
        assert form.extract(new, base, KINDS["BF16"], b"\x70", 5000) is None
        assert form.extract(new, base, KINDS["BF16"], b"\x70", 50_000) is not None


def test_the_first_difference_is_found_wherever_it_is() -> None:
    base = noise(300_000)
    for at in (0, 1, 16_383, 16_384, 299_999):
        new = base.copy()
        new[at] ^= 0x80
        for form in (kernels.active(), REFERENCE):
            assert form.first_difference(new, base) == at
            assert form.first_difference(base, base.copy()) == -1
            assert form.first_difference(base[:at], base) == at
            assert form.first_difference(b"", b"") == -1
        assert kernels.changed(new, base) and not kernels.changed(base, base.copy())
    zeros = np.zeros(4, np.float32)
    assert kernels.changed(-zeros, zeros)


def test_leaves_are_those_of_xxhash() -> None:
    data = noise(5 * LEAF_BYTES + 3)
    for pieces in (0, 1, 2, 5):
        for start in (0, 1, 3):  # aligned and not
            view = data[start : start + pieces * LEAF_BYTES]
            expected = b"".join(xxhash.xxh3_128_digest(leaf) for leaf in view.reshape(-1, LEAF_BYTES))
            assert kernels.leaves(view) == kernels.leaves(view.tobytes()) == REFERENCE.leaves(view) == expected
    for fill in (0, 255):  # sums that carry, and ones that stay small
        view = np.full(LEAF_BYTES, fill, np.uint8)
        assert kernels.leaves(view) == xxhash.xxh3_128_digest(view)
    for at in (0, 1023, 64_511, 64_512, 65_471, 65_472, 65_535):  # around blocks and the last stripes
        view[at] ^= 1
        assert kernels.leaves(view) == xxhash.xxh3_128_digest(view)
    assert kernels.leaves(np.zeros(LEAF_BYTES // 4, np.float32)) == kernels.leaves(bytes(LEAF_BYTES))
    for wrong in (1, LEAF_BYTES - 1, LEAF_BYTES + 1):
        for form in (kernels.active(), REFERENCE):
            with pytest.raises(ValueError, match="whole number"):
                form.leaves(data[:wrong])


def test_nonsense_from_our_own_side_is_an_error_and_no_crash() -> None:
    kind, block = KINDS["BF16"], noise(128)
    form = kernels.active()
    for wrong in (noise(126), noise(0)):
        with pytest.raises(ValueError, match="sizes"):
            form.extract(block, wrong, kind, b"", 64)
    with pytest.raises(ValueError, match="sizes"):
        form.extract(noise(127), noise(127), kind, b"", 64)
    with pytest.raises(ValueError, match="rise"):
        form.extract(block, block, kind, b"\x05\x04", 64)
    for pieces, piece, stride in ((2, 64, 1), (1, 65, 0), (0, 1, 1), (1 << 40, 1, 1), (2, 1, -1), (2, 1, 1 << 62)):
        with pytest.raises((ValueError, OverflowError)):
            form.sample(block, block, kind, pieces=pieces, piece=piece, stride=stride)
    with pytest.raises(ValueError, match="classes"):
        form.apply(block, block, kind, b"\x05", [])
    with pytest.raises(ValueError, match="plane"):
        form.from_planes([noise(64), noise(63)], None, block, kind, PLAIN)
    with pytest.raises(KeyError):
        kernels.use("c-unknown")


@pytest.mark.parametrize("dtype", ["U8", "BF16", "F32", "F64"])
def test_damaged_streams_get_the_same_answer_as_in_numpy(dtype: str) -> None:
    random, kind = np.random.default_rng(0), KINDS[dtype]
    base = noise(5000 * kind.width)
    new, thresholds = stepped(base, dtype, 0.05), bytes([60, 130])
    classes = REFERENCE.extract(new, base, kind, thresholds, 5000)
    assert classes is not None
    refused = 0
    for _ in range(1200):
        damaged = [damage(streams, random) if random.random() < 0.5 else streams for streams in classes]
        answers = []
        for form in (kernels.active(), REFERENCE):
            out = base.copy()
            try:
                form.apply(out, out, kind, thresholds, damaged)
                answers.append(out.tobytes())
            except MalformedRecord:
                answers.append(b"")
        assert answers[0] == answers[1]
        refused += answers[0] == b""
    assert 100 < refused < 1100


def damage(streams: Streams, random: np.random.Generator) -> Streams:
    """One field is changed a little."""

    def hurt(data: Any) -> bytes:
        bad = bytearray(memoryview(data).cast("B"))
        if bad and random.random() < 0.8:
            bad[random.integers(len(bad))] = random.integers(256)
        elif random.random() < 0.5:
            bad += b"\0"
        return bytes(bad[: random.integers(len(bad) + 1)] if random.random() < 0.1 else bad)

    where = int(random.integers(6))
    if where == 0:
        return streams._replace(
            changes=int(random.choice([0, streams.changes - 1, streams.changes + 1, 5001, 1 << 40, -1]))
        )
    if where == 1:
        return streams._replace(shift=int(random.choice([streams.shift + 1, 31, 32, 200])))
    if where == 2:
        return streams._replace(fields=hurt(streams.fields))
    name = str(random.choice(["gaps", "steps"]))
    symbols: Symbols = getattr(streams, name)
    part = str(random.choice(["mode", "packed", "escapes", "wide"]))
    value = int(random.integers(5)) if part == "mode" else hurt(getattr(symbols, part))
    return streams._replace(**{name: symbols._replace(**{part: value})})


def test_damaged_streams_touch_no_memory_but_their_own(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """The C sources with a driver of their own, under AddressSanitizer and UBSan."""
    if kernels.active().name != kernels.available()[-1]:
        pytest.skip("the driver runs all kernels at once")
    compiler = shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler")
    program, source = tmp_path / "kernels_fuzz", Path(__file__).with_name("kernels_fuzz.c")
    flags = ["-g", "-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-Wno-parentheses"]
    built = subprocess.run(
        [compiler, *flags, f"-I{SOURCES}", str(source), "-o", str(program)], capture_output=True, text=True
    )
    if built.returncode and "asan" in built.stderr:
        pytest.skip("no AddressSanitizer library")
    assert built.returncode == 0, built.stderr
    inputs = os.environ.get("REFLEET_FUZZ_INPUTS", "20000")
    # gcc 13 lays frames that need 64 bytes of alignment (AVX-512) at 32 when it looks for use after return
    options = {**os.environ, "ASAN_OPTIONS": "detect_stack_use_after_return=0"}
    ran = subprocess.run([str(program), inputs], capture_output=True, text=True, timeout=110, env=options)
    assert ran.returncode == 0, ran.stderr[-3000:]
