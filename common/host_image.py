"""One image of tensors in shared memory: made by one process, then mapped by any, as long as somebody looks into it.

An image is made under another name, which becomes visible whole. Whoever maps one holds a shared lock on it for as long
as anything looks into it: the lock belongs to the mapping, so the kernel drops it however the process ends.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np

from .crashpoint import crash_point
from .memory import Bytes
from .pack import Pack, aligned, table_bytes, table_size

_VISIBLE, _MAKING = ".image", ".making"


@dataclass(frozen=True, slots=True)
class Image:
    """One that is visible. Its lock lives as long as the mapping, which lives as long as any view of `data`."""

    name: str
    objects: dict[bytes, tuple[int, int]]
    data: Bytes

    @classmethod
    def open(cls, path: Path) -> Image:
        """Raises: OSError when it is gone or being overwritten, MalformedRecord."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if not _locked(fd, path, fcntl.LOCK_SH):
                raise BlockingIOError(f"{path} is being overwritten")
            objects = Pack.read_table(path, fd).objects
            # private: nothing that is done to the views here changes what the others see
            mapped = mmap.mmap(fd, 0, access=mmap.ACCESS_COPY)
        finally:
            os.close(fd)  # the mapping has a file descriptor of its own, and so the lock
        return cls(path.name, objects, np.frombuffer(mapped, np.uint8))

    def read(self, digest: bytes) -> Bytes:
        offset, size = self.objects[digest]
        return self.data[offset : offset + size]


class Making:
    """One that is being filled. It vanishes with the last view into it, unless it was finished."""

    def __init__(self, folder: Path, sizes: list[int], carried: Mapping[bytes, Bytes]):
        """For tensors of these sizes, and those that are `carried` over from other images. Raises: OSError."""
        starts = list(accumulate((aligned(size) for size in (*sizes, *(d.size for d in carried.values()))), initial=0))
        self._data_bytes, file_bytes = starts[-1], starts[-1] + table_size(len(starts))
        self._path, self._fd = _used(folder, file_bytes) or _created(folder)
        try:
            os.posix_fallocate(self._fd, 0, file_bytes)  # touching a page that has no room would kill the process
            mapped = mmap.mmap(self._fd, file_bytes)
        except OSError:
            _abandon(self._path, self._fd)
            raise
        self._vanish = weakref.finalize(mapped, _abandon, self._path, self._fd)
        whole = np.frombuffer(mapped, np.uint8)
        self._start = whole.ctypes.data
        #: taken by whoever fills them: only views keep it alive
        self.buffers = [whole[start : start + size] for start, size in zip(starts, sizes, strict=False)]
        self._carried: dict[bytes, tuple[int, int]] = {}
        for (digest, data), start in zip(carried.items(), starts[len(sizes) :], strict=False):
            whole[start : start + data.size] = data
            self._carried[digest] = start, data.size

    @property
    def alive(self) -> bool:
        return self._vanish.alive

    def place(self, data: Bytes) -> tuple[int, int] | None:
        """(offset, size) of a buffer in here; None for others."""
        offset = data.ctypes.data - self._start
        return (offset, data.size) if self.alive and 0 <= offset < self._data_bytes and data.size else None

    def finish(self, places: Mapping[bytes, tuple[int, int]]) -> Path:
        """Visible from now on, with these tensors and the carried ones. Raises: OSError."""
        table = table_bytes({**self._carried, **places}, at=self._data_bytes)
        os.pwrite(self._fd, table, self._data_bytes)
        os.ftruncate(self._fd, self._data_bytes + len(table))
        fcntl.flock(self._fd, fcntl.LOCK_SH)  # nobody can lock it in between: the kernel changes the lock in one step
        crash_point("store.image-written")
        path = self._path.with_name(f"{time.time_ns():020d}-{self._path.stem}{_VISIBLE}")
        self._path.rename(path)
        crash_point("store.image-renamed")
        self._vanish.detach()
        os.close(self._fd)
        return path


def images(folder: Path) -> list[Path]:
    """Those that are visible, oldest first."""
    return _paths(folder, _VISIBLE)


def sweep(folder: Path) -> None:
    """Remove what nobody looks at, finished or not."""
    for path, fd in _unlocked(folder):
        _abandon(path, fd)


def _used(folder: Path, file_bytes: int) -> tuple[Path, int] | None:
    """An image that nobody looks at, under a new name, and locked. Of several the best in size; the others go.

    Touched pages are several times cheaper than fresh ones.
    """
    found = sorted(_unlocked(folder), key=lambda each: abs(os.fstat(each[1]).st_size - file_bytes))
    for path, fd in found[1:]:
        _abandon(path, fd)
    for old, fd in found[:1]:
        path = _new_path(folder)
        try:
            old.rename(path)
        except OSError:
            os.close(fd)
            raise
        return path, fd
    return None


def _created(folder: Path) -> tuple[Path, int]:
    while True:
        path = _new_path(folder)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        if _locked(fd, path, fcntl.LOCK_EX):
            return path, fd
        os.close(fd)  # a sweep in between took it for abandoned


def _new_path(folder: Path) -> Path:
    return folder / f"{secrets.token_hex(8)}{_MAKING}"


def _unlocked(folder: Path) -> Iterator[tuple[Path, int]]:
    """(path, file) of every image, finished or not, on which no living process has a lock; we have one now."""
    for path in _paths(folder, _VISIBLE, _MAKING):
        with suppress(OSError):
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            if _locked(fd, path, fcntl.LOCK_EX):
                yield path, fd
            else:
                os.close(fd)


def _paths(folder: Path, *kinds: str) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.suffix in kinds)
    except OSError:  # somebody removed the folder: those who map an image still have it
        return []


def _locked(fd: int, path: Path, kind: int) -> bool:
    """Lock the open file `fd`, if nobody's lock is against it and it is still what lies at `path`."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
        return os.fstat(fd).st_ino == path.stat().st_ino
    except OSError:
        return False


def _abandon(path: Path, fd: int) -> None:
    with suppress(OSError):
        path.unlink(missing_ok=True)
    os.close(fd)
