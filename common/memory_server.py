"""The server behind `MemoryStream`: keys that expire, and streams as Redis has them."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .stream import LogId


@dataclass(slots=True)
class MemoryEntries:
    """One stream: entries in the order of their ids, and the last id ever used."""

    last: LogId = (0, 0)
    by_id: dict[LogId, bytes] = field(default_factory=dict)

    def after(self, cursor: LogId, count: int) -> list[tuple[LogId, bytes]]:
        return [(entry_id, data) for entry_id, data in self.by_id.items() if entry_id > cursor][:count]

    def add(self, entry_id: LogId, data: bytes, keep: int | None = None) -> None:
        self.by_id[entry_id], self.last = data, entry_id
        while keep is not None and len(self.by_id) > keep:
            del self.by_id[next(iter(self.by_id))]


class MemoryServer:
    """The state that streams of one process share. `clock` (seconds) decides what has expired."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self.changed = threading.Condition()
        self.lose_everything()

    def lose_everything(self) -> None:
        """What a server without persistence does when it is killed and started again."""
        with self.changed:
            self._values: dict[str, Any] = {}
            self._until: dict[str, float] = {}
            self.run_id = uuid.uuid4().hex

    def get(self, key: str) -> Any:
        if key in self._until and self._until[key] <= self.clock():
            self.drop(key)
        return self._values.get(key)

    def put(self, key: str, value: Any) -> None:
        self._values[key] = value

    def drop(self, key: str) -> None:
        self._values.pop(key, None)
        self._until.pop(key, None)

    def expire(self, key: str, ttl_s: float) -> None:
        if self.get(key) is not None:
            self._until[key] = self.clock() + ttl_s

    def entries(self, key: str) -> MemoryEntries:
        """The stream at `key`; an empty one, not kept, where there is none."""
        return self.get(key) or MemoryEntries()

    def add(self, key: str, data: bytes, keep: int) -> None:
        """Append with an automatic id: milliseconds of the clock and a count, as Redis does."""
        entries = self.entries(key)
        now = (int(self.clock() * 1000), 0)
        entries.add(now if now > entries.last else (entries.last[0], entries.last[1] + 1), data, keep)
        self.put(key, entries)
        self.changed.notify_all()
