"""Real `refleet` and `refleet-worker` processes of one test, ended by their pids."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from refleet.common.redis_stream import RedisStream
from refleet.publisher.fleet import WorkerView, fleet

BIN = Path(sys.executable).parent


class Processes:
    """Commands over `redis` (a URL, set by the test) with one store and one folder per worker below `folder`."""

    def __init__(self, folder: Path, model: str):
        self.folder, self.model, self.redis = folder, model, ""
        self._running: list[subprocess.Popen[bytes]] = []
        self._streams: dict[str, RedisStream] = {}

    def run(self, *arguments: str | Path, crash_at: str = "", store: str = "store") -> subprocess.CompletedProcess[str]:
        """`refleet COMMAND ... --model M`, whatever its exit code."""
        command = [BIN / "refleet", *arguments, "--model", self.model]
        return subprocess.run(
            command,
            env=self._environment(crash_at, store),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=100,
        )

    def refleet(self, *arguments: str | Path, store: str = "store") -> str:
        """The same, and it must succeed; returns what it printed."""
        done = self.run(*arguments, store=store)
        assert done.returncode == 0, f"{arguments}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def worker(self, worker_id: str, *arguments: str | Path, crash_at: str = "") -> subprocess.Popen[bytes]:
        """A file worker that keeps `<id>/served.safetensors`; the same id again is the same worker restarted."""
        home = self.folder / worker_id
        home.mkdir(exist_ok=True)
        command = [
            BIN / "refleet-worker", "run", "--model", self.model, "--id", worker_id, "--state", home / "state",
            "--engine", f"file:{self.served(worker_id)}", "--heartbeat", "0.2", *arguments,
        ]  # fmt: skip
        with open(home / "log", "ab") as log:
            process = subprocess.Popen(
                command, env=self._environment(crash_at, "store"), cwd=self.folder, stdout=log, stderr=log
            )
        self._running.append(process)
        return process

    def served(self, worker_id: str) -> Path:
        return self.folder / worker_id / "served.safetensors"

    def status_of(self, worker_id: str) -> str | None:
        view = self._view(worker_id)
        return view.state if view else None

    def serving_of(self, worker_id: str) -> str | None:
        view = self._view(worker_id)
        return view.status.serving.version if view and view.status and view.status.serving else None

    def end(self, process: subprocess.Popen[bytes]) -> None:
        """SIGTERM, and it must end cleanly."""
        process.terminate()
        assert process.wait(60) == 0

    def close(self) -> None:
        for process in self._running:
            if process.poll() is None:
                process.kill()
            process.wait(60)
        for stream in self._streams.values():
            stream.close()

    def _view(self, worker_id: str) -> WorkerView | None:
        """As `refleet status` sees it, without the cost of a process for every look."""
        if self.redis not in self._streams:
            self._streams[self.redis] = RedisStream(self.redis, self.model)
        workers = fleet(self._streams[self.redis]).workers
        return next((worker for worker in workers if worker.id == worker_id), None)

    def _environment(self, crash_at: str, store: str) -> dict[str, str]:
        return os.environ | {
            "REFLEET_REDIS": self.redis,
            "REFLEET_STORE": str(self.folder / store),
            "REFLEET_CRASH_AT": crash_at,
        }
