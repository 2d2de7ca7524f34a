"""What happens to a fleet from outside: to its server, its processes, its disks, its clocks, and by its operators."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import refleet.common
from refleet import publisher, worker
from refleet.common import wire
from refleet.common.errors import ProtocolError
from refleet.common.messages import Release
from refleet.common.signing import open_envelope, seal

from .contents import new_content
from .fleet import MODEL, WorkerActor
from .kernel import Process
from .network import flipped
from .world import KEYS, ONE_FILE, World

#: every crash point of the parts of refleet that run here
POINTS = sorted(
    point
    for module in (Path(refleet.common.__file__).parent, *(Path(p.__file__).parent for p in (publisher, worker)))
    for path in sorted(module.glob("*.py"))
    for found in re.findall(r'crash_point\(f?"([^"]+)"\)', path.read_text())
    for point in ([found.format(kind=kind) for kind in ("record", "delta", "pack")] if "{" in found else [found])
    if not point.startswith(("file_engine.", "bundle."))
)


def _log_key() -> str:
    return f"refleet:{{{MODEL}}}:log"


def _control_key() -> str:
    return f"refleet:{{{MODEL}}}:control"


# ---------------------------------------------------------------------- the server


def server_down(world: World) -> None:
    world.network.down_until = world.run.now + world.rng.uniform(0.5, 9.0)


def server_empty(world: World) -> None:
    """Killed and started without its memory, maybe on another machine, whose clock is behind."""
    world.server_off_s -= world.rng.choice((0.0, 0.0, 500.0))
    world.server.lose_everything()
    world.server_lost()


def usurped(world: World) -> None:
    """The other store takes over an emptied server before the workers, which would tell it the epoch, are back."""
    server_empty(world)
    for actor in world.workers:
        actor.host.cut_off_until = world.run.now + world.rng.uniform(2.0, 6.0)
    world.take_over()
    world.later(0.3, 1.5, world.publish)


def server_snapshot(world: World) -> None:
    world.snapshot = copy.deepcopy((world.server._values, world.server._until))


def server_older(world: World) -> None:
    """Restored from an older file, or failed over to a replica that was behind."""
    if world.snapshot is None:
        return server_snapshot(world)
    world.server._values, world.server._until = copy.deepcopy(world.snapshot)
    world.server_lost()
    with world.server.changed:
        world.server.changed.notify_all()
    return None


def server_full(world: World) -> None:
    world.network.full = True
    world.later(0.5, 6.0, lambda: setattr(world.network, "full", False))


def log_trimmed(world: World) -> None:
    """Past every reader: only the newest entry is left, or none."""
    for key in (_log_key(), _control_key()):
        entries = world.server.entries(key)
        for entry_id in list(entries.by_id)[: -1 if world.rng.random() < 0.7 else None]:
            del entries.by_id[entry_id]


def payload_lost(world: World) -> None:
    """Chunks expire, or somebody removes them: all of a payload, or one."""
    keys = [key for key in sorted(world.server._values) if key.endswith(":chunks")]
    if not keys:
        return
    key = world.rng.choice(keys)
    world.spoiled.add(key.split(":")[2].rstrip("}"))
    entries = world.server.entries(key)
    if world.rng.random() < 0.5:
        world.server.drop(key)
    elif entries.by_id:
        del entries.by_id[world.rng.choice(sorted(entries.by_id))]


def chunk_rotted(world: World) -> None:
    """A bit of a chunk turns in the server's memory: reading it again does not help."""
    keys = [key for key in sorted(world.server._values) if key.endswith(":chunks")]
    entries = world.server.entries(world.rng.choice(keys)) if keys else None
    if entries and entries.by_id:
        number = world.rng.choice(sorted(entries.by_id))
        entries.by_id[number] = flipped(entries.by_id[number])


def forged_record(world: World) -> None:
    """Somebody who may write to the server but has no key that anybody trusts."""
    if not world.signed:
        return
    rng, server = world.rng, world.server
    log, kind = server.entries(_log_key()), rng.randrange(6)
    old = [data for _, data in sorted(log.by_id.items())]
    at = (log.last[0] + rng.choice((0, 0, 1, 3)), log.last[1] + 1)
    if not old or kind == 0:
        data = rng.randbytes(rng.choice((0, 1, 40, 3000)))
    elif kind == 1:
        data = rng.choice(old)  # a replay: it names another place
    elif kind == 2:
        data = flipped(rng.choice(old))
    else:
        data = _made_up(old[-1], at, kind)
    log.add(at, data)
    server.put(_log_key(), log)
    if rng.random() < 0.5:
        server.add(_control_key(), data, 256)
    with server.changed:
        server.changed.notify_all()


def _made_up(data: bytes, at: tuple[int, int], kind: int) -> bytes:
    """A release for the place `at`: unsigned, by a foreign key, or of another model under a good key."""
    try:
        release = wire.unpack(open_envelope(data, None).payload, Release)
    except ProtocolError:
        return data
    model = "other" if kind == 5 else MODEL
    moved = replace(release, epoch=at[0], seq=at[1], model=model, version="forged")
    return seal(wire.pack(moved), {3: None, 4: KEYS[2], 5: KEYS[0]}[kind])


def replayed_from_elsewhere(world: World) -> None:
    """An old release of ours written again at its own place, after the log was emptied."""
    log = world.server.entries(_log_key())
    if world.old_log:
        log.by_id = dict(world.old_log[: world.rng.randrange(len(world.old_log)) + 1])
        log.last = max(log.by_id)
        world.server.put(_log_key(), log)


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
    files = [f for path, f in host.disk.files("/state") if "/temp" not in path and path.split("/")[2] in _ROTS and f.data]
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
        world.later(0.03, 0.25, write)


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
    published: 30, published_while_written: 6, published_other: 3, published_again: 3, rolled_back: 12,
    World.collect: 4, World.verify: 6, World.rotate_key: 2, World.take_over: 3, joined: 5, left: 3, rejoined: 4,
    twin: 2, server_down: 4, server_empty: 3, usurped: 2, server_snapshot: 3, server_older: 3, server_full: 3, log_trimmed: 3,
    payload_lost: 4, chunk_rotted: 4, forged_record: 5, replayed_from_elsewhere: 2, killed: 6, killed_at_point: 10,
    killed_at_io: 10, power_cut: 5, frozen: 4, cut_off: 4, disk_full: 4, disk_slow: 2, disk_rotted: 4,
    clock_jumped: 3, engine_rotted: 2,
}  # fmt: skip
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
