"""Work spread over threads, in order, with bounded memory."""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

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
