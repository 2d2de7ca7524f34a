"""Which faults a run has and how often, and the host on which the processes of one machine run."""

from __future__ import annotations

from collections import Counter

from .disk import Disk
from .kernel import WALL_S, Kernel

#: chance of each fault per call that it can hit, where a run has it at all
RATES = {
    "net.refused": 0.02,
    "net.lost-reply": 0.02,
    "net.late-effect": 0.02,
    "net.duplicate": 0.05,
    "net.slow": 0.02,
    "read.repeated": 0.2,
    "read.reordered": 0.3,
    "log.flipped": 0.15,
    "control.flipped": 0.1,
    "index.flipped": 0.1,
    "index.truncated": 0.1,
    "chunk.flipped": 0.1,
    "chunk.truncated": 0.1,
    "engine.fails-prepare": 0.15,
    "engine.fails-apply": 0.15,
    "engine.raises": 0.1,
    "engine.hangs": 0.1,
    "engine.half-applies": 0.15,
    "engine.lies-read-back": 0.05,
    "engine.lies-probe": 0.3,
}


class Faults:
    """The faults of one run: some kinds by seed, each at its rate, until `stop`."""

    def __init__(self, run: Kernel, kinds: set[str]):
        self._run, self._rates = run, {kind: RATES[kind] for kind in sorted(kinds)}
        self.counts: Counter[str] = Counter()

    def hit(self, kind: str) -> bool:
        rate = self._rates.get(kind)
        if rate is None or self._run.rng.random() >= rate:
            return False
        self.count(kind)
        return True

    def count(self, kind: str) -> None:
        self.counts[kind] += 1
        self._run.note(f"FAULT {kind}")

    def stop(self) -> None:
        self._rates = {}


class Host:
    """One machine: a disk, a clock, a link to the server."""

    def __init__(self, name: str, run: Kernel, faults: Faults):
        self.name, self.counts = name, faults.counts
        self.clock_off_s = 0.0
        self.disk = Disk(lambda: int((run.now + WALL_S + self.clock_off_s) * 1e9))
        self.disk.make_folder("/tmp")
        self.cut_off_until = 0.0
        self.rotten_s = -1.0  # when bit rot got at its disk last

    @property
    def rotten(self) -> bool:
        """Whether bit rot ever got at its disk."""
        return self.rotten_s >= 0.0
