"""Pictures of what the benchmarks found, as they write it with `--json`. Needs matplotlib (.venv-bench).

    python benchmarks/plots.py {sizes,timeline,scale} FILE.json PICTURE.png

With `--plot` the benchmarks draw these themselves.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scale_report import PARTS, Costs

try:
    import matplotlib

    matplotlib.use("Agg")  # no display
    from matplotlib import patches, pyplot, ticker
    from matplotlib.figure import Figure
except ImportError as _reason:
    MISSING = str(_reason)
else:
    MISSING = ""

OURS, THEIRS = "#c0392b", "#6b7f8e"


def draw(picture: Callable[[Any, Path], None], found: Any, path: Path) -> str:
    """Draw `found` into a PNG; says what became of it."""
    if MISSING:
        return f"no plot: {MISSING}"
    picture(found, path)
    return f"drawn: {path}"


def sizes(found: dict[str, Any], path: Path) -> None:
    """A panel for each regime: bytes by codec as % of the checkpoint, log scale, the entropy as a line."""
    regimes = list(found["entropy"])
    columns = min(4, len(regimes))
    lines = -(-len(regimes) // columns)
    figure, grid = pyplot.subplots(lines, columns, figsize=(4.4 * columns, 3.4 * lines), squeeze=False)
    for panel, regime in zip(grid.flat, regimes, strict=False):
        rows = [row for row in found["rows"] if row["regime"] == regime and not row["failed"]]
        rows = sorted((row for row in rows if row["size"]), key=lambda row: -row["size"])
        values = [100 * row["size"] for row in rows]
        colors = [OURS if row["codec"] == "refleet" else THEIRS for row in rows]
        bars = panel.barh([row["codec"] for row in rows], values, color=colors, height=0.7)
        panel.bar_label(bars, [f"{value:.3g} %" for value in values], padding=2, fontsize=7)
        limit = 100 * min(found["entropy"][regime][name] for name in ("given exponent", "alone"))
        if limit > 0:
            panel.axvline(limit, color=OURS, linestyle="--", linewidth=1)
            panel.set_title(f"{regime}   entropy {limit:.3g} %", fontsize=9)
        panel.set_xscale("log")
        panel.set_xlim(min([limit or min(values), *values]) / 1.5, max(values) * 4)
        panel.xaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 3.0)))
        panel.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        panel.xaxis.set_minor_locator(ticker.NullLocator())
        panel.tick_params(labelsize=7)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in list(grid.flat)[len(regimes) :]:
        panel.set_visible(False)
    figure.supxlabel("% of the checkpoint on the wire (log scale); dashed: entropy of the step", fontsize=9)
    figure.tight_layout()
    save(figure, path)


#: colors of phases, in the order of the legend; a phase that has none is not drawn
PHASES = {
    "send": "#c0392b", "release": "#5d4037",
    "receive early": "#f3b9a6", "stage": "#e08e45", "verify": "#f2d16b", "prepare": "#9ccc65", "apply": "#2e7d32",
    "read_back": "#66a5ad", "probe": "#26527c", "persist": "#7e57c2", "ack": "#bdbdbd",
}  # fmt: skip


def timeline(found: dict[str, Any], path: Path) -> None:
    """When everything happened in each kind of publish to the last fleet: a panel a kind, a lane a process."""
    last = found["rows"][-1]
    rows = [row for row in found["rows"] if (row["workers"], row["share"]) == (last["workers"], last["share"])]
    lanes = ["publisher", *(f"w{n}" for n in range(rows[0]["workers"]))]
    height = 0.75 + 0.19 * len(lanes)
    figure, panels = pyplot.subplots(len(rows), 1, figsize=(10, 0.8 + height * len(rows)), squeeze=False)
    used = set()
    for panel, row in zip(panels.flat, rows, strict=True):
        for span in row["spans"]:
            if span["phase"] in PHASES:
                used.add(span["phase"])
                panel.barh(lanes.index(span["who"]), span["end"] - span["start"], left=span["start"], height=0.8,
                           color=PHASES[span["phase"]])  # fmt: skip
        panel.axvline(row["drawn_s"], color="black", linewidth=0.8, linestyle=":")
        panel.set_yticks(range(len(lanes)), lanes, fontsize=7)
        panel.invert_yaxis()
        panel.set_xlim(0, row["drawn_s"] * 1.02)
        panel.tick_params(axis="x", labelsize=7)
        panel.spines[["top", "right"]].set_visible(False)
        changed = "all" if row["kind"] == "first" else f"{row['changed']:.1%}"
        panel.set_title(
            f"{row['kind']}: {changed} of the elements changed, {row['payload_bytes'] / 1e6:.1f} of "
            f"{row['full_bytes'] / 1e6:.0f} MB sent, served everywhere after {row['drawn_s']:.2f} s",
            fontsize=8, loc="left",
        )  # fmt: skip
    panels.flat[-1].set_xlabel("seconds from the start of the publish", fontsize=8)
    handles = [patches.Patch(color=color, label=name) for name, color in PHASES.items() if name in used]
    figure.legend(handles=handles, ncol=len(handles), fontsize=7, loc="upper center", frameon=False, handlelength=1,
                  columnspacing=1, handletextpad=0.4)  # fmt: skip
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.3 / figure.get_figheight()))
    save(figure, path)


def scale(found: dict[str, Any], path: Path) -> None:
    """A panel for each part: how many times its value at the first point each cost grows to, both axes logarithmic."""
    parts: dict[str, list[Costs]] = {part: rows for part, rows in found["rows"].items() if len(rows) > 1}
    figure, panels = pyplot.subplots(1, len(parts), figsize=(10, 5), squeeze=False)
    for panel, (part, rows) in zip(panels.flat, parts.items(), strict=True):
        label, columns = PARTS[part]
        x = [row["x"] for row in rows]
        panel.plot(x, [each / x[0] for each in x], color="#999999", linewidth=0.9, linestyle="--", label="linear")
        for column, marker in zip(columns, "osD^vP*X", strict=False):
            start = max(rows[0][column.cost], 1e-9)
            y = [max(row[column.cost], 1e-9) / start for row in rows]
            unit = f"{start * column.factor:.3g} {column.heading.split()[-1]}"
            what = f"{column.heading.rsplit(' ', 1)[0]}: {column.expected}, from {unit}"
            panel.plot(x, y, marker=marker, markersize=4, linewidth=1.2, label=what)
        panel.set(xscale="log", yscale="log")
        panel.set_xlabel(label, fontsize=8)
        panel.set_title(f"cost against {part}, in times that of the first", fontsize=9)
        panel.xaxis.set_major_locator(ticker.FixedLocator(x))
        panel.xaxis.set_major_formatter(
            ticker.FuncFormatter(lambda value, _: f"{value:.2g}" if value < 100 else f"{value:,.0f}")
        )
        panel.xaxis.set_minor_locator(ticker.NullLocator())
        panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
        panel.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        panel.yaxis.set_minor_locator(ticker.NullLocator())
        panel.tick_params(labelsize=7)
        panel.grid(alpha=0.25)
        panel.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)
        panel.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """1200 pixels for a width of 10."""
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> int:
    picture, file, target = sys.argv[1:]
    pictures = {"sizes": sizes, "timeline": timeline, "scale": scale}
    print(draw(pictures[picture], json.loads(Path(file).read_text()), Path(target)))
    return 1 if MISSING else 0


if __name__ == "__main__":
    sys.exit(main())
