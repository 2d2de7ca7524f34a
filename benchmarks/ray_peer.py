"""Weights through Ray's object store: one `put`, and n actors that `get` it and `load_state_dict`.

    python benchmarks/ray_peer.py --workers 4 --size 256 --rounds 3 --checkpoint FILE

Arrays of numpy, which Ray maps into the actors without a copy. Prints {"ray": [seconds...]}: from before the `put`
until the last actor has loaded it. Exit code 3, with the reason on stderr, where Ray can't be had.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # nothing of this leaves the machine
HERE, UNAVAILABLE = Path(__file__).parent, 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("workers", "rounds"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--size", type=float, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    options = parser.parse_args()
    try:
        import ray
    except ImportError as missing:
        print(f"{missing} (python -m pip install ray)", file=sys.stderr)
        return UNAVAILABLE
    print(json.dumps({"ray": measured(ray, options)}))
    return 0


def measured(ray: Any, options: argparse.Namespace) -> list[float]:
    import torch
    from safetensors.torch import load_file

    room = 2 * options.checkpoint.stat().st_size + (200 << 20)
    # a short name: Ray's sockets lie below it
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as sockets:
        ray.init(
            num_cpus=options.workers + 1, object_store_memory=room, include_dashboard=False, log_to_driver=False,
            logging_level="ERROR", _temp_dir=sockets, _node_ip_address="127.0.0.1",
            runtime_env={"env_vars": {"PYTHONPATH": str(HERE)}},
        )  # fmt: skip
        try:
            weights = {name: value.view(torch.int16).numpy() for name, value in load_file(options.checkpoint).items()}
            actor = ray.remote(num_cpus=1)(Holder)
            holders = [actor.remote(options.size) for _ in range(options.workers)]
            ray.get([holder.ready.remote() for holder in holders])
            seconds = []
            for _ in range(options.rounds + 1):
                started = time.perf_counter()
                kept = ray.put(weights)
                ray.get([holder.take.remote(kept) for holder in holders])
                seconds.append(time.perf_counter() - started)
                del kept
            return seconds[1:]  # the first one touches fresh pages
        finally:
            ray.shutdown()


class Holder:
    """One actor."""

    def __init__(self, megabytes: float):
        import torch
        from model import Served

        torch.set_num_threads(1)
        self.torch, self.served = torch, Served(megabytes)

    def ready(self) -> None:
        """Returns when the actor is there."""

    def take(self, weights: dict[str, Any]) -> None:
        bits = self.torch.from_numpy
        self.served.load_state_dict({n: bits(each).view(self.torch.bfloat16) for n, each in weights.items()})


if __name__ == "__main__":
    sys.exit(main())
