"""The whole path: publish, stage, switch, acknowledge, roll back, join late, catch up."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from refleet.common.messages import Evidence
from stored import packs
from world import World, checkpoint, holds, served

Until = Callable[..., None]


def test_every_worker_serves_a_published_version_bit_for_bit(world: World) -> None:
    workers = [world.worker(f"w{n}") for n in range(3)]
    state = checkpoint(1)
    acks = world.publisher().publish(state, version="v1").wait(workers=3, timeout_s=20)
    assert {ack.evidence for ack in acks.values()} == {Evidence.SERVING}
    assert all(holds(worker, state) for worker in workers)
    assert {served(worker).version for worker in workers} == {"v1"}  # type: ignore[union-attr]


def test_a_small_change_travels_small_and_arrives_exactly(world: World) -> None:
    worker, publisher = world.worker(), world.publisher()
    first = checkpoint(1)
    publisher.publish(first, version="v1").wait(workers=1)
    second = checkpoint(2, change=0.01, base=first)
    published = publisher.publish(second, version="v2")
    published.wait(workers=1)
    assert holds(worker, second)
    assert published.release.payload_bytes < published.release.full_bytes * 0.05


def test_an_ack_claims_each_step_of_the_ladder_once_and_in_order(world: World) -> None:
    world.worker()
    published = world.publisher().publish(checkpoint(1), version="v1")
    published.wait(workers=1)
    acks = [ack for ack in world.acks("w0") if ack.order == published.release.order]
    assert [ack.evidence for ack in acks] == [Evidence.RECEIVED, Evidence.STAGED, Evidence.SERVING]
    assert acks[0].fingerprint is None, "nothing is installed before the switch"
    assert acks[-1].fingerprint == published.release.fingerprint
    assert acks[-1].payload_bytes == published.release.payload_bytes
    assert {"stage", "apply", "read_back", "probe", "persist", "pause"} <= acks[-1].timings_ms.keys()


def test_a_tensor_that_returns_to_an_earlier_value_does_not_make_a_step_cost_the_disk_a_whole_version(
    small_world: World, until: Until
) -> None:
    worker, publisher = small_world.worker(keep=4), small_world.publisher()
    states = [checkpoint(1)]
    states += [checkpoint(seed, change=0.01, base=states[0]) for seed in (2, 3)]
    states[1]["steps"], states[2]["steps"] = states[0]["steps"] + 1, states[0]["steps"]
    publisher.publish(states[0]).wait(workers=1)
    until(lambda: packs(worker.store) and not worker._pursuit.upkeep.busy, "the version is written whole")
    for state in states[1:]:
        publisher.publish(state).wait(workers=1)
        assert holds(worker, state)
    assert len(packs(worker.store)) == 1


def test_a_fleet_that_serves_already_is_not_waited_for(
    world: World, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, publisher = world.worker(), world.publisher()
    published = publisher.publish(checkpoint(1), version="v1")
    until(lambda: world.acks("w0")[-1:] and world.acks("w0")[-1].evidence == Evidence.SERVING, "w0 said SERVING")
    waits: list[float] = []
    acks = publisher.stream.acks

    def noted(after: dict[str, str], *, block_s: float) -> dict[str, list[tuple[str, bytes]]]:
        waits.append(block_s)
        return acks(after, block_s=block_s)

    monkeypatch.setattr(publisher.stream, "acks", noted)
    assert published.wait(workers=1).keys() == {worker.id}
    assert waits == [0]


def test_rollback_is_a_newer_release_of_the_same_content_without_payload(world: World) -> None:
    """I7, I8."""
    worker, publisher = world.worker(), world.publisher()
    first, second = checkpoint(1), checkpoint(2)
    one = publisher.publish(first, version="v1")
    one_ack = one.wait(workers=1)["w0"]
    publisher.publish(second, version="v2").wait(workers=1)
    back = publisher.rollback("v1", message="v2 was bad")
    ack = back.wait(workers=1)["w0"]
    assert holds(worker, first)
    assert back.release.order > one.release.order
    assert (back.release.kind, back.release.payload_bytes, ack.payload_bytes) == ("rollback", 0, 0)
    assert (ack.fingerprint, ack.probe) == (one_ack.fingerprint, one_ack.probe)


def test_a_rollback_whose_bytes_a_worker_lacks_carries_them(world: World) -> None:
    publisher = world.publisher()
    states = [checkpoint(n) for n in range(4)]
    worker = world.worker(keep=1)
    for n, state in enumerate(states):
        publisher.publish(state, version=f"v{n}").wait(workers=1)
    back = publisher.rollback("v0")
    back.wait(workers=1, timeout_s=20)
    assert back.release.payload_bytes > 0
    assert holds(worker, states[0])


def test_a_late_joiner_converges_from_nothing(world: World) -> None:
    """I11: the payload of the release is relative to a version that it never had."""
    publisher = world.publisher()
    early = world.worker("early")
    first = checkpoint(1)
    publisher.publish(first, version="v1").wait(workers=1)
    second = checkpoint(2, change=0.02, base=first)
    publisher.publish(second, version="v2").wait(workers=1)
    late = world.worker("late")
    assert late.wait("v2", timeout_s=20).version == "v2"
    assert holds(late, second)
    assert served(early) == served(late)


def test_a_worker_that_slept_through_versions_gets_one_direct_delta(world: World, until: Until) -> None:
    publisher = world.publisher()
    world.worker()
    states = [checkpoint(0)]
    publisher.publish(states[0], version="v0").wait(workers=1)
    world.stop("w0")
    for n in range(1, 4):
        states.append(checkpoint(n, change=0.01, base=states[-1]))
        published = publisher.publish(states[-1], version=f"v{n}")
    worker = world.worker()
    assert worker.wait("v3", timeout_s=20)
    assert holds(worker, states[-1])
    until(lambda: world.acks("w0")[-1].fingerprint == published.release.fingerprint, "it acknowledges v3")
    ack = world.acks("w0")[-1]
    assert 0 < ack.payload_bytes < published.release.full_bytes * 0.1, "a delta from v0, not a snapshot"


def test_a_restarted_worker_serves_from_its_own_disk_without_the_publisher(world: World, until: Until) -> None:
    publisher, state = world.publisher(), checkpoint(1)
    world.worker()
    publisher.publish(state, version="v1").wait(workers=1)
    world.stop("w0")
    publisher.close()
    world.publishers.remove(publisher)
    before = len(world.acks("w0"))
    again = world.worker()
    assert again.wait("v1", timeout_s=20)
    assert holds(again, state)
    until(lambda: len(world.acks("w0")) > before, "the restarted worker acknowledges")
    assert [ack.payload_bytes for ack in world.acks("w0")[before:]] == [0]


def test_a_hundred_versions_in_a_row_stay_exact(small_world: World) -> None:
    world, state = small_world, checkpoint(0)
    worker, publisher = world.worker(), world.publisher(keep=3)
    fingerprints = []
    for n in range(100):
        state = checkpoint(n, change=0.02, base=state)
        published = publisher.publish(state, version=f"step-{n}")
        published.wait(workers=1)
        fingerprints.append(published.release.fingerprint)
        assert holds(worker, state), f"step-{n}"
    assert len(set(fingerprints)) == 100


@pytest.mark.parametrize("change", ["nothing", "one element", "signs of zero", "NaN payloads", "everything"])
def test_odd_changes_arrive_exactly(small_world: World, change: str) -> None:
    """I18, and the cases where float comparison would see no change or always one."""
    worker, publisher = small_world.worker(), small_world.publisher()
    first = {"a": torch.zeros(5000), "b": torch.full((100,), float("nan"), dtype=torch.bfloat16)}
    second = {name: tensor.clone() for name, tensor in first.items()}
    bits = second["a"].view(torch.int32), second["b"].view(torch.int16)
    if change == "one element":
        bits[0][4999] = 1
    elif change == "signs of zero":
        bits[0][::7] = -(2**31)
    elif change == "NaN payloads":
        bits[1][::2] = 0x7F81
    elif change == "everything":
        bits[0][:] = torch.arange(5000, dtype=torch.int32) * 654321
    publisher.publish(first, version="v1").wait(workers=1)
    published = publisher.publish(second, version="v2")
    published.wait(workers=1)
    assert holds(worker, second)
    assert (published.release.changed_tensors == 0) == (change == "nothing")


def test_workers_with_the_same_need_share_one_payload(small_world: World, until: Until) -> None:
    publisher = small_world.publisher()
    world_worker = small_world.worker("w0")
    publisher.publish(checkpoint(1), version="v1").wait(workers=1)
    until(lambda: not publisher.book.payloads(), "the first payload is dropped when everybody has it")
    joiners = [small_world.worker(f"late-{n}") for n in range(3)]
    for joiner in joiners:
        joiner.wait("v1", timeout_s=20)
    offered = {e.text for events in small_world.events.values() for e in events}
    assert served(world_worker) == served(joiners[0])
    stream = small_world.carrier.stream()
    control = stream.read((0, 0), "0-0", block_s=0).control
    offers = [entry for _, entry in control if b"\xa5offer" in entry]
    assert 0 < len(offers) < 3, f"{len(offers)} offers for one need; {offered}"


def test_payloads_are_dropped_when_everybody_has_them(world: World, until: Until) -> None:
    publisher = world.publisher()
    world.worker()
    published = publisher.publish(checkpoint(1), version="v1")
    published.wait(workers=1)
    assert published.release.payload is not None
    stream, payload_id = world.carrier.stream(), published.release.payload.payload_id
    until(lambda: stream.payload_chunks(payload_id) == 0, "the payload is gone")
