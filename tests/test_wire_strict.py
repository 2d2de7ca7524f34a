"""What a record must not be: another shape, type or range, a bomb. Golden bytes are in test_wire.py."""

from __future__ import annotations

import struct
import time
import tracemalloc
from dataclasses import replace
from typing import Any

import msgpack
import pytest
from refleet.common import wire
from refleet.common.errors import LimitExceeded, MalformedRecord
from refleet.common.limits import LIMITS
from refleet.common.messages import Ack, Failure, Lease, Offer
from refleet.common.types import Block, DeltaTensor, Index, TensorSpec
from test_wire import GOLDEN, RECORDS, B, N, P, a, b, c


def items(name: str) -> list[Any]:
    """The golden record as plain lists, to be spoiled."""
    found: list[Any] = msgpack.unpackb(bytes.fromhex(GOLDEN[name]))
    return found


def refused(data: bytes, name: str, match: str) -> None:
    with pytest.raises(MalformedRecord, match=match):
        wire.unpack(data, type(RECORDS[name]))


@pytest.mark.parametrize("name", RECORDS)
def test_a_truncated_record_is_refused_at_every_byte(name: str) -> None:
    data = bytes.fromhex(GOLDEN[name])
    for size in range(len(data)):
        refused(data[:size], name, "ends early")


@pytest.mark.parametrize("name", RECORDS)
def test_trailing_bytes_are_refused(name: str) -> None:
    refused(bytes.fromhex(GOLDEN[name]) + b"\0", name, "1 bytes too many")


@pytest.mark.parametrize("name", RECORDS)
def test_a_missing_or_extra_field_is_refused(name: str) -> None:
    refused(msgpack.packb(items(name)[:-1]), name, "fields, not")
    refused(msgpack.packb([*items(name), None]), name, "fields, not")


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_of_another_kind_is_refused(name: str) -> None:
    other = Offer if RECORDS[name].__class__ is not Offer else Lease
    with pytest.raises(MalformedRecord, match="expected a record"):
        wire.unpack(bytes.fromhex(GOLDEN[name]), other)


@pytest.mark.parametrize("found", [0, 1, 2, 255, True, 3.0, "3", None], ids=repr)
def test_another_format_is_refused_and_says_what_to_do(found: object) -> None:
    tag, _, *rest = items("offer")
    with pytest.raises(MalformedRecord, match="format") as caught:
        wire.unpack(msgpack.packb([tag, found, *rest]), Offer)
    assert "same refleet version" in caught.value.next


SPOILED: list[tuple[str, list[int], Any, str]] = [
    ("release", [4], True, "epoch: expected int, found bool"),
    ("release", [4], 3.0, "epoch: expected int, found float"),
    ("release", [4], "3", "epoch: expected int, found str"),
    ("release", [4], None, "epoch: expected int, found NoneType"),
    ("release", [4], 0, "order"),
    ("release", [5], 1 << 63, "order"),
    ("release", [5], -1, "order"),
    ("release", [2], "Chat", "model name"),
    ("release", [2], "chat\n", "model name"),
    ("release", [3], "store", "publisher id"),
    ("release", [6], "delete", "kind"),
    ("release", [7], "../v17", "version id"),
    ("release", [8], B, "fingerprint: expected bytes, found str"),
    ("release", [8], b[:-1], "32 bytes"),
    ("release", [9], b"", "32 bytes"),
    ("release", [10], [P, None, a, 1, 1000, 1, 200, c, "stream"], "payload of another version"),
    ("release", [10], P, "payload: unreadable"),
    ("release", [11], -1, "negative count"),
    ("release", [15], -1, "time"),
    ("release", [15], 1 << 60, "time"),
    ("release", [16], b"text", "message: expected str, found bytes"),
    ("release", [16], "x" * 4097, "too long"),
    ("release", [16], msgpack.ExtType(5, b"x"), "message: unreadable"),
    ("release", [16], msgpack.Timestamp(1), "message: unreadable"),
    ("payload", [2], P.upper(), "payload id"),
    ("payload", [6], -5, "body chunks"),
    ("payload", [5], 1001, "body chunks"),
    ("payload", [6], 1 << 40, "body chunks"),
    ("payload", [8], LIMITS.index_bytes + 1, "index of"),
    ("payload", [7], 0, "index chunks"),
    ("index", [4, 0, 0, 1], "F4", "dtype"),
    ("index", [4, 0, 0, 2, 0], -1, "size -1"),
    ("index", [4, 0, 0, 2, 0], True, "tensors: spec: shape: expected int, found bool"),
    ("index", [4, 0, 0, 2], [0, (1 << 64) - 1], "size 18446744073709551615"),
    ("index", [4, 0, 0, 2], [1] * 17, "more than 16 dims"),
    ("index", [4, 0, 0, 2], [1 << 40] * 2, "bytes"),
    ("index", [4, 0, 0, 0], "z", "sorted and unique"),
    ("index", [4, 0, 0, 0], "zz", "sorted and unique"),
    ("index", [4, 0, 2], 1, "expected bool, found int"),
    ("index", [4, 1, 2], True, "carried True"),
    ("index", [5, 0, 2], 1200 + LIMITS.preface_bytes + 1, "a block of"),
    ("index", [5, 0, 2], -1, "a block of -1"),
    ("index", [5, 0, 1], LIMITS.block_bytes + 1, "a block of 16777217"),
    ("index", [5], [[2, 1200, 35], [2, 1200, 35]], "more blocks"),
    ("index", [5], [[2, 1198, 70]], "do not fit"),
    ("index", [5], [[2, 1199, 69], [2, 1, 1]], "cuts a BF16 element"),
    ("index", [6], 0, "chunk size"),
    ("index", [7], 71, "add up to"),
    ("index", [8, 0], b"", "32 bytes"),
    ("index", [8], [b], "1 chunk digests"),
    ("manifest", [2, 0, 0, 0], "z", "sorted and unique"),
    ("manifest", [2, 0, 0, 0], "layer.0.weight", "sorted and unique"),
    ("manifest", [2, 0, 0, 0], "../etc", "'..'"),
    ("manifest", [2, 0, 0, 0], "", "empty name"),
    ("manifest", [2], {"b": 1}, "tensors: unreadable"),
    ("ack", [2], "gpu 1", "worker id"),
    ("ack", [7], 6, "no Evidence 6"),
    ("ack", [7], True, "no Evidence True"),
    ("ack", [7], -1, "no Evidence -1"),
    ("ack", [12], {"fetch": 1}, "expected float, found int"),
    ("ack", [12], {"fetch": float("nan")}, "not a finite number"),
    ("ack", [12], {"fetch": float("-inf")}, "not a finite number"),
    ("ack", [12], {b"fetch": 1.0}, "expected str, found bytes"),
    ("ack", [12], {1: 1.0}, "expected str, found int"),
    ("ack", [12], [], "timings_ms: unreadable"),
    ("ack", [15, 1], 1, "verified: ok: expected bool, found int"),
    ("status", [12], [a] * 17, "held versions"),
    ("status", [13, 1], [c] * 1025, "lacking"),
    ("status", [13, 2], ["x"], "payload id"),
    ("status", [19], float("nan"), "not a finite number"),
    ("status", [19], 0.0, "heartbeat"),
    ("status", [19], 1e9, "heartbeat"),
    ("release", [10, 0], P.upper(), "^record 'release': payload: PayloadRef: payload id"),
    ("payload", [3], b"", "base fingerprint"),
    ("payload", [4], b"", "target fingerprint"),
    ("payload", [9], b"", "index digest"),
    ("offer", [2], "", "model name"),
    ("offer", [3], "", "publisher id"),
    ("offer", [4], 0, "epoch 0"),
    ("verify request", [2], "", "model name"),
    ("verify request", [3], N.upper(), "nonce"),
    ("verify request", [4], -1, "time"),
    ("verify request", [5], 1, "deep: expected bool"),
    ("release", [17], 1, "restructure: expected bool"),
    ("index", [9], ["b", "a"], "sorted and unique"),
    ("index", [2], None, "builds on no base"),
    ("ack", [3], "", "model name"),
    ("ack", [5], -1, "order"),
    ("ack", [6], "", "version id"),
    ("ack", [8], b"", "fingerprint"),
    ("ack", [9], "", "version id"),
    ("ack", [11], -1, "negative count"),
    ("ack", [13], b"", "probe digest"),
    ("ack", [15, 0], "", "nonce"),
    ("ack", [15, 2], -1, "negative count"),
    ("ack", [15, 4], b"", "engine digest"),
    ("ack", [15, 5], "n" * (LIMITS.message_bytes + 1), "note too long"),
    ("ack", [16], "n" * (LIMITS.message_bytes + 1), "account of the apply too long"),
    ("status", [2], "", "worker id"),
    ("status", [4], "", "model name"),
    ("status", [6, 0], "", "serving: Serving: version id"),
    ("status", [7, 1], -1, "target: Serving: order"),
    ("status", [7, 3], b"", "fingerprint"),
    ("status", [10], -1, "negative count"),
    ("status", [11], -1, "negative count"),
    ("status", [15], -1, "negative count"),
    ("status", [12], [b""], "fingerprint of a held version"),
    ("status", [13, 0], b"", "target fingerprint"),
    ("status", [13, 1], [b""], "digest of a tensor"),
    ("status", [14], -1, "order"),
    ("status", [20], -1, "time"),
    ("lease", [3], 1 << 63, "order"),
    ("signed envelope", [2], b"short", "8 bytes"),
    ("signed envelope", [3], b"short", "64 bytes"),
    ("signed envelope", [3], None, "without signature"),
]


@pytest.mark.parametrize(("name", "path", "value", "match"), SPOILED)
def test_a_field_of_the_wrong_type_or_range_is_refused_by_name(
    name: str, path: list[int], value: object, match: str
) -> None:
    spoiled = items(name)
    at = spoiled
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    refused(msgpack.packb(spoiled), name, match)


def test_a_map_key_given_twice_is_refused() -> None:
    once = bytes.fromhex(GOLDEN["ack"])
    refused(once.replace(b"\xa5refit", b"\xa5fetch"), "ack", "'fetch' twice")


def test_text_that_is_not_utf8_is_refused() -> None:
    for bad in (b"\xff\xff", b"\xed\xa0\x80", b"\xc0\x80"):  # junk, a lone surrogate, an overlong NUL
        data = bytes.fromhex(GOLDEN["lease"]).replace(b"\xa6host-1", bytes([0xA0 + len(bad)]) + bad)
        refused(data, "lease", "host: unreadable")


def test_more_bytes_than_the_limit_are_refused_unread() -> None:
    data = bytes.fromhex(GOLDEN["offer"])
    assert wire.unpack(data, Offer, max_bytes=len(data)) == RECORDS["offer"]
    with pytest.raises(LimitExceeded, match=f"{len(data)} bytes exceeds the limit of {len(data) - 1}"):
        wire.unpack(data, Offer, max_bytes=len(data) - 1)
    with pytest.raises(LimitExceeded):
        wire.unpack(bytes(LIMITS.record_bytes + 1), Offer)


def count(code: int, declared: int) -> bytes:
    """Header of an array, map, text or binary of `declared` items."""
    return struct.pack(">BI", code, declared)


ARRAY, MAP, TEXT, BINARY, EXTENSION = 0xDD, 0xDF, 0xDB, 0xC6, 0xC9
HUGE = (1 << 32) - 1
INDEX_START = msgpack.packb(["index", 1, None, a]).replace(b"\x94", b"\x98", 1)  # the list of tensors comes next
MANY = 1 << 20
BOMBS = {
    "nothing": b"",
    "a huge array": count(ARRAY, HUGE),
    "a huge map": count(MAP, HUGE),
    "a huge text": count(TEXT, HUGE) + b"x",
    "huge tensors": INDEX_START + count(ARRAY, HUGE),
    "huge tensors, nested": INDEX_START + count(ARRAY, HUGE) * 2000,
    "a huge tag": b"\x92" + count(TEXT, HUGE),
    "a huge extension": b"\x92" + count(EXTENSION, HUGE) + b"\5",
    "a huge binary": b"\x98" + msgpack.packb("index") + b"\1\xc0" + count(BINARY, HUGE),
    "arrays that promise each other": count(ARRAY, MANY) * 1000 + bytes(MANY),
    "deep arrays": b"\x91" * 100_000 + b"\xc0",
    "deep arrays as the tag": b"\x92" + b"\x91" * 900 + b"\1\1",
    "deep arrays as the format": b"\x92" + msgpack.packb("index") + b"\x91" * 900 + b"\1",
    "deep arrays as tensors": INDEX_START + b"\x91" * 100_000,
    "deep maps": b"\x81\xa1a" * 100_000 + b"\xc0",
    "a million empty arrays": count(ARRAY, MANY) + b"\x90" * MANY,
    "a million empty arrays as the tag": b"\x92" + count(ARRAY, MANY) + b"\x90" * MANY + b"\1",
    "a million empty arrays as tensors": INDEX_START + count(ARRAY, MANY) + b"\x90" * MANY,
    "a million empty maps as the base": INDEX_START[:8] + count(ARRAY, MANY) + b"\x80" * MANY,
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_without_allocating_more_than_its_own_size(name: str) -> None:
    data = BOMBS[name]
    tracemalloc.start()
    try:
        with pytest.raises(MalformedRecord):
            wire.unpack(data, Index, max_bytes=LIMITS.index_bytes)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 2 * len(data) + (1 << 18)


def test_a_value_that_no_reader_would_take_is_not_packed() -> None:
    ack = RECORDS["smallest ack"]
    assert isinstance(ack, Ack)
    for field in ({"epoch": True}, {"fingerprint": bytearray(32)}, {"engine_build": None}, {"payload_bytes": 1.0}):
        with pytest.raises(TypeError, match="expected"):
            wire.pack(replace(ack, **field))
    for field in ({"timings_ms": {"fetch": float("nan")}}, {"evidence": 9}):
        with pytest.raises(ValueError, match=r"nan|9"):
            wire.pack(replace(ack, **field))


def test_whole_numbers_in_a_float_field_travel_as_floats() -> None:
    status = replace(RECORDS["status"], heartbeat_s=2)
    assert wire.pack(status).hex() == GOLDEN["status"]


def test_equal_maps_give_equal_bytes_whatever_their_order() -> None:
    ack = RECORDS["ack"]
    turned = replace(ack, timings_ms=dict(reversed(ack.timings_ms.items())))
    assert wire.pack(turned).hex() == GOLDEN["ack"]


def test_a_file_name_that_is_not_utf8_does_not_stop_an_ack() -> None:
    failure = Failure("UnreadableCheckpoint", "no file \udcff.bin", None)
    found = wire.unpack(wire.pack(replace(RECORDS["smallest ack"], failure=failure)), Ack)
    assert found.failure == replace(failure, what="no file \\udcff.bin")


def test_an_index_of_as_many_tensors_as_allowed_unpacks_in_seconds() -> None:
    names = (f"model.layers.{n:06d}.weight" for n in range(LIMITS.tensors))
    tensors = tuple(DeltaTensor(TensorSpec(name, "BF16", (4096, 4096)), c, True, False) for name in names)
    blocks = (Block(1, LIMITS.block_bytes, 50),) * (2 * LIMITS.tensors)
    index = Index(None, b, tensors, blocks, LIMITS.chunk_bytes, 100 * len(tensors), (c,) * 3, ())
    data = wire.pack(index)
    assert len(data) < LIMITS.index_bytes
    start = time.process_time()
    found = wire.unpack(data, Index, max_bytes=LIMITS.index_bytes)
    assert time.process_time() - start < 10
    assert found == index
