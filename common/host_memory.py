"""Rebuilt tensors that all workers of a host share: decoded and hashed by one of them, mapped by the others.

    /dev/shm/refleet-<user>-<digest of the store's path>/NAME.image     tensors and their table, as in a pack

An image is made under another name, which becomes visible whole. Whoever maps one holds a shared lock on it for as long
as anything looks into it: the lock belongs to the mapping, so the kernel drops it however the process ends. An image
that nobody locks is overwritten by the next version of the same size (touched pages are several times cheaper than
fresh ones), or removed.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
import stat
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np

from .digest import digest_of
from .errors import MalformedRecord, StoreError
from .folder_stamp import FolderStamp
from .memory import Bytes, Memory
from .pack import Pack, aligned, table_bytes, table_size

SHM = Path("/dev/shm")  # noqa: S108 - the folder below is ours alone
_VISIBLE, _MAKING = ".image", ".making"


class HostMemory(Memory):
    """The memory of one process over the images of its host. What does not fit into `/dev/shm` stays private.

    Raises: StoreError when the folder can't be ours.
    """

    def __init__(self, of: Path, *, shm: Path = SHM):
        """For the store in folder `of`."""
        super().__init__()
        self.folder = shm / f"refleet-{os.getuid()}-{digest_of(os.fsencode(of.resolve())).hex()[:16]}"
        _own_folder(self.folder)
        self._stamp = FolderStamp(self.folder)
        self._images: dict[str, _Image] = {}
        self._where: dict[bytes, _Image] = {}
        self._forgotten: set[tuple[str, bytes]] = set()
        self._making: list[_Making] = []
        self._sweep()

    @property
    def size_bytes(self) -> int:
        with self._guard:
            shared = sum(image.data.size for image in self._images.values())
        return shared + super().size_bytes

    def take_all(self, sizes: Iterable[int]) -> list[Bytes]:
        """Buffers that `put` makes visible to the other workers, side by side in one image."""
        wanted = list(sizes)
        starts = list(accumulate((aligned(size) for size in wanted), initial=0))
        if not starts[-1]:
            return super().take_all(wanted)
        try:
            making = self._make(starts[-1], starts[-1] + table_size(len(wanted)))
        except OSError:  # no room there
            return super().take_all(wanted)
        whole = making.data()
        return [whole[start : start + size] for start, size in zip(starts, wanted, strict=False)]

    def get(self, digest: bytes) -> Bytes | None:
        found = super().get(digest)
        if found is not None:
            return found
        with self._guard:
            if digest not in self._where and self._stamp.changed():
                self._look()
            image = self._where.get(digest)
            return image.read(digest) if image else None

    def put(self, found: Mapping[bytes, Bytes]) -> None:
        with self._guard:
            rest = dict(found)
            for making in list(self._making):
                places = {digest: place for digest, data in rest.items() if (place := making.place(data))}
                if places:
                    self._making.remove(making)
                    self._take(making.finish(places, self.folder))
                    rest = {digest: data for digest, data in rest.items() if digest not in places}
        super().put(rest)

    def drop(self, digest: bytes) -> None:
        super().drop(digest)
        with self._guard:
            self._forgotten.update((name, digest) for name, each in self._images.items() if digest in each.objects)
            self._index()

    def trim(self, *, free: bool = False) -> None:
        super().trim(free=free)
        with self._guard:
            kept = self._kept()
            self._images = {name: each for name, each in self._images.items() if not kept.isdisjoint(each.objects)}
            self._forgotten = {(name, digest) for name, digest in self._forgotten if name in self._images}
            self._stamp = FolderStamp(self.folder)  # another worker's image may be wanted again
            self._index()

    def close(self) -> None:
        super().close()
        with suppress(StoreError):
            self._sweep()

    # ------------------------------------------------------------------ images

    def _look(self) -> None:
        """Map what others made since the last look."""
        for path in self._paths(_VISIBLE):
            if path.name not in self._images:
                with suppress(OSError, MalformedRecord):  # gone, being overwritten, or no image of this program
                    self._take(_Image.open(path))

    def _take(self, image: _Image) -> None:
        self._images[image.name] = image
        self._index()

    def _index(self) -> None:
        self._where = {
            digest: image
            for name, image in sorted(self._images.items())
            for digest in image.objects
            if (name, digest) not in self._forgotten
        }

    def _make(self, data_bytes: int, file_bytes: int) -> _Making:
        with self._guard:
            path = self.folder / f"{secrets.token_hex(8)}{_MAKING}"
            fd = self._unused(path, file_bytes)
            if fd is None:
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            making = _Making(path, fd, data_bytes, file_bytes)
            self._making = [each for each in self._making if each.alive]
            self._making.append(making)
            return making

    def _unused(self, path: Path, file_bytes: int) -> int | None:
        """An image of this size that nobody looks at, now at `path` and locked; None if there is none."""
        for other, fd in self._unlocked():
            if os.fstat(fd).st_size == file_bytes:
                other.rename(path)
                return fd
            os.close(fd)
        return None

    def _sweep(self) -> None:
        """Remove what nobody looks at. Raises: StoreError."""
        for path, fd in self._unlocked():
            path.unlink(missing_ok=True)
            os.close(fd)

    def _unlocked(self) -> Iterator[tuple[Path, int]]:
        """(path, file) of every image, finished or not, on which no living process has a lock; we have one now."""
        for path in self._paths(_VISIBLE, _MAKING):
            with suppress(OSError):
                fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                if _locked(fd, path, fcntl.LOCK_EX):
                    yield path, fd
                else:
                    os.close(fd)

    def _paths(self, *kinds: str) -> list[Path]:
        try:
            return sorted(path for path in self.folder.iterdir() if path.suffix in kinds)
        except OSError as error:
            raise StoreError(f"shared memory can't be read: {error.strerror}", about=str(self.folder)) from error


@dataclass(frozen=True)
class _Image:
    """One that is visible. Its lock lives as long as the mapping, which lives as long as any view of `data`."""

    name: str
    objects: dict[bytes, tuple[int, int]]
    data: Bytes

    @classmethod
    def open(cls, path: Path) -> _Image:
        """Raises: OSError, MalformedRecord."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if not _locked(fd, path, fcntl.LOCK_SH):
                raise BlockingIOError(f"{path} is being overwritten")
            pack = Pack.read_table(path, fd)
            # private: nothing that is done to the views here changes what the others see
            return cls(path.name, pack.objects, np.frombuffer(mmap.mmap(fd, 0, access=mmap.ACCESS_COPY), np.uint8))
        finally:
            os.close(fd)  # the mapping has a file descriptor of its own, and so the lock

    def read(self, digest: bytes) -> Bytes:
        offset, size = self.objects[digest]
        return self.data[offset : offset + size]


class _Making:
    """One that is being filled. It vanishes with the last view into it, unless it was finished."""

    def __init__(self, path: Path, fd: int, data_bytes: int, file_bytes: int):
        """`fd`: locked if it is a used one. Raises: OSError."""
        self._path, self._fd, self._data_bytes = path, fd, data_bytes
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.posix_fallocate(fd, 0, file_bytes)  # touching a page for which there is no room would kill the process
            mapped = mmap.mmap(fd, file_bytes)
        except OSError:
            _abandon(path, fd)
            raise
        self._vanish = weakref.finalize(mapped, _abandon, path, fd)
        whole = np.frombuffer(mapped, np.uint8)
        self._start = whole.ctypes.data
        self._whole = weakref.ref(whole)
        self._first: Bytes | None = whole

    @property
    def alive(self) -> bool:
        return self._vanish.alive

    def data(self) -> Bytes:
        """All of it; called once, by whoever keeps views of it from then on."""
        assert self._first is not None
        whole, self._first = self._first, None
        return whole

    def place(self, data: Bytes) -> tuple[int, int] | None:
        """(offset, size) of a buffer in here; None for others."""
        offset = data.ctypes.data - self._start
        return (offset, data.size) if self.alive and 0 <= offset < self._data_bytes and data.size else None

    def finish(self, places: Mapping[bytes, tuple[int, int]], folder: Path) -> _Image:
        """Visible from now on, with these tensors. Raises: OSError."""
        whole = self._whole()
        assert whole is not None
        table = table_bytes(places, at=self._data_bytes)
        os.pwrite(self._fd, table, self._data_bytes)
        os.ftruncate(self._fd, self._data_bytes + len(table))
        self._vanish.detach()
        name = f"{time.time_ns():020d}-{self._path.stem}{_VISIBLE}"
        self._path.rename(folder / name)
        fcntl.flock(self._fd, fcntl.LOCK_SH)
        os.close(self._fd)
        return _Image(name, dict(places), whole)


def _abandon(path: Path, fd: int) -> None:
    with suppress(OSError):
        path.unlink(missing_ok=True)
    os.close(fd)


def _locked(fd: int, path: Path, kind: int) -> bool:
    """Lock the open file `fd`, if nobody's lock is against it and it is still what lies at `path`."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
        return os.fstat(fd).st_ino == path.stat().st_ino
    except OSError:
        return False


def _own_folder(folder: Path) -> None:
    """`/dev/shm` is everybody's: the folder must be a real one, ours, and closed to others. Raises: StoreError."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise StoreError(f"shared memory can't be used: {error.strerror}", about=str(folder)) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise StoreError(
            "shared memory can't be used: the folder is somebody else's", about=str(folder), next=f"rm -r {folder}"
        )
