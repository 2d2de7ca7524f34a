"""One at a time of the workers that share a store: who comes later finds the work done."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from ..common.errors import StoreBusy, StreamGap
from ..common.store import Store

#: a worker that hangs while it stages for the others of its host is not waited for any longer
_TURN_S, _LOOK_S = 60.0, 0.2


@contextmanager
def turn(store: Store, name: str = "staging", *, stopping: Callable[[], bool]) -> Iterator[None]:
    """Only to save work: what two do at once is done right, too. `name` is of the work.

    Raises: StreamGap when the worker has to stop.
    """
    until = time.monotonic() + _TURN_S
    with ExitStack() as held:
        while time.monotonic() < until:
            if stopping():
                raise StreamGap("stopped")
            try:
                held.enter_context(store.shared_lock(name, wait_s=_LOOK_S, holder=name))
                break
            except StoreBusy:
                continue
        yield
