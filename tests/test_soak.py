"""The long run in short: `make soak` runs it for ten minutes. And that it notices what it is there to notice."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import save_file
from soak import report
from whole import Reader, look
from world import checkpoint

Until = Callable[..., None]


@pytest.mark.timeout(180)
def test_twenty_seconds_of_everything_at_once() -> None:
    program = Path(__file__).with_name("soak.py")
    done = subprocess.run(
        [sys.executable, program, "--seconds", "20", "--seed", "1"], capture_output=True, text=True, timeout=170,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = dict(line.rsplit(None, 1) for line in done.stdout.splitlines() if line.split())
    assert int(rows["versions published"]) >= 10
    assert int(rows["acks SERVING"]) >= 40
    assert int(rows["torn reads"]) == 0 and int(rows["looks at what is served"]) > 100
    assert sum(int(count) for name, count in rows.items() if name.startswith("fault:")) >= 3


def run_that(**facts: Any) -> Any:
    """A run as `report` takes it, with nothing wrong but `facts`."""
    fleet = SimpleNamespace(
        problems=facts.get("problems", []), acks=Counter(SERVING=3), torn=lambda: (9, facts.get("torn", [])),
        published=lambda: 1, back=lambda: facts.get("back", []),
    )  # fmt: skip
    series: dict[str, list[tuple[float, float]]] = defaultdict(list, {"server": [(0.0, 10.0), (9.0, 10.5)]})
    series |= facts.get("series", {})
    return SimpleNamespace(
        fleet=fleet, applied={"v1"}, faults=Counter(rollback=1), recoveries=1, slowest_s=1.0, series=series
    )


def test_the_report_is_good_only_if_nothing_was_torn_nothing_grew_and_nobody_ended() -> None:
    assert report(run_that())
    assert not report(run_that(torn=["v2"]))
    assert not report(run_that(back=["v1"])), "no worker was killed"
    assert not report(run_that(problems=["w0 ended by itself"]))
    growing = [(float(at), 100.0 + 5 * at) for at in range(60)]
    assert not report(run_that(series={"memory w0": growing}))
    assert not report(run_that(series={"disk w0": [(0.0, 1.0), (9.0, 11.0)]}))
    sawtooth = [(float(at), 100.0 + 40 * (at % 10 > 5)) for at in range(60)]
    assert report(run_that(series={"memory w0": sawtooth}))


@pytest.fixture
def reader(tmp_path: Path) -> Any:
    """Of a file that holds v2, where v1 and v2 are known."""
    known, first = {}, checkpoint(1)
    for number, state in enumerate((first, checkpoint(2, change=0.5, base=first)), start=1):
        path = tmp_path / f"v{number}"
        save_file(
            state, path, metadata={"refleet.version": f"v{number}", "refleet.epoch": "1", "refleet.seq": f"{number}"}
        )
        known[f"v{number}"] = look(path).content
    served = tmp_path / "served"
    served.write_bytes((tmp_path / "v2").read_bytes())
    made = Reader(served, known, pause_s=0.001).start()
    yield made
    made.close()


def test_the_reader_finds_nothing_wrong_with_a_whole_version(reader: Reader, until: Until) -> None:
    until(lambda: reader.reads > 20, "it reads")
    assert reader.torn == []


@pytest.mark.parametrize("how", ["mixed", "cut", "back"])
def test_the_reader_finds_a_mixture_a_cut_file_and_a_step_back(reader: Reader, until: Until, how: str) -> None:
    one, two = ((reader.path.parent / name).read_bytes() for name in ("v1", "v2"))
    until(lambda: reader.reads, "it has seen v2")
    assert len(one) == len(two)
    wrong = {"mixed": two[: len(two) // 2] + one[len(two) // 2 :], "cut": two[:-1000], "back": one}[how]
    temp = reader.path.with_suffix(".temp")
    temp.write_bytes(wrong)
    temp.replace(reader.path)
    until(lambda: reader.back if how == "back" else reader.torn, "it is noticed")
