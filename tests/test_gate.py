"""I1: no request is answered from a mixture of two versions."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from typing import TypeVar

import pytest
from refleet.common.errors import NotServing, RefitFailed, UsageError
from refleet.common.messages import Serving
from refleet.worker.gate import NOTHING_YET, Gate

T = TypeVar("T")
WAIT_S = 20.0
A, B = (Serving(version, 1, seq, bytes([seq]) * 32) for seq, version in enumerate(("A", "B"), start=1))


def open_gate(serving: Serving = A) -> Gate:
    gate = Gate()
    with gate.switching() as switch:
        switch.to(serving)
    return gate


def in_thread(act: Callable[..., T], *args: object) -> Future[T]:
    """What `act` returns or raises in a thread of its own: a daemon, so that one stuck for ever fails one test only."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(act(*args))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


@pytest.fixture
def waiting(until: Callable[..., None]) -> Callable[..., Future[object]]:
    """Run something that must block in the gate, and return once it does."""

    def start(gate: Gate, act: Callable[[], object]) -> Future[object]:
        before = len(gate._changed._waiters)  # type: ignore[attr-defined]
        future = in_thread(act)
        until(lambda: len(gate._changed._waiters) > before or future.done(), "the thread waits at the gate")  # type: ignore[attr-defined]
        assert not future.done(), future.exception() or future.result()
        return future

    return start


def switch_to(gate: Gate, serving: Serving) -> float:
    with gate.switching() as switch:
        switch.to(serving)
    return switch.pause_s


def ask(gate: Gate, timeout_s: float | None = None) -> str:
    with gate.serving(timeout_s) as serving:
        return serving.version


@pytest.fixture
def eager_threads() -> Iterator[None]:
    """Threads that take turns a thousand times more often, so that a race shows."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("eager_threads")
def test_no_request_sees_two_versions_and_no_switch_starves() -> None:
    """The engine is two places that a switch writes one after the other; a request reads one early and one late.

    Eight clients never pause between requests, so there is always one in flight: only precedence lets a switch in.
    """
    gate, engine, stop = open_gate(Serving("v0", 1, 1, bytes(32))), ["v0", "v0"], threading.Event()
    answered = threading.Event()

    def requests() -> set[tuple[str, str, str]]:
        seen = set()
        while not stop.is_set():
            with gate.serving() as serving:
                first = engine[0]
                answered.set()
                seen.add((serving.version, first, engine[1]))
        return seen

    clients = [in_thread(requests) for _ in range(8)]
    try:
        for n in range(1, 300):
            assert answered.wait(WAIT_S)
            with gate.switching(timeout_s=WAIT_S) as switch:
                engine[0] = f"v{n}"
                sum(range(500))  # room for a request to slip in
                engine[1] = f"v{n}"
                switch.to(Serving(f"v{n}", 1, n + 1, bytes(32)))
                answered.clear()
    finally:
        stop.set()
    answers = set().union(*(client.result(WAIT_S) for client in clients))
    assert {version for version, _, _ in answers} >= {f"v{n}" for n in range(299)}
    assert [mixed for mixed in answers if len(set(mixed)) > 1] == []


def test_many_requests_hold_the_gate_at_once() -> None:
    gate, together = open_gate(), threading.Barrier(8)

    def request() -> str:
        with gate.serving() as serving:
            together.wait(WAIT_S)
            return serving.version

    assert [f.result(WAIT_S) for f in [in_thread(request) for _ in range(8)]] == ["A"] * 8


def test_a_switch_waits_for_requests_in_flight_and_goes_before_new_ones(waiting: Callable[..., Future[object]]) -> None:
    gate = open_gate()
    with gate.serving() as first:
        switched = waiting(gate, lambda: switch_to(gate, B))
        late = [waiting(gate, lambda: ask(gate)) for _ in range(3)]
        assert gate.current == first == A
    assert [request.result(WAIT_S) for request in late] == ["B"] * 3
    assert switched.result(WAIT_S) >= 0.0


def test_a_request_inside_a_request_does_not_wait_for_the_switch_that_waits_for_both(
    waiting: Callable[..., Future[object]],
) -> None:
    gate = open_gate()
    with gate.serving():
        switched = waiting(gate, lambda: switch_to(gate, B))
        with gate.serving(timeout_s=0.0) as inner:
            assert inner == A
        assert not switched.done()  # leaving the inner request keeps the outer one's hold
        assert ask(gate, 0.0) == "A"
    switched.result(WAIT_S)
    assert ask(gate) == "B"


def test_a_request_that_ends_in_another_thread_leaves_nothing_behind(waiting: Callable[..., Future[object]]) -> None:
    gate, request = open_gate(), ExitStack()
    request.enter_context(gate.serving())
    in_thread(request.close).result(WAIT_S)
    with gate.switching(timeout_s=0.0) as switch:
        late = waiting(gate, lambda: ask(gate))
        switch.to(B)
    assert late.result(WAIT_S) == "B"


def test_an_error_while_switching_keeps_the_old_version() -> None:
    gate = open_gate()
    with pytest.raises(RuntimeError, match="boom"), gate.switching():
        raise RuntimeError("boom")
    assert ask(gate, 0.0) == "A"
    with gate.switching():
        pass
    assert ask(gate, 0.0) == "A"


def test_an_error_after_the_decision_keeps_the_decision() -> None:
    gate = open_gate()
    with pytest.raises(RuntimeError), gate.switching() as switch:
        switch.to(None)
        raise RuntimeError("boom")
    with pytest.raises(NotServing):
        ask(gate)


def test_a_gate_without_a_version_refuses_and_says_so() -> None:
    gate = Gate()
    assert (gate.current, gate.reason) == (None, NOTHING_YET)
    with pytest.raises(NotServing, match=NOTHING_YET) as caught:
        ask(gate)
    assert (caught.value.serving, bool(caught.value.next)) == ("nothing", True)
    switch_to(gate, A)
    assert (gate.current, gate.reason) == (A, None)


def test_a_closed_gate_refuses_with_its_reason_until_a_version_is_served_again() -> None:
    gate = open_gate()
    gate.close("quarantined: tensor 'w' differs")
    with pytest.raises(NotServing, match="quarantined: tensor 'w' differs"):
        ask(gate)
    assert gate.reason == "quarantined: tensor 'w' differs"
    switch_to(gate, B)
    assert ask(gate) == "B"


def test_closing_inside_a_switch_outlives_the_switch() -> None:
    gate = open_gate()
    with pytest.raises(RuntimeError), gate.switching():
        gate.close("the old version could not be restored")
        raise RuntimeError("boom")
    with pytest.raises(NotServing, match="could not be restored"):
        ask(gate)


def test_closing_stops_new_requests_without_waiting_for_those_in_flight() -> None:
    gate = open_gate()
    with gate.serving():
        gate.close("quarantined")
        with pytest.raises(NotServing):
            ask(gate)
    assert gate.current is None


def test_a_request_waits_no_longer_than_its_timeout() -> None:
    gate = open_gate()
    with gate.switching() as switch:
        with pytest.raises(NotServing, match=r"0\.01 s") as caught:
            in_thread(ask, gate, 0.01).result(WAIT_S)
        assert caught.value.serving == "A"
        switch.to(B)
    assert ask(gate, 0.01) == "B"


def test_a_switch_waits_no_longer_than_its_timeout_and_the_gate_opens_again() -> None:
    gate = open_gate()
    with gate.serving():
        with pytest.raises(RefitFailed, match="1 requests in flight"):
            in_thread(lambda: gate.switching(timeout_s=0.0).__enter__()).result(WAIT_S)
        assert in_thread(ask, gate, 0.0).result(WAIT_S) == "A"
    switch_to(gate, B)
    assert ask(gate, 0.0) == "B"


def test_switches_take_turns(waiting: Callable[..., Future[object]]) -> None:
    gate = open_gate()
    with gate.switching() as switch:
        second = waiting(gate, lambda: switch_to(gate, B))
        switch.to(A)
    second.result(WAIT_S)
    assert gate.current == B


def test_what_would_wait_for_itself_is_refused() -> None:
    gate = open_gate()
    with gate.serving(), pytest.raises(UsageError), gate.switching():
        raise AssertionError("unreachable")
    with gate.switching():
        with pytest.raises(UsageError), gate.switching():
            raise AssertionError("unreachable")
        with pytest.raises(NotServing, match="this thread is switching"):
            ask(gate)
    assert ask(gate, 0.0) == "A"


def test_the_pause_is_measured_from_closed_to_open_waiting_included(waiting: Callable[..., Future[object]]) -> None:
    now = [100.0]
    gate = Gate(clock=lambda: now[0])
    with gate.switching() as switch:
        now[0] += 2.5
        switch.to(A)
        assert switch.pause_s == 0.0
    assert switch.pause_s == 2.5
    with gate.serving():
        switched = waiting(gate, lambda: switch_to(gate, B))
        now[0] += 4.0
    assert switched.result(WAIT_S) == 4.0
