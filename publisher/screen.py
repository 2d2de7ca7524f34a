"""What people see: results and tables on standard output, progress and notes on standard error. 80 columns suffice."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from ..common.messages import Ack
from .compare import OnBytes, silent
from .fleet import Fleet, WorkerView

_PHASES = {"send": "sending", "compare": "comparing"}
OnFleet = Callable[[Fleet, dict[str, Ack]], None]


def size_text(size_bytes: int) -> str:
    """`1.5 MB`: powers of 1000, as disks and networks are sold."""
    value = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def share_text(part: int, whole: int) -> str:
    """`4.7 %` of the whole; small shares never look like none."""
    if not whole:
        return "0 %"
    share = 100 * part / whole
    return "< 0.01 %" if 0 < share < 0.01 else f"{share:.3g} %"


def short(fingerprint: str | bytes | None) -> str:
    """The first 16 hex digits, or a dash."""
    if not fingerprint:
        return "-"
    return (fingerprint if isinstance(fingerprint, str) else fingerprint.hex())[:16]


class Screen:
    """The terminal of one run. Texts of others (messages, errors, names) are never taken for markup."""

    def __init__(self) -> None:
        self.out = Console(file=sys.stdout, markup=False, highlight=False, emoji=False)
        self.err = Console(file=sys.stderr, markup=False, highlight=False, emoji=False)
        self.quiet = False  # with --json: no human output

    @property
    def live(self) -> bool:
        return self.err.is_terminal and not self.quiet

    def say(self, text: str = "") -> None:
        """A line of the result."""
        if not self.quiet:
            self.out.print(text, soft_wrap=True)

    def facts(self, rows: Sequence[tuple[str, str]]) -> None:
        """Names and values below a line of the result."""
        width = max(11, *(len(name) for name, _ in rows))
        for name, value in rows:
            self.say(f"  {name:<{width}}  {value}")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> None:
        """A table; columns named in `right` hold numbers."""
        if self.quiet:
            return
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
        for name in columns:
            numbers = name in right
            table.add_column(
                name, justify="right" if numbers else "left", overflow="fold", no_wrap=numbers, min_width=len(name)
            )
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        with self.out.capture() as printed:
            self.out.print(table)
        self.out.file.writelines(f"{line.rstrip()}\n" for line in printed.get().splitlines())

    def note(self, text: str) -> None:
        """Something worth knowing while a command runs."""
        self.err.print(f"refleet: {text}", soft_wrap=True)

    @contextmanager
    def phases(self) -> Iterator[OnBytes]:
        """Bars for sending and comparing; nothing unless standard error is a terminal."""
        if not self.live:
            yield silent
            return
        with Progress(
            TextColumn("{task.description:<9}", markup=False), BarColumn(24), DownloadColumn(), TransferSpeedColumn(),
            TimeRemainingColumn(compact=True), console=self.err, transient=True,
        ) as progress:  # fmt: skip
            tasks = {phase: progress.add_task(text, total=None, visible=False) for phase, text in _PHASES.items()}

            def on_bytes(phase: str, done: int, total: int) -> None:
                progress.update(tasks[phase], completed=done, total=total, visible=True)

            yield on_bytes

    @contextmanager
    def fleet(self) -> Iterator[OnFleet]:
        """One line per worker, live, while a command waits for them; nothing unless standard error is a terminal."""
        if not self.live:
            yield lambda _fleet, _acks: None
            return
        with Live(console=self.err, transient=True, auto_refresh=False) as live:

            def on_fleet(now: Fleet, acks: dict[str, Ack]) -> None:
                lines = [Text(_progress_line(worker, acks), no_wrap=True) for worker in now.workers]
                live.update(Group(*(lines or [Text("no worker of this model is there yet")])), refresh=True)

            yield on_fleet

    def status(self, now: Fleet) -> None:
        """The whole fleet, and under it why each failing worker fails."""
        target = now.target
        self.say(f"model {now.model}")
        at = f"{target.version} (release {target.epoch}-{target.seq})" if target else "nothing was published yet"
        self.facts([("target", at), *([("fingerprint", short(target.fingerprint))] if target else [])])
        if not now.workers:
            self.say(f"no worker is here; start some: refleet-worker run --model {now.model} --help")
            return
        rows = [_worker_row(worker) for worker in now.workers]
        self.table(("worker", "state", "serving", "evidence", "lag", "seen"), rows, right=("lag", "seen"))
        for worker in now.workers:
            status = worker.status
            if status and status.failure:
                self.say(f"{worker.id}: {status.failure.code}: {status.failure.what}")
            if status and status.last_refusal:
                refusal = status.last_refusal
                self.say(f"{worker.id} refused {_plural(status.refused, 'record')}: {refusal.code}: {refusal.what}")


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _worker_row(worker: WorkerView) -> tuple[str, ...]:
    serving = worker.status.serving if worker.status else None
    seen = "never" if worker.seen_s is None else f"{worker.seen_s:.1f} s"
    lag = "-" if worker.lag is None else str(worker.lag)
    return (worker.id, worker.state, serving.version if serving else "-", worker.evidence.name, lag, seen)


def _progress_line(worker: WorkerView, acks: dict[str, Ack]) -> str:
    status = worker.status
    mark = "done" if worker.id in acks else "    "
    got = ""
    if status and status.expected_bytes and worker.id not in acks:
        got = f"{size_text(status.received_bytes)} of {size_text(status.expected_bytes)}"
    why = status.failure.what if status and status.failure else ""
    return f"{mark}  {worker.id:<20} {worker.state:<12} {worker.evidence.name:<9} {got} {why}".rstrip()
