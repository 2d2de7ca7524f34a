"""A disk in memory that knows what reached it: a power cut takes the rest, or a part of it.

What counts as on the disk: the bytes of a file that were fsynced; of a folder the names at its last fsync, and after it
a beginning of the changes made since. Bytes that were not synced may survive whole, in part, or as zeros. A killed
process loses nothing of what it wrote: that lies with the kernel, as do the locks, which go with the process.
"""

from __future__ import annotations

import errno
import os
import random
import weakref
from collections.abc import Callable
from itertools import count

DIR = object()  # what a folder's entry for another folder is


class Inode:
    """One file."""

    __slots__ = ("data", "dirty", "ino", "links", "locks", "maps", "mtime_ns", "synced")

    def __init__(self, ino: int, mtime_ns: int):
        self.ino, self.mtime_ns = ino, mtime_ns
        self.data, self.synced = bytearray(), b""
        self.dirty = False  # whether `data` differs from `synced`
        self.links = 1
        self.locks: dict[int, bool] = {}  # file descriptor -> whether it holds the lock alone
        self.maps: list[weakref.ref[bytearray]] = []

    def write(self, data: bytes, at: int) -> None:
        if at > len(self.data):
            self.data += bytes(at - len(self.data))
        self.data[at : at + len(data)] = data
        self.dirty = True

    def cut(self, size: int) -> None:
        # a new object: a mapping of the old one keeps its length, as the kernel's pages do
        self.data = bytearray(self.data[:size].ljust(size, b"\0"))
        self.dirty = True

    def sync(self) -> None:
        if self.dirty:
            self.synced, self.dirty = bytes(self.data), False

    def rot(self, at: int, bit: int) -> None:
        """One bit of the disk turned; the time stamp did not change."""
        for bytes_ in (self.data, *(found for made in self.maps if (found := made()) is not None)):
            if at < len(bytes_):
                bytes_[at] ^= 1 << bit
        self.synced = bytes(self.data) if not self.dirty else self.synced

    def lose(self, rng: random.Random) -> bool:
        """The power went. True when that took anything."""
        self.locks.clear()
        if not self.dirty:
            return False
        written, kind = bytes(self.data), rng.randrange(4)
        if kind == 1:  # the size got there, some of the bytes did not
            place = rng.randrange(len(written) + 1)
            written = written[:place] + bytes(len(written) - place)
        elif kind == 2:
            written = written[: rng.randrange(len(written) + 1)]
        elif kind == 3:
            written = self.synced
        self.data, self.synced, self.dirty = bytearray(written), written, False
        return kind != 0


class Folder:
    __slots__ = ("changes", "entries", "mtime_ns", "synced")

    def __init__(self, mtime_ns: int):
        self.entries: dict[str, Inode | object] = {}
        self.synced: dict[str, Inode | object] = {}
        self.changes: list[tuple[str, Inode | None]] = []
        self.mtime_ns = mtime_ns

    def set(self, name: str, node: Inode | None, mtime_ns: int) -> None:
        if node is None:
            del self.entries[name]
        else:
            self.entries[name] = node
        self.changes.append((name, node))
        self.mtime_ns = mtime_ns

    def sync(self) -> None:
        self.synced, self.changes = dict(self.entries), []

    def lose(self, rng: random.Random) -> bool:
        kept = rng.randrange(len(self.changes) + 1)
        lost = kept < len(self.changes)
        left = dict(self.synced)
        for name, node in self.changes[:kept]:
            if node is None:
                left.pop(name, None)
            else:
                left[name] = node
        left.update({name: node for name, node in self.entries.items() if node is DIR})
        self.entries = left
        self.sync()
        return lost


class Disk:
    """The files of one host. `wall_ns` tells its time of day."""

    def __init__(self, wall_ns: Callable[[], int]):
        self.folders: dict[str, Folder] = {}
        self.full = False  # no byte more
        self.slow = 0.0  # seconds that a sync may take
        self._wall_ns = wall_ns
        self._inodes = count(1)

    def now_ns(self) -> int:
        """The file system's own clock is coarse."""
        return self._wall_ns() // 4_000_000 * 4_000_000

    # ------------------------------------------------------------------ names

    def folder(self, path: str) -> Folder:
        found = self.folders.get(path)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return found

    def at(self, path: str) -> tuple[Folder, str]:
        parent, _, name = path.rpartition("/")
        return self.folder(parent or "/"), name

    def find(self, path: str) -> Inode:
        folder, name = self.at(path)
        node = folder.entries.get(name)
        if node is DIR:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        if not isinstance(node, Inode):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return node

    def make_folder(self, path: str) -> None:
        """With all above it. That there is one survives a power cut, here: only what is in it has to be synced."""
        if path in self.folders:
            return
        if path != "/":
            parent, _, name = path.rpartition("/")
            self.make_folder(parent or "/")
            above = self.folders[parent or "/"]
            above.entries[name] = above.synced[name] = DIR
            above.mtime_ns = self.now_ns()
        self.folders[path] = Folder(self.now_ns())

    def create(self, path: str) -> Inode:
        folder, name = self.at(path)
        self.room()
        inode = Inode(next(self._inodes), self.now_ns())
        folder.set(name, inode, self.now_ns())
        return inode

    def file(self, path: str) -> Inode:
        """The file at `path`, made if it is not there."""
        folder, name = self.at(path)
        return self.find(path) if name in folder.entries else self.create(path)

    def nameless(self) -> Inode:
        """A file that no folder knows."""
        inode = Inode(next(self._inodes), self.now_ns())
        inode.links = 0
        return inode

    def unlink(self, path: str) -> None:
        folder, name = self.at(path)
        self.find(path).links -= 1
        folder.set(name, None, self.now_ns())

    def rename(self, source: str, target: str) -> None:
        node = self.find(source)
        there, name = self.at(target)
        replaced = there.entries.get(name)
        if isinstance(replaced, Inode) and replaced is not node:
            replaced.links -= 1
        here, old = self.at(source)
        here.set(old, None, self.now_ns())
        there.set(name, node, self.now_ns())

    def room(self) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def durable(self, path: str) -> bytes | None:
        """What a power cut at this moment would surely leave of a file; None: not all of it."""
        folder, name = self.at(path)
        node = folder.synced.get(name)
        return bytes(node.data) if isinstance(node, Inode) and not node.dirty else None

    # ------------------------------------------------------------------ what the world does to it

    def cut_power(self, rng: random.Random) -> int:
        """What was not synced is lost, or torn; returns how many folders and files that changed."""
        lost = 0
        for folder in self.folders.values():
            lost += folder.lose(rng)
        for _, inode in self.files():
            lost += inode.lose(rng)
            inode.links = 1
        return lost

    def files(self, under: str = "/", suffix: str = "") -> list[tuple[str, Inode]]:
        """(path, file) of everything below `under` whose name ends with `suffix`, in the order of the paths."""
        return [
            (f"{path.rstrip('/')}/{name}", node)
            for path, folder in sorted(self.folders.items())
            if path.startswith(under)
            for name, node in sorted(folder.entries.items())
            if isinstance(node, Inode) and name.endswith(suffix)
        ]
