"""Get the bytes of a goal into the store: from a payload that fits, from another worker of this host, or by asking."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial

from ..common.errors import DamagedTensor, RefleetError, StreamGap, UnknownVersion
from ..common.messages import Evidence, Want
from ..common.store import Store
from ..common.stream import Stream
from ..common.types import Manifest, PayloadRef
from .apply import Clock, verify
from .board import RECEIVING, WAITING, Board, failure_of
from .early import Early
from .engine import Engine
from .follow import Follower
from .receive import BAD_PAYLOAD, Holdings, choose
from .stage import stage
from .state import Goal, Staged, WorkerState, damaged
from .turn import turn

#: after this many bad payloads towards one release the worker says that it failed, and takes its time with the next
_BAD_PAYLOADS = 5
_RETRY_S = 5.0


class Staging:
    """What was tried towards the goal, and what is needed. Called by the worker's one thread."""

    def __init__(
        self, stream: Stream, store: Store, engine: Engine, board: Board, follower: Follower, *,
        ack: Callable[..., None], stopping: Callable[[], bool],
    ):  # fmt: skip
        self._stream, self._store, self._engine, self._board = stream, store, engine, board
        self._follower, self._ack, self._stopping = follower, ack, stopping
        self._refused: list[str] = []  # payloads that proved unusable for the goal
        self._bad_payloads = 0
        self._want: Want | None = None
        self._retry_s = 0.0
        self.early = Early(stream, store, on_bytes=board.received_early)

    @property
    def asks(self) -> bool:
        """Whether only news from the stream can help."""
        return self._want is not None

    @property
    def pauses(self) -> bool:
        """Whether the next try has to wait."""
        return time.monotonic() < self._retry_s

    def begin(self) -> None:
        """There is another goal, or none."""
        self._refused, self._bad_payloads, self._want, self._retry_s = [], 0, None, 0.0

    def ask_again(self) -> None:
        """What was asked for may be another thing now."""
        self._want = None

    def pause(self) -> None:
        """The next try would fail like this one."""
        self._retry_s = time.monotonic() + _RETRY_S

    def stage(self, goal: Goal, state: WorkerState, clock: Clock) -> tuple[Manifest | None, int]:
        """The manifest once the goal is in the store, and the payload bytes that took; None while bytes are missing.

        Raises: NotRefittable, DamagedTensor, StoreFull, StreamError.
        """
        target = goal.serving.fingerprint
        self._store.keep((*state.recent, target))
        if manifest := self._at_hand(goal):
            return manifest, 0
        holdings = holdings_of(self._store, state)
        announced = [goal.payload] if goal.payload else []
        ref = choose(announced + self._follower.offers(target), holdings, refused=self._refused)
        if ref is None:
            self._ask(goal, holdings)
            return None, 0
        self._want = None
        self._board.show(
            RECEIVING, f"receiving {goal.serving.version}", target=goal.serving, evidence=Evidence.NONE,
            expected_bytes=ref.size_bytes,
        )  # fmt: skip
        self._store.memory.trim()  # the version before this one: its buffers take the next
        try:
            with clock.phase("stage"):
                return self._receive(goal, ref)
        except StreamGap:  # it is gone
            self._refused.append(ref.payload_id)
        except UnknownVersion:  # its base is gone since it was chosen: another worker wanted it no more
            pass
        except DamagedTensor:  # it builds on bit rot
            self._refused.append(ref.payload_id)
            raise
        except BAD_PAYLOAD as error:
            self._refuse(goal, ref, error)
        return None, 0

    def rebuild(self, staged: Staged, *, holds: Manifest | None, clock: Clock) -> None:
        """Have at hand what an engine that holds `holds` would be given, and hash on disk what lies there.

        Raises: DamagedTensor, StreamGap when the worker has to stop.
        """
        with clock.phase("verify"), turn(self._store, "rebuilding", stopping=self._stopping) as working:
            changed = staged.manifest.changed_from(holds)
            self._store.load({entry.digest for entry in changed})  # whoever comes first rebuilds it for all
            for entry in changed:
                try:
                    staged.read(entry.spec.name)
                except DamagedTensor as error:
                    raise damaged(entry.spec.name, error) from error
                working()
        verify(staged, holds=holds, clock=clock)

    def _receive(self, goal: Goal, ref: PayloadRef) -> tuple[Manifest, int]:
        with (
            self.early.of(ref, stopping=self._stopping) as early,
            turn(self._store, "staging", stopping=self._stopping) as working,
            self._store.writing(),  # another worker's `collect` must not take what this delta builds on
        ):
            if manifest := self._at_hand(goal):  # another worker of this host staged it meanwhile
                return manifest, 0

            def progress(received: int, expected: int) -> None:
                self._board.progress(received, expected)
                working()

            manifest = stage(
                self._stream, self._store, ref, early=early,
                check=partial(self._engine.check, restructure=goal.restructure), on_progress=progress,
                on_received=lambda: self._ack(goal.serving, Evidence.RECEIVED),
            )  # fmt: skip
        return manifest, self._board.status.received_bytes

    def _at_hand(self, goal: Goal) -> Manifest | None:
        """The goal's manifest if all of it is in the store: it costs no byte. Raises: NotRefittable."""
        target = goal.serving.fingerprint
        try:
            manifest = self._store.manifest(target)
        except UnknownVersion:
            return None
        if self._store.missing(manifest):
            return None
        self._engine.check(manifest, restructure=goal.restructure)
        return manifest

    def _refuse(self, goal: Goal, ref: PayloadRef, error: RefleetError) -> None:
        """A payload that proved bad: another one will do. After some of them the release counts as failed for now."""
        self._refused.append(ref.payload_id)
        self._bad_payloads += 1
        self._board.show(RECEIVING, f"refused a payload: {error.what}", failure=failure_of(error))
        if self._bad_payloads % _BAD_PAYLOADS == 0:
            self._ack(goal.serving, Evidence.NONE, error=error)
            self.pause()

    def _ask(self, goal: Goal, holdings: Holdings) -> None:
        """Show in the heartbeat what is needed: a standing request, not a message that could get lost."""
        want = Want(goal.serving.fingerprint, holdings.lacks, tuple(self._refused[-64:]))
        self._want, shown = want, self._board.status
        # against what is shown: bit rot may change what is held while it waits, and a failed `verify` the whole status
        if (want, holdings.have) != (shown.want, shown.have):
            self._board.show(
                WAITING, f"asking for {goal.serving.version}", target=goal.serving, evidence=Evidence.NONE, want=want,
                have=holdings.have, failure=shown.failure,
            )  # fmt: skip


def holdings_of(store: Store, state: WorkerState) -> Holdings:
    """What this worker can build on, what it serves first."""
    first: Iterable[bytes] = (state.serving.fingerprint,) if state.serving else ()
    return Holdings.of(store, first=[*first, *reversed(state.recent)])
