"""Tensors of a store that are kept as changes to others (deltas.py): found by digest, rebuilt in memory when read.

Who reads a version loads all of its tensors at once (rebuild.py). Who reads a single one gets all of its file: tensors
share blocks, and who reads one of a version reads the others next.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from .deltas import DeltaFile, DeltaWriter, StoredDelta
from .errors import DamagedTensor, MalformedRecord, StoreError
from .folder_stamp import FolderStamp
from .layout import Bytes
from .memory import Memory
from .pack import HEAL
from .rebuild import Rebuild
from .records import remove
from .unsettled import Unsettled

#: the whole tensor of a digest, where the store holds one: DamagedTensor where not
ReadWhole = Callable[[bytes], Bytes]


class Derived:
    """The delta files in `folder`. Safe to use from several threads."""

    def __init__(
        self, folder: Path, *, temp: Path, order_lock: Path, memory: Memory, whole: ReadWhole, unsettled: Unsettled
    ):
        self.folder, self._temp, self._order_lock, self._unsettled = folder, temp, order_lock, unsettled
        self._memory, self._whole = memory, whole
        self._guard = threading.RLock()
        self._files: dict[str, DeltaFile] = {}
        # Digest -> the oldest file that holds it: what a file builds on was there before it, so that this never leads
        # in a circle, which the newest would as soon as a tensor returns to an earlier value.
        self._where: dict[bytes, DeltaFile] = {}
        self._forgotten: set[tuple[str, bytes]] = set()  # (file, digest): could not be rebuilt from there
        self._stamp = FolderStamp(folder)
        self.refresh()

    # ------------------------------------------------------------------ reading

    def lacking(self, digests: Iterable[bytes]) -> set[bytes]:
        """Those of `digests` that no file holds. Looks at the folder again if there are any."""
        with self._guard:
            lacking = {digest for digest in digests if digest not in self._where}
            if lacking and self.refresh():
                lacking -= self._where.keys()
            return lacking

    def read(self, digest: bytes) -> Bytes:
        """The tensor, rebuilt and verified, from memory if it was there. Raises: DamagedTensor, StoreError."""
        with self._guard:
            found = self._memory.get(digest)
            while found is None and not self.lacking((digest,)):
                self._memory.trim()
                file = self._where[digest]
                self._rebuild({other for other in file.digests if self._where.get(other) is file})
                found = self._memory.get(digest)
            if found is None:
                raise DamagedTensor(
                    "a stored tensor can't be rebuilt from its delta",
                    digest=digest,
                    about=f"tensor {digest.hex()} in {self.folder}",
                    next=HEAL,
                )
            return found

    def load(self, digests: Iterable[bytes]) -> None:
        """Rebuilds those that are held here into memory, as far as they can be. Raises: StoreError."""
        with self._guard:
            wanted = {digest for digest in digests if digest in self._where and self._memory.get(digest) is None}
            if wanted:
                self._rebuild(wanted)

    def depth(self, digests: Iterable[bytes], *, whole: Callable[[bytes], bool]) -> int:
        """How many files it takes at most to rebuild one of these. 0: none of them is in a file.

        `whole` answers which tensors are held outside of the files: nothing below these counts.
        """
        with self._guard:
            depths: dict[str, int] = {}
            files = {self._where[digest].name: self._where[digest] for digest in digests if digest in self._where}
            return max((self._depth(file, depths, whole) for file in files.values()), default=0)

    def on_nothing(self, digests: Iterable[bytes]) -> bool:
        """Whether one of these is in a file that builds on nothing: it was sent whole."""
        with self._guard:
            return any(not self._where[digest].bases for digest in digests if digest in self._where)

    def needs(self, digests: Iterable[bytes], *, whole: Callable[[bytes], bool]) -> tuple[set[bytes], set[str]]:
        """Digests that must be kept so that all of `digests` can be read, and the names of the files for it."""
        with self._guard:
            needed, files, left = set(digests), set[str](), sorted(digests)
            while left:
                digest = left.pop()
                file = None if whole(digest) else self._where.get(digest)
                if file is not None and file.name not in files:
                    files.add(file.name)
                    new = file.bases - needed
                    needed |= new
                    left += sorted(new)
            return needed, files

    def forget(self, digest: bytes) -> None:
        """Gives up `digest` in every file that is known now."""
        with self._guard:
            self._forgotten.update((name, digest) for name, file in self._files.items() if digest in file.digests)
            self._where.pop(digest, None)

    # ------------------------------------------------------------------ writing

    def batch(self) -> DeltaBatch:
        """A file in the making."""
        return DeltaBatch(self, self._temp)

    def commit(self, writer: DeltaWriter, record: StoredDelta) -> None:
        """Its tensors are held from now on, durable once settled. Raises: StoreFull, StoreError, StoreBusy."""
        file = writer.finish(record, self.folder, order_lock=self._order_lock)
        self._unsettled.add(file.path)
        with self._guard:
            self._files[file.name] = file
            self._index()

    def retain(self, names: set[str]) -> int:
        """Removes all files but these; returns the bytes freed."""
        with self._guard:
            self.refresh(force=True)
            gone = [file for name, file in self._files.items() if name not in names]
            freed = 0
            for file in gone:
                freed += remove(file.path)
                del self._files[file.name]
            self._index()
            return freed

    def refresh(self, *, force: bool = False) -> bool:
        """Learns which files came and went; False where the folder did not change since the last look."""
        with self._guard:
            if not self._stamp.changed() and not force:
                return False
            try:
                names = {path.name for path in self.folder.iterdir() if path.suffix == ".delta"}
            except OSError as error:
                raise StoreError(f"the store can't be read: {error.strerror}", about=str(self.folder)) from error
            for name in self._files.keys() - names:
                del self._files[name]
            for name in sorted(names - self._files.keys()):
                self._open(self.folder / name)
            self._index()
            return True

    def _open(self, path: Path) -> None:
        try:
            self._files[path.name] = DeltaFile.open(path)
        except FileNotFoundError:  # removed since the folder was listed
            return
        except MalformedRecord:  # its tensors count as missing; the file stays aside for whoever wants to look
            with suppress(OSError):
                path.rename(path.with_name(f"{path.name}.damaged"))

    def _index(self) -> None:
        self._where = {}
        for name in sorted(self._files, reverse=True):
            file = self._files[name]
            self._where.update((d, file) for d in file.digests if (name, d) not in self._forgotten)

    # ------------------------------------------------------------------ rebuilding

    def _depth(self, file: DeltaFile, depths: dict[str, int], whole: Callable[[bytes], bool]) -> int:
        if file.name not in depths:
            bases = [base for base in file.bases if base in self._where and not whole(base)]
            below = {self._where[base].name: self._where[base] for base in bases}
            below = {name: each for name, each in below.items() if name < file.name}
            depths[file.name] = 1 + max((self._depth(each, depths, whole) for each in below.values()), default=0)
        return depths[file.name]

    def _rebuild(self, wanted: set[bytes]) -> None:
        """Into memory; what can't be rebuilt is forgotten where it was looked for."""
        found = Rebuild(wanted, where=self._where, given=self._given, memory=self._memory).run()
        self._memory.put(found)
        if lost := wanted - found.keys():
            self._forgotten.update((self._where[digest].name, digest) for digest in lost)
            self._index()

    def _given(self, digest: bytes) -> Bytes | None:
        found = self._memory.get(digest)
        if found is None:
            with suppress(DamagedTensor):
                found = self._whole(digest)
        return found


class DeltaBatch(DeltaWriter):
    """A delta on its way into the store. Made by `Store.delta`."""

    def __init__(self, derived: Derived, temp: Path):
        super().__init__(temp)
        self._derived = derived

    def commit(self, record: StoredDelta) -> None:
        """Its tensors are held from now on, durable once settled. Raises: StoreFull, StoreError, StoreBusy."""
        self._derived.commit(self, record)
