"""Pictures of the figures that the benchmarks write with `--json`. Needs matplotlib.

python benchmarks/plots.py codec.json codec.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display

from matplotlib import pyplot, ticker

OURS, THEIRS = "#c0392b", "#6b7f8e"


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
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    sizes(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
