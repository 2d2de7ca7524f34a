"""One worker process of the benchmark: a torch module in memory, kept on the fleet's version until SIGTERM."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from pathlib import Path

import torch
from model import Served
from refleet.worker import TorchEngine
from serving import serve


def main() -> int:
    parser = argparse.ArgumentParser()
    for name in ("url", "model", "state", "id"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--width", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    done = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: done.set())
    engine = TorchEngine(Served(options.layers, options.width))
    return serve(done, options.url, options.model, engine, Path(options.state), options.id, keep=2)


if __name__ == "__main__":
    sys.exit(main())
