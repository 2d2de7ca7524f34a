"""This machine, for a benchmark: processes that end by their pids, room for them, what a copy takes."""

from __future__ import annotations

import os
import shutil
import socket
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np


@contextmanager
def ended(*command: object, **settings: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends with the block."""
    process = subprocess.Popen(list(map(str, command)), **settings)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def all_ended(commands: list[list[object]], **settings: Any) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The same for several: told to end one after the other, which takes as long as the slowest."""
    with ExitStack() as stack:
        processes = [stack.enter_context(ended(*command, **settings)) for command in commands]
        try:
            yield processes
        finally:
            for process in processes:
                process.terminate()


def alive(processes: list[subprocess.Popen[bytes]]) -> None:
    if any(process.poll() is not None for process in processes):
        raise SystemExit("a worker process died: see its output above")


def no_room(memory_bytes: float, disk_bytes: float, folder: Path) -> str:
    """Why so much would not fit; "" if it does."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    if memory_bytes > free:
        return f"takes {memory_bytes / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"
    free = shutil.disk_usage(folder).free
    if disk_bytes > free:
        return f"takes {disk_bytes / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free"
    return ""


def free_port() -> int:
    """One of the loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def memcpy(size: int, rounds: int = 5) -> float:
    """Median seconds to copy `size` bytes into touched memory."""
    source, target = np.ones(size, np.uint8), np.ones(size, np.uint8)
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def machine() -> dict[str, Any]:
    """What a figure was measured on."""
    names = [
        line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {"processor": names[0] if names else os.uname().machine, "cores": os.cpu_count(), "load": os.getloadavg()[0]}
