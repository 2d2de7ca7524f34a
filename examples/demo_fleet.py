"""The demo's processes: starts, asks, kills and ends the three workers, and remembers what they said."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path

_PROGRAM = Path(__file__).with_name("demo_worker.py")
WORKERS = ("worker-1", "worker-2", "worker-3")
_START_S, _ANSWER_S, _END_S = 60.0, 30.0, 5.0


class WorkerDied(Exception):
    """A worker process ended, or did not answer, although nobody asked it to."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What one worker said to the test images. `logits` as `demo_model.answer` returns them."""

    version: str
    fingerprint: str
    logits: bytes


class WorkerProcess:
    """One worker process and its output. Starts at once; `ready` waits for it."""

    def __init__(self, worker: str, *, redis: str, model: str, state: Path, breakable: bool) -> None:
        self.id = worker
        self.port = 0
        self.lines: list[str] = []  # all it said, as people read it
        self._reports: list[tuple[str, str]] = []  # state and text of each of its events
        self._changed = threading.Condition()
        self._ended = False
        command = [sys.executable, str(_PROGRAM), "--redis", redis, "--model", model, "--id", worker]
        command += ["--state", str(state), *(["--breakable"] if breakable else [])]
        # a session of its own: Ctrl-C in the terminal reaches the demo, which ends its workers in order
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        self._reader = threading.Thread(target=self._read, name=f"reads {worker}", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; minus the signal's number after a signal."""
        return self._process.poll()

    def ready(self) -> None:
        """Wait until it listens. Raises: WorkerDied with its last output."""
        with self._changed:
            self._changed.wait_for(lambda: self.port or self._ended, _START_S)
        if not self.port:
            raise self.death(f"did not start within {_START_S:g} s")

    def check(self) -> None:
        """Raises: WorkerDied if it is not running."""
        if self.exit_code is not None:
            raise self.death("does not run")

    def death(self, what: str) -> WorkerDied:
        """The error for this worker, with the last of its output."""
        code = self.exit_code
        if code is not None:
            self._reader.join(_END_S)  # until its last words are in
            what = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        said = "".join(f"\n    {line}" for line in self.lines[-8:]) or " nothing"
        return WorkerDied(f"{self.id} (pid {self.pid}) {what}. Its last output:{said}")

    def way(self, to: str) -> tuple[list[str], list[str]]:
        """The states it went through, and the versions it served, by its own reports, until it served version `to`.

        Raises: WorkerDied if it never says so.
        """
        with self._changed:  # its ack may be here before what it printed earlier
            last = ("SERVING", f"serving {to}")
            if not self._changed.wait_for(lambda: last in self._reports or self._ended, _ANSWER_S) or self._ended:
                raise self.death(f"does not serve {to}")
            reports = list(self._reports)
        states = [state for state, _ in reports]
        served = [text.removeprefix("serving ") for state, text in reports if state == "SERVING"]
        return [state for n, state in enumerate(states) if states[n - 1 : n] != [state]], served

    def post(self, path: str, request: object) -> dict[str, str]:
        """The reply of its HTTP endpoint. Raises: WorkerDied."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=_ANSWER_S)
        try:
            connection.request("POST", path, json.dumps(request), {"Content-Type": "application/json"})
            response = connection.getresponse()
            body = response.read()
        except (OSError, HTTPException) as error:
            with suppress(subprocess.TimeoutExpired):  # a connection that breaks is the first sign of a death
                self._process.wait(1.0)
            raise self.death(f"did not answer: {type(error).__name__}: {error}") from error
        finally:
            connection.close()
        reply: dict[str, str] = json.loads(body)
        if response.status != 200:
            raise self.death(f"answered {response.status}: {reply.get('error')}")
        return reply

    def ask(self, images: list[list[int]]) -> Answer:
        """Its answers to `images`. Raises: WorkerDied."""
        reply = self.post("/ask", {"images": images})
        return Answer(reply["version"], reply["fingerprint"], bytes.fromhex(reply["logits"]))

    def kill(self) -> int:
        """kill -9, by its pid; returns the exit code."""
        self._process.kill()
        return self._process.wait(_END_S)

    def let_go(self) -> None:
        """Tell it to end; does not wait."""
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):  # it is gone already
                self._process.stdin.close()

    def end(self) -> None:
        """Wait for its end, and make it end if it does not."""
        self.let_go()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self.kill()
        self._reader.join(_END_S)
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for raw in self._process.stdout:
            line = raw.decode(errors="replace").rstrip()
            try:
                said = json.loads(line)
            except ValueError:
                said = None  # a warning or a traceback of the process, not a report
            with self._changed:
                if isinstance(said, dict) and "port" in said:
                    self.port = int(said["port"])
                elif isinstance(said, dict) and "state" in said:
                    self._reports.append((said["state"], said["text"]))
                    self.lines.append(f"{said['state']}: {said['text']}")
                else:
                    self.lines.append(line)
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()


class WorkerProcesses:
    """All workers of the demo, by id."""

    def __init__(self, *, redis: str, model: str, folder: Path, breakable: bool) -> None:
        self._start = {"redis": redis, "model": model}
        self._folder, self._breakable = folder, breakable
        self.by_id: dict[str, WorkerProcess] = {}
        self._killed: set[str] = set()

    def start(self, name: str) -> WorkerProcess:
        """Start a worker on its own folder, for the first time or again."""
        if name in self.by_id:
            self.by_id[name].end()  # closes what is left of the old one
        self._killed.discard(name)
        state = self._folder / name
        self.by_id[name] = WorkerProcess(name, **self._start, state=state, breakable=self._breakable)
        return self.by_id[name]

    def ready(self) -> None:
        """Wait until all of them listen. Raises: WorkerDied."""
        for process in self.by_id.values():
            process.ready()

    def kill(self, name: str) -> int:
        """kill -9 of one worker; it is expected to be gone until `start`. Returns its exit code."""
        self._killed.add(name)
        return self.by_id[name].kill()

    def pids(self) -> dict[str, int]:
        """Of those that should be running."""
        return {name: process.pid for name, process in self.by_id.items() if name not in self._killed}

    def check(self) -> None:
        """Raises: WorkerDied when one of them is not running, unless it was killed by `kill`."""
        for name in self.pids():
            self.by_id[name].check()

    def ask(self, images: list[list[int]], *, without: str | None = None) -> dict[str, Answer]:
        """The answers of all workers, asked at the same time. Raises: WorkerDied."""
        asked = [process for name, process in self.by_id.items() if name != without]
        with ThreadPoolExecutor(len(asked)) as pool:
            return dict(zip((p.id for p in asked), pool.map(lambda p: p.ask(images), asked), strict=True))

    def end(self) -> None:
        """End all of them, each within some seconds."""
        for process in self.by_id.values():
            process.let_go()
        for process in self.by_id.values():
            process.end()


@contextmanager
def workers(*, redis: str, model: str, folder: Path, breakable: bool) -> Iterator[WorkerProcesses]:
    """The running processes; all of them have ended, and only they, when the block is left."""
    processes = WorkerProcesses(redis=redis, model=model, folder=folder, breakable=breakable)
    try:
        for name in WORKERS:
            processes.start(name)
        yield processes
    finally:
        processes.end()
