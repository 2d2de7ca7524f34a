"""What the scale benchmark found, as lines: slopes, exponents, and what they should be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import tables
from rich.console import Console

Costs = dict[str, float]
_ENOUGH = 3  # points from the end that the exponent is fitted to: fixed costs hide it before


@dataclass(frozen=True, slots=True)
class Column:
    """A cost, how it is shown, and how it should grow."""

    heading: str
    cost: str
    factor: float
    expected: str


#: part -> what x is, and its columns
PARTS = {
    "workers": ("workers", [
        Column("publisher ms", "publisher", 1e3, "O(workers)"), Column("server ms", "server", 1e3, "O(workers)"),
        Column("served s", "wall", 1, "O(workers)"), Column("payload kB", "payload", 1e-3, "O(1)"),
        Column("server sends kB", "sent", 1e-3, "O(workers)"),
        Column("idle publisher ms/s", "idle publisher", 1e3, "O(workers)"),
        Column("idle server ms/s", "idle server", 1e3, "O(workers)"),
        Column("idle kB/s", "idle sent", 1e-3, "O(workers)"),
    ]),
    "sizes": ("GB", [
        Column("first s", "first", 1, "O(bytes)"), Column("step s", "wall", 1, "O(bytes)"),
        Column("publisher s", "publisher", 1, "O(bytes)"), Column("worker s", "worker", 1, "O(bytes)"),
        Column("server s", "server", 1, "O(changed)"), Column("payload MB", "payload", 1e-6, "O(changed)"),
        Column("memcpy s", "memcpy", 1, "O(bytes)"),
    ]),
    "tensors": ("tensors", [
        Column("first s", "first", 1, "O(tensors)"), Column("step s", "wall", 1, "O(changed)"),
        Column("publisher s", "publisher", 1, "O(changed)"), Column("worker s", "worker", 1, "O(changed)"),
        Column("server s", "server", 1, "O(changed)"), Column("payload kB", "payload", 1e-3, "O(changed)"),
    ]),
}  # fmt: skip


def fit(rows: list[Costs], cost: str) -> Costs:
    """A straight line through all points, and the power law through the last ones."""
    x, y = (np.array([row[what] for row in rows]) for what in ("x", cost))
    slope, start = np.polyfit(x, y, 1) if np.ptp(y) else (0.0, y[0])
    left = float(((y - slope * x - start) ** 2).sum())
    spread = float(((y - y.mean()) ** 2).sum())
    power = np.polyfit(np.log(x[-_ENOUGH:]), np.log(np.maximum(y[-_ENOUGH:], 1e-9)), 1)[0]
    return {
        "slope": float(slope),
        "start": float(start),
        "r2": 1 - left / spread if spread else 1.0,
        "exponent": float(power),
    }


def fits(part: str, rows: list[Costs]) -> dict[str, Costs]:
    return {column.cost: fit(rows, column.cost) for column in PARTS[part][1]}


def show(part: str, rows: list[Costs], console: Console) -> None:
    label, columns = PARTS[part]
    headings = [column.heading for column in columns]
    table = tables.table(f"cost against {part}; publisher, server, worker: processor time", label, *headings)
    for row in rows:
        at = f"{row['x']:.3g}" if part == "sizes" else f"{row['x']:,}"
        table.add_row(at, *(f"{row[column.cost] * column.factor:.4g}" for column in columns))
    table.add_section()
    lines = fits(part, rows)
    table.add_row(f"per {label.rstrip('s')}", *(f"{lines[c.cost]['slope'] * c.factor:.3g}" for c in columns))
    table.add_row("at 0", *(f"{lines[c.cost]['start'] * c.factor:.3g}" for c in columns))
    table.add_row("r2", *(f"{lines[c.cost]['r2']:.3f}" for c in columns))
    table.add_row("expected", *(column.expected for column in columns))
    table.add_row("exponent", *(f"{lines[column.cost]['exponent']:.2f}" for column in columns))
    console.print(table)


def figures(found: dict[str, list[Costs]]) -> dict[str, Any]:
    """For JSON and for the picture; a line needs two points."""
    lines = {part: fits(part, rows) for part, rows in found.items() if len(rows) > 1}
    return {"rows": found, "fits": lines}
