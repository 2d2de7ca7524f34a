"""A worker's evidence on its way to the fleet: in order, and kept while the server is away."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress

from ..common import wire
from ..common.errors import StreamError
from ..common.messages import Ack
from ..common.stream import Stream

#: a worker that is cut off for long tells its last steps, not all of them
_KEPT = 64


class Acks:
    """Used by the worker's one thread; listeners are called in it, once for each ack, sent or not.

    `show` writes the heartbeat: it goes first, so that whoever saw an ack finds the status that belongs to it.
    """

    def __init__(self, stream: Stream, *, show: Callable[[], None]):
        self._stream, self._show = stream, show
        self._unsent: deque[Ack] = deque(maxlen=_KEPT)
        self._listeners: list[Callable[[Ack], None]] = []

    def listen(self, listener: Callable[[Ack], None]) -> None:
        """Call `listener` with every ack, before it is sent. It must not raise."""
        self._listeners.append(listener)

    def send(self, ack: Ack) -> None:
        """Now if the server answers, else with the next step that reaches it."""
        for listener in self._listeners:
            listener(ack)
        self._unsent.append(ack)
        with suppress(StreamError):
            self._show()
            self.flush()

    def flush(self) -> None:
        """Send what is left. Raises: StreamError."""
        while self._unsent:
            self._stream.ack(self._unsent[0].worker, wire.pack(self._unsent[0]))
            self._unsent.popleft()
