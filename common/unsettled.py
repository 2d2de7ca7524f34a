"""Files that are visible before they are on the disk: what a power cut tears is found by its digests."""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path

from .crashpoint import crash_point
from .records import disk_errors, sync_path


class Unsettled:
    """Files that are visible while a power cut may still take or tear them. Safe to use from several threads."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._paths: set[Path] = set()

    def add(self, path: Path) -> None:
        """This one, until the next `settle`."""
        with self._guard:
            self._paths.add(path)

    def settle(self) -> None:
        """All of them are on the disk when this returns. Raises: StoreFull, StoreError: then they still count."""
        with self._guard:
            paths = set(self._paths)
        for path in [*sorted(paths), *sorted({path.parent for path in paths})]:
            with suppress(FileNotFoundError), disk_errors(path):  # removed meanwhile: nobody wants it any more
                sync_path(path)
        crash_point("store.settled")
        with self._guard:
            self._paths -= paths
