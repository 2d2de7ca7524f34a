"""A link that flips bits, or a server that is none: an answer of any shape is an error of the stream at worst."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from carriers import PAYLOAD, lease_of
from refleet.common.errors import ProtocolError, StreamError
from refleet.common.redis_stream import RedisStream
from scripted_server import ScriptedServer

PONG = b"+PONG\r\n"
FIELD = b"*2\r\n$1\r\nr\r\n$1\r\nx\r\n"
ANSWERS = {
    "a number": b":5\r\n",
    "a word": b"+OK\r\n",
    "a string": b"$3\r\nabc\r\n",
    "an id": b"$3\r\n1-1\r\n",
    "a list of numbers": b"*2\r\n:1\r\n:2\r\n",
    "a list of strings": b"*3\r\n$1\r\nx\r\n$1\r\ny\r\n$1\r\nz\r\n",
    "an entry whose id is none": b"*1\r\n*2\r\n$4\r\n1\x176-\r\n" + FIELD,
    "an entry with half a field": b"*1\r\n*2\r\n$3\r\n1-1\r\n*1\r\n$1\r\nr\r\n",
    "a stream whose entry's id is none": b"*1\r\n*2\r\n$1\r\nk\r\n*1\r\n*2\r\n$3\r\n1_1\r\n" + FIELD,
    "an entry that is a number": b"*1\r\n:7\r\n",
    "an id of many digits": b"*1\r\n*2\r\n$5000\r\n" + b"1" * 4998 + b"-1\r\n" + FIELD,
    "no type at all": b"\xaa\r\n",
}
CALLS: dict[str, Callable[[RedisStream], object]] = {
    "read": lambda stream: stream.read((0, 0), "0-0", block_s=0),
    "last_ids": lambda stream: stream.last_ids(),
    "history": lambda stream: stream.history(9),
    "claim": lambda stream: stream.claim(lease_of(), floor=0, ttl_s=9, take_over=False),
    "renew": lambda stream: stream.renew(lease_of(epoch=1), ttl_s=9),
    "append": lambda stream: stream.append(lease_of(epoch=1), 1, b"r", ttl_s=9),
    "lease": lambda stream: stream.lease(),
    "acks": lambda stream: stream.acks({"w0": "0-0"}, block_s=0),
    "last_acks": lambda stream: stream.last_acks("w0", 9),
    "beat": lambda stream: stream.beat("w0", b"status"),
    "members": lambda stream: stream.members(),
    "member": lambda stream: stream.member("w0"),
    "facts": lambda stream: stream.facts(),
    "chunks": lambda stream: stream.chunks(PAYLOAD, 0, 2),
    "payload_chunks": lambda stream: stream.payload_chunks(PAYLOAD),
    "put_chunk": lambda stream: stream.put_chunk(PAYLOAD, 0, b"data", ttl_s=9),
    "keep_payload": lambda stream: stream.keep_payload(PAYLOAD, ttl_s=9),
}


@pytest.mark.parametrize("call", CALLS)
def test_an_answer_of_any_shape_is_an_answer_or_an_error_of_the_stream(
    connect: Callable[..., RedisStream], call: str
) -> None:
    errors = []
    for answer in ANSWERS.values():
        # to the two commands of a pipeline at once, or one after the other; redis-py pings a new connection first
        for replies in ((answer * 2,), (PONG, answer * 2), (PONG, *(answer,) * 4)):
            with ScriptedServer(*replies) as server:
                try:
                    CALLS[call](connect(server.url, timeout_s=0.1))
                except (StreamError, ProtocolError) as error:
                    errors.append(error)
    assert errors, "nothing of all this was noticed"
    assert all(error.what for error in errors)


def test_an_answer_that_can_not_be_read_says_what_was_asked(connect: Callable[..., RedisStream]) -> None:
    with ScriptedServer(PONG, ANSWERS["an entry that is a number"]) as server, pytest.raises(StreamError) as caught:
        connect(server.url, timeout_s=0.1).history(9)
    assert "can't be read" in caught.value.what and "history" in caught.value.about
