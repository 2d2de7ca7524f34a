"""The command line: many seeds over processes, one with a trace, or the planted bugs."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from .campaign import FAULT_KINDS, batch, known_seeds
from .planted import PLANTED, hunt
from .run import Outcome, run_seed
from .seams import installed


@dataclass
class Report:
    """What a campaign came to."""

    seeds: int = 0
    steps: int = 0
    virtual_s: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[int, str]] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        self.seeds += 1
        self.steps += outcome.steps
        self.virtual_s += outcome.virtual_s
        self.counts += outcome.counts
        if outcome.error is not None:
            self.failures.append((outcome.seed, outcome.error))

    @property
    def silent(self) -> list[str]:
        """Fault kinds that never fired."""
        return [kind for kind in FAULT_KINDS if not self.counts[kind]]


def campaign(seeds: Iterable[int], *, jobs: int) -> Report:
    """Runs the seeds over `jobs` processes."""
    report = Report()
    for outcome in _outcomes(list(seeds), jobs):
        report.add(outcome)
    report.failures.sort()
    return report


def _outcomes(seeds: Sequence[int], jobs: int) -> Iterator[Outcome]:
    size = max(min(100, -(-len(seeds) // (4 * jobs))), 1)
    batches = [seeds[start : start + size] for start in range(0, len(seeds), size)]
    if jobs == 1:
        for each in batches:
            yield from batch(each)
        return
    with multiprocessing.get_context("forkserver").Pool(jobs) as pool:
        for found in pool.imap_unordered(batch, batches):
            yield from found


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python tests/sim", description=__doc__)
    parser.add_argument("--seed", type=int, help="run this one and print what failed")
    parser.add_argument("--trace", action="store_true", help="with --seed: print everything that happened")
    parser.add_argument("--seeds", type=int, default=1000, help="run so many, beside the kept ones")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--planted", action="store_true", help="break each mechanism in turn, and say which seed tells")
    chosen = parser.parse_args(arguments)
    if chosen.seed is not None:
        return _one(chosen.seed, trace=chosen.trace)
    if chosen.planted:
        return _planted()
    return _many(range(chosen.first, chosen.first + chosen.seeds), chosen.jobs)


def _one(seed: int, *, trace: bool) -> int:
    with installed():
        outcome = run_seed(seed, trace=trace)
    print("\n".join(outcome.trace), end="\n" if trace else "")
    if outcome.error:
        print(outcome.where)
    print(
        f"seed {seed}: {outcome.steps} steps, {outcome.virtual_s:.0f} s of virtual time, {outcome.error or 'all holds'}"
    )
    return 1 if outcome.error else 0


def _planted() -> int:
    missed = 0
    for bug in PLANTED:
        seed, error = hunt(bug)
        missed += seed is None
        print(
            f"{bug.invariant:4} {bug.name:60} {'NOT FOUND' if seed is None else f'seed {seed}: {error}'[:160]}",
            flush=True,
        )
    return 1 if missed else 0


def _many(seeds: range, jobs: int) -> int:
    began = time.monotonic()
    report = campaign([*known_seeds(), *seeds], jobs=jobs)
    took = time.monotonic() - began
    for kind in FAULT_KINDS:
        print(f"{report.counts[kind]:9} {kind}")
    print(
        f"{report.seeds} seeds, {report.steps} steps, {report.virtual_s / 3600:.1f} h of virtual time in {took:.0f} s "
        f"({1000 * took / max(report.seeds, 1):.0f} ms a seed)"
    )
    for seed, error in report.failures:
        print(f"FAILED seed {seed}: {error}", file=sys.stderr)
    for kind in report.silent:
        print(f"NEVER HAPPENED: {kind}", file=sys.stderr)
    return 1 if report.failures or report.silent else 0
