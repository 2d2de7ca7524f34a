"""Checks what publishers do: releases, epochs, payloads, retention."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from refleet.common import wire
from refleet.common.messages import Lease, Release
from refleet.common.signing import open_envelope
from refleet.common.store import Store
from refleet.publisher.publish import Publisher

from .kernel import kernel
from .system import process
from .truth import Order, Truth, need

if TYPE_CHECKING:
    from .fleet import PublisherActor
    from .world import World

#: after the server lost its memory the heartbeats, which say which epochs were seen, are back within this time
_HEARD_AGAIN_S = 4.0
#: a chunk that proves bad is read again, a few times
_READS = 40


class Ledger:
    """One for all stores."""

    def __init__(self, world: World, truth: Truth, checked: Counter[str]):
        self.world, self.truth, self.checked = world, truth, checked
        self.durable: set[tuple[str, Order]] = set()  # releases that were recorded, and not dropped
        self.appended: set[tuple[str, Order]] = set()
        self.epoch = 0  # the highest claimed since the server lost something
        self._began: dict[str, float] = {}  # payload -> when its first chunk was written
        self._gone: set[tuple[str, bytes]] = set()  # (store, version) that an earlier retention was allowed to take
        self._reads: Counter[tuple[Any, ...]] = Counter()

    def recorded(self, release: Release) -> None:
        """I7, I16, I17: a release is new, above all before, of one checkpoint, and tells of another structure."""
        self.checked["releases"] += 1
        truth = self.truth
        kernel().note(f"release {release.order} {release.kind} {release.version}")
        content = truth.content(release.fingerprint, "I16")
        for (publisher, order), other in truth.releases.items():
            if publisher == release.publisher:
                again = other == release or (publisher, order) not in self.durable  # that one was lost by a crash
                need(order < release.order or again, "I7", f"{release.order} after {order}")
        named = truth.names.setdefault((release.publisher, release.version), release.fingerprint)
        need(named == release.fingerprint, "I8", f"{release.version} changed its meaning")
        before = truth.contents.get(release.base or b"")
        if before is not None and before.manifest.specs != content.manifest.specs:
            need(
                release.restructure, "I17", f"{release.version} has another structure than the one before, and hides it"
            )
        truth.releases[release.publisher, release.order] = release

    def is_durable(self, release: Release) -> None:
        self.durable.add((release.publisher, release.order))
        self._gone.discard((release.publisher, release.fingerprint))

    def dropped(self, release: Release) -> None:
        """The fence refused it: it was never made."""
        self.truth.releases.pop((release.publisher, release.order), None)
        self.durable.discard((release.publisher, release.order))

    # ------------------------------------------------------------------ the server

    def server_lost(self) -> None:
        self.epoch = 0

    def effect(self, name: str, args: tuple[Any, ...], result: Any) -> None:
        """What the server did."""
        if name == "put_chunk" and args[1] == 0:
            self._began[args[0]] = kernel().now
        elif name == "claim":
            self._claimed(args[0], result)
        elif name == "append":
            self._appended(args[0], args[2])
        elif name == "chunk read":
            self._reads[args] += 1
            need(self._reads[args] <= _READS, "I19", f"chunk {args[1]} of a payload was read {self._reads[args]} times")

    def _claimed(self, lease: Lease, epoch: int) -> None:
        """I14: no epoch comes twice, as far as anybody can know that."""
        self.checked["I14"] += 1
        self.epoch = max(self.epoch, epoch)
        if epoch == lease.epoch or kernel().now < self.world.lost_at + _HEARD_AGAIN_S:
            return  # it is kept, or nobody could know
        for worker in self.world.workers:
            settled = kernel().now - _HEARD_AGAIN_S > max(worker.started_s, worker.host.cut_off_until)
            facts = self.world.oracle.workers.get(worker.host.name)
            if facts is not None and worker.worker is not None and settled and not self.world.faults.counts["net.away"]:
                believed = facts.epochs.get(epoch, lease.publisher)
                need(believed == lease.publisher, "I14", f"epoch {epoch} was claimed again, by another store")

    def _appended(self, lease: Lease, record: bytes) -> None:
        """I13, I15, I24: by the publisher of the highest epoch, recorded on its disk, with all chunks."""
        release = wire.unpack(open_envelope(record, None).payload, Release)
        need(self.truth.made(release), "I13", f"{release.order} was appended, and never recorded")
        need(lease.epoch >= self.epoch, "I13", f"{release.order} was appended after epoch {self.epoch} was claimed")
        name = f"release-{release.epoch:020d}-{release.seq:020d}"
        actor = self._store(release.publisher)
        if actor is not None:
            self.checked["I24"] += 1
            kept = actor.host.disk.durable(f"{actor.records}/{name}")
            need(kept is not None, "I24", f"{name} was appended, and is not durable")
        self.world.old_log.append((release.order, record))
        ref, again = release.payload, (release.publisher, release.order) in self.appended
        self.appended.add((release.publisher, release.order))
        if ref is None or again or ref.payload_id in self.world.spoiled:
            return
        if self._began.get(ref.payload_id, 0.0) > self.world.lost_at:
            self.checked["I15"] += 1
            chunks, whole = self.world.peek.payload_chunks(ref.payload_id), ref.body_chunks + ref.index_chunks
            need(chunks == whole, "I15", f"{release.order} was appended with {chunks} of {whole} chunks of its payload")

    def _store(self, publisher: str) -> PublisherActor | None:
        return next((actor for actor in self.world.publishers if actor.store_id() == publisher), None)

    # ------------------------------------------------------------------ retention

    def collects(self, publisher: Publisher, keep: int) -> list[bytes]:
        """The versions that this retention must leave; the others may go from now on."""
        store = publisher.store
        records = process().host.disk.folders[f"{store.root}/records"].entries
        made = sorted(tuple(map(int, name.split("-")[1:])) for name in records if name.startswith("release-"))
        newest = [self.truth.releases[store.id, order].fingerprint for order in reversed(made)]
        window = list(dict.fromkeys(newest))
        self._gone.update((store.id, fingerprint) for fingerprint in window[keep:])
        return [fingerprint for fingerprint in window[:keep] if (store.id, fingerprint) not in self._gone]

    def collected(self, store: Store, window: list[bytes]) -> None:
        """I23: the rollback window is there, and the target in it."""
        self.checked["I23"] += 1
        for fingerprint in window:
            self.complete(store, fingerprint, f"one of the last {len(window)}")

    def complete(self, store: Store, fingerprint: bytes, why: str) -> None:
        """Whether all of a version is in a store that no fault got at."""
        if process().host.rotten:
            return
        content = self.truth.content(fingerprint, "I23")
        need(fingerprint in store.manifests(), "I23", f"retention took the manifest of {fingerprint.hex()[:8]}, {why}")
        missing = [entry.spec.name for entry in store.missing(content.manifest)]
        need(not missing, "I23", f"retention took {missing} of {fingerprint.hex()[:8]}, {why}")
