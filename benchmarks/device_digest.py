"""What it costs to digest a tensor where it lies, against a copy and against bringing it to the host, in the same run.

    python benchmarks/device_digest.py

On the CPU: memcpy, `tensor_digest`. With CUDA also: a copy on the device, a copy to the host with `tensor_digest`
there, `device_digest` of one tensor, and `device_digests` of the same bytes as 64 tensors. All take turns; shown is the
median of the rounds. GB/s of tensor: a byte that is read and written counts once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
from refleet.common.digest import tensor_digest_of
from refleet.common.tensors import tensor_blocks
from refleet.worker.device_digest import device_digest, device_digests
from rich.console import Console
from rich.table import Table

HOST = "on the host"


def measure(tensor: torch.Tensor, rounds: int) -> dict[str, float]:
    """GB/s by what was done, the yardsticks first."""
    copy = torch.empty_like(tensor)
    steps: dict[str, Callable[[], object]] = {
        "copy": lambda: copy.copy_(tensor),
        HOST: lambda: tensor_digest_of(tensor_blocks(tensor)),
    }
    if tensor.is_cuda:
        parts = tensor.chunk(64)
        steps["device_digest"] = lambda: device_digest(tensor)
        steps["64 tensors"] = lambda: list(device_digests(parts))
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            synchronize()
            started = time.perf_counter()
            step()
            synchronize()
            seconds[name].append(time.perf_counter() - started)
    # the first round touches fresh pages and loads kernels
    return {name: tensor.nbytes / statistics.median(seen[1:]) / 1e9 for name, seen in seconds.items()}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def noise(mib: int, device: str) -> torch.Tensor:
    """bf16 weights: none of the steps looks at values, but a GPU's clock depends on the bits that flip."""
    return torch.randn(mib << 19, dtype=torch.bfloat16, device=device)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=128, help="size of the tensor on the CPU")
    parser.add_argument("--cuda-mib", type=int, default=1024, help="size of the tensor on the GPU")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    if min(options.mib, options.cuda_mib, options.rounds) < 1:
        parser.error("sizes and rounds must be positive")
    seen = {"cpu": measure(noise(options.mib, "cpu"), options.rounds)}
    if torch.cuda.is_available():
        small = noise(8, "cpu")[1:]
        if device_digest(small) != device_digest(small.cuda()):
            raise SystemExit("the digests of CPU and CUDA differ")
        seen["cuda"] = measure(noise(options.cuda_mib, "cuda"), options.rounds)
    if options.json:
        print(json.dumps(seen))
        return 0
    where = [f"{torch.get_num_threads()} threads"]
    where += [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    table = Table(
        "device", "step", "GB/s", "x copy", f"x {HOST}", title=f"torch {torch.__version__}, {', '.join(where)}"
    )
    for device, speeds in seen.items():
        copy, host = speeds["copy"], speeds[HOST]
        for step, speed in speeds.items():
            table.add_row(device, step, f"{speed:.2f}", f"{speed / copy:.2f}", f"{speed / host:.2f}")
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
