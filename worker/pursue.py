"""Bring the engine to the newest accepted release, and say truthfully how far it got.

One call of `step` takes the goal as far as possible now: stage it if its bytes are here or offered, ask for them if
not, switch, acknowledge. Every failure is either retried (bytes can be had again), or final for this release (the
previous version goes on being served, and the ack says why).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial

from ..common.crashpoint import crash_point
from ..common.errors import (
    DamagedTensor,
    Quarantined,
    RefitFailed,
    RefleetError,
    StoreBusy,
    StoreError,
    StoreFull,
    StreamError,
)
from ..common.limits import LIMITS
from ..common.messages import Ack, Evidence, Failure, Release, Serving, Verified, VerifyRequest
from ..common.store import Store
from ..common.stream import Stream
from ..common.threads import Newest
from ..common.types import Manifest
from .acks import Acks
from .apply import Clock, switch
from .board import APPLYING, FAILED, QUARANTINED, SERVING, WAITING, Board, failure_of
from .engine import Engine
from .follow import Follower
from .gate import Gate
from .prove import answer
from .staging import Staging, holdings_of
from .state import Goal, Staged, WorkerState, save
from .upkeep import upkeep


class Pursuit:
    """The state machine between the follower and the engine. Called by the worker's one thread."""

    def __init__(
        self, stream: Stream, store: Store, engine: Engine, gate: Gate, board: Board, state: WorkerState,
        follower: Follower, acks: Acks, *, keep: int, drain_s: float, stopping: Callable[[], bool],
    ):  # fmt: skip
        self._stream, self._store, self._engine, self._gate, self._board = stream, store, engine, gate, board
        self._state, self._keep, self._drain_s = state, keep, drain_s
        self._holds: Manifest | None = None  # what the engine is known to hold
        self._remnant = False  # what was prepared for another version may still be in it
        self._failed: dict[tuple[int, int], Failure] = {}  # what is not tried again until there is a new release
        self._acks = acks
        self._staging = Staging(stream, store, engine, board, follower, ack=self._ack, stopping=stopping)
        self._tidied = threading.Event()  # the upkeep may have removed versions that the fleet is told of
        work = partial(upkeep, store=store, warn=board.warn, done=self._tidied.set)
        self.upkeep = Newest(work, name="refleet-upkeep")
        self.early = self._staging.early

    @property
    def has_work(self) -> bool:
        """Whether `step` could get further without news from the stream."""
        return self._goal() is not None and not self._staging.asks and not self._staging.pauses

    def resume(self) -> None:
        """After a restart: serve what was served, from this worker's own disk, after hashing all of it."""
        serving = self._state.serving
        self._show_holdings()
        if serving is None:
            return
        with suppress(StoreError):  # a full disk: what was kept before is kept for some days
            self._store.keep(self._state.recent)
        try:
            goal, clock = Goal(serving, None, restructure=True), Clock()  # as it was accepted before
            manifest = self._store.manifest(serving.fingerprint)
            self._store.memory.pin(manifest.digests)
            staged = Staged(self._store, serving, manifest, goal.restructure)
            self._staging.rebuild(staged, holds=None, clock=clock)
            self._switch(goal, staged, 0, clock)
        except DamagedTensor as error:
            self._forget(error)
        except RefleetError as error:
            # the next steps ask for the bytes, or fail the release by name
            self._board.show(WAITING, f"{serving.version} could not be resumed", failure=failure_of(error))

    def accept(self, release: Release, *, restructure: bool) -> None:
        """Remember, durably, that nothing at or below `release` may be accepted again; make it the goal.

        `restructure`: it, or a release that it overtook, may have other names, dtypes or shapes.
        """
        self._state = replace(self._state, release=release, restructure=restructure or self._state.restructure)
        self._failed = {}
        self._staging.begin()
        save(self._store, self._state)
        self.early.drop(but=release.payload)
        self._board.show(self._board.state, epoch=release.epoch)

    def acknowledge_again(self) -> None:
        """The accepted release was delivered again: repeat what was said of it."""
        serving, release = self._gate.current, self._state.release
        if serving and release and serving.order == release.order:
            self._ack(serving, Evidence.SERVING)

    def step(self) -> None:
        """Get as far as possible. Raises: StreamError when the server is away (served versions are not affected)."""
        self._acks.flush()
        if self._tidied.is_set():
            self._tidied.clear()
            self._show_holdings()
        goal = self._goal()
        if goal is None or self._staging.pauses:
            return
        try:
            self._advance(goal)
        except DamagedTensor as error:
            self._forget(error)
        except StreamError:
            self._staging.ask_again()
            raise
        except (StoreBusy, StoreFull) as error:
            self._board.show(FAILED, str(error), failure=failure_of(error))
            self._ack(goal.serving, Evidence.NONE, error=error)
            self._staging.pause()
        except RefleetError as error:
            self._fail(goal, error)
        except Exception as error:  # the engine is the user's code
            self._fail(goal, RefitFailed(f"the engine raised {type(error).__name__}: {error}"))

    def verify(self, ask: VerifyRequest) -> None:
        """Read back and hash everything the engine holds; put it right if it is wrong."""
        serving = self._gate.current
        verified, error = answer(
            self._engine, self._store, ask, serving, self._holds, reason=self._gate.reason, warn=self._board.warn
        )
        if error is not None and serving is not None:
            self._gate.close(str(error))
            self._holds = None
            self._board.show(QUARANTINED, error.what, failure=failure_of(error), nothing_served=True)
        evidence = Evidence.SERVING if error is None else Evidence.NONE
        self._ack(serving or self._state.serving, evidence, verified=verified, error=error)

    # ------------------------------------------------------------------ steps

    def _goal(self) -> Goal | None:
        """The release to reach, or what was served before if that one failed and nothing is served; None: all done."""
        release, current = self._state.release, self._gate.current
        if release and release.order not in self._failed:
            return None if current and current.order == release.order else Goal.of(self._state, release)
        if current is None and self._state.serving and self._state.serving.order not in self._failed:
            return Goal(self._state.serving, None, restructure=True)  # as it was accepted before
        return None

    def _advance(self, goal: Goal) -> None:
        clock = Clock()
        manifest, received = self._staging.stage(goal, self._state, clock)
        if manifest is None:
            return
        staged = Staged(self._store, goal.serving, manifest, goal.restructure)
        with self._store.memory.pinned(manifest.digests):  # besides what the engine holds
            self._staging.rebuild(staged, holds=self._base(goal), clock=clock)
            self._ack(goal.serving, Evidence.STAGED, received=received, timings=clock.timings_ms)
            crash_point("worker.staged")
            self._switch(goal, staged, received, clock)

    def _switch(self, goal: Goal, staged: Staged, received: int, clock: Clock) -> None:
        self._board.show(APPLYING, f"applying {goal.serving.version}", target=goal.serving, evidence=Evidence.STAGED)
        base, current = goal.payload.base if goal.payload else None, self._gate.current
        state = self._state.after(goal.serving, base=base, keep=self._keep)
        previous = Staged(self._store, current, self._holds, goal.restructure) if current and self._holds else None
        try:
            done = switch(
                self._engine, self._gate, self._store, staged, holds=self._base(goal), previous=previous,
                persist=lambda: save(self._store, state), drain_s=self._drain_s, on_remnant=self._keep_remnant,
            )  # fmt: skip
        except Exception:
            if self._gate.current is None:
                self._holds = None
            raise
        self._holds, self._state, self._remnant = staged.manifest, state, False
        self._store.memory.pin(staged.manifest.digests)
        self._staging.begin()
        crash_point("worker.switched")
        failure = self._failed.get(state.release.order) if state.release else None
        wanted = Goal.of(state, state.release).serving if state.release and failure else goal.serving
        self._board.show(
            FAILED if failure else SERVING, f"serving {goal.serving.version}", target=wanted, serving=goal.serving,
            evidence=Evidence.NONE if failure else Evidence.SERVING, failure=failure, have=self._have(),
        )  # fmt: skip
        timings = clock.timings_ms | done.timings_ms
        self._ack(goal.serving, Evidence.SERVING, received=received, timings=timings, probe=done.probe)
        if warning := self._engine.served(goal.serving):
            self._board.warn(warning)
        with suppress(StoreError):  # a full disk: what was kept before stays
            self._store.keep(state.recent)
        self.upkeep.put(staged.manifest)

    def _base(self, goal: Goal) -> Manifest | None:
        """What the engine holds and need not be given again for `goal`; None: everything is written and read back."""
        return None if goal.restructure or self._remnant else self._holds

    def _keep_remnant(self) -> None:
        self._remnant = True

    # ------------------------------------------------------------------ when it goes wrong

    def _fail(self, goal: Goal, error: RefleetError) -> None:
        """Final for this release: keep serving what is served, say why."""
        self._failed[goal.serving.order] = failure_of(error)
        self._staging.ask_again()
        current = self._gate.current
        lost = current is None and (isinstance(error, Quarantined) or self._state.serving is not None)
        self._board.show(
            QUARANTINED if lost else FAILED, f"{goal.serving.version} failed: {error.what}", target=goal.serving,
            failure=failure_of(error), nothing_served=current is None,
        )  # fmt: skip
        self._ack(goal.serving, Evidence.NONE, error=error)

    def _forget(self, error: DamagedTensor) -> None:
        """Bit rot: drop the object, so that the next step asks for it again."""
        self._store.forget(error.digest)
        self._staging.ask_again()
        self._board.show(WAITING, f"healing: {error.what}", failure=failure_of(error), have=self._have())

    # ------------------------------------------------------------------ store and acks

    def _show_holdings(self) -> None:
        status = self._board.status
        self._board.show(self._board.state, have=self._have(), failure=status.failure, want=status.want)

    def _have(self) -> tuple[bytes, ...]:
        return holdings_of(self._store, self._state).have

    def _ack(
        self, version: Serving | None, evidence: Evidence, *, received: int = 0,
        timings: dict[str, float] | None = None, probe: bytes | None = None, error: RefleetError | None = None,
        verified: Verified | None = None,
    ) -> None:  # fmt: skip
        current, status = self._gate.current, self._board.status
        how = self._engine.applied.encode(errors="backslashreplace")[: LIMITS.message_bytes]  # the engine's own words
        self._acks.send(
            Ack(
                worker=status.worker, model=status.model,
                epoch=version.epoch if version else 0, seq=version.seq if version else 0,
                version=version.version if version else "", evidence=evidence,
                fingerprint=self._holds.fingerprint if self._holds else None,
                serving=current.version if current else None, engine_build=self._engine.build,
                payload_bytes=received, timings_ms=timings or {}, probe=probe,
                failure=failure_of(error) if error else None, verified=verified,
                applied=how.decode(errors="ignore") if error or evidence >= Evidence.REFITTED else "",
            )
        )  # fmt: skip
