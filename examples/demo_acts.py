"""What the demo does, act by act. Each act checks what it shows; any of them may raise RefleetError or WorkerDied."""

from __future__ import annotations

import time

from demo_fleet import WORKERS
from demo_screen import megabytes
from demo_show import BROKEN, VICTIM, WAIT_S, Show, ms_since
from refleet.publisher import Published
from refleet.publisher.fleet import fleet
from refleet.publisher.verify import verify

_ALL = len(WORKERS)


def play(show: Show) -> None:
    """All acts, and the checks over all of them."""
    train_and_publish(show)
    roll_back(show)
    roll_forward(show)
    kill_and_restart(show)
    verify_all(show)
    count_up(show)


def train_and_publish(show: Show) -> None:
    """The first versions, each with its accuracy measured by asking the workers."""
    plan, report = show.plan, show.report
    for number in range(plan.versions):
        last = number == plan.versions - 1
        show.screen.act(f"trains, publishes, asks every worker: version {number + 1} of {plan.versions}")
        if number:
            show.train()
        if "crash" in show.sabotage and last:
            show.processes.by_id[BROKEN].kill()
        show.publish(breaks=tuple(how for how in ("flip", "lie") if last and how in show.sabotage))
    shares = [row.accuracy for row in show.screen.rows]
    report.check(
        "accuracy",
        expected=f"< 30%, then >= {plan.least_accuracy:.0%}",
        seen=f"{shares[0]:.1%}, then {shares[-1]:.1%}",
        ok=shares[0] < 0.3 and shares[-1] >= plan.least_accuracy,
    )
    updates = show.screen.rows[1:]  # the first one has nothing to build on
    sent, full = sum(row.sent_bytes for row in updates), sum(row.full_bytes for row in updates)
    report.check(
        "bytes", expected=f"< half of {megabytes(full)}", seen=f"{megabytes(sent)} ({sent / full:.1%})",
        ok=sent * 2 < full,
    )  # fmt: skip


def roll_back(show: Show) -> None:
    """To an earlier version, by its id."""
    first, version, report = show.first[show.plan.back_to], show.plan.back_to, show.report
    show.screen.act(f"rolls back to {version}")
    started = time.perf_counter()
    published = show.publisher.rollback(version)
    spent = {"send": ms_since(started)}
    acks = show.wait(published, workers=_ALL, spent=spent)
    if "rollback" in show.sabotage:
        show.break_worker("flip")
    answers = show.ask(published.release)
    show.compare(published.release, answers, spent)
    wanted = first.release.fingerprint
    held = [name for name, ack in acks.items() if ack.fingerprint == wanted == published.release.fingerprint]
    same = [name for name, answer in answers.items() if answer == first.workers[name]]
    report.check(
        "rollback-fingerprint", expected=f"{wanted.hex()[:8]} on {_ALL}",
        seen=f"{published.release.fingerprint.hex()[:8]} on {len(held)}", ok=len(held) == _ALL,
    )  # fmt: skip
    report.check(
        "rollback-answers", expected=f"{_ALL} bit-identical", seen=f"{len(same)} bit-identical",
        ok=len(same) == _ALL,
    )  # fmt: skip
    sent = published.release.payload_bytes + sum(ack.payload_bytes for ack in acks.values())
    report.check("rollback-bytes", expected="0 bytes", seen=f"{sent} bytes", ok=sent == 0)
    show.screen.say(f"{version} again: fingerprint {wanted.hex()[:8]} on {len(held)}, {len(same)} answer as then")


def roll_forward(show: Show) -> None:
    """The trainer goes on, and so do the workers."""
    show.screen.act("rolls forward by a publish")
    show.train()
    wanted = show.publish().version
    there = [answer for answer in show.first[wanted].workers.values() if answer.version == wanted]
    show.report.check(
        "roll-forward", expected=f"{_ALL} on {wanted}", seen=f"{len(there)} on {wanted}",
        ok=len(there) == _ALL,
    )  # fmt: skip


def kill_and_restart(show: Show) -> None:
    """One worker dies, misses two versions, comes back and catches up."""
    before, report = show.trainer.version, show.report
    victim = show.processes.by_id[VICTIM]
    show.screen.act(f"kill -9 of {VICTIM} (pid {victim.pid}); the trainer goes on")
    code = show.processes.kill(VICTIM)
    show.screen.pids = show.processes.pids()
    named = show.tally.named
    for _ in range(2):
        show.train()
        missed = show.publish(without=VICTIM)
    answered = show.tally.named - named
    report.check(
        "killed", expected=f"exit -9, {2 * (_ALL - 1)} answers", seen=f"exit {code}, {answered} answers",
        ok=code == -9 and answered == 2 * (_ALL - 1),
    )  # fmt: skip

    show.screen.act(f"restarts {VICTIM} on its own folder: it missed two versions")
    started = time.perf_counter()
    process = show.processes.start(VICTIM)
    show.screen.pids = show.processes.pids()
    process.ready()
    ack = show.wait(Published(missed, show.publisher.stream), workers=_ALL, spent={})[VICTIM]
    way, served = process.way(missed.version)
    show.screen.say(f"{VICTIM}, {ms_since(started) / 1000:.1f} s: {' > '.join(way)}")
    report.check(
        "resumed", expected=f"{before} > {missed.version}", seen=" > ".join(served),
        ok=served == [before, missed.version],
    )  # fmt: skip
    report.check(
        "caught-up", expected=f"< half of {megabytes(missed.full_bytes)}",
        seen=f"{megabytes(ack.payload_bytes)} ({ack.payload_bytes / missed.full_bytes:.1%})",
        ok=0 < ack.payload_bytes * 2 < missed.full_bytes,
    )  # fmt: skip
    alike = show.compare(missed, show.ask(missed), None)
    report.check("caught-up-answers", expected=f"{_ALL} bit-identical", seen=f"{alike} bit-identical", ok=alike == _ALL)


def verify_all(show: Show) -> None:
    """Every worker hashes what its engine really holds."""
    show.screen.act("asks every worker to hash its engine's weights, as `refleet verify` does")
    if "verify" in show.sabotage:
        show.break_worker("flip")
    found = verify(show.publisher.stream, timeout_s=WAIT_S)
    verified = {worker: ack.verified for worker, ack in found.answers.items() if ack.verified is not None}
    good = [one.tensors for one in verified.values() if one.ok]
    bad = "".join(f", {worker} differs in {one.first_bad}" for worker, one in verified.items() if not one.ok)
    tensors = len(show.trainer.weights())
    show.report.check(
        "verify", expected=f"{_ALL * tensors} tensors of {_ALL}",
        seen=f"{sum(good)} tensors of {len(good)}{bad}",
        ok=found.ok and good == [tensors] * _ALL,
    )  # fmt: skip
    show.screen.fleet = fleet(show.publisher.stream)


def count_up(show: Show) -> None:
    """The checks over the whole demo."""
    tally, report = show.tally, show.report
    report.check(
        "served", expected=f"{tally.due} acks", seen=f"{tally.served} acks SERVING",
        ok=0 < tally.due == tally.served,
    )  # fmt: skip
    report.check(
        "version-ids", expected=f"{tally.answers} answers", seen=f"{tally.named} right",
        ok=0 < tally.answers == tally.named,
    )  # fmt: skip
    report.check(
        "answers-alike", expected=f"{tally.answers} answers", seen=f"{tally.alike} alike",
        ok=0 < tally.answers == tally.alike,
    )  # fmt: skip
