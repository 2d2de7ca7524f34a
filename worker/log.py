"""What a worker process says: one line per event on standard output, as text or as JSON."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from ..common.errors import RefleetError
from ..common.messages import Failure, Serving
from .board import Event


class Log:
    """Lines of one worker. A reader that went away (`refleet-worker run | head`) never ends the worker.

    JSON keys of every line: event (step, started, changed, stopping, ended, failed), time, worker, model, state,
    serving, text. `changed` has failure, `started` has http, `failed` has error.
    """

    def __init__(self, *, worker: str, model: str, as_json: bool):
        self.worker, self.model, self.as_json = worker, model, as_json
        self.exit_code = 0
        self.serving: Callable[[], Serving | None] = lambda: None
        self._state = "STARTING"
        self._lock = threading.Lock()

    def started(self, engine: str, state_dir: Path, redis: str, http: str | None) -> None:
        text = f"model {self.model}, engine {engine}, state {state_dir}, server {redis}"
        self._line("started", text + (f", http {http}" if http else ""), http=http)

    def step(self, text: str) -> None:
        """A part of making or replacing an engine, which may take minutes, begins."""
        self._line("step", text)

    def event(self, event: Event) -> None:
        self._state = event.state
        failure: Failure | None = event.failure
        told = None if failure is None else {"code": failure.code, "what": failure.what, "tensor": failure.tensor}
        code = f"{failure.code}: " if failure and failure.code not in event.text else ""
        self._line("changed", code + event.text, failure=told)

    def stopping(self, signal_name: str) -> None:
        self._line("stopping", f"{signal_name}: draining; a second signal ends at once")

    def ended(self) -> None:
        if not self.exit_code:
            self._state = "STOPPED"
            self._line("ended", "ended")

    def failed(self, error: RefleetError) -> int:
        """Say why the process ends; returns its exit code."""
        if self.as_json:
            self._line("failed", error.what, error=error.to_dict())
        else:
            with suppress(OSError):
                print(f"refleet-worker: {error}", file=sys.stderr, flush=True)  # noqa: T201
        self.exit_code = error.exit_code
        return error.exit_code

    @contextmanager
    def errors(self) -> Iterator[None]:
        """An error of the block becomes the last thing said and the exit code."""
        try:
            yield
        except RefleetError as error:
            self.failed(error)

    def _line(self, event: str, text: str, **more: object) -> None:
        now = datetime.now(UTC)
        serving = self.serving()
        if self.as_json:
            facts = {
                "event": event,
                "time": now.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
                "worker": self.worker,
                "model": self.model,
                "state": self._state,
                "serving": serving.version if serving else None,
                "text": text,
            }
            line = json.dumps(facts | more)
        else:
            stamp = now.astimezone().strftime("%Y-%m-%d %H:%M:%S")
            line = f"{stamp} {self.worker} {self._state} " + text.replace("\n", " ")
        with self._lock:
            try:
                print(line, flush=True)  # noqa: T201
            except OSError:  # also what is in the buffer would fail, again at the exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
