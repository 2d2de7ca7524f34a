"""`threading` and `queue` over the kernel: the same names and promises, as far as the production code uses them."""

from __future__ import annotations

import threading as real
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from queue import Empty, Full
from types import SimpleNamespace
from typing import Any

from .kernel import Killed, Process, Task, _active, kernel


def me() -> Task:
    task = _active[-1].current
    if task is None:  # something of a dead process is being finalized
        raise Killed
    return task


class Lock:
    """Giving way before it is taken, now and then: another task may be faster."""

    reentrant = False

    def __init__(self) -> None:
        self._owner: Task | None = None
        self._count = 0
        self._waiting: deque[Task] = deque()

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        run = kernel()
        task = run.current
        if task is None:  # the world itself: nobody runs meanwhile
            return True
        if self.reentrant and self._owner is task:
            self._count += 1
            return True
        run.maybe(0.1)
        end = None if timeout < 0 else run.now + timeout
        while self._owner is not None:
            if not self._owner.process.alive:  # the kernel dropped what it held: shared locks live in the server only
                break
            if not blocking or (end is not None and run.now >= end):
                return False
            self._waiting.append(task)
            try:
                run.park(None if end is None else end - run.now)
            finally:
                if task in self._waiting:
                    self._waiting.remove(task)
        self._owner, self._count = task, 1
        return True

    def release(self) -> None:
        if kernel().current is None:
            return
        if self._owner is not kernel().current:
            if me().process.alive:
                raise RuntimeError("cannot release a lock of somebody else's")
            return  # it was killed while it waited for a condition
        self._count -= 1
        if not self._count:
            self._owner = None
            if self._waiting:
                kernel().wake(self._waiting.popleft())

    def locked(self) -> bool:
        return self._owner is not None

    def owned(self) -> bool:
        return self._owner is kernel().current

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class RLock(Lock):
    reentrant = True


class Condition:
    def __init__(self, lock: Lock | None = None):
        self._lock = lock or RLock()
        self._sleeping: deque[Task] = deque()

    def __enter__(self) -> bool:
        return self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    acquire = property(lambda self: self._lock.acquire)
    release = property(lambda self: self._lock.release)

    def wait(self, timeout: float | None = None) -> bool:
        task, run, lock = me(), kernel(), self._lock
        assert lock.owned(), "waits without the lock"
        count, lock._count = lock._count, 1
        lock.release()
        self._sleeping.append(task)
        try:
            woken = run.park(timeout)
        finally:
            if task in self._sleeping:
                self._sleeping.remove(task)
            if task.process.alive:
                lock.acquire()
                lock._count = count
        return woken

    def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> Any:
        run = kernel()
        end = None if timeout is None else run.now + timeout
        while not (found := predicate()):
            if end is not None and run.now >= end:
                return found
            self.wait(None if end is None else end - run.now)
        return found

    def notify(self, n: int = 1) -> None:
        for _ in range(min(n, len(self._sleeping))):
            kernel().wake(self._sleeping.popleft())

    def notify_all(self) -> None:
        self.notify(len(self._sleeping))


class Event:
    def __init__(self) -> None:
        self._set = False
        self._waiting: list[Task] = []

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        self._set = True
        for task in self._waiting:
            kernel().wake(task)
        self._waiting = []

    def clear(self) -> None:
        self._set = False

    def wait(self, timeout: float | None = None) -> bool:
        task, run = me(), kernel()
        if self._set:
            run.maybe()
        else:
            self._waiting.append(task)
            run.park(timeout)
            if task in self._waiting:
                self._waiting.remove(task)
        return self._set


class Thread:
    def __init__(
        self, group: None = None, target: Callable[..., object] | None = None, name: str = "thread",
        args: Iterable[Any] = (), kwargs: Mapping[str, Any] | None = None, *, daemon: bool | None = None,
    ):  # fmt: skip
        self.name, self.daemon = name, daemon
        self._call = (target, tuple(args), dict(kwargs or {}))
        self._process: Process = me().process
        self._task: Task | None = None

    def start(self) -> None:
        assert self._task is None, "threads can only be started once"
        target, args, kwargs = self._call

        def run() -> None:
            if target is not None:
                target(*args, **kwargs)

        self._task = self._process.spawn(run, self.name)
        _by_task[self._task] = self
        self._process.on_death.append(lambda: _by_task.pop(self._task, None))
        kernel().maybe()

    def join(self, timeout: float | None = None) -> None:
        assert self._task is not None, "cannot join a thread before it is started"
        run = kernel()
        end = None if timeout is None else run.now + timeout
        while self._task.alive and (end is None or run.now < end):
            self._task.joiners.append(me())
            run.park(None if end is None else end - run.now)

    def is_alive(self) -> bool:
        return self._task is not None and self._task.alive

    @property
    def ident(self) -> int | None:
        return self._task.ident if self._task else None


_by_task: dict[Task | None, Any] = {}


def current_thread() -> Any:
    return _by_task.get(me()) or me()


def get_ident() -> int:
    return me().ident


threading = SimpleNamespace(
    Lock=Lock, RLock=RLock, Condition=Condition, Event=Event, Thread=Thread, current_thread=current_thread,
    get_ident=get_ident, local=real.local, TIMEOUT_MAX=real.TIMEOUT_MAX,
)  # fmt: skip


class Queue:
    def __init__(self, maxsize: int = 0):
        self._items: deque[Any] = deque()
        self._most = maxsize
        self._changed = Condition()

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: self._most <= 0 or len(self._items) < self._most, timeout):
                raise Full
            self._items.append(item)
            self._changed.notify_all()

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        with self._changed:
            if not self._changed.wait_for(lambda: self._items, timeout):
                raise Empty
            item = self._items.popleft()
            self._changed.notify_all()
            return item


queue = SimpleNamespace(Queue=Queue, Empty=Empty, Full=Full)
