"""Strings beside the stream that names them: what only the carrier BLOBS has to keep in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from carriers import PAYLOAD, TTL_S, OnServer
from refleet.common.errors import OverBudget, StreamError, StreamGap, UsageError
from refleet.common.limits import MIB
from refleet.common.redis_stream import RedisStream
from refleet.common.stream import Keys
from refleet.common.types import BLOBS, STREAM
from servers import Server

Until = Callable[..., None]


@pytest.fixture
def place(server: Server, model: str) -> Iterator[OnServer]:
    made = OnServer(server, model)
    yield made
    made.close()


def test_blobs_are_chosen_where_the_server_replies_by_reference(place: OnServer) -> None:
    stream = place.stream()
    facts = stream.payload_facts().server
    assert stream.carrier() == (BLOBS if facts.startswith("Valkey 9") else STREAM)
    for chosen in (STREAM, BLOBS):
        assert place.stream(carrier=chosen).carrier() == chosen
    with pytest.raises(UsageError, match="carrier 'both' is none of auto, stream, blobs"):
        place.stream(carrier="both")


def test_every_string_of_a_payload_lives_a_little_longer_than_its_stream(place: OnServer) -> None:
    stream, keys = place.stream(), Keys(place.model)

    def lives() -> list[float]:
        return [place.client.pttl(keys.blob(PAYLOAD, number)) / 1000 for number in range(3)]

    for number, ttl_s in enumerate((10, 100, 99)):
        stream.put_chunk(PAYLOAD, number, b"data", ttl_s=ttl_s, carrier=BLOBS)
    assert all(115 < each <= 125 for each in lives()) and 90 < place.client.pttl(keys.chunks(PAYLOAD)) / 1000 <= 99
    place.stream().put_chunk(PAYLOAD, 3, b"by another process", ttl_s=500, carrier=BLOBS)
    assert all(615 < each <= 625 for each in lives())
    stream.put_chunk(PAYLOAD, 4, b"for a short while", ttl_s=10, carrier=BLOBS)
    assert place.client.pttl(keys.blob(PAYLOAD, 4)) <= 12_500
    stream.put_chunk(PAYLOAD, 5, b"for long again", ttl_s=60, carrier=BLOBS)
    stream.put_chunk(PAYLOAD, 5, b"for long again", ttl_s=200, carrier=BLOBS)
    assert all(place.client.pttl(keys.blob(PAYLOAD, number)) / 1000 > 240 for number in range(6))
    stream.keep_payload(PAYLOAD, ttl_s=1000)
    assert all(1240 < each <= 1250 for each in lives()) and place.client.pttl(keys.chunks(PAYLOAD)) <= 1_000_000


def test_dropping_leaves_no_string_behind_and_finds_what_a_cut_off_drop_left(place: OnServer) -> None:
    stream, keys = place.stream(), Keys(place.model)
    for number in range(600):
        stream.put_chunk(PAYLOAD, number, b"data", ttl_s=TTL_S, carrier=BLOBS)
    place.client.unlink(*(keys.blob(PAYLOAD, number) for number in range(300, 600)))  # the first batch of a drop
    place.client.set(keys.blob(PAYLOAD, 600), "a crash came between this string and its entry", px=60_000)
    stream.drop_payload(PAYLOAD)
    assert list(place.client.scan_iter(match=f"refleet:{{{place.model}*")) == []


def test_a_string_without_an_entry_is_overwritten_and_a_refused_chunk_leaves_none(place: OnServer) -> None:
    stream, keys = place.stream(), Keys(place.model)
    place.client.set(keys.blob(PAYLOAD, 0), "left by a full server", px=60_000)
    stream.put_chunk(PAYLOAD, 0, b"right", ttl_s=TTL_S, carrier=BLOBS)
    assert stream.chunks(PAYLOAD, 0, 1, carrier=BLOBS) == [b"right"]
    other = "d" * 32
    with pytest.raises(StreamGap):
        stream.put_chunk(other, 1, b"data", ttl_s=TTL_S, carrier=BLOBS)
    stream.put_chunk(PAYLOAD, 2, b"data", ttl_s=TTL_S, carrier=BLOBS)
    with pytest.raises(StreamError, match="passed over"):
        stream.put_chunk(PAYLOAD, 1, b"data", ttl_s=TTL_S, carrier=BLOBS)
    assert not place.client.exists(keys.blob(other, 1), keys.blob(PAYLOAD, 1))


def test_a_string_that_was_lost_is_a_gap_and_is_written_again(place: OnServer) -> None:
    stream, keys = place.stream(), Keys(place.model)
    stream.put_chunk(PAYLOAD, 0, b"data", ttl_s=TTL_S, carrier=BLOBS)
    place.client.unlink(keys.blob(PAYLOAD, 0))
    with pytest.raises(StreamGap):
        stream.read_chunk(PAYLOAD, 0, memoryview(bytearray(9)), carrier=BLOBS)
    stream.put_chunk(PAYLOAD, 0, b"data", ttl_s=TTL_S, carrier=BLOBS)
    assert stream.chunks(PAYLOAD, 0, 1, carrier=BLOBS) == [b"data"]


def test_a_full_server_takes_the_same_chunk_once_there_is_room(new_server: Callable[..., Server], kind: str) -> None:
    server = new_server()
    stream = RedisStream(server.url, "m")
    with server.client() as client:
        stream.put_chunk(PAYLOAD, 0, bytes(MIB), ttl_s=TTL_S, carrier=kind)
        server.configure(maxmemory="1mb", maxmemory_policy="noeviction")
        with pytest.raises(OverBudget, match=r"is full: .*maxmemory"):
            stream.put_chunk(PAYLOAD, 1, b"data", ttl_s=TTL_S, carrier=kind)
        assert not client.exists(Keys("m").blob(PAYLOAD, 1))
        server.configure(maxmemory="0")
        stream.put_chunk(PAYLOAD, 1, b"data", ttl_s=TTL_S, carrier=kind)
    assert stream.chunks(PAYLOAD, 1, 1, carrier=kind) == [b"data"] and stream.payload_chunks(PAYLOAD) == 2
    stream.close()
