"""The folder of a store: its identity, and what each of several workers on one host wants to be kept in it."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from .errors import MalformedRecord, UsageError
from .records import disk_errors, locked, read_file, remove, sweep, write_file

_ID = re.compile(rb"refleet store 1 ([0-9a-f]{32})\n")
_SETUP_WAIT_S = 60.0
_KEEPERS = "keepers"
_FINGERPRINT_BYTES = 32
#: what a worker wanted is kept for so long after it ended: it may come back
GONE_AFTER_S = 7 * 86400.0


def opened(root: Path, *folders: Path) -> str:
    """The store's id, 32 hex digits, made once, stable for ever; `folders` are there afterwards.

    Raises: MalformedRecord for a damaged id or another program's, StoreFull, StoreError, StoreBusy.
    """
    temp, locks = root / "temp", root / "locks"
    with disk_errors(root):
        for folder in (*folders, temp, locks):
            folder.mkdir(parents=True, exist_ok=True)
    path = root / "id"
    if not path.exists():
        with locked(locks / "id", wait_s=_SETUP_WAIT_S):
            if not path.exists():  # another process may have been faster
                write_file(path, f"refleet store 1 {secrets.token_hex(16)}\n".encode(), temp=temp)
    found = _ID.fullmatch(read_file(path) or b"")
    if not found:
        raise MalformedRecord(
            "a store of another format than this refleet's",
            about=str(path),
            next="use the refleet that made it, or another folder",
        )
    sweep(temp)
    return found[1].decode()


def refuse_shared(root: Path) -> None:
    """Whoever takes the folder that workers share for its own would remove what they keep. Raises: UsageError."""
    if (root / _KEEPERS).exists():
        raise UsageError(f"workers share the folder {root}: it is no store of its own", next="name another folder")


class Keepers:
    """Which versions each user of a shared store wants: one file per user, with a lock that says whether it lives."""

    def __init__(self, content: Path, owner: str):
        self._folder, self._temp, self._locks = content / _KEEPERS, content / "temp", content / "locks"
        self._own = self._folder / owner
        with disk_errors(self._folder):
            self._folder.mkdir(exist_ok=True)
            self._fd = os.open(self._lock(self._own), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            fcntl.flock(self._fd, fcntl.LOCK_SH)

    def keep(self, fingerprints: Collection[bytes]) -> None:
        """From now on these, and no others, are wanted here. Not synced: a power cut ends all users."""
        write_file(self._own, b"".join(fingerprints), temp=self._temp, sync=False)

    def wanted(self) -> set[bytes]:
        """What anybody wants. Raises: MalformedRecord naming a damaged file: nothing may be removed then."""
        found: set[bytes] = set()
        for path in self._folder.iterdir():
            if self._gone(path):
                remove(path)
                continue
            data = read_file(path) or b""
            found.update(data[n : n + _FINGERPRINT_BYTES] for n in range(0, len(data), _FINGERPRINT_BYTES))
        return found

    def close(self) -> None:
        with suppress(OSError):
            os.utime(self._own)  # its time begins now
        os.close(self._fd)

    def _gone(self, path: Path) -> bool:
        try:
            if time.time() - path.stat().st_mtime < GONE_AFTER_S:
                return False
            fd = os.open(self._lock(path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:  # another process removed it
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # it lives, and had nothing new to keep for days
            return False
        finally:
            os.close(fd)
        return True

    def _lock(self, path: Path) -> Path:
        return self._locks / f"keeper-{path.name}"
