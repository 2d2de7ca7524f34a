"""The reader that receives chunks straight from the socket: what breaks, what lies, what stays silent."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from carriers import PAYLOAD, TTL_S, OnServer
from refleet.common.errors import StreamGap, StreamUnavailable
from refleet.common.limits import KIB, LIMITS, MIB
from refleet.common.redis_stream import RedisStream
from refleet.common.types import STREAM
from scripted_server import REQUEST, ScriptedServer, honest, read
from servers import Server
from tcp_proxy import Fault, TcpProxy

Until = Callable[..., None]
Connect = Callable[..., RedisStream]
SIZE = LIMITS.chunk_bytes


# ---------------------------------------------------------------------- a link that breaks


@pytest.fixture
def proxied(server: Server, model: str, connect: Connect, kind: str) -> Iterator[tuple[TcpProxy, RedisStream, bytes]]:
    """A proxy, a stream through it, and the payload's two equal chunks."""
    data = bytes(range(256)) * (SIZE // 256)
    place = OnServer(server, model)
    for number in range(2):
        place.stream().put_chunk(PAYLOAD, number, data, ttl_s=TTL_S, carrier=kind)
    with TcpProxy(server.port) as proxy:
        yield proxy, connect(proxy.url, model, timeout_s=5), data
    place.close()


@pytest.mark.parametrize("cut", [0, 1, 30, 3 * KIB, MIB, -3, -1])
def test_a_chunk_that_was_cut_off_is_never_taken_for_a_whole_one(
    proxied: tuple[TcpProxy, RedisStream, bytes], kind: str, cut: int
) -> None:
    proxy, stream, data = proxied
    buffer = bytearray(SIZE)
    with stream.payload_reader(PAYLOAD, [0], carrier=kind) as reader:
        proxy.break_next(Fault.TEAR_REPLY, REQUEST[kind], forwarded_bytes=cut % len(honest(kind, 0, data)))
        with pytest.raises(StreamUnavailable, match="can't be reached") as lost:
            reader.read(0, memoryview(buffer))
        assert "reading chunk 0" in lost.value.about
        assert reader.read(0, memoryview(buffer)) == SIZE and buffer == data, "a new connection is made"


def test_a_cut_between_two_chunks_leaves_the_first_one_whole(
    proxied: tuple[TcpProxy, RedisStream, bytes], kind: str
) -> None:
    proxy, stream, data = proxied
    buffer = bytearray(SIZE)
    proxy.break_next(Fault.TEAR_REPLY, REQUEST[kind], forwarded_bytes=len(honest(kind, 0, data)) + MIB)
    with stream.payload_reader(PAYLOAD, [0, 1], carrier=kind) as reader:
        assert reader.read(0, memoryview(buffer)) == SIZE and buffer == data
        with pytest.raises(StreamUnavailable):
            reader.read(1, memoryview(buffer))
        assert reader.read(1, memoryview(buffer)) == SIZE and buffer == data


def test_a_reply_that_never_comes_is_given_up_in_time(server: Server, connect: Connect, model: str, kind: str) -> None:
    with TcpProxy(server.port) as proxy:
        stream = connect(proxy.url, model, timeout_s=0.3)
        stream.put_chunk(PAYLOAD, 0, b"data", ttl_s=TTL_S, carrier=kind)
        proxy.break_next(Fault.HOLD_REPLY, REQUEST[kind])
        started = time.monotonic()
        with pytest.raises(StreamUnavailable, match="no answer in time"):
            read(stream, kind)
        assert 0.25 < time.monotonic() - started < 10
        assert read(stream, kind) == b"data"


def test_a_reply_that_stops_in_the_middle_is_given_up_in_time(connect: Connect, kind: str) -> None:
    whole = honest(kind, 0, bytes(MIB))
    with ScriptedServer(whole[: MIB // 2], hold=True) as server:
        started = time.monotonic()
        with pytest.raises(StreamUnavailable, match="no answer in time"):
            read(connect(server.url, timeout_s=0.3), kind, room=MIB)
        assert 0.25 < time.monotonic() - started < 10


@pytest.mark.parametrize("sent", [0, MIB // 2], ids=["before the reply", "inside the chunk"])
def test_closing_ends_the_wait_of_another_thread(connect: Connect, kind: str, sent: int) -> None:
    with ScriptedServer(honest(kind, 0, bytes(MIB))[:sent] or b"", hold=True) as server, ThreadPoolExecutor(1) as pool:
        stream = connect(server.url, timeout_s=60)
        started = time.monotonic()
        waiting = pool.submit(read, stream, kind, room=MIB)
        assert server.waiting.wait(20)
        stream.close()
        with pytest.raises(StreamUnavailable, match="was closed"):
            waiting.result(20)
        assert time.monotonic() - started < 20


def test_a_server_that_was_restarted_costs_no_read(new_server: Callable[..., Server], connect: Connect) -> None:
    server = new_server()
    stream = connect(server.url)
    stream.put_chunk(PAYLOAD, 0, b"data", ttl_s=TTL_S)
    assert read(stream, STREAM) == b"data"
    server.kill()
    with pytest.raises(StreamUnavailable, match="can't be reached"):
        read(stream, STREAM)
    server.start()
    stream.put_chunk(PAYLOAD, 0, b"data", ttl_s=TTL_S)
    assert read(stream, STREAM) == b"data"
    server.kill()
    server.start()
    with pytest.raises(StreamGap):
        read(stream, STREAM)
