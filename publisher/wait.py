"""Wait until the fleet got where a release asks it to be, by its acks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ..common import wire
from ..common.errors import DeadlineExceeded, ProtocolError, Superseded, UsageError, WorkerFailed
from ..common.messages import Ack, Evidence, Release
from ..common.stream import Stream
from .fleet import Fleet, WorkerView, fleet

_POLL_S = 0.25


@dataclass(slots=True)
class Progress:
    """Acks of one release so far: the best per worker."""

    best: dict[str, Ack] = field(default_factory=dict)
    failed: dict[str, Ack] = field(default_factory=dict)
    cursors: dict[str, str] = field(default_factory=dict)


def as_evidence(name: str | Evidence) -> Evidence:
    """`SERVING`, `serving` or the member itself. Raises: UsageError naming the choices."""
    if isinstance(name, Evidence):
        return name
    try:
        return Evidence[name.upper()]
    except KeyError:
        choices = ", ".join(e.name for e in Evidence if e)
        raise UsageError(f"there is no evidence {name!r}", next=f"choose one of {choices}") from None


def wait_for(
    stream: Stream,
    release: Release,
    *,
    workers: int | None,
    evidence: Evidence,
    timeout_s: float,
    on_progress: Callable[[Fleet, dict[str, Ack]], None] = lambda _fleet, _acks: None,
) -> dict[str, Ack]:
    """The ack of each worker that reached `evidence` for `release`.

    Args: `workers` how many must reach it; None: every live worker, at least one.
    Raises: WorkerFailed with the first worker's own reason, Superseded, DeadlineExceeded naming who is missing and what
    they are doing, StreamError.
    """
    progress, deadline = Progress(), time.monotonic() + timeout_s
    while True:
        now = fleet(stream)
        _read_acks(stream, release, now, progress, block_s=min(_POLL_S, max(deadline - time.monotonic(), 0.0)))
        reached = {w: ack for w, ack in progress.best.items() if ack.evidence >= evidence}
        on_progress(now, reached)
        for worker, ack in progress.failed.items():
            if worker not in reached:
                raise _worker_failed(release, worker, ack)
        for view in now.live:
            if view.id not in reached:
                _check_refusal(release, view)
        live = {worker.id for worker in now.live}
        if len(reached) >= workers if workers is not None else live and live <= reached.keys():
            return reached
        if newer := _newer(release, now):
            raise Superseded(
                f"release {release.version!r} was replaced by {newer.version!r} before the fleet reached it",
                about=f"{len(reached)} workers reached {evidence.name}",
                next=f"refleet status --model {release.model}",
            )
        if time.monotonic() >= deadline:
            raise _deadline(release, evidence, now, reached, workers, timeout_s)


def _newer(release: Release, now: Fleet) -> Release | None:
    """The release that replaced this one. Only if a live worker took one: the log may hold forged ones."""
    if now.target is None or now.target.order <= release.order:
        return None
    goals = [worker.status.target for worker in now.live if worker.status and worker.status.target]
    taken = not now.live or any(goal.order > release.order for goal in goals)
    return now.target if taken else None


def _read_acks(stream: Stream, release: Release, now: Fleet, progress: Progress, *, block_s: float) -> None:
    for worker in now.workers:
        if worker.id not in progress.cursors:
            acks = stream.last_acks(worker.id, 64)
            progress.cursors[worker.id] = acks[0][0] if acks else "0-0"
            for _, data in reversed(acks):
                _note(release, worker.id, data, progress)
            block_s = 0.0  # who acknowledged before this wait began is not waited for
    if not progress.cursors:
        time.sleep(block_s)
    for worker_id, entries in stream.acks(progress.cursors, block_s=block_s).items():
        for cursor, data in entries:
            progress.cursors[worker_id] = cursor
            _note(release, worker_id, data, progress)


def _note(release: Release, worker: str, data: bytes, progress: Progress) -> None:
    try:
        ack = wire.unpack(data, Ack)
    except ProtocolError:
        return  # a worker can spoil its own ack stream only; without a readable ack it counts as not there
    if ack.order != release.order or ack.worker != worker or ack.verified is not None:
        return
    if ack.failure is not None:
        progress.failed[worker] = ack
        return
    if ack.evidence == Evidence.SERVING and ack.fingerprint != release.fingerprint:
        return  # it can't mean this version
    progress.failed.pop(worker, None)  # it recovered
    if worker not in progress.best or ack.evidence >= progress.best[worker].evidence:
        progress.best[worker] = ack


def _worker_failed(release: Release, worker: str, ack: Ack) -> WorkerFailed:
    failure = ack.failure
    assert failure is not None
    return WorkerFailed(
        f"worker {worker} failed {release.version!r}: {failure.code}: {failure.what}",
        about=f"worker {worker}, release {release.epoch}-{release.seq} of model {release.model!r}",
        serving=f"worker {worker} serves {ack.serving or 'nothing'}",
        next=f"refleet rollback --model {release.model} --to an earlier version, or publish a corrected checkpoint",
        tensor=failure.tensor,
    )


def _check_refusal(release: Release, worker: WorkerView) -> None:
    """A worker that refused this very entry of the log will never acknowledge it. Raises: WorkerFailed."""
    status = worker.status
    refusal = status.last_refusal if status else None
    if status is None or refusal is None:
        return
    if not refusal.what.startswith(f"log entry {release.epoch}-{release.seq}:"):
        return
    goal = status.target
    if goal and (goal.order, goal.fingerprint) == (release.order, release.fingerprint):
        return  # it took this one: what it refused lay at this place before the server lost its log
    raise WorkerFailed(
        f"worker {worker.id} refused {release.version!r}: {refusal.code}: {refusal.what}",
        about=f"worker {worker.id}, release {release.epoch}-{release.seq} of model {release.model!r}",
        serving=f"worker {worker.id} serves {status.serving.version if status.serving else 'nothing'}",
        next="publish with a --key that the worker's trust file names (refleet keys trust), or with a higher epoch",
    )


def _deadline(
    release: Release, evidence: Evidence, now: Fleet, reached: dict[str, Ack], workers: int | None, timeout_s: float
) -> DeadlineExceeded:
    missing = [worker for worker in now.workers if worker.id not in reached]
    doing = "; ".join(
        f"{w.id} is {w.state}" + (f" ({w.status.failure.what})" if w.status and w.status.failure else "")
        for w in missing[:8]
    )
    served = sorted({w.status.serving.version for w in now.live if w.status and w.status.serving})
    wanted = workers if workers is not None else max(len(now.live), 1)
    return DeadlineExceeded(
        f"{len(reached)} of {wanted} workers reached {evidence.name} for {release.version!r} within {timeout_s:g} s",
        about=doing or ("no further worker is there" if now.workers else "no worker of this model has a heartbeat"),
        serving=", ".join(served) or "nothing",
        next=f"refleet status --model {release.model}; workers go on by themselves when they can",
    )
