"""A byte changes on disk, in a worker's store or in the publisher's: found, named, healed or refused; never served."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from refleet.common.errors import UnknownVersion
from refleet.common.messages import Ack, Evidence
from refleet.common.tensors import tensor_bytes
from refleet.publisher.verify import verify
from refleet.worker.memory_engine import MemoryEngine
from refleet.worker.worker import Worker
from stored import content, flip, flip_tensor, packs
from world import State, World, checkpoint, holds, reason, served

Until = Callable[..., None]
NAME = "layer.0.weight"
SIZE = 256 * 256 * 4


def data_of(state: State, name: str = NAME) -> bytes:
    return bytes(tensor_bytes(state[name]))


def healing(world: World, worker_id: str = "w0") -> list[str]:
    return [e.failure.tensor for e in world.events[worker_id] if e.text.startswith("healing") and e.failure]  # type: ignore[misc]


def only_on_disk(world: World, until: Until) -> None:
    """What `w0` serves is written whole and no longer in its memory, as it would be after a restart."""
    worker = world.workers["w0"]
    until(lambda: packs(worker.store) and not worker._pursuit.upkeep.busy, "the version is written whole")
    worker.store.memory.close()


def last_serving(world: World, until: Until, *, after: int = 0) -> Ack:
    """The newest SERVING ack, once there are more than `after`."""

    def found() -> list[Ack]:
        return [ack for ack in world.acks("w0") if ack.evidence == Evidence.SERVING]

    until(lambda: len(found()) > after, f"more than {after} acks SERVING")
    return found()[-1]


def test_rot_in_an_unchanged_tensor_is_found_on_restart_and_only_that_tensor_fetched(
    world: World, until: Until
) -> None:
    """It has not moved since v1, so that no delta would ever have touched it."""
    first = checkpoint(1)
    second = first | {"layer.0.bias": torch.ones(256, dtype=torch.float16)}
    publisher, worker = world.publisher(), world.worker()
    publisher.publish(first, version="v1").wait(workers=1, timeout_s=20)
    publisher.publish(second, version="v2").wait(workers=1, timeout_s=20)
    world.stop("w0")
    flip_tensor(worker.store, data_of(first))
    engine = MemoryEngine()
    again = world.worker(engine=engine)
    again.wait("v2", timeout_s=20)
    assert holds(again, second)
    assert healing(world) == [NAME]
    assert SIZE // 2 < last_serving(world, until, after=2).payload_bytes < SIZE * 1.1
    assert len(engine.written) == len(second), "the engine was written once, whole"


def test_rot_in_several_tensors_is_healed_one_by_one(small_world: World) -> None:
    world, state = small_world, checkpoint(1)
    worker = world.worker()
    world.publisher().publish(state, version="v1").wait(workers=1, timeout_s=20)
    world.stop("w0")
    names = ["embed.weight", "layer.0.bias", NAME]
    for name in names:
        flip_tensor(worker.store, data_of(state, name))
    again = world.worker()
    again.wait("v1", timeout_s=20)
    assert holds(again, state)
    assert sorted(healing(world)) == names  # type: ignore[type-var]


def test_a_worker_with_rot_and_no_publisher_serves_nothing_and_says_what_it_needs(
    small_world: World, until: Until
) -> None:
    world, state = small_world, checkpoint(1)
    publisher, worker = world.publisher(), world.worker()
    published = publisher.publish(state, version="v1")
    published.wait(workers=1, timeout_s=20)
    world.stop("w0")
    publisher.stream.drop_payload(published.release.payload.payload_id)  # type: ignore[union-attr]
    publisher.close()
    world.publishers.clear()
    flip_tensor(worker.store, data_of(state))
    engine = MemoryEngine()
    again = world.worker(engine=engine)
    until(lambda: again.board.status.want, "it asks")
    want = again.board.status.want
    assert want is not None
    assert want.target == published.release.fingerprint
    assert len(want.lacks) == 1
    assert served(again) is None
    assert engine.written == []
    world.publisher().publish(state, version="v1")
    again.wait("v1", timeout_s=20)
    assert holds(again, state)


def test_rot_in_a_base_tensor_is_found_when_a_delta_is_decoded(world: World, until: Until) -> None:
    """The digest of the result would blame the publisher; the base is hashed first."""
    first = checkpoint(1)
    second = checkpoint(2, change=0.02, base=first)
    publisher, worker = world.publisher(), world.worker()
    publisher.publish(first, version="v1").wait(workers=1, timeout_s=20)
    only_on_disk(world, until)
    flip_tensor(worker.store, data_of(first))
    published = publisher.publish(second, version="v2")
    worker.wait("v2", timeout_s=20)
    assert holds(worker, second)
    assert healing(world) == [NAME]
    assert not any(e.text.startswith("refused a payload") for e in world.events["w0"])
    ack = last_serving(world, until, after=1)
    assert ack.payload_bytes > SIZE // 2 > published.release.payload_bytes
    publisher.rollback("v1").wait(workers=1, timeout_s=20)
    assert holds(worker, first), "what was lost of v1 came back with the rollback"


def test_rot_is_found_before_the_engine_is_touched_by_a_rollback(small_world: World, until: Until) -> None:
    """I3: everything is on its own disk, and read again before the gate closes."""
    world, first = small_world, checkpoint(1)
    engine, publisher = MemoryEngine(), world.publisher()
    worker = world.worker(engine=engine)
    publisher.publish(first, version="v1").wait(workers=1, timeout_s=20)
    only_on_disk(world, until)
    publisher.publish(checkpoint(2), version="v2").wait(workers=1, timeout_s=20)
    written = len(engine.written)
    flip_tensor(worker.store, data_of(first))
    publisher.close()
    world.publishers.clear()
    back = world.publisher(answer=False).rollback("v1").release
    until(lambda: worker.board.status.want, "it asks for the damaged tensor")
    assert healing(world) == [NAME]
    assert holds(worker, checkpoint(2))
    assert len(engine.written) == written
    assert served(worker).version == "v2"  # type: ignore[union-attr]
    assert [ack for ack in world.acks("w0") if ack.order == back.order] == [], "I4: not STAGED before it is verified"
    with world.publisher()._exclusive("answer"):
        pass
    worker.wait("v1", timeout_s=20)
    assert holds(worker, first)


def test_a_bit_that_flips_in_memory_between_staging_and_applying_is_fetched_again_and_never_served(
    small_world: World, until: Until
) -> None:
    """The read-back finds it, and hashing the memory tells that the engine is not to blame."""
    world, first = small_world, checkpoint(1)
    second = checkpoint(2, change=0.02, base=first)
    publisher, worker = world.publisher(), world.worker()
    publisher.publish(first, version="v1").wait(workers=1, timeout_s=20)
    put, hit = worker.store.memory.put, []

    def rotten(found: dict[bytes, Any]) -> None:
        put(found)
        if not hit:
            data = max(found.values(), key=len)
            data[data.size // 2] ^= 4
            hit.append(data)

    worker.store.memory.put = rotten  # type: ignore[method-assign]
    publisher.publish(second, version="v2")
    worker.wait("v2", timeout_s=20)
    assert hit
    assert healing(world) == [NAME]
    assert holds(worker, second)


@pytest.mark.parametrize("which", ["v1", "v2"])
def test_rot_in_a_manifest_costs_a_transfer_and_nothing_else(small_world: World, which: str) -> None:
    """Of the served version (v2) or of an older one that is only kept as a base."""
    world, states = small_world, {"v1": checkpoint(1), "v2": checkpoint(2), "v3": checkpoint(3)}
    publisher, worker = world.publisher(), world.worker()
    prints = {}
    for version in ("v1", "v2"):
        published = publisher.publish(states[version], version=version)
        published.wait(workers=1, timeout_s=20)
        prints[version] = published.release.fingerprint
    world.stop("w0")
    flip(worker.store.root / "manifests" / prints[which].hex(), 100)
    again = world.worker()
    assert again.wait("v2", timeout_s=20)
    assert holds(again, states["v2"])
    publisher.publish(states["v3"], version="v3").wait(workers=1, timeout_s=20)
    assert holds(again, states["v3"])


# ---------------------------------------------------------------------- the publisher's store


@pytest.fixture
def waiting(small_world: World, until: Until) -> Worker:
    """A worker that serves v1 and asks for v2, whose payload is gone; nobody answers."""
    publisher, worker = small_world.publisher(answer=False), small_world.worker()
    publisher.publish(checkpoint(1), version="v1")
    worker.wait("v1", timeout_s=20)
    append = publisher.stream.append

    def without_payload(*args: Any, **options: Any) -> None:
        publisher.stream.drop_payload(publisher.book.payloads()[0].payload_id)
        append(*args, **options)

    publisher.stream.append = without_payload  # type: ignore[method-assign]
    publisher.publish(checkpoint(2), version="v2")
    until(lambda: worker.board.status.want, "it asks for v2")
    return worker


def test_rot_in_the_base_while_a_worker_waits_changes_what_it_asks_for(
    small_world: World, waiting: Worker, until: Until
) -> None:
    """What it shows as held must not be what it held when it began to wait: no answer to that would ever do."""
    (base,) = waiting.board.status.have
    flip(waiting.store.root / "manifests" / base.hex(), at=60)
    until(lambda: waiting.board.status.have == (), "it shows that it holds nothing to build on any more")
    small_world.publisher(answer=True).rollback("v2")
    assert waiting.wait("v2", timeout_s=20).version == "v2"


def test_a_worker_that_waits_goes_on_asking_when_verify_finds_its_engine_wrong(
    small_world: World, waiting: Worker, until: Until
) -> None:
    engine = waiting.engine
    assert isinstance(engine, MemoryEngine)
    engine.tensors[NAME] = bytes(SIZE)
    verify(small_world.carrier.stream(), timeout_s=20)
    until(lambda: waiting.board.status.want, "it still shows what it needs")
    small_world.publisher(answer=True).rollback("v2")
    assert waiting.wait("v2", timeout_s=20).version == "v2"


def test_a_delta_is_encoded_without_a_damaged_base_tensor(small_world: World) -> None:
    world = small_world
    first = checkpoint(1)
    second = checkpoint(2, change=0.02, base=first)
    publisher, worker = world.publisher(), world.worker()
    publisher.publish(first, version="v1").wait(workers=1, timeout_s=20)
    publisher.close()  # it is written whole by then, and in nobody's memory
    world.publisher().collect()  # the delta that it came as went
    flip_tensor(publisher.store, data_of(first))
    published = world.publisher().publish(second, version="v2")
    published.wait(workers=1, timeout_s=20)
    assert holds(worker, second)
    assert published.release.payload_bytes > SIZE // 2, "that tensor travelled whole"


def test_a_rollback_to_damaged_bytes_publishes_nothing_and_names_the_way_out(small_world: World, until: Until) -> None:
    world, states = small_world, [checkpoint(n) for n in range(3)]
    publisher, worker = world.publisher(), world.worker(keep=1)
    for n, state in enumerate(states):
        publisher.publish(state, version=f"v{n}").wait(workers=1, timeout_s=20)
        until(lambda: not publisher._anchors.busy, "the version is written whole")
    publisher.collect()  # the deltas that they came as went
    flip_tensor(publisher.store, data_of(states[0]))
    error = reason(lambda: publisher.rollback("v0"))
    assert isinstance(error, UnknownVersion)
    assert "damaged" in error.what
    assert "publish the checkpoint again" in error.next
    assert [r.version for r in publisher.book.releases()] == ["v0", "v1", "v2"]
    assert served(worker).version == "v2"  # type: ignore[union-attr]
    assert publisher.book.payloads() == [], "what was written of it is gone"
    another_process = world.publisher()
    another_process.publish(states[0], version="v0").wait(workers=1, timeout_s=20)
    assert holds(worker, states[0]), "as the message said"


def test_a_damaged_manifest_of_the_target_does_not_stop_the_next_publish(small_world: World) -> None:
    world, first = small_world, checkpoint(1)
    publisher, worker = world.publisher(), world.worker()
    one = publisher.publish(first, version="v1")
    one.wait(workers=1, timeout_s=20)
    flip(publisher.store.root / "manifests" / one.release.fingerprint.hex(), 100)
    assert isinstance(reason(lambda: world.publisher().rollback("v1")), UnknownVersion)
    publisher.publish(checkpoint(2), version="v2").wait(workers=1, timeout_s=20)
    assert holds(worker, checkpoint(2))


def test_publishing_the_same_checkpoint_again_heals_the_store(small_world: World) -> None:
    world, state = small_world, checkpoint(1)
    publisher = world.publisher()
    fingerprint = publisher.publish(state, version="v1").release.fingerprint
    publisher.close()
    flip_tensor(publisher.store, data_of(state))
    again = world.publisher()
    assert again.publish(state, version="v1").already
    again.close()
    healed = world.publisher()
    found = content(healed.store, healed.store.manifest(fingerprint))
    assert found[NAME] == data_of(state)
