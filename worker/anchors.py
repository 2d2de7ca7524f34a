"""Now and then the version that is served is written whole, so that a restart never has to go through many deltas."""

from __future__ import annotations

import threading
from collections.abc import Callable

from ..common.errors import RefleetError, StoreBusy
from ..common.store import Store
from ..common.types import Manifest


class Anchors:
    """Writes in a thread of its own, one version at a time, while versions go on arriving."""

    def __init__(self, store: Store, *, warn: Callable[[str], None]):
        self._store, self._warn = store, warn
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def served(self, manifest: Manifest) -> None:
        """`manifest` is served now: write it whole, if many deltas lead to it and no other one is being written."""
        if not self.busy:
            self._thread = threading.Thread(target=self._run, args=(manifest,), name="refleet-anchor", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Waits for what is being written."""
        if self._thread is not None:
            self._thread.join()

    def _run(self, manifest: Manifest) -> None:
        try:
            with self._store.shared_lock("anchor"), self._store.memory.pinned(manifest.digests):
                self._store.anchor(manifest)
        except StoreBusy:  # another worker that shares the store is at it
            return
        except RefleetError as error:  # the version is there as deltas all the same
            self._warn(f"could not write the version whole: {error.what}")
