"""The README, run as a new user runs it: its shell block by bash, its Python block against a real server."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import BIN
from refleet.common.messages import Evidence
from refleet.publisher import Publisher
from safetensors.torch import load_file, save_file
from servers import Server, free_port

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DEADLINE_S = 90
#: ends what the block left running, by pid, and says when a background process did not end cleanly
PREAMBLE = """
ended() { for pid in $(jobs -p); do kill "$pid"; wait "$pid" || echo "background process: exit $?"; done; }
trap ended EXIT
set -euo pipefail
"""


def promised(language: str) -> list[str]:
    """The fenced blocks that the README promises to be tested."""
    return re.findall(rf"<!-- tested by tests/test_readme\.py -->\n```{language}\n(.*?)^```$", README, re.S | re.M)


def bash(script: str, folder: Path) -> str:
    """Runs a script to its end and returns what it and its background processes said; it must succeed."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("REFLEET_")}
    environment = clean | {"PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONUNBUFFERED": "1"}
    said = folder / "said"
    with open(said, "wb") as out:
        process = subprocess.Popen(
            ["bash", "-c", PREAMBLE + script],
            cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
        )  # fmt: skip
    try:
        code: int | str = process.wait(DEADLINE_S)
    except subprocess.TimeoutExpired:
        code = f"none within {DEADLINE_S} s"
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(20)
    assert code == 0, f"exit code {code}:\n{said.read_text()}"
    return said.read_text()


def net(seed: int) -> torch.nn.Sequential:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """The folder where the user stands, with the two checkpoints that the README names."""
    state = net(50).state_dict()
    save_file(state, tmp_path / "step-50.safetensors")
    state["0.weight"][3, 4] += 1
    save_file(state, tmp_path / "step-100.safetensors")
    return tmp_path


@pytest.mark.slow
def test_the_shell_commands_work_one_after_the_other_in_an_empty_folder(checkpoints: Path) -> None:
    (block,) = promised("sh")
    assert "6399" in block, "the port to replace"
    said = bash(block.replace("6399", str(free_port())), checkpoints)
    status = re.findall(r"^(w0) +(\w+) +(\S+) +(\w+) +(\d+) +[\d.]+ s$", said, re.M)
    assert status == [("w0", "SERVING", "step-100", "SERVING", "0")], said
    history = re.findall(r"^(\S+) +(\d+-\d+) +(publish|rollback) +(\d/\d) ", said, re.M)
    assert history == [
        ("step-50", "1-1", "publish", "4/4"),
        ("step-100", "1-2", "publish", "1/4"),
        ("step-50", "1-3", "rollback", "1/4"),
    ], said
    assert "verified: 1 of 1 workers" in said
    assert "background process" not in said
    (served,) = re.findall(r"file:(\S+)", block)
    assert same(load_file(checkpoints / served), load_file(checkpoints / "step-50.safetensors"))


def test_a_shell_block_that_fails_half_way_fails_here(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="exit code 1"):
        bash("refleet publish missing.safetensors --model policy --store ./store\ntrue\n", tmp_path)


def test_the_python_block_serves_step_50_again_in_the_end(
    valkey: Server, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (block,) = promised("python")
    assert '"policy"' in block, "the model name to replace"
    monkeypatch.chdir(tmp_path)
    module, trained, later, x = net(0), net(50), net(100), torch.ones(2, 8)
    known: dict[str, Any] = {"REDIS": valkey.url, "module": module, "trained": trained, "later": later, "x": x}
    exec(compile(block.replace('"policy"', repr(model)), "README.md", "exec"), known)
    assert same(module.state_dict(), trained.state_dict())
    assert known["version"].id == "step-50"
    assert torch.equal(known["y"], trained(x))
    with Publisher(valkey.url, model=model, store="./store") as publisher:
        assert [release.version for release in publisher.book.releases()] == ["step-50", "step-100", "step-50"]


def test_the_order_of_evidence_is_the_one_in_the_code() -> None:
    order = " < ".join(evidence.name for evidence in Evidence if evidence.value)
    assert f"`{order}`" in README


def test_lines_are_short_enough_to_read_in_a_terminal() -> None:
    assert [line for line in README.splitlines() if len(line) > 120] == []
