"""The demo's screen: live tables in a terminal, one line for each event anywhere else."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from refleet.publisher.fleet import Fleet
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.table import Table
from rich.text import Text

_BAR = 8
_MESSAGES = 3
#: lines that are always there: title, workers' table, heads and blank lines
_FIXED_LINES = 12
_LEAST_ROWS = 3
_PHASES = ("hash", "send", "stage", "apply", "pause", "acks")
_COLORS = {
    "SERVING": "green",
    "FAILED": "red",
    "QUARANTINED": "red",
    "SILENT": "red",
    "killed": "red",
    "STALE": "yellow",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One release: what it cost, how long it took, and how well the workers answer since."""

    version: str
    kind: str  # "publish" or "rollback"
    accuracy: float
    sent_bytes: int
    full_bytes: int
    timings_ms: dict[str, float]  # hash, send: publisher; stage, apply, pause: slowest worker; acks: until all acked

    def to_dict(self) -> dict[str, object]:
        """The stable keys under `versions` in the JSON summary."""
        return {
            "version": self.version, "kind": self.kind, "accuracy": round(self.accuracy, 4),
            "payload_bytes": self.sent_bytes, "full_bytes": self.full_bytes,
            "timings_ms": {name: round(spent, 1) for name, spent in self.timings_ms.items()},
        }  # fmt: skip


def megabytes(size: int) -> str:
    """Bytes for people."""
    return f"{size / 1e6:.2f} MB" if size >= 10_000 else f"{size} bytes"


@dataclass(slots=True)
class Screen:
    """What is shown. Methods are called by the demo's one thread; a live display reads in its own."""

    console: Console
    title: str = ""
    rows: tuple[Row, ...] = ()
    fleet: Fleet | None = None
    pids: dict[str, int] = field(default_factory=dict)
    received: dict[str, dict[tuple[int, int], int]] = field(default_factory=dict)  # by worker and release
    messages: tuple[str, ...] = ()
    doing: str = ""
    started_s: float = field(default_factory=time.monotonic)
    ended_s: float | None = None

    @property
    def is_live(self) -> bool:
        return self.console.is_terminal and not self.console.is_dumb_terminal

    @property
    def elapsed_s(self) -> float:
        return (self.ended_s or time.monotonic()) - self.started_s

    def live(self) -> AbstractContextManager[object]:
        """Context in which a terminal shows this screen; at its end the last state stays."""
        return Live(self, console=self.console, refresh_per_second=8) if self.is_live else nullcontext()

    def end(self) -> None:
        """The clock stops; from now on everything is shown, not only what fits."""
        self.ended_s, self.doing = time.monotonic(), ""

    def act(self, text: str) -> None:
        """A new part of the demo begins."""
        self.doing = text
        if not self.is_live:
            self.console.print(Text(f"{self.elapsed_s:5.1f} s  {text}"), soft_wrap=True)

    def say(self, text: str) -> None:
        """Something happened."""
        self.messages = (*self.messages, text)[-_MESSAGES:]
        self._print(text)

    def receive(self, worker: str, order: tuple[int, int], size_bytes: int) -> None:
        """What a worker's ack says it received for one release."""
        self.received = {**self.received, worker: {**self.received.get(worker, {}), order: size_bytes}}

    def received_bytes(self) -> dict[str, int]:
        """Payload bytes that each worker received, by its own acks."""
        return {worker: sum(got.values()) for worker, got in self.received.items()}

    def add(self, row: Row) -> None:
        """A release that was served and asked."""
        self.rows = (*self.rows, row)
        if not self.is_live:
            spent = ", ".join(f"{name} {ms:.0f}" for name, ms in row.timings_ms.items())
            share = f"{megabytes(row.sent_bytes)} of {megabytes(row.full_bytes)}"
            self._print(f"{row.version:9} {row.accuracy:6.1%} right, sent {share} ({_percent(row)}), ms: {spent}")

    def _print(self, text: str) -> None:
        if not self.is_live:
            self.console.print(Text(f"         {text}"), soft_wrap=True)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        height = options.height or console.height
        fitting = max(height - _FIXED_LINES - _MESSAGES, _LEAST_ROWS) if self.is_live and not self.ended_s else None
        yield self.picture(console, newest=fitting)

    def picture(self, console: Console, *, newest: int | None = None) -> RenderableType:
        """Everything; of the releases the `newest` ones only, so that it fits the terminal."""
        head = Table.grid(expand=True)
        head.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        head.add_column(justify="right", no_wrap=True)
        head.add_row(Text(self.title, "bold").append(f"  {self.doing}", "not bold cyan"), f"{self.elapsed_s:.1f} s")
        messages = [Text(text, "dim", no_wrap=True, overflow="ellipsis") for text in self.messages]
        parts: list[RenderableType] = [head, "", self._workers(), "", self._releases(console, newest), ""]
        return Group(*parts, *messages, *([""] if self.ended_s else []))

    def _workers(self) -> Table:
        table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
        for name, width in (("worker", 11), ("pid", 9), ("serves", 12), ("state", 12), ("evidence", 12)):
            table.add_column(name, width=width, no_wrap=True)
        table.add_column("received so far", justify="right", width=15, no_wrap=True)
        received = self.received_bytes()
        for view in self.fleet.workers if self.fleet else ():
            served = view.status.serving.version if view.status and view.status.serving else "nothing"
            state = view.state if view.id in self.pids else "killed"
            shown = Text(state, _COLORS.get(state, "yellow"))
            pid = str(self.pids.get(view.id, ""))
            table.add_row(view.id, pid, served, shown, view.evidence.name, megabytes(received.get(view.id, 0)))
        return table

    def _releases(self, console: Console, newest: int | None) -> Table:
        table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
        table.caption, table.caption_justify = "hash to acks in milliseconds, of the slowest worker", "right"
        table.add_column("version", no_wrap=True, width=12)
        table.add_column("accuracy asked", no_wrap=True, width=_BAR + 7)
        for name in ("sent MB", "of full"):
            table.add_column(name, justify="right", no_wrap=True, width=7)
        for name in _PHASES:
            table.add_column(name, justify="right", no_wrap=True, width=5)
        mark = "━" if console.encoding.startswith("utf") else "="
        for row in self.rows[-newest:] if newest else self.rows:
            bar = Text(f"{row.accuracy:6.1%} ").append(mark * round(row.accuracy * _BAR), "green")
            version = Text(f"{row.version} back", "magenta") if row.kind == "rollback" else Text(row.version)
            times = [row.timings_ms.get(name) for name in _PHASES]
            table.add_row(
                version, bar, f"{row.sent_bytes / 1e6:.2f}",
                Text(_percent(row), "cyan"), *("" if spent is None else f"{spent:.0f}" for spent in times),
            )  # fmt: skip
        return table


def _percent(row: Row) -> str:
    return f"{row.sent_bytes / row.full_bytes:.1%}"
