"""How many times faster than its peers refleet is, drawn from what publish_to_served.py and links.py wrote.

    python benchmarks/served_plot.py SERVED.json [LINKS.json] PICTURE.png

A column for each kind of step. First line: workers of this host; below: one worker at the other end of a link. Where it
is green refleet is faster.
Needs matplotlib (.venv-bench).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KINDS = {"first": "first version", "rl": "RL step", "lora": "LoRA", "tune": "fine-tuning step", "none": "unchanged"}
#: how peers are called and look; `copy` is `load` over a link
PEERS = {
    "ray": ("Ray object store", "#7e57c2", "D"), "load": ("copy + load", "#e08e45", "s"),
    "copy": ("copy + load", "#e08e45", "s"), "gloo": ("gloo broadcast", "#26527c", "o"),
}  # fmt: skip
HOLLOW = "hollow: workers share nothing"

Rows = list[dict[str, Any]]


def served(found: Rows, path: Path) -> None:
    lines = {"workers": "workers on one host, loopback", "gigabits": "Gbit/s of the link to one worker"}
    lines = {x: label for x, label in lines.items() if any(x in row for row in found)}
    kinds = [kind for kind in KINDS if any(row["kind"] == kind for row in found)]
    figure, grid = plots.pyplot.subplots(
        len(lines), len(kinds), figsize=(10, 0.8 + 2.5 * len(lines)), squeeze=False, sharey=True
    )
    ratios = [row[f"x_{peer}"] for row in found for peer in PEERS if f"x_{peer}" in row]
    span, legend = (min(ratios) / 1.6, max(ratios) * 1.6), dict[str, Any]()
    for (x, label), panels in zip(lines.items(), grid, strict=True):
        for panel, kind in zip(panels, kinds, strict=True):
            rows = [row for row in found if row["kind"] == kind and x in row]
            panel.set_visible(bool(rows))
            draw(panel, rows, x, span, legend)
            panel.set_title(KINDS[kind], fontsize=9)
        panels[0].set_ylabel("times faster than", fontsize=8)
        panels[0].set_xlabel(label, fontsize=9, loc="left")
    legend[HOLLOW] = legend.pop(HOLLOW, None)
    legend = {name: line for name, line in legend.items() if line}
    figure.legend(legend.values(), legend, ncol=len(legend), fontsize=8, loc="upper center", frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.3 / figure.get_figheight()), h_pad=2)
    plots.save(figure, path)


def draw(panel: Axes, rows: Rows, x: str, span: tuple[float, float], legend: dict[str, Any]) -> None:
    """A line for each peer, and for workers that share or not; the same distance between all x."""
    points = sorted({row[x] for row in rows}, reverse=x == "gigabits")
    for peer, (name, color, marker) in PEERS.items():
        for share in (True, False):
            line = {row[x]: row[f"x_{peer}"] for row in rows if row["share"] is share and f"x_{peer}" in row}
            alone = x == "workers" and not share
            (drawn,) = panel.plot(
                [points.index(point) for point in line], list(line.values()), color=color, marker=marker,
                markersize=4.5, linewidth=1.2, linestyle=":" if alone else "-",
                markerfacecolor="white" if alone else color,
            )  # fmt: skip
            if line:
                legend.setdefault(HOLLOW if alone else name, drawn)
    panel.axhline(1, color="black", linewidth=0.8)
    panel.axhspan(1, 1e9, color="#e8f3e8", zorder=0)
    panel.set_yscale("log")
    panel.set_ylim(*span)
    panel.set_xticks(range(len(points)), [f"{point:g}" for point in points])
    panel.set_xlim(-0.4, max(len(points), 1) - 0.6)
    panel.yaxis.set_major_locator(plots.ticker.LogLocator())
    panel.yaxis.set_major_formatter(plots.ticker.FormatStrFormatter("%g"))
    panel.yaxis.set_minor_locator(plots.ticker.NullLocator())
    panel.tick_params(labelsize=8)
    panel.grid(axis="y", alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)


def main() -> int:
    *files, target = sys.argv[1:]
    found = [row for file in files for row in json.loads(Path(file).read_text())["rows"]]
    print(plots.draw(served, found, Path(target)))
    return 1 if plots.MISSING else 0


if __name__ == "__main__":
    sys.exit(main())
