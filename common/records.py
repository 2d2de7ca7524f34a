"""Small files that are there whole or not at all, temp files that tell whether their writer lives, and locks.

A file becomes visible only by a rename. Where a power cut must not take it, its bytes reach the disk before and the
name after that; a file whose bytes anybody can check may be visible first (unsettled.py). Locks and the ownership
of temp files are `flock`s: the kernel drops them when a process dies, however it dies, and they hold across containers,
where process ids say nothing.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from .crashpoint import crash_point
from .digest import digest_of
from .errors import MalformedRecord, StoreBusy, StoreError, StoreFull
from .limits import LIMITS

if TYPE_CHECKING:
    from typing_extensions import Buffer

_DIGEST_BYTES = 32
_POLL_S = 0.01  # flock has no timeout of its own
_ORDER_WAIT_S = 60.0  # the lock is held for one rename
_HOLDER_BYTES = 200
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_ALLOWED = {errno.EROFS, errno.EACCES, errno.EPERM}


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns the system's errors while writing `path` into StoreFull (no room, or not allowed) or StoreError.

    Only around our own writes: an OSError of somebody else's reading must not look like a full disk.
    """
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        if error.errno in _NO_ROOM:
            raise StoreFull(
                f"the disk has no room for the store: {reason}",
                about=str(path),
                next=f"free some space (`df -h {path.parent}`), then run the command again",
            ) from error
        if error.errno in _NOT_ALLOWED:
            raise StoreFull(
                f"the store may not be written: {reason}",
                about=str(path),
                next="make the folder writable for this user, or choose another one",
            ) from error
        raise StoreError(f"the disk failed: {reason}", about=str(path), next="look at the system's log") from error


def sync_path(path: Path) -> None:
    """Makes a file's bytes survive a power cut, and of a folder the names in it. Raises: OSError."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class TempFile:
    """A new file in `folder`; it vanishes at the end of the block unless it was renamed.

    While it is open this process holds a lock on it, so that `sweep` tells it from what a dead process left.
    """

    def __init__(self, folder: Path):
        with disk_errors(folder):
            self.path, self._fd = _create_locked(folder)

    def __enter__(self) -> TempFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def write(self, data: Buffer, *, at: int) -> int:
        """Writes all of `data` at offset `at`, unbuffered; returns the offset behind it."""
        rest = memoryview(data)
        with disk_errors(self.path):
            while rest:
                written = os.pwrite(self._fd, rest, at)
                at, rest = at + written, rest[written:]
        return at

    def cut(self, size_bytes: int) -> None:
        """Gives up everything from offset `size_bytes` on."""
        with disk_errors(self.path):
            os.ftruncate(self._fd, size_bytes)

    def sync(self, kind: str) -> None:
        """Everything written so far is on the disk afterwards; `kind` names the crash points."""
        crash_point(f"store.{kind}-written")
        with disk_errors(self.path):
            os.fsync(self._fd)
        crash_point(f"store.{kind}-synced")

    def rename(self, target: Path, kind: str, *, sync: bool = True) -> None:
        """The file is visible as `target` afterwards, replacing what was there. `sync` comes first."""
        with disk_errors(target):
            os.rename(self.path, target)  # noqa: PTH104  beside fsync
            crash_point(f"store.{kind}-renamed")
            if sync:
                sync_path(target.parent)

    def rename_as_newest(self, folder: Path, kind: str, *, order_lock: Path, sync: bool = True) -> Path:
        """The file is visible in `folder` under a name that sorts behind all others of its kind; returns its path.

        A growing number orders files by age. The random part keeps a name from ever being used twice: somebody else may
        still know a removed file by it. Raises: StoreFull, StoreError, StoreBusy.
        """
        numbered = re.compile(rf"([0-9a-f]{{12}})-[0-9a-f]{{16}}\.{kind}")
        with locked(order_lock, wait_s=_ORDER_WAIT_S):
            numbers = [int(found[1], 16) for path in folder.iterdir() if (found := numbered.match(path.name))]
            target = folder / f"{max(numbers, default=0) + 1:012x}-{secrets.token_hex(8)}.{kind}"
            self.rename(target, kind, sync=sync)
        return target

    def close(self) -> None:
        """Closes the file, and removes it where it was not renamed."""
        if self._fd >= 0:
            with suppress(OSError):
                self.path.unlink()
            os.close(self._fd)
            self._fd = -1


def _create_locked(folder: Path) -> tuple[Path, int]:
    while True:
        path = folder / f"{os.getpid()}-{secrets.token_hex(8)}"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(fd).st_nlink:
                return path, fd
            os.close(fd)
        except BlockingIOError:  # a sweep between `open` and `flock` took it for abandoned
            os.close(fd)
        except BaseException:
            os.close(fd)
            raise


def sweep(folder: Path) -> int:
    """Removes the temp files whose writer is gone; returns their bytes."""
    freed_bytes = 0
    for path in sorted(folder.iterdir()):
        with suppress(OSError):  # renamed or removed meanwhile, locked by its living writer, or a read-only disk
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                size_bytes = os.fstat(fd).st_size
                path.unlink()
                freed_bytes += size_bytes
            finally:
                os.close(fd)
    return freed_bytes


def file_bytes(path: Path) -> int:
    """Its size; 0 where it was removed since its folder was listed."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def remove(path: Path) -> int:
    """Removes a file, if it is there; returns its bytes. Raises: StoreFull, StoreError."""
    with disk_errors(path):
        try:
            size_bytes = path.stat().st_size
            path.unlink()
        except FileNotFoundError:
            return 0
    return size_bytes


def write_file(path: Path, data: bytes, *, temp: Path, sync: bool = True) -> None:
    """Puts a record at `path`: its BLAKE3, then `data`. After a crash anywhere the old or the new one is there.

    `temp` is the folder for temp files, on the same file system. Without `sync` a power cut may leave neither, or a
    damaged one; a crash of the process changes nothing of what was promised. Raises: StoreFull, StoreError.
    """
    write_files({path: data}, temp=temp, sync=sync)


def write_files(files: Mapping[Path, bytes], *, temp: Path, sync: bool = True) -> None:
    """The same for several records of one folder, which become visible in this order."""
    with ExitStack() as opened:
        written = []
        for path, data in files.items():
            file = opened.enter_context(TempFile(temp))
            end = file.write(digest_of(data), at=0)
            crash_point("store.record-temp")
            file.write(data, at=end)
            written.append((path, file))
        if sync:
            for _, file in written:
                file.sync("record")
        for path, file in written:
            file.rename(path, "record", sync=sync and path == written[-1][0])


def read_file(path: Path) -> bytes | None:
    """The record at `path`, None where there is none. Raises: MalformedRecord naming a damaged file, StoreError."""
    try:
        with path.open("rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            data = file.read(size_bytes) if size_bytes <= _DIGEST_BYTES + LIMITS.index_bytes else b""
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(f"a record can't be read: {error.strerror}", about=str(path)) from error
    if len(data) < _DIGEST_BYTES or digest_of(memoryview(data)[_DIGEST_BYTES:]) != data[:_DIGEST_BYTES]:
        raise MalformedRecord(
            "a file of the store is damaged: its bytes do not match their checksum",
            about=str(path),
            next="see that the disk is healthy; move the file away to go on without what it holds",
        )
    return data[_DIGEST_BYTES:]


@contextmanager
def locked(path: Path, *, shared: bool = False, wait_s: float = 0.0, holder: str = "") -> Iterator[None]:
    """Holds the lock file `path` during the block, alone or together with other `shared` holders.

    Waits up to `wait_s`, then StoreBusy names who holds it: process id and `holder`, by default the program's name
    (never its arguments, which may carry passwords). Also excludes threads of this process, and is not reentrant.
    """
    with disk_errors(path):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        _acquire(fd, path, shared=shared, wait_s=wait_s)
        with suppress(OSError):  # it is only for the message, and retention must work on a full disk
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"pid {os.getpid()}, {holder or Path(sys.argv[0]).name or 'python'}".encode(), 0)
        try:
            yield
        finally:
            if not shared:  # other shared holders may be left, and the text may be theirs
                with suppress(OSError):
                    os.ftruncate(fd, 0)
            fcntl.flock(fd, fcntl.LOCK_UN)  # closing is not enough where a forked child holds the file open too
    finally:
        os.close(fd)


def _acquire(fd: int, path: Path, *, shared: bool, wait_s: float) -> None:
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                found = os.pread(fd, _HOLDER_BYTES, 0).decode(errors="replace")
                raise StoreBusy(
                    f"the store is in use by {found or 'another process'}",
                    about=str(path),
                    next="wait for it to finish, or stop it",
                ) from None
            time.sleep(_POLL_S)
        else:
            return
