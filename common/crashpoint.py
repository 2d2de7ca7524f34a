"""Named places where a test may kill this very process, to prove that a crash there loses nothing.

Only the command lines arm a point, from `REFLEET_CRASH_AT` (see config.py); in every other process this is one
comparison of strings.
"""

from __future__ import annotations

import os
import signal

_armed = ""
_passes = 0


def arm(point: str) -> None:
    """From now on, reaching `point` kills the process with SIGKILL: no handler, no flush, no goodbye.

    `name+2` lets the process pass the point twice before. The empty string arms nothing.
    """
    global _armed, _passes
    _armed, _, passes = point.partition("+")
    _passes = int(passes or 0)


def crash_point(point: str) -> None:
    """Mark a place in the code; does nothing unless a test armed this very point."""
    global _passes
    if point != _armed:
        return
    if _passes:
        _passes -= 1
        return
    os.kill(os.getpid(), signal.SIGKILL)
