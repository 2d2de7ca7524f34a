"""`time`, `random`, `secrets`, `uuid` and `socket` of a simulated process, and the crash points that it passes."""

from __future__ import annotations

from types import SimpleNamespace

from .kernel import WALL_S, kernel
from .system import process


def wall_s() -> float:
    return kernel().now + WALL_S + float(process().host.clock_off_s)


def monotonic() -> float:
    return kernel().now


def sleep(seconds: float) -> None:
    kernel().sleep(seconds)


time = SimpleNamespace(
    time=wall_s, time_ns=lambda: int(wall_s() * 1e9), monotonic=monotonic, perf_counter=monotonic, sleep=sleep
)
random = SimpleNamespace(uniform=lambda low, high: kernel().rng.uniform(low, high))


def token_hex(size: int) -> str:
    return kernel().ids.randbytes(size).hex()


secrets = SimpleNamespace(token_hex=token_hex)
uuid = SimpleNamespace(uuid4=lambda: SimpleNamespace(hex=token_hex(16)))
socket = SimpleNamespace(gethostname=lambda: process().host.name)


def crash_point(point: str) -> None:
    """In the place of `common.crashpoint`: the process ends here if the world said so."""
    mine = process()
    mine.kernel.passed[point] += 1
    left = mine.points.get(point)
    if left is not None:
        if left <= 0:
            mine.host.counts["kill.at-point"] += 1
            kernel().kill(mine, f"at {point}")
        mine.points[point] = left - 1
    kernel().maybe()
