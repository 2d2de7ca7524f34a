"""What a worker knows of itself, as one consistent picture for heartbeat, HTTP and log."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from ..common.errors import RefleetError
from ..common.messages import Evidence, Failure, Serving, Want, WorkerStatus

_log = logging.getLogger(__name__)

#: states, in the order in which an operator meets them
JOINING = "JOINING"  # no release seen yet
WAITING = "WAITING"  # asked the publisher for bytes
RECEIVING = "RECEIVING"
APPLYING = "APPLYING"
SERVING = "SERVING"
STALE = "STALE"  # serving on, without fresh news
FAILED = "FAILED"  # refused or failed the target; serves what it served before
QUARANTINED = "QUARANTINED"  # serves nothing: the engine's content is unknown
STOPPED = "STOPPED"

STATES = (JOINING, WAITING, RECEIVING, APPLYING, SERVING, STALE, FAILED, QUARANTINED, STOPPED)
#: in the others the worker is not waiting for the server, or says something more important
_MAY_BE_STALE = (WAITING, RECEIVING, SERVING)


def failure_of(error: RefleetError) -> Failure:
    """What an ack and a status say of an error."""
    return Failure(error.code, error.what, error.tensor)


@dataclass(frozen=True, slots=True)
class Event:
    """One line of the worker's log."""

    state: str
    text: str
    failure: Failure | None


class Board:
    """The status, changed by the worker's threads and read by others. `on_event` hears every change of state,
    one call at a time.

    Silence is news only while the worker listens: during a long switch nobody reads the log, so `STALE` counts from the
    end of that, while `silence_s` always says when the server answered last.
    """

    def __init__(
        self,
        status: WorkerStatus,
        *,
        stale_after_s: float,
        on_event: Callable[[Event], None],
        clock: Callable[[], float] = time.monotonic,
    ):
        self._status, self._stale_after_s, self._on_event, self._clock = status, stale_after_s, on_event, clock
        self._lock = threading.Lock()
        self._telling = threading.RLock()
        self._contact_s = self._listening_s = clock()
        self._met = False  # whether the server ever answered
        self._away: str | None = None  # the state in which its silence was told
        self._behind_since_s: float | None = None
        self._listeners: list[Callable[[], None]] = []
        #: payload bytes since the start; `status.received_bytes` is about one payload
        self.received_total = 0
        #: payload bytes that came before a release or an offer named their payload, whatever became of them
        self.early_total = 0

    @property
    def status(self) -> WorkerStatus:
        """The status now; a worker that serves on without contact to the server shows STALE."""
        with self._lock:
            status = self._status
        stale = status.state in _MAY_BE_STALE and status.serving is not None and self.silent
        return replace(status, state=STALE) if stale else status

    @property
    def state(self) -> str:
        """The state without regard to silence: what the worker itself is doing."""
        return self._status.state

    @property
    def silent(self) -> bool:
        """Whether the server owes this worker an answer for too long."""
        return self._clock() - self._listening_s > self._stale_after_s

    @property
    def silence_s(self) -> float:
        """Seconds since the server answered last, or since the start if it never did."""
        return self._clock() - self._contact_s

    @property
    def behind_s(self) -> float:
        """Seconds since there is a target that is not served; 0.0 when it is."""
        since = self._behind_since_s
        return 0.0 if since is None else self._clock() - since

    def listen(self, listener: Callable[[], None]) -> None:
        """Call `listener` after every change."""
        self._listeners.append(listener)

    def contact(self) -> None:
        """The server answered."""
        self._contact_s = self._listening_s = self._clock()
        self._met = True
        if self._away is not None:
            self._away = None
            self._tell(Event(self.status.state, "contact to the server again", None))
            self._changed()

    def out_of_contact(self, failure: Failure) -> None:
        """The server did not answer. Said at once if it never did, later on when that makes the worker stale."""
        status = self.status
        with self._lock:  # the loop and the heartbeat notice at the same time
            if (self._met and not self.silent) or self._away == status.state:
                return
            self._away = status.state
        doing = f"going on with {status.serving.version}" if status.serving else "waiting for it"
        self._tell(Event(status.state, f"no contact to the server, {doing}: {failure.what}", failure))

    def progress(self, received: int, expected: int) -> None:
        """`received` of `expected` bytes of the payload at hand. What arrives is contact, too."""
        with self._lock:
            self.received_total += max(received - self._status.received_bytes, 0)
            self._status = replace(self._status, received_bytes=received, expected_bytes=expected)
        self._contact_s = self._listening_s = self._clock()

    def received_early(self, size: int) -> None:
        """So many bytes of a payload came that was not released yet."""
        with self._lock:
            self.early_total += size

    def show(
        self,
        state: str,
        text: str = "",
        *,
        target: Serving | None = None,
        serving: Serving | None = None,
        nothing_served: bool = False,
        evidence: Evidence | None = None,
        failure: Failure | None = None,
        want: Want | None = None,
        have: tuple[bytes, ...] | None = None,
        epoch: int | None = None,
        expected_bytes: int | None = None,
    ) -> None:
        """Enter `state`. `failure` and `want` are replaced; what else is left out stays as it is.

        `expected_bytes`: a new payload begins, of this size.
        """
        with self._lock:
            old = self._status
            self._status = replace(
                old,
                state=state,
                target=target or old.target,
                serving=None if nothing_served else serving or old.serving,
                evidence=old.evidence if evidence is None else evidence,
                failure=failure,
                want=want,
                have=old.have if have is None else have,
                epoch=old.epoch if epoch is None else epoch,
                received_bytes=old.received_bytes if expected_bytes is None else 0,
                expected_bytes=old.expected_bytes if expected_bytes is None else expected_bytes,
            )
            new = self._status
            if old.state == APPLYING:
                self._listening_s = max(self._listening_s, self._clock())
            behind = new.target is not None and new.target != new.serving
            if behind != (self._behind_since_s is not None):
                self._behind_since_s = self._clock() if behind else None
        if text and (new.state, new.failure, new.target, new.want) != (old.state, old.failure, old.target, old.want):
            self._tell(Event(state, text, failure))
        self._changed()

    def warn(self, text: str) -> None:
        """Something that needs a person but changes nothing about what is served."""
        self._tell(Event(self.status.state, text, Failure("Warning", text, None)))

    def refuse(self, refusals: list[Failure]) -> None:
        """Records that were not acted on."""
        if not refusals:
            return
        with self._lock:
            total = self._status.refused + len(refusals)
            self._status = replace(self._status, refused=total, last_refusal=refusals[-1])
        for refusal in refusals:
            self._tell(Event(self.status.state, f"refused a record: {refusal.what}", refusal))
        self._changed()

    def _tell(self, event: Event) -> None:
        try:
            with self._telling:
                self._on_event(event)
        except Exception:  # the listener is the user's code: it must not end a worker that serves
            _log.exception("on_event raised for %s", event)

    def _changed(self) -> None:
        for listener in self._listeners:
            listener()
