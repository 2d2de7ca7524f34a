"""One contract for every carrier: in memory, on Valkey, on Redis."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from carriers import PAYLOAD, TTL_S, Carrier, claimed
from refleet.common.errors import LimitExceeded, StreamError, StreamUnavailable, UsageError
from refleet.common.limits import LIMITS
from refleet.common.stream import NOTHING, Keys

Until = Callable[..., None]


def test_a_reader_gets_what_is_after_its_cursors_oldest_first(carrier: Carrier) -> None:
    stream = carrier.stream()
    lease = claimed(stream)
    for seq in (1, 2, 3):
        stream.append(lease, seq, b"release %d" % seq, ttl_s=TTL_S)
    stream.offer(lease, b"offer", ttl_s=TTL_S)
    stream.ask(b"verify")

    first = stream.read((0, 0), "0-0", block_s=0)

    assert first.log == [((1, 1), b"release 1"), ((1, 2), b"release 2"), ((1, 3), b"release 3")]
    assert [record for _, record in first.control] == [b"offer", b"verify"]
    rest = stream.read((1, 2), first.control[0][0], block_s=0)
    assert (rest.log, rest.control) == (first.log[2:], first.control[1:])
    assert stream.read((0, 0), "0-0", block_s=0, count=1) == replace(
        first, log=first.log[:1], control=first.control[:1]
    )


@pytest.mark.parametrize("what", ["release", "request"])
def test_a_waiting_reader_wakes_up_when_somebody_else_writes(carrier: Carrier, until: Until, what: str) -> None:
    reader, writer = carrier.stream(), carrier.stream()
    lease = claimed(writer)
    with ThreadPoolExecutor(1) as threads:
        started = time.monotonic()
        waiting = threads.submit(reader.read, (0, 0), "0-0", block_s=60)
        until(carrier.waiting, "the reader waits")
        assert not waiting.done()
        if what == "release":
            writer.append(lease, 1, b"new", ttl_s=TTL_S)
        else:
            writer.ask(b"new")
        found = waiting.result(20)
    assert [record for _, record in [*found.log, *found.control]] == [b"new"]
    assert time.monotonic() - started < 20


def test_a_reader_without_news_returns_empty_handed_after_its_wait(carrier: Carrier) -> None:
    started = time.monotonic()
    found = carrier.stream().read((0, 0), "0-0", block_s=0.2)
    assert (found.log, found.control) == ([], [])
    assert 0.2 <= time.monotonic() - started < 10


def test_the_history_is_the_newest_releases_oldest_first(carrier: Carrier) -> None:
    stream = carrier.stream()
    assert stream.history(5) == []
    lease = claimed(stream)
    for seq in (1, 2, 3):
        stream.append(lease, seq, b"%d" % seq, ttl_s=TTL_S)
    assert stream.history(2) == [((1, 2), b"2"), ((1, 3), b"3")]


def test_a_resent_release_is_in_the_log_once(carrier: Carrier) -> None:
    stream = carrier.stream()
    lease = claimed(stream)
    stream.append(lease, 1, b"release", ttl_s=TTL_S)
    stream.append(lease, 2, b"another", ttl_s=TTL_S)
    stream.append(lease, 1, b"release", ttl_s=TTL_S)
    assert stream.history(9) == [((1, 1), b"release"), ((1, 2), b"another")]


def test_a_release_never_replaces_another_one(carrier: Carrier) -> None:
    stream = carrier.stream()
    lease = claimed(stream)
    stream.append(lease, 1, b"release", ttl_s=TTL_S)
    with pytest.raises(StreamError, match="release 1-1 is already there with other bytes"):
        stream.append(lease, 1, b"forged!", ttl_s=TTL_S)
    assert stream.history(9) == [((1, 1), b"release")]


def test_the_log_never_runs_backwards(carrier: Carrier) -> None:
    stream = carrier.stream()
    lease = claimed(stream)
    stream.append(lease, 5, b"five", ttl_s=TTL_S)
    with pytest.raises(StreamError, match=r"release 1-4 can't be appended: the log has gone on to 1-5"):
        stream.append(lease, 4, b"four", ttl_s=TTL_S)
    assert stream.history(9) == [((1, 5), b"five")]


def test_log_control_and_acks_are_trimmed_to_about_their_limits(carrier: Carrier) -> None:
    small = replace(LIMITS, log_entries=100, control_entries=100, ack_entries=100)
    stream = carrier.stream(limits=small)
    lease = claimed(stream)
    for seq in range(1, 402):
        stream.append(lease, seq, b"release", ttl_s=TTL_S)
        stream.offer(lease, b"offer", ttl_s=TTL_S)
        stream.ack("w1", b"ack %d" % seq)
    # `MAXLEN ~` removes whole nodes of 100 entries
    for kept in (stream.history(1000), stream.read((0, 0), "0-0", block_s=0, count=1000).control):
        assert 100 <= len(kept) <= 200
    acks = stream.last_acks("w1", 1000)
    assert 100 <= len(acks) <= 200 and acks[0][1] == b"ack 401"
    assert stream.history(1)[0][0] == (1, 401)


def test_a_record_that_no_reader_would_accept_is_not_sent(carrier: Carrier) -> None:
    stream = carrier.stream(limits=replace(LIMITS, record_bytes=100, chunk_bytes_max=100))
    lease = claimed(stream)
    large = bytes(101)
    for send in (
        lambda: stream.append(lease, 1, large, ttl_s=TTL_S),
        lambda: stream.offer(lease, large, ttl_s=TTL_S),
        lambda: stream.ask(large),
        lambda: stream.ack("w1", large),
        lambda: stream.beat("w1", large),
        lambda: stream.put_chunk(PAYLOAD, 0, large, ttl_s=TTL_S),
    ):
        with pytest.raises(LimitExceeded, match="101 bytes exceeds the limit of 100"):
            send()
    assert (stream.last_ids(), stream.members(), stream.last_acks("w1", 1)) == (NOTHING, [], [])
    assert stream.payload_chunks(PAYLOAD) == 0


def test_lost_data_shows_in_the_last_ids(carrier: Carrier) -> None:
    stream = carrier.stream()
    assert stream.last_ids() == NOTHING
    stream.append(claimed(stream), 7, b"release", ttl_s=TTL_S)
    stream.ask(b"verify")
    control = stream.read((0, 0), "0-0", block_s=0).control[-1][0]
    assert stream.last_ids() == ((1, 7), control)
    carrier.lose()
    assert stream.last_ids() == NOTHING


def test_models_do_not_see_each_other(carrier: Carrier) -> None:
    stream = carrier.stream()
    stream.put_chunk(PAYLOAD, 0, b"data", ttl_s=TTL_S)
    stream.append(claimed(stream), 1, b"release", ttl_s=TTL_S)
    stream.beat("w1", b"here")
    carrier.model += "-x"  # type: ignore[attr-defined]
    other = carrier.stream()
    assert (other.payload_chunks(PAYLOAD), other.last_ids(), other.lease(), other.members()) == (0, NOTHING, None, [])
    carrier.model = stream.model  # type: ignore[attr-defined]


def test_closing_ends_the_wait_of_another_thread(carrier: Carrier, until: Until) -> None:
    stream = carrier.stream()
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(stream.read, (0, 0), "0-0", block_s=60)
        until(carrier.waiting, "the reader waits")
        stream.close()
        with pytest.raises(StreamUnavailable, match="was closed"):
            waiting.result(10)
    with pytest.raises(StreamUnavailable, match="was closed"):
        stream.last_ids()


def test_facts_name_the_server_and_its_start(carrier: Carrier) -> None:
    facts = carrier.stream().facts()
    assert facts.server == "memory" or facts.server.split(" ")[0] in ("Valkey", "Redis")
    assert (facts.policy, facts.aof, facts.max_bytes) == ("noeviction", False, 0)
    assert facts.run_id == carrier.stream().facts().run_id and facts.run_id


@pytest.mark.parametrize("name", ["", "a:b", "a}b", "a b", "../a", "é", "a" * 65])
def test_no_name_reaches_another_key(carrier: Carrier, name: str) -> None:
    stream = carrier.stream()
    with pytest.raises(UsageError, match="worker id"):
        stream.ack(name, b"ack")
    with pytest.raises(UsageError, match="payload id"):
        stream.chunks(name, 0, 1)
    with pytest.raises(UsageError, match="model name"):
        Keys(name)
