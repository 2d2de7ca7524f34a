"""The simulator: seeds that must hold, the same run twice, and bugs that it must find (docs/testing.md)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from sim.campaign import FAULT_KINDS, known_seeds
from sim.cli import campaign
from sim.planted import PLANTED, Bug, hunt
from sim.run import run_seed
from sim.seams import installed

SIM = Path(__file__).with_name("sim")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_seed_holds_and_every_kind_of_fault_happens() -> None:
    report = campaign([*known_seeds(), *range(300)], jobs=2)
    assert report.failures == []
    assert report.silent == [], "faults that never happened: they test nothing"
    assert all(report.counts[kind] for kind in ("I1", "I3", "I5", "I9", "I14", "I15", "I17", "I20", "I23", "I24"))


@pytest.mark.slow
@pytest.mark.parametrize("bug", PLANTED, ids=lambda bug: f"{bug.invariant}-{bug.name}")
def test_a_planted_bug_is_found(bug: Bug) -> None:
    seed, error = hunt(bug, seeds=200)
    print(f"{bug.invariant} {bug.name}: seed {seed}: {error}")
    assert seed is not None, f"nobody noticed: {bug.name}"


def test_a_seed_gives_the_same_run_in_every_process() -> None:
    runs = [
        subprocess.Popen(
            [sys.executable, SIM, "--seed", "11", "--trace"], stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONHASHSEED": hashes},
        )
        for hashes in ("1", "2")
    ]  # fmt: skip
    first, second = (run.communicate(timeout=100)[0].decode().splitlines() for run in runs)
    assert first == second
    assert len(first) > 500
    with installed():
        assert [*run_seed(11, trace=True).trace, first[-1]] == first


def test_a_campaign_tells_what_failed_and_what_never_happened(capfd: pytest.CaptureFixture[str]) -> None:
    from sim.cli import main

    assert main(["--seeds", "1", "--jobs", "1"]) == 1
    told = capfd.readouterr()
    assert "NEVER HAPPENED: " in told.err
    assert all(kind in told.out for kind in FAULT_KINDS)


def test_nothing_of_the_simulator_is_left_behind() -> None:
    import time

    from refleet.common import records

    with installed():
        assert records.time is not time
        run_seed(1)
    assert records.time is time
