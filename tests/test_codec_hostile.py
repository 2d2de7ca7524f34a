"""No bytes from outside can harm a decoder of blocks: they are refused, or they fill the block and nothing else."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np
import pytest
import zstandard
from codec_blocks import Bytes, kernel_form, noise, peak_bytes, stepped, weights
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refleet.common import codec
from refleet.common.errors import LimitExceeded, MalformedRecord
from refleet.common.limits import KIB, LIMITS, MIB
from refleet.common.types import DTYPE_BYTES
from refleet.common.varint import varint

DTYPES = sorted(DTYPE_BYTES)
NUMBERS = sorted(codec.CODECS)


@pytest.fixture(params=["numpy", "c"], autouse=True, scope="module")
def form(request: pytest.FixtureRequest) -> Iterator[None]:
    """The reference, and the fastest kernels in C."""
    with kernel_form(request.param):
        yield


REFUSALS = (MalformedRecord, LimitExceeded)


def decode_or_refuse(number: int, encoded: bytes, size: int, base: Bytes | None, dtype: str) -> None:
    """Decodes between guard bytes: a refusal, or the same complete block whatever the buffer held before."""
    found = []
    for fill in (0x00, 0xFF):
        room = np.full(size + 128, fill, np.uint8)
        try:
            codec.decode_block(number, encoded, room[64 : 64 + size], base, dtype=dtype)
        except REFUSALS:
            found.append(None)
        else:
            found.append(room[64 : 64 + size].tobytes())
        assert (room[:64] == fill).all() and (room[64 + size :] == fill).all(), "wrote outside of the block"
    assert found[0] == found[1], "left bytes of the block unset"


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    number=st.sampled_from(NUMBERS),
    encoded=st.binary(max_size=400),
    dtype=st.sampled_from(DTYPES),
    count=st.integers(0, 300),
    with_base=st.booleans(),
)
def test_random_bytes_are_refused_or_fill_the_block(
    number: int, encoded: bytes, dtype: str, count: int, with_base: bool
) -> None:
    size = count * DTYPE_BYTES[dtype]
    decode_or_refuse(number, encoded, size, noise(size) if with_base else None, dtype)


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    number=st.sampled_from([codec.ZSTD, codec.SPLIT, codec.DENSE, codec.SPARSE, codec.SPARSE, codec.SPARSE]),
    dtype=st.sampled_from(["BF16", "F32", "U8", "F64", "C64"]),
    count=st.sampled_from([40, 1000, 6000]),
    edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=4),
    front=st.lists(st.tuples(st.integers(0, 24), st.integers(0, 255)), max_size=2),
    cut=st.floats(0, 1),
    whole=st.booleans(),
    tail=st.binary(max_size=3),
)
def test_mutated_blocks_are_refused_or_fill_the_block(
    number: int,
    dtype: str,
    count: int,
    edits: list[tuple[float, int]],
    front: list[tuple[int, int]],
    cut: float,
    whole: bool,
    tail: bytes,
) -> None:
    size = count * DTYPE_BYTES[dtype]
    base = np.tile(noise(size // 8, seed=5), 8)
    valid = codec.CODECS[number].encode(stepped(base, dtype, 0.1), base, dtype=dtype)
    mutated = bytearray(valid if valid is not None else b"\1" + bytes(60))
    for at, value in [(int(share * (len(mutated) - 1)), value) for share, value in edits] + front:
        mutated[min(at, len(mutated) - 1)] = value
    if not whole:
        mutated = mutated[: int(cut * len(mutated))]
    decode_or_refuse(number, bytes(mutated + tail), size, base, dtype)


@pytest.mark.parametrize("number", [codec.RAW, codec.ZSTD, codec.SPARSE, codec.DENSE, codec.SPLIT])
def test_every_truncation_and_every_extension_of_a_block_is_refused(number: int) -> None:
    base = np.tile(weights(200), 10)
    new = stepped(base, "BF16", 0.05)
    encoded = codec.CODECS[number].encode(new, base, dtype="BF16")
    assert encoded is not None
    valid, out = bytes(encoded), np.zeros_like(new)
    for wrong in [valid[:n] for n in range(len(valid))] + [valid + b"\0", valid + valid]:
        with pytest.raises(REFUSALS):
            codec.decode_block(number, wrong, out, base, dtype="BF16")


def test_an_unchanged_block_with_more_after_it_is_refused() -> None:
    with pytest.raises(MalformedRecord):
        codec.decode_block(codec.SPARSE, b"\0\0\0", np.zeros(8, np.uint8), np.zeros(8, np.uint8), dtype="F32")


def test_a_block_whose_size_is_no_multiple_of_its_elements_is_refused() -> None:
    out, base = np.zeros(6, np.uint8), np.zeros(6, np.uint8)
    for number, encoded in ((codec.ZSTD, b"\0" + bytes(4)), (codec.SPARSE, b"\0\0"), (codec.DENSE, bytes(7))):
        with pytest.raises(MalformedRecord, match="6 bytes"):
            codec.decode_block(number, encoded, out, base, dtype="F32")


def test_a_mask_that_names_planes_beyond_the_element_is_refused() -> None:
    for encoded in (bytes([0b100, 0, 0, 0, 0]) + bytes(8), b"\xff" + bytes(4 * 8 + 8)):
        with pytest.raises(MalformedRecord, match="plane mask"):
            codec.decode_block(codec.ZSTD, encoded, np.zeros(8, np.uint8), None, dtype="BF16")


def test_a_number_without_an_end_is_refused_after_its_first_bytes() -> None:
    with pytest.raises(MalformedRecord, match="endless"):
        codec.decode_block(
            codec.SPARSE, b"\0" + b"\xff" * MIB, np.zeros(8, np.uint8), np.zeros(8, np.uint8), dtype="F32"
        )


def test_an_unknown_codec_is_refused_by_its_number() -> None:
    for number in (2, 8, 77, -1):
        with pytest.raises(MalformedRecord, match=f"codec {number}"):
            codec.decode_block(number, b"", np.zeros(8, np.uint8), None, dtype="F32")


@pytest.mark.parametrize("number", [n for n in NUMBERS if codec.needs_base(n)])
def test_a_delta_without_a_base_of_its_size_is_refused(number: int) -> None:
    for base in (None, np.zeros(4, np.uint8)):
        with pytest.raises(MalformedRecord, match="without a base"):
            codec.decode_block(number, b"\0", np.zeros(8, np.uint8), base, dtype="F32")


def test_a_same_block_with_anything_in_it_is_refused() -> None:
    with pytest.raises(MalformedRecord, match="1 bytes too many"):
        codec.decode_block(codec.SAME, b"\0", np.zeros(8, np.uint8), np.zeros(8, np.uint8), dtype="F32")


def sparse_block(
    count: int,
    *,
    shift: int = 0,
    gaps: bytes,
    escapes: tuple[int, ...] = (),
    thresholds: bytes = b"",
    rest: bytes = b"",
) -> bytes:
    """A hand-made sparse block: one class of steps of +1, gaps of 8 bits, raw streams; `count` < 128."""
    flags = 2 | (0x10 if escapes else 0)
    values = struct.pack(f"<{len(escapes)}I", *escapes)
    sizes = bytes([len(escapes), 0, len(values)]) if escapes else b""
    fields, steps = bytes(-(-count * (shift + 1) // 8)), bytes(-(-count // 4))
    head = bytes([len(thresholds)]) + thresholds + bytes([count, shift, flags]) + sizes + rest
    return head + fields + gaps + b"\xff" * len(escapes) + values + steps


@pytest.mark.parametrize(
    "encoded",
    [
        sparse_block(2, gaps=bytes([5, 94])),  # 1 element too far
        sparse_block(1, gaps=b"\xff", escapes=(100,)),
        sparse_block(1, gaps=b"\xff", escapes=(0xFFFFFFFF,)),
        sparse_block(1, shift=31, gaps=bytes([2])),  # gap 2**32: 0 if it wrapped
        sparse_block(1, shift=32, gaps=bytes([0])),
        sparse_block(101, gaps=bytes(101)),  # more changes than elements
        sparse_block(2, gaps=b"\xff\xff", escapes=(50,)),  # an escape without its value
        sparse_block(2, gaps=bytes(2), escapes=(50,)),  # a value without its escape
        sparse_block(1, gaps=bytes([0]), thresholds=b"\x05", rest=b"\1\0\2" + bytes(3)),  # the class has no elements
        sparse_block(1, gaps=bytes([0]), thresholds=b"\x05\x05", rest=b"\0\0"),  # thresholds that do not rise
        sparse_block(1, gaps=bytes([0]), thresholds=b"\0", rest=b"\0"),
        sparse_block(1, gaps=bytes([0]), thresholds=bytes(range(1, 17)), rest=bytes(16)),  # 17 classes
        bytes([0, 1, 0, 3, 0]) + bytes(8),  # gaps have no byte planes
        b"\0\xff\xff\xff\xff\xff\xff\xff\xff\x01",
    ],
)
def test_sparse_blocks_that_reach_beyond_their_end_are_refused(encoded: bytes) -> None:
    with pytest.raises(MalformedRecord):
        codec.decode_block(codec.SPARSE, encoded, np.zeros(200, np.uint8), np.zeros(200, np.uint8), dtype="U16")


def test_a_sparse_block_that_reaches_exactly_its_end_is_accepted() -> None:
    out = np.zeros(100, np.uint16)
    encoded = sparse_block(2, gaps=bytes([5, 93]))
    codec.decode_block(codec.SPARSE, encoded, out.view(np.uint8), np.zeros(200, np.uint8), dtype="U16")
    assert np.flatnonzero(out).tolist() == [5, 99]


# zstd bombs


def bomb(size: int) -> bytes:
    frame: bytes = zstandard.ZstdCompressor(level=1).compress(bytes(size))
    return frame


def refuse(frame: bytes, size: int, error: type[Exception]) -> None:
    """The frame is refused as a plane of `zstd` and as a stream of `sparse`, at no cost in memory."""
    header = struct.pack("<BI", 1, len(frame))
    flags = 2 | 2 << 2 | 0x40  # gaps and steps of 8 bits, gaps in a frame
    sparse = b"\0" + varint(size) + bytes([0, flags]) + varint(len(frame)) + bytes(-(-size // 8)) + frame + bytes(size)
    out, base = np.zeros(size, np.uint8), np.zeros(size, np.uint8)

    def attempt() -> None:
        for number, encoded in ((codec.ZSTD, header + frame), (codec.SPARSE, sparse)):
            with pytest.raises(error):
                codec.decode_block(number, encoded, out, base, dtype="U8")

    assert peak_bytes(attempt) < MIB


def test_a_frame_that_declares_more_than_belongs_there_is_refused_before_it_is_opened() -> None:
    refuse(bomb(256 * MIB), 20_000, LimitExceeded)
    refuse(bomb(20_001), 20_000, LimitExceeded)


def test_a_frame_that_declares_less_is_refused() -> None:
    refuse(bomb(19_999), 20_000, MalformedRecord)


def test_a_frame_without_a_declared_size_is_refused() -> None:
    silent = zstandard.ZstdCompressor(level=1, write_content_size=False)
    for size in (20_000, 64 * MIB):
        refuse(silent.compress(bytes(size)), 20_000, MalformedRecord)


def test_a_frame_that_lies_about_its_size_is_refused() -> None:
    for held in (19_000, 21_000, 60_000):
        frame = bytearray(bomb(held))
        assert struct.unpack_from("<H", frame, 5)[0] == held - 256  # where this format keeps a size below 64 KiB
        struct.pack_into("<H", frame, 5, 20_000 - 256)
        refuse(bytes(frame), 20_000, MalformedRecord)


def test_two_frames_in_the_place_of_one_are_refused() -> None:
    refuse(bomb(20_000) + bomb(20_000), 20_000, MalformedRecord)
    refuse(bomb(20_000) + b"x", 20_000, MalformedRecord)


def test_claimed_counts_allocate_nothing() -> None:
    out = np.zeros(LIMITS.block_bytes, np.uint8)
    claims = [
        bytes([0, 0x80, 0x80, 0x80, 0x04, 3, 2, 0, 0]),
        bytes([0, 0x80, 0x80, 0x80, 0x01, 0, 0xFF]),
        b"\1" + b"\xff" * 4,
        b"\3" + b"\xff" * 60,
    ]

    def attempt() -> None:
        for encoded in claims:
            for number in (codec.ZSTD, codec.SPARSE):
                with pytest.raises(REFUSALS):
                    codec.decode_block(number, encoded, out, out, dtype="BF16")

    assert peak_bytes(attempt) < 64 * KIB


def test_a_block_with_more_changes_than_elements_allocates_nothing() -> None:
    out = np.zeros(200, np.uint8)
    encoded = b"\0\x80\x80\x80\x08" + bytes(5) + bytes(40 * MIB)  # 16 Mi changes, all there

    def attempt() -> None:
        with pytest.raises(MalformedRecord, match="16777216 changes of 100"):
            codec.decode_block(codec.SPARSE, encoded, out, out, dtype="BF16")

    assert peak_bytes(attempt) < 64 * KIB


def test_the_densest_acceptable_block_needs_bounded_memory() -> None:
    count = MIB
    encoded = bytes([0, 0x80, 0x80, 0x40, 0, 2 | 2 << 2]) + bytes(count // 8) + bytes(2 * count)  # every element, +1
    out, base = np.zeros(count, np.uint8), noise(count)
    peak = peak_bytes(lambda: codec.decode_block(codec.SPARSE, encoded, out, base, dtype="U8"))
    assert np.array_equal(out, base + 1) and peak < 40 * count
