"""What a served version leaves to do in the store, behind the worker's back.

settle: it survives a power cut -> collect: older versions go -> anchor: now and then it is written whole, so that a
restart never has to go through many deltas
"""

from __future__ import annotations

from collections.abc import Callable

from ..common.errors import RefleetError, StoreBusy
from ..common.store import Store
from ..common.types import Manifest

#: a version that is being staged keeps `collect` out for so long
_COLLECT_WAIT_S = 10.0


def upkeep(manifest: Manifest, store: Store, *, warn: Callable[[str], None], done: Callable[[], None]) -> None:
    """`manifest` is served now; versions that the store was not told to keep go.

    `warn` hears what failed; `done` is called at the end.
    """
    for what, work in (("remove old versions", _collect), ("write the version whole", _anchor)):
        try:
            work(manifest, store)
        except StoreBusy:  # versions are being staged, or another worker that shares the store is at it: next time
            continue
        except RefleetError as error:  # the version is served, and there as deltas, all the same
            warn(f"could not {what}: {error.what}")
    done()


def _collect(_manifest: Manifest, store: Store) -> None:
    store.collect((), wait_s=_COLLECT_WAIT_S)


def _anchor(manifest: Manifest, store: Store) -> None:
    with store.shared_lock("anchor"):
        written = store.anchor(manifest)
    if written:  # what it was rebuilt from may go
        _collect(manifest, store)
