"""Runs of the real command line, in this process or in one of their own, and checkpoints for them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from refleet.publisher.cli import run
from refleet.worker.engine import Engine
from refleet.worker.memory_engine import MemoryEngine
from refleet.worker.worker import Worker
from safetensors.torch import save_file
from servers import Server
from world import State, checkpoint


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, which must be one JSON document."""
        return json.loads(self.out)


class Cli:
    """`refleet` with an environment of its own, in folder `here`."""

    def __init__(self, here: Path, url: str, model: str, capsys: pytest.CaptureFixture[str]):
        self.here, self.url, self.model, self._capsys = here, url, model, capsys
        self.environ = {"REFLEET_REDIS": url, "REFLEET_STORE": str(here / "store"), "HOME": str(here)}

    def __call__(self, *arguments: object) -> Ran:
        """Runs the command and returns what it said. No model flag is added."""
        self._capsys.readouterr()
        code = run([str(argument) for argument in arguments], self.environ)
        return Ran(code, *self._capsys.readouterr())

    def on(self, command: str, *arguments: object) -> Ran:
        """The same with `--model` of this test."""
        return self(command, *arguments, "--model", self.model)

    def ok(self, command: str, *arguments: object) -> Any:
        """The JSON of a command on this test's model that must succeed."""
        ran = self.on(command, *arguments, "--json")
        assert ran.code == 0, (ran.out, ran.err)
        return ran.json

    def fails(self, command: str, *arguments: object) -> tuple[int, Any]:
        """Exit code and `error` of a command on this test's model that must fail."""
        ran = self.on(command, *arguments, "--json")
        assert ran.code != 0, ran.out
        return ran.code, ran.json["error"]

    def start(self, *arguments: object) -> subprocess.Popen[str]:
        """The installed entry point as a process of its own."""
        program = Path(sys.executable).with_name("refleet")
        return subprocess.Popen(
            [program, *map(str, arguments)], cwd=self.here, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, **self.environ, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip

    @contextmanager
    def worker(self, worker_id: str = "w0", engine: Engine | None = None, **options: Any) -> Iterator[Worker]:
        worker = Worker(
            self.url, model=self.model, engine=engine or MemoryEngine(), state_dir=self.here / worker_id,
            worker_id=worker_id, heartbeat_s=0.1, **options,
        )  # fmt: skip
        with worker:
            yield worker

    def save(self, name: str, state: State) -> Path:
        path = self.here / name
        save_file(state, path)
        return path

    def steps(self, count: int) -> list[Path]:
        """`step-1.safetensors` ...: each differs from the one before in about 1 % of its elements."""
        states = [checkpoint(1)]
        for number in range(2, count + 1):
            states.append(checkpoint(number, change=0.01, base=states[-1]))
        return [self.save(f"step-{n}.safetensors", state) for n, state in enumerate(states, start=1)]


@pytest.fixture
def cli(
    valkey: Server, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Cli:
    """Over the shared Valkey, in a folder of its own: no other `refleet.toml` is near."""
    monkeypatch.chdir(tmp_path)
    return Cli(tmp_path, valkey.url, model, capsys)
