"""What happens to a fleet from outside: to its server, its processes, its disks, its clocks, and by its operators."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path

from refleet import common, publisher, worker

from . import server_events as server
from .contents import new_content
from .fleet import WorkerActor
from .kernel import Process
from .world import ONE_FILE, World


def _points() -> list[str]:
    """Every crash point of the parts of refleet that run here, out of their sources."""
    sources = [
        path.read_text()
        for package in (common, publisher, worker)
        for path in sorted(Path(str(package.__file__)).parent.glob("*.py"))
    ]
    text = "\n".join(sources)
    synced, renamed = (set(re.findall(call, text)) for call in (r'\.sync\("(\w+)"\)', r'rename\w*\(\w+.*?, "(\w+)"'))
    kinds = {"written": synced, "synced": synced, "renamed": renamed}
    found = set()
    for point in re.findall(r'crash_point\(f?"([^"]+)"\)', text):
        found |= {point.format(kind=kind) for kind in kinds[point.rpartition("-")[2]]} if "{" in point else {point}
    elsewhere = ("file_engine.", "bundle.", "store.image-")  # other engines, and memory that workers of a host share
    return sorted(point for point in found if not point.startswith(elsewhere))


POINTS = _points()


# ---------------------------------------------------------------------- processes


def _any_process(world: World) -> Process | None:
    running = [actor.process for actor in world.workers if actor.process and actor.process.alive]
    running += [process for actor in world.publishers for process in actor.processes()]
    return world.rng.choice(running) if running else None


def killed(world: World) -> None:
    if process := _any_process(world):
        world.run.kill(process, "kill -9")


def killed_at_point(world: World) -> None:
    """The next process of either side to pass this point ends there."""
    if process := _any_process(world):
        point = world.rng.choice(POINTS)
        process.points[point] = world.rng.randrange(3)


def killed_at_io(world: World) -> None:
    """Before or after any call of the disk or the server."""
    if process := _any_process(world):
        process.io_left = world.rng.randrange(120)


def power_cut(world: World) -> None:
    """All processes of a machine end, and what was not synced is lost or torn."""
    actor = world.rng.choice([*world.workers, *world.publishers])
    for process in list(world.run.processes):
        if process.host is actor.host:
            world.run.kill(process, "power cut")
    if lost := actor.host.disk.cut_power(world.rng):
        world.faults.counts["disk.torn"] += lost


def frozen(world: World) -> None:
    """SIGSTOP, and later SIGCONT: it goes on as if nothing had happened."""
    if process := _any_process(world):
        process.pause(True)
        world.later(1.0, 20.0, lambda: process.pause(False))


# ---------------------------------------------------------------------- machines


def cut_off(world: World) -> None:
    actor = world.rng.choice([*world.workers, *world.publishers])
    actor.host.cut_off_until = world.run.now + world.rng.uniform(1.0, 15.0)


def disk_full(world: World) -> None:
    disk = world.rng.choice([*world.workers, *world.publishers]).host.disk
    disk.full = True
    world.later(0.5, 8.0, lambda: setattr(disk, "full", False))


def disk_slow(world: World) -> None:
    disk = world.rng.choice([*world.workers, *world.publishers]).host.disk
    disk.slow = world.rng.choice((0.05, 2.0))
    world.later(1.0, 10.0, lambda: setattr(disk, "slow", 0.0))


def disk_rotted(world: World) -> None:
    """A bit turns in a pack, a delta or a manifest of a worker."""
    host = world.rng.choice(world.workers).host
    files = [
        f for path, f in host.disk.files("/state") if "/temp" not in path and path.split("/")[2] in _ROTS and f.data
    ]
    if files:
        inode = world.rng.choice(files)
        inode.rot(world.rng.randrange(len(inode.data)), world.rng.randrange(8))
        host.rotten_s = world.run.now


_ROTS = ("packs", "deltas", "manifests")


def clock_jumped(world: World) -> None:
    host = world.rng.choice([*world.workers, *world.publishers]).host
    host.clock_off_s += world.rng.choice((-86_400.0, -30.0, 5.0, 4_000.0, 90_000.0))


def engine_rotted(world: World) -> None:
    serving = [a for a in world.workers if a.engine and not a.engine.applying and a.worker and a.worker.gate.current]
    if serving:
        engine = world.rng.choice(serving).engine
        assert engine is not None
        engine.rot()


# ---------------------------------------------------------------------- operators


def published(world: World) -> None:
    world.publish()


def published_while_written(world: World) -> None:
    """The trainer goes on with the next step in the same file while it is being published."""
    actor, rng = world.leader, world.rng
    if actor.writing:
        return
    world.publish(same_file=True)
    following = new_content(rng, actor.base)
    world.oracle.truth.add(following)

    def write() -> None:
        if not actor.writing:
            actor.base = following
            actor.write_checkpoint(following, ONE_FILE, slowly=True)

    if following.other == world.first.other:
        world.later(0.05, 0.25, write)


def published_other(world: World) -> None:
    if world.fixed and world.rng.random() < 0.5:
        world.allow = True  # workers whose engine can't follow refuse it
    world.publish(other=True)


def published_again(world: World) -> None:
    """The same checkpoint under the same id, as a command that is repeated does."""
    world.publish_again()


def rolled_back(world: World) -> None:
    world.rollback()


def joined(world: World) -> None:
    if len(world.workers) < 4:
        world.join()


def left(world: World) -> None:
    if actor := _worker(world, lambda a: a.wanted and a.worker is not None):
        actor.leave()


def rejoined(world: World) -> None:
    if actor := _worker(world, lambda a: not a.wanted and (a.process is None or not a.process.alive)):
        actor.start()


def twin(world: World) -> None:
    """A second worker under an id that lives, from another folder."""
    if actor := _worker(world, lambda a: a.worker is not None):
        world.twin_of(actor)


def _worker(world: World, fits: Callable[[WorkerActor], bool]) -> WorkerActor | None:
    found = [actor for actor in world.workers if fits(actor)]
    return world.rng.choice(found) if found else None


#: event -> how often, against the others
EVENTS: dict[Callable[[World], object], int] = {
    published: 30,
    published_while_written: 6,
    published_other: 3,
    published_again: 3,
    rolled_back: 12,
    World.collect: 4,
    World.verify: 6,
    World.rotate_key: 2,
    World.take_over: 3,
    joined: 5,
    left: 3,
    rejoined: 4,
    twin: 2,
    server.server_down: 4,
    server.server_empty: 3,
    server.usurped: 2,
    server.server_snapshot: 3,
    server.server_older: 3,
    server.server_full: 3,
    server.log_trimmed: 3,
    server.payload_lost: 4,
    server.chunk_rotted: 4,
    server.forged_record: 5,
    server.replayed_from_elsewhere: 2,
    killed: 6,
    killed_at_point: 10,
    killed_at_io: 10,
    power_cut: 5,
    frozen: 4,
    cut_off: 4,
    disk_full: 4,
    disk_slow: 2,
    disk_rotted: 4,
    clock_jumped: 3,
    engine_rotted: 2,
}
NAMES = {event.__name__: event for event in EVENTS}


def plan(rng: random.Random, *, length: int, focus: tuple[str, ...] = ()) -> list[tuple[float, str]]:
    """(when, what) of one run: a few kinds of events, those in `focus` among them, so that each goes deep somewhere."""
    always = ["published", "rolled_back", *focus]
    others = sorted(NAMES.keys() - set(always))
    chosen = always + rng.sample(others, rng.randrange(3, 9))
    weights = [EVENTS[NAMES[name]] + (0 if name in always[:2] else 6) for name in chosen]
    at, found = 0.0, []
    for name in rng.choices(chosen, weights, k=length):
        at += rng.expovariate(1 / 1.2)
        found.append((at, name))
    return found


def happen(world: World, name: str) -> None:
    """One event, now."""
    world.faults.count(f"event.{name}")
    NAMES[name](world)
