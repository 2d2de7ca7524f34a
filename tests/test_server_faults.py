"""The server is killed, comes back empty or older, is full, or badly configured: workers serve on, and it all heals."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from carriers import OnServer
from refleet.common.errors import NotDurable, OverBudget, StreamUnavailable
from refleet.common.messages import Ack, Evidence
from refleet.publisher import Publisher
from refleet.publisher.fleet import fleet
from refleet.worker.memory_engine import MemoryEngine
from refleet.worker.worker import Worker
from servers import Server
from world import World, checkpoint, holds, reason, served
from wrapped import Interrupted

Until = Callable[..., None]
Place = tuple[World, Server]


@pytest.fixture
def place(new_server: Callable[..., Server], tmp_path: Path, model: str) -> Iterator[Place]:
    """A fleet on a server of its own that keeps every write."""
    server = new_server(aof=True, settings={"appendfsync": "always"})
    carrier = OnServer(server, model)
    world = World(carrier, tmp_path, model)
    yield world, server
    world.close()
    for stream in carrier._streams:
        stream.close()
    carrier.client.close()


def asks(worker: Worker) -> str:
    """A request, answered by the version with this id."""
    with worker.serving(timeout_s=5) as version:
        return version.id


def logged(world: World) -> list[tuple[int, int]]:
    return [order for order, _ in world.carrier.stream().history(100)]


def serving_acks(world: World, worker_id: str, version: str) -> list[Ack]:
    return [ack for ack in world.acks(worker_id) if ack.evidence == Evidence.SERVING and ack.version == version]


def switches(world: World, version: str) -> int:
    """How often w0 switched to this version; an ack that is only repeated has no timings."""
    return sum("apply" in ack.timings_ms for ack in serving_acks(world, "w0", version))


def copy_data(server: Server, to: Path) -> None:
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(server._folder / "data", to)


def restore_data(server: Server, saved: Path) -> None:
    """Start the killed server from an older state of its disk."""
    shutil.rmtree(server._folder / "data")
    shutil.copytree(saved, server._folder / "data")
    server.start()


def test_a_worker_is_stale_and_serves_on_while_the_server_is_away(place: Place, until: Until) -> None:
    """I20, I12: and all goes on where it was after a restart with AOF."""
    world, server = place
    publisher, worker = world.publisher(), world.worker(stale_after_s=0.6)
    publisher.publish(checkpoint(1), version="v1").wait(workers=1, timeout_s=20)
    server.kill()
    until(lambda: worker.board.status.state == "STALE", "STALE")
    assert asks(worker) == "v1"
    assert isinstance(reason(lambda: publisher.publish(checkpoint(2), version="v2")), StreamUnavailable)
    assert publisher.target().version == "v1"  # type: ignore[union-attr]
    server.start()
    until(lambda: worker.board.status.state == "SERVING", "fresh news again")
    publisher.publish(checkpoint(2), version="v2").wait(workers=1, timeout_s=20)
    assert holds(worker, checkpoint(2))
    assert logged(world) == [(1, 1), (1, 2)]


def test_a_server_restarted_empty_is_noticed_and_healed(place: Place, until: Until) -> None:
    """I10, I11, I14."""
    world, server = place
    publisher, worker = world.publisher(), world.worker()
    for n in (1, 2):
        publisher.publish(checkpoint(n), version=f"v{n}").wait(workers=1, timeout_s=20)
    server.kill()
    server.start(empty=True)
    until(lambda: logged_safely(world) == [(1, 2)], "the publisher writes its last release again")
    until(lambda: serving_acks(world, "w0", "v2"), "the worker acknowledges the repeated delivery again")
    late = world.worker("late")
    late.wait("v2", timeout_s=20)
    assert holds(late, checkpoint(2))
    published = publisher.publish(checkpoint(3), version="v3")
    published.wait(workers=2, timeout_s=20)
    assert published.release.order == (1, 3), "neither epoch nor number repeat"
    assert holds(worker, checkpoint(3))


def logged_safely(world: World) -> list[tuple[int, int]]:
    with suppress(StreamUnavailable):
        return logged(world)
    return []


def test_an_epoch_never_repeats_after_the_server_lost_everything(place: Place, until: Until) -> None:
    """I14: another store claims above what the workers saw, though neither server nor its disk know of it."""
    world, server = place
    publisher, worker = world.publisher(answer=False), world.worker()
    publisher.publish(checkpoint(1), version="v1").wait(workers=1, timeout_s=20)
    server.kill()
    server.start(empty=True)
    until(lambda: worker.board.status.last_refusal, "the worker notices")
    assert worker.board.status.last_refusal.code == "StreamReset"  # type: ignore[union-attr]
    until(lambda: heartbeat(world), "its heartbeat is there again")
    published = world.publisher("two").publish(checkpoint(2), version="x1")
    assert published.release.order == (2, 1)
    published.wait(workers=1, timeout_s=20)
    assert holds(worker, checkpoint(2))


def heartbeat(world: World) -> bool:
    with suppress(StreamUnavailable):
        return bool(fleet(world.carrier.stream()).live)
    return False


def test_a_server_restored_to_an_older_state_is_brought_up_to_date(place: Place, until: Until, tmp_path: Path) -> None:
    world, server = place
    publisher, worker = world.publisher(), world.worker()
    publisher.publish(checkpoint(1), version="v1").wait(workers=1, timeout_s=20)
    copy_data(server, tmp_path / "older")
    publisher.publish(checkpoint(2), version="v2").wait(workers=1, timeout_s=20)
    server.kill()
    restore_data(server, tmp_path / "older")
    until(lambda: logged_safely(world) == [(1, 1), (1, 2)], "v2 is written again")
    assert asks(worker) == "v2"
    late = world.worker("late")
    late.wait("v2", timeout_s=20)
    assert holds(late, checkpoint(2))
    publisher.publish(checkpoint(3), version="v3").wait(workers=2, timeout_s=20)
    assert holds(worker, checkpoint(3))


def test_workers_fence_a_publisher_that_the_restored_server_lets_through(
    place: Place, until: Until, tmp_path: Path
) -> None:
    """I13: failed over to a replica that had not heard of the take-over."""
    world, server = place
    one, worker = world.publisher("one", answer=False), world.worker()
    one.publish(checkpoint(1), version="v1").wait(workers=1, timeout_s=20)
    copy_data(server, tmp_path / "older")
    two = world.publisher("two", take_over=True, answer=False)
    two.publish(checkpoint(2), version="x1").wait(workers=1, timeout_s=20)
    two.close()
    world.publishers.remove(two)
    server.kill()
    restore_data(server, tmp_path / "older")
    one.publish(checkpoint(3), version="v2")
    until(lambda: worker.board.status.last_refusal, "the worker refuses it")
    assert worker.board.status.last_refusal.code in ("StreamReset", "StaleEpoch")  # type: ignore[union-attr]
    one.publish(checkpoint(5), version="v3")
    until(lambda: worker.board.status.last_refusal.code == "StaleEpoch", "and the next one")  # type: ignore[union-attr]
    assert holds(worker, checkpoint(2))
    assert asks(worker) == "x1"
    again = world.publisher("two", take_over=True)
    again.publish(checkpoint(4), version="x2").wait(workers=1, timeout_s=20)
    assert holds(worker, checkpoint(4))


class Held(MemoryEngine):
    """Waits inside the next `apply` until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.go = threading.Event(), threading.Event()
        self.go.set()

    def apply(self, staged, changed):  # type: ignore[no-untyped-def]
        self.inside.set()
        assert self.go.wait(30)
        super().apply(staged, changed)


def test_a_full_server_stops_publishing_with_a_clear_text_and_nothing_else(place: Place, until: Until) -> None:
    world, server = place
    publisher, worker = world.publisher(budget_wait_s=0.3), world.worker()
    publisher.publish(checkpoint(1), version="v1").wait(workers=1, timeout_s=20)
    server.configure(maxmemory="1mb")
    error = reason(lambda: publisher.publish(checkpoint(2), version="v2"))
    assert isinstance(error, OverBudget)
    assert "full" in error.what
    assert error.next
    assert any("waiting for room" in note for note in world.notes)
    assert asks(worker) == "v1"
    assert logged(world) == [(1, 1)]
    server.configure(maxmemory="0")
    publisher.publish(checkpoint(2), version="v2").wait(workers=1, timeout_s=20)
    assert holds(worker, checkpoint(2))


def refused_acks(world: World) -> int:
    assert isinstance(world.carrier, OnServer)
    return int(world.carrier.client.info("commandstats")["cmdstat_xadd"]["rejected_calls"])


def test_acks_that_a_full_server_refused_arrive_later(place: Place, until: Until) -> None:
    world, server = place
    engine, publisher = Held(), world.publisher()
    worker = world.worker(engine=engine)
    publisher.publish(checkpoint(1), version="v1").wait(workers=1, timeout_s=20)
    engine.inside.clear()
    engine.go.clear()
    published = publisher.publish(checkpoint(2), version="v2")
    assert engine.inside.wait(20)
    server.configure(maxmemory="1mb")
    engine.go.set()
    worker.wait("v2", timeout_s=20)
    assert asks(worker) == "v2", "a full server does not hold a switch up"
    until(lambda: refused_acks(world) > 1, "the server refused its acks, also those sent again")
    assert serving_acks(world, "w0", "v2") == []
    server.configure(maxmemory="0")
    assert published.wait(workers=1, timeout_s=20)["w0"].version == "v2"
    assert switches(world, "v2") == 1


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
def test_a_server_that_would_drop_releases_is_refused(place: Place, policy: str) -> None:
    world, server = place
    server.configure(maxmemory_policy=policy)
    error = reason(lambda: world.publisher().publish(checkpoint(1), version="v1"))
    assert isinstance(error, NotDurable)
    assert policy in error.what
    assert "noeviction" in error.next
    assert logged(world) == []


@pytest.mark.parametrize("by", ["the same command again", "the next command", "the service"])
def test_a_release_recorded_while_the_server_went_away_is_delivered_once(place: Place, until: Until, by: str) -> None:
    """I15, I24: its record on disk is what makes it real."""
    world, server = place
    worker = world.worker()
    stream = Interrupted(world.carrier.stream(), "append", server.kill)
    publisher = Publisher(stream, model=world.model, store=world.folder / "store", answer=by == "the service")  # type: ignore[arg-type]
    world.publishers.append(publisher)
    publisher.publish(checkpoint(1), version="v1").wait(workers=1, timeout_s=20)
    stream.armed = True
    assert isinstance(reason(lambda: publisher.publish(checkpoint(2), version="v2")), StreamUnavailable)
    assert publisher.target().version == "v2"  # type: ignore[union-attr]
    server.start()
    if by == "the same command again":
        assert publisher.publish(checkpoint(2), version="v2").already
    elif by == "the next command":
        world.publisher(answer=False).collect()
    worker.wait("v2", timeout_s=20)
    assert holds(worker, checkpoint(2))
    until(lambda: serving_acks(world, "w0", "v2"), "SERVING v2")
    assert logged(world) == [(1, 1), (1, 2)]
    assert publisher.publish(checkpoint(3), version="v3").release.order == (1, 3)
    worker.wait("v3", timeout_s=20)
    assert switches(world, "v2") == 1
    assert served(worker).order == (1, 3)  # type: ignore[union-attr]
