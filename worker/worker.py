"""The worker: follows the log, stages, switches its engine, proves it, acknowledges. One thread does all of it.

read the log -> newest accepted release -> stage (or ask for bytes) -> switch -> ack -> read the log ...
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ..common import wire
from ..common.config import redacted
from ..common.crashpoint import crash_point
from ..common.errors import NotServing, RefleetError, StoreError, StreamError, UsageError
from ..common.messages import Evidence, Failure, Serving, WorkerStatus
from ..common.redis_stream import RedisStream
from ..common.signing import Trust
from ..common.stream import Stream
from .acks import Acks
from .board import APPLYING, FAILED, JOINING, QUARANTINED, STOPPED, Board, Event, failure_of
from .engine import Engine
from .follow import Follower
from .gate import Gate
from .heart import Heart
from .pursue import Pursuit
from .state import default_id, owned_state

_BACKOFF_S = 2.0
#: how long `stop` lets the loop end by itself before it pulls the connection from under it
_STOP_S = 1.0


class Worker:
    """Keeps one engine on the fleet's version.

    Args: `redis` a URL or a Stream; `read_from` the URL of its replica, from which log and payloads are then read;
    `payload_redis` the URL of another server, where payloads lie; `state_dir` this worker's own folder (its store and
    record); `share` a folder that the workers of this host share, so that each version is received, decoded and kept
    once; `worker_id` defaults to host name plus engine folder; `trust` a trust file: unsigned or unknown records are
    refused; `keep` versions kept on disk for rollbacks without a byte from the network; `drain_s` how long a switch
    waits for requests in flight; `poll_s` how long one read of the log waits: a server restarted empty, or `stop`, is
    noticed within this time.
    Raises: UsageError, StoreBusy (the folder is in use), StoreError.
    """

    def __init__(
        self,
        redis: str | Stream,
        *,
        read_from: str | None = None,
        payload_redis: str | None = None,
        model: str,
        engine: Engine,
        state_dir: str | Path,
        share: str | Path | None = None,
        worker_id: str | None = None,
        trust: str | Path | Trust | None = None,
        keep: int = 4,
        heartbeat_s: float = 1.0,
        stale_after_s: float = 5.0,
        drain_s: float = 30.0,
        poll_s: float = 1.0,
        on_event: Callable[[Event], None] | None = None,
    ):
        self.id = worker_id or default_id(state_dir)
        _check_settings(keep=keep, heartbeat_s=heartbeat_s, stale_after_s=stale_after_s, drain_s=drain_s, poll_s=poll_s)
        self.model, self.engine, self.gate = model, engine, Gate()
        self._where = redacted(redis) if isinstance(redis, str) else "the given stream"
        if isinstance(redis, str):
            redis = RedisStream(redis, model, read_from=read_from, payload_url=payload_redis)
        self._stream: Stream = redis
        self._trust = Trust.load(trust) if isinstance(trust, str | Path) else trust
        build = engine.build
        self._closing = ExitStack()
        owned = owned_state(state_dir, worker=self.id, model=model, share=share)
        self.store, state = self._closing.enter_context(owned)
        self.board = Board(
            WorkerStatus(
                worker=self.id, instance=self.store.id, model=model, state=JOINING, serving=None, target=None,
                evidence=Evidence.NONE, failure=None, received_bytes=0, expected_bytes=0, have=(), want=None,
                epoch=state.release.epoch if state.release else 0, refused=0, last_refusal=None,
                signed=self._trust is not None, engine_build=build, heartbeat_s=heartbeat_s,
                started_at_ms=int(time.time() * 1000),
            ),
            stale_after_s=stale_after_s,
            on_event=on_event or (lambda _: None),
        )  # fmt: skip
        self.acks = Acks(self._stream, show=lambda: self._heart.beat())
        self._follower = Follower(model, trust=self._trust, accepted=state.release)
        self._pursuit = Pursuit(
            self._stream, self.store, engine, self.gate, self.board, state, self._follower, self.acks,
            keep=keep, drain_s=drain_s, stopping=lambda: self._stopping.is_set(),
        )  # fmt: skip
        self._heart = Heart(
            self._stream, lambda: self.board.status, interval_s=heartbeat_s,
            on_failure=lambda error: self.board.out_of_contact(failure_of(error)),
        )  # fmt: skip
        self.board.listen(self._heart.kick)
        self._stopping = threading.Event()
        self._poll_s = min(poll_s, stale_after_s / 2)  # a quiet log is no silence
        self._drain_s = drain_s
        self._changed = threading.Condition()
        self.board.listen(self._notify)
        self._thread = threading.Thread(target=self._run, name=f"refleet-worker-{self.id}", daemon=True)
        self.crash: BaseException | None = None
        self._began = self._ended = False
        self._ending = threading.RLock()  # on_event hears of the end, and may call `stop` again

    # ------------------------------------------------------------------ for the application

    def start(self) -> Worker:
        """Begin in a thread of its own. Raises: UsageError when another live worker has this id, or if called twice.

        After an error the worker is closed.
        """
        if self._began or self._ended:
            raise UsageError(f"worker {self.id} was {'stopped' if self._ended else 'started'} before")
        try:
            self._refuse_twin()
            with suppress(StreamError):  # no server yet
                self._follower.begin(self._stream)
        except BaseException:
            self.stop()
            raise
        self._thread.start()
        self._began = True  # a signal may come between any two of these lines: what runs is ended by `stop`
        self._heart.start()
        return self

    @property
    def alive(self) -> bool:
        """Whether the worker follows the fleet: started, neither stopped nor crashed."""
        return self._thread.is_alive() and self.crash is None

    @contextmanager
    def serving(self, timeout_s: float = 30.0) -> Iterator[Serving]:
        """Hold the served version for one request: `version.id` answers it, whole.

        Waits up to `timeout_s` for a first version or for a switch to end. Raises: NotServing with the reason.
        """
        if self.gate.current is None and self.board.status.state != QUARANTINED:
            self.wait(timeout_s=timeout_s)
        with self.gate.serving(timeout_s) as version:
            yield version

    def wait(self, version: str | None = None, *, timeout_s: float = 30.0) -> Serving:
        """Wait until `version` (or any) is served here. Raises: NotServing with the worker's state and reason."""

        def reached() -> bool:
            now = self.gate.current
            ended = self._stopping.is_set() or self.crash is not None
            return ended or (now is not None and version in (None, now.version))

        with self._changed:
            self._changed.wait_for(reached, timeout_s)
        now = self.gate.current
        if now is None or version not in (None, now.version):
            status, reason = self.board.status, self.gate.reason or f"{now.version if now else 'nothing'} is served"
            ended = "" if self._stopping.is_set() or self.crash else f" after {timeout_s:g} s"
            raise NotServing(
                f"worker {self.id} does not serve {version or 'any version'}{ended}: {status.state}, "
                + (status.failure.what if status.failure else reason),
                about=f"model {self.model!r} through {self._where}",
                serving=now.version if now else "nothing",
                next=f"refleet status --model {self.model}",
            )
        return now

    def stop(self) -> None:
        """Finish the switch at hand, let requests in flight end (for up to `drain_s`), leave the fleet, close all.

        The engine keeps its weights. A payload that is on its way is given up. Does nothing the second time, and may
        be called before `start`. Raises: UsageError inside `on_event`, which runs in threads that have to end.
        """
        if threading.current_thread() is self._thread or self._heart.is_this_thread:
            raise UsageError(f"worker {self.id} can't be stopped from within its own on_event")
        with self._ending:
            if self._ended:
                return
            self._stopping.set()
            self._notify()
            if self._began:
                self._thread.join(self._poll_s + _STOP_S)
                self._heart.stop(_STOP_S)
                self._say_goodbye()
            while self._thread.is_alive():
                if self.board.state != APPLYING:
                    self._stream.close()  # ends whatever waits for the server
                self._thread.join(0.2)
            self._drain()
            self._ended = True
            self.board.show(STOPPED, "stopped", nothing_served=True)
            self._stream.close()
            self._heart.stop()
            self._pursuit.early.close()
            self._pursuit.upkeep.close()
            self._closing.close()

    def _say_goodbye(self) -> None:
        """Leave the fleet; after a crash leave the reason there instead. Without a server, the silence says it."""
        if self.board.silent:
            return
        with suppress(StreamError):
            if self.crash is None:
                self._stream.leave(self.id)
            else:
                self._heart.beat()

    def _drain(self) -> None:
        reason = "the worker was stopped" if self.crash is None else self.gate.reason or ""
        with suppress(RefleetError), self.gate.switching(timeout_s=self._drain_s) as switch:
            switch.to(None, reason=reason)
        self.gate.close(reason)  # also when requests take longer, or this very thread holds one

    def __enter__(self) -> Worker:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    # ------------------------------------------------------------------ the loop

    def _run(self) -> None:
        try:
            self._pursuit.resume()
            while not self._stopping.is_set():
                self._round()
        except BaseException as error:  # the loop's edge: the process must not go on as if it followed the fleet
            self.gate.close(f"the worker failed: {type(error).__name__}: {error}")
            self.crash = error
            failure = failure_of(error) if isinstance(error, RefleetError) else None
            failure = failure or Failure(type(error).__name__, str(error), None)
            self.board.show(QUARANTINED, f"the worker failed: {failure.code}: {error}", failure=failure,
                            nothing_served=True)  # fmt: skip
            raise

    def _round(self) -> None:
        """One read of the log and one step towards what it says."""
        try:
            news = self._follower.read(self._stream, block_s=0 if self._pursuit.has_work else self._poll_s)
            self.board.contact()
            self.board.refuse(news.refused)
            if news.accepted:
                self._pursuit.accept(news.accepted, restructure=news.restructure)
                crash_point("worker.accepted")
            elif news.repeated:
                self._pursuit.acknowledge_again()
            self._pursuit.step()
            if news.coming:  # after the step: what came of the release at hand was used there
                self._pursuit.early.expect(news.coming, self.gate.current)
            for ask in news.asks:
                self._pursuit.verify(ask)
        except StreamError as error:
            self.board.out_of_contact(failure_of(error))
            self._stopping.wait(_BACKOFF_S * random.uniform(0.2, 1.0))  # noqa: S311 - spreads reconnects, no secret
        except StoreError as error:  # a full disk, say: what is served stays, and the next round tries again
            self.board.show(FAILED, error.what, failure=failure_of(error))
            self._stopping.wait(_BACKOFF_S)

    def _refuse_twin(self) -> None:
        try:
            member = self._stream.member(self.id)
        except StreamError:
            return  # no server yet: nothing to compare with
        if member.status is None or member.seen_s is None:
            return
        try:
            other = wire.unpack(member.status, WorkerStatus)
        except RefleetError:
            return
        if other.instance != self.store.id and member.seen_s < 3 * other.heartbeat_s:
            raise UsageError(
                f"a worker with the id {self.id!r} is alive already (last seen {member.seen_s:.1f} s ago)",
                about=f"model {self.model!r}",
                next="give this worker another --id, or the other one's --state folder after stopping it",
            )

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()


def _check_settings(*, keep: int, heartbeat_s: float, stale_after_s: float, drain_s: float, poll_s: float) -> None:
    if keep < 1:
        raise UsageError(f"keep {keep}: at least the served version must be kept")
    if not 0 < heartbeat_s <= 86400:
        raise UsageError(f"heartbeat_s {heartbeat_s}: it must be above 0 and at most a day")
    if not (stale_after_s > 0 and poll_s > 0 and 0 <= drain_s < threading.TIMEOUT_MAX):
        raise UsageError(f"stale_after_s {stale_after_s}, poll_s {poll_s}, drain_s {drain_s}: times in seconds")
