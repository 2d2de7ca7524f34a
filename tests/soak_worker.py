"""A worker of the long run with a torch module, and a reader beside it: python soak_worker.py ID FOLDER URL MODEL.

The reader asks for the served version as a request does, hashes the whole module, and compares with what was published
under that id. It writes how often, and what was wrong, into FOLDER/ID/reads-PID.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path

import torch
from refleet.common.errors import NotServing
from refleet.worker.torch_engine import TorchEngine
from refleet.worker.worker import Worker
from soak_model import SHAPES, known_contents, tensors_digest


def module() -> torch.nn.Module:
    made = torch.nn.Module()
    for name, shape in SHAPES.items():
        made.register_parameter(name, torch.nn.Parameter(torch.zeros(shape), requires_grad=False))
    return made


def held(made: torch.nn.Module) -> str:
    return tensors_digest({name: tensor.numpy() for name, tensor in made.state_dict().items()})


def main(worker_id: str, folder: Path, url: str, model: str) -> None:
    home = folder / worker_id
    home.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    live = module()
    known: dict[str, str] = {}
    reads, torn = 0, list[str]()
    stats = home / f"reads-{os.getpid()}"
    worker = Worker(
        url, model=model, engine=TorchEngine(live), state_dir=home / "state", share=folder / "host",
        worker_id=worker_id, heartbeat_s=0.2, poll_s=0.2,
    )  # fmt: skip
    with worker:
        while not ended.wait(0.01) and worker.alive:
            try:
                with worker.serving(timeout_s=0.5) as version:
                    found = held(live)
            except NotServing:
                continue
            if version.id not in known:
                known = known_contents(folder)
            reads += 1
            if known.get(version.id) != found:
                torn.append(version.id)
            if reads % 20 == 1 or torn:
                stats.write_text(json.dumps({"reads": reads, "torn": torn[-5:]}))
    stats.write_text(json.dumps({"reads": reads, "torn": torn[-5:]}))
    sys.exit(1 if worker.crash else 0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4])
