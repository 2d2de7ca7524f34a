"""The store of one publisher or worker: tensors by digest, manifests by fingerprint, and small records, on local disk.

    id          a record: format and identity of this store
    packs/      whole tensors (pack.py, objects.py)
    deltas/     tensors kept as changes to others (deltas.py, derived.py)
    manifests/  one record per version held, named by its fingerprint
    records/    one record per name
    temp/       files in the making; what dead processes left is removed at the next open
    locks/      lock files (records.py); they are never removed
    keepers/    what each worker wants, where several share one (store_folder.py)

Several processes may use one store at once. A crash at any point leaves the state before or after a step.
The workers of a host may share packs, deltas, manifests and the memory that versions are rebuilt in (host_memory.py).
A version that came as a delta is kept as one, and costs what changed; one in `ANCHOR_EVERY` is written whole.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from .crashpoint import crash_point
from .derived import DeltaBatch, Derived
from .digest import tensor_digest
from .errors import DamagedTensor
from .host_memory import HostMemory
from .layout import Bytes
from .manifests import Manifests, stored_digests
from .memory import Memory
from .named_records import NAME, NamedRecords
from .objects import Batch, Objects
from .pack import HEAL, PACK_BYTES
from .records import file_bytes, locked, sweep
from .retention import retain
from .store_folder import Keepers, opened, refuse_shared
from .types import Manifest, TensorEntry
from .unsettled import Unsettled

_OWN_LOCKS = {"id", "objects", "order"}
_WRITE_WAIT_S = 600.0  # for another process's `collect`, which may copy gigabytes
#: a version that takes this many deltas to rebuild is written whole
ANCHOR_EVERY = 16


@dataclass(frozen=True, slots=True)
class Collected:
    """What `Store.collect` did."""

    removed_manifests: tuple[bytes, ...]
    freed_bytes: int
    #: kept versions whose manifest is damaged: which tensors they need is unknown, so no tensor was removed
    unreadable: tuple[bytes, ...] = ()


class Store(NamedRecords):
    """A folder of tensors, manifests and records. May be used from several threads; `close` it, or use `with`.

    Writers put a new version in like this, so that no `collect` takes its tensors for garbage in between:

        with store.writing():
            lacking = store.missing(manifest)
            with store.batch() as batch:
                batch.add(...)
            store.put_manifest(manifest)

    Every write may raise StoreFull (no room, or not allowed), StoreError (the disk failed) and StoreBusy.
    """

    def __init__(self, root: Path | str, *, shared: Path | None = None, pack_bytes: int = PACK_BYTES):
        """Opens the store in folder `root`, or makes one there; `shared` is the folder for what workers share.

        Raises: MalformedRecord when its id is damaged, UsageError when `root` is what workers share.
        """
        self.root = Path(root)
        #: where tensors and manifests lie
        self.content = content = shared or self.root
        super().__init__(self.root / "records", temp=self.root / "temp")
        self._locks = self.root / "locks"
        refuse_shared(self.root)
        packs, deltas, manifests = content / "packs", content / "deltas", content / "manifests"
        self.id = opened(self.root, self._records)
        content_id = opened(content, packs, deltas, manifests)
        self._keepers = Keepers(content, self.id) if shared else None
        self._kept: frozenset[bytes] = frozenset()
        temp = content / "temp"
        self._unsettled = Unsettled()
        self._manifests = Manifests(manifests, temp=temp, unsettled=self._unsettled)
        order = content / "locks" / "order"
        self._objects = Objects(packs, temp=temp, order_lock=order, pack_bytes=pack_bytes)
        #: tensors in memory, and buffers for them
        self.memory = HostMemory(content_id) if shared else Memory()
        self._derived = Derived(
            deltas, temp=temp, order_lock=order, memory=self.memory, whole=self._whole, unsettled=self._unsettled
        )

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of all mappings and memory; memoryviews that were handed out stay valid."""
        self._objects.close()
        self.memory.close()
        if self._keepers:
            self._keepers.close()

    @property
    def size_bytes(self) -> int:
        """What tensors, manifests, records and temp files take on disk."""
        folders = {self._objects.folder, self._derived.folder, self._manifests.folder, self._records, self._temp}
        return sum(file_bytes(path) for folder in folders for path in folder.iterdir())

    # tensors

    def has(self, digest: bytes) -> bool:
        """Whether this tensor is held; says nothing about its bytes. Zero-size tensors always are."""
        return not self._lacking((digest,))

    def read(self, digest: bytes, *, verify: bool) -> memoryview:
        """The tensor's bytes: mapped, from memory, or rebuilt from a delta into memory. They are not to be written.

        The view stays valid whatever happens. With `verify` the bytes are hashed first, unless they are in memory.
        Raises: DamagedTensor naming the digest when it is missing, short, or (verify) of other bytes; StoreError.
        """
        held = self.memory.get(digest)
        if held is not None:
            return held.data
        if self._objects.lacking((digest,)) and not self._derived.lacking((digest,)):
            try:
                return self._derived.read(digest).data
            except DamagedTensor:
                self._objects.refresh(force=True)
                if self._objects.lacking((digest,)):  # else another process wrote it whole, and removed the delta
                    raise
        try:
            return self._objects.read(digest, verify=verify)
        except DamagedTensor:
            if self._derived.lacking((digest,)):
                raise
            self._objects.forget(digest)  # a delta that came later has it
            return self._derived.read(digest).data

    def load(self, digests: Collection[bytes]) -> None:
        """Rebuilds into memory what is only there as deltas: for who is about to read a version. Raises: StoreError."""
        self._derived.load(self._objects.lacking(digests))

    def recheck(self, digest: bytes) -> None:
        """Hash the tensor's bytes wherever they are, memory included. Raises: DamagedTensor, StoreError."""
        if tensor_digest(self.read(digest, verify=True)) != digest:
            raise DamagedTensor(
                "a tensor's bytes in memory no longer match their digest",
                digest=digest,
                about=f"tensor {digest.hex()} of {self.content}",
                next=HEAL,
            )

    def forget(self, digest: bytes) -> None:
        """Gives up a damaged tensor: `has` is false until it is added again. Lasts as long as this object."""
        self._objects.forget(digest)
        self._derived.forget(digest)
        self.memory.drop(digest)

    @contextmanager
    def batch(self) -> Iterator[Batch]:
        """Adds tensors: `with store.batch() as batch: batch.add(...)`.

        They become visible and durable at the end of the block, and from time to time before (`pack_bytes`). After an
        exception, what was not visible yet is removed.
        """
        with self.writing(), self._objects.batch() as batch:
            yield batch

    @contextmanager
    def delta(self) -> Iterator[DeltaBatch]:
        """Keeps a delta as it is: `with store.delta() as delta: delta.write(...); delta.commit(record)`.

        Without `commit` nothing of it stays.
        """
        with self.writing():
            batch = self._derived.batch()
            try:
                yield batch
            finally:
                batch.close()

    def anchor(self, manifest: Manifest, *, every: int = ANCHOR_EVERY) -> int:
        """Writes the version's tensors whole if it takes `every` deltas or more to rebuild it, or if it was sent whole.

        Returns the bytes written. Raises: DamagedTensor, StoreFull, StoreError.
        """
        derived = self._objects.lacking(stored_digests(manifest))
        depth = self._derived.depth(derived, whole=self._objects.holds)
        if depth < every and not self._derived.on_nothing(derived):
            return 0
        written = 0
        with self.memory.pinned(manifest.digests), self.batch() as batch:
            self.load(derived)
            for entry in manifest.tensors:
                if entry.digest in derived:
                    derived.discard(entry.digest)
                    batch.add((self.read(entry.digest, verify=False),), expect=entry.digest)
                    written += entry.spec.size_bytes
        return written

    @contextmanager
    def writing(self, *, wait_s: float = _WRITE_WAIT_S) -> Iterator[None]:
        """Keeps every process's `collect` out during the block; any number of writers may be in one at a time.

        Needed from the first question what the store holds (`has`, `missing`) until `put_manifest`. May be nested.
        Raises: StoreBusy when a running `collect` does not end within `wait_s`.
        """
        with locked(self.content / "locks" / "objects", shared=True, wait_s=wait_s):
            self._objects.refresh(force=True)  # what a collect removed must not pass for present
            self._derived.refresh(force=True)
            yield

    # versions

    def put_manifest(self, manifest: Manifest) -> None:
        """Makes a version held. Its tensors come first (see the class); this does not look at them."""
        self._manifests.put(manifest)

    def settle(self) -> None:
        """What was put in so far survives a power cut when this returns. Raises: StoreFull, StoreError.

        Deltas and manifests are used before: what a power cut tears is found by its digests, and counts as missing.
        """
        self._unsettled.settle()

    def manifest(self, fingerprint: bytes) -> Manifest:
        """The manifest of a version held. Raises: UnknownVersion, also for a damaged one, which is then put aside."""
        return self._manifests.get(fingerprint)

    def manifests(self) -> list[bytes]:
        """Fingerprints of all versions held, sorted."""
        return self._manifests.held()

    def missing(self, manifest: Manifest) -> list[TensorEntry]:
        """The entries whose tensors are not held, in the manifest's order; never zero-size ones."""
        lacking = self._lacking(stored_digests(manifest))
        return [entry for entry in manifest.tensors if entry.digest in lacking and entry.spec.size_bytes]

    # life of the whole

    def lock(self, name: str, *, wait_s: float = 0.0, holder: str = "") -> AbstractContextManager[None]:
        """Holds the lock `name` during a block, against other processes and threads; not reentrant.

        Raises: StoreBusy after `wait_s`, naming who holds it: its process and `holder`.
        """
        assert NAME.match(name) and "/" not in name and name not in _OWN_LOCKS, name
        return locked(self._locks / name, wait_s=wait_s, holder=holder)

    def shared_lock(self, name: str, *, wait_s: float = 0.0, holder: str = "") -> AbstractContextManager[None]:
        """The same against everybody who shares this store's content."""
        return locked(self.content / "locks" / name, wait_s=wait_s, holder=holder)

    def keep(self, fingerprints: Collection[bytes]) -> None:
        """What no `collect` may remove until the next call, not by others who share it either. Raises: StoreFull."""
        self._kept = frozenset(fingerprints)
        if self._keepers:
            with locked(self.content / "locks" / "objects", shared=True, wait_s=_WRITE_WAIT_S):
                self._keepers.keep(fingerprints)

    def collect(self, keep: Collection[bytes], *, grace_s: float = 0.0, wait_s: float = 0.0) -> Collected:
        """Removes manifests not in `keep` and older than `grace_s`, and tensors that no manifest left needs.

        What `keep` was called with stays as well, here and by others who share the content.
        Also removes temp files of dead processes. Others may read meanwhile: their views stay valid, and they find
        moved tensors by themselves. What is damaged among `keep` is told in `unreadable`.
        Raises: StoreBusy when somebody is `writing` and does not end within `wait_s`; never call it while `writing`.
        """
        self.settle()  # before anything older goes
        with locked(self.content / "locks" / "objects", wait_s=wait_s, holder="collect"):
            freed_bytes = sweep(self.content / "temp")
            self._objects.refresh(force=True)
            self._derived.refresh(force=True)  # what is not known here would be taken for garbage
            kept = self._kept.union(keep, self._keepers.wanted() if self._keepers else ())
            removed, freed = self._manifests.drop(kept, grace_s=grace_s)
            crash_point("store.manifests-dropped")
            live, unreadable = self._manifests.live(kept)
            freed_bytes += freed + self._manifests.drop_damaged(unreadable)
            if not unreadable:
                needed, files = self._derived.needs(live, whole=self._objects.holds)
                freed_bytes += self._derived.retain(files)
                freed_bytes += retain(self._objects, needed)
            return Collected(removed, freed_bytes, tuple(sorted(unreadable)))

    def _lacking(self, digests: Collection[bytes]) -> set[bytes]:
        lacking = self._objects.lacking(digests)
        return self._derived.lacking(lacking) if lacking else lacking

    def _whole(self, digest: bytes) -> Bytes:
        return np.frombuffer(self._objects.read(digest, verify=False), np.uint8)
