"""Runs the user's own command after a switch. Whatever it does, what is served is not affected."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from typing import IO

from ..common.errors import UsageError

TAIL_BYTES = 4096


def parse_command(line: str) -> list[str]:
    """The words of a command line. Raises: UsageError for unbalanced quotes or nothing at all."""
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise UsageError(f"the command {line!r} can't be split into words: {error}") from error
    if not words:
        raise UsageError("the command to run after a switch is empty", next="for example 'systemctl reload server'")
    return words


def run_command(words: list[str], facts: Mapping[str, str], *, timeout_s: float) -> str | None:
    """Run it with `facts` added to its environment, killing it and its children after `timeout_s`.

    Returns a warning in words, or None when it exited with 0.
    """
    # A file, not a pipe: a server that the command leaves running would hold a pipe open, and we would wait for it.
    with tempfile.TemporaryFile() as said:
        try:
            child = subprocess.Popen(
                words,
                # The child's environment is ours plus the facts; nothing of refleet is configured from it here.
                env={**os.environ, **facts},
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return f"the command {words[0]!r} could not be started: {error.strerror}"
        try:
            status = child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            _kill(child)
            return f"the command {words[0]!r} was killed after {timeout_s:g} s{_last_line(said)}"
        except BaseException:
            _kill(child)
            raise
        return f"the command {words[0]!r} exited with status {status}{_last_line(said)}" if status else None


def _kill(child: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)  # it leads its own session
    child.wait()


def _last_line(said: IO[bytes]) -> str:
    end = said.seek(0, os.SEEK_END)
    said.seek(max(0, end - TAIL_BYTES))
    lines = said.read().decode(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f": {last[:300]}" if last else ""
