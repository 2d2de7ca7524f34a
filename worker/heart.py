"""The heartbeat: shows the worker's status to the fleet, also while a long stage or apply is going on."""

from __future__ import annotations

import threading
from collections.abc import Callable

from ..common import wire
from ..common.errors import RefleetError
from ..common.messages import WorkerStatus
from ..common.stream import Stream


class Heart:
    """Publishes `status()` every `interval_s` seconds and after `kick()`; `on_failure` hears when that fails."""

    def __init__(
        self,
        stream: Stream,
        status: Callable[[], WorkerStatus],
        *,
        interval_s: float,
        on_failure: Callable[[RefleetError], None],
    ):
        self._stream, self._status, self._interval_s, self._on_failure = stream, status, interval_s, on_failure
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._order = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="refleet-heart", daemon=True)

    @property
    def is_this_thread(self) -> bool:
        return threading.current_thread() is self._thread

    def start(self) -> None:
        self._thread.start()

    def kick(self) -> None:
        self._wake.set()

    def stop(self, timeout_s: float | None = None) -> None:
        """End the thread; no beat follows, unless one hangs in the server for longer than `timeout_s`."""
        self._stop.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def beat(self) -> None:
        """Show the status now. Raises: StreamError."""
        with self._order:  # an older status must not overwrite a newer one
            status = self._status()
            self._stream.beat(status.worker, wire.pack(status))

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.beat()
            except RefleetError as error:
                if not self._stop.is_set():
                    self._on_failure(error)
            self._wake.wait(self._interval_s)
            self._wake.clear()
