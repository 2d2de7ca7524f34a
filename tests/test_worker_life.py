"""Worker as a part of an application: start, wait, stop, what its status says, what mistakes around it do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator

import pytest
from refleet.common.errors import NotServing, RefitFailed, StoreFull, UsageError
from refleet.common.messages import Serving
from refleet.publisher.fleet import fleet
from refleet.publisher.verify import verify
from refleet.worker.board import Event
from refleet.worker.engine import StagedVersion
from refleet.worker.heart import Heart
from refleet.worker.memory_engine import MemoryEngine
from refleet.worker.worker import Worker
from world import World, checkpoint, holds, reason, served

Until = Callable[..., None]


def unstarted(world: World, worker_id: str = "w0", **options: object) -> Worker:
    return Worker(
        world.carrier.stream(), model=world.model, engine=MemoryEngine(), state_dir=world.folder / worker_id,
        worker_id=worker_id, **options,  # type: ignore[arg-type]
    )  # fmt: skip


def test_stop_may_come_before_start_twice_and_from_two_threads(small_world: World) -> None:
    never = unstarted(small_world)
    never.stop()
    never.stop()
    assert reason(never.start).what == "worker w0 was stopped before"
    worker = unstarted(small_world).start()  # the folder is free again
    assert reason(worker.start).what == "worker w0 was started before"
    threads = [threading.Thread(target=worker.stop) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert worker.board.status.state == "STOPPED"
    unstarted(small_world).stop()


def test_a_worker_that_never_started_takes_nobody_off_the_fleet(small_world: World, until: Until) -> None:
    small_world.worker("w0")
    stream = small_world.carrier.stream()
    until(lambda: stream.members(), "the first is a member")
    twin = Worker(
        small_world.carrier.stream(), model=small_world.model, engine=MemoryEngine(),
        state_dir=small_world.folder / "elsewhere", worker_id="w0",
    )  # fmt: skip
    assert "is alive already" in reason(twin.start).what
    assert [member.worker for member in stream.members()] == ["w0"]
    assert twin.board.status.state == "STOPPED", "a start that failed leaves nothing open"


@pytest.mark.parametrize("where", [threading.Thread, Heart])
def test_a_start_that_a_signal_interrupts_can_be_stopped(
    small_world: World, monkeypatch: pytest.MonkeyPatch, where: type
) -> None:
    def interrupted(_self: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(where, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            small_world.worker()
    small_world.workers["w0"].stop()
    assert not small_world.workers["w0"].alive
    assert small_world.worker().alive, "nothing is left locked"


def test_stop_lets_requests_in_flight_end_and_takes_no_new_ones(small_world: World, until: Until) -> None:
    small_world.publisher().publish(checkpoint(1), version="one")
    worker = small_world.worker()
    worker.wait("one")
    ending = threading.Thread(target=worker.stop)
    with worker.serving() as version:
        ending.start()
        until(lambda: worker.gate._switch, "the end waits at the gate")
        assert version.id == "one"
        assert ending.is_alive()
    ending.join(20)
    assert "the worker was stopped" in reason(lambda: worker.serving().__enter__()).what


def test_stop_inside_a_request_of_the_same_thread_does_not_wait_for_itself(small_world: World) -> None:
    small_world.publisher().publish(checkpoint(1), version="one")
    worker = small_world.worker()
    worker.wait("one")
    with worker.serving():
        worker.stop()
    assert served(worker) is None


def test_stop_inside_on_event_is_refused_in_words(small_world: World, until: Until) -> None:
    errors: list[str] = []

    def on_event(_: Event) -> None:
        try:
            worker.stop()
        except UsageError as error:
            errors.append(error.what)

    worker = unstarted(small_world, on_event=on_event)
    small_world.workers["w0"] = worker
    small_world.publisher().publish(checkpoint(1), version="one")
    worker.start().wait("one")
    assert "can't be stopped from within its own on_event" in errors[0]


def test_an_on_event_that_raises_does_not_end_the_worker(small_world: World, caplog: pytest.LogCaptureFixture) -> None:
    def on_event(_: Event) -> None:
        raise ValueError("a mistake of the application")

    worker = unstarted(small_world, on_event=on_event)
    small_world.workers["w0"] = worker
    small_world.publisher().publish(checkpoint(1), version="one")
    worker.start().wait("one")
    assert "a mistake of the application" in caplog.text


def test_wait_hears_of_the_version_of_the_end_and_of_a_crash(small_world: World) -> None:
    worker = small_world.worker()
    found: list[Serving] = []
    waiting = threading.Thread(target=lambda: found.append(worker.wait("two", timeout_s=20)))
    waiting.start()
    publisher = small_world.publisher()
    publisher.publish(checkpoint(1), version="one").wait(workers=1)
    assert waiting.is_alive()
    publisher.publish(checkpoint(2), version="two")
    waiting.join(20)
    assert found[0].version == "two"
    errors: list[NotServing] = []

    def wait() -> None:
        with pytest.raises(NotServing) as raised:
            worker.wait("three", timeout_s=100)
        errors.append(raised.value)

    waiting = threading.Thread(target=wait)
    waiting.start()
    worker.stop()
    waiting.join(20)
    assert "does not serve three" in errors[0].what


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_crash_leaves_its_reason_in_the_fleet(
    small_world: World, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = small_world.worker(heartbeat_s=100)
    stream = small_world.carrier.stream()
    until(lambda: stream.members(), "it told the fleet its first status")
    worker.board._listeners.remove(worker._heart.kick)  # no beat but the last one can tell

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a mistake of ours")

    monkeypatch.setattr(worker._follower, "read", broken)
    assert "ZeroDivisionError" not in reason(lambda: worker.wait(timeout_s=100)).next
    small_world.stop("w0")
    (view,) = fleet(stream).workers
    assert view.status is not None and view.status.failure is not None
    assert (view.status.state, view.status.failure.code) == ("QUARANTINED", "ZeroDivisionError")


def test_bad_settings_leave_nothing_locked(small_world: World) -> None:
    for options in ({"keep": 0}, {"heartbeat_s": 0}, {"heartbeat_s": 1e9}, {"stale_after_s": 0}, {"drain_s": -1}):
        assert reason(lambda options=options: unstarted(small_world, **options)).code == "UsageError"  # type: ignore[misc]
    assert reason(lambda: unstarted(small_world, "a b")).code == "UsageError"
    unstarted(small_world).stop()


def test_a_full_disk_ends_nothing_and_the_release_is_reached_when_there_is_room(
    small_world: World, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher = small_world.publisher()
    publisher.publish(checkpoint(1), version="one")
    worker = small_world.worker()
    worker.wait("one")
    write, full = worker.store.put_record, True

    def put_record(name: str, data: bytes) -> None:
        if full:
            raise StoreFull("no space left on device")
        write(name, data)

    monkeypatch.setattr(worker.store, "put_record", put_record)
    publisher.publish(checkpoint(2), version="two")
    until(lambda: worker.board.status.state == "FAILED", "it says that it can't")
    assert worker.alive
    assert served(worker) is not None and holds(worker, checkpoint(1))
    full = False
    worker.wait("two", timeout_s=20)
    assert holds(worker, checkpoint(2))


class Fickle(MemoryEngine):
    """Refuses versions whose tensor `steps` equals `bad`, and the `grudge` calls after that; can fail to be read."""

    bad: bytes | None = None
    unreadable = False
    tried = 0
    grudge = 1
    _angry = 0

    def apply(self, staged: StagedVersion, changed: frozenset[str]) -> None:
        self.tried += 1
        if bytes(staged.read("steps")) == self.bad:
            self._angry = self.grudge
            raise RefitFailed("not this one", tensor="steps")
        if self._angry:
            self._angry -= 1
            raise RefitFailed("nor the one before, for now")
        super().apply(staged, changed)

    def read_back(self, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        if self.unreadable:
            raise RuntimeError("the device is gone")
        return super().read_back(names)


def test_after_a_quarantine_the_version_before_serves_again_and_the_bad_one_is_not_tried_for_ever(
    small_world: World, until: Until
) -> None:
    engine, publisher = Fickle(), small_world.publisher()
    worker = small_world.worker(engine=engine)
    publisher.publish(checkpoint(1), version="one").wait(workers=1)
    engine.bad = bytes(checkpoint(2)["steps"].numpy().tobytes())
    publisher.publish(checkpoint(2), version="two")
    until(lambda: any(event.state == "QUARANTINED" for event in small_world.events["w0"]), "it is quarantined")
    worker.wait("one", timeout_s=20)
    until(lambda: worker.board.status.state == "FAILED", "it says that the target failed")
    status = worker.board.status
    assert (status.target and status.target.version, status.serving and status.serving.version) == ("two", "one")
    assert status.failure is not None and "not this one" in status.failure.what
    tried = engine.tried
    verify(publisher.stream, timeout_s=20)  # some rounds later
    assert engine.tried == tried
    engine.grudge = 2  # restoring fails, and so does what was served before, on the engine of unknown content
    publisher.publish(checkpoint(2), version="two-again")
    until(lambda: worker.board.state == "QUARANTINED" and engine.tried == tried + 3, "all was tried once")
    verify(publisher.stream, timeout_s=20)
    assert (engine.tried, worker.board.state, served(worker)) == (tried + 3, "QUARANTINED", None)
    publisher.publish(checkpoint(3), version="three").wait(workers=1)


def test_an_engine_that_can_not_be_read_fails_its_verification_and_not_the_worker(
    small_world: World, until: Until
) -> None:
    engine, publisher = Fickle(), small_world.publisher()
    worker = small_world.worker(engine=engine)
    publisher.publish(checkpoint(1), version="one").wait(workers=1)
    engine.unreadable = True
    found = verify(publisher.stream, timeout_s=20)
    assert not found.ok
    assert "the device is gone" in str(found.answers["w0"].failure)
    engine.unreadable = False
    publisher.publish(checkpoint(2), version="two").wait(workers=1)
    assert worker.alive


def test_a_worker_that_serves_nothing_yet_answers_a_verification(small_world: World, until: Until) -> None:
    worker = small_world.worker()
    stream = small_world.carrier.stream()
    until(lambda: fleet(stream).live, "it is a member")
    until(lambda: not worker._follower._first, "it reads the control stream")
    found = verify(stream, timeout_s=20)
    assert (found.ok, found.silent) == (False, ())
    assert found.answers["w0"].failure is not None
    assert worker.alive
