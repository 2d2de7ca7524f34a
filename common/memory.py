"""Tensors in this process's memory, by digest, and the buffers that they lie in.

Memory that was touched before is worth keeping: copying into fresh pages is several times slower than into used ones.
So a buffer that nobody looks at any more is handed out again, for the next tensor of its size.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

#: smaller ones are left to the allocator, which keeps their pages itself
POOLED_BYTES = 64 << 10
#: buffers that are looked at before a new one is made: a model may have thousands of one size
_LOOKS = 64
#: references to a buffer that nobody else has: of the deque, of the loop's variable, of getrefcount's argument
_UNUSED = 3


class Memory:
    """Safe to use from several threads. Views that were handed out keep their bytes, whatever is dropped here."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._held: dict[bytes, Bytes] = {}
        self._pinned: frozenset[bytes] = frozenset()
        self._pins: list[frozenset[bytes]] = []
        self._buffers: dict[int, deque[Bytes]] = {}

    @property
    def size_bytes(self) -> int:
        """All buffers, in use or waiting to be used again."""
        with self._guard:
            return sum(size * len(buffers) for size, buffers in self._buffers.items())

    def take(self, size: int) -> Bytes:
        """A buffer of `size` bytes with undefined content: a used one where there is one free."""
        if size < POOLED_BYTES:
            return np.empty(size, np.uint8)
        with self._guard:
            buffers = self._buffers.setdefault(size, deque())
            for _ in range(min(len(buffers), _LOOKS)):
                buffers.rotate(-1)  # the one that was handed out the longest ago
                buffer = buffers[-1]
                if sys.getrefcount(buffer) <= _UNUSED:  # no array, memoryview or tensor looks into it
                    return buffer[:]
            made = np.empty(size, np.uint8)
            buffers.append(made)
            return made[:]

    def take_all(self, sizes: Iterable[int]) -> list[Bytes]:
        """A buffer for each tensor of a version that is about to be rebuilt."""
        return [self.take(size) for size in sizes]

    def get(self, digest: bytes) -> Bytes | None:
        """The tensor's bytes, which were verified when they came here."""
        with self._guard:
            return self._held.get(digest)

    def put(self, found: Mapping[bytes, Bytes]) -> None:
        """Hold these verified tensors, which lie in buffers of ours. Nobody writes into them any more."""
        with self._guard:
            self._held.update(found)

    def drop(self, digest: bytes) -> None:
        """Forget this one."""
        with self._guard:
            self._held.pop(digest, None)

    def pin(self, digests: Iterable[bytes]) -> None:
        """These are kept until the next call, as far as they are here or come here; others go at the next `trim`."""
        with self._guard:
            self._pinned = frozenset(digests)

    @contextmanager
    def pinned(self, digests: Iterable[bytes]) -> Iterator[None]:
        """These are kept as well during the block: for whoever reads a whole version."""
        mine = frozenset(digests)
        with self._guard:
            self._pins.append(mine)
        try:
            yield
        finally:
            with self._guard:
                self._pins.remove(mine)

    def trim(self, *, free: bool = False) -> None:
        """Drop what is not pinned; with `free`, give buffers that nobody uses back to the system."""
        with self._guard:
            kept = self._kept()
            self._held = {digest: data for digest, data in self._held.items() if digest in kept}
            if free:
                for size, buffers in self._buffers.items():
                    self._buffers[size] = deque(b for b in buffers if sys.getrefcount(b) > _UNUSED)

    def close(self) -> None:
        """Drop everything."""
        self.pin(())
        self.trim(free=True)

    def _kept(self) -> frozenset[bytes]:
        return self._pinned.union(*self._pins)
