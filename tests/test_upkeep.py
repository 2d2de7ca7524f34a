"""What may be dropped from the server and from stores, and when."""

from __future__ import annotations

from collections.abc import Callable

from refleet.publisher.payloads import Payloads
from world import World, checkpoint

Until = Callable[..., None]


def test_upkeep_leaves_the_payload_of_a_command_that_is_about_to_announce_it(small_world: World) -> None:
    publisher = small_world.publisher()
    for number in (1, 2):
        publisher.publish(checkpoint(number), version=f"v{number}")
    service, stream = publisher.service, publisher.stream
    assert service is not None
    with publisher.store.lock("publish", wait_s=20, holder="a rollback in another process"):
        payloads = Payloads(
            stream, publisher.book, budget_bytes=None, wait_s=1, notify=small_world.notes.append,
            announce=lambda *_: None,
        )  # fmt: skip
        ref = payloads.send(publisher.book.manifest_of("v1"), publisher.book.manifest_of("v2"))
        service._upkeep_s = 0.0
        service.round()
        assert stream.payload_chunks(ref.payload_id) > 0
    service._upkeep_s = 0.0
    service.round()
    assert stream.payload_chunks(ref.payload_id) == 0, "nobody is on the way to v1"


def test_a_worker_tells_the_fleet_what_its_upkeep_removed(small_world: World, until: Until) -> None:
    """Else a rollback would count on a version that is gone."""
    publisher, worker = small_world.publisher(), small_world.worker(keep=1)
    for seed in range(3):
        published = publisher.publish(checkpoint(seed), version=f"v{seed}")
        published.wait(workers=1, timeout_s=20)
    until(lambda: worker.board.status.have == (published.release.fingerprint,), "only the last one is told of")
    assert worker.store.manifests() == [published.release.fingerprint]
