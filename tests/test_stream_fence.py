"""At most one publisher's writes enter the log at a time (I13), whatever the server forgets: memory, Valkey, Redis."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from carriers import TTL_S, Carrier, claimed, lease_of
from refleet.common.errors import PublisherBusy, StaleEpoch
from refleet.common.messages import Lease
from refleet.common.stream import NOTHING, Stream

Until = Callable[..., None]


def write(stream: Stream, lease: Lease, how: str) -> None:
    if how == "append":
        stream.append(lease, 1, b"release", ttl_s=TTL_S)
    elif how == "offer":
        stream.offer(lease, b"offer", ttl_s=TTL_S)
    else:
        stream.renew(lease, ttl_s=TTL_S)


WRITES = pytest.mark.parametrize("how", ["append", "offer", "renew"])


def test_the_first_claim_is_epoch_1_and_shows_who_holds_it(carrier: Carrier) -> None:
    stream = carrier.stream()
    assert stream.lease() is None
    assert stream.claim(lease_of("a"), floor=0, ttl_s=TTL_S, take_over=False) == 1
    assert stream.lease() == lease_of("a", epoch=1)


def test_another_publisher_is_refused_while_the_lease_is_held_and_learns_by_whom(carrier: Carrier) -> None:
    stream = carrier.stream()
    lease = claimed(stream, "a")
    with pytest.raises(PublisherBusy) as refused:
        stream.claim(lease_of("b"), floor=9, ttl_s=TTL_S, take_over=False)
    assert str(lease) in str(refused.value) and "--take-over" in refused.value.next
    assert stream.lease() == lease


def test_the_same_publisher_keeps_its_epoch(carrier: Carrier) -> None:
    stream = carrier.stream()
    lease = claimed(stream)
    assert stream.claim(lease, floor=1, ttl_s=TTL_S, take_over=False) == 1
    assert stream.claim(replace(lease, pid=99), floor=0, ttl_s=TTL_S, take_over=True) == 1
    assert stream.lease() == replace(lease, pid=99)


def test_a_publisher_that_forgot_its_epoch_gets_a_new_one(carrier: Carrier) -> None:
    stream = carrier.stream()
    assert [claimed(stream).epoch, claimed(stream).epoch] == [1, 2]


def test_an_epoch_is_above_everything_that_anybody_has_seen(carrier: Carrier) -> None:
    stream = carrier.stream()
    assert stream.claim(lease_of(), floor=41, ttl_s=TTL_S, take_over=False) == 42
    assert stream.claim(lease_of(epoch=42), floor=50, ttl_s=TTL_S, take_over=False) == 51
    carrier.lose()
    assert stream.claim(lease_of(epoch=51), floor=60, ttl_s=TTL_S, take_over=False) == 61


def test_taking_over_fences_the_old_publisher_off(carrier: Carrier) -> None:
    stream = carrier.stream()
    old = claimed(stream, "a")
    new = claimed(stream, "b", take_over=True)
    assert new.epoch == old.epoch + 1
    stream.append(new, 1, b"mine", ttl_s=TTL_S)
    for how in ("append", "offer", "renew"):
        with pytest.raises(StaleEpoch) as refused:
            write(stream, old, how)
        assert f"taken over by {new}" in str(refused.value)
    assert stream.history(9) == [((2, 1), b"mine")] and stream.lease() == new
    assert stream.read((2, 1), "0-0", block_s=0).control == []


def test_taking_over_needs_a_new_epoch_even_with_a_higher_one_at_hand(carrier: Carrier) -> None:
    stream = carrier.stream()
    claimed(stream, "a")
    assert stream.claim(lease_of("b", epoch=5), floor=0, ttl_s=TTL_S, take_over=True) == 6


@WRITES
def test_an_expired_lease_does_not_let_a_stale_epoch_write(carrier: Carrier, until: Until, how: str) -> None:
    stream = carrier.stream()
    old = claimed(stream, "a")
    claimed(stream, "b", take_over=True, ttl_s=0.1)
    until(lambda: stream.lease() is None, "the lease expired")
    with pytest.raises(StaleEpoch, match="a newer publisher raised the epoch to 2"):
        write(stream, old, how)
    assert stream.last_ids() == NOTHING and stream.lease() is None


@WRITES
def test_a_foreign_holder_is_respected_even_where_the_epoch_key_was_lost(carrier: Carrier, how: str) -> None:
    stream = carrier.stream()
    old = claimed(stream, "a")
    new = claimed(stream, "b", take_over=True)
    carrier.lose("epoch")
    with pytest.raises(StaleEpoch, match="taken over by"):
        write(stream, replace(old, epoch=3), how)
    assert stream.last_ids() == NOTHING and stream.lease() == new


@WRITES
def test_a_publisher_restores_the_epoch_that_the_server_lost(carrier: Carrier, how: str) -> None:
    stream = carrier.stream()
    lease = replace(lease_of(), epoch=stream.claim(lease_of(), floor=6, ttl_s=TTL_S, take_over=False))
    carrier.lose()
    write(stream, lease, how)
    assert stream.lease() == lease
    assert stream.claim(lease_of("b"), floor=0, ttl_s=TTL_S, take_over=True) == 8


def test_a_claim_restores_the_epoch_that_the_server_lost(carrier: Carrier) -> None:
    stream = carrier.stream()
    lease = claimed(stream)
    carrier.lose()
    assert stream.claim(lease, floor=1, ttl_s=TTL_S, take_over=False) == 1
    assert stream.claim(lease_of("b"), floor=0, ttl_s=TTL_S, take_over=True) == 2


def test_a_publisher_that_was_fenced_off_comes_back_with_a_higher_epoch(carrier: Carrier, until: Until) -> None:
    stream = carrier.stream()
    old = claimed(stream, "a")
    claimed(stream, "b", take_over=True, ttl_s=0.1)
    until(lambda: stream.lease() is None, "the lease expired")
    assert stream.claim(old, floor=0, ttl_s=TTL_S, take_over=False) == 3


def test_a_lease_expires_and_is_then_free_for_others(carrier: Carrier, until: Until) -> None:
    stream = carrier.stream()
    claimed(stream, "a", ttl_s=0.1)
    until(lambda: stream.lease() is None, "the lease expired")
    assert claimed(stream, "b").epoch == 2


@WRITES
def test_every_write_of_the_publisher_renews_its_lease(carrier: Carrier, until: Until, how: str) -> None:
    stream = carrier.stream()
    lease = claimed(stream, "a", ttl_s=0.3)
    write(stream, lease, how)
    stream.put_chunk("c" * 32, 0, b"as a clock", ttl_s=0.4)
    until(lambda: stream.payload_chunks("c" * 32) == 0, "0.4 s passed")
    assert stream.lease() == lease


@WRITES
def test_epochs_beyond_the_precision_of_a_double_are_compared_exactly(carrier: Carrier, how: str) -> None:
    stream = carrier.stream()
    high = stream.claim(lease_of(), floor=1 << 53, ttl_s=TTL_S, take_over=False)
    assert high == (1 << 53) + 1
    with pytest.raises(StaleEpoch):
        write(stream, lease_of(epoch=high - 1), how)
    write(stream, lease_of(epoch=high), how)


def test_an_epoch_with_more_digits_is_higher(carrier: Carrier) -> None:
    stream = carrier.stream()
    assert stream.claim(lease_of(), floor=9, ttl_s=TTL_S, take_over=False) == 10
    with pytest.raises(StaleEpoch):
        stream.append(lease_of(epoch=9), 1, b"stale", ttl_s=TTL_S)


def test_of_many_claims_at_once_every_one_gets_an_epoch_of_its_own(carrier: Carrier) -> None:
    streams = [carrier.stream() for _ in range(4)]
    with ThreadPoolExecutor(4) as threads:
        epochs = list(threads.map(lambda stream: [claimed(stream).epoch for _ in range(10)], streams))
    assert sorted(epoch for each in epochs for epoch in each) == list(range(1, 41))
