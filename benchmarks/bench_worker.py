"""One worker process of a benchmark, kept on the fleet's version until SIGTERM: a torch module in memory.

`--trace FILE` gets a JSON line for every ack, and one while bytes come that were not released yet. Its times are of
the clock that `time.perf_counter` reads in every process of this machine.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
import time
from pathlib import Path
from typing import IO

import torch
from model import Served
from refleet.common.messages import Ack
from refleet.worker import TorchEngine, Worker
from refleet.worker.engine import Engine
from refleet.worker.memory_engine import MemoryEngine

_LOOK_S = 0.2
_TRACE_S = 0.01


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("url", "model", "id"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--share", type=Path)
    parser.add_argument("--size", type=float, help="MB of the torch module; without it an engine for any tensors")
    parser.add_argument("--keep", type=int, default=2)
    parser.add_argument("--trace", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    done = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: done.set())
    engine: Engine = MemoryEngine() if options.size is None else TorchEngine(Served(options.size))
    worker = Worker(
        options.url, model=options.model, engine=engine, state_dir=options.state, share=options.share,
        worker_id=options.id, keep=options.keep,
        on_event=lambda event: event.failure and print(event.text, file=sys.stderr, flush=True),
    )  # fmt: skip
    return traced(worker, done, options.trace) if options.trace else served(worker, done)


def served(worker: Worker, done: threading.Event) -> int:
    """Until `done` is set; returns the exit code: 1 if the worker failed."""
    with worker:
        while not done.wait(_LOOK_S):
            if worker.crash:
                return 1
    return 0


def traced(worker: Worker, done: threading.Event, path: Path) -> int:
    with path.open("w", buffering=1) as file:
        worker.acks.listen(lambda ack: note(ack, file))
        early = 0
        with worker:
            while not done.wait(_TRACE_S):
                if worker.crash:
                    return 1
                if early != (early := worker.board.early_total):
                    write(file, early=early)
    return 0


def note(ack: Ack, file: IO[str]) -> None:
    write(file, version=ack.version, evidence=ack.evidence.name, timings_ms=ack.timings_ms)


def write(file: IO[str], **found: object) -> None:
    file.write(json.dumps({"at": time.perf_counter(), **found}) + "\n")  # in one call: two threads do


if __name__ == "__main__":
    sys.exit(main())
