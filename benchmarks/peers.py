"""What users do without refleet, measured in the same run: every process of one rank of a gloo group.

    gloo   rank 0 broadcasts the full state dict, tensor by tensor, to n processes
    load   n processes at once copy the safetensors file and `load_state_dict` it

Rank 0 prints {"gloo": [seconds...], "load": [seconds...]}: from a barrier to the barrier after the last one is done.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from model import Served
from safetensors.torch import load_file


def main() -> int:
    parser = argparse.ArgumentParser()
    for name in ("rank", "ranks", "port", "rounds", "layers", "width"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{options.port}",
        rank=options.rank,
        world_size=options.ranks,
        timeout=timedelta(seconds=120),
    )
    served = Served(options.layers, options.width)
    if options.rank == 0:
        served.load_state_dict(load_file(options.checkpoint))

    def broadcast() -> None:
        for tensor in served.state_dict().values():
            dist.broadcast(tensor.view(torch.uint8), src=0)

    with tempfile.TemporaryDirectory(dir=options.checkpoint.parent) as folder:

        def load() -> None:
            if options.rank:
                mine = shutil.copy(options.checkpoint, Path(folder) / f"rank-{options.rank}.safetensors")
                served.load_state_dict(load_file(mine))

        seen = {name: timed(step, options.rounds) for name, step in (("gloo", broadcast), ("load", load))}
    if options.rank == 0:
        print(json.dumps(seen))
    dist.destroy_process_group()
    return 0


def timed(step: Callable[[], None], rounds: int) -> list[float]:
    """Seconds of each round, after one that is not counted (fresh pages, connections)."""
    seconds = []
    for _ in range(rounds + 1):
        dist.barrier()
        started = time.perf_counter()
        step()
        dist.barrier()
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


if __name__ == "__main__":
    sys.exit(main())
