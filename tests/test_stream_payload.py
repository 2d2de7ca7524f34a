"""Payloads, under one contract for both ways in which they may lie in every form of `Stream`."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from carriers import PAYLOAD, TTL_S, Carrier
from refleet.common.errors import LimitExceeded, StreamError, StreamGap, StreamUnavailable, UsageError

Until = Callable[..., None]


def test_chunks_come_back_as_they_were_written(carrier: Carrier, kind: str) -> None:
    stream = carrier.stream()
    assert stream.payload_chunks(PAYLOAD) == 0
    large = np.random.default_rng(1).integers(0, 2**32, 1 << 18, np.uint32)
    written = [large, b"", memoryview(b"view"), bytearray(b"array")]
    for number, data in enumerate(written):
        stream.put_chunk(PAYLOAD, number, data, ttl_s=TTL_S, carrier=kind)
    assert stream.payload_chunks(PAYLOAD) == 4
    assert stream.chunks(PAYLOAD, 0, 2, carrier=kind) == [large.tobytes(), b""]
    assert stream.chunks(PAYLOAD, 2, 2, carrier=kind) == [b"view", b"array"]
    assert stream.chunks(PAYLOAD, 2, 0, carrier=kind) == []


def test_missing_chunks_are_named(carrier: Carrier, kind: str) -> None:
    stream = carrier.stream()
    with pytest.raises(StreamGap, match="lacks chunk 0, 1: "):
        stream.chunks(PAYLOAD, 0, 2, carrier=kind)
    for number in (0, 2):
        stream.put_chunk(PAYLOAD, number, b"data", ttl_s=TTL_S, carrier=kind)
    with pytest.raises(StreamGap, match="lacks chunk 1, 3: "):
        stream.chunks(PAYLOAD, 0, 4, carrier=kind)
    assert stream.chunks(PAYLOAD, 2, 1, carrier=kind) == [b"data"]


def test_a_resent_chunk_is_there_once_and_another_one_is_refused(carrier: Carrier, kind: str) -> None:
    stream = carrier.stream()
    for number, data in ((0, b"one"), (1, b"two"), (0, b"one"), (1, b"two")):
        stream.put_chunk(PAYLOAD, number, data, ttl_s=TTL_S, carrier=kind)
    for number in (0, 1):
        with pytest.raises(StreamError, match=f"chunk {number} of payload {PAYLOAD} is already there with other bytes"):
            stream.put_chunk(PAYLOAD, number, b"forged", ttl_s=TTL_S, carrier=kind)
    assert stream.chunks(PAYLOAD, 0, 2, carrier=kind) == [b"one", b"two"] and stream.payload_chunks(PAYLOAD) == 2


def test_a_chunk_that_was_passed_over_is_refused(carrier: Carrier, kind: str) -> None:
    stream = carrier.stream()
    stream.put_chunk(PAYLOAD, 0, b"zero", ttl_s=TTL_S, carrier=kind)
    stream.put_chunk(PAYLOAD, 2, b"two", ttl_s=TTL_S, carrier=kind)
    with pytest.raises(StreamError, match=r"chunk 1 .* was passed over"):
        stream.put_chunk(PAYLOAD, 1, b"one", ttl_s=TTL_S, carrier=kind)


def test_a_payload_whose_first_chunks_were_lost_is_not_continued(carrier: Carrier, kind: str) -> None:
    stream = carrier.stream()
    for number in (0, 1):
        stream.put_chunk(PAYLOAD, number, b"data", ttl_s=TTL_S, carrier=kind)
    carrier.lose()
    with pytest.raises(StreamGap, match="lacks chunk 0, 1: "):
        stream.put_chunk(PAYLOAD, 2, b"data", ttl_s=TTL_S, carrier=kind)
    assert stream.payload_chunks(PAYLOAD) == 0
    stream.put_chunk(PAYLOAD, 0, b"again", ttl_s=TTL_S, carrier=kind)
    assert stream.chunks(PAYLOAD, 0, 1, carrier=kind) == [b"again"]


def test_a_payload_expires_as_a_whole_unless_it_is_kept(carrier: Carrier, kind: str, until: Until) -> None:
    stream = carrier.stream()
    kept, written_on, left = (digit * 32 for digit in "abc")
    for payload in (kept, written_on, left):
        stream.put_chunk(payload, 0, b"data", ttl_s=0.3, carrier=kind)
    stream.keep_payload(kept, ttl_s=TTL_S)
    stream.put_chunk(written_on, 1, b"more", ttl_s=TTL_S, carrier=kind)
    until(lambda: stream.payload_chunks(left) == 0, "the payload expired")
    assert stream.chunks(kept, 0, 1, carrier=kind) == [b"data"]
    assert stream.chunks(written_on, 0, 2, carrier=kind) == [b"data", b"more"]
    stream.keep_payload(left, ttl_s=TTL_S)
    assert stream.payload_chunks(left) == 0


def test_a_dropped_payload_is_gone_and_others_stay(carrier: Carrier, kind: str) -> None:
    stream = carrier.stream()
    for payload in ("a" * 32, "b" * 32):
        stream.put_chunk(payload, 0, b"data", ttl_s=TTL_S, carrier=kind)
    stream.drop_payload("a" * 32)
    assert (stream.payload_chunks("a" * 32), stream.payload_chunks("b" * 32)) == (0, 1)


# ---------------------------------------------------------------------- read into the caller's memory


def test_a_reader_fills_the_buffer_it_is_given_and_nothing_behind_it(carrier: Carrier, kind: str) -> None:
    stream = carrier.stream()
    rng = np.random.default_rng(2)
    # around the sizes at which a chunk comes with the control bytes, in part, or directly
    sizes = [0, 1, 2047, 2048, 4000, 4090, 4096, 4097, 8191, 100_000, 3_000_000]
    chunks = [rng.bytes(size) for size in sizes]
    for number, data in enumerate(chunks):
        stream.put_chunk(PAYLOAD, number, data, ttl_s=TTL_S, carrier=kind)
    room = bytearray(b"*" * 3_000_100)
    with stream.payload_reader(PAYLOAD, range(len(chunks)), carrier=kind) as reader:
        for number, data in enumerate(chunks):
            room[:] = b"*" * len(room)
            assert reader.read(number, memoryview(room)) == len(data)
            assert room[: len(data)] == data and set(room[len(data) :]) == {ord("*")}
    exact = np.zeros(100_000, np.uint8)
    assert stream.read_chunk(PAYLOAD, 9, exact.data, carrier=kind) == 100_000
    assert exact.tobytes() == chunks[9]


@pytest.mark.parametrize("plan", [None, [0, 1, 2, 3], [3, 1], []])
def test_chunks_may_be_read_in_any_order_and_again(carrier: Carrier, kind: str, plan: list[int] | None) -> None:
    stream = carrier.stream()
    for number in range(4):
        stream.put_chunk(PAYLOAD, number, bytes([number]) * 5000, ttl_s=TTL_S, carrier=kind)
    room = memoryview(bytearray(5000))
    with stream.payload_reader(PAYLOAD, plan, carrier=kind) as reader:
        for number in (0, 1, 1, 3, 0, 2, 3, 3, 1):
            assert reader.read(number, room) == 5000
            assert bytes(room) == bytes([number]) * 5000
    assert stream.chunks(PAYLOAD, 1, 1, carrier=kind) == [b"\1" * 5000]


def test_a_reader_says_which_chunk_is_gone_and_goes_on(carrier: Carrier, kind: str) -> None:
    stream = carrier.stream()
    stream.put_chunk(PAYLOAD, 0, b"data", ttl_s=TTL_S, carrier=kind)
    room = memoryview(bytearray(10))
    with stream.payload_reader(PAYLOAD, carrier=kind) as reader:
        for _ in range(2):
            with pytest.raises(StreamGap, match=f"payload {PAYLOAD} lacks chunk 1: "):
                reader.read(1, room)
            assert reader.read(0, room) == 4
    stream.drop_payload(PAYLOAD)
    with pytest.raises(StreamGap, match="lacks chunk 0: "):
        stream.read_chunk(PAYLOAD, 0, room, carrier=kind)


@pytest.mark.parametrize("size", [11, 5000, 3_000_000])
def test_a_chunk_larger_than_the_buffer_is_refused_and_the_next_one_is_right(
    carrier: Carrier, kind: str, size: int
) -> None:
    stream = carrier.stream()
    for number, data in enumerate((bytes(size), b"next")):
        stream.put_chunk(PAYLOAD, number, data, ttl_s=TTL_S, carrier=kind)
    room = bytearray(b"*" * 20)
    with stream.payload_reader(PAYLOAD, carrier=kind) as reader:
        with pytest.raises(LimitExceeded, match=f"chunk 0 of .* has {size} bytes, its reader expects at most 10"):
            reader.read(0, memoryview(room)[:10])
        assert set(room[10:]) == {ord("*")}, "nothing behind the buffer is touched"
        assert reader.read(1, memoryview(room)) == 4
        assert room[:4] == b"next"


def test_readers_of_several_threads_do_not_mix(carrier: Carrier, kind: str) -> None:
    stream = carrier.stream()
    payloads = [digit * 32 for digit in "abcd"]
    for payload in payloads:
        for number in range(8):
            data = (payload[0].encode() + bytes([number])) * 20_000
            stream.put_chunk(payload, number, data, ttl_s=TTL_S, carrier=kind)

    def read_all(payload: str) -> bool:
        room = bytearray(40_000)
        for _ in range(5):
            with stream.payload_reader(payload, range(8), carrier=kind) as reader:
                for number in range(8):
                    assert reader.read(number, memoryview(room)) == 40_000
                    assert room == (payload[0].encode() + bytes([number])) * 20_000
        return True

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(read_all, payloads))


def test_a_closed_stream_reads_nothing(carrier: Carrier, kind: str) -> None:
    stream = carrier.stream()
    stream.put_chunk(PAYLOAD, 0, b"data", ttl_s=TTL_S, carrier=kind)
    room = memoryview(bytearray(10))
    with stream.payload_reader(PAYLOAD, carrier=kind) as reader:
        assert reader.read(0, room) == 4
        stream.close()
        with pytest.raises(StreamUnavailable, match="was closed"):
            reader.read(0, room)


@pytest.mark.parametrize("name", ["", "a:b", "../a", "é"])
def test_a_reader_of_no_payload_is_refused(carrier: Carrier, kind: str, name: str) -> None:
    with pytest.raises(UsageError, match="payload id"):
        carrier.stream().payload_reader(name, carrier=kind)
