"""The processes of the long run: a publisher that watches a folder, four workers, a server, and what they use."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path

from processes import BIN
from refleet.common import wire
from refleet.common.errors import RefleetError
from refleet.common.messages import Ack, Evidence
from refleet.common.redis_stream import RedisStream
from refleet.common.shm import SHM
from refleet.publisher.checkpoint import open_checkpoint
from refleet.publisher.compare import hashed
from refleet.publisher.fleet import fleet
from safetensors.numpy import save_file
from servers import Server
from soak_model import Versions, make_known, tensors_digest
from whole import Reader, look

MODEL = "soak"
FILE_WORKERS, TORCH_WORKERS = ("w0", "w1"), ("t0", "t1")
TESTS = Path(__file__).parent


class Fleet:
    """Processes by name: `publisher`, w0, w1 (files), t0, t1 (torch, sharing a folder), late ones (files)."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.running = folder, dict[str, subprocess.Popen[bytes]]()
        self.server = Server("valkey", aof=True).start()
        self.stream = RedisStream(self.server.url, MODEL, timeout_s=5)
        self.acks, self.problems = Counter[str](), list[str]()
        self.contents, self.fingerprints, self.readers = dict[str, str](), dict[str, bytes](), dict[str, Reader]()
        self._versions, self._cursors = Versions(seed), dict[str, str]()
        self._heard = self._newest = 0
        self.watched = folder / "checkpoints"
        self.watched.mkdir()

    # ------------------------------------------------------------------ processes

    def start(self, name: str) -> None:
        home = self.folder / name
        home.mkdir(exist_ok=True)
        command: list[str | Path]
        if name == "publisher":
            command = [BIN / "refleet", "serve", "--model", MODEL, "--store", home / "store", "--watch", self.watched,
                       "--redis", self.server.url, "--poll", "0.05", "--json"]  # fmt: skip
        elif name in TORCH_WORKERS:
            command = [sys.executable, TESTS / "soak_worker.py", name, self.folder, self.server.url, MODEL]
        else:
            served = home / "served.safetensors"
            command = [BIN / "refleet-worker", "run", "--model", MODEL, "--id", name, "--state", home / "state",
                       "--engine", f"file:{served}", "--redis", self.server.url, "--heartbeat", "0.2"]  # fmt: skip
            if name not in self.readers:
                self.readers[name] = Reader(served, self.contents, pause_s=0.03).start()
        with open(home / "log", "ab") as log:
            self.running[name] = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=self.folder, env={**os.environ, "PYTHONPATH": str(TESTS)}
            )

    def kill(self, name: str) -> None:
        self.running[name].kill()
        self.running.pop(name).wait(60)

    def end(self, name: str) -> None:
        """SIGTERM; it has to end with 0."""
        process = self.running.pop(name)
        process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait(60)
        if code:
            self.problems.append(f"{name} ended with {code} after SIGTERM")

    def check_alive(self) -> None:
        """Nobody may end who was not asked to."""
        for name, process in list(self.running.items()):
            if process.poll() is not None:
                self.problems.append(f"{name} ended by itself with {process.returncode}: {self.log(name)[-600:]}")
                del self.running[name]
                self.start(name)

    def log(self, name: str) -> str:
        return (self.folder / name / "log").read_text()

    def rollback(self, version: str) -> bool:
        command = [BIN / "refleet", "rollback", "--to", version, "--model", MODEL, "--redis", self.server.url,
                   "--store", self.folder / "publisher" / "store"]  # fmt: skip
        return subprocess.run(command, capture_output=True, check=False, timeout=60).returncode == 0

    # ------------------------------------------------------------------ versions

    def next_version(self) -> str:
        """Its checkpoint appears in the watched folder. Those before it are removed after a while."""
        state = self._versions.next()
        version = f"v{len(self.contents) + 1}"
        temp = self.watched / f".{version}"
        save_file(state, temp)
        self.contents[version] = look(temp).content
        make_known(self.folder, version, tensors_digest(state))
        with open_checkpoint(temp) as opened:
            self.fingerprints[version] = hashed(opened).fingerprint
        temp.rename(self.watched / f"{version}.safetensors")
        old = self.watched / f"v{len(self.contents) - 20}.safetensors"
        old.unlink(missing_ok=True)
        return version

    def published(self) -> int:
        """How many were published: they are in turn. A publisher that is killed may not have said its last one."""
        log = self.folder / "publisher" / "log"
        if log.exists():
            with open(log, "rb") as file:
                file.seek(self._heard)
                new = file.read()
            whole = new[: new.rfind(b"\n") + 1]
            self._heard += len(whole)
            for line in whole.splitlines():
                event = json.loads(line) if line.startswith(b"{") else {}
                if event.get("event") == "published":
                    self._newest = max(self._newest, int(event["version"][1:]))
        return self._newest

    # ------------------------------------------------------------------ what is seen

    def serving(self) -> dict[str, tuple[tuple[int, int], str]]:
        """Release and version that each live worker shows; nothing where the server can't be asked."""
        try:
            views = fleet(self.stream).live
        except RefleetError:
            return {}
        return {
            v.id: (v.status.serving.order, v.status.serving.version) for v in views if v.status and v.status.serving
        }

    def take_acks(self) -> None:
        """Counts those that came since the last time; each claim has to be of the content that was published."""
        try:
            names = (*FILE_WORKERS, *TORCH_WORKERS)
            found = self.stream.acks({name: self._cursors.get(name, "0-0") for name in names}, block_s=0)
        except RefleetError:
            return
        for name, entries in found.items():
            for cursor, data in entries:
                self._cursors[name] = cursor
                ack = wire.unpack(data, Ack)
                self.acks[ack.evidence.name if ack.failure is None else "with a failure"] += 1
                if ack.evidence is Evidence.SERVING and ack.fingerprint != self.fingerprints.get(ack.version):
                    self.problems.append(f"{name} acknowledged {ack.version} with another content")

    def forget_cursors(self) -> None:
        """The server was emptied: ids of acks begin anywhere."""
        self._cursors.clear()

    def usage(self) -> dict[str, float]:
        """MB now: memory and disk of each process, shared memory, and what the server holds."""
        found = {}
        for name, process in self.running.items():
            if not name.startswith("late"):
                found[f"memory {name}"] = resident_bytes(process.pid) / 1e6
        for home in ("publisher", *FILE_WORKERS, *TORCH_WORKERS, "host"):
            found[f"disk {home}"] = disk_bytes(self.folder / home) / 1e6
        found["shared memory"] = sum(disk_bytes(folder) for folder in self.shared_folders()) / 1e6
        with suppress(RefleetError):
            found["server"] = self.stream.facts().used_bytes / 1e6
        return found

    def shared_folders(self) -> list[Path]:
        ids = [path.read_bytes().split()[-1].decode() for path in (self.folder / "host").glob("*/id")]
        return [SHM / f"refleet-{os.getuid()}-{each}" for each in ids]

    def torn(self) -> tuple[int, list[str]]:
        """(how often anybody looked at what is served, what was wrong)."""
        looks = [json.loads(path.read_text() or "{}") for path in self.folder.glob("t?/reads-*")]
        reads = sum(reader.reads for reader in self.readers.values()) + sum(each.get("reads", 0) for each in looks)
        wrong = [text for reader in self.readers.values() for text in reader.torn]
        return reads, wrong + [text for each in looks for text in each.get("torn", [])]

    def back(self) -> list[str]:
        """Files that went back to an older release."""
        return [text for reader in self.readers.values() for text in reader.back]

    def close(self) -> None:
        for reader in self.readers.values():
            reader.close()
        for process in self.running.values():
            process.kill()
            process.wait(60)
        self.stream.close()
        self.server.stop()


def resident_bytes(pid: int) -> int:
    """Memory of its own: what it shares with others lies in files or in shared memory, which are counted there."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def disk_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            if path.is_file() and not path.name.startswith(("log", "reads")):
                total += path.stat().st_blocks * 512
        except OSError:
            continue  # removed meanwhile
    return total
