"""What a step costs the disks of publisher and worker, and how long an earlier version takes to come back.

    python benchmarks/store_cost.py [--steps 110] [--size 40] [--json FILE]

Steps of RL (benchmarks/steps.py) go from a publisher to a worker in one process. Printed: bytes written per step on
both sides against the bytes that changed and those of the model, and the time until every tensor of a version 1, 10 and
100 steps back is in memory and verified: in the worker itself, and after a restart, each against a memcpy of the model
and against staging the newest step.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import model
import steps
import tables
from host import memcpy
from refleet.common.memory_stream import MemoryServer, MemoryStream
from refleet.common.store import Store
from refleet.common.types import Manifest
from refleet.publisher import Publisher
from refleet.worker import Worker
from refleet.worker.memory_engine import MemoryEngine
from rich.console import Console
from rich.progress import track

_QUIET_S = 0.3


def timed(step: Callable[[], object], *, rounds: int = 3) -> float:
    """Median seconds."""
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def wait_quiet(stores: dict[str, Store]) -> None:
    """Until nothing is written any more."""
    before: list[int] = []
    while before != (before := [store.size_bytes for store in stores.values()]):
        time.sleep(_QUIET_S)


def read_all(store: Store, manifest: Manifest) -> None:
    with store.memory.pinned(manifest.digests):
        store.load(manifest.digests)
        for entry in manifest.tensors:
            store.read(entry.digest, verify=True)


def after_restart(root: Path, manifest: Manifest) -> None:
    with Store(root) as store:
        read_all(store, manifest)


def run(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    server = MemoryServer()
    weights = model.fresh(options.size, seed=0)
    full = model.size_bytes(options.size)
    manifests: list[Manifest] = []
    written: dict[str, list[int]] = {"publisher": [], "worker": []}
    wire, staged, changed = [], [], []
    worker = Worker(
        MemoryStream(server, "m"), model="m", engine=MemoryEngine(), state_dir=folder / "w", worker_id="w",
        keep=options.steps + 1, poll_s=0.02, heartbeat_s=0.2,
    ).start()  # fmt: skip
    with Publisher(MemoryStream(server, "m"), model="m", store=folder / "s", keep=options.steps + 1) as publisher:
        stores = {"publisher": publisher.store, "worker": worker.store}
        for number in track(range(-1, options.steps + 1), console=Console(stderr=True), transient=True):
            before = {name: store.size_bytes for name, store in stores.items()}
            moved = steps.change("first" if number < 0 else "rl", weights, seed=number + 1)
            published = publisher.publish(model.as_tensors(weights))
            ack = published.wait(workers=1, timeout_s=120)["w"]
            manifests.append(publisher.store.manifest(published.release.fingerprint))
            if number <= 0:
                wait_quiet(stores)  # the first version is written whole behind everybody's back
            else:
                changed.append(moved)
                wire.append(published.release.payload_bytes)
                staged.append(ack.timings_ms["stage"] / 1000)
                for name, store in stores.items():
                    written[name].append(store.size_bytes - before[name])
        rows = {}
        for back in (n for n in (1, 10, 100) if n <= options.steps):
            manifest = manifests[-1 - back]
            live = timed(lambda manifest=manifest: read_all(worker.store, manifest), rounds=1)
            again = timed(lambda manifest=manifest: after_restart(folder / "w", manifest))
            rows[back] = {"live_s": live, "restart_s": again}
        worker.stop()
    return {
        "full_bytes": full, "changed_bytes": full * statistics.median(changed), "wire_bytes": statistics.median(wire),
        "memcpy_s": memcpy(full), "stage_s": statistics.median(staged), "back": rows,
        "written_median": {name: statistics.median(each) for name, each in written.items()},
        "written_mean": {name: statistics.fmean(each) for name, each in written.items()},
    }  # fmt: skip


def show(seen: dict[str, Any], console: Console) -> None:
    full, changed = seen["full_bytes"], seen["changed_bytes"]
    title = f"one step of {full / 1e6:.0f} MB bf16, {changed / full:.1%} of the elements changed"
    table = tables.table(title, "", "bytes, median", "/ changed bytes", "/ model", "with anchors, mean", "/ model")
    wire = seen["wire_bytes"]
    table.add_row("wire", f"{wire:,.0f}", f"{wire / changed:.2f}", f"{wire / full:.4f}")
    for name, median in seen["written_median"].items():
        mean = seen["written_mean"][name]
        table.add_row(name, f"{median:,.0f}", f"{median / changed:.2f}", f"{median / full:.4f}",
                      f"{mean:,.0f}", f"{mean / full:.4f}")  # fmt: skip
    console.print(table)
    table = tables.table("until an earlier version is in memory and verified", "steps back", "/ memcpy",
                         "/ staging a step", "after a restart / memcpy", "/ staging a step")  # fmt: skip
    copied, stage = seen["memcpy_s"], seen["stage_s"]
    for back, row in seen["back"].items():
        ratios = [row["live_s"] / copied, row["live_s"] / stage, row["restart_s"] / copied, row["restart_s"] / stage]
        table.add_row(str(back), *(f"{ratio:.1f}" for ratio in ratios))
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=110)
    parser.add_argument("--size", type=float, default=40, help="MB of the model")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="refleet-store-"))
    try:
        seen = run(folder, options)
    finally:
        shutil.rmtree(folder)
    show(seen, tables.console())
    if options.json:
        options.json.write_text(json.dumps(seen, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
