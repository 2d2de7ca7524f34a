"""Runs of the real `refleet-worker`: processes of their own, watched through what they print and their HTTP port."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from refleet.publisher import Publisher
from servers import Server

Until = Callable[..., None]
State = dict[str, torch.Tensor]

PROGRAM = Path(sys.executable).with_name("refleet-worker")

ENGINE = """\
import torch

def make():
    torch.manual_seed(0)
    return torch.nn.Linear(8, 4), (torch.ones(2, 8),)

def breaks():
    raise RuntimeError("no GPU today")
"""


def get(url: str, *, method: str = "GET") -> tuple[int, Any]:
    """(status, body), the body parsed if it is JSON."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=10) as reply:
            code, kind, body = reply.status, reply.headers["Content-Type"], reply.read()
    except urllib.error.HTTPError as error:
        with error:
            code, kind, body = error.code, error.headers["Content-Type"], error.read()
    return code, json.loads(body) if kind == "application/json" and body else body.decode()


def sample(text: str, name: str) -> float:
    """One sample of a /metrics text, named with its labels."""
    for line in text.splitlines():
        if line.rpartition(" ")[0] == name:
            return float(line.rpartition(" ")[2])
    raise AssertionError(f"no sample {name} in:\n{text}")


class WorkerRun:
    """One started worker. What it prints lies in files, so that it never waits for us."""

    def __init__(self, command: list[str], environ: dict[str, str], here: Path, name: str):
        self._out, self._err = here / f"{name}.out", here / f"{name}.err"
        with open(self._out, "wb") as out, open(self._err, "wb") as err:
            self.process = subprocess.Popen(command, env=environ, cwd=here, stdout=out, stderr=err)

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    @property
    def events(self) -> list[dict[str, Any]]:
        """The complete lines so far of a run with --json."""
        return [json.loads(line) for line in self.out.splitlines(keepends=True) if line.endswith("\n")]

    @property
    def url(self) -> str:
        """Where it answers HTTP; "" before it said so."""
        return next((event["http"] for event in self.events if event["event"] == "started"), "")

    def status(self) -> dict[str, Any]:
        """What /status says; {} before it listens."""
        found = get(self.url + "/status")[1] if self.url else {}
        assert isinstance(found, dict)
        return found

    def serves(self, version: str) -> bool:
        assert self.process.poll() is None, f"it ended: {self.out}{self.err}"
        serving = self.status().get("serving")
        return bool(serving) and serving["version"] == version

    def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Signal it and return its exit code."""
        self.process.send_signal(how)
        return self.process.wait(60)

    def code(self) -> int:
        """The exit code of a run that ends by itself."""
        return self.process.wait(60)


class Runs:
    """Starts workers of one model in folder `here`, and ends what is left of them."""

    def __init__(self, here: Path, model: str):
        self.here, self.model = here, model
        self._running: list[WorkerRun] = []
        (here / "engines_here.py").write_text(ENGINE)

    def start(
        self, *arguments: object, redis: str, worker: str = "w0", engine: str | None = None, state: str | None = None,
        environ: dict[str, str] | None = None, model: str | None = None,
    ) -> WorkerRun:  # fmt: skip
        """A worker; by default a file engine, quick beats, a free HTTP port, JSON lines."""
        command: list[object] = [
            PROGRAM, "run", "--model", model or self.model, "--id", worker, "--state", state or worker,
            "--engine", engine or f"file:{self.here / worker}.safetensors", "--redis", redis, *arguments,
        ]  # fmt: skip
        if "--text" in command:
            command.remove("--text")
        else:
            command.append("--json")
        for flag, value in (("--heartbeat", "0.2"), ("--http", "0")):
            if flag not in command:
                command += [flag, value]
        full = {k: v for k, v in os.environ.items() if not k.startswith("REFLEET_")} | (environ or {})
        run = WorkerRun([str(word) for word in command], full, self.here, f"{worker}-{len(self._running)}")
        self._running.append(run)
        return run

    def close(self) -> None:
        for run in self._running:
            if run.process.poll() is None:
                run.process.kill()
            run.process.wait(60)


@pytest.fixture
def runs(tmp_path: Path, model: str) -> Iterator[Runs]:
    made = Runs(tmp_path, model)
    yield made
    made.close()


def weights(seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {"weight": torch.randn(4, 8, generator=generator), "bias": torch.randn(4, generator=generator)}


def publisher(server: Server, runs: Runs) -> Publisher:
    return Publisher(server.url, model=runs.model, store=runs.here / "store")
