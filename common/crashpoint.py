"""Named places where a test may kill this very process, to prove that a crash there loses nothing.

Only the command lines arm a point, from `REFLEET_CRASH_AT` (see config.py); in every other process this is one
comparison of strings.
"""

from __future__ import annotations

import os
import signal

_armed = ""


def arm(point: str) -> None:
    """From now on, reaching `point` kills the process with SIGKILL: no handler, no flush, no goodbye."""
    global _armed
    _armed = point


def crash_point(point: str) -> None:
    """Mark a place in the code; does nothing unless a test armed this very point."""
    if point == _armed:
        os.kill(os.getpid(), signal.SIGKILL)
