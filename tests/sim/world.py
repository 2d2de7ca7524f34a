"""One simulated fleet: its server, hosts, publishers, workers, and what happens to them from outside."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Collection
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from refleet.common import wire
from refleet.common.memory_server import MemoryServer
from refleet.common.memory_stream import MemoryStream
from refleet.common.messages import Ack, Evidence
from refleet.common.signing import SigningKey, Trust
from refleet.publisher.publish import Publisher

from .contents import Content, new_content
from .faults import RATES, Faults, Host
from .fleet import MODEL, PublisherActor, WorkerActor
from .kernel import Kernel, Process, Task
from .network import Network
from .oracle import Oracle
from .truth import Violation

#: a checkpoint that the trainer writes again and again
ONE_FILE = "/ckpt/one.safetensors"
#: two that publishers sign with, and one that nobody trusts
KEYS = [SigningKey(Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32)) for number in (1, 2, 3)]
TRUST = Trust({key.key_id: key._private.public_key() for key in KEYS[:2]})


class World:
    """Made by a seed. The methods are what a plan, or a state machine, may do at any time."""

    def __init__(self, run: Kernel, rng: random.Random, kinds: Collection[str] = ()):
        """`kinds`: faults that it has; others by chance. Few at a time reach further than all of them at once."""
        self.run, self.rng = run, rng
        kinds = {kind for kind in sorted(RATES) if rng.random() < 0.3 or kind in kinds}
        self.faults = Faults(run, kinds)
        self.signed = rng.random() < 0.8
        self.keys, self.trust = (KEYS[:2], TRUST) if self.signed else ([], None)
        self.failures: Counter[str] = Counter()
        self.spoiled: set[str] = set()  # payloads that the world took chunks of
        self.lost_at = -1.0  # when the server lost payloads last
        self.server_off_s = 0.0  # its clock
        self.server = MemoryServer(clock=lambda: run.now + 100_000.0 + self.server_off_s)
        self.oracle = Oracle(self)
        self.network = Network(self.server, MODEL, self.faults, signed=self.signed, on_effect=self._effect)
        self.peek = MemoryStream(self.server, MODEL)
        self.publishers = [self._publisher(name) for name in ("A", "B")]
        self.leader = self.publishers[0]
        self.fixed = rng.random() < 0.5  # engines that hold one structure only
        self.allow = not self.fixed  # operators publish another structure, too
        self.first = new_content(rng, None)
        self.oracle.truth.add(self.first)
        self.workers: list[WorkerActor] = []
        self.versions = 0
        self.snapshot: tuple[dict[str, Any], dict[str, float]] | None = None  # of the server
        self.old_log: list[tuple[tuple[int, int], bytes]] = []
        self.healing = False
        self.graveyard: list[Any] = []  # what the dead held: it must not be finalized while others run
        run.check = self.oracle.step
        run.on_error = self._task_error

    def _publisher(self, name: str) -> PublisherActor:
        host = Host(name, self.run, self.faults)
        return PublisherActor(self, name, host, keep=self.rng.choice((1, 2, 4)))

    def _task_error(self, task: Task, error: BaseException) -> None:
        if not isinstance(error, Violation):
            self.run.failed = self.run.failed or Violation("no thread ends", f"{task.name}: {error!r}")

    def _effect(self, name: str, args: tuple[Any, ...], result: Any) -> None:
        self.oracle.ledger.effect(name, args, result)

    # ------------------------------------------------------------------ operators

    def publish(
        self, *, other: bool = False, same_file: bool = False, content: Content | None = None, take_over: bool = False,
        then: Callable[[Any], object] = lambda _: None,
    ) -> Process:  # fmt: skip
        """The trainer writes a checkpoint; somebody publishes it."""
        actor = self.leader
        made = content or new_content(self.rng, actor.base or self.first, other=other)
        self.oracle.truth.add(made)
        actor.base = made
        self.versions += 1
        version = f"v{self.versions}"
        path = ONE_FILE if same_file else f"/ckpt/{version}.safetensors"
        actor.write_checkpoint(made, path, slowly=same_file)

        def work(publisher: Publisher) -> None:
            from .files import Path

            then(publisher.publish(Path(path), version=version, allow_structure_change=self.allow))

        return actor.command(f"publish-{version}", work, take_over=take_over)

    def publish_again(self) -> None:
        """The last checkpoint under its own id, as a command that is repeated does."""
        from .files import Path

        path, version, actor = f"/ckpt/v{self.versions}.safetensors", f"v{self.versions}", self.leader
        if path.rsplit("/", 1)[1] in getattr(actor.host.disk.folders.get("/ckpt"), "entries", ()):
            actor.command(
                f"publish-{version}-again",
                lambda publisher: publisher.publish(Path(path), version=version, allow_structure_change=self.allow),
            )

    def rollback(self, *, then: Callable[[Any], object] = lambda _: None) -> Process | None:
        actor, truth = self.leader, self.oracle.truth
        names = sorted({r.version for r in truth.releases.values() if r.kind == "publish"})
        if not names:
            return None
        to = self.rng.choice(names)
        return actor.command(f"rollback-{to}", lambda p: then(p.rollback(to, allow_structure_change=self.allow)))

    def collect(self) -> None:
        keep = self.rng.choice((1, 2, 3))
        self.leader.command("gc", lambda publisher: publisher.collect(keep))

    def verify(self) -> None:
        from refleet.publisher.verify import verify

        deep = self.rng.random() < 0.5

        def work(publisher: Publisher) -> None:
            found = verify(publisher.stream, key=publisher.key, deep=deep, timeout_s=8.0, store=publisher.store)
            self.oracle.checked["verified"] += len(found.answers)

        self.leader.command("verify", work)

    def rotate_key(self) -> None:
        if self.keys:
            self.leader.key = self.keys[1] if self.leader.key is self.keys[0] else self.keys[0]

    def take_over(self) -> None:
        """The other store publishes from now on."""
        self.leader = next(each for each in self.publishers if each is not self.leader)
        self.publish(take_over=True)

    # ------------------------------------------------------------------ workers

    def join(self) -> WorkerActor:
        name = f"w{len(self.workers)}"
        actor = WorkerActor(
            self, name, Host(name, self.run, self.faults), keep=self.rng.choice((1, 2, 4)),
            specs=self.first.manifest.specs.values() if self.fixed else None,
            prepares=self.rng.random() < 0.5, probes=self.rng.random() < 0.8,
        )  # fmt: skip
        self.workers.append(actor)
        actor.start()
        return actor

    def twin_of(self, actor: WorkerActor) -> None:
        host = Host(f"{actor.id}-twin{len(self.workers)}", self.run, self.faults)
        twin = WorkerActor(self, actor.id, host, keep=1, twin=True, **actor.engine_options)
        self.workers.append(twin)
        twin.start()

    # ------------------------------------------------------------------ what the world is told

    def later(self, low_s: float, high_s: float, action: Callable[[], object]) -> None:
        self.run.call_at(self.run.now + self.rng.uniform(low_s, high_s), action)

    def server_lost(self) -> None:
        """It was started again, with less than it had."""
        self.lost_at = self.run.now
        self.network.starts += 1
        self.oracle.ledger.server_lost()

    def worker_died(self, actor: WorkerActor) -> None:
        """Whoever runs it starts it again."""

        def start() -> None:
            if actor.wanted and (actor.process is None or not actor.process.alive):
                actor.start()

        self.later(0.3, 3.0, start)

    def daemon_died(self, actor: PublisherActor) -> None:
        def start() -> None:
            if actor.daemon_wanted and (actor.daemon is None or not actor.daemon.alive):
                actor.serve(take_over=self.healing)

        self.later(0.5, 4.0, start)

    # ------------------------------------------------------------------ the end of all faults

    def heal(self) -> None:
        """From now on nothing goes wrong any more. One store publishes; every worker that did not leave runs."""
        self.faults.stop()
        self.healing = True
        self.network.full, self.network.down_until = False, 0.0
        for actor in [*self.workers, *self.publishers]:
            actor.host.cut_off_until, actor.host.disk.full, actor.host.disk.slow = 0.0, False, 0.0
        for process in list(self.run.processes):
            process.points, process.io_left = {}, -1
            process.pause(False)
        for publisher in self.publishers:
            publisher.daemon_wanted = publisher is self.leader
            if publisher is not self.leader:
                for process in publisher.processes():
                    self.run.kill(process, "not the leader")
        self.daemon_died(self.leader)
        for worker in self.workers:
            if worker.twin:
                worker.wanted = False
                if worker.process is not None:
                    self.run.kill(worker.process, "a twin")
                continue
            if worker.engine is not None and worker.engine.rotten and worker.process is not None:
                self.run.kill(worker.process, "its engine rotted: only `verify` would tell")
            self.worker_died(worker)
        if not self.following():
            self.workers[0].start()

    def following(self) -> list[WorkerActor]:
        """Workers that should be there."""
        return [actor for actor in self.workers if actor.wanted]

    def all_serve(self, order: tuple[int, int], *, or_failed: bool = False) -> bool:
        """Whether every worker serves this release, or (`or_failed`) had said that its engine can't take it."""
        for actor in self.following():
            if actor.worker is None:
                return False
            current, failed = actor.worker.gate.current, actor.worker._pursuit._failed
            if or_failed and order in failed:
                continue
            if current is None or (current.epoch, current.seq) != order:
                return False
        return True

    def told_serving(self, actor: WorkerActor) -> bool:
        """Whether the server holds the ack of what this worker serves, if that is the last that it accepted."""
        current = actor.worker.gate.current if actor.worker else None
        if current is None or (current.epoch, current.seq) != self.oracle.facts(actor).accepted:
            return True
        acks = [wire.unpack(data, Ack) for _, data in self.peek.last_acks(actor.id, 50)]
        return any((ack.version, ack.evidence) == (current.version, Evidence.SERVING) for ack in acks)

    @property
    def numbered_twice(self) -> bool:
        """Whether two stores published in one epoch, which only a server that was emptied makes possible."""
        publishers: dict[int, set[str]] = {}
        for publisher, (epoch, _) in self.oracle.truth.releases:
            publishers.setdefault(epoch, set()).add(publisher)
        return any(len(found) > 1 for found in publishers.values())

    @property
    def restructured(self) -> bool:
        """Whether a version of the other structure was ever released."""
        return any(self.oracle.truth.contents[r.fingerprint].other for r in self.oracle.truth.releases.values())
