"""Tells the oracle of steps of the production code where they are taken: it goes on doing them itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from refleet.common.messages import Release
from refleet.common.store import Store
from refleet.publisher.book import Book
from refleet.publisher.publish import Publisher
from refleet.worker import staging
from refleet.worker.receive import Body

from .kernel import kernel
from .system import process

if TYPE_CHECKING:
    from .fleet import WorkerActor
    from .world import World


@contextmanager
def observed(world: World) -> Iterator[None]:
    """During the block the world's oracle hears of releases, retention, fetching and verifying."""
    oracle, ledger = world.oracle, world.oracle.ledger

    def worker() -> WorkerActor | None:
        mine = process()
        return next((actor for actor in world.workers if actor.process is mine), None)

    def save_release(do: Any, book: Book, release: Release, *rest: Any, **options: Any) -> None:
        ledger.recorded(release)
        do(book, release, *rest, **options)
        ledger.is_durable(release)

    def drop_release(do: Any, book: Book, release: Release, **options: Any) -> None:
        ledger.dropped(release)
        do(book, release, **options)

    def collect(do: Any, publisher: Publisher, keep: int, **options: Any) -> Any:
        window = ledger.collects(publisher, keep)
        found = do(publisher, keep, **options)
        ledger.collected(publisher.store, window)
        return found

    def collect_store(do: Any, store: Store, *rest: Any, **options: Any) -> Any:
        found = do(store, *rest, **options)
        actor = worker()
        if actor is not None and actor.worker is not None and (current := actor.worker.gate.current):
            ledger.complete(store, current.fingerprint, f"which {actor.id} serves")
        return found

    def begin(do: Any, body: Body, stream: Any, ref: Any, index: Any, numbers: list[int], **options: Any) -> None:
        if (actor := worker()) is not None:
            oracle.fetches(actor, ref, index, numbers)
        do(body, stream, ref, index, numbers, **options)

    def verify(do: Any, *args: Any, **options: Any) -> None:
        if (actor := worker()) is not None:
            oracle.facts(actor).verified_s = kernel().now
        do(*args, **options)

    with ExitStack() as patched:
        for owner, name, hook in (
            (Book, "save_release", save_release), (Book, "drop_release", drop_release),
            (Publisher, "_collect", collect), (Store, "collect", collect_store), (Body, "__init__", begin),
            (staging, "verify", verify),
        ):  # fmt: skip
            patched.enter_context(patch.object(owner, name, _around(getattr(owner, name), hook)))
        yield


def _around(do: Callable[..., Any], hook: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **options: hook(do, *args, **options)
