"""The publisher: checkpoint -> diff -> encode -> broadcast, and back to an earlier version by its id.

A publisher is its store: all commands on one store are one publisher, ordered by the store's lock. What makes a release
real is its record in the store; the log in the server is a copy that can be written again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..common import wire
from ..common.crashpoint import crash_point
from ..common.errors import (
    DamagedTensor,
    ProtocolError,
    RefleetError,
    StoreBusy,
    UnknownVersion,
    UsageError,
    VersionExists,
)
from ..common.messages import Release
from ..common.redis_stream import AUTO, RedisStream
from ..common.shm import placed
from ..common.signing import SigningKey, seal
from ..common.store import Collected, Store
from ..common.stream import Stream
from ..common.threads import Newest
from ..common.types import Manifest, PayloadRef
from .adapters import factors_of
from .book import Book, Version, check_words, now_ms
from .broadcast import broadcast
from .checkpoint import open_checkpoint
from .claim import LEASE_S, LOCK_S, Claim
from .compare import OnBytes, silent
from .fleet import fleet
from .payloads import Payloads, announcing
from .published import Published
from .retention import reasons_to_keep
from .service import Service
from .structure import restructures

if TYPE_CHECKING:
    import torch

    from .adapters import Adapter


class Publisher:
    """Publishes versions of one model from one store.

    Args: `redis` a URL or a Stream; `payload_redis` the URL of another server for payloads; `carrier` of payloads:
    auto, stream or blobs; `store` a folder (each model gets one in it), or `memory`; `key` an Ed25519 key file;
    `take_over` fence off another store that holds the lease; `keep` versions kept besides those still needed;
    `budget_bytes` of server memory for payloads; `answer` answers workers' requests from a thread as long as this
    object is open (several commands on one store may do so); `resident` keeps the last version in memory (as many bytes
    as the model has), so that the next one is compared with memory instead of the store; `notify` hears a sentence when
    something takes time.
    Raises: UsageError, StoreError, StreamError, NotDurable.
    """

    def __init__(
        self,
        redis: str | Stream,
        *,
        payload_redis: str | None = None,
        carrier: str = AUTO,
        model: str,
        store: str | Path,
        key: str | Path | SigningKey | None = None,
        take_over: bool = False,
        keep: int = 16,
        budget_bytes: int | None = None,
        budget_wait_s: float = 60.0,
        answer: bool = True,
        resident: bool = True,
        notify: Callable[[str], None] = lambda _text: None,
    ):
        if keep < 1:
            raise UsageError(f"keep {keep}: at least the current version must be kept")
        if isinstance(redis, str):
            redis = RedisStream(redis, model, payload_url=payload_redis, carrier=carrier)
        self.stream: Stream = redis
        self.model, self.store = model, Store(placed(store, "publisher") / model)
        self.book = Book(self.store)
        self.key = SigningKey.load(key) if isinstance(key, str | Path) else key
        self.keep, self._resident, self._notify = keep, resident, notify
        self._anchors = Newest(self._anchor, name="refleet-anchor")
        self.claim = Claim(self.stream, self.book, take_over=take_over, notify=notify)
        self._payloads = Payloads(
            self.stream, self.book, budget_bytes=budget_bytes, wait_s=budget_wait_s, notify=notify,
            announce=announcing(self.claim, self.key),
        )  # fmt: skip
        self.service = Service(self.claim, key=self.key, payloads=self._payloads, notify=notify) if answer else None

    # ------------------------------------------------------------------ publish and roll back

    def publish(
        self,
        source: str | Path | Mapping[str, torch.Tensor],
        *,
        version: str | None = None,
        message: str = "",
        allow_structure_change: bool = False,
        relative_to: str | None = None,
        adapters: Mapping[str, Adapter] | None = None,
        on_progress: OnBytes = silent,
    ) -> Published:
        """Make `source` the fleet's target as `version` (default: the next free `v<n>`).

        The same content under the same id again is a no-op or a re-announcement, never an error. Names, dtypes and
        shapes must be those of the release before it unless `allow_structure_change`; workers whose engine can't
        follow refuse such a release, and serve on what they serve.
        `relative_to`: the version that the delta builds on, instead of the release before; workers without it ask for
        another delta. `adapters`: by name of a merged matrix, its (B, A, scale) on top of that version (LoRA): then the
        factors travel, and what they miss. `on_progress("send", done, total)` in bytes of the checkpoint.
        Raises: CheckpointError (nothing was published), PublisherBusy, StaleEpoch, OverBudget, StreamError, StoreError.
        """
        check_words(version, message)
        with self._exclusive("publish") as head, open_checkpoint(source) as checkpoint:
            factors = factors_of(adapters or {}, checkpoint.specs)
            before = self._manifest(head)
            base = before if relative_to is None else self.book.manifest_of(relative_to)
            restructure = restructures(
                self.stream, checkpoint.specs, head, before, version=version or checkpoint.source,
                allowed=allow_structure_change,
            )  # fmt: skip
            name = version or self._free_id()

            def accept(manifest: Manifest) -> bool:
                self._check_id(version, manifest)
                return fleet(self.stream).wants(manifest, before)

            self._payloads.clean(fleet(self.stream))
            manifest, payload = broadcast(
                checkpoint, base, self.store, self._payloads, resident=self._resident, factors=factors, accept=accept,
                on_progress=on_progress,
            )  # fmt: skip
            if head and self._is_current(head, name, manifest):
                return Published(head, self.stream, already=True)
            named = Version(name, manifest.fingerprint, now_ms(), message, checkpoint.source)
            changed = len(manifest.changed_from(before))
            return self._commit("publish", named, manifest, head, payload, changed, message, restructure)

    def rollback(
        self, to: str, *, message: str = "", allow_structure_change: bool = False, on_progress: OnBytes = silent
    ) -> Published:
        """Make the earlier version `to` the target again: a new release, with payload only if a live worker needs it.

        Raises: UnknownVersion (also past retention), IncompatibleCheckpoint (see `publish`), PublisherBusy, StaleEpoch,
        OverBudget, StreamError.
        """
        with self._exclusive("rollback") as head:
            manifest, named = self.book.manifest_of(to), self.book.version(to)
            assert named is not None, "its manifest was found by it"
            if head and head.version == to and self._is_target(head):
                return Published(head, self.stream, already=True)
            base = self._manifest(head)
            restructure = restructures(
                self.stream, manifest.specs, head, base, version=to, allowed=allow_structure_change
            )  # fmt: skip
            changed = len(manifest.changed_from(base))
            payload = self._payload(manifest, base, on_progress)
            return self._commit("rollback", named, manifest, head, payload, changed, message, restructure)

    def collect(self, keep: int | None = None) -> tuple[dict[str, str], Collected]:
        """Drop versions past retention; returns why each of the others is kept, by version id, and what was freed."""
        with self._exclusive("collect"):
            return self._collect(keep or self.keep, wait_s=LOCK_S)

    def target(self) -> Release | None:
        """The last release of this store."""
        return self.book.head()

    def close(self) -> None:
        """Stop answering, close store and connections. The lease expires by itself."""
        self._anchors.close()
        if self.service:
            self.service.stop()
        self.stream.close()
        self.store.close()

    def __enter__(self) -> Publisher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------ steps

    @contextmanager
    def _exclusive(self, doing: str) -> Iterator[Release | None]:
        """Hold the store for one command; gives the last release, delivered."""
        with self.store.lock("publish", wait_s=LOCK_S, holder=doing):
            self.claim.renew()
            self.claim.heal()
            if self.service:
                self.service.start()
            yield self.book.head()

    def _manifest(self, head: Release | None) -> Manifest | None:
        """What a delta to the next release can build on."""
        try:
            return self.store.manifest(head.fingerprint) if head else None
        except UnknownVersion as damage:  # bit rot
            self._notify(f"the next release is sent whole: {damage.what}")
            return None

    def _check_id(self, version: str | None, manifest: Manifest) -> None:
        before = self.book.version(version) if version else None
        if before and before.fingerprint != manifest.fingerprint:
            raise VersionExists(
                f"version {version!r} exists with other content",
                about=f"fingerprint {before.fingerprint.hex()[:16]} there, {manifest.fingerprint.hex()[:16]} here",
                serving=self._serving(),
                next="choose another --version; a version id never changes its meaning",
            )

    def _payload(self, manifest: Manifest, base: Manifest | None, on_progress: OnBytes) -> PayloadRef | None:
        """Write what live workers lack of `manifest`, out of the store; None when all of them hold it."""
        now = fleet(self.stream)
        self._payloads.clean(now)
        if not now.wants(manifest, base):
            return None
        return self._payloads.send(manifest, base, on_progress=lambda done, total: on_progress("send", done, total))

    def _commit(
        self, kind: str, named: Version, manifest: Manifest, head: Release | None, payload: PayloadRef | None,
        changed: int, message: str, restructure: bool,
    ) -> Published:  # fmt: skip
        """Settle what it is made of, number, sign, record, append: from here on the release is real."""
        self.store.settle()
        with self.store.lock("log", wait_s=LOCK_S, holder="commit"):
            lease, last = self.claim.renew(), self.stream.last_ids()[0]
            if last[0] > lease.epoch:  # somebody wrote it without a claim; the log takes nothing below it
                lease = self.claim.above(last[0])
            seq = max(head.seq if head else 0, last[1]) + 1
            release = Release(
                model=self.model, publisher=self.store.id, epoch=lease.epoch, seq=seq, kind=kind, version=named.version,
                fingerprint=manifest.fingerprint, base=head.fingerprint if head else None, payload=payload,
                changed_tensors=changed, total_tensors=len(manifest.tensors),
                payload_bytes=payload.size_bytes if payload else 0, full_bytes=manifest.size_bytes,
                created_at_ms=now_ms(), message=message, restructure=restructure,
            )  # fmt: skip
            data = seal(wire.pack(release), self.key)
            crash_point("publisher.before-record")
            new = self.book.version(named.version) is None
            self.book.save_release(release, data, named if new else None)
            crash_point("publisher.recorded")
            try:
                self.stream.append(lease, seq, data, ttl_s=LEASE_S)
            except ProtocolError:
                self.book.drop_release(release, version=new)  # refused by the fence: it never existed
                raise
        crash_point("publisher.announced")
        with suppress(StoreBusy):  # a version is being written whole: the next release collects
            self._collect(self.keep)
        self._anchors.put(manifest)
        return Published(release, self.stream)

    def _collect(self, keep: int, *, wait_s: float = 0.0) -> tuple[dict[str, str], Collected]:
        reasons = reasons_to_keep(self.book.releases(), fleet(self.stream), self.book.payloads(), keep=keep)
        kept_ids = {v.version: reasons[v.fingerprint] for v in self.book.versions() if v.fingerprint in reasons}
        return kept_ids, self.store.collect(reasons, wait_s=wait_s)

    def _anchor(self, manifest: Manifest) -> None:
        """Now and then one is written whole, so that none takes many deltas to rebuild."""
        try:
            self.store.anchor(manifest)
        except DamagedTensor:  # it is found again, and healed, by whoever needs it
            return
        except RefleetError as error:  # it is there as deltas all the same
            self._notify(f"could not write the version whole: {error.what}")

    def _free_id(self) -> str:
        taken = {v.version for v in self.book.versions()}
        number = len(taken) + 1
        while f"v{number}" in taken:
            number += 1
        return f"v{number}"

    def _is_current(self, head: Release | None, name: str, manifest: Manifest) -> bool:
        """Whether the fleet's target is this version already, under this name."""
        return (
            head is not None
            and (head.version, head.fingerprint) == (name, manifest.fingerprint)
            and self._is_target(head)
        )

    def _is_target(self, head: Release) -> bool:
        """Whether this store's last release is the fleet's too; not if another store published since."""
        return head.epoch == self.claim.lease().epoch

    def _serving(self) -> str:
        head = self.book.head()
        return f"the fleet's target is still {head.version}" if head else "nothing was published yet"
