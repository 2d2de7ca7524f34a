"""What happens to the server of a fleet: it goes away, forgets, fills up, and holds what nobody of ours wrote."""

from __future__ import annotations

import copy
from dataclasses import replace

from refleet.common import wire
from refleet.common.errors import ProtocolError
from refleet.common.messages import Release
from refleet.common.signing import open_envelope, seal

from .fleet import MODEL
from .network import flipped
from .world import KEYS, World


def _log_key() -> str:
    return f"refleet:{{{MODEL}}}:log"


def _control_key() -> str:
    return f"refleet:{{{MODEL}}}:control"


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
