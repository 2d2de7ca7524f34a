"""Checks the invariants after every step, against what engines, disks and server really hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from refleet.common import wire
from refleet.common.errors import RefleetError
from refleet.common.messages import Ack, Evidence, Release, Serving
from refleet.common.signing import open_envelope
from refleet.common.store import Store
from refleet.publisher.book import Book
from refleet.worker.receive import Body
from refleet.worker.state import WorkerState

from .contents import Content
from .kernel import Process, kernel
from .threads import me
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
        self.served: Order | None = None  # what its record says is served
        self.epochs: dict[int, str] = {}  # epoch -> the publisher that was believed in it
        self.seen: tuple[Any, ...] = ()
        self.stream: Connection | None = None


class Oracle:
    """Raises Violation. Its methods are called where things happen; `step` after every step."""

    def __init__(self, world: World):
        self.world, self.truth = world, Truth()
        self.workers: dict[str, WorkerFacts] = {}
        self.checked: Counter[str] = Counter()
        self.began: dict[str, float] = {}  # payload -> when its first chunk was written
        self.bodies: dict[Process | None, tuple[str, list[int]]] = {}  # what a worker began to fetch last
        self.durable: set[tuple[str, Order]] = set()  # releases that were recorded, and not dropped
        self.appended: set[tuple[str, Order]] = set()

    def facts(self, actor: WorkerActor) -> WorkerFacts:
        return self.workers.setdefault(actor.host.name, WorkerFacts())

    # ------------------------------------------------------------------ after every step

    def step(self) -> None:
        for actor in self.world.workers:
            worker, engine = actor.worker, actor.engine
            if worker is None or engine is None:
                continue
            gate, facts = worker.gate, self.facts(actor)
            switch = gate._switch
            closed = switch is not None and switch._exclusive
            seen = (gate._serving, engine.changes, worker._pursuit._state, closed)
            if facts.seen != seen:
                before, facts.seen = facts.seen, seen
                if not before or before[2] is not seen[2]:
                    self._record(actor, facts, worker._pursuit._state)
                if gate._serving is not None and not closed:
                    self._serves(actor, gate._serving, engine.tensors)
            if worker.crash is not None:
                need(False, "I24", f"{actor.id} ended with {worker.crash!r}")

    def _serves(self, actor: WorkerActor, serving: Serving, tensors: dict[str, bytes]) -> None:
        """I1, I5, I6: with the gate open the engine holds exactly one version, and one that was released."""
        self.checked["I1"] += 1
        content = self._content(serving.fingerprint, "I6")
        engine = actor.engine
        assert engine is not None
        if not engine.rotten:
            need(tensors == content.tensors, "I5", f"{actor.id} serves {serving.version} and holds {_off(tensors, content)}")
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
        need(self.truth.made(release), "I9", f"{actor.id} accepted {release.order} {release.version}, which nobody made")
        need(release.order >= facts.accepted, "I6", f"{actor.id} went from {facts.accepted} to {release.order}")
        if release.order > facts.accepted:
            need(release.epoch >= facts.accepted[0], "I13", f"{actor.id} accepted an older epoch")
            believed = facts.epochs.setdefault(release.epoch, release.publisher)
            need(believed == release.publisher, "I13", f"{actor.id}: two publishers in epoch {release.epoch}")
            facts.accepted = release.order

    # ------------------------------------------------------------------ a worker's life

    def starts(self, actor: WorkerActor, stream: Connection) -> None:
        """I24: a new life begins with what the disk held, which is never less than what was told."""
        facts = self.facts(actor)
        facts.stream, facts.seen = stream, ()
        assert actor.worker is not None
        state = actor.worker._pursuit._state
        order = state.release.order if state.release else (0, 0)
        need(order >= facts.durable, "I24", f"{actor.id} came back with {order} after {facts.durable}")
        facts.accepted = order
        if facts.served is not None:
            serving = state.serving
            found = (serving.epoch, serving.seq) if serving else None
            need(found is not None, "I24", f"{actor.id} said that it served {facts.served}, and came back without")

    def touches_engine(self, actor: WorkerActor, what: str, staged: Any, changed: frozenset[str]) -> None:
        """I3, I10: the engine is given whole versions that were verified, and none twice."""
        self.checked["I3"] += 1
        content = self._content(staged.manifest.fingerprint, "I3")
        need(staged.manifest == content.manifest, "I3", f"{what} of a manifest that is not {staged.serving.version}'s")
        if actor.host.rotten:
            return  # it may be found after the reading back only
        missing = staged.store._lacking({e.digest for e in staged.manifest.tensors if e.spec.size_bytes})
        need(not missing, "I3", f"{what} of {staged.serving.version}, which is not complete in the store")
        for name in sorted(changed & content.tensors.keys()):
            held = staged.store.memory.get(content.manifest.by_name[name].digest)
            need(
                held is None or bytes(held.data) == content.tensors[name], "I3",
                f"{what} is given other bytes of {name} than {staged.serving.version} has",
            )  # fmt: skip

    def answered(self, actor: WorkerActor, serving: Serving, seen: dict[str, bytes | None]) -> None:
        """I1: one request, one version."""
        self.checked["requests"] += 1
        content = self._content(serving.fingerprint, "I1")
        if actor.engine is None or actor.engine.rotten:
            return
        off = _off(seen, content)
        need(not off, "I1", f"a request to {actor.id} under {serving.version} saw {off}")

    def refused_request(self, actor: WorkerActor) -> None:
        self.checked["requests refused"] += 1

    def acked(self, actor: WorkerActor, ack: Ack) -> None:
        """I4, I8: an ack says no more than what is so."""
        kernel().note(f"ack {ack.version} {ack.evidence.name} {ack.failure.code if ack.failure else ''}")
        self.checked[f"ack {ack.evidence.name}"] += 1
        worker, engine, facts = actor.worker, actor.engine, self.facts(actor)
        if worker is None or engine is None:
            return
        current = worker.gate.current
        need(ack.serving == (current.version if current else None), "I4", f"{actor.id} says it serves {ack.serving}")
        release = self._release(ack)
        if ack.evidence == Evidence.NONE:
            return
        assert release is not None
        if ack.evidence == Evidence.RECEIVED:
            self._received(actor)
        if ack.evidence == Evidence.STAGED:
            self._staged(actor, release)
        if ack.evidence != Evidence.SERVING:
            return
        content = self._content(release.fingerprint, "I4")
        need(current is not None and current.fingerprint == release.fingerprint, "I4", f"{actor.id} does not serve it")
        need(ack.fingerprint == release.fingerprint, "I4", f"{actor.id}: SERVING with another fingerprint")
        if not engine.rotten:
            need(engine.tensors == content.tensors, "I4", f"{actor.id}: SERVING, but it holds {_off(engine.tensors, content)}")
        record = _durable_record(actor)
        served = record.serving if record else None
        need(served == current, "I4", f"{actor.id}: SERVING, but its record on disk says {served}")
        facts.served = release.order
        if record and record.release:
            facts.durable = max(facts.durable, record.release.order)
        if ack.probe is not None and not engine.rotten:
            first = self.truth.probes.setdefault(release.fingerprint, ack.probe)
            need(first == ack.probe, "I8", f"{actor.id} answers {release.version} otherwise than the first time")
            need(ack.probe == engine.true_probe(), "I4", f"{actor.id}: the probe is not what the engine gives")
        if ack.verified is not None and ack.verified.ok:
            rotten = [name for name, since in engine.rotten.items() if since < kernel().now - 1.0]
            need(not rotten, "I4", f"{actor.id} verified an engine whose {rotten} rotted")

    def _received(self, actor: WorkerActor) -> None:
        stream = self.facts(actor).stream
        assert stream is not None
        payload_id, numbers = self.bodies.get(actor.process, ("", []))
        lacking = [number for number in numbers if (payload_id, number) not in stream.fetched]
        need(not lacking, "I4", f"{actor.id}: RECEIVED, but chunks {lacking} never came as they were written")

    def _staged(self, actor: WorkerActor, release: Release) -> None:
        if actor.host.rotten:
            return
        worker = actor.worker
        assert worker is not None
        content = self._content(release.fingerprint, "I4")
        missing = worker.store.missing(content.manifest)
        need(not missing, "I4", f"{actor.id}: STAGED, but its store lacks {[e.spec.name for e in missing]}")

    # ------------------------------------------------------------------ publishers

    def recorded(self, book: Book, release: Release) -> None:
        """I7, I13, I14, I16: a release is new, above all before, and of one checkpoint."""
        self.checked["releases"] += 1
        truth = self.truth
        kernel().note(f"release {release.order} {release.kind} {release.version}")
        self._content(release.fingerprint, "I16")
        for (publisher, order), other in truth.releases.items():
            if publisher == release.publisher:
                again = other == release or (publisher, order) not in self.durable  # that one was lost by a crash
                need(order < release.order or again, "I7", f"{release.order} after {order}")
        named = truth.names.setdefault((release.publisher, release.version), release.fingerprint)
        need(named == release.fingerprint, "I7", f"{release.version} changed its meaning")
        truth.releases[release.publisher, release.order] = release

    def dropped(self, release: Release) -> None:
        """The fence refused it: it was never made."""
        self.truth.releases.pop((release.publisher, release.order), None)
        self.durable.discard((release.publisher, release.order))

    def effect(self, name: str, args: tuple[Any, ...]) -> None:
        """What the server did. I15: a release is appended when all its chunks are there."""
        if name == "put_chunk" and args[1] == 0:
            self.began[args[0]] = kernel().now
        if name != "append":
            return
        _, _, record = args[:3]
        release = wire.unpack(open_envelope(record, None).payload, Release)
        need(self.truth.made(release), "I13", f"{release.order} was appended, and never recorded")
        self.world.old_log.append((release.order, record))
        ref, again = release.payload, (release.publisher, release.order) in self.appended
        self.appended.add((release.publisher, release.order))
        if ref is None or again or ref.payload_id in self.world.spoiled:
            return
        if self.began.get(ref.payload_id, 0.0) > self.world.lost_at:
            self.checked["I15"] += 1
            chunks = self.world.peek.payload_chunks(ref.payload_id)
            whole = ref.body_chunks + ref.index_chunks
            need(chunks == whole, "I15", f"{release.order} was appended with {chunks} of {whole} chunks of its payload")

    def collected(self, store: Store, keep: Any) -> None:
        """I23: what was asked to be kept is there."""
        self.checked["I23"] += 1
        if store.content.parts and self.world.host_of(store).rotten:
            return
        for fingerprint in keep:
            content = self.truth.contents.get(fingerprint)
            if content is not None and fingerprint in store.manifests():
                missing = store.missing(content.manifest)
                need(not missing, "I23", f"retention took tensors of {fingerprint.hex()[:8]} in {store.root}")

    # ------------------------------------------------------------------ common

    def _content(self, fingerprint: bytes, invariant: str) -> Content:
        content = self.truth.contents.get(fingerprint)
        need(content is not None, invariant, f"{fingerprint.hex()[:16]} is no state that the trainer ever wrote")
        assert content is not None
        return content

    def _release(self, ack: Ack) -> Release | None:
        made = [r for (_, order), r in self.truth.releases.items() if order == (ack.epoch, ack.seq)]
        same = [release for release in made if release.version == ack.version]
        need(same or not ack.evidence, "I4", f"{ack.worker}: {ack.evidence.name} of {ack.version}, which nobody made")
        return same[0] if same else None

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Hears of releases and of retention where the production code does them."""
        save, drop, collect, begin = Book.save_release, Book.drop_release, Store.collect, Body.__init__

        def save_release(book: Book, release: Release, *rest: Any, **options: Any) -> None:
            self.recorded(book, release)
            save(book, release, *rest, **options)
            self.durable.add((release.publisher, release.order))

        def drop_release(book: Book, release: Release, **options: Any) -> None:
            self.dropped(release)
            drop(book, release, **options)

        def collecting(store: Store, keep: Any, **options: Any) -> Any:
            found = collect(store, keep, **options)
            self.collected(store, keep)
            return found

        def beginning(body: Body, stream: Any, ref: Any, index: Any, numbers: list[int], **options: Any) -> None:
            self.bodies[me().process] = (ref.payload_id, numbers)
            begin(body, stream, ref, index, numbers, **options)

        Book.save_release, Book.drop_release = save_release, drop_release  # type: ignore[method-assign]
        Store.collect, Body.__init__ = collecting, beginning  # type: ignore[method-assign]
        try:
            yield
        finally:
            Book.save_release, Book.drop_release = save, drop  # type: ignore[method-assign]
            Store.collect, Body.__init__ = collect, begin  # type: ignore[method-assign]


def _off(tensors: Any, content: Content) -> list[str]:
    """Names whose bytes are not the content's."""
    names = tensors.keys() | content.tensors.keys()
    return sorted(name for name in names if tensors.get(name) != content.tensors.get(name))


def _durable_record(actor: WorkerActor) -> WorkerState | None:
    """The worker's record as a power cut at this moment would leave it."""
    folder = actor.host.disk.folders["/state/records"]
    inode: Any = folder.synced.get("worker")
    if inode is None or inode.dirty:
        return None
    try:
        return wire.unpack(bytes(inode.data[32:]), WorkerState)
    except RefleetError:
        return None
