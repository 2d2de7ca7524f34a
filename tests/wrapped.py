"""A real stream in which a test may do something at the moment of one call."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from refleet.common.stream import Stream


class Interrupted:
    """Passes every call on to `stream`; right before the next call of the method `at`, runs `action`, once."""

    def __init__(self, stream: Stream, at: str, action: Callable[[], object]):
        self._stream, self._at, self._action = stream, at, action
        self.armed = False
        self.done = threading.Event()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._stream, name)
        if name != self._at or not self.armed:
            return found

        def interrupted(*args: Any, **options: Any) -> Any:
            if self.armed:
                self.armed = False
                self._action()
                self.done.set()
            return found(*args, **options)

        return interrupted


class Pause:
    """An `action` that holds the calling thread until `resume`, as SIGSTOP would hold its process."""

    def __init__(self) -> None:
        self.reached, self._go = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.reached.set()
        assert self._go.wait(30), "never resumed"

    def resume(self) -> None:
        self._go.set()
