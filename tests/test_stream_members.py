"""What workers say and what is known of them: acks, heartbeats, members; on every carrier."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from carriers import Carrier, OnServer, claimed
from refleet.common.errors import LimitExceeded
from refleet.common.limits import LIMITS
from refleet.common.memory_stream import MemoryServer, MemoryStream
from servers import Server

Until = Callable[..., None]


def test_acks_are_read_by_worker_from_each_cursor(carrier: Carrier) -> None:
    stream = carrier.stream()
    for record in (b"one", b"two"):
        stream.ack("w1", record)
    stream.ack("w2", b"three")
    found = stream.acks({"w1": "0-0", "w2": "0-0", "w3": "0-0"}, block_s=0)
    assert {w: [r for _, r in acks] for w, acks in found.items()} == {"w1": [b"one", b"two"], "w2": [b"three"]}
    cursor, other = found["w1"][0][0], found["w2"][0][0]
    assert stream.acks({"w1": cursor, "w2": other}, block_s=0) == {"w1": found["w1"][1:]}
    assert stream.last_acks("w1", 1) == found["w1"][1:]
    assert stream.last_acks("w1", 9) == found["w1"][::-1]
    assert stream.last_acks("w3", 9) == []


def test_who_waits_for_acks_wakes_up_with_the_first(carrier: Carrier, until: Until) -> None:
    publisher, worker = carrier.stream(), carrier.stream()
    started = time.monotonic()
    assert publisher.acks({}, block_s=60) == {}
    assert publisher.acks({"w1": "0-0"}, block_s=0.05) == {}
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(publisher.acks, {"w1": "0-0", "w2": "0-0"}, block_s=60)
        until(carrier.waiting, "the publisher waits")
        worker.ack("w2", b"served")
        assert [record for _, record in waiting.result(20)["w2"]] == [b"served"]
    assert time.monotonic() - started < 20


def test_members_are_listed_with_status_and_age(carrier: Carrier, until: Until) -> None:
    stream = carrier.stream()
    assert stream.members() == []
    stream.beat("w2", b"old")
    stream.beat("w1", b"")
    stream.beat("w2", b"new")
    assert [(m.worker, m.status) for m in stream.members()] == [("w1", b""), ("w2", b"new")]
    until(lambda: (stream.member("w2").seen_s or 0) > 0.3, "the heartbeat ages")
    stream.beat("w2", b"new", keep_s=1000)
    (first, second) = stream.members()
    assert 0 <= (second.seen_s or 0) < 0.3 < (first.seen_s or 0) < 60


def test_an_expired_heartbeat_leaves_a_member_without_status(carrier: Carrier, until: Until) -> None:
    stream = carrier.stream()
    stream.beat("w1", b"here", keep_s=0.2)
    stream.ack("w1", b"ack")
    stream.beat("w1", b"here", keep_s=0.2)
    until(lambda: stream.member("w1").status is None, "the heartbeat expired")
    (member,) = stream.members()
    assert (member.worker, member.status, member.seen_s) == ("w1", None, None)
    assert len(stream.last_acks("w1", 9)) == 1
    assert stream.member("never-seen").seen_s is None


def test_who_leaves_is_no_member_any_more(carrier: Carrier) -> None:
    stream = carrier.stream()
    for worker in ("w1", "w2"):
        stream.beat(worker, b"here")
    stream.ack("w1", b"last words")
    stream.leave("w1")
    assert [member.worker for member in stream.members()] == ["w2"]
    assert stream.member("w1").status is None
    assert [record for _, record in stream.last_acks("w1", 1)] == [b"last words"]


def test_too_many_members_are_refused_before_they_are_read(carrier: Carrier) -> None:
    stream = carrier.stream(limits=replace(LIMITS, members=2))
    for worker in ("w1", "w2", "w3"):
        stream.beat(worker, b"here")
    with pytest.raises(LimitExceeded, match=r"3 members of .* exceed the limit of 2"):
        stream.members()


def test_time_in_memory_is_the_injected_clock() -> None:
    now = [1000.0]
    stream = MemoryStream(MemoryServer(lambda: now[0]), "m")
    lease = claimed(stream, ttl_s=10)
    stream.beat("w1", b"here", keep_s=60)
    now[0] += 9
    assert stream.lease() == lease and stream.member("w1").seen_s == 9
    now[0] += 1
    assert stream.lease() is None
    now[0] += 50
    assert stream.member("w1").status is None
    stream.ack("w1", b"ack")
    stream.beat("w1", b"here")
    now[0] += 86401
    assert stream.last_acks("w1", 1) == []


def test_acks_live_a_day_longer_than_the_last_heartbeat(server: Server, model: str) -> None:
    carrier = OnServer(server, model)
    stream = carrier.stream()
    stream.ack("w1", b"ack")
    stream.beat("w1", b"here", keep_s=60)
    assert 86000_000 < carrier.client.pttl(f"refleet:{{{model}}}:ack:w1") <= 86400_000
    carrier.close()


def test_strangers_in_the_member_list_are_ignored(server: Server, model: str) -> None:
    carrier = OnServer(server, model)
    stream = carrier.stream()
    stream.beat("w1", b"here")
    carrier.client.sadd(f"refleet:{{{model}}}:members", "../w2", b"\xff", "a:b")
    assert [member.worker for member in stream.members()] == ["w1"]
    carrier.close()


def test_no_more_of_a_status_is_read_than_a_record_may_be(server: Server, model: str) -> None:
    carrier = OnServer(server, model)
    stream = carrier.stream(limits=replace(LIMITS, record_bytes=100))
    stream.beat("w1", b"here")
    carrier.client.set(f"refleet:{{{model}}}:worker:w1", bytes(10_000), px=60_000)
    status = stream.member("w1").status
    assert status is not None and len(status) == 101
    carrier.close()


def test_a_heartbeat_that_is_not_of_our_making_is_none(server: Server, model: str) -> None:
    carrier = OnServer(server, model)
    stream = carrier.stream()
    carrier.client.set(f"refleet:{{{model}}}:worker:w1", b"short", px=60_000)
    carrier.client.set(f"refleet:{{{model}}}:worker:w2", b"one that never expires")
    assert (stream.member("w1").status, stream.member("w2").status) == (None, None)
    carrier.close()
