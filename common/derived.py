"""Tensors of a store that are kept as changes to others (deltas.py): found by digest, rebuilt in memory when read.

All tensors of one file are rebuilt together: they share blocks, and who reads one of a version reads the others next.
A chain of files is rebuilt from its oldest on; what lies between is dropped again.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from .deltas import DeltaFile, DeltaWriter, StoredDelta
from .digest import matching
from .errors import DamagedTensor, LimitExceeded, MalformedRecord, StoreError
from .folder_stamp import FolderStamp
from .layout import Bytes, Placed, decode, placed
from .memory import Memory
from .pack import HEAL
from .records import Unsettled, remove
from .threads import cores, in_order

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
                self._rebuild(self._where[digest])  # where that fails, this file is forgotten
                found = self._memory.get(digest)
            if found is None:
                raise DamagedTensor(
                    "a stored tensor can't be rebuilt from its delta",
                    digest=digest,
                    about=f"tensor {digest.hex()} in {self.folder}",
                    next=HEAL,
                )
            return found

    def depth(self, digests: Iterable[bytes]) -> int:
        """How many files it takes at most to rebuild one of these. 0: none of them is in a file."""
        with self._guard:
            depths: dict[str, int] = {}
            files = {self._where[digest].name: self._where[digest] for digest in digests if digest in self._where}
            return max((self._depth(file, depths) for file in files.values()), default=0)

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

    def _depth(self, file: DeltaFile, depths: dict[str, int]) -> int:
        if file.name not in depths:
            below = {self._where[base].name: self._where[base] for base in file.bases if base in self._where}
            below = {name: each for name, each in below.items() if name < file.name}
            depths[file.name] = 1 + max((self._depth(each, depths) for each in below.values()), default=0)
        return depths[file.name]

    def _rebuild(self, file: DeltaFile) -> None:
        """Everything in `file` into memory; what can't be rebuilt is forgotten."""
        between: dict[bytes, Bytes] = {}
        order: list[DeltaFile] = []
        self._plan(file, order, set())
        for number, each in enumerate(order[:-1]):
            later = set[bytes]().union(*(other.bases for other in order[number + 1 :]))
            found = self._stepped(each, between, later)
            between = {digest: data for digest, data in (between | found).items() if digest in later}
            del found  # buffers that nobody looks at are used again
        found, bad = self._rebuilt(file, between)
        self._forgotten.update((file.name, digest) for digest in bad)
        self._index()
        self._memory.put(found)

    def _plan(self, file: DeltaFile, order: list[DeltaFile], seen: set[str]) -> None:
        """The files that `file` builds on, oldest first, and itself. A chain may be long: no recursion."""
        stack = [(file, False)]
        while stack:
            each, ready = stack.pop()
            if ready:
                order.append(each)
                continue
            if each.name in seen:
                continue
            seen.add(each.name)
            stack.append((each, True))
            lacking = (base for base in sorted(each.bases) if self._memory.get(base) is None and base in self._where)
            older = [self._where[base] for base in lacking if not self._is_whole(base)]
            stack += [(below, False) for below in older if below.name < each.name]

    def _is_whole(self, digest: bytes) -> bool:
        try:
            self._whole(digest)
        except DamagedTensor:
            return False
        return True

    def _stepped(self, file: DeltaFile, between: dict[bytes, Bytes], later: set[bytes]) -> dict[bytes, Bytes]:
        """The tensors of a file on the way to another one: not verified, what comes of them is. In place where a tensor
        of `between` is the base of one tensor only, and no file needs it `later`.
        """
        tensors = file.record.tensors
        uses = Counter(tensor.base for tensor in tensors)
        bases, bad = self._bases(file, between)
        outs = [
            between[tensor.base]
            if tensor.base in between and tensor.base not in later and uses[tensor.base] == 1 and number not in bad
            else self._memory.take(tensor.size_bytes)
            for number, tensor in enumerate(tensors)
        ]
        bad |= self._decoded(file, bases, outs, bad)
        return {tensor.digest: outs[number] for number, tensor in enumerate(tensors) if number not in bad}

    def _rebuilt(self, file: DeltaFile, between: dict[bytes, Bytes]) -> tuple[dict[bytes, Bytes], frozenset[bytes]]:
        """(verified tensors, digests that could not be rebuilt) of one file, whose bases are at hand by now."""
        tensors = file.record.tensors
        bases, bad = self._bases(file, between)
        outs = self._memory.take_all(tensor.size_bytes for tensor in tensors)
        bad |= self._decoded(file, bases, outs, bad)
        sound = matching((out.data for out in outs), (tensor.digest for tensor in tensors))
        found = {
            tensor.digest: outs[number] for number, tensor in enumerate(tensors) if sound[number] and number not in bad
        }
        return found, file.digests - found.keys()

    def _bases(self, file: DeltaFile, between: dict[bytes, Bytes]) -> tuple[dict[int, Bytes], set[int]]:
        """Bases by number of the tensor that builds on them, and the numbers of those whose base is not to be had."""
        bases: dict[int, Bytes] = {}
        bad: set[int] = set()
        for number, tensor in enumerate(file.record.tensors):
            if tensor.base is not None:
                found = self._base(tensor.base, between)
                if found is None or found.size != tensor.size_bytes:
                    bad.add(number)
                else:
                    bases[number] = found
        return bases, bad

    def _base(self, digest: bytes, between: dict[bytes, Bytes]) -> Bytes | None:
        found = between.get(digest)
        if found is None:
            found = self._memory.get(digest)
        if found is None:
            with suppress(DamagedTensor):
                found = self._whole(digest)
        return found

    @staticmethod
    def _decoded(file: DeltaFile, bases: dict[int, Bytes], outs: list[Bytes], bad: set[int]) -> set[int]:
        """Fills `outs`; returns the tensors that could not be. `bad` have no base. Raises: StoreError."""
        tensors = file.record.tensors

        def task(place: Placed) -> set[int]:
            numbers = {span.number for span in place.spans}
            if numbers & bad:
                return numbers
            first = tensors[place.spans[0].number]
            based = bases.__getitem__ if first.base is not None else None
            try:
                encoded = read(place.offset, place.block.encoded_bytes)
                decode(place, encoded, dtype=first.dtype, base=based, out=outs.__getitem__)
            except (MalformedRecord, LimitExceeded):
                return numbers
            return set()

        places = placed((tensor.size_bytes for tensor in tensors), file.record.blocks)
        try:
            with file.reading() as read:
                return set().union(*in_order(task, places, threads=cores()))
        except FileNotFoundError:  # another process removed it
            return set(range(len(tensors)))


class DeltaBatch(DeltaWriter):
    """A delta on its way into the store. Made by `Store.delta`."""

    def __init__(self, derived: Derived, temp: Path):
        super().__init__(temp)
        self._derived = derived

    def commit(self, record: StoredDelta) -> None:
        """Its tensors are held from now on, durable once settled. Raises: StoreFull, StoreError, StoreBusy."""
        self._derived.commit(self, record)
