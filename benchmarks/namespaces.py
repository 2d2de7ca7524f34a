"""Two network namespaces with a shaped link between them (Linux, root). Always removed again."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

NET = "10.213.77"  # addresses inside the namespaces only: nothing outside can see them


@dataclass(frozen=True, slots=True)
class Side:
    """One end of the link."""

    namespace: str
    address: str
    device: str

    def command(self, *words: object) -> list[str]:
        """A command line that runs inside."""
        return ["ip", "netns", "exec", self.namespace, *map(str, words)]


def missing() -> str:
    """Why there can't be any here; "": there can."""
    lacking = [tool for tool in ("ip", "tc") if not shutil.which(tool)]
    if lacking:
        return f"no {' and no '.join(lacking)} command (Debian: apt-get install iproute2)"
    if os.geteuid():
        return "network namespaces need root"
    name = f"refleet-try-{os.getpid()}"
    tried = _try("ip", "netns", "add", name)
    if not tried:
        _try("ip", "netns", "del", name)
    return tried


@contextmanager
def link() -> Iterator[tuple[Side, Side]]:
    """Two sides, joined, not shaped yet."""
    pid = os.getpid()
    sides = [Side(f"refleet-{end}-{pid}", f"{NET}.{n}", f"rf{n}-{pid}") for n, end in ((1, "near"), (2, "far"))]
    made = []
    try:
        for side in sides:
            _run("ip", "netns", "add", side.namespace)
            made.append(side)
        near, far = sides
        _run("ip", "-n", near.namespace, "link", "add", near.device, "type", "veth", "peer", "name", far.device,
             "netns", far.namespace)  # fmt: skip
        for side in sides:
            _run("ip", "-n", side.namespace, "addr", "add", f"{side.address}/24", "dev", side.device)
            for device in ("lo", side.device):
                _run("ip", "-n", side.namespace, "link", "set", device, "up")
        yield near, far
    finally:
        for side in made:
            _try("ip", "netns", "del", side.namespace)  # takes the devices with it


def shape(side: Side, gigabits: float) -> None:
    """Limit what leaves this side: a token bucket of 1 ms, a queue of 50 ms."""
    bits = int(gigabits * 1e9)
    burst = max(bits // 8 // 1000, 128 << 10)
    _run("tc", "-n", side.namespace, "qdisc", "replace", "dev", side.device, "root", "tbf", "rate", f"{bits}bit",
         "burst", str(burst), "latency", "50ms")  # fmt: skip


def _run(*command: str) -> None:
    said = _try(*command)
    if said:
        raise SystemExit(said)


def _try(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    return "" if done.returncode == 0 else f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}"
