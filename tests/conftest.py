"""Shared by all tests: a deadline-bound wait instead of sleeping."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest


@pytest.fixture
def until() -> Callable[..., None]:
    """`until(condition, "what should become true")`: polls, and fails with the description after 20 s."""

    def wait(condition: Callable[[], object], what: str, timeout_s: float = 20.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"not within {timeout_s:.0f} s: {what}"
            time.sleep(0.01)

    return wait
