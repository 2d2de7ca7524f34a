"""The header parser: what is refused and how it says so, and that no bytes can bring it out of step."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from refleet.common.errors import LimitExceeded, UnreadableCheckpoint
from refleet.common.limits import LIMITS
from refleet.common.types import DTYPE_BYTES
from refleet.publisher.safetensors_header import PREFIX_BYTES, Place, header_bytes, parse_header

PATH = Path("/ckpt/model.safetensors")
TWO = {
    "a": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]},
    "b": {"dtype": "F32", "shape": [], "data_offsets": [12, 16]},
}


def file_of(header: object, data: bytes = bytes(16)) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def parse(file: bytes, path: Path = PATH) -> dict[str, Place]:
    size = header_bytes(file[:PREFIX_BYTES], file_bytes=len(file), path=path)
    return parse_header(file[8 : 8 + size], file_bytes=len(file), path=path)


def with_a(**facts: object) -> Mapping[str, object]:
    return TWO | {"a": TWO["a"] | facts}


def test_a_header_gives_every_tensor_its_place_in_the_file() -> None:
    file = file_of(TWO | {"__metadata__": {"format": "pt"}})
    places = parse(file)
    assert [str(place.spec) for place in places.values()] == ["a BF16[2, 3]", "b F32[]"]
    assert places["a"].offset == len(file) - 16
    assert places["b"].offset == len(file) - 4


def test_zero_size_tensors_and_padding_after_the_header_are_fine() -> None:
    empty = {"dtype": "I64", "shape": [0, 4], "data_offsets": [12, 12]}
    assert parse(file_of(json.dumps(TWO | {"z": empty}).encode() + b"   "))["z"].spec.size_bytes == 0


A = b'"a": {"dtype": "U8", "shape": [16], "data_offsets": [0, 16]}'


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (with_a(data_offsets=[0, 10]), "a BF16[2, 3] needs 12 bytes, the header gives it 10"),
        (with_a(shape=[2, 4]), "a BF16[2, 4] needs 16 bytes, the header gives it 12"),
        (with_a(shape=[6.0]), "'a' has a shape that is not a list of sizes"),
        (with_a(shape=[True, 6]), "'a' has a shape that is not a list of sizes"),
        (with_a(shape=[-2, -3]), "'a' has a shape that is not a list of sizes"),
        (with_a(shape=[1 << 60, 0]), "'a' has a shape that is not a list of sizes"),
        (with_a(shape="6"), "'a' has a shape that is not a list of sizes"),
        (with_a(dtype="F4"), "'a' has dtype 'F4', which is not supported"),
        (with_a(dtype=["BF16"]), "'a' has dtype \"['BF16']\", which is not supported"),
        (with_a(data_offsets=[12, 0]), "'a' has data_offsets that are not a begin and an end"),
        (with_a(data_offsets=[0, 12, 16]), "'a' has data_offsets that are not a begin and an end"),
        (with_a(data_offsets=[False, 12]), "'a' has data_offsets that are not a begin and an end"),
        (with_a(strides=[1]), "'a' must have exactly dtype, shape and data_offsets"),
        ({"a": 5}, "'a' must have exactly dtype, shape and data_offsets"),
        (TWO | {"b": TWO["a"]}, "b BF16[2, 3] overlaps the tensor before it: it begins at 0, not at 12"),
        ({"b": TWO["b"]}, "b F32[] leaves a gap before it: it begins at 12, not at 0"),
        ({"a": TWO["a"]}, "16 bytes of tensors, but its header describes 12"),
        (TWO | {"a..b": TWO["b"]}, "a name with '..'"),
        (TWO | {"": TWO["b"]}, "the empty name"),
        (TWO | {"\ud800": TWO["b"]}, "not valid Unicode"),
        (TWO | {"__metadata__": {"epoch": 3}}, "__metadata__ in the header holds int at 'epoch', not text"),
        (TWO | {"__metadata__": None}, "__metadata__ in the header is not an object of strings"),
        (TWO | {"__metadata__": {"x": "\udfff"}}, "__metadata__ in the header is not valid Unicode"),
        (b"{" + A + b"," + A + b"}", "the key 'a' more than once"),
        (b'{"a": {"dtype": "U8", "dtype": "I8", "shape": [16], "data_offsets": [0, 16]}}', "key 'dtype' more than"),
        (b'{"a": {"dtype": "U8", "shape": [NaN]}}', "NaN is not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b'{"\xff": 1}', "is not JSON"),
        (b"{" + A + b"} trailing", "is not JSON"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"a":' + b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_wrong_header_is_refused_with_what_where_and_which_tensor(header: object, says: str) -> None:
    with pytest.raises(UnreadableCheckpoint) as caught:
        parse(file_of(header))
    assert says in caught.value.what
    assert caught.value.about == str(PATH)
    assert caught.value.next
    if "'a'" in says and "key" not in says:
        assert caught.value.tensor == "a"


def test_a_file_that_is_cut_off_names_the_first_tensor_that_is_cut_and_both_sizes() -> None:
    with pytest.raises(UnreadableCheckpoint, match=r"has 13 bytes of tensors, its header describes 16; .* b F32\[\]"):
        parse(file_of(TWO, bytes(13)))
    with pytest.raises(UnreadableCheckpoint, match="its header alone takes"):
        parse(file_of(TWO)[:40])
    with pytest.raises(UnreadableCheckpoint, match="only 5 bytes"):
        parse(file_of(TWO)[:5])


@pytest.mark.parametrize("start", [b"PK\x03\x04\x00\x00\x08\x08\x00", b"\x80\x02\x8a\nl\xfc\x9cF\xf9", b"\x80\x04"])
def test_a_pickle_is_refused_by_content_with_the_way_to_convert_it(start: bytes) -> None:
    with pytest.raises(UnreadableCheckpoint, match="pickle file, which can run code") as caught:
        parse(start + bytes(1000))
    assert "weights_only=True" in caught.value.next
    assert "save_file" in caught.value.next


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".PT"])
def test_a_pickle_is_refused_by_suffix(suffix: str) -> None:
    with pytest.raises(UnreadableCheckpoint, match="pickle"):
        parse(bytes(100), PATH.with_suffix(suffix))


def test_a_header_whose_size_looks_like_a_pickle_is_still_a_header() -> None:
    raw = json.dumps(TWO).encode().ljust(0x0280)
    assert struct.pack("<Q", len(raw))[:2] == b"\x80\x02"
    assert len(parse(file_of(raw))) == 2


def test_something_else_is_called_no_safetensors_file() -> None:
    with pytest.raises(UnreadableCheckpoint, match="not a safetensors file"):
        parse(b"<!DOCTYPE html>" + bytes(100))


def test_an_oversized_header_is_refused_before_it_is_read() -> None:
    prefix = struct.pack("<Q", LIMITS.header_bytes + 1) + b"{"
    with pytest.raises(LimitExceeded, match=str(LIMITS.header_bytes)):
        header_bytes(prefix, file_bytes=1 << 40, path=PATH)


@pytest.mark.parametrize(
    "header",
    [
        with_a(shape=[1] * (LIMITS.tensor_dims + 1)),
        with_a(shape=[1 << 40, 1 << 40]),
        {str(n): {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for n in range(LIMITS.tensors + 1)},
    ],
    ids=["dimensions", "bytes", "tensors"],
)
def test_more_than_the_limits_allow_is_refused(header: object) -> None:
    with pytest.raises(LimitExceeded):
        parse(file_of(header))


@pytest.mark.parametrize("unit", [b"[],", b'{"":0},'])
def test_the_largest_header_takes_bounded_time_and_memory(unit: bytes) -> None:
    # In a process of its own, by VmHWM: tracemalloc makes this six times slower.
    code = f"""
from pathlib import Path
from refleet.common.errors import UnreadableCheckpoint
from refleet.common.limits import LIMITS
from refleet.publisher.safetensors_header import parse_header
peak_kib = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
unit = {unit!r}
raw = b'{{"a":[' + unit * ((LIMITS.header_bytes - 20) // len(unit)) + b"0]}}"
before = peak_kib()
try:
    parse_header(raw, file_bytes=len(raw) + 8, path=Path("f"))
except UnreadableCheckpoint:
    print((peak_kib() - before) * 1024 / LIMITS.header_bytes)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert float(done.stdout) < 50, done.stderr  # times the header's own size


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 20) | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """A right header for 0-4 tensors, and then, sometimes, one fact replaced by anything and some bytes changed."""
    header: dict[str, object] = {}
    position = 0
    for name in draw(st.lists(st.text(max_size=4), max_size=4, unique=True)):
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        dtype = draw(st.sampled_from(sorted(DTYPE_BYTES)))
        size = DTYPE_BYTES[dtype]
        for n in shape:
            size *= n
        facts: dict[str, object] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
        if draw(st.integers(0, 5)) == 0:
            facts[draw(st.sampled_from([*facts, "more"]))] = draw(json_values)
        header[name] = facts
        position += size
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.dictionaries(st.text(max_size=3), st.text(max_size=3)) | json_values)
    raw = bytearray(json.dumps(header, ensure_ascii=draw(st.booleans())).encode(errors="replace"))
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 4]))):
        place = draw(st.integers(0, len(raw)))
        raw[place : place + draw(st.integers(0, 2))] = draw(st.binary(max_size=2))
    extra = draw(st.sampled_from([0, 0, 0, -1, 1]))
    size_field = draw(st.sampled_from([len(raw)] * 8 + [len(raw) + 1, 0, 1 << 63]))
    return struct.pack("<Q", size_field) + bytes(raw) + bytes(max(0, position + extra))


@settings(deadline=None)
@given(headers() | st.binary(max_size=200) | st.binary(max_size=100).map(lambda raw: file_of(b"{" + raw)))
def test_any_bytes_are_a_header_that_the_library_reads_too_or_a_clear_error(file: bytes) -> None:
    try:
        places = parse(file)
    except (UnreadableCheckpoint, LimitExceeded) as error:
        assert error.what
        assert len(str(error)) < 3000
        return
    theirs = {name: (facts["dtype"], tuple(facts["shape"])) for name, facts in safetensors.deserialize(file)}
    assert {name: (place.spec.dtype, place.spec.shape) for name, place in places.items()} == theirs
