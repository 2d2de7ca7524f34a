"""Whether a folder changed since it was looked at last, without listing it."""

from __future__ import annotations

import time
from pathlib import Path

from .errors import StoreError

_SETTLED_NS = 2_000_000_000  # file systems stamp folders with a coarse clock: a younger stamp may hide a second change


class FolderStamp:
    """The time stamp of `folder` at the last look."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._seen_ns: int | None = None  # None: look again

    def changed(self) -> bool:
        """True if something may have changed; the caller looks at the folder then. Raises: StoreError."""
        try:
            changed_ns = self._folder.stat().st_mtime_ns
        except OSError as error:
            raise StoreError(f"the store can't be read: {error.strerror}", about=str(self._folder)) from error
        if changed_ns == self._seen_ns:
            return False
        self._seen_ns = changed_ns if time.time_ns() - changed_ns > _SETTLED_NS else None
        return True
