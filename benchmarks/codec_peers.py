"""Bytes and speed of refleet's codec against other codecs, on the steps of benchmarks/checkpoints.py.

    python benchmarks/codec_peers.py [--quick] [--regimes rl-1e-6 ...] [--json FILE] [--plot FILE.png]

A checkpoint's tensors are put together in the order of their names, and cut into blocks of LIMITS.block_bytes; every
codec gets the same blocks. Every result is decoded and compared bit for bit; where other bits come back, it says so.
Sizes are means over the steps of a regime, in % of the checkpoint; entropies of the same data beside them (entropy.py).
Speeds are of the regime's first step, medians: encoding as a share of what reading two streams costs (libc's memcmp of
as many bytes), decoding as a share of a memcpy, each taken right before. Who can, decodes in place. One thread is timed
by its processor time, several by the wall.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import plots
import torch
from codec_forms import OWN, PLAIN, Bytes, Form
from codec_packages import packages
from entropy import bounds
from numpy.typing import NDArray
from refleet.common.limits import LIMITS
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from safetensors import safe_open
from yardstick import Threads, Yardstick

DTYPES = {torch.bfloat16: "BF16", torch.float32: "F32"}
SPEEDS = ("rl-1e-6", "rl-1e-5", "sft-1e-4", "unrelated", "sft-1e-4-fp32")
ENOUGH_S = 3.0  # a codec that took this long on a regime isn't run again: fewer steps, fewer rounds


@dataclass(slots=True)
class Row:
    """One codec on one regime. `of_compare` and `of_copy` by number of threads; `failed`: why there is nothing."""

    regime: str
    codec: str
    size: float = 0.0  # share of the checkpoint, mean of the steps
    sizes: list[int] = field(default_factory=list)
    in_place: bool = False
    encode_gb_s: dict[int, float] = field(default_factory=dict)
    decode_gb_s: dict[int, float] = field(default_factory=dict)
    of_compare: dict[int, float] = field(default_factory=dict)
    of_copy: dict[int, float] = field(default_factory=dict)
    failed: str = ""


def read(path: Path) -> tuple[Bytes, list[int], str]:
    """All tensors of a checkpoint (one dtype), in the order of their names; where each ends; the dtype."""
    with safe_open(path, "pt") as file:
        tensors = [file.get_tensor(name) for name in sorted(file.keys())]
    (dtype,) = {tensor.dtype for tensor in tensors}
    parts = [tensor.contiguous().view(torch.uint8).numpy().reshape(-1) for tensor in tensors]
    return np.concatenate(parts), np.cumsum([part.size for part in parts]).tolist(), DTYPES[dtype]


def touched(new: Bytes, base: Bytes, ends: list[int]) -> NDArray[np.bool_]:
    """True for the bytes of tensors that changed at all: one that did not costs next to nothing, whatever the codec."""
    found = np.zeros(new.size, bool)
    for start, end in pairwise([0, *ends]):
        found[start:end] = not np.array_equal(new[start:end], base[start:end])
    return found


def entropies(new: Bytes, base: Bytes, ends: list[int], dtype: str) -> dict[str, float]:
    """Shares of the checkpoint, by name."""
    inside = touched(new, base, ends)
    found = bounds(new[inside], base[inside], dtype) | {"alone": bounds(new, base, dtype)["alone"]}
    return {name: size / new.size for name, size in found.items()}


class Step:
    """The blocks of one step, and the memory they are decoded into."""

    def __init__(self, new: Bytes, base: Bytes, dtype: str):
        self.new, self.base, self.dtype, self.out = new, base, dtype, np.empty_like(new)
        self.cuts = [slice(at, at + LIMITS.block_bytes) for at in range(0, new.size, LIMITS.block_bytes)]

    def encode(self, form: Form, threads: Threads) -> list[tuple[Any, int]]:
        return threads.each(lambda cut: form.encode(self.new[cut], self.base[cut], self.dtype), self.cuts)

    def decode(self, form: Form, sent: list[tuple[Any, int]], threads: Threads) -> float:
        """Seconds; the memory starts as the base where the codec works in place, else as ones."""
        if form.in_place:
            np.copyto(self.out, self.base)
        else:
            self.out.fill(255)

        def one(piece: tuple[slice, tuple[Any, int]]) -> None:
            cut, (data, _) = piece
            out = self.out[cut]
            form.decode(data, out, out if form.in_place else self.base[cut], self.dtype)

        return threads.seconds(lambda: threads.each(one, list(zip(self.cuts, sent, strict=True))))

    def check(self) -> str:
        """What is wrong with the decoded memory; "": nothing."""
        wrong = int(np.count_nonzero(self.out != self.new))
        return f"not bit-exact: {wrong:,} bytes of {self.new.size:,} differ" if wrong else ""


def sizes(form: Form, steps: list[Step], row: Row) -> None:
    one, started = Threads(1), time.perf_counter()
    for step in steps:
        if row.sizes and time.perf_counter() - started > ENOUGH_S:
            break
        sent = step.encode(form, one)
        step.decode(form, sent, one)
        row.failed = step.check()
        if row.failed:
            return
        row.sizes.append(sum(size for _, size in sent))
    row.size = statistics.mean(size / step.new.size for size, step in zip(row.sizes, steps, strict=False))
    row.in_place = form.in_place


def speeds(form: Form, step: Step, count: int, rounds: int, row: Row, *, quietest: bool = False) -> None:
    """Medians of rounds; each round takes the yardsticks right before the codec: the machine may be shared.

    `quietest`: the quickest of all rounds instead, of codec and yardsticks alike.
    """
    threads = Threads(count)
    best, taken, started = Yardstick(step.new, threads), [], time.perf_counter()
    for n in range(rounds + 1):
        compare, copy, began = best.compare(), best.copy(), threads.now()
        sent = step.encode(form, threads)
        encode = threads.now() - began
        taken.append((compare, copy, encode, step.decode(form, sent, threads)))
        if n and time.perf_counter() - started > ENOUGH_S:
            break
    threads.close()
    kept = [tuple(map(min, zip(*taken[1:], strict=True)))] if quietest else taken[1:]
    size = step.new.size / 1e9
    figures = [
        (size / encode, size / decode, compare / encode, copy / decode) for compare, copy, encode, decode in kept
    ]
    medians = [statistics.median(column) for column in zip(*figures, strict=True)]
    for into, value in zip((row.encode_gb_s, row.decode_gb_s, row.of_compare, row.of_copy), medians, strict=True):
        into[count] = value


def bench(files: dict[str, list[Path]], forms: list[Form], options: argparse.Namespace) -> dict[str, Any]:
    """Rows and entropies by regime."""
    rows, limits = [], {}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(files) * len(forms))
        for regime, paths in files.items():
            read_all = [read(path) for path in paths[: options.steps + 1]]
            steps = [Step(new, base, dtype) for (base, _, dtype), (new, _, _) in pairwise(read_all)]
            progress.update(task, description=f"{regime}: entropy")
            found = [entropies(new, base, ends, dtype) for (base, ends, dtype), (new, _, _) in pairwise(read_all)]
            limits[regime] = {name: statistics.mean(one[name] for one in found) for name in found[0]}
            counts = options.threads if regime in options.speeds else []
            for form in forms:
                progress.update(task, description=f"{regime}: {form.name}")
                row = Row(regime, form.name, failed=form.missing)
                rows.append(row)
                if not row.failed:
                    try:
                        sizes(form, steps, row)
                        for count in [] if row.failed else counts:
                            speeds(form, steps[0], count, options.rounds, row)
                    except Exception as reason:  # somebody else's package; our own must work
                        if form is OWN or form in PLAIN:
                            raise
                        row.failed = f"{type(reason).__name__}: {str(reason)[:100]}"
                if row.failed and not form.missing and (form is OWN or form in PLAIN):
                    raise SystemExit(f"{regime}, {form.name}: {row.failed}")
                progress.advance(task)
            if options.json:  # what is there already, should the rest fail
                options.json.write_text(json.dumps(plain({"rows": rows, "entropy": limits}), indent=1))
    return {"rows": rows, "entropy": limits}


def plain(found: dict[str, Any]) -> dict[str, Any]:
    return {"entropy": found["entropy"], "rows": [asdict(row) for row in found["rows"]]}


def percent(share: float) -> str:
    value = 100 * share
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".")


def show(found: dict[str, Any], options: argparse.Namespace, console: Console) -> None:
    rows: dict[tuple[str, str], Row] = {(row.codec, row.regime): row for row in found["rows"]}
    regimes, names = list(found["entropy"]), list(dict.fromkeys(row.codec for row in found["rows"]))
    table = Table("% of the checkpoint", *regimes, title="bytes sent")
    for name in names:
        table.add_row(name, *("-" if rows[name, r].failed else percent(rows[name, r].size) for r in regimes))
    table.add_section()
    for name in ("order 0", "given exponent", "alone"):
        table.add_row(f"entropy, {name}", *(percent(found["entropy"][r][name]) for r in regimes))
    low = {r: min(limit["given exponent"], limit["alone"]) for r, limit in found["entropy"].items()}
    table.add_row("refleet / lower entropy", *(f"{rows[OWN.name, r].size / max(low[r], 1e-9):.3f}" for r in regimes))
    console.print(table)
    timed = [r for r in regimes if rows[OWN.name, r].of_compare]
    for count in options.threads if timed else []:
        title = f"encoding, % of two-stream read | decoding, % of memcpy; {count} thread(s)"
        table = Table("", *timed, title=title)
        for name in names:
            cells = [rows[name, r] for r in timed]
            table.add_row(
                name + (" *" if any(c.in_place for c in cells) else ""),
                *("-" if c.failed else f"{percent(c.of_compare[count])} | {percent(c.of_copy[count])}" for c in cells),
            )
        console.print(table)
    console.print("* decoded in place")
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in found["rows"]:
        if row.failed:
            reasons.setdefault((row.codec, row.failed.split(":")[0]), []).append(f"{row.regime} {row.failed}")
    for (name, _), where in reasons.items():
        said = where[0].split(" ", 1)[1]
        console.print(f"{name}: {said} ({len(where)} of {len(regimes)} regimes)", highlight=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=checkpoints.HOME, help="where the checkpoints are kept")
    parser.add_argument("--quick", action="store_true", help="a tiny model: only to see that it runs")
    parser.add_argument("--regimes", nargs="+", help="only these")
    parser.add_argument("--codecs", nargs="+", help="only those whose names contain one of these")
    parser.add_argument(
        "--speeds", nargs="*", default=SPEEDS, help=f"regimes to take the time of ({', '.join(SPEEDS)})"
    )
    parser.add_argument("--steps", type=int, default=3, help="steps of each regime")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2], help="none: sizes only")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--plot", type=Path, help="draw the sizes into this PNG (needs matplotlib)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    files = checkpoints.ensure(options.out, quick=options.quick)
    if options.regimes:
        if unknown := set(options.regimes) - files.keys():
            parser.error(f"no regime {', '.join(sorted(unknown))}: there are {', '.join(files)}")
        files = {name: files[name] for name in options.regimes}
    forms = [OWN, *PLAIN, *packages()]
    if options.codecs:
        forms = [f for f in forms if f is OWN or any(part in f.name for part in options.codecs)]
    found = bench(files, forms, options)
    console = Console(width=None if sys.stdout.isatty() else 180)
    show(found, options, console)
    console.print(
        f"{platform.machine()}, torch {torch.__version__}, numpy {np.__version__}, medians of {options.rounds}"
    )
    if options.plot:
        console.print(plots.draw(plots.sizes, plain(found), options.plot))
    return 0


if __name__ == "__main__":
    sys.exit(main())
