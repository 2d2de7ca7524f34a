"""A server that answers what no server answers: the reader of chunks believes nothing and never waits for nothing."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable

import pytest
from refleet.common.errors import LimitExceeded, RefleetError, StreamError, StreamUnavailable
from refleet.common.limits import LIMITS
from refleet.common.redis_stream import RedisStream
from scripted_server import REQUEST, ScriptedServer, honest, read

Connect = Callable[..., RedisStream]
SIZE = LIMITS.chunk_bytes


LIES = {
    "no protocol": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "a status": b"+OK\r\n",
    "a number": b":1\r\n",
    "a null array": b"*-1\r\n",
    "two entries": b"*2\r\n*2\r\n$3\r\n1-0\r\n*2\r\n$1\r\nc\r\n$1\r\nx\r\n",
    "another entry": b"*1\r\n*2\r\n$3\r\n2-0\r\n*2\r\n$1\r\nc\r\n$1\r\nx\r\n",
    "another field": b"*1\r\n*2\r\n$3\r\n1-0\r\n*2\r\n$1\r\nx\r\n$1\r\nx\r\n",
    "more fields": b"*1\r\n*2\r\n$3\r\n1-0\r\n*4\r\n$1\r\nc\r\n$1\r\nx\r\n$1\r\nd\r\n$1\r\ny\r\n",
    "an array for the id": b"*1\r\n*2\r\n*1\r\n$3\r\n1-0\r\n*2\r\n$1\r\nc\r\n$1\r\nx\r\n",
    "a null chunk": b"*1\r\n*2\r\n$3\r\n1-0\r\n*2\r\n$1\r\nc\r\n$-1\r\n",
    "a negative size": b"$-2\r\n",
    "a size with a sign": b"$+1\r\nx\r\n",
    "a size with a zero in front": b"$01\r\nx\r\n",
    "a size in other digits": "$\u0661\r\nx\r\n".encode(),
    "no size": b"$\r\n",
    "a size with spaces": b"$ 1\r\nx\r\n",
    "a size that no server stores": b"$999999999\r\n",
    "a size beyond all numbers": b"$" + b"9" * 4000 + b"\r\n",
    "an endless line": b"$" + b"1" * 5000,
    "an endless refusal": b"-ERR " + b"x" * 5000,
    "a line feed alone": b"$1\nx\n" + bytes(5000),
}


@pytest.mark.parametrize("lie", LIES)
def test_what_is_no_possible_reply_is_an_error_and_the_connection_is_not_used_again(
    connect: Connect, kind: str, lie: str
) -> None:
    with ScriptedServer(LIES[lie], honest(kind, 0, b"never asked for on this connection"), hold=False) as server:
        stream = connect(server.url, timeout_s=5)
        for turn in (1, 2):
            with pytest.raises(StreamError) as refused:
                read(stream, kind)
            assert type(refused.value) is StreamError
            assert server.connections == turn
        assert all(REQUEST[kind] in request for request in server.asked)


@pytest.mark.parametrize("end", [b"xx", b"\r\r", b"\n\n", b"\rx"])
@pytest.mark.parametrize("size", [3, 5000])
def test_a_chunk_without_its_end_is_refused(connect: Connect, kind: str, size: int, end: bytes) -> None:
    spoiled = honest(kind, 0, b"*" * size)[:-2] + end
    with ScriptedServer(spoiled) as server, pytest.raises(StreamError, match="the end of a bulk"):
        read(connect(server.url), kind, room=5000)


def test_what_follows_a_reply_unasked_is_not_taken_for_the_next_one(connect: Connect, kind: str) -> None:
    with ScriptedServer(honest(kind, 0, b"first") + honest(kind, 0, b"planted"), hold=True) as server:
        stream = connect(server.url, timeout_s=1)
        assert read(stream, kind) == b"first"
        assert read(stream, kind) == b"first"
        assert server.connections == 2


REFUSALS = [
    (b"-ERR something else", StreamError, "refuses: ERR something else", ""),
    (b"-WRONGTYPE Operation against a key", StreamError, "refuses: WRONGTYPE", ""),
    (b"-NOPERM No permissions to access a key", StreamUnavailable, "refuses: NOPERM", "deploy/users.acl"),
    (b"-NOAUTH Authentication required.", StreamUnavailable, "refuses the sign-in", "user name and password"),
    (b"-LOADING Redis is loading the dataset in memory", StreamUnavailable, "is starting", "wait until"),
    (b"-MASTERDOWN Link with MASTER is down", StreamUnavailable, "refuses: MASTERDOWN", "the primary"),
    (b"-MOVED 1234 127.0.0.1:7000", StreamUnavailable, "refuses: MOVED", "Cluster"),
]


@pytest.mark.parametrize(("said", "error", "what", "advice"), REFUSALS, ids=lambda each: str(each)[:12])
def test_a_refusal_says_what_to_do(
    connect: Connect, kind: str, said: bytes, error: type[RefleetError], what: str, advice: str
) -> None:
    with ScriptedServer(said + b"\r\n") as server:
        with pytest.raises(error) as refused:
            read(connect(server.url), kind)
        assert type(refused.value) is error and what in refused.value.what and advice in refused.value.next


def test_a_reply_may_come_in_any_pieces(connect: Connect, kind: str) -> None:
    """One byte at a time: through a server that sends so, over and over until the whole reply was tried."""
    data = bytes(range(256)) * 12
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        client, _ = listener.accept()
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.recv(1 << 16)
        for byte in honest(kind, 0, data):
            client.sendall(bytes([byte]))
        client.close()

    thread = threading.Thread(target=serve)
    thread.start()
    stream = connect(f"redis://127.0.0.1:{listener.getsockname()[1]}/0")
    assert read(stream, kind, room=5000) == data
    thread.join(10)
    listener.close()


def test_a_size_beyond_the_buffer_costs_no_memory_and_no_wait(connect: Connect, kind: str) -> None:
    with ScriptedServer(honest(kind, 0, b"")[:-6] + b"$500000000\r\n", hold=True) as server:
        started = time.monotonic()
        with pytest.raises(LimitExceeded, match="has 500000000 bytes"):
            read(connect(server.url), kind)
        assert time.monotonic() - started < 10
