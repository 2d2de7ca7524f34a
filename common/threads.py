"""Work spread over threads, in order, with bounded memory."""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(task: Callable[[T], R], items: Iterable[T], *, threads: int) -> Iterator[R]:
    """`map` over threads that keeps the order and looks at most `threads + 1` items ahead: memory stays bounded."""
    if threads <= 1:
        yield from map(task, items)
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="refleet-codec") as pool:
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(task, item))
                while waiting and (len(waiting) > threads or waiting[0].done()):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


class Newest(Generic[T]):
    """Does `work` behind the caller's back, in a thread of its own, for the newest item each time.

    Safe to use from several threads. `work` deals with its errors.
    """

    def __init__(self, work: Callable[[T], None], *, name: str):
        self._work, self._name = work, name
        self._guard = threading.Lock()
        self._next: list[T] = []
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        with self._guard:
            return self._thread is not None

    def put(self, item: T) -> None:
        """The newest one; one that was put earlier and not begun is passed over."""
        with self._guard:
            self._next = [item]
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Waits until the newest item was worked on; nothing may be put any more."""
        with self._guard:
            thread = self._thread
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        while True:
            with self._guard:
                if not self._next:
                    self._thread = None
                    return
                item = self._next.pop()
            self._work(item)


def ahead(items: Iterable[T], *, depth: int) -> Iterator[T]:
    """The items, made by a thread of its own up to `depth` ahead of whoever takes them. Its errors are raised here."""
    ready: queue.Queue[tuple[bool, T | BaseException | None]] = queue.Queue(depth)
    stop = threading.Event()

    def put(entry: tuple[bool, T | BaseException | None]) -> bool:
        while not stop.is_set():
            try:
                ready.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def run() -> None:
        try:
            for item in items:
                if not put((True, item)):
                    return
            put((False, None))
        except BaseException as error:  # it belongs to whoever takes the items
            put((False, error))

    thread = threading.Thread(target=run, name="refleet-ahead", daemon=True)
    thread.start()
    try:
        while True:
            is_item, found = ready.get()
            if is_item:
                yield found  # type: ignore[misc]
            elif found is None:
                return
            else:
                assert isinstance(found, BaseException)
                raise found
    finally:
        stop.set()
        thread.join()
