"""`os`, `pathlib`, `fcntl`, `mmap`, `tempfile`, `time`, `random` and the like of a simulated process.

Only what the production code uses is there: another name is an AttributeError, so that nothing reaches the real disk
unnoticed. Every call may give way, and may be where its process ends.
"""

from __future__ import annotations

import errno
import fcntl as real_fcntl
import os as real_os
import stat as real_stat
from itertools import count
from types import SimpleNamespace
from typing import Any

from .disk import Disk, Folder, Inode
from .kernel import Killed, Process, _active, kernel

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


def opened(inode: Inode, path: str) -> OpenFile:
    mine = process()
    made = OpenFile(next(_fds), inode, path)
    mine.files[made.fd] = made
    if len(mine.files) == 1:
        mine.on_death.append(lambda: [inode.inode.locks.pop(fd, None) for fd, inode in mine.files.items()])
    return made


def file_of(fd: int) -> OpenFile:
    found: OpenFile | None = process().files.get(fd)
    if found is None:
        raise OSError(errno.EBADF, real_os.strerror(errno.EBADF))
    return found


def os_open(path: object, flags: int, mode: int = 0o777) -> int:
    touch("open", path)
    disk, name = disk_of(path), str(path)
    if name in disk.folders:
        return opened(disk.nameless(), name).fd
    try:
        inode = disk.find(name)
        if flags & real_os.O_EXCL and flags & real_os.O_CREAT:
            raise FileExistsError(errno.EEXIST, real_os.strerror(errno.EEXIST), name)
    except FileNotFoundError:
        if not flags & real_os.O_CREAT:
            raise
        inode = disk.create(name)
    return opened(inode, name).fd


def os_close(fd: int) -> None:
    found = file_of(fd)
    del process().files[fd]
    found.inode.locks.pop(fd, None)


def os_pwrite(fd: int, data: Any, at: int) -> int:
    found = file_of(fd)
    touch("write", found.path)
    process().host.disk.room()
    body = bytes(data)
    if len(body) > 1 and kernel().rng.random() < 0.02:
        body = body[: len(body) // 2]  # it may write less than it was asked to
    found.inode.write(body, at)
    found.inode.mtime_ns = process().host.disk.now_ns()
    return len(body)


def os_pread(fd: int, size: int, at: int) -> bytes:
    return bytes(file_of(fd).inode.data[at : at + size])


def os_preadv(fd: int, views: list[memoryview], at: int) -> int:
    (view,) = views
    path = file_of(fd).path
    touch("read", path)
    if path.startswith("/ckpt") or kernel().rng.random() < 0.2:  # a checkpoint is large: its trainer goes on meanwhile
        kernel().sleep(kernel().rng.uniform(0.0, 0.01))
    data = file_of(fd).inode.data[at : at + len(view)]
    view[: len(data)] = data
    return len(data)


def os_fsync(fd: int) -> None:
    found = file_of(fd)
    mine = touch("sync", found.path)
    if mine.host.disk.slow:
        kernel().sleep(kernel().rng.random() * mine.host.disk.slow)
    if found.path in mine.host.disk.folders:
        mine.host.disk.folders[found.path].sync()
    else:
        found.inode.sync()
    touch("after the sync of", found.path)


def os_ftruncate(fd: int, size: int) -> None:
    file_of(fd).inode.cut(size)


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


def facts_of(node: Inode | Folder) -> Any:
    size, ino, links = (len(node.data), node.ino, node.links) if isinstance(node, Inode) else (0, 1, 1)
    kind = real_stat.S_IFREG if isinstance(node, Inode) else real_stat.S_IFDIR
    return SimpleNamespace(
        st_size=size, st_ino=ino, st_nlink=links, st_dev=1, st_mode=kind | 0o644, st_mtime_ns=node.mtime_ns,
        st_ctime_ns=node.mtime_ns, st_mtime=node.mtime_ns / 1e9, st_ctime=node.mtime_ns / 1e9,
    )  # fmt: skip


os = SimpleNamespace(
    open=os_open, close=os_close, pwrite=os_pwrite, pread=os_pread, preadv=os_preadv, fsync=os_fsync, kill=os_kill,
    ftruncate=os_ftruncate, rename=os_rename, utime=os_utime, fstat=lambda fd: facts_of(file_of(fd).inode),
    fstatvfs=lambda fd: SimpleNamespace(f_bavail=1 << 30, f_frsize=_BLOCK), getpid=lambda: process().pid,
    posix_fadvise=lambda *_: None, sched_getaffinity=lambda _: {0}, fsencode=real_os.fsencode,
    fsdecode=real_os.fsdecode, strerror=real_os.strerror, PathLike=real_os.PathLike, geteuid=lambda: 0,
    **{name: getattr(real_os, name) for name in dir(real_os) if name.startswith(("O_", "POSIX_FADV_"))},
)  # fmt: skip


def flock(fd: int, kind: int) -> None:
    found, alone = file_of(fd), bool(kind & real_fcntl.LOCK_EX)
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
