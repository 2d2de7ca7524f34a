"""`refleet serve`: the publisher as a daemon. It answers workers, holds the lease, and may watch a folder."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from types import FrameType

import click

from ..common.errors import RefleetError
from .commands import SERVE_LOCK
from .inspect import release_dict
from .publish import Publisher
from .screen import share_text, size_text
from .session import FILE, Session, example, shared
from .watch import Happened, Watch

#: how long a second daemon on the same store waits for the first one to end
_HANDOVER_S = 5.0


class Ended(BaseException):
    """SIGTERM or SIGINT: leave at once, whatever is going on. Every step of a publish survives that."""


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """Turns the first SIGTERM or SIGINT of the block into its quiet end; further ones change nothing."""
    ended = False

    def end(_number: int, _frame: FrameType | None) -> None:
        nonlocal ended
        if not ended:
            ended = True
            raise Ended

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except Ended:
        pass
    finally:
        ended = True  # what is being closed now is not interrupted
        for number, handler in before.items():
            signal.signal(number, handler)


@click.command(epilog=example("refleet serve --model policy --store ./store --watch ./checkpoints"))
@click.option("--watch", type=FILE, metavar="FOLDER", help="Publish checkpoints that appear in this folder.")
@click.option(
    "--poll", type=click.FloatRange(0.01), default=1.0, show_default=True, metavar="S", help="How often to look there."
)
@click.option(
    "--keep", type=click.IntRange(1), default=16, show_default=True, metavar="N", help="Versions kept for rollbacks."
)
@click.option("--budget", type=click.IntRange(1), metavar="BYTES", help="Server memory for payloads.")
@click.option("--take-over", is_flag=True, help="Fence off another store that publishes this model.")
@shared("model", "store", "key", "redis", "payload_redis")
def serve(session: Session, watch: Path | None, poll: float, keep: int, budget: int | None, take_over: bool) -> None:
    """Run as a daemon that answers workers which come late or lack bytes.

    `publish` and `rollback` on the same store go on working beside it. With --watch it publishes `*.safetensors` files
    and folders with an index, oldest first, once they are written completely; the name gives the version id. An id that
    was published before is never published again. Ends on SIGTERM and Ctrl-C with exit code 0.
    """
    reporter = Reporter(session)
    with (
        ending_on_signals(),
        session.publisher(take_over=take_over, keep=keep, budget=budget, resident=watch is not None) as publisher,
        publisher.store.lock(SERVE_LOCK, wait_s=_HANDOVER_S, holder="refleet serve"),
    ):
        watched = Watch(watch, publisher, reporter.tell) if watch else None
        start(publisher)
        text = f"serving model {publisher.model} from {publisher.claim.lease()}"
        reporter.event("started", text, watch=str(watch) if watch else None)
        run(publisher, watched, poll_s=poll, stop=Event())
    reporter.event("ended", "ended: asked to by a signal")


def start(publisher: Publisher) -> None:
    """Claim, deliver what the server lost, begin to answer. Raises: PublisherBusy, StreamError, NotDurable."""
    publisher.claim.renew()
    publisher.claim.heal()
    assert publisher.service is not None, "a daemon answers"
    publisher.service.start()


def run(publisher: Publisher, watch: Watch | None, *, poll_s: float, stop: Event) -> None:
    """Until `stop`. Raises: the error that ended the answering thread (StaleEpoch after a take-over)."""
    assert publisher.service is not None, "a daemon answers"
    while True:
        if publisher.service.stopped_by:
            raise publisher.service.stopped_by
        if watch:
            watch.look()
        if stop.wait(poll_s):
            return


class Reporter:
    """What the daemon says: lines on standard output, or one JSON object per line."""

    def __init__(self, session: Session):
        self._session = session
        self._last = ""

    def event(self, event: str, text: str, **more: object) -> None:
        if self._session.as_json:
            click.echo(json.dumps({"event": event, "text": text, **more}))
        else:
            click.echo(text)

    def tell(self, happened: Happened) -> None:
        text, more = happened.text, {"version": happened.version, "path": str(happened.path)}
        if happened.published:
            release = happened.published.release
            text = (
                f"published {release.version} as {release.epoch}-{release.seq}: "
                f"{release.changed_tensors} of {release.total_tensors} tensors changed, "
                f"{size_text(release.payload_bytes)} of {size_text(release.full_bytes)} "
                f"({share_text(release.payload_bytes, release.full_bytes)})"
            )
            self.event(happened.kind, text, **more, release=release_dict(release))
            self._last = ""
            return
        error: RefleetError | None = happened.error
        full = f"{text}: {error.code}: {error}" if error else text
        if happened.kind == "waiting" and full == self._last:
            return  # the same obstacle as at the try before
        self._last = full if happened.kind == "waiting" else ""
        said = text if self._session.as_json else full
        self.event(happened.kind, said, **more, error=error.to_dict() if error else None)
