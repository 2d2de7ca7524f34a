"""What goes wrong between a stream and its server: clear errors, one entry per write, nothing lost in silence."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from carriers import PAYLOAD, TTL_S, OnServer, claimed, lease_of
from refleet.common.errors import OverBudget, StreamError, StreamGap, StreamUnavailable, UsageError
from refleet.common.limits import KIB, MIB
from refleet.common.redis_link import Packer
from refleet.common.redis_stream import RedisStream
from refleet.common.stream import NOTHING, Keys
from servers import Server
from tcp_proxy import Fault, TcpProxy

NewServer = Callable[..., Server]
Connect = Callable[..., RedisStream]
Until = Callable[..., None]


@pytest.fixture
def proxied(server: Server, connect: Connect, model: str) -> Iterator[tuple[TcpProxy, RedisStream, RedisStream]]:
    """A proxy, a stream through it, and one around it."""
    with TcpProxy(server.port) as proxy:
        yield proxy, connect(proxy.url, model, timeout_s=5), connect(server.url, model)


def test_a_server_that_dies_while_somebody_reads_is_unavailable(
    new_server: NewServer, connect: Connect, until: Until
) -> None:
    server = new_server(settings={"requirepass": "s3cret"})
    stream = connect(server.url_for("default", "s3cret"))
    with server.client(password="s3cret") as client, ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(stream.read, (0, 0), "0-0", block_s=60)
        until(lambda: client.info("clients")["blocked_clients"], "the reader waits")
        server.kill()
        with pytest.raises(StreamUnavailable) as lost:
            waiting.result(20)
    with pytest.raises(StreamUnavailable) as refused:
        stream.last_ids()
    for error in (lost.value, refused.value):
        assert f"redis://127.0.0.1:{server.port}/0" in str(error) and "model m" in error.about and error.next
        assert "s3cret" not in f"{error}{error.to_dict()}"
    assert "refused" in str(refused.value)


def test_a_server_that_comes_back_empty_is_noticed(new_server: NewServer, connect: Connect) -> None:
    server = new_server()
    stream = connect(server.url)
    lease = claimed(stream)
    stream.append(lease, 3, b"release", ttl_s=TTL_S)
    stream.put_chunk(PAYLOAD, 0, b"data", ttl_s=TTL_S)
    before = stream.facts().run_id
    server.kill()
    server.start()
    assert stream.last_ids() == NOTHING and stream.facts().run_id != before
    assert stream.read((1, 3), "0-0", block_s=0.1).log == []
    with pytest.raises(StreamGap):
        stream.put_chunk(PAYLOAD, 1, b"data", ttl_s=TTL_S)
    stream.append(lease, 4, b"next", ttl_s=TTL_S)
    assert stream.history(9) == [((1, 4), b"next")]


def test_a_server_with_aof_comes_back_with_everything(new_server: NewServer, connect: Connect) -> None:
    server = new_server(aof=True)
    stream = connect(server.url)
    lease = claimed(stream)
    stream.append(lease, 3, b"release", ttl_s=TTL_S)
    stream.put_chunk(PAYLOAD, 0, b"data", ttl_s=TTL_S)
    server.kill()
    server.start()
    assert stream.facts().aof is True
    assert stream.history(9) == [((1, 3), b"release")] and stream.lease() == lease
    assert stream.chunks(PAYLOAD, 0, 1) == [b"data"]
    server.kill()
    server.start(empty=True)
    assert stream.last_ids() == NOTHING and stream.lease() is None


def test_a_full_server_is_over_budget_until_there_is_room(new_server: NewServer, connect: Connect) -> None:
    server = new_server()
    stream = connect(server.url)
    lease = claimed(stream)
    stream.put_chunk(PAYLOAD, 0, bytes(MIB), ttl_s=TTL_S)
    server.configure(maxmemory="1mb", maxmemory_policy="noeviction")
    for write in (
        lambda: stream.put_chunk(PAYLOAD, 1, b"data", ttl_s=TTL_S),
        lambda: stream.append(lease, 1, b"release", ttl_s=TTL_S),
        lambda: stream.offer(lease, b"offer", ttl_s=TTL_S),
        lambda: stream.ack("w1", b"ack"),
        lambda: stream.beat("w1", b"here"),
    ):
        with pytest.raises(OverBudget, match=r"is full: .*maxmemory"):
            write()
    stream.renew(lease, ttl_s=TTL_S)
    facts = stream.facts()
    assert facts.used_bytes > facts.max_bytes == MIB
    server.configure(maxmemory="0")
    stream.put_chunk(PAYLOAD, 1, b"data", ttl_s=TTL_S)
    stream.append(lease, 1, b"release", ttl_s=TTL_S)
    assert stream.chunks(PAYLOAD, 1, 1) == [b"data"] and stream.history(9) == [((1, 1), b"release")]


def test_a_wrong_password_is_named_and_not_shown(new_server: NewServer, connect: Connect) -> None:
    server = new_server(settings={"requirepass": "s3cret"})
    for url, said in ((server.url_for("default", "wr0ng"), "invalid username-password"), (server.url, "Authent")):
        with pytest.raises(StreamUnavailable, match=said) as refused:
            connect(url).last_ids()
        assert "user name and password" in refused.value.next
        assert "wr0ng" not in f"{refused.value}" and "s3cret" not in f"{refused.value}"


def test_a_missing_right_is_named(new_server: NewServer, connect: Connect) -> None:
    server = new_server()
    with server.client() as client:
        client.execute_command("ACL SETUSER poor on >pw +xread +evalsha +eval +get ~*")
    stream = connect(server.url_for("poor", "pw"))
    for forbidden in (
        lambda: stream.ack("w1", b"ack"),
        stream.last_ids,
        stream.members,
        lambda: stream.beat("w1", b"here"),
        lambda: stream.append(lease_of(epoch=1), 1, b"release", ttl_s=TTL_S),
    ):
        with pytest.raises(StreamUnavailable, match=r"permission|can't") as refused:
            forbidden()
        assert "deploy/users.acl" in refused.value.next
    assert "not permitted" in stream.facts().server


def test_a_replica_refuses_writes_and_says_where_to_go(new_server: NewServer, connect: Connect) -> None:
    server = new_server()
    stream = connect(server.url)
    lease = claimed(stream)
    with server.client() as client:
        client.replicaof("127.0.0.1", "1")
    for write in (
        lambda: stream.ack("w1", b"ack"),
        lambda: stream.put_chunk(PAYLOAD, 0, b"data", ttl_s=TTL_S),
        lambda: stream.append(lease, 1, b"release", ttl_s=TTL_S),
    ):
        with pytest.raises(StreamUnavailable, match="replica") as refused:
            write()
        assert "connect to the primary" in refused.value.next


def test_a_key_of_another_type_is_an_error_of_the_stream(server: Server, model: str) -> None:
    carrier = OnServer(server, model)
    stream = carrier.stream()
    carrier.client.set(f"refleet:{{{model}}}:log", "no stream")
    carrier.client.set(f"refleet:{{{model}}}:epoch", "no number")
    for call in (stream.last_ids, lambda: stream.history(1), lambda: stream.read((0, 0), "0-0", block_s=0)):
        with pytest.raises(StreamError, match="WRONGTYPE") as refused:
            call()
        assert type(refused.value) is StreamError
    with pytest.raises(StreamError, match="not a number"):
        claimed(stream)
    carrier.close()


@pytest.mark.parametrize("fault", [Fault.LOSE_REPLY, Fault.TEAR_REPLY, Fault.CUT_REQUEST])
def test_a_release_whose_reply_was_lost_is_in_the_log_once(
    proxied: tuple[TcpProxy, RedisStream, RedisStream], fault: Fault
) -> None:
    proxy, stream, witness = proxied
    lease = claimed(stream)
    stream.append(lease, 1, b"before", ttl_s=TTL_S)
    proxy.break_next(fault, b"the-release", forwarded_bytes=2)
    stream.append(lease, 2, b"the-release", ttl_s=TTL_S)
    assert proxy.fired.is_set()
    assert witness.history(9) == [((1, 1), b"before"), ((1, 2), b"the-release")]


@pytest.mark.parametrize("fault", [Fault.LOSE_REPLY, Fault.TEAR_REPLY, Fault.CUT_REQUEST])
def test_a_chunk_whose_reply_was_lost_is_there_once(
    proxied: tuple[TcpProxy, RedisStream, RedisStream], kind: str, fault: Fault
) -> None:
    proxy, stream, witness = proxied
    data = bytes(range(256)) * (16 * KIB - 256)
    stream.put_chunk(PAYLOAD, 0, b"before", ttl_s=TTL_S, carrier=kind)
    proxy.break_next(fault, b"XADD", forwarded_bytes=MIB if fault is Fault.CUT_REQUEST else 2)
    stream.put_chunk(PAYLOAD, 1, data, ttl_s=TTL_S, carrier=kind)
    assert proxy.fired.is_set()
    assert witness.payload_chunks(PAYLOAD) == 2 and witness.chunks(PAYLOAD, 1, 1, carrier=kind) == [data]


def test_what_can_not_be_compared_is_not_repeated(proxied: tuple[TcpProxy, RedisStream, RedisStream]) -> None:
    proxy, stream, witness = proxied
    lease = claimed(stream)
    stream.offer(lease, b"from here on the server knows the script", ttl_s=TTL_S)
    for write in (
        lambda: stream.ack("w1", b"once"),
        lambda: stream.ask(b"once"),
        lambda: stream.offer(lease, b"once", ttl_s=TTL_S),
    ):
        proxy.break_next(Fault.LOSE_REPLY, b"once")
        with pytest.raises(StreamUnavailable, match="can't be reached"):
            write()
    assert [record for _, record in witness.last_acks("w1", 9)] == [b"once"]
    assert [record for _, record in witness.read((0, 0), "0-0", block_s=0).control[1:]] == [b"once"] * 2


def test_a_torn_reply_is_never_taken_for_a_whole_one(proxied: tuple[TcpProxy, RedisStream, RedisStream]) -> None:
    proxy, stream, witness = proxied
    data = bytes(range(256)) * 4096
    witness.put_chunk(PAYLOAD, 0, data, ttl_s=TTL_S)
    for cut in (1, 100, MIB // 2, MIB):
        proxy.break_next(Fault.TEAR_REPLY, b"XRANGE", forwarded_bytes=cut)
        with pytest.raises(StreamUnavailable):
            stream.chunks(PAYLOAD, 0, 1)
        assert stream.chunks(PAYLOAD, 0, 1) == [data]


@pytest.mark.parametrize("fault", [Fault.HOLD_REPLY, Fault.HALF_OPEN])
def test_a_server_that_stays_silent_is_given_up(server: Server, connect: Connect, model: str, fault: Fault) -> None:
    with TcpProxy(server.port) as proxy:
        stream = connect(proxy.url, model, timeout_s=0.3)
        assert stream.last_ids() == NOTHING
        proxy.break_next(fault, b"XADD")
        with pytest.raises(StreamUnavailable, match="no answer in time"):
            stream.ack("w1", b"ack")
        stream.ack("w1", b"ack")


def test_a_wait_longer_than_the_reply_timeout_is_no_error(server: Server, connect: Connect, model: str) -> None:
    stream = connect(server.url, model, timeout_s=1)
    started = time.monotonic()
    assert stream.read((0, 0), "0-0", block_s=1.3).log == []
    assert stream.acks({"w1": "0-0"}, block_s=1.3) == {}
    assert time.monotonic() - started >= 2.6


def test_a_url_that_can_not_be_meant_is_refused_without_showing_it() -> None:
    for url in ("http://:s3cret@host", "", "redis://:s3cret@host:port", "redis://:s3cret@host/0?socket_timeout=s3cret"):
        with pytest.raises(UsageError) as refused:
            RedisStream(url, "m")
        assert "s3cret" not in str(refused.value)


def test_a_large_chunk_is_sent_without_a_copy(server: Server, connect: Connect, model: str) -> None:
    stream = connect(server.url, model)
    data = memoryview(bytearray(16 * MIB))
    stream.put_chunk(PAYLOAD, 0, b"warm", ttl_s=TTL_S)
    tracemalloc.start()
    stream.put_chunk(PAYLOAD, 1, data, ttl_s=TTL_S)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < MIB
    assert any(piece is data for piece in Packer().pack("XADD", data))


def test_commands_are_packed_as_the_protocol_says() -> None:
    packed = b"".join(Packer().pack("XINFO STREAM", "ké", 12, b"\r\n", memoryview(bytes(3)), bytes(20 * KIB)))
    expected = b"*7\r\n$5\r\nXINFO\r\n$6\r\nSTREAM\r\n$3\r\nk\xc3\xa9\r\n$2\r\n12\r\n$2\r\n\r\n\r\n$3\r\n\0\0\0\r\n"
    assert packed == expected + b"$20480\r\n" + bytes(20 * KIB) + b"\r\n"


def test_all_keys_of_a_model_share_a_cluster_slot_and_payloads_have_their_own() -> None:
    from redis.crc import key_slot

    keys = Keys("m")
    ours = [keys.log, keys.control, keys.epoch, keys.lease, keys.members, keys.ack("w"), keys.worker("w")]
    assert len({key_slot(key.encode()) for key in ours}) == 1
    assert len({key_slot(keys.chunks(f"{n:032x}").encode()) for n in range(8)}) == 8
