"""Connections that break in the middle of a command, a slow reader, a publisher that was paused and superseded."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from carriers import OnServer
from refleet.common import redis_scripts
from refleet.common.errors import OverBudget, StaleEpoch
from refleet.common.messages import Evidence
from refleet.common.types import BLOBS
from refleet.publisher import Publisher
from refleet.worker.memory_engine import MemoryEngine
from servers import Server
from tcp_proxy import Fault, TcpProxy
from world import World, checkpoint, holds, reason, served
from wrapped import Interrupted, Pause

Until = Callable[..., None]
APPEND = redis_scripts._sha1(redis_scripts.APPEND).encode()


@pytest.fixture
def cut(server: Server, tmp_path: Path, model: str) -> Iterator[tuple[World, TcpProxy, OnServer]]:
    """A fleet, and a carrier whose streams go through a proxy."""
    direct, through = OnServer(server, model), OnServer(server, model)
    world = World(direct, tmp_path, model)
    with TcpProxy(server.port) as proxy:
        through._url = proxy.url
        yield world, proxy, through
        world.close()
    through.close()
    direct.close()


@pytest.mark.parametrize("fault", [Fault.CUT_REQUEST, Fault.LOSE_REPLY, Fault.TEAR_REPLY])
@pytest.mark.parametrize("match", [b"XADD", APPEND], ids=["put_chunk", "append"])
def test_a_publisher_cut_off_in_the_middle_of_a_command_releases_once(
    cut: tuple[World, TcpProxy, OnServer], until: Until, match: bytes, fault: Fault
) -> None:
    """I9, I15, I24."""
    world, proxy, through = cut
    worker = world.worker()
    publisher = Publisher(through.stream(), model=world.model, store=world.folder / "store")
    world.publishers.append(publisher)
    publisher.publish(checkpoint(1), version="v1").wait(workers=1, timeout_s=20)
    proxy.break_next(fault, match, forwarded_bytes=3)
    published = publisher.publish(checkpoint(2), version="v2")  # what was cut is sent again and compared
    assert proxy.fired.is_set()
    published.wait(workers=1, timeout_s=20)
    assert publisher.publish(checkpoint(2), version="v2").already
    assert holds(worker, checkpoint(2))
    assert [order for order, _ in world.carrier.stream().history(9)] == [(1, 1), (1, 2)]
    assert sum("apply" in ack.timings_ms for ack in world.acks("w0")) == 2, "each version was switched to once"


@pytest.mark.parametrize(
    ("match", "fault"),
    [
        (b"XREAD", Fault.CUT_REQUEST),
        (b"XREAD", Fault.TEAR_REPLY),
        (b":chunks", Fault.TEAR_REPLY),
        (b":ack:", Fault.LOSE_REPLY),
    ],
    ids=["read", "read torn", "chunks torn", "reply to an ack"],
)
def test_a_worker_cut_off_in_the_middle_of_a_command_catches_up(
    cut: tuple[World, TcpProxy, OnServer], until: Until, match: bytes, fault: Fault
) -> None:
    world, proxy, through = cut
    publisher = world.publisher()
    world.carrier = through
    if match == b":chunks" and through.stream().carrier() == BLOBS:
        match = b":blob:"
    worker = world.worker()
    publisher.publish(checkpoint(1), version="v1").wait(workers=1, timeout_s=20)
    proxy.break_next(fault, match, forwarded_bytes=3)
    publisher.publish(checkpoint(2), version="v2").wait(workers=1, timeout_s=20)
    until(proxy.fired.is_set, "the connection was cut")
    publisher.publish(checkpoint(3), version="v3").wait(workers=1, timeout_s=20)
    assert holds(worker, checkpoint(3))
    best = [ack for ack in world.acks("w0") if ack.version in ("v2", "v3")]
    assert best[-1].evidence == Evidence.SERVING
    assert all(ack.failure is None for ack in best)


def test_a_publisher_ends_soon_while_its_server_does_not_answer(
    cut: tuple[World, TcpProxy, OnServer], until: Until
) -> None:
    world, proxy, through = cut
    publisher = Publisher(through.stream(), model=world.model, store=world.folder / "store", notify=world.notes.append)
    publisher.publish(checkpoint(1), version="v1")
    with proxy.partition():
        until(lambda: proxy.held, "its service asks")
        started = time.monotonic()
        publisher.close()
        assert time.monotonic() - started < 10, "it waited for the answer"
    assert world.notes == []


# ---------------------------------------------------------------------- back-pressure


class Slow(MemoryEngine):
    """Looks at a version, before any of its bytes move, only when it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.go = threading.Event(), threading.Event()

    def check(self, manifest, *, restructure=False) -> None:  # type: ignore[no-untyped-def]
        self.asked.set()
        assert self.go.wait(30)
        super().check(manifest, restructure=restructure)


def sized(world: World) -> int:
    """Bytes of a first payload."""
    with Publisher(world.carrier.stream(), model=world.model, store=world.folder / "other", answer=False) as other:
        size = other.publish(checkpoint(1)).release.payload_bytes
    world.carrier.lose()
    return size


def test_a_publisher_waits_for_a_slow_worker_within_its_budget(small_world: World, until: Until) -> None:
    world = small_world
    publisher = world.publisher(budget_bytes=int(sized(world) * 1.5))
    engine = Slow()
    worker = world.worker(engine=engine)
    publisher.publish(checkpoint(1), version="v1")
    assert engine.asked.wait(20)
    second: list[object] = []
    thread = threading.Thread(target=lambda: second.append(publisher.publish(checkpoint(2), version="v2")))
    thread.start()
    until(lambda: any("waiting for room" in note for note in world.notes), "it says that it waits")
    assert second == []
    engine.go.set()
    thread.join(30)
    assert len(second) == 1
    worker.wait("v2", timeout_s=20)
    assert holds(worker, checkpoint(2))


def test_a_publisher_gives_up_when_there_is_no_room_and_nothing_is_published(small_world: World) -> None:
    world = small_world
    publisher = world.publisher(budget_bytes=int(sized(world) * 1.5), budget_wait_s=0.3)
    engine = Slow()
    worker = world.worker(engine=engine)
    first = publisher.publish(checkpoint(1), version="v1")
    assert engine.asked.wait(20)
    error = reason(lambda: publisher.publish(checkpoint(2), version="v2"))
    assert isinstance(error, OverBudget)
    assert "exceed the budget" in error.what
    assert "--budget" in error.next
    assert publisher.target() == first.release
    assert [p.target for p in publisher.book.payloads()] == [first.release.fingerprint], "no part of v2 stays"
    engine.go.set()
    worker.wait("v1", timeout_s=20)
    assert publisher.publish(checkpoint(2), version="v2").release.seq == 2
    worker.wait("v2", timeout_s=20)


def test_a_payload_that_can_never_fit_is_refused_at_once(small_world: World) -> None:
    publisher = small_world.publisher(budget_bytes=10_000, budget_wait_s=30)
    error = reason(lambda: publisher.publish(checkpoint(1), version="v1"))
    assert isinstance(error, OverBudget)
    assert publisher.target() is None


# ---------------------------------------------------------------------- paused, and superseded


@pytest.mark.parametrize("at", ["put_chunk", "last_ids", "append"])
def test_a_paused_publisher_learns_at_its_next_write_that_it_was_superseded(
    world: World, until: Until, at: str
) -> None:
    """I13: held in the middle of a publish until its lease ran out and another store went on."""
    pause = Pause()
    stream = Interrupted(world.carrier.stream(), at, pause)
    paused = Publisher(stream, model=world.model, store=world.folder / "one", answer=False)  # type: ignore[arg-type]
    world.publishers.append(paused)
    worker = world.worker()
    paused.publish(checkpoint(1), version="v1").wait(workers=1, timeout_s=20)
    errors: list[BaseException] = []

    def publish() -> None:
        try:
            paused.publish(checkpoint(2), version="v2")
        except BaseException as error:
            errors.append(error)

    stream.armed = True
    thread = threading.Thread(target=publish)
    thread.start()
    assert pause.reached.wait(20)
    world.carrier.lose("lease")  # it expired
    other = world.publisher("two")
    other.publish(checkpoint(3), version="x1").wait(workers=1, timeout_s=20)
    pause.resume()
    thread.join(30)
    assert [type(error) for error in errors] == [StaleEpoch]
    assert "two" in str(errors[0]), "the holder is named"
    assert [order for order, _ in world.carrier.stream().history(9)] == [(1, 1), (2, 2)]
    assert holds(worker, checkpoint(3))
    assert paused.target().version == "v1"  # type: ignore[union-attr]
    begun = paused.book.version("v2")  # not even that where it learns it before the first chunk
    assert begun is None, "the id is still free"
    assert isinstance(reason(lambda: paused.publish(checkpoint(2), version="v2")), StaleEpoch)
    assert served(worker).version == "x1"  # type: ignore[union-attr]


def test_the_answering_thread_of_a_superseded_publisher_stops_and_says_so(small_world: World, until: Until) -> None:
    world = small_world
    first = world.publisher("one")
    first.publish(checkpoint(1), version="v1")
    world.publisher("two", take_over=True).publish(checkpoint(2), version="x1")
    until(lambda: first.service.stopped_by, "it stopped")  # type: ignore[union-attr]
    assert isinstance(first.service.stopped_by, StaleEpoch)  # type: ignore[union-attr]
    assert any(note.startswith("stopped:") and "two" in note for note in world.notes)


def test_a_store_that_takes_over_again_publishes_its_last_version_anew(small_world: World) -> None:
    """Its own last release is no longer the fleet's target: "already there" would be a lie."""
    world, worker = small_world, small_world.worker()
    world.publisher("one", answer=False).publish(checkpoint(1), version="v1").wait(workers=1, timeout_s=20)
    two = world.publisher("two", take_over=True, answer=False)
    two.publish(checkpoint(2), version="x1").wait(workers=1, timeout_s=20)
    again = world.publisher("one", take_over=True)
    published = again.publish(checkpoint(1), version="v1")
    assert not published.already
    published.wait(workers=1, timeout_s=20)
    assert holds(worker, checkpoint(1))
    world.publisher("two", take_over=True).rollback("x1").wait(workers=1, timeout_s=20)
    assert holds(worker, checkpoint(2))
