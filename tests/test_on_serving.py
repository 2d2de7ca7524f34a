"""The command that a file engine runs after each switch: whatever it does, the version is served."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from engine_cases import zoo_version
from refleet.common.errors import UsageError
from refleet.worker.file_engine import FileEngine


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def serving_command(path: Path, code: str, *, timeout_s: float = 20.0) -> str | None:
    engine = FileEngine(path, on_serving=f"{sys.executable} -c '{code}' 'two words'", command_timeout_s=timeout_s)
    return engine.served(zoo_version(1).serving)


def test_the_command_learns_what_is_served(path: Path) -> None:
    told = path.with_name("told")
    facts = '*(os.environ[f"REFLEET_{name}"] for name in ("VERSION", "FINGERPRINT", "PATH"))'
    code = f'import os, sys; open("{told}", "w").write(repr([sys.argv[1:], {facts}]))'
    assert serving_command(path, code) is None
    assert told.read_text() == repr([["two words"], "v1", zoo_version(1).serving.fingerprint.hex(), str(path)])


def test_a_command_that_fails_is_a_warning_with_its_last_words(path: Path) -> None:
    warning = serving_command(path, 'import sys; print("noise"); sys.exit("no such unit")')
    assert warning is not None
    assert warning.endswith("exited with status 1: no such unit")


def test_a_command_that_does_not_exist_is_a_warning(path: Path) -> None:
    warning = FileEngine(path, on_serving="/no/such/program now").served(zoo_version(1).serving)
    assert warning == "the command '/no/such/program' could not be started: No such file or directory"


def test_a_command_that_hangs_is_killed_with_its_children(path: Path, until: Callable[..., None]) -> None:
    child = path.with_name("child")
    code = (
        f'import subprocess; p = subprocess.Popen(["sleep", "600"]); open("{child}", "w").write(str(p.pid)); p.wait()'
    )
    warning = serving_command(path, code, timeout_s=2.0)
    assert warning is not None
    assert "was killed after 2 s" in warning
    pid = int(child.read_text())
    until(lambda: not running(pid), "the child is gone")


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_server_that_the_command_leaves_running_is_not_waited_for(path: Path) -> None:
    started = path.with_name("pid")
    code = f'import subprocess; open("{started}", "w").write(str(subprocess.Popen(["sleep", "600"]).pid))'
    assert serving_command(path, code) is None
    os.kill(int(started.read_text()), signal.SIGKILL)  # fails if it was not running any more


@pytest.mark.parametrize("line", ["", "   ", "reload 'unfinished"])
def test_a_command_line_that_can_not_be_meant_is_refused_at_once(path: Path, line: str) -> None:
    with pytest.raises(UsageError):
        FileEngine(path, on_serving=line)
