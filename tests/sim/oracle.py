"""Checks what workers do, after every step, against what engines, disks and server really hold."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from refleet.common import wire
from refleet.common.errors import RefleetError
from refleet.common.messages import Ack, Evidence, Release, Serving
from refleet.common.types import Index, PayloadRef
from refleet.worker.board import STALE
from refleet.worker.state import WorkerState

from .contents import Content
from .fleet import STALE_S
from .kernel import Process, kernel
from .ledger import Ledger
from .truth import Order, Truth, need

if TYPE_CHECKING:
    from .fleet import WorkerActor
    from .network import Connection
    from .world import World


class WorkerFacts:
    """What the oracle knows of one worker id, over all its lives."""

    def __init__(self) -> None:
        self.accepted: Order = (0, 0)  # the highest in this life
        self.durable: Order = (0, 0)  # the highest that was known to be on its disk
        self.served = False  # whether it ever said so
        self.epochs: dict[int, str] = {}  # epoch -> the publisher that was believed in it
        self.stream: Connection | None = None
        self.verified_s = 0.0  # when it began to hash the last time what its engine is given
        self.began: tuple[Process | None, str, list[int]] = (None, "", [])  # what it began to fetch last


class Oracle:
    """Raises Violation. Its methods are called where things happen; `step` after every step."""

    def __init__(self, world: World):
        self.world, self.truth = world, Truth()
        self.workers: dict[str, WorkerFacts] = {}  # by host
        self.checked: Counter[str] = Counter()
        self.ledger = Ledger(world, self.truth, self.checked)
        self._looked_s = 0.0

    def facts(self, actor: WorkerActor) -> WorkerFacts:
        found = self.workers.get(actor.host.name)
        if found is None:
            found = self.workers[actor.host.name] = WorkerFacts()
        return found

    # ------------------------------------------------------------------ after every step

    def step(self) -> None:
        now = self.world.run.now
        look = now - self._looked_s > 0.5
        if look:
            self._looked_s = now
        for actor in self.world.workers:
            worker, engine = actor.worker, actor.engine
            if worker is None or engine is None:
                continue
            gate, switch = worker.gate, worker.gate._switch
            closed = switch is not None and switch._exclusive
            state = worker._pursuit._state
            if actor.seen != (gate._serving, engine.changes, state, closed):
                facts, before = self.facts(actor), actor.seen
                actor.seen = (gate._serving, engine.changes, state, closed)
                if not before or before[2] is not state:
                    self._record(actor, facts, state)
                if gate._serving is not None and not closed:
                    self._serves(actor, gate._serving, engine.tensors)
            if look:
                self._tells_silence(actor, self.facts(actor))
                need(worker.crash is None, "no thread ends", f"{actor.id} ended with {worker.crash!r}")

    def _serves(self, actor: WorkerActor, serving: Serving, tensors: dict[str, bytes]) -> None:
        """I5, I6: with the gate open the engine holds exactly one version, and one that was released."""
        self.checked["I5"] += 1
        content = self.truth.content(serving.fingerprint, "I6")
        assert actor.engine is not None
        if not actor.engine.rotten:
            off = _off(tensors, content)
            need(not off, "I5", f"{actor.id} serves {serving.version}, and its engine holds other bytes in {off}")
        order = (serving.epoch, serving.seq)
        made = [release for (_, at), release in self.truth.releases.items() if at == order]
        same = [r for r in made if (r.version, r.fingerprint) == (serving.version, serving.fingerprint)]
        need(same, "I6", f"{actor.id} serves {serving.version} of {order}, which nobody released")
        need(order <= self.facts(actor).accepted, "I6", f"{actor.id} serves {order} and accepted nothing so high")

    def _record(self, actor: WorkerActor, facts: WorkerFacts, state: WorkerState) -> None:
        """I6, I9, I13: what a worker accepted was made by a publisher, and goes up only."""
        if state.release is None:
            need(facts.durable == (0, 0), "I24", f"{actor.id} forgot that it accepted {facts.durable}")
            return
        release = state.release
        self.checked["I9"] += 1
        need(
            self.truth.made(release), "I9", f"{actor.id} accepted {release.order} {release.version}, which nobody made"
        )
        need(release.order >= facts.accepted, "I6", f"{actor.id} went from {facts.accepted} to {release.order}")
        believed = facts.epochs.setdefault(release.epoch, release.publisher)
        need(believed == release.publisher, "I13", f"{actor.id} believed two publishers in epoch {release.epoch}")
        facts.accepted = release.order

    def _tells_silence(self, actor: WorkerActor, facts: WorkerFacts) -> None:
        """I20: who hears nothing says so, and serves on."""
        worker, process = actor.worker, actor.process
        if worker is None or process is None or facts.stream is None or process.paused or worker.gate.current is None:
            return
        now = self.world.run.now
        if min(now - facts.stream.answered_s, now - process.resumed_s, now - worker.board._listening_s) > STALE_S + 1.0:
            self.checked["I20"] += 1
            state = worker.board.status.state
            need(state in (STALE, "FAILED", "APPLYING"), "I20", f"{actor.id} hears nothing, and says {state}")

    # ------------------------------------------------------------------ a worker's life

    def starts(self, actor: WorkerActor, stream: Connection) -> None:
        """I24: a new life begins with what the disk held, which is never less than what was told."""
        facts = self.facts(actor)
        facts.stream, actor.seen = stream, ()
        assert actor.worker is not None
        state = actor.worker._pursuit._state
        order = state.release.order if state.release else (0, 0)
        need(order >= facts.durable, "I24", f"{actor.id} came back with {order} after {facts.durable}")
        facts.accepted = order
        need(state.serving or not facts.served, "I24", f"{actor.id} said that it served, and came back without")

    def fetches(self, actor: WorkerActor, ref: PayloadRef, index: Index, numbers: list[int]) -> None:
        """I17: no byte of a version moves that the engine can't take."""
        facts, engine = self.facts(actor), actor.engine
        facts.began = actor.process, ref.payload_id, numbers
        if engine is not None and not engine._rebuilds and ref.target in self.truth.contents:
            self.checked["I17"] += 1
            fits = self.truth.contents[ref.target].manifest.specs == engine.specs
            need(fits, "I17", f"{actor.id} fetches {index.target.hex()[:8]}, which its engine can't hold")

    def given(self, actor: WorkerActor, what: str, staged: Any) -> Any:
        """I3, I10: the engine is given whole versions that were verified; gives what it may read from."""
        self.checked["I3"] += 1
        content = self.truth.content(staged.manifest.fingerprint, "I3")
        need(staged.manifest == content.manifest, "I3", f"{what} of a manifest that is not {staged.serving.version}'s")
        worker = actor.worker
        if worker is not None and what == "apply" and worker._pursuit._holds is not None:
            current, goal = worker.gate.current, worker._pursuit._goal()
            need(goal is not None, "I10", f"{actor.id} applies {staged.serving.version} though it serves {current}")
        return _Given(self, actor, staged, content)

    def answered(self, actor: WorkerActor, serving: Serving, seen: dict[str, bytes | None]) -> None:
        """I1: one request, one version."""
        self.checked["I1"] += 1
        content = self.truth.content(serving.fingerprint, "I1")
        if actor.engine is not None and not actor.engine.rotten:
            off = _off(seen, content)
            need(not off, "I1", f"a request to {actor.id} under {serving.version} saw other bytes in {off}")

    # ------------------------------------------------------------------ acks

    def acked(self, actor: WorkerActor, ack: Ack) -> None:
        """I4, I8: an ack says no more than what is so."""
        kernel().note(f"ack {ack.version} {ack.evidence.name} {ack.failure.code if ack.failure else ''}")
        self.checked[f"ack {ack.evidence.name}"] += 1
        worker = actor.worker
        if worker is None:
            return
        current = worker.gate.current
        need(ack.serving == (current.version if current else None), "I4", f"{actor.id} says it serves {ack.serving}")
        if ack.evidence == Evidence.NONE:
            return
        release = self._release(ack)
        if ack.evidence == Evidence.RECEIVED:
            self._received(actor)
        elif ack.evidence == Evidence.STAGED:
            missing = worker.store.missing(self.truth.content(release.fingerprint, "I4").manifest)
            names = [entry.spec.name for entry in missing]
            need(not names or actor.host.rotten, "I4", f"{actor.id}: STAGED, but its store lacks {names}")
        elif ack.evidence == Evidence.SERVING:
            need(current is not None and ack.fingerprint == release.fingerprint == current.fingerprint, "I4",
                 f"{actor.id}: SERVING {ack.version}, but it serves {current}")  # fmt: skip
            self._served(actor, ack, release)

    def _received(self, actor: WorkerActor) -> None:
        facts = self.facts(actor)
        process, payload_id, numbers = facts.began
        if process is actor.process and facts.stream is not None:
            lacking = [number for number in numbers if (payload_id, number) not in facts.stream.fetched]
            need(not lacking, "I4", f"{actor.id}: RECEIVED, but chunks {lacking} never came as they were written")

    def _served(self, actor: WorkerActor, ack: Ack, release: Release) -> None:
        engine, facts = actor.engine, self.facts(actor)
        assert engine is not None
        record = _durable_record(actor)
        kept = record.serving if record else None
        durable = kept is not None and (kept.epoch, kept.seq) == release.order
        need(durable, "I24", f"{actor.id}: SERVING {release.order}, but a power cut would leave {kept}")
        assert record is not None
        facts.served = True
        if record.release:
            facts.durable = max(facts.durable, record.release.order)
        if not engine.rotten:
            off = _off(engine.tensors, self.truth.content(release.fingerprint, "I4"))
            need(not off, "I4", f"{actor.id}: SERVING {ack.version}, but its engine holds other bytes in {off}")
            if ack.probe is not None:
                first = self.truth.probes.setdefault(release.fingerprint, ack.probe)
                need(first == ack.probe == engine.true_probe(), "I8",
                     f"{actor.id} answers {release.version} otherwise than the first time")  # fmt: skip
        if ack.verified is not None and ack.verified.ok:
            rotten = [name for name, since in engine.rotten.items() if since < engine.read_s.get(name, 0.0)]
            need(not rotten, "I4", f"{actor.id} verified an engine whose {rotten} rotted")

    def _release(self, ack: Ack) -> Release:
        made = [r for (_, order), r in self.truth.releases.items() if order == (ack.epoch, ack.seq)]
        same = [release for release in made if release.version == ack.version]
        need(same, "I4", f"{ack.worker}: {ack.evidence.name} of {ack.version}, which nobody made")
        return same[0]


class _Given:
    """A staged version; what the engine reads of it is compared with what the trainer wrote."""

    def __init__(self, oracle: Oracle, actor: WorkerActor, staged: Any, content: Content):
        self._oracle, self._actor, self._staged, self._content = oracle, actor, staged, content

    def __getattr__(self, name: str) -> Any:
        return getattr(self._staged, name)

    def read(self, name: str) -> memoryview:
        data: memoryview = self._staged.read(name)
        actor = self._actor
        rotted = actor.host.rotten_s >= self._oracle.facts(actor).verified_s  # after that it is found by reading back
        right = rotted or bytes(data) == self._content.tensors[name]
        version = self._staged.serving.version
        need(right, "I3", f"the engine of {actor.id} is given other bytes of {name!r} than {version} has")
        return data


def _off(tensors: Any, content: Content) -> list[str]:
    """Names whose bytes are not the content's."""
    if tensors == content.tensors:
        return []
    names = tensors.keys() | content.tensors.keys()
    return sorted(name for name in names if tensors.get(name) != content.tensors.get(name))


def _durable_record(actor: WorkerActor) -> WorkerState | None:
    """The worker's record as a power cut at this moment would leave it."""
    data = actor.host.disk.durable("/state/records/worker")
    try:
        return wire.unpack(data[32:], WorkerState) if data else None
    except RefleetError:
        return None
