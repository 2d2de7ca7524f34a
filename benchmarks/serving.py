"""One worker process of a benchmark: keeps an engine on the fleet's version until it is told to end."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from refleet.worker import Worker
from refleet.worker.engine import Engine


def serve(
    done: threading.Event, url: str, model: str, engine: Engine, state: Path, worker_id: str, *, keep: int
) -> int:
    """Until `done` is set; returns the exit code: 1 if the worker failed."""
    with Worker(
        url, model=model, engine=engine, state_dir=state, worker_id=worker_id, keep=keep,
        on_event=lambda event: event.failure and print(event.text, file=sys.stderr, flush=True),
    ) as worker:  # fmt: skip
        while not done.wait(0.2):
            if worker.crash:
                return 1
    return 0
