"""What the demo promises, and what it saw: the checks, their table, and the exit code."""

from __future__ import annotations

from dataclasses import dataclass, field

from rich.table import Table
from rich.text import Text

#: every one of these must be made and true; in the order in which the demo comes to them
CHECKS = {
    "served": "every version on all workers",
    "version-ids": "answers name their version",
    "answers-alike": "answers as the trainer's own",
    "accuracy": "accuracy of answers rises",
    "bytes": "bytes sent, not full copies",
    "rollback-fingerprint": "rollback: same fingerprint",
    "rollback-answers": "rollback: same answers",
    "rollback-bytes": "rollback: bytes sent",
    "roll-forward": "publish after the rollback",
    "killed": "kill -9: the others go on",
    "resumed": "restart: serves from disk",
    "caught-up": "restart: catches up by delta",
    "caught-up-answers": "restart: answers as others",
    "verify": "verify: engines hashed",
}


@dataclass(frozen=True, slots=True)
class Check:
    """One promise: what was expected, what was seen."""

    name: str
    expected: str
    seen: str
    ok: bool


@dataclass(slots=True)
class Report:
    """The checks made so far. `problem`: what ended the demo early."""

    made: dict[str, Check] = field(default_factory=dict)
    problem: str | None = None

    def check(self, name: str, *, expected: str, seen: str, ok: bool) -> None:
        """Note a check. One that was made before and failed stays failed."""
        assert name in CHECKS, f"{name} is not in the list"
        before = self.made.get(name)
        if before is None or before.ok:
            self.made[name] = Check(name, expected, seen, ok)

    @property
    def checks(self) -> list[Check]:
        """All of them; one that was not made counts as failed."""
        return [self.made.get(name) or Check(name, "", "not checked", False) for name in CHECKS]

    @property
    def failed(self) -> list[str]:
        return [check.name for check in self.checks if not check.ok]

    @property
    def ok(self) -> bool:
        """Whether all checks were made and are true, and nothing went wrong beside them."""
        return not self.failed and self.problem is None

    def table(self) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        for column, ratio in (("check", 34), ("expected", 25), ("seen", 25)):
            table.add_column(column, ratio=ratio)
        table.add_column("", no_wrap=True, min_width=6)
        table.expand = True
        for check in self.checks:
            verdict = Text("ok", "bold green") if check.ok else Text("FAILED", "bold red")
            seen = Text(check.seen, "" if check.ok else "red")
            table.add_row(CHECKS[check.name], Text(check.expected, "dim"), seen, verdict)
        return table

    def to_list(self) -> list[dict[str, object]]:
        """The stable keys under `checks` in the JSON summary."""
        return [
            {"name": check.name, "what": CHECKS[check.name], "expected": check.expected, "seen": check.seen,
             "ok": check.ok}
            for check in self.checks
        ]  # fmt: skip
