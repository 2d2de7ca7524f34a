"""`pathlib`, `mmap` and `tempfile` of a simulated process, on the disk of its host."""

from __future__ import annotations

import errno
import io
import mmap as real_mmap
import os as real_os
import weakref
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import PurePosixPath
from types import SimpleNamespace
from typing import Any

from .disk import Inode
from .kernel import kernel
from .system import OpenFile, disk_of, facts_of, file_of, opened, os_close, os_rename, touch


class File(io.RawIOBase):
    """An open file, read from its start, or written at its end."""

    def __init__(self, made: OpenFile):
        super().__init__()
        self._made, self._at = made, 0

    def fileno(self) -> int:
        return self._made.fd

    def read(self, size: int = -1) -> bytes:
        data = self._made.inode.data
        found = bytes(data[self._at :] if size < 0 else data[self._at : self._at + size])
        self._at += len(found)
        return found

    def close(self) -> None:
        if not self.closed:
            super().close()
            run = kernel()
            if run.current is not None and run.current.process.alive and self._made.fd in run.current.process.files:
                os_close(self._made.fd)


class Path(PurePosixPath):
    """A path on the disk of whoever uses it."""

    __slots__ = ()

    def open(self, mode: str = "r", buffering: int = -1) -> File:
        assert mode == "rb", mode
        touch("open", self)
        return File(opened(disk_of(self).find(str(self)), str(self)))

    def stat(self) -> Any:
        disk, name = disk_of(self), str(self)
        if name in disk.folders:
            return facts_of(disk.folders[name])
        return facts_of(disk.find(name))

    def exists(self) -> bool:
        try:
            self.stat()
        except FileNotFoundError:
            return False
        return True

    def is_dir(self) -> bool:
        return str(self) in disk_of(self).folders

    def is_symlink(self) -> bool:
        return False

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        disk = disk_of(self)
        if not self.is_dir():
            touch("mkdir", self)
            disk.room()
        elif not exist_ok:
            raise FileExistsError(errno.EEXIST, real_os.strerror(errno.EEXIST), str(self))
        disk.make_folder(str(self))

    def iterdir(self) -> Iterator[Path]:
        entries = list(disk_of(self).folder(str(self)).entries)
        if kernel().rng.random() < 0.5:
            entries.reverse()  # a file system promises no order
        for name in entries:
            yield self / name

    def glob(self, pattern: str) -> Iterator[Path]:
        return (path for path in self.iterdir() if fnmatch(path.name, pattern))

    def unlink(self, missing_ok: bool = False) -> None:
        touch("unlink", self)
        kernel().note(f"unlink {self}")
        try:
            disk_of(self).unlink(str(self))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def rename(self, target: object) -> None:
        os_rename(self, target)

    def resolve(self, strict: bool = False) -> Path:
        if strict:
            self.stat()
        return self

    def absolute(self) -> Path:
        return self


class Mapping(bytearray):
    """A private mapping: a copy, which bit rot gets at as well (`Inode.rot`)."""

    inode: Inode

    def size(self) -> int:
        return len(self.inode.data)


def map_file(fd: int, length: int, access: int) -> Mapping:
    assert access == real_mmap.ACCESS_COPY
    touch("map", file_of(fd).path)
    inode = file_of(fd).inode
    made = Mapping(inode.data[:length])
    made.inode = inode
    inode.maps.append(weakref.ref(made))
    return made


mmap = SimpleNamespace(mmap=map_file, ACCESS_COPY=real_mmap.ACCESS_COPY)


def nameless_file(dir: Path, buffering: int) -> File:  # noqa: A002
    touch("make a file in", dir)
    disk_of(dir).room()
    return File(opened(disk_of(dir).nameless(), f"{dir}/nameless"))


tempfile = SimpleNamespace(TemporaryFile=nameless_file)
