"""Real processes in one scene: `refleet serve --watch` and file workers, each behind a proxy of its own to one server.

Versions appear as files in the watched folder. A reader looks at what is served all the time.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from processes import BIN, Processes
from refleet.common import wire
from refleet.common.errors import RefleetError
from refleet.common.messages import Ack, Evidence
from refleet.common.redis_stream import RedisStream
from refleet.common.signing import SigningKey, Trust
from refleet.publisher.checkpoint import open_checkpoint
from refleet.publisher.compare import hashed
from refleet.publisher.fleet import newest_release
from safetensors.torch import save_file
from servers import Server
from tcp_proxy import HONEST, TcpProxy
from whole import Reader, look
from world import State, checkpoint


class Scene:
    """Starts with nothing running. `close` ends all of it."""

    def __init__(self, folder: Path, model: str, server: Server, *, tls: tuple[int, str] | None = None):
        """`tls`: the server's port for it, and the certificate that both sides shall trust."""
        self.folder, self.model, self.server = folder, model, server
        port = tls[0] if tls else server.port
        self.to_publisher, self.to_worker = TcpProxy(port), TcpProxy(port)
        self._scheme, self._query = ("rediss", f"?ssl_ca_certs={tls[1]}") if tls else ("redis", "")
        self.processes = Processes(folder, model)
        self.processes.redis = self.url(self.to_worker)
        # signed: of what is not, a flipped bit may make another release that is well-formed, too
        self._key, self._trust = folder / "key", folder / "trust"
        key = SigningKey.new()
        key.save(self._key)
        Trust.add(self._trust, key.public_text)
        self.known: dict[str, str] = {}
        self.fingerprints: dict[str, bytes] = {}
        self.publisher: subprocess.Popen[bytes] | None = None
        self.worker: subprocess.Popen[bytes] | None = None
        self.reader = Reader(self.processes.served("w0"), self.known).start()
        self._state: State | None = None
        self._watched = folder / "checkpoints"
        self._watched.mkdir()

    def url(self, proxy: TcpProxy) -> str:
        return f"{self._scheme}://127.0.0.1:{proxy.port}/0{self._query}"

    def start_publisher(self) -> subprocess.Popen[bytes]:
        command = [
            BIN / "refleet", "serve", "--model", self.model, "--store", self.folder / "store",
            "--watch", self._watched, "--redis", self.url(self.to_publisher), "--poll", "0.05", "--key", self._key,
        ]  # fmt: skip
        with open(self.folder / "publisher.log", "ab") as log:
            self.publisher = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder)
        return self.publisher

    def start_worker(self, *arguments: str | Path, crash_at: str = "") -> subprocess.Popen[bytes]:
        self.worker = self.processes.worker("w0", "--trust", self._trust, *arguments, crash_at=crash_at)
        return self.worker

    def publish(self, *, change: float = 0.05) -> str:
        """The next version's file appears, whole. Returns its id; the publisher takes it when it can."""
        number = len(self.known) + 1
        version = f"v{number}"
        self._state = checkpoint(number, change=change, base=self._state)
        temp = self._watched / f".{version}"
        save_file(self._state, temp)
        self.known[version] = look(temp).content
        with open_checkpoint(temp) as opened:
            self.fingerprints[version] = hashed(opened).fingerprint
        temp.rename(self._watched / f"{version}.safetensors")
        return version

    @property
    def newest(self) -> str:
        return f"v{len(self.known)}"

    @property
    def served(self) -> str:
        path = self.processes.served("w0")
        return look(path).version if path.exists() else ""

    def acks(self) -> list[Ack]:
        """What the worker's ack log holds now, oldest first; nothing while the server can't be asked."""
        stream = RedisStream(self.server.url, self.model)
        try:
            return [wire.unpack(data, Ack) for _, data in reversed(stream.last_acks("w0", 1000))]
        except RefleetError:
            return []
        finally:
            stream.close()

    def target(self) -> str:
        """The version that the log ends with; nothing while the server can't be asked."""
        stream = RedisStream(self.server.url, self.model)
        try:
            release = newest_release(stream)
        except RefleetError:
            return ""
        finally:
            stream.close()
        return release.version if release else ""

    def check(self) -> None:
        """One whole version is served, was at every look, and no ack claims what is not so."""
        claimed = [ack for ack in self.acks() if ack.evidence is Evidence.SERVING]
        for ack in claimed:
            assert ack.fingerprint == self.fingerprints[ack.version], f"an ack gives {ack.version} another content"
        if claimed:
            seen = look(self.processes.served("w0"))
            last = claimed[-1]
            assert seen.order >= (last.epoch, last.seq), f"an ack said SERVING {last.version}, the file is {seen}"
        assert self.reader.torn == [] and self.reader.back == []

    def settle(self, until: Callable[..., None], *, timeout_s: float = 60.0) -> None:
        """Without any fault the fleet gets to the newest version by itself, and says so."""
        self.to_publisher.link = self.to_worker.link = HONEST
        newest, reads = self.newest, self.reader.reads

        def settled() -> bool:
            for process in (self.publisher, self.worker):
                assert process is None or process.poll() is None, f"a process ended:\n{self.said()}"
            acks = self.acks() if self.served == newest else []
            return any(ack.evidence is Evidence.SERVING and ack.version == newest for ack in acks)

        until(settled, f"{newest} is served and acknowledged", timeout_s=timeout_s)
        until(lambda: self.reader.reads > reads, "the reader looked at it")
        self.check()

    def last_for(self, seconds: float, until: Callable[..., None]) -> None:
        """A fault lasts for so long, and what is served is looked at all the time."""
        end = time.monotonic() + seconds
        until(lambda: time.monotonic() > end, "the time passes", timeout_s=seconds + 20)
        self.check()

    def heard(self) -> Callable[[str], str]:
        """`heard()("worker")`: what the worker, or the publisher, said since."""
        logs = {"worker": self.folder / "w0" / "log", "publisher": self.folder / "publisher.log"}
        begin = {who: log.stat().st_size if log.exists() else 0 for who, log in logs.items()}
        return lambda who: logs[who].read_bytes()[begin[who] :].decode()

    def said(self) -> str:
        logs = (self.folder / "publisher.log", self.folder / "w0" / "log")
        return "\n".join(path.read_text()[-3000:] for path in logs if path.exists())

    def close(self) -> None:
        self.reader.close()
        if self.publisher and self.publisher.poll() is None:
            self.publisher.kill()
        if self.publisher:
            self.publisher.wait(20)
        self.processes.close()
        self.to_publisher.close()
        self.to_worker.close()


def temporary_disk(folder: Path, size: str = "24m") -> bool:
    """A file system of its own at `folder`; False where this user may not mount one."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def fill(disk: Path) -> Path:
    """Takes the room of a disk; returns the file that holds it."""
    room = os.statvfs(disk)
    (disk / "filler").write_bytes(bytes(room.f_bavail * room.f_bsize))
    return disk / "filler"
