"""The scheduler: every thread of the simulated processes is a greenlet, and the seed decides who runs next.

Time stands still while anybody can run, and jumps to the next deadline when nobody can. A task gives way only inside a
call of `Kernel`, which the simulated threads, clock, disk and network make for it.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

from greenlet import getcurrent, greenlet

#: seconds since 1970 at the start of every run
WALL_S = 1_800_000_000.0


class Killed(BaseException):
    """The process of this task was killed: nothing that it does on the way out has an effect."""


class Stuck(AssertionError):
    """Tasks go on running without an end in sight."""


class Task:
    """One thread of a simulated process."""

    __slots__ = ("error", "glet", "ident", "joiners", "name", "parked", "process", "token", "woken")

    def __init__(self, process: Process, name: str, ident: int, run: Callable[[], object]):
        self.process, self.name, self.ident = process, name, ident
        self.glet = greenlet(run)
        self.joiners: list[Task] = []
        self.parked = False  # waits for `wake` or its timer
        self.woken = False
        self.token = 0  # of the timer that counts
        self.error: BaseException | None = None

    @property
    def alive(self) -> bool:
        return not self.glet.dead


class Process:
    """What dies together: tasks, file descriptors, locks, memory. `host` is where its disk and its clock are."""

    def __init__(self, kernel: Kernel, name: str, host: Any, pid: int):
        self.kernel, self.name, self.host, self.pid = kernel, name, host, pid
        self.tasks: list[Task] = []
        self.alive, self.paused, self.resumed_s = True, False, 0.0
        self.held: list[Task] = []  # tasks that could run but for the pause
        self.files: dict[int, Any] = {}
        self.points: dict[str, int] = {}  # crash point -> passes that are left before the end
        self.io_left = -1  # calls of the disk or the server before the end; -1: no end
        self.on_death: list[Callable[[], None]] = []

    def spawn(self, run: Callable[[], object], name: str) -> Task:
        return self.kernel.spawn(self, run, name)

    def pause(self, paused: bool) -> None:
        """As SIGSTOP and SIGCONT do."""
        self.paused = paused
        if not paused:
            self.resumed_s = self.kernel.now
            self.kernel.ready += self.held
            self.held = []


class Kernel:
    """One run. `check` is called after every step."""

    def __init__(self, seed: int, *, trace: list[str] | None = None, most_steps: int = 400_000):
        self.rng = random.Random(f"steps {seed}")  # who runs next, and how long things take
        self.random = self.rng.random
        self.ids = random.Random(f"ids {seed}")  # random numbers of the production code
        self.now = 0.0
        self.ready: list[Task] = []
        self.current: Task | None = None
        self.processes: list[Process] = []
        self.check: Callable[[], None] = lambda: None
        self.on_error: Callable[[Task, BaseException], None] = lambda task, error: None
        self.steps, self._most_steps = 0, most_steps
        self.failed: Exception | None = None  # ends the run after the step at hand
        self.passed: Counter[str] = Counter()  # crash points
        self._timers: list[tuple[float, int, Task | None, int, Callable[[], None] | None]] = []
        self._numbers = count(1)
        self._doomed: list[Process] = []
        self._hub = getcurrent()
        self._trace = trace

    # ------------------------------------------------------------------ what happens

    def note(self, text: str) -> None:
        """A line of the trace."""
        if self._trace is not None:
            task = self.current
            who = f"{task.process.name}/{task.name}" if task else "-"
            self._trace.append(f"{self.now:9.4f} {who:28} {text}")

    # ------------------------------------------------------------------ processes

    def process(self, name: str, host: Any) -> Process:
        made = Process(self, name, host, 1000 + next(self._numbers))
        self.processes.append(made)
        return made

    def spawn(self, process: Process, run: Callable[[], object], name: str) -> Task:
        def main() -> None:
            try:
                self._alive(task)
                run()
            except Killed:
                pass
            except BaseException as error:  # as threading does: told, and the process goes on
                task.error = error
                self.on_error(task, error)
            finally:
                for joiner in task.joiners:
                    self.wake(joiner)

        task = Task(process, name, next(self._numbers), main)
        task.glet.parent = self._hub
        process.tasks.append(task)
        self.ready.append(task)
        return task

    def kill(self, process: Process, how: str) -> None:
        """At once, as SIGKILL does: open files and locks are gone, no task of it does anything any more."""
        if not process.alive:
            return
        self.note(f"KILL {process.name}: {how}")
        process.alive = False
        self.processes.remove(process)
        self._doomed.append(process)
        for ended in process.on_death:
            ended()
        if self.current is not None and self.current.process is process:
            raise Killed

    def _bury(self) -> None:
        while self._doomed:
            process = self._doomed.pop()
            gone = set(process.tasks)
            self.ready = [task for task in self.ready if task not in gone]
            for task in process.tasks:
                if task.glet:  # it was started and has not ended
                    self.current = task
                    task.glet.throw(Killed)
            self.current = None

    # ------------------------------------------------------------------ tasks

    @staticmethod
    def _alive(task: Task | None) -> None:
        if task is None or not task.process.alive:
            raise Killed

    def give_way(self) -> None:
        """Let the seed decide who goes on."""
        task = self.current
        if task is None or not task.process.alive:
            raise Killed
        self.ready.append(task)
        self._hub.switch()
        if not task.process.alive:
            raise Killed

    def maybe(self, share: float = 0.15) -> None:
        """Give way, now and then."""
        task = self.current
        if task is None or not task.process.alive:
            raise Killed
        if self.random() < share:
            self.give_way()

    def park(self, timeout_s: float | None = None) -> bool:
        """Wait for `wake`; False when `timeout_s` passed before."""
        task = self.current
        self._alive(task)
        assert task is not None
        task.parked, task.woken = True, False
        if timeout_s is not None:
            self._at(self.now + max(timeout_s, 0.0), task, None)
        self._switch(task)
        return task.woken

    def wake(self, task: Task) -> None:
        if task.parked:
            task.parked, task.woken = False, True
            task.token += 1
            self.ready.append(task)

    def sleep(self, seconds: float) -> None:
        self.park(seconds)

    def call_at(self, time_s: float, action: Callable[[], None]) -> None:
        """Run `action` in no process at all: what the world does."""
        self._at(time_s, None, action)

    def _at(self, time_s: float, task: Task | None, action: Callable[[], None] | None) -> None:
        heapq.heappush(self._timers, (time_s, next(self._numbers), task, task.token if task else 0, action))

    def _switch(self, task: Task) -> None:
        self._hub.switch()
        self._alive(task)

    # ------------------------------------------------------------------ the loop

    def run(self, until: Callable[[], bool] = lambda: False, *, for_s: float) -> bool:
        """Run until the condition holds; False when `for_s` of virtual time passed before."""
        assert getcurrent() is self._hub
        end, rng = self.now + for_s, self.random
        while not until():
            if self._doomed:
                self._bury()
            task = self._next(end, rng)
            if task is None:
                return False
            self.steps += 1
            if self.steps > self._most_steps:
                raise Stuck(f"{self.steps} steps at {self.now:.3f} s, now {task.process.name}/{task.name}")
            self.current = task
            task.glet.switch()
            self.current = None
            self.check()
            if self.failed is not None:
                raise self.failed
        return True

    def _next(self, end: float, rng: Callable[[], float]) -> Task | None:
        while True:
            ready = self.ready
            if ready:
                place = int(rng() * len(ready))
                task = ready[place]
                ready[place] = ready[-1]
                ready.pop()
                if task.process.paused:
                    task.process.held.append(task)
                elif task.glet or not task.glet.dead:
                    return task
                continue
            if not self._timers or self._timers[0][0] > end:
                self.now = end
                return None
            time_s, _, due, token, action = heapq.heappop(self._timers)
            if action is not None:
                self.now = max(self.now, time_s)
                action()
                if self._doomed:
                    self._bury()
                self.check()
            elif due is not None and due.parked and due.token == token:
                self.now = max(self.now, time_s)
                due.parked = False
                due.token += 1
                self.ready.append(due)

    def end(self) -> None:
        """Kill everything that is left."""
        for process in list(self.processes):
            self.kill(process, "the end")
        self._bury()

    def tasks(self) -> Iterator[Task]:
        for process in self.processes:
            yield from process.tasks


#: the kernel of the run at hand, or of the last one
_active: list[Kernel] = []


def kernel() -> Kernel:
    return _active[-1]


def activate(made: Kernel) -> None:
    _active[:] = [made]


def idle() -> bool:
    """Whether no task runs at this moment."""
    return not _active or _active[-1].current is None


def end(run: Kernel) -> None:
    """Kills all that is left; from now on nothing runs."""
    run.check = lambda: None
    run.end()
    activate(Kernel(0))
