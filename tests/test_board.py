"""What a worker's board says of silence, bytes and lag, by a clock that the tests turn."""

from __future__ import annotations

from refleet.common.messages import Evidence, Failure, Serving, WorkerStatus
from refleet.worker.board import APPLYING, SERVING, Board, Event

AWAY = Failure("StreamUnavailable", "no answer", None)


def board(clock: list[float], events: list[Event]) -> Board:
    """A board over a fresh worker's status, STALE after 5 s of `clock[0]`."""
    status = WorkerStatus(
        "w0", "0" * 32, "m", "JOINING", None, None, Evidence.NONE, None, 0, 0, (), None, 0, 0, None, False,
        "memory", 1.0, 0,
    )  # fmt: skip
    return Board(status, stale_after_s=5, on_event=events.append, clock=lambda: clock[0])


def test_a_long_switch_or_download_is_no_silence() -> None:
    clock, events = [0.0], list[Event]()
    seen, one = board(clock, events), Serving("one", 1, 1, bytes(32))
    seen.contact()
    seen.show(SERVING, target=one, serving=one)
    clock[0] = 4.9
    assert seen.status.state == "SERVING"
    clock[0] = 5.1
    assert seen.status.state == "STALE"
    assert seen.state == SERVING, "what the worker itself does has not changed"
    seen.progress(10, 20)
    assert seen.status.state == "SERVING", "bytes that arrive are contact"
    seen.show(APPLYING, "applying")
    clock[0] = 60.0
    assert seen.status.state == "APPLYING"
    seen.show(SERVING, "serving")
    assert (seen.status.state, round(seen.silence_s, 1)) == ("SERVING", 54.9)
    clock[0] = 66.0
    assert seen.status.state == "STALE"


def test_silence_is_told_once_at_once_if_there_never_was_contact() -> None:
    clock, events = [0.0], list[Event]()
    seen = board(clock, events)
    for clock[0] in (0.1, 2.0, 6.0, 60.0):
        seen.out_of_contact(AWAY)
    assert len(events) == 1
    seen.contact()
    assert events[-1].text == "contact to the server again"
    clock[0] = 61.0
    seen.out_of_contact(AWAY)
    assert len(events) == 2, "a hiccup of a second is not worth a line"
    clock[0] = 66.0
    seen.out_of_contact(AWAY)
    assert len(events) == 3


def test_received_bytes_count_over_payloads_and_lag_time_from_the_target_on() -> None:
    clock, events = [0.0], list[Event]()
    seen, one, two = board(clock, events), Serving("one", 1, 1, bytes(32)), Serving("two", 1, 2, bytes(32))
    for target in (one, two):
        seen.show("RECEIVING", "receiving", target=target, expected_bytes=50)
        assert (seen.status.received_bytes, seen.status.expected_bytes) == (0, 50)
        seen.progress(20, 50)
        clock[0] += 2
        seen.progress(50, 50)
        assert seen.behind_s == 2
        seen.show(SERVING, "serving", target=target, serving=target)
        assert seen.behind_s == 0
    assert seen.received_total == 100
