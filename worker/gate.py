"""The gate between requests and the engine: no request is answered from a mixture of two versions.

Many requests hold the gate at once (`serving`); a switch holds it alone (`switching`): it closes the gate to new
requests, waits for those in flight, and opens it again with whatever version it decided on.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..common.errors import NotServing, RefitFailed, UsageError
from ..common.messages import Serving

NOTHING_YET = "no verified version is served yet"


class Switch:
    """One exclusive hold of the gate. `pause_s`: from closed to open again, waiting included; 0.0 until it is over."""

    def __init__(self, gate: Gate) -> None:
        self.pause_s = 0.0
        self._gate = gate
        self._thread = threading.get_ident()
        self._exclusive = False  # False while requests are still in flight

    def to(self, serving: Serving | None, *, reason: str = NOTHING_YET) -> None:
        """Decide what is served afterwards, `None` being nothing, for `reason`. The last decision counts."""
        self._gate._decide(self, serving, reason)


class Gate:
    """Closed with `NOTHING_YET` when made. Safe to use from any number of threads; `clock` returns seconds."""

    def __init__(self, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._changed = threading.Condition()
        self._serving: Serving | None = None
        self._reason = NOTHING_YET
        self._switch: Switch | None = None
        # Requests in flight, by the thread that entered. A request may leave in another thread (async frameworks do
        # that), so the entry is counted down by the ident it was counted under, never by who leaves.
        self._in_flight: dict[int, int] = {}

    @property
    def current(self) -> Serving | None:
        """What answers requests; during a switch what answered until then."""
        return self._serving

    @property
    def reason(self) -> str | None:
        """Why nothing is served, or None while a version is."""
        return self._reason if self._serving is None else None

    @contextmanager
    def serving(self, timeout_s: float | None = None) -> Iterator[Serving]:
        """Hold the served version for the length of one request.

        Waits while a switch is on or waiting, unless this thread is inside a request already: a nested request that
        waited for a switch that waits for the outer one would wait for ever.

        Raises: NotServing with the reason when nothing is served, or when a switch took longer than `timeout_s`.
        """
        thread = threading.get_ident()
        serving = self._enter(thread, timeout_s)
        try:
            yield serving
        finally:
            self._leave(thread)

    @contextmanager
    def switching(self, *, timeout_s: float | None = None) -> Iterator[Switch]:
        """Hold the gate alone. Without `switch.to` (or `close`) the old version is served again, also after an error.

        Raises: RefitFailed when requests in flight do not end within `timeout_s`; UsageError when called inside a
        request or another switch of the same thread.
        """
        switch = Switch(self)
        started = self._claim(switch, timeout_s)
        try:
            yield switch
        finally:
            self._open(switch, started)

    def close(self, reason: str) -> None:
        """Stop serving at once: every request from now on raises NotServing with `reason`. Does not wait.

        Inside a switch it is the switch's decision, so the switch's end does not bring the old version back.
        """
        with self._changed:
            self._serving, self._reason = None, reason

    def _enter(self, thread: int, timeout_s: float | None) -> Serving:
        with self._changed:
            switch = self._switch
            if switch is not None and switch._exclusive and switch._thread == thread:
                raise NotServing("this thread is switching versions: it can't hold a request at the same time")
            if thread not in self._in_flight and not self._changed.wait_for(lambda: self._switch is None, timeout_s):
                raise NotServing(
                    f"versions are being switched, for longer than the {timeout_s} s that the request could wait",
                    serving="" if self._serving is None else self._serving.version,
                    next="repeat the request",
                )
            if self._serving is None:
                raise NotServing(self._reason, serving="nothing", next="refleet status shows what the worker waits for")
            self._in_flight[thread] = self._in_flight.get(thread, 0) + 1
            return self._serving

    def _leave(self, thread: int) -> None:
        with self._changed:
            self._in_flight[thread] -= 1
            if not self._in_flight[thread]:
                del self._in_flight[thread]
                if not self._in_flight and self._switch is not None:
                    self._changed.notify_all()

    def _claim(self, switch: Switch, timeout_s: float | None) -> float:
        with self._changed:
            if switch._thread in self._in_flight:
                raise UsageError("a switch inside a request would wait for itself")
            if self._switch is not None and self._switch._thread == switch._thread:
                raise UsageError("a switch inside a switch would wait for itself")
            self._changed.wait_for(lambda: self._switch is None)
            # From here on new requests wait, so those in flight can only become fewer: a switch never starves.
            self._switch, started = switch, self._clock()
            drained = False
            try:
                drained = self._changed.wait_for(lambda: not self._in_flight, timeout_s)
            finally:
                if not drained:
                    self._switch = None
                    self._changed.notify_all()
            if not drained:
                raise RefitFailed(
                    f"{sum(self._in_flight.values())} requests in flight did not end within {timeout_s} s",
                    serving="nothing" if self._serving is None else self._serving.version,
                )
            switch._exclusive = True
            return started

    def _decide(self, switch: Switch, serving: Serving | None, reason: str) -> None:
        with self._changed:
            assert self._switch is switch, "decided after the switch was over"
            self._serving, self._reason = serving, reason

    def _open(self, switch: Switch, started: float) -> None:
        with self._changed:
            switch.pause_s = self._clock() - started
            self._switch = None
            self._changed.notify_all()
