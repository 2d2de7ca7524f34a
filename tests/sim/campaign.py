"""Many seeds in one process, the kinds of faults that a campaign must have seen, and the seeds that are kept."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from .events import NAMES, POINTS
from .faults import RATES
from .run import Outcome, run_seed
from .seams import installed

_KEPT = Path(__file__).with_name("seeds.txt")

#: whatever a campaign of a thousand seeds does not see is a fault of the simulator
FAULT_KINDS = (
    *sorted(RATES), *(f"event.{name}" for name in sorted(NAMES)), *POINTS,
    "net.away", "server.full", "disk.torn", "kill.at-io", "kill.at-point", "StaleEpoch", "PublisherBusy", "StoreFull",
)  # fmt: skip


def batch(seeds: Iterable[int]) -> list[Outcome]:
    """Runs these seeds, one after the other."""
    with installed():
        return [run_seed(seed) for seed in seeds]


def known_seeds() -> list[int]:
    """Seeds that failed once, each with its reason: run for ever."""
    lines = _KEPT.read_text().splitlines()
    return [int(line.split()[0]) for line in lines if line.strip() and not line.startswith("#")]
