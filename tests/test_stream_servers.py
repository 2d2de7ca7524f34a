"""Streams over more than one server: a replica to read from, a server of its own for payloads."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import pytest
from carriers import PAYLOAD, TTL_S, claimed
from refleet.common.errors import StreamGap, StreamUnavailable, UsageError
from refleet.common.limits import MIB
from refleet.common.redis_stream import RedisStream
from refleet.common.stream import NOTHING, Keys
from servers import Server

Until = Callable[..., None]
NewServer = Callable[..., Server]
READS = ("xread", "xrange", "xrevrange", "xinfo|stream", "get", "mget")


@pytest.fixture
def pair(new_server: NewServer, until: Until) -> tuple[Server, Server]:
    """A primary and its replica, in contact."""
    primary = new_server(settings={"repl-diskless-sync-delay": "0"})
    replica = new_server(settings={"replicaof": f"127.0.0.1 {primary.port}"})
    linked(replica, until)
    return primary, replica


def linked(replica: Server, until: Until) -> None:
    with replica.client() as client:
        until(lambda: client.info("replication")["master_link_status"] == "up", "the replica follows its primary")


@pytest.fixture
def worker(pair: tuple[Server, Server]) -> Iterator[RedisStream]:
    """A stream that reads from the replica."""
    stream = RedisStream(pair[0].url, "m", read_from=pair[1].url, timeout_s=5)
    yield stream
    stream.close()


@pytest.fixture
def publisher(pair: tuple[Server, Server]) -> Iterator[RedisStream]:
    stream = RedisStream(pair[0].url, "m", timeout_s=5)
    yield stream
    stream.close()


def reads(server: Server, command: str) -> int:
    """How often a server was asked this."""
    with server.client() as client:
        stats = client.info("commandstats")
    return int(stats.get(f"cmdstat_{command}", {"calls": 0})["calls"])


def test_log_and_payload_are_read_from_the_replica_and_all_else_goes_to_the_primary(
    pair: tuple[Server, Server], publisher: RedisStream, worker: RedisStream, until: Until, kind: str
) -> None:
    data = os.urandom(3 * MIB)
    publisher.put_chunk(PAYLOAD, 0, data, ttl_s=TTL_S, carrier=kind)
    publisher.append(claimed(publisher), 1, b"release", ttl_s=TTL_S)
    asked = [reads(pair[0], name) for name in READS]

    assert worker.read((0, 0), "0-0", block_s=20).log == [((1, 1), b"release")]
    buffer = bytearray(3 * MIB)
    assert worker.read_chunk(PAYLOAD, 0, memoryview(buffer), carrier=kind) == len(data) and buffer == data, (
        "the chunks are there as soon as the release that names them"
    )
    assert worker.history(1) == [((1, 1), b"release")] and worker.last_ids()[0] == (1, 1)
    assert asked == [reads(pair[0], name) for name in READS]

    worker.ack("w1", b"served")
    worker.beat("w1", b"here")
    assert publisher.member("w1").status == b"here" == worker.member("w1").status
    assert [record for _, record in publisher.last_acks("w1", 9)] == [b"served"]
    assert worker.facts().run_id == publisher.facts().run_id


def test_a_replica_that_lags_delivers_later(
    pair: tuple[Server, Server], publisher: RedisStream, worker: RedisStream, until: Until, kind: str
) -> None:
    """Held by SIGSTOP while the primary goes on."""
    lease = claimed(publisher)
    publisher.append(lease, 1, b"one", ttl_s=TTL_S)
    assert worker.read((0, 0), "0-0", block_s=20).log
    os.kill(pair[1].pid, signal.SIGSTOP)
    try:
        publisher.put_chunk(PAYLOAD, 0, b"data", ttl_s=TTL_S, carrier=kind)
        publisher.append(lease, 2, b"two", ttl_s=TTL_S)
        worker.ack("w1", b"still heard")
        assert publisher.last_acks("w1", 1)
    finally:
        os.kill(pair[1].pid, signal.SIGCONT)
    assert worker.read((1, 1), "0-0", block_s=20).log == [((1, 2), b"two")]
    assert worker.read_chunk(PAYLOAD, 0, memoryview(bytearray(9)), carrier=kind) == 4


def test_a_replica_that_was_restarted_is_away_and_then_right_again(
    pair: tuple[Server, Server], publisher: RedisStream, worker: RedisStream, until: Until
) -> None:
    lease = claimed(publisher)
    publisher.append(lease, 7, b"seven", ttl_s=TTL_S)
    assert worker.read((0, 0), "0-0", block_s=20).log
    pair[1].kill()
    with pytest.raises(StreamUnavailable, match="can't be reached"):
        worker.read((1, 7), "0-0", block_s=1)
    worker.ack("w1", b"still heard")
    pair[1].start(empty=True)
    linked(pair[1], until)
    assert worker.last_ids()[0] == (1, 7)
    publisher.append(lease, 8, b"eight", ttl_s=TTL_S)
    assert worker.read((1, 7), "0-0", block_s=20).log == [((1, 8), b"eight")]


def test_a_replica_that_comes_back_empty_shows_in_the_last_ids(
    pair: tuple[Server, Server], publisher: RedisStream, worker: RedisStream, until: Until, kind: str
) -> None:
    publisher.put_chunk(PAYLOAD, 0, b"data", ttl_s=TTL_S, carrier=kind)
    publisher.append(claimed(publisher), 7, b"seven", ttl_s=TTL_S)
    assert worker.read((0, 0), "0-0", block_s=20).log
    pair[0].kill()  # nobody to copy from
    pair[1].kill()
    pair[1].start(empty=True)
    assert worker.read((1, 7), "0-0", block_s=0.1).log == [] and worker.last_ids() == NOTHING
    with pytest.raises(StreamGap):
        worker.read_chunk(PAYLOAD, 0, memoryview(bytearray(9)), carrier=kind)
    with pytest.raises(StreamUnavailable):
        worker.ack("w1", b"ack")


def test_a_failover_to_a_replica_that_lacked_the_newest_releases_shows_in_the_last_ids(
    pair: tuple[Server, Server], publisher: RedisStream, worker: RedisStream, until: Until
) -> None:
    primary, replica = pair
    lease = claimed(publisher)
    publisher.append(lease, 1, b"one", ttl_s=TTL_S)
    with replica.client() as client:
        until(lambda: client.exists(Keys("m").log), "the replica has the first release")
        client.replicaof("NO", "ONE")
        publisher.append(lease, 2, b"two", ttl_s=TTL_S)
        direct = RedisStream(primary.url, "m")
        assert direct.read((0, 0), "0-0", block_s=1).log[-1] == ((1, 2), b"two")
        direct.close()
        # a worker that read the second release elsewhere finds its cursor beyond the end
        assert worker.read((1, 2), "0-0", block_s=0.1).log == [] and worker.last_ids()[0] == (1, 1) < (1, 2)
        # and the log goes on under a higher epoch, which is above every cursor
        after = RedisStream(replica.url, "m")
        new = claimed(after, "b", take_over=True)
        after.append(new, 1, b"after", ttl_s=TTL_S)
        after.close()
    assert worker.read((1, 2), "0-0", block_s=20).log == [((2, 1), b"after")]


def test_payloads_lie_on_their_own_server_and_nothing_else_does(new_server: NewServer, kind: str) -> None:
    main, payloads = new_server(), new_server(settings={"maxmemory": "100mb"})
    publisher = RedisStream(main.url, "m", payload_url=payloads.url)
    worker = RedisStream(main.url, "m", payload_url=payloads.url)
    try:
        publisher.put_chunk(PAYLOAD, 0, b"data", ttl_s=TTL_S, carrier=kind)
        publisher.append(claimed(publisher), 1, b"release", ttl_s=TTL_S)
        assert worker.read((0, 0), "0-0", block_s=1).log == [((1, 1), b"release")]
        worker.ack("w1", b"served")
        assert worker.chunks(PAYLOAD, 0, 1, carrier=kind) == [b"data"]
        assert worker.read_chunk(PAYLOAD, 0, memoryview(bytearray(9)), carrier=kind) == 4
        with main.client() as one, payloads.client() as other:
            here, there = one.scan_iter(), list(other.scan_iter())
            assert not any(PAYLOAD.encode() in key for key in here)
            assert there and all(PAYLOAD.encode() in key for key in there)
        assert (publisher.facts().max_bytes, publisher.payload_facts().max_bytes) == (0, 100 * MIB)
        publisher.keep_payload(PAYLOAD, ttl_s=TTL_S)
        publisher.drop_payload(PAYLOAD)
        assert publisher.payload_chunks(PAYLOAD) == 0
        payloads.kill()
        with pytest.raises(StreamUnavailable, match=f"127.0.0.1:{payloads.port}"):
            worker.read_chunk(PAYLOAD, 0, memoryview(bytearray(9)), carrier=kind)
        assert worker.read((0, 0), "0-0", block_s=0).log, "the log is still there"
    finally:
        publisher.close()
        worker.close()


def test_with_both_the_log_comes_from_the_replica_and_payloads_from_their_server(
    pair: tuple[Server, Server], publisher: RedisStream, valkey: Server, model: str
) -> None:
    publisher.append(claimed(publisher), 1, b"release", ttl_s=TTL_S)
    other = RedisStream(pair[0].url, "m", read_from=pair[1].url, payload_url=valkey.url)
    other.put_chunk(PAYLOAD, 0, b"data", ttl_s=TTL_S)
    assert other.read((0, 0), "0-0", block_s=20).log == [((1, 1), b"release")]
    assert other.read_chunk(PAYLOAD, 0, memoryview(bytearray(9))) == 4
    assert (reads(pair[0], "xread"), publisher.payload_chunks(PAYLOAD)) == (0, 0)
    other.drop_payload(PAYLOAD)
    other.close()


def test_a_wrong_replica_url_is_refused_at_once() -> None:
    for bad, option in (
        ({"read_from": "http://x"}, "--read-from"),
        ({"payload_url": "redis://h:port"}, "--payload-redis"),
    ):
        with pytest.raises(UsageError, match="can't be read") as refused:
            RedisStream("redis://127.0.0.1:1", "m", **bad)
        assert option in refused.value.about
