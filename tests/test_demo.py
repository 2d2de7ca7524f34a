"""The demo, run as a user runs it: what it says must be true, and it must fail when a worker is really broken."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

DEMO = Path(__file__).parent.parent / "examples" / "demo.py"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def start(temporary: Path, *flags: str) -> subprocess.Popen[str]:
    """The short demo, with `temporary` as the folder for everything that it writes."""
    return subprocess.Popen(
        [sys.executable, "-u", DEMO, "--quick", "--json", *flags],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "TMPDIR": str(temporary)},
    )  # fmt: skip


def run(temporary: Path, *flags: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, summary and the printed lines of a whole demo."""
    with start(temporary, *flags) as demo:
        summary, lines = demo.communicate(timeout=280)
    assert summary, lines
    return demo.returncode, json.loads(summary), lines


def processes_in(folder: Path) -> list[str]:
    """Command lines of running processes that name `folder` or run in it: the demo's workers and its server."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            home = str((process / "cwd").readlink())
        except OSError:
            continue  # ended meanwhile, or another user's
        if str(folder) in command or str(folder) in home:
            found.append(command)
    return found


def assert_nothing_left(folder: Path) -> None:
    assert processes_in(folder) == []
    assert list(folder.iterdir()) == []


def by_name(summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {check["name"]: check for check in summary["checks"]}


def test_the_demo_checks_everything_and_ends_with_zero(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    picture = tmp_path / "demo.svg"
    code, summary, lines = run(tmp_path / "t", "--svg", str(picture))
    assert code == 0, lines
    assert summary["ok"] and summary["failed"] == [] and summary["problem"] is None
    assert len(summary["checks"]) == 14
    for check in summary["checks"]:
        assert check["ok"] and check["expected"] and check["seen"], check

    trained = [row for row in summary["versions"] if row["kind"] == "publish"]
    assert trained[0]["accuracy"] < 0.3 and trained[-1]["accuracy"] > 0.9
    for row in trained:
        assert 0 < row["payload_bytes"] < row["full_bytes"]
        assert set(row["timings_ms"]) == {"hash", "send", "stage", "apply", "pause", "acks"}
    (back,) = (row for row in summary["versions"] if row["kind"] == "rollback")
    (first,) = (row for row in trained if row["version"] == back["version"])
    assert back["payload_bytes"] == 0
    assert back["accuracy"] == first["accuracy"]

    assert "WAITING > RECEIVING > APPLYING > SERVING" in lines  # the worker that was restarted
    assert picture.read_text().startswith("<svg") and "worker-3" in picture.read_text()
    assert_nothing_left(tmp_path / "t")


def test_a_worker_that_is_really_broken_fails_the_checks_that_see_it(tmp_path: Path) -> None:
    flags = [part for how in ("flip", "lie", "rollback", "verify") for part in ("--sabotage", how)]
    code, summary, lines = run(tmp_path, *flags)
    assert code == 1, lines
    assert not summary["ok"] and summary["problem"] is None
    checks = by_name(summary)
    assert {"answers-alike", "version-ids", "rollback-answers", "verify"} <= set(summary["failed"])
    answers = int(checks["answers-alike"]["expected"].split()[0])
    assert checks["answers-alike"]["seen"] == f"{answers - 2} alike"  # one bit, flipped twice, healed by each switch
    assert checks["version-ids"]["seen"] == f"{answers - 1} right"  # one lie
    assert checks["rollback-answers"]["seen"] == "2 bit-identical"
    assert checks["verify"]["seen"] == "12 tensors of 2, worker-2 differs in mouth.weight"
    for name in ("served", "rollback-fingerprint", "roll-forward", "killed", "resumed", "caught-up-answers"):
        assert checks[name]["ok"], checks[name]  # what was not broken is not blamed
    for name in summary["failed"]:
        assert name in lines
    assert_nothing_left(tmp_path)


def test_a_worker_that_dies_is_named_with_its_last_output(tmp_path: Path) -> None:
    code, summary, lines = run(tmp_path, "--sabotage", "crash")
    assert code == 1, lines
    assert "worker-2" in summary["problem"] and "SIGKILL" in summary["problem"]
    assert "SERVING: serving step-120" in summary["problem"]
    assert not by_name(summary)["verify"]["ok"] and by_name(summary)["verify"]["seen"] == "not checked"
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_demo_leaves_nothing_behind(tmp_path: Path, number: signal.Signals, code: int) -> None:
    with start(tmp_path) as demo:
        assert demo.stderr is not None
        line = ""
        deadline = time.monotonic() + 120
        while "version 2 of" not in line:  # workers, server and publisher are all at work
            line = demo.stderr.readline()
            assert line and time.monotonic() < deadline, "the demo ended by itself"
        assert len(processes_in(tmp_path)) == 4
        demo.send_signal(number)
        demo.communicate(timeout=60)
    assert demo.returncode == code
    assert_nothing_left(tmp_path)
