"""Workers that share, when one of them dies or hangs: the others go on, and what is served is whole."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from processes import Processes
from refleet.common.shm import SHM
from refleet.common.store import Store
from refleet.worker import turn
from refleet.worker.engine import StagedVersion
from refleet.worker.memory_engine import MemoryEngine
from refleet.worker.state import shared_by
from safetensors.torch import save_file
from servers import Server
from stored import start, told
from test_crashes import which
from test_share import FIRST, SECOND, STATES, THIRD, content, fingerprint, held, join, publish, received
from world import World, holds, served
from wrapped import Pause

Until = Callable[..., None]

HOLD = """
store = Store(sys.argv[1] + "/holder", shared=Path(sys.argv[2]))
with store.shared_lock(sys.argv[3], holder="the test"):
    print("ready", flush=True)
    sys.stdin.readline()
"""


@contextmanager
def holding(world: World, name: str) -> Iterator[subprocess.Popen[str]]:
    """Another process of this host that has the turn, and does nothing with it."""
    with start(HOLD, world.folder, content(world), name) as process:
        try:
            assert told(process) == "ready"
            yield process
        finally:
            process.kill()


# ---------------------------------------------------------------------- kill -9


@pytest.fixture
def processes(tmp_path: Path, model: str, valkey: Server) -> Iterator[Processes]:
    made = Processes(tmp_path, model)
    made.redis = valkey.url
    for version, state in (("v1", FIRST), ("v2", SECOND)):
        save_file(state, tmp_path / f"{version}.safetensors")
    yield made
    made.close()


@pytest.mark.parametrize(
    "point",
    ["worker.received-chunk", "store.delta-renamed", "store.image-written", "store.image-renamed", "worker.staged"],
)
def test_when_the_worker_that_stages_is_killed_another_one_takes_over(
    processes: Processes, point: str, until: Until
) -> None:
    folder, shared = processes.folder, ("--share", processes.folder / "host")
    versions = {name: folder / f"{name}.safetensors" for name in ("v1", "v2")}
    running = {name: processes.worker(name, *shared) for name in ("w0", "w1")}
    processes.refleet("publish", versions["v1"], "--version", "v1", "--wait", "--workers", "2", "--timeout", "60")
    processes.end(running["w0"])
    armed = processes.worker("w0", *shared, crash_at=point)
    until(lambda: processes.status_of("w0") == "SERVING", "the worker serves v1 again", timeout_s=60)
    running["w1"].send_signal(signal.SIGSTOP)  # so that w0 is the one
    processes.refleet("publish", versions["v2"], "--version", "v2")
    assert armed.wait(60) == -signal.SIGKILL, f"{point} was not reached"
    assert which(processes.served("w0"), versions) == "v1"
    running["w1"].send_signal(signal.SIGCONT)
    until(lambda: processes.serving_of("w1") == "v2", "the other one serves v2", timeout_s=60)
    again = processes.worker("w0", *shared)
    until(lambda: processes.serving_of("w0") == "v2", "the restarted one serves v2", timeout_s=60)
    assert {which(processes.served(name), versions) for name in ("w0", "w1")} == {"v2"}
    with Store(folder / "w0" / "state") as own:
        shared_folder = shared_by(own)
    assert shared_folder == folder / "host" / processes.model
    for process in (again, running["w1"]):
        processes.end(process)
    shared_id = (shared_folder / "id").read_bytes().split()[-1].decode()
    assert not (SHM / f"refleet-{os.getuid()}-{shared_id}").exists(), "nothing is left in shared memory"


def test_whoever_waits_for_a_worker_that_is_killed_goes_on_at_once(
    small_world: World, monkeypatch: pytest.MonkeyPatch, until: Until
) -> None:
    monkeypatch.setattr(turn, "SILENCE_S", 3600.0)
    world, publisher = small_world, small_world.publisher()
    workers = join(world, "w0", "w1")
    publish(world, publisher, "v1")
    with holding(world, "staging") as holder:
        published = publisher.publish(SECOND, version="v2")
        until(lambda: all(worker.board.state == "RECEIVING" for worker in workers), "both wait")
        holder.kill()
        published.wait(workers=2, timeout_s=20)
    assert all(holds(worker, SECOND) for worker in workers)


def test_workers_that_all_wait_for_their_turn_receive_the_version_once(small_world: World, until: Until) -> None:
    """Nothing came early here: they join when it is there."""
    world, publisher = small_world, small_world.publisher()
    release = publisher.publish(FIRST, version="v1").release
    content(world).parent.mkdir()
    with holding(world, "staging") as holder:
        workers = join(world, "w0", "w1", "w2")
        until(lambda: all(worker.board.state == "RECEIVING" for worker in workers), "all wait")
        holder.kill()
        for worker in workers:
            worker.wait("v1", timeout_s=20)
            assert holds(worker, FIRST)
    assert sorted(received(worker) for worker in workers) == [0, 0, release.payload_bytes]


# ---------------------------------------------------------------------- hangs


@pytest.mark.parametrize("name", ["staging", "rebuilding"])
def test_a_worker_that_hangs_is_not_waited_for_any_longer_than_the_limit(
    small_world: World, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(turn, "SILENCE_S", 0.5)
    world, publisher = small_world, small_world.publisher()
    workers = join(world, "w0", "w1")
    publish(world, publisher, "v1")
    with holding(world, name) as holder:
        holder.send_signal(signal.SIGSTOP)
        publish(world, publisher, "v2")
        assert all(holds(worker, SECOND) for worker in workers)
        assert holder.poll() is None


def test_a_worker_that_works_on_is_waited_for(
    small_world: World, monkeypatch: pytest.MonkeyPatch, until: Until
) -> None:
    """However long it takes: a large version over a slow link is still received once."""
    monkeypatch.setattr(turn, "SILENCE_S", 0.5)
    world, publisher = small_world, small_world.publisher()
    (worker,) = join(world, "w0")
    publish(world, publisher, "v1")
    before, ended, beats = received(worker), threading.Event(), [0]

    def work() -> None:
        while not ended.wait(0.02):
            turn.working(worker.store, "staging")
            beats[0] += 1

    with holding(world, "staging") as holder:
        thread = threading.Thread(target=work)
        thread.start()
        try:
            published = publisher.publish(SECOND, version="v2")
            until(lambda: beats[0] > 75, "three times the limit passes")
            assert served(worker).version == "v1" and received(worker) == before  # type: ignore[union-attr]
        finally:
            ended.set()
            thread.join()
        holder.kill()
        published.wait(workers=1, timeout_s=20)
    assert holds(worker, SECOND)


def test_a_worker_that_stages_shows_that_it_works(small_world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    signs: list[str] = []
    real = turn.working
    monkeypatch.setattr(turn, "working", lambda store, name: (signs.append(name), real(store, name)))
    world, publisher = small_world, small_world.publisher()
    join(world, "w0")
    publish(world, publisher, "v1", "v2")
    assert signs.count("staging") >= 2 and signs.count("rebuilding") >= len(FIRST)


def test_a_worker_that_waits_can_be_stopped(small_world: World, monkeypatch: pytest.MonkeyPatch, until: Until) -> None:
    monkeypatch.setattr(turn, "SILENCE_S", 3600.0)
    world, publisher = small_world, small_world.publisher()
    (worker,) = join(world, "w0")
    publish(world, publisher, "v1")
    with holding(world, "staging"):
        publisher.publish(SECOND, version="v2")
        until(lambda: worker.board.state == "RECEIVING", "it waits")
        stopping = threading.Thread(target=world.stop, args=("w0",))
        stopping.start()
        stopping.join(20)
        assert not stopping.is_alive() and not worker.alive


def test_a_worker_that_hangs_in_its_engine_holds_up_nobody_and_keeps_what_it_serves(
    small_world: World,
) -> None:
    world, publisher, engine, pause = small_world, small_world.publisher(), MemoryEngine(), Pause()
    (slow,), (quick,) = join(world, "w0", engine=engine, keep=1), join(world, "w1", keep=1)
    publish(world, publisher, "v1")
    apply = engine.apply

    def hanging(staged: StagedVersion, changed: frozenset[str]) -> None:
        pause()
        apply(staged, changed)

    engine.apply = hanging  # type: ignore[method-assign]
    try:
        for version in ("v2", "v3"):
            publisher.publish(STATES[version], version=version)
            quick.wait(version, timeout_s=20)
            assert pause.reached.wait(20)
        quick.store.keep([fingerprint(publisher, "v3")])
        quick.store.collect((), wait_s=20)
        assert held(world) == {fingerprint(publisher, version) for version in STATES}
    finally:
        pause.resume()
    slow.wait("v3", timeout_s=20)
    assert holds(slow, THIRD) and holds(quick, THIRD)
