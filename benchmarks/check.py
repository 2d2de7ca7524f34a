"""Guards what benchmarks measured before: `make bench-check` fails when a ratio fell by more than its noise.

    python benchmarks/check.py [--store] [--rounds 9] [--json FILE]

The data are steps made from integers of a seeded generator, so sizes must come out to the byte: any growth fails. (With
another numpy or zstd the data or the frames may differ: then sizes may grow by 1 %.) Speeds are shares of what the
machine can do (see codec_peers.py), in processor time, the quickest of several rounds each; their noise was measured
when they were stored. The best of several takes must reach the stored median less its noise, at the second try at the
latest. They are compared on the kind of processor they were stored on; elsewhere they are shown. `--store` keeps what
was measured now, after a change that was meant to be.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from codec_forms import OWN, PLAIN, Bytes
from codec_peers import Row, Step, sizes, speeds
from entropy import bounds
from refleet.common.limits import MIB
from rich.console import Console
from rich.progress import track
from rich.table import Table

STORED = Path(__file__).parent / "ratios.json"
#: steps by name: dtype and standard deviation of the noise on masters ~ N(0, 0.02); None: other masters
STEPS: dict[str, tuple[str, float | None]] = {
    "rl": ("BF16", 7.7e-7), "rl-10x": ("BF16", 7.7e-6), "fine-tune": ("BF16", 5e-5), "unrelated": ("BF16", None),
    "fine-tune-fp32": ("F32", 5e-5), "unrelated-fp32": ("F32", None),
}  # fmt: skip
NOISE_MIN, NOISE_MAX, GROWTH = 0.25, 0.5, 0.01  # of speeds; of sizes with other libraries


@dataclass(frozen=True, slots=True)
class Line:
    """One comparison. `floor`/`ceiling`: what still passes."""

    name: str
    fresh: float
    stored: float | None
    allowed: float
    larger_is_better: bool
    counts: bool = True

    @property
    def bad(self) -> bool:
        if self.stored is None or not self.counts:
            return False
        return self.fresh < self.allowed if self.larger_is_better else self.fresh > self.allowed


def make(dtype: str, noise: float | None, size: int) -> Step:
    rng = np.random.default_rng(7)
    count = size // (2 if dtype == "BF16" else 4)
    masters = np.float32(0.02) * rng.standard_normal(count, np.float32)
    other = np.float32(0.02 if noise is None else noise) * rng.standard_normal(count, np.float32)
    after = other if noise is None else masters + other
    return Step(_cast(after, dtype), _cast(masters, dtype), dtype)


def _cast(values: np.ndarray[Any, np.dtype[np.float32]], dtype: str) -> Bytes:
    bits = values.view(np.uint32)
    if dtype == "BF16":
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2").view(np.uint8)
    return bits.view(np.uint8)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Sizes of refleet and of the plain forms in bytes, shares of the entropy, speeds with their noise."""
    digest, found_sizes, found_speeds = hashlib.sha256(), {}, {}
    for name, (dtype, noise) in track(STEPS.items(), "", console=Console(stderr=True), transient=True):
        step = make(dtype, noise, options.mib * MIB)
        digest.update(step.new)
        digest.update(step.base)
        own = Row(name, OWN.name)
        sizes(OWN, [step], own)
        if own.failed:
            raise SystemExit(f"{name}: {own.failed}")
        limits = bounds(step.new, step.base, dtype)
        lowest = min(limits["given exponent"], limits["alone"])
        found_sizes[name] = {"bytes": own.sizes[0], "of_entropy": own.sizes[0] / lowest}
        for form in PLAIN if options.peers else ():
            row = Row(name, form.name, failed=form.missing)
            if not row.failed:
                sizes(form, [step], row)
                found_sizes[name][f"x {form.name}"] = row.sizes[0] / own.sizes[0]
        takes = []
        for _ in range(3):
            row = Row(name, OWN.name)
            speeds(OWN, step, 1, options.rounds, row, quietest=True)
            takes.append((row.of_compare[1], row.of_copy[1]))
        for what, values in zip(("encode", "decode"), zip(*takes, strict=True), strict=True):
            middle = statistics.median(values)
            noise_seen = (max(values) - min(values)) / middle
            found_speeds[f"{name} {what}"] = {
                "share": middle, "best": max(values), "noise": min(max(NOISE_MIN, noise_seen), NOISE_MAX)
            }  # fmt: skip
    return {"machine": machine(), "libraries": libraries(), "data": digest.hexdigest(), "mib": options.mib,
            "sizes": found_sizes, "speeds": found_speeds}  # fmt: skip


def machine() -> str:
    """The kind of processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    wanted = ("model name", "cpu family", "model\t")
    return ", ".join(dict.fromkeys(line.split(":", 1)[1].strip() for line in lines if line.startswith(wanted)))


def libraries() -> dict[str, str]:
    return {"numpy": np.__version__, "zstd": ".".join(map(str, zstandard.ZSTD_VERSION))}


def compare(fresh: dict[str, Any], stored: dict[str, Any]) -> list[Line]:
    same = all(fresh[what] == stored.get(what) for what in ("data", "libraries", "mib"))
    growth = 0.0 if same else GROWTH
    lines = []
    for name, now in fresh["sizes"].items():
        before = stored.get("sizes", {}).get(name, {})
        what = "bytes" if same else "of_entropy"
        old = before.get(what)
        lines.append(Line(f"{name}: {what}", now[what], old, (old or 0) * (1 + growth), False))
    here = fresh["machine"] == stored.get("machine")
    for name, now in fresh["speeds"].items():
        before = stored.get("speeds", {}).get(name)
        old = before["share"] if before else None
        least = before["share"] * (1 - before["noise"]) if before else 0.0
        of = "two-stream read" if name.endswith("encode") else "memcpy"
        lines.append(Line(f"{name}: share of {of}", now["best"], old, least, True, counts=here))
    return lines


def show(lines: list[Line], console: Console) -> None:
    table = Table("", "now", "stored", "allowed", "")
    for line in lines:
        number = "{:,.0f}" if line.fresh > 1000 else "{:.3f}"
        verdict = "WORSE" if line.bad else "not compared" if line.stored is None or not line.counts else "ok"
        old = "-" if line.stored is None else number.format(line.stored)
        table.add_row(line.name, number.format(line.fresh), old, number.format(line.allowed), verdict)
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--mib", type=int, default=16, help="of each step; other sizes than the stored one compare less"
    )
    parser.add_argument("--peers", action="store_true", help="also the plain forms, which --store keeps for reference")
    parser.add_argument("--store", action="store_true", help=f"write {STORED.name}")
    parser.add_argument("--against", type=Path, default=STORED)
    parser.add_argument("--json", type=Path, help="write what was measured to this file")
    options = parser.parse_args()
    fresh = measure(options)
    text = json.dumps(fresh, indent=1) + "\n"
    if options.json:
        options.json.write_text(text)
    if options.store:
        options.against.write_text(text)
    if not options.against.exists():
        raise SystemExit(f"nothing is stored in {options.against}: start with --store")
    stored = json.loads(options.against.read_text())
    lines = compare(fresh, stored)
    if any(line.bad and line.larger_is_better for line in lines):  # other jobs on the machine pass, a slow codec stays
        again = measure(options)["speeds"]
        for name, now in fresh["speeds"].items():
            now["best"] = max(now["best"], again[name]["best"])
        lines = compare(fresh, stored)
    console = Console(width=None if sys.stdout.isatty() else 110)
    show(lines, console)
    bad = [line.name for line in lines if line.bad]
    if bad:
        console.print(f"worse than {options.against.name} by more than the noise: {', '.join(bad)}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
