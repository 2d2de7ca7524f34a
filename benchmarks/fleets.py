"""A fleet of worker processes, and publishes to it with the time that every part took."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from host import alive, all_ended
from refleet.publisher import Publisher
from refleet.publisher.fleet import fleet as look
from steps import Trainer

HERE, NAME = Path(__file__).parent, "bench"
WORKER = HERE / "bench_worker.py"
#: phases of a worker after it said STAGED, in the order in which they follow each other
_SWITCH = ("prepare", "apply", "read_back", "probe", "persist")


@dataclass(frozen=True, slots=True)
class Span:
    """A phase of one process, in seconds from the start of the publish."""

    who: str
    phase: str
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Run:
    """One publish: seconds until all workers served it."""

    seconds: float
    payload_bytes: int
    full_bytes: int
    changed: float
    pause_ms: float  # in which a worker answered no request, the longest
    spans: list[Span]


class Fleet:
    """Workers that are there, and the publisher that they follow."""

    def __init__(self, publisher: Publisher, traces: dict[str, Path], processes: list[subprocess.Popen[bytes]]):
        self._publisher, self._traces, self._processes = publisher, traces, processes

    def joined(self) -> None:
        while len(look(self._publisher.stream).live) < len(self._processes):
            alive(self._processes)
            time.sleep(0.05)

    def publish(self, trainer: Trainer, kind: str) -> Run:
        """One step of training, and from the start of its publish until every worker serves it."""
        changed = trainer.step(kind)
        stamps: dict[str, float] = {}
        started = time.perf_counter()
        published = self._publisher.publish(
            trainer.path, on_progress=lambda phase, _done, _total: stamps.update({phase: time.perf_counter()})
        )
        released = time.perf_counter()
        acks = published.wait(
            workers=len(self._processes), timeout_s=600, on_progress=lambda *_: alive(self._processes)
        )
        served = time.perf_counter()
        spans = list(_in_a_row("publisher", started, [*stamps.items(), ("release", released)]))
        for worker, path in self._traces.items():
            spans += _worker_spans(worker, path.read_text(), published.version, started)
        release, pause_ms = published.release, max(ack.timings_ms["pause"] for ack in acks.values())
        moved = [Span(s.who, s.phase, s.start - started, s.end - started) for s in spans]
        return Run(served - started, release.payload_bytes, release.full_bytes, changed, pause_ms, moved)


@contextmanager
def fleet(
    url: str, folder: Path, *, workers: int, megabytes: float, share: bool, prefix: tuple[str, ...] = ()
) -> Iterator[Fleet]:
    """`prefix`: words before every worker's command line."""
    names = [f"w{n}" for n in range(workers)]
    traces = {name: folder / f"{name}.trace" for name in names}
    sharing = ["--share", folder / "share"] if share else []
    commands: list[list[object]] = [
        [*prefix, sys.executable, WORKER, "--url", url, "--model", NAME, "--id", name, "--size", megabytes,
         "--state", folder / name, "--trace", traces[name], *sharing]
        for name in names
    ]  # fmt: skip
    with (
        Publisher(url, model=NAME, store=folder / "store", keep=2, take_over=True) as publisher,
        all_ended(commands) as processes,
    ):
        made = Fleet(publisher, traces, processes)
        made.joined()
        yield made


def _in_a_row(who: str, start: float, ends: list[tuple[str, float]]) -> Iterator[Span]:
    for phase, end in ends:
        yield Span(who, phase, start, end)
        start = end


def _worker_spans(who: str, trace: str, version: str, started: float) -> Iterator[Span]:
    """Out of the acks: their instants, and the lengths of the phases between them."""
    lines: list[dict[str, Any]] = [line for line in map(json.loads, trace.splitlines()) if line["at"] >= started]
    at = {line["evidence"]: line for line in lines if line.get("version") == version}
    staged, served = at["STAGED"]["at"], at["SERVING"]["at"]
    lengths = {name: ms / 1000 for name, ms in at["SERVING"]["timings_ms"].items()}
    begun = staged - lengths["verify"] - lengths.get("stage", 0.0)
    if early := [line["at"] for line in lines if "early" in line and line["at"] < begun]:
        yield Span(who, "receive early", early[0], early[-1])
    yield from _in_a_row(who, begun, [("stage", staged - lengths["verify"]), ("verify", staged)])
    ends, now = [], staged
    for name in _SWITCH:
        now += lengths.get(name, 0.0)
        ends.append((name, now))
    yield from _in_a_row(who, staged, [*ends, ("ack", max(served, now))])


def phases_ms(run: Run) -> dict[str, float]:
    """Milliseconds by phase; a worker's one is that of the slowest worker."""
    found: dict[str, float] = {}
    for span in run.spans:
        found[span.phase] = max(found.get(span.phase, 0.0), 1000 * (span.end - span.start))
    return found


def summary(runs: list[Run]) -> dict[str, Any]:
    """Medians, and the spans of the run in the middle, which took `drawn_s`."""
    middle = sorted(runs, key=lambda run: run.seconds)[len(runs) // 2]
    lengths = [phases_ms(run) for run in runs]
    return {
        "served_s": statistics.median(run.seconds for run in runs),
        "seconds": [run.seconds for run in runs],
        "payload_bytes": int(statistics.median(run.payload_bytes for run in runs)),
        "full_bytes": middle.full_bytes,
        "wire_share": statistics.median(run.payload_bytes for run in runs) / middle.full_bytes,
        "pause_ms": statistics.median(run.pause_ms for run in runs),
        "changed": statistics.median(run.changed for run in runs),
        "phases_ms": {name: statistics.median(each.get(name, 0.0) for each in lengths) for name in lengths[0]},
        "drawn_s": middle.seconds,
        "spans": [asdict(span) for span in middle.spans],
    }
