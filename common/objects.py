"""Tensors by digest: the packs of one folder, read and written by several processes at once.

Which pack holds a digest is known from the packs' tables. The newest copy wins, so that a tensor that was damaged and
added again is read from its new place, also after a restart. On a miss the folder is looked at again: another process
may have added packs, or compacted some away.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, KeysView
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from .digest import tensor_digest
from .errors import DamagedTensor, MalformedRecord, StoreError
from .folder_stamp import FolderStamp
from .pack import HEAL, PACK_BYTES, Pack, PackWriter
from .records import remove

if TYPE_CHECKING:
    from typing_extensions import Buffer

#: every zero-size tensor has this digest; such tensors are never stored and never missing
EMPTY = tensor_digest()


class Objects:
    """The packs in `folder`; `temp` takes packs in the making, `order_lock` is the lock file that orders new packs.

    Safe to use from several threads. It guards nobody against retention: see `Store.writing`.
    """

    def __init__(self, folder: Path, *, temp: Path, order_lock: Path, pack_bytes: int = PACK_BYTES):
        self.folder, self.pack_bytes = folder, pack_bytes
        self._temp, self._order_lock = temp, order_lock
        self._guard = threading.RLock()
        self._packs: dict[str, Pack] = {}
        self._where: dict[bytes, Pack] = {}  # digest -> the newest pack that holds it
        self._forgotten: set[tuple[str, bytes]] = set()  # (pack, digest): copies that proved damaged
        self._stamp = FolderStamp(folder)
        self.refresh()

    # reading

    def lacking(self, digests: Iterable[bytes]) -> set[bytes]:
        """Those of `digests` that are not held. Looks at the folder again if there are any."""
        with self._guard:
            lacking = {digest for digest in digests if digest not in self._where and digest != EMPTY}
            if lacking and self.refresh():
                lacking -= self._where.keys()
        return lacking

    def holds(self, digest: bytes) -> bool:
        """As of the last look at the folder."""
        return digest in self._where or digest == EMPTY

    def read(self, digest: bytes, *, verify: bool) -> memoryview:
        """The object's bytes (see `Pack.read`). Raises: DamagedTensor for missing and damaged ones, StoreError."""
        if digest == EMPTY:
            return memoryview(bytearray())
        about = f"tensor {digest.hex()} in {self.folder}"
        problem = DamagedTensor("a tensor is missing from the store", digest=digest, about=about, next=HEAL)
        tried: set[str] = set()
        while (pack := self._locate(digest, tried)) is not None:
            tried.add(pack.name)
            try:
                return pack.read(digest, verify=verify)
            except FileNotFoundError:  # another process compacted it away
                continue
            except DamagedTensor as damage:  # another process may have added it again
                problem = damage
        raise problem

    def forget(self, digest: bytes) -> None:
        """Gives up every copy of `digest` that is known now; a copy in a later pack counts again."""
        with self._guard:
            self._forgotten.update((pack.name, digest) for pack in self._packs.values() if digest in pack.objects)
            self._where.pop(digest, None)

    def close(self) -> None:
        """Lets go of all mappings; views that were handed out stay valid."""
        with self._guard:
            for pack in self._packs.values():
                pack.close()

    # writing

    @contextmanager
    def batch(self) -> Iterator[Batch]:
        """Objects added during the block are visible after it; after an exception, only packs filled before it."""
        batch = Batch(self)
        try:
            yield batch
            batch.commit()
        finally:
            batch.close()

    def writer(self) -> PackWriter:
        """A pack in the making, for `commit`."""
        return PackWriter(self._temp)

    def commit(self, writer: PackWriter) -> None:
        """Makes the writer's objects visible, as the newest pack. Raises: StoreFull, StoreError, StoreBusy."""
        target = writer.finish().rename_as_newest(self.folder, "pack", order_lock=self._order_lock)
        with self._guard:
            if target.name not in self._packs:  # else another thread's look at the folder was faster
                self._take(Pack(target, writer.objects, file_bytes=writer.file_bytes))

    def remove(self, pack: Pack) -> int:
        """Removes a pack; returns the bytes freed. Mappings of it live on until their last view is gone."""
        freed_bytes = remove(pack.path)
        with self._guard:
            self._drop({pack.name} & self._packs.keys())
        return freed_bytes

    # what there is

    def digests(self) -> KeysView[bytes]:
        """All digests held, as of the last look at the folder."""
        return self._where.keys()

    def by_age(self) -> list[Pack]:
        """The packs, oldest first."""
        with self._guard:
            return [self._packs[name] for name in sorted(self._packs)]

    def copies(self, live: set[bytes]) -> dict[bytes, list[Pack]]:
        """Which packs hold each of `live`, newest first; copies that were forgotten do not count."""
        found: dict[bytes, list[Pack]] = {}
        for pack in reversed(self.by_age()):
            for digest in (pack.objects.keys() & live) - self._forgotten_in(pack):
                found.setdefault(digest, []).append(pack)
        return found

    def refresh(self, *, force: bool = False) -> bool:
        """Learns which packs came and went; False where the folder did not change since the last look."""
        with self._guard:
            if not self._stamp.changed() and not force:
                return False
            try:
                names = {path.name for path in self.folder.iterdir() if path.suffix == ".pack"}
            except OSError as error:
                raise StoreError(f"the store can't be read: {error.strerror}", about=str(self.folder)) from error
            self._drop(self._packs.keys() - names)
            for name in sorted(names - self._packs.keys()):
                self._open(self.folder / name)
            return True

    def _open(self, path: Path) -> None:
        try:
            pack = Pack.open(path)
        except FileNotFoundError:  # compacted away since the folder was listed
            return
        except MalformedRecord:
            # Its objects count as missing. The file stays, for whoever wants to look, until retention finds that
            # nothing misses it any more.
            with suppress(OSError):
                path.rename(path.with_name(f"{path.name}.damaged"))
            return
        self._take(pack)

    def _take(self, pack: Pack) -> None:
        newest = pack.name > max(self._packs, default="")
        self._packs[pack.name] = pack
        if newest:
            self._index(pack)
        else:
            self._index_all()

    def _drop(self, names: set[str]) -> None:
        for name in names:
            self._packs.pop(name).close()
        if names:
            self._index_all()

    def _index_all(self) -> None:
        self._where = {}
        for pack in self.by_age():
            self._index(pack)

    def _index(self, pack: Pack) -> None:
        forgotten = self._forgotten_in(pack)
        self._where.update((digest, pack) for digest in pack.objects if digest not in forgotten)

    def _forgotten_in(self, pack: Pack) -> set[bytes]:
        return {digest for name, digest in self._forgotten if name == pack.name}

    def _locate(self, digest: bytes, tried: set[str]) -> Pack | None:
        with self._guard:
            pack = self._where.get(digest)
            if pack is None or pack.name in tried:
                self.refresh(force=bool(tried))
                pack = self._where.get(digest)
            return None if pack is None or pack.name in tried else pack


class Batch:
    """Objects on their way into the store, for one thread. Made by `Objects.batch` and `Store.batch`."""

    def __init__(self, objects: Objects):
        self._objects = objects
        self._writer: PackWriter | None = None
        self._failed: StoreError | None = None

    def add(self, blocks: Iterable[Buffer], *, expect: bytes | None = None) -> bytes:
        """Adds the object whose bytes are the concatenated `blocks`; returns its digest.

        What the store or this batch holds already takes no room, and with `expect` is not even written. A block is
        not used any more once the next one is asked for. On an exception the batch is as before the call.
        Raises: DigestMismatch when the digest is not `expect`, StoreFull, StoreError, and what `blocks` raises.
        """
        if self._failed is not None:
            raise self._failed
        self._writer = self._writer or self._objects.writer()
        digest = self._writer.add(blocks, expect=expect, known=self._objects.digests())
        if self._writer.size_bytes >= self._objects.pack_bytes:
            self.commit()
        return digest

    def commit(self) -> None:
        """Makes everything added so far visible and durable; happens by itself at the end and beyond `pack_bytes`."""
        if self._failed is not None:
            raise self._failed  # objects are lost that `add` accepted: leaving the block must not look like success
        if self._writer is None or not self._writer.objects:
            return
        try:
            self._objects.commit(self._writer)
        except StoreError as error:
            self._failed = error
            raise
        finally:
            self.close()

    def close(self) -> None:
        """Removes what was not committed."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
