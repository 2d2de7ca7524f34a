"""A long run: `make soak SECONDS=600 SEED=1`. Publishing without a break on real processes, while everything breaks.

At the end it prints what happened, and whether memory, disk, shared memory and the server's memory stayed flat: the
peak of the last third may be at most FLAT times the peak of the first third, and a little. Exit code 1 if anything was
not as it should be.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

from soak_fleet import FILE_WORKERS, TORCH_WORKERS, Fleet

WORKERS = (*FILE_WORKERS, *TORCH_WORKERS)
#: growth that counts as none, and MB that things may differ by between two moments
FLAT, SLACK_MB, MEMORY_SLACK_MB = 1.3, 8.0, 24.0
#: what a publisher's store keeps of each version for ever: its name, its release
RECORDS_MB = 0.01
#: a fault that is over has to be over for everybody within so long
RECOVERY_S = 60.0
_SAMPLE_S = 0.5
_WAITING = 3  # checkpoints that lie in the folder and are not published


class Soak:
    """One run. `faults` are done one after the other: the next one when the fleet is well again."""

    def __init__(self, fleet: Fleet, seed: int, seconds: float):
        self.fleet, self._random = fleet, random.Random(seed)
        self.begin, self.seconds = time.monotonic(), seconds
        self.faults, self.recoveries, self.slowest_s = Counter[str](), 0, 0.0
        self.series: dict[str, list[tuple[float, float]]] = defaultdict(list)
        self.applied = set[str]()
        self._order, self._since = (0, 0), 0.0  # of the fault at hand
        self._sampled = 0.0
        self._late = 0
        self._kinds: list[Callable[[], str]] = [
            self.kill_worker, self.kill_worker, self.end_worker, self.kill_publisher, self.end_publisher,
            self.kill_server, self.empty_server, self.roll_back, self.join,
        ]  # fmt: skip
        self._left: list[Callable[[], str]] = []

    @property
    def passed_s(self) -> float:
        return time.monotonic() - self.begin

    def run(self) -> None:
        for name in ("publisher", *WORKERS):
            self.fleet.start(name)
        self._wait(lambda: len(self.fleet.serving()) == len(WORKERS), "all workers serve")
        pause_until = self.passed_s + 1
        while self.passed_s < self.seconds:
            self._step()
            if self.passed_s < pause_until:
                continue
            if self._since == 0:
                self._fault()
            elif self._recovered():
                self.recoveries += 1
                self.slowest_s = max(self.slowest_s, time.monotonic() - self._since)
                self._since = 0.0
                pause_until = self.passed_s + self._random.uniform(0, min(2.0, self.seconds / 60))
            elif time.monotonic() - self._since > RECOVERY_S:
                self.fleet.problems.append(f"not well {RECOVERY_S:.0f} s after a fault: {self.fleet.serving()}")
                self._since = 0.0
        newest = f"v{len(self.fleet.contents)}"
        self._wait(lambda: newest == f"v{self.fleet.published()}", f"{newest} is published", feed=False)

        def there() -> bool:
            return set(WORKERS) <= {name for name, (_, version) in self.fleet.serving().items() if version == newest}

        self._wait(there, f"all serve {newest}", feed=False)
        self._sample()
        for name in list(self.fleet.running):
            self.fleet.end(name)
        if left := [str(folder) for folder in self.fleet.shared_folders() if folder.exists()]:
            self.fleet.problems.append(f"left in shared memory: {left}")

    # ------------------------------------------------------------------ steps

    def _step(self, *, feed: bool = True) -> None:
        fleet = self.fleet
        if feed and len(fleet.contents) - fleet.published() < _WAITING:
            fleet.next_version()
        fleet.take_acks()
        self.applied |= {version for _, version in fleet.serving().values()}
        fleet.check_alive()
        if time.monotonic() - self._sampled > _SAMPLE_S:
            self._sample()
        time.sleep(0.02)

    def _sample(self) -> None:
        self._sampled = time.monotonic()
        for name, value in self.fleet.usage().items():
            self.series[name].append((self.passed_s, value))

    def _wait(self, condition: Callable[[], bool], what: str, *, feed: bool = True) -> None:
        deadline = time.monotonic() + RECOVERY_S
        while not condition():
            if time.monotonic() > deadline:
                self.fleet.problems.append(f"not within {RECOVERY_S:.0f} s: {what}; {self.fleet.serving()}")
                return
            self._step(feed=feed)

    def _fault(self) -> None:
        """Each kind once, in an order of its own, then again."""
        if not self._left:
            self._left = self._random.sample(self._kinds, len(self._kinds))
        self._order = max((order for order, _ in self.fleet.serving().values()), default=self._order)
        self._since = time.monotonic()
        self.faults[self._left.pop()()] += 1

    def _recovered(self) -> bool:
        """All workers serve something that was released after the fault."""
        serving = self.fleet.serving()
        return all(name in serving and serving[name][0] > self._order for name in WORKERS)

    # ------------------------------------------------------------------ faults

    def kill_worker(self) -> str:
        name = self._random.choice(WORKERS)
        self.fleet.kill(name)
        self.fleet.start(name)
        return "kill -9 of a worker"

    def end_worker(self) -> str:
        name = self._random.choice(WORKERS)
        self.fleet.end(name)
        self.fleet.start(name)
        return "SIGTERM and restart of a worker"

    def kill_publisher(self) -> str:
        self.fleet.kill("publisher")
        self.fleet.start("publisher")
        return "kill -9 of the publisher"

    def end_publisher(self) -> str:
        self.fleet.end("publisher")
        self.fleet.start("publisher")
        return "SIGTERM and restart of the publisher"

    def kill_server(self) -> str:
        self.fleet.server.kill()
        self.fleet.server.start()
        return "kill -9 of the server, back with its data"

    def empty_server(self) -> str:
        self.fleet.take_acks()
        self.fleet.server.kill()
        self.fleet.server.start(empty=True)
        self.fleet.forget_cursors()
        return "kill -9 of the server, back empty"

    def roll_back(self) -> str:
        back = self._random.randrange(1, 5)
        if not self.fleet.rollback(f"v{max(self.fleet.published() - back, 1)}"):
            self.fleet.problems.append("a rollback failed")
        return "rollback"

    def join(self) -> str:
        self._late += 1
        name = f"late{self._late}"
        self.fleet.start(name)
        self._wait(lambda: name in self.fleet.serving(), f"{name} serves")
        self.fleet.end(name)
        return "join and leave of a worker"


def report(soak: Soak) -> bool:
    """Prints what happened. Whether it was as it should be."""
    fleet = soak.fleet
    reads, torn = fleet.torn()
    back = fleet.back()
    problems = [*fleet.problems, *(f"torn read: {text}" for text in torn[:10])]
    print(f"{'versions published':44} {fleet.published()}")
    print(f"{'versions seen in service':44} {len(soak.applied)}")
    for evidence, count in sorted(fleet.acks.items()):
        print(f"{'acks ' + evidence:44} {count}")
    for kind, count in sorted(soak.faults.items()):
        print(f"{'fault: ' + kind:44} {count}")
    print(f"{'recoveries':44} {soak.recoveries}, the slowest in {soak.slowest_s:.1f} s")
    print(f"{'looks at what is served':44} {reads}")
    print(f"{'torn reads':44} {len(torn)}")
    print(f"{'steps back of a killed worker':44} {len(back)}")
    print(f"{'MB':24} {'start':>9} {'first third':>12} {'last third':>12} {'end':>9}")
    last_s = max((samples[-1][0] for samples in soak.series.values()), default=0.0)
    for name, samples in sorted(soak.series.items()):
        early = max((value for at, value in samples if at <= last_s / 3), default=0.0)
        late = max((value for at, value in samples if at >= 2 * last_s / 3), default=0.0)
        slack = MEMORY_SLACK_MB if name.startswith("memory") else SLACK_MB
        kept = RECORDS_MB * fleet.published() if name == "disk publisher" else 0.0
        flat = late <= FLAT * early + slack + kept
        print(
            f"{name:24} {samples[0][1]:9.1f} {early:12.1f} {late:12.1f} {samples[-1][1]:9.1f} {'' if flat else 'GREW'}"
        )
        if not flat:
            problems.append(f"{name} grew from {early:.1f} to {late:.1f} MB")
    if len(back) > soak.faults["kill -9 of a worker"]:
        problems.append(f"files went back more often than workers were killed: {back}")
    if not reads:
        problems.append("nobody looked at what is served")
    for problem in problems:
        print(f"PROBLEM: {problem}")
    print("as it should be" if not problems else f"{len(problems)} problems")
    return not problems


def main(seconds: float, seed: int) -> int:
    """Returns the exit code."""
    print(f"seed {seed}, {seconds:.0f} s", flush=True)
    with tempfile.TemporaryDirectory(prefix="refleet-soak-") as folder:
        fleet = Fleet(Path(folder), seed)
        soak = Soak(fleet, seed, seconds)
        try:
            soak.run()
            good = report(soak)
        finally:
            fleet.close()
    return 0 if good else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    given = parser.parse_args()
    sys.exit(main(given.seconds, given.seed))
