"""Tables of figures: drawn in a terminal, lines of Markdown in a file or pipe."""

from __future__ import annotations

import sys

from rich import box
from rich.console import Console
from rich.table import Table

_WIDTH = 200  # of what is written to a file


def console() -> Console:
    return Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False)


def table(title: str, *names: str) -> Table:
    """Columns of figures."""
    made = Table(title=title, box=box.HEAVY_HEAD if sys.stdout.isatty() else box.MARKDOWN)
    for name in names:
        made.add_column(name, justify="right")
    return made
