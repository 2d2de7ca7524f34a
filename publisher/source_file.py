"""One file of a checkpoint: who it was when it was opened, bounded reads, and whether it is still the same.

Files are read with preadv into the caller's buffer and never mapped: a trainer that truncates and rewrites its
checkpoint in place would kill a process that maps it with SIGBUS, where a read merely comes back short. No file stays
open between reads, so a checkpoint of thousands of shards needs one descriptor.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..common.errors import CheckpointChanged, UnreadableCheckpoint

WAIT = "wait until the trainer has finished writing, then publish again"
# File times advance with the kernel's tick, at most 10 ms apart: a second write within the same tick would leave no
# trace in them. So a file is only trusted once it has been left alone for two ticks.
SETTLE_S = 0.02
SETTLE_TRIES = 50


@dataclass(frozen=True, slots=True)
class Identity:
    """What changes when a file is rewritten, replaced, truncated or touched."""

    device: int
    inode: int
    size_bytes: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, facts: os.stat_result) -> Identity:
        return cls(facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)

    def difference(self, now: Identity) -> str | None:
        """What happened to the file since `self` was taken, or None."""
        if (now.device, now.inode) != (self.device, self.inode):
            return "was replaced by another file"
        if now.size_bytes != self.size_bytes:
            return f"changed its size from {self.size_bytes} to {now.size_bytes} bytes"
        if now != self:
            return "was written or touched"
        return None


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A regular file as it was when `at` looked at it."""

    path: Path
    identity: Identity

    @classmethod
    def at(cls, path: Path, *, now_s: Callable[[], float] = time.time) -> SourceFile:
        """Look at `path`, waiting for up to a second while somebody is writing it.

        Raises: UnreadableCheckpoint if it is not a readable regular file, CheckpointChanged if it is not left alone.
        """
        for _ in range(SETTLE_TRIES):
            descriptor = _open(path)
            try:
                facts = os.fstat(descriptor)
            finally:
                os.close(descriptor)
            if not stat.S_ISREG(facts.st_mode):
                raise UnreadableCheckpoint("the checkpoint is not a regular file", about=str(path))
            if abs(now_s() - facts.st_ctime) >= SETTLE_S:
                return cls(path, Identity.of(facts))
            time.sleep(SETTLE_S)
        raise CheckpointChanged("the checkpoint is being written at this moment", about=str(path), next=WAIT)

    @property
    def size_bytes(self) -> int:
        return self.identity.size_bytes

    @contextmanager
    def reading(self) -> Iterator[int]:
        """A descriptor of this very file. Raises CheckpointChanged if the path leads to another state of it by now."""
        try:
            descriptor = _open(self.path)
        except UnreadableCheckpoint as error:
            raise self._changed(f"can't be opened any more ({error.what})") from None
        try:
            self._compare(os.fstat(descriptor))
            yield descriptor
        finally:
            os.close(descriptor)

    def read_into(self, descriptor: int, view: memoryview, offset: int) -> None:
        """Fill `view` with the bytes at `offset`. Raises CheckpointChanged if the file ends before."""
        done = 0
        while done < len(view):
            try:
                got = os.preadv(descriptor, [view[done:]], offset + done)
            except OSError as error:
                raise UnreadableCheckpoint(
                    f"reading the checkpoint failed: {error.strerror}", about=str(self.path), next="check the disk"
                ) from error
            if got == 0:
                raise self._changed(f"ends at byte {offset + done}, though it had {self.size_bytes} bytes when opened")
            done += got

    def expect_soon(self, descriptor: int, offset: int, size_bytes: int) -> None:
        """Ask the kernel to fetch these bytes while the caller works on others. A hint: file systems may ignore it."""
        with suppress(OSError):
            os.posix_fadvise(descriptor, offset, size_bytes, os.POSIX_FADV_WILLNEED)

    def read_start(self, size_bytes: int) -> bytes:
        """The first `size_bytes` of the file, or all of it where it is shorter."""
        data = bytearray(min(size_bytes, self.size_bytes))
        with self.reading() as descriptor:
            self.read_into(descriptor, memoryview(data), 0)
        return bytes(data)

    def confirm(self) -> None:
        """Raises CheckpointChanged unless the path still leads to the same, untouched file."""
        try:
            facts = self.path.stat()
        except OSError as error:
            raise self._changed(f"is gone ({error.strerror})") from None
        self._compare(facts)

    def _compare(self, facts: os.stat_result) -> None:
        difference = self.identity.difference(Identity.of(facts))
        if difference is not None:
            raise self._changed(difference)

    def _changed(self, what: str) -> CheckpointChanged:
        return CheckpointChanged(f"the file {what} while it was being published", about=str(self.path), next=WAIT)


def _open(path: Path) -> int:
    try:
        # O_NONBLOCK: a named pipe must not hold us up before we see what it is. It means nothing for regular files.
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise UnreadableCheckpoint("the checkpoint file does not exist", about=str(path), next=WAIT) from None
    except PermissionError:
        raise UnreadableCheckpoint(
            f"user {os.geteuid()} may not read the checkpoint file", about=str(path), next=f"chmod a+r {path}"
        ) from None
    except OSError as error:
        raise UnreadableCheckpoint(f"the checkpoint file can't be opened: {error.strerror}", about=str(path)) from error
