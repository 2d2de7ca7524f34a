"""One at a time of the workers that share a store: who comes later finds the work done."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial

from ..common.errors import StoreBusy, StreamGap
from ..common.store import Store

#: a worker that works for the others of its host and gives no sign of life is not waited for any longer
SILENCE_S = 60.0
_LOOK_S = 0.2


@contextmanager
def turn(store: Store, name: str, *, stopping: Callable[[], bool]) -> Iterator[Callable[[], None]]:
    """Only to save work: what two do at once is done right, too. `name` is of the work.

    Gives what is to be called while the work goes on. Raises: StreamGap when the worker has to stop.
    """
    sign, since_s = _last_sign(store, name), time.monotonic()
    with ExitStack() as held:
        while time.monotonic() - since_s < SILENCE_S:
            if stopping():
                raise StreamGap("stopped")
            try:
                held.enter_context(store.shared_lock(name, wait_s=_LOOK_S, holder=name))
            except StoreBusy:
                if (newer := _last_sign(store, name)) != sign:
                    sign, since_s = newer, time.monotonic()
            else:
                yield partial(working, store, name)
                return
        yield lambda: None  # without the lock: the others count the silence of who has it


def working(store: Store, name: str) -> None:
    """A sign of life of who holds the lock `name`."""
    with suppress(OSError):
        os.utime(store.content / "locks" / name)


def _last_sign(store: Store, name: str) -> int:
    try:
        return (store.content / "locks" / name).stat().st_mtime_ns
    except OSError:
        return 0
