"""deploy/users.acl in real servers: each role can do its work, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
from carriers import PAYLOAD, TTL_S, claimed, lease_of
from refleet.common.errors import StreamGap, StreamUnavailable
from refleet.common.redis_stream import RedisStream
from refleet.common.types import BLOBS, STREAM
from servers import Server

PAYLOADS = ((PAYLOAD, STREAM), ("e" * 32, BLOBS))
SHIPPED = Path(__file__).parents[1] / "deploy" / "users.acl"


@pytest.fixture
def guarded(new_server: Callable[..., Server], tmp_path: Path) -> Server:
    """A server that loads the shipped file, with a second worker's line made as the file says."""
    text = SHIPPED.read_text()
    worker_line = next(line for line in text.splitlines() if line.startswith("user worker-1 "))
    file = tmp_path / "users.acl"
    file.write_text(text + worker_line.replace("worker-1", "worker-2") + "\n")
    return new_server(settings={"include": str(file)})


@pytest.fixture
def users(guarded: Server) -> Iterator[Callable[..., RedisStream]]:
    """`users("worker-1")`: the stream of model demo as that user."""
    streams: list[RedisStream] = []

    def sign_in(user: str, model: str = "demo") -> RedisStream:
        streams.append(RedisStream(guarded.url_for(user, f"CHANGE-ME-{user}"), model))
        return streams[-1]

    yield sign_in
    for stream in streams:
        stream.close()


def refused(call: Callable[[], object]) -> None:
    with pytest.raises(StreamUnavailable, match=r"permission|can't") as error:
        call()
    assert "deploy/users.acl" in error.value.next


def test_both_roles_can_do_all_of_their_work(users: Callable[..., RedisStream]) -> None:
    publisher, worker = users("publisher"), users("worker-1")

    lease = claimed(publisher)
    publisher.renew(lease, ttl_s=TTL_S)
    for payload, kind in PAYLOADS:
        for number in (0, 1, 1):
            publisher.put_chunk(payload, number, b"data", ttl_s=TTL_S, carrier=kind)
        publisher.keep_payload(payload, ttl_s=TTL_S)
    for _ in range(2):
        publisher.append(lease, 1, b"release", ttl_s=TTL_S)
    publisher.offer(lease, b"offer", ttl_s=TTL_S)
    publisher.ask(b"verify")
    assert publisher.lease() == lease and publisher.history(1) == [((1, 1), b"release")]
    assert all(publisher.payload_chunks(payload) == 2 for payload, _ in PAYLOADS)
    assert publisher.carrier() in (STREAM, BLOBS) and publisher.facts().run_id

    found = worker.read((0, 0), "0-0", block_s=0.1)
    assert found.log == [((1, 1), b"release")] and len(found.control) == 2
    assert worker.last_ids() == ((1, 1), found.control[-1][0]) == publisher.last_ids()
    assert worker.history(1) == found.log
    for payload, kind in PAYLOADS:
        room = memoryview(bytearray(9))
        assert worker.chunks(payload, 0, 2, carrier=kind) == [b"data"] * 2
        with worker.payload_reader(payload, range(2), carrier=kind) as reader:
            assert [reader.read(number, room) for number in range(2)] == [4, 4]
        with pytest.raises(StreamGap):
            worker.read_chunk(payload, 2, room, carrier=kind)
    worker.ack("worker-1", b"served")
    worker.beat("worker-1", b"here")
    assert worker.member("worker-1").status == b"here"
    assert [record for _, record in worker.last_acks("worker-1", 1)] == [b"served"]

    assert [(m.worker, m.status) for m in publisher.members()] == [("worker-1", b"here")]
    acks = publisher.acks({"worker-1": "0-0", "worker-2": "0-0"}, block_s=0.1)
    assert [record for _, record in acks["worker-1"]] == [b"served"] == [publisher.last_acks("worker-1", 1)[0][1]]
    worker.leave("worker-1")
    worker.beat("worker-1", b"back")
    publisher.leave("worker-1")
    assert publisher.members() == []
    for payload, _ in PAYLOADS:
        publisher.drop_payload(payload)
        assert publisher.payload_chunks(payload) == 0


def test_a_worker_can_neither_release_nor_claim(guarded: Server, users: Callable[..., RedisStream]) -> None:
    publisher, worker = users("publisher"), users("worker-1")
    lease = claimed(publisher)
    publisher.append(lease, 1, b"release", ttl_s=TTL_S)
    publisher.put_chunk(PAYLOAD, 0, b"data", ttl_s=TTL_S)
    for call in (
        lambda: worker.claim(lease_of("b"), floor=0, ttl_s=TTL_S, take_over=True),
        lambda: worker.renew(lease, ttl_s=TTL_S),
        lambda: worker.append(lease, 2, b"forged", ttl_s=TTL_S),
        lambda: worker.offer(lease, b"forged", ttl_s=TTL_S),
        lambda: worker.ask(b"forged"),
        lambda: worker.put_chunk(PAYLOAD, 1, b"forged", ttl_s=TTL_S),
        lambda: worker.put_chunk(PAYLOAD, 0, b"forged", ttl_s=TTL_S, carrier=BLOBS),
        lambda: worker.keep_payload(PAYLOAD, ttl_s=TTL_S),
        lambda: worker.drop_payload(PAYLOAD),
    ):
        refused(call)
    with redis.Redis.from_url(guarded.url_for("worker-1", "CHANGE-ME-worker-1")) as client:
        for command in (
            ("XADD", "refleet:{demo}:log", "9-9", "r", "forged"),
            ("XADD", "refleet:{demo}:control", "*", "r", "forged"),
            ("XADD", f"refleet:{{demo:{PAYLOAD}}}:chunks", "9-0", "c", "forged"),
            ("SET", f"refleet:{{demo:{PAYLOAD}}}:blob:0", "forged"),
            ("UNLINK", f"refleet:{{demo:{PAYLOAD}}}:blob:0"),
            ("PEXPIRE", f"refleet:{{demo:{PAYLOAD}}}:blob:0", "1"),
            ("XGROUP", "CREATE", "refleet:{demo}:log", "g", "0"),
            ("XREADGROUP", "GROUP", "g", "c", "STREAMS", "refleet:{demo}:log", ">"),
            ("UNLINK", "refleet:{demo}:log"),
            ("UNLINK", "refleet:{demo}:members"),
            ("SET", "refleet:{demo}:epoch", "99"),
            ("GET", "refleet:{demo}:epoch"),
            ("GET", "refleet:{demo}:worker:worker-2"),
            ("KEYS", "*"),
            ("FLUSHALL",),
            ("CONFIG", "GET", "*"),
        ):
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.execute_command(*command)
    assert publisher.history(9) == [((1, 1), b"release")] and publisher.lease() == lease
    assert publisher.chunks(PAYLOAD, 0, 1) == [b"data"] and publisher.payload_chunks(PAYLOAD) == 1


def test_a_worker_speaks_only_for_itself(users: Callable[..., RedisStream]) -> None:
    publisher, worker = users("publisher"), users("worker-2")
    worker.ack("worker-2", b"mine")
    worker.beat("worker-2", b"mine")
    for call in (
        lambda: worker.ack("worker-1", b"forged"),
        lambda: worker.beat("worker-1", b"forged"),
        lambda: worker.leave("worker-1"),
        lambda: worker.acks({"worker-1": "0-0"}, block_s=0),
        worker.members,
    ):
        refused(call)
    assert publisher.last_acks("worker-1", 9) == [] and publisher.member("worker-1").status is None


def test_the_publisher_can_not_acknowledge(users: Callable[..., RedisStream]) -> None:
    publisher = users("publisher")
    refused(lambda: publisher.ack("worker-1", b"forged"))
    refused(lambda: publisher.beat("worker-1", b"forged"))


def test_nobody_reaches_another_model_or_comes_without_a_name(
    guarded: Server, users: Callable[..., RedisStream]
) -> None:
    for user in ("publisher", "worker-1"):
        other = users(user, "demo2")
        refused(other.last_ids)
        for _, kind in PAYLOADS:
            refused(lambda: other.read_chunk(PAYLOAD, 0, memoryview(bytearray(9)), carrier=kind))  # noqa: B023
    with pytest.raises(StreamUnavailable, match="refuses the sign-in"):
        users("nobody").last_ids()
    without_name = RedisStream(guarded.url, "demo")
    with pytest.raises(StreamUnavailable, match="refuses the sign-in"):
        without_name.last_ids()
    without_name.close()


def test_the_narrower_roles_of_a_payload_server_are_enough_for_it(
    new_server: Callable[..., Server],
) -> None:
    """As the file's comment grants them."""
    text = re.sub(r"\n#\s*", " ", SHIPPED.read_text())
    granted = re.search(r"the publisher with ((?:\+\S+ ?)+), a worker with ((?:\+\S+ ?)+);", text)
    assert granted is not None
    server = new_server()
    keys = "~refleet:{demo:*}:chunks", "~refleet:{demo:*}:blob:*"
    with server.client() as client:
        for user, rights, way in (("publisher", granted[1], "%RW"), ("worker-1", granted[2], "%R")):
            allowed = [*rights.split(), *(way + key for key in keys)]
            client.execute_command("ACL", "SETUSER", user, "on", f">CHANGE-ME-{user}", "-@all", *allowed)
    streams = {user: server.url_for(user, f"CHANGE-ME-{user}") for user in ("publisher", "worker-1")}
    publisher = RedisStream(server.url, "demo", payload_url=streams["publisher"])
    worker = RedisStream(server.url, "demo", payload_url=streams["worker-1"])
    for payload, kind in PAYLOADS:
        for number in (0, 1, 1):
            publisher.put_chunk(payload, number, b"data", ttl_s=TTL_S, carrier=kind)
        assert worker.read_chunk(payload, 1, memoryview(bytearray(9)), carrier=kind) == 4
        with worker.payload_reader(payload, carrier=kind) as reader:
            assert reader.read(1, memoryview(bytearray(9)), wait_s=5) == 4
        refused(lambda: worker.put_chunk(payload, 2, b"forged", ttl_s=TTL_S, carrier=kind))  # noqa: B023
        publisher.keep_payload(payload, ttl_s=TTL_S)
        assert publisher.payload_chunks(payload) == 2
        publisher.drop_payload(payload)
    assert publisher.payload_facts().run_id and publisher.carrier() in (STREAM, BLOBS)
    publisher.close()
    worker.close()
