"""A record of the log that is damaged on its way to a worker, and whole in the server, costs one more look."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from refleet.common.memory_stream import MemoryStream
from refleet.common.stream import Entries
from world import World, checkpoint, holds

Until = Callable[..., None]


@pytest.fixture
def damage(small_world: World, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often a log entry is still damaged when somebody reads it, with the number of those that were so far."""
    state, read = [0, 0], MemoryStream.read

    def damaged(stream: MemoryStream, *places: object, **options: object) -> Entries:
        entries = read(stream, *places, **options)  # type: ignore[arg-type]
        if not (state[0] and entries.log):
            return entries
        state[:] = state[0] - 1, state[1] + 1
        (order, data), *rest = entries.log
        at = 40 + state[1]  # another bit each time
        return replace(entries, log=[(order, data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]), *rest])

    monkeypatch.setattr(MemoryStream, "read", damaged)
    return state


@pytest.mark.parametrize("times", [1, 3])
def test_a_release_that_was_damaged_on_its_way_is_read_again(
    small_world: World, damage: list[int], until: Until, times: int
) -> None:
    publisher, worker = small_world.publisher(), small_world.worker()
    publisher.publish(checkpoint(1), version="v1").wait(workers=1, timeout_s=20)
    damage[0] = times
    publisher.publish(checkpoint(2), version="v2")
    worker.wait("v2", timeout_s=20)
    assert damage == [0, times]
    assert holds(worker, checkpoint(2))
    assert worker.board.status.refused == times, "each look that showed it damaged is counted"


def test_a_record_that_is_bad_in_the_server_is_read_twice_and_counted_once(small_world: World, until: Until) -> None:
    publisher, worker = small_world.publisher(), small_world.worker()
    release = publisher.publish(checkpoint(1), version="v1")
    release.wait(workers=1, timeout_s=20)
    stream = small_world.carrier.stream()
    stream.append(publisher.claim.lease(), release.release.seq + 1, b"no record", ttl_s=30)
    until(lambda: worker.board.status.refused, "it is refused")
    until(lambda: worker._follower._doubt is None, "it was looked at again")
    publisher.publish(checkpoint(2), version="v2").wait(workers=1, timeout_s=20)
    assert worker.board.status.refused == 1
