"""What the machine can do at best, for speeds as shares of it: reading two streams, and a copy."""

from __future__ import annotations

import ctypes
import resource
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

_libc = ctypes.CDLL(None)
_libc.memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_libc.memcpy.argtypes = _libc.memcmp.argtypes
_libc.memcpy.restype = ctypes.c_void_p


def compare(one: Bytes, other: Bytes) -> None:
    """libc's memcmp of equal bytes: reads both to the end."""
    if _libc.memcmp(one.ctypes.data, other.ctypes.data, one.size):
        raise AssertionError("the yardstick compares equal bytes")


def copy(target: Bytes, source: Bytes) -> None:
    """libc's memcpy into memory that was touched before."""
    _libc.memcpy(target.ctypes.data, source.ctypes.data, source.size)


class Threads:
    """Runs a function over pieces of work in `count` threads (1: in the caller's)."""

    def __init__(self, count: int):
        self.count, self.now = count, clock(count)
        self._pool = ThreadPoolExecutor(count) if count > 1 else None

    def each(self, step: Callable[[Any], Any], work: list[Any]) -> list[Any]:
        return list(self._pool.map(step, work)) if self._pool else [step(piece) for piece in work]

    def seconds(self, step: Callable[[], object]) -> float:
        started = self.now()
        step()
        return self.now() - started

    def close(self) -> None:
        if self._pool:
            self._pool.shutdown()


def processor_s() -> float:
    """Processor time of this process, its threads, and its children that ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def clock(threads: int) -> Callable[[], float]:
    """What speeds are taken by: one thread's by processor time, which other jobs on the machine leave alone; the speed
    of several is how they run together, so wall time it is."""
    return processor_s if threads == 1 else time.perf_counter


class Yardstick:
    """A compare and a copy of as many bytes as `data` has, cut into one piece for each thread."""

    def __init__(self, data: Bytes, threads: Threads):
        self.data, self.threads = data, threads
        self._same, self._target = data.copy(), data.copy()
        ends = [n * data.size // threads.count for n in range(threads.count + 1)]
        self._cuts = [slice(start, end) for start, end in pairwise(ends)]

    def compare(self) -> float:
        """Seconds."""
        return self._each(lambda cut: compare(self.data[cut], self._same[cut]))

    def copy(self) -> float:
        """Seconds."""
        return self._each(lambda cut: copy(self._target[cut], self.data[cut]))

    def _each(self, step: Callable[[slice], None]) -> float:
        return self.threads.seconds(lambda: self.threads.each(step, self._cuts))
