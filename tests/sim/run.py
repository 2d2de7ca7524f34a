"""One seed: a plan of what happens, the run, the healing, and what must be true at the end."""

from __future__ import annotations

import gc
import random
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count

from refleet.publisher.fleet import newest_release
from refleet.publisher.published import Published

from .contents import new_content
from .events import NAMES, happen, plan
from .faults import RATES
from .kernel import Kernel, activate, end, kernel
from .observers import observed
from .truth import Violation, need
from .world import World

_RUNS = count(1)
#: after the last fault every worker serves the target within this virtual time
HEALED_S = 60.0


@dataclass
class Outcome:
    seed: int
    error: str | None
    steps: int
    virtual_s: float
    counts: Counter[str]
    trace: list[str]
    where: str = ""  # of the error, in the code


def run_seed(seed: int, *, trace: bool = False, focus: tuple[str, ...] = ()) -> Outcome:
    """Must be called inside `seams.installed()`. `focus`: events and faults that happen in it."""
    with no_garbage():
        return _run(seed, trace, focus)


@contextmanager
def no_garbage() -> Iterator[None]:
    """None is collected during the block: what it does when it goes must not depend on when it goes. It may stay for
    some runs, until `installed` ends at the latest."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if next(_RUNS) % 10 == 0:
            gc.collect()
        if collects:
            gc.enable()


def _run(seed: int, trace: bool, focus: tuple[str, ...]) -> Outcome:
    lines: list[str] = []
    run = Kernel(seed, trace=lines if trace else None)
    activate(run)
    rng = random.Random(f"world {seed}")
    forced = {kind for kind in focus if kind in RATES}
    world = World(run, rng, forced)
    error, where = None, ""
    try:
        with observed(world):
            play(world, plan(rng, length=rng.randrange(3, 12), focus=tuple(name for name in focus if name in NAMES)))
    except Exception as found:
        error = f"{found}" if isinstance(found, Violation) else f"{type(found).__name__}: {found}"
        where = traceback.format_exc()
        run.note(f"FAILED: {error}")
    finally:
        end(run)
    counts = world.faults.counts + run.passed + world.failures + world.oracle.checked
    return Outcome(seed, error, run.steps, run.now, counts, lines, where)


def play(world: World, events: list[tuple[float, str]]) -> None:
    """A fleet begins, the events happen, and all is well again."""
    run, rng = world.run, world.rng
    begin(world)
    began = run.now
    for at, name in events:
        run.run(for_s=max(began + at - run.now, 0.0))
        happen(world, name)
    run.run(for_s=rng.uniform(0.0, 3.0))
    converge(world)


def begin(world: World) -> None:
    """A publisher with a daemon, a few workers, a first version."""
    world.leader.serve()
    for _ in range(world.rng.randrange(1, 4)):
        world.join()
    world.run.run(for_s=world.rng.uniform(0.0, 1.0))
    world.publish(content=world.first)
    world.run.run(for_s=world.rng.uniform(0.2, 3.0))


def converge(world: World) -> None:
    """All faults end. I11, I12: what was released last, and then what is published now, is served everywhere in bounded
    time, and acknowledged."""
    run = world.run
    run.note("---- all faults end")
    world.heal()
    run.run(lambda: world.leader.daemon is not None and world.leader.daemon.alive, for_s=10.0)
    run.run(lambda: not any(process.alive for process in world.leader.commands), for_s=30.0)
    run.run(for_s=2.0)
    _reach_head(world)
    world.allow = True
    if world.restructured and not world.fixed:
        # what a worker may have missed that was away when the structure changed, if the log was lost meanwhile
        world.publish(other=True, take_over=True)
        run.run(for_s=4.0)
    # Two stores may have numbered alike in a server that was emptied, and a forged entry may have had a number that
    # came again when the server lost it: who waits takes a worker's word on that one for its word on this.
    alike = world.numbered_twice or world.faults.counts["event.forged_record"]
    for _ in range(4 if alike else 1):
        done = _publish_last(world)
    need(done, "I12", f"the fleet did not reach the last release: {_where(world)}")
    target = newest_release(world.peek, trust=world.trust)
    assert target is not None
    reached = run.run(lambda: world.all_serve(target.order), for_s=HEALED_S)
    need(reached, "I12", f"not every worker reached {target.order} {target.version}: {_where(world)}")
    dropped = run.run(lambda: not world.leader.payloads(), for_s=HEALED_S)
    need(dropped, "I19", f"payloads that nobody needs stay in the server: {world.leader.payloads()}")


def _publish_last(world: World) -> bool:
    """Publishes what every engine can take, and waits as an operator does. False when that took too long."""
    done: list[object] = []

    def wait(published: Published) -> None:
        kernel().note(f"the last release is {published.release.order}")
        done.append(published.wait(timeout_s=HEALED_S))

    last = new_content(world.rng, world.first)
    process = world.publish(content=last, take_over=True, then=wait)
    world.run.run(lambda: bool(done) or not process.alive, for_s=HEALED_S + 30)
    return bool(done)


def _reach_head(world: World) -> None:
    """The newest release in the log, if its publisher is there and no worker may have had reason to pass over it."""
    head, counts = newest_release(world.peek, trust=world.trust), world.faults.counts
    damaged = counts["log.flipped"] + counts["read.reordered"] + counts["event.forged_record"]
    if head is None or damaged or not world.oracle.truth.made(head) or world.leader.store_id() != head.publisher:
        return
    for facts in world.oracle.workers.values():
        # it may believe another store in this epoch, if that was claimed again in an emptied server
        if facts.accepted > head.order or facts.epochs.get(head.epoch, head.publisher) != head.publisher:
            return
    world.oracle.checked["head reached"] += 1
    reached = world.run.run(lambda: world.all_serve(head.order, or_failed=True), for_s=HEALED_S)
    need(reached, "I12", f"not every worker reached {head.order} {head.version}: {_where(world)}")
    told = world.run.run(lambda: all(world.told_serving(actor) for actor in world.following()), for_s=HEALED_S)
    need(told, "I10", f"not every worker acknowledged what it serves: {_where(world)}")


def _where(world: World) -> str:
    found = []
    for actor in world.following():
        status = actor.worker.board.status if actor.worker else None
        failure = status.failure.what if status and status.failure else ""
        serving = status.serving if status else None
        found.append(
            f"{actor.id} {status.state if status else 'is down'} {serving.version if serving else '-'} {failure}"
        )
    return "; ".join([*found, *(f"{code} x{number}" for code, number in world.failures.items())])
