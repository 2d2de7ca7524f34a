"""A gloo group for the peers: what rank 0 holds, to everybody, and the time that takes."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from model import Served
from safetensors.torch import load_file


def arguments() -> argparse.ArgumentParser:
    """What every rank is told."""
    parser = argparse.ArgumentParser()
    for name in ("rank", "ranks", "port", "rounds"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--size", type=float, required=True, help="MB of the model")
    parser.add_argument("--checkpoint", type=Path, required=True)
    return parser


def words(
    script: Path, checkpoint: Path, megabytes: float, *, ranks: int, rounds: int, port: int, host: str = "127.0.0.1"
) -> list[object]:
    """A command line of one rank, less its number at the end."""
    return [sys.executable, script, "--host", host, "--port", port, "--ranks", ranks, "--rounds", rounds,
            "--size", megabytes, "--checkpoint", checkpoint, "--rank"]  # fmt: skip


def join(options: argparse.Namespace) -> Served:
    """Become a rank; the module holds the checkpoint on rank 0, and zeros elsewhere."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{options.host}:{options.port}",
        rank=options.rank,
        world_size=options.ranks,
        timeout=timedelta(seconds=300),
    )
    served = Served(options.size)
    if options.rank == 0:
        served.load_state_dict(load_file(options.checkpoint))
    return served


def broadcast(served: Served) -> None:
    """The full state dict, tensor by tensor."""
    for tensor in served.state_dict().values():
        dist.broadcast(tensor.view(torch.uint8), src=0)


def timed(step: Callable[[], None], rounds: int) -> list[float]:
    """Seconds of each round, from a barrier to the barrier after the last rank is done; one before is not counted
    (fresh pages, connections)."""
    seconds = []
    for _ in range(rounds + 1):
        dist.barrier()
        started = time.perf_counter()
        step()
        dist.barrier()
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


def end(options: argparse.Namespace, seen: dict[str, list[float]]) -> int:
    """Rank 0 says what it saw."""
    if options.rank == 0:
        print(json.dumps(seen))
    dist.destroy_process_group()
    return 0
