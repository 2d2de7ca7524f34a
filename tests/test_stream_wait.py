"""Chunks that are not there yet: a reader waits for them, within a bound, at the cost of one round trip."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from carriers import PAYLOAD, TTL_S, Carrier
from refleet.common.errors import LimitExceeded, StreamError, StreamGap, StreamUnavailable
from refleet.common.redis_stream import RedisStream
from refleet.common.types import STREAM
from scripted_server import ScriptedServer
from servers import Server

Until = Callable[..., None]
Connect = Callable[..., RedisStream]


def test_a_chunk_is_received_when_it_comes(carrier: Carrier, kind: str, until: Until) -> None:
    reading, writing = carrier.stream(), carrier.stream()
    room = memoryview(bytearray(3_000_000))
    with ThreadPoolExecutor(1) as pool, reading.payload_reader(PAYLOAD, carrier=kind) as reader:
        for number, size in enumerate((3_000_000, 0, 5000)):  # the first one also begins the payload
            coming = pool.submit(reader.read, number, room, wait_s=20)
            until(carrier.waiting, "the reader waits in the server")
            data = bytes([number + 1]) * size
            writing.put_chunk(PAYLOAD, number, data, ttl_s=TTL_S, carrier=kind)
            assert coming.result(20) == size
            assert room[:size] == data
        assert reader.read(0, room, wait_s=20) == reader.read(0, room) == 3_000_000


def test_a_chunk_that_does_not_come_is_a_gap_after_the_wait(carrier: Carrier, kind: str) -> None:
    stream, room = carrier.stream(), memoryview(bytearray(10))
    stream.put_chunk(PAYLOAD, 0, b"data", ttl_s=TTL_S, carrier=kind)
    with stream.payload_reader(PAYLOAD, carrier=kind) as reader:
        assert reader.read(0, room) == 4, "the chunk after it is asked for ahead"
        started = time.monotonic()
        with pytest.raises(StreamGap, match="lacks chunk 1: "):
            reader.read(1, room, wait_s=0.3)
        assert 0.29 < time.monotonic() - started < 10
        stream.put_chunk(PAYLOAD, 1, b"more", ttl_s=TTL_S, carrier=kind)
        assert reader.read(1, room, wait_s=20) == reader.read(1, room) == 4


def test_a_chunk_that_was_passed_over_is_not_mistaken_for_the_next_one(carrier: Carrier, kind: str) -> None:
    stream, room = carrier.stream(), memoryview(bytearray(10))
    for number in (0, 2):
        stream.put_chunk(PAYLOAD, number, b"data", ttl_s=TTL_S, carrier=kind)
    with stream.payload_reader(PAYLOAD, carrier=kind) as reader:
        with pytest.raises(StreamGap, match="lacks chunk 1: "):
            reader.read(1, room, wait_s=0.1)
        assert reader.read(2, room, wait_s=20) == 4


def test_a_chunk_larger_than_the_buffer_is_refused_and_the_next_one_is_right(carrier: Carrier, kind: str) -> None:
    stream, room = carrier.stream(), memoryview(bytearray(10))
    for number, data in enumerate((bytes(100_000), b"next")):
        stream.put_chunk(PAYLOAD, number, data, ttl_s=TTL_S, carrier=kind)
    with stream.payload_reader(PAYLOAD, carrier=kind) as reader:
        with pytest.raises(LimitExceeded, match="has 100000 bytes"):
            reader.read(0, room, wait_s=20)
        assert reader.read(1, room, wait_s=20) == 4 and room[:4] == b"next"


def test_closing_ends_the_wait(carrier: Carrier, kind: str, until: Until) -> None:
    stream = carrier.stream()
    with ThreadPoolExecutor(1) as pool:
        reader = stream.payload_reader(PAYLOAD, carrier=kind)
        waiting = pool.submit(reader.read, 0, memoryview(bytearray(10)), wait_s=8)
        until(carrier.waiting, "the reader waits in the server")
        started = time.monotonic()
        stream.close()
        with pytest.raises(StreamUnavailable, match="was closed"):
            waiting.result(20)
        assert time.monotonic() - started < 5


def test_a_wait_costs_one_request(new_server: Callable[..., Server], connect: Connect, kind: str) -> None:
    server = new_server()
    with connect(server.url).payload_reader(PAYLOAD, carrier=kind) as reader, server.client() as client:
        with pytest.raises(StreamGap):
            reader.read(0, memoryview(bytearray(10)), wait_s=1)
        assert client.info("commandstats")["cmdstat_xread"]["calls"] == 1


def test_a_wait_ends_before_the_server_counts_as_lost(server: Server, model: str, connect: Connect, kind: str) -> None:
    stream = connect(server.url, model, timeout_s=0.6)
    with stream.payload_reader(PAYLOAD, carrier=kind) as reader, pytest.raises(StreamGap):
        reader.read(0, memoryview(bytearray(10)), wait_s=20)


def test_a_string_whose_entry_is_not_there_yet_is_not_taken(valkey: Server, model: str, connect: Connect) -> None:
    stream, room = connect(valkey.url, model), memoryview(bytearray(10))
    with valkey.client() as client, stream.payload_reader(PAYLOAD, carrier="blobs") as reader:
        client.set(f"refleet:{{{model}:{PAYLOAD}}}:blob:0", b"left by a crash", px=20_000)
        with pytest.raises(StreamGap):
            reader.read(0, room, wait_s=0.1)
        stream.put_chunk(PAYLOAD, 0, b"data", ttl_s=TTL_S, carrier="blobs")
        assert reader.read(0, room, wait_s=20) == 4 and room[:4] == b"data"


KEY = f"refleet:{{m:{PAYLOAD}}}:chunks".encode()
HEAD = b"*1\r\n*2\r\n$%d\r\n%b\r\n*1\r\n*2\r\n$3\r\n1-0\r\n*2\r\n" % (len(KEY), KEY)
LIES = {
    "another key": HEAD.replace(b":chunks", b":blob:0") + b"$1\r\nc\r\n$4\r\ndata\r\n",
    "two streams": b"*2" + HEAD[2:] + b"$1\r\nc\r\n$4\r\ndata\r\n",
    "another field": HEAD + b"$1\r\nr\r\n$4\r\ndata\r\n",
    "no list": b":1\r\n",
    "a nil string": b"$-1\r\n",
}


@pytest.mark.parametrize("lie", LIES)
def test_a_reply_that_no_server_gives_is_an_error(connect: Connect, lie: str) -> None:
    with ScriptedServer(LIES[lie]) as server:
        reader = connect(server.url, "m").payload_reader(PAYLOAD, carrier=STREAM)
        with pytest.raises(StreamError, match="was due"):
            reader.read(0, memoryview(bytearray(10)), wait_s=1)
