"""`os`, `pathlib`, `fcntl`, `mmap`, `tempfile`, `time`, `random` and the like of a simulated process.

Only what the production code uses is there: another name is an AttributeError, so that nothing reaches the real disk
unnoticed. Every call may give way, and may be where its process ends.
"""

from __future__ import annotations

import errno
import fcntl as real_fcntl
import io
import mmap as real_mmap
import os as real_os
import stat as real_stat
import weakref
from collections.abc import Iterator
from fnmatch import fnmatch
from itertools import count
from pathlib import PurePosixPath
from types import SimpleNamespace
from typing import Any

from .disk import Disk, Folder, Inode
from .kernel import WALL_S, Killed, Process, _active, kernel

_BLOCK = 4096


def process() -> Process:
    """Whose call this is."""
    task = _active[-1].current
    if task is None or not task.process.alive:
        raise Killed
    return task.process


def touch(kind: str, path: object = "") -> Process:
    """Before a call of the disk or the server: others may run first, and the process may end here."""
    mine = process()
    if mine.io_left >= 0:
        mine.io_left -= 1
        if mine.io_left < 0:
            mine.host.counts["kill.at-io"] += 1
            mine.kernel.kill(mine, f"in the middle, before {kind} {path}")
    mine.kernel.maybe()
    return mine


def disk_of(path: object) -> Disk:
    found: Disk = process().host.disk
    return found


# ---------------------------------------------------------------------- os


class OpenFile:
    __slots__ = ("fd", "inode", "path")

    def __init__(self, fd: int, inode: Inode, path: str):
        self.fd, self.inode, self.path = fd, inode, path


_fds = count(100)


def _opened(inode: Inode, path: str) -> OpenFile:
    mine = process()
    made = OpenFile(next(_fds), inode, path)
    mine.files[made.fd] = made
    if len(mine.files) == 1:
        mine.on_death.append(lambda: [inode.inode.locks.pop(fd, None) for fd, inode in mine.files.items()])
    return made


def _file(fd: int) -> OpenFile:
    found: OpenFile | None = process().files.get(fd)
    if found is None:
        raise OSError(errno.EBADF, real_os.strerror(errno.EBADF))
    return found


def os_open(path: object, flags: int, mode: int = 0o777) -> int:
    touch("open", path)
    disk, name = disk_of(path), str(path)
    if name in disk.folders:
        return _opened(disk.nameless(), name).fd
    try:
        inode = disk.find(name)
        if flags & real_os.O_EXCL and flags & real_os.O_CREAT:
            raise FileExistsError(errno.EEXIST, real_os.strerror(errno.EEXIST), name)
    except FileNotFoundError:
        if not flags & real_os.O_CREAT:
            raise
        inode = disk.create(name)
    return _opened(inode, name).fd


def os_close(fd: int) -> None:
    found = _file(fd)
    del process().files[fd]
    found.inode.locks.pop(fd, None)


def os_pwrite(fd: int, data: Any, at: int) -> int:
    found = _file(fd)
    touch("write", found.path)
    process().host.disk.room()
    body = bytes(data)
    if len(body) > 1 and kernel().rng.random() < 0.02:
        body = body[: len(body) // 2]  # it may write less than it was asked to
    found.inode.write(body, at)
    found.inode.mtime_ns = process().host.disk.now_ns()
    return len(body)


def os_pread(fd: int, size: int, at: int) -> bytes:
    return bytes(_file(fd).inode.data[at : at + size])


def os_preadv(fd: int, views: list[memoryview], at: int) -> int:
    (view,) = views
    touch("read", _file(fd).path)
    if kernel().rng.random() < 0.3:
        kernel().sleep(kernel().rng.uniform(0.0, 0.006))
    data = _file(fd).inode.data[at : at + len(view)]
    view[: len(data)] = data
    return len(data)


def os_fsync(fd: int) -> None:
    found = _file(fd)
    mine = touch("sync", found.path)
    if mine.host.disk.slow:
        kernel().sleep(kernel().rng.random() * mine.host.disk.slow)
    if found.path in mine.host.disk.folders:
        mine.host.disk.folders[found.path].sync()
    else:
        found.inode.sync()
    touch("after the sync of", found.path)


def os_ftruncate(fd: int, size: int) -> None:
    _file(fd).inode.cut(size)


def os_rename(source: object, target: object) -> None:
    touch("rename", target)
    kernel().note(f"rename to {target}")
    disk_of(source).rename(str(source), str(target))
    touch("after the rename to", target)


def os_utime(path: object) -> None:
    inode = disk_of(path).find(str(path))
    inode.mtime_ns = disk_of(path).now_ns()


def os_kill(pid: int, signal: int) -> None:
    assert signal == 0
    if not any(each.pid == pid and each.host is process().host for each in kernel().processes):
        raise ProcessLookupError(errno.ESRCH, real_os.strerror(errno.ESRCH))


def _facts(node: Inode | Folder) -> Any:
    size, ino, links = (len(node.data), node.ino, node.links) if isinstance(node, Inode) else (0, 1, 1)
    kind = real_stat.S_IFREG if isinstance(node, Inode) else real_stat.S_IFDIR
    return SimpleNamespace(
        st_size=size, st_ino=ino, st_nlink=links, st_dev=1, st_mode=kind | 0o644, st_mtime_ns=node.mtime_ns,
        st_ctime_ns=node.mtime_ns, st_mtime=node.mtime_ns / 1e9, st_ctime=node.mtime_ns / 1e9,
    )  # fmt: skip


os = SimpleNamespace(
    open=os_open, close=os_close, pwrite=os_pwrite, pread=os_pread, preadv=os_preadv, fsync=os_fsync, kill=os_kill,
    ftruncate=os_ftruncate, rename=os_rename, utime=os_utime, fstat=lambda fd: _facts(_file(fd).inode),
    fstatvfs=lambda fd: SimpleNamespace(f_bavail=1 << 30, f_frsize=_BLOCK), getpid=lambda: process().pid,
    posix_fadvise=lambda *_: None, sched_getaffinity=lambda _: {0}, fsencode=real_os.fsencode,
    fsdecode=real_os.fsdecode, strerror=real_os.strerror, PathLike=real_os.PathLike, geteuid=lambda: 0,
    **{name: getattr(real_os, name) for name in dir(real_os) if name.startswith(("O_", "POSIX_FADV_"))},
)  # fmt: skip


def flock(fd: int, kind: int) -> None:
    found, alone = _file(fd), bool(kind & real_fcntl.LOCK_EX)
    locks = found.inode.locks
    if kind & real_fcntl.LOCK_UN:
        locks.pop(fd, None)
        return
    kernel().maybe(0.1)
    if any(other != fd and (alone or held) for other, held in locks.items()):
        assert kind & real_fcntl.LOCK_NB, "nobody waits in the kernel for a lock"
        raise BlockingIOError(errno.EWOULDBLOCK, real_os.strerror(errno.EWOULDBLOCK))
    locks[fd] = alone


fcntl = SimpleNamespace(
    flock=flock, LOCK_EX=real_fcntl.LOCK_EX, LOCK_SH=real_fcntl.LOCK_SH, LOCK_NB=real_fcntl.LOCK_NB,
    LOCK_UN=real_fcntl.LOCK_UN,
)  # fmt: skip

# ---------------------------------------------------------------------- paths and files


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
        return File(_opened(disk_of(self).find(str(self)), str(self)))

    def stat(self) -> Any:
        disk, name = disk_of(self), str(self)
        if name in disk.folders:
            return _facts(disk.folders[name])
        return _facts(disk.find(name))

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
    touch("map", _file(fd).path)
    inode = _file(fd).inode
    made = Mapping(inode.data[:length])
    made.inode = inode
    inode.maps.append(weakref.ref(made))
    return made


mmap = SimpleNamespace(mmap=map_file, ACCESS_COPY=real_mmap.ACCESS_COPY)


def nameless_file(dir: Path, buffering: int) -> File:  # noqa: A002
    touch("make a file in", dir)
    disk_of(dir).room()
    return File(_opened(disk_of(dir).nameless(), f"{dir}/nameless"))


tempfile = SimpleNamespace(TemporaryFile=nameless_file)

# ---------------------------------------------------------------------- clocks and chance


def wall_s() -> float:
    return kernel().now + WALL_S + float(process().host.clock_off_s)


def monotonic() -> float:
    return kernel().now


def sleep(seconds: float) -> None:
    kernel().sleep(seconds)


time = SimpleNamespace(
    time=wall_s, time_ns=lambda: int(wall_s() * 1e9), monotonic=monotonic, perf_counter=monotonic, sleep=sleep
)
random = SimpleNamespace(uniform=lambda low, high: kernel().rng.uniform(low, high))


def token_hex(size: int) -> str:
    return kernel().ids.randbytes(size).hex()


secrets = SimpleNamespace(token_hex=token_hex)
uuid = SimpleNamespace(uuid4=lambda: SimpleNamespace(hex=token_hex(16)))
socket = SimpleNamespace(gethostname=lambda: process().host.name)


def crash_point(point: str) -> None:
    """In the place of `common.crashpoint`: the process ends here if the world said so."""
    mine = process()
    mine.kernel.passed[point] += 1
    left = mine.points.get(point)
    if left is not None:
        if left <= 0:
            mine.host.counts["kill.at-point"] += 1
            kernel().kill(mine, f"at {point}")
        mine.points[point] = left - 1
    kernel().maybe()

