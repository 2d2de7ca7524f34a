"""What one run of `refleet` knows: settings, flags that all commands share, and what was done so far."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from ..common.config import Settings
from ..common.errors import RefleetError, StreamError, UsageError
from ..common.messages import Evidence
from ..common.redis_stream import RedisStream
from ..common.shm import placed
from ..common.signing import SigningKey, Trust
from ..common.store import Store
from ..common.stream import Keys, Stream
from .book import Book
from .fleet import newest_release
from .publish import Publisher
from .screen import Screen

R = TypeVar("R")
EVIDENCE = [evidence.name for evidence in Evidence if evidence]
FILE = click.Path(path_type=Path)


@dataclass(slots=True)
class Session:
    """Flags over settings. Commands ask it for streams, stores and publishers, and give it their result."""

    settings: Settings
    screen: Screen
    as_json: bool = False
    redis: str = ""
    payload_redis: str = ""
    model: str = ""
    store: Path | None = None
    key: Path | None = None
    trust: Path | None = None
    asked_server: bool = False
    #: what was announced so far: an error afterwards does not undo it
    release: dict[str, object] | None = field(default=None)

    @contextmanager
    def stream(self) -> Iterator[Stream]:
        self.asked_server = True
        stream = RedisStream(
            self.redis, self.model, payload_url=self.payload_redis or None, carrier=self.settings.carrier
        )
        try:
            yield stream
        finally:
            stream.close()

    @contextmanager
    def publisher(
        self,
        *,
        take_over: bool = False,
        keep: int = 16,
        budget: int | None = None,
        answer: bool = True,
        resident: bool = False,
    ) -> Iterator[Publisher]:
        """The publisher of the store. Raises: UsageError without a store."""
        store = self.store_folder()
        self.asked_server = True
        publisher = Publisher(
            self.redis, payload_redis=self.payload_redis or None, carrier=self.settings.carrier, model=self.model,
            store=store, key=self.signing_key(), take_over=take_over, keep=keep, budget_bytes=budget,
            answer=answer, resident=resident, notify=self.screen.note,
        )  # fmt: skip
        with publisher:
            yield publisher

    @contextmanager
    def book(self) -> Iterator[Book | None]:
        """The publisher's records of this model on disk; None where there is no store. Makes nothing."""
        Keys(self.model)  # the name leads to a folder: checked like one that leads to a key
        folder = self.store / self.model if self.store else None
        if folder is None or not (folder / "id").exists():
            yield None
            return
        with Store(folder) as store:
            yield Book(store)

    def store_folder(self) -> Path:
        if self.store is None:
            raise UsageError(
                "no store was named: publishing keeps versions in a folder of its own",
                next="pass --store DIR, or set REFLEET_STORE",
            )
        return self.store

    def existing_store(self) -> None:
        """For commands that make no sense on a new store: a mistyped folder must not become a second publisher.

        Raises: UsageError.
        """
        with self.book() as book:
            if book is None:
                raise UsageError(
                    f"there is no store of model {self.model!r} in {self.store_folder()}",
                    about=f"--store {self.store_folder()} --model {self.model}",
                    next="name the store that published the model: --store DIR, or REFLEET_STORE",
                )

    def signing_key(self) -> SigningKey | None:
        return SigningKey.load(self.key) if self.key else None

    def trusted(self) -> Trust | None:
        return Trust.load(self.trust) if self.trust else None

    def result(self, data: object) -> None:
        """The one JSON document of this run, if JSON was asked for."""
        if self.as_json:
            click.echo(json.dumps(data, indent=2))

    def target_now(self, error: RefleetError) -> str:
        """What is being served, for an error that does not say it; "" where that is not known cheaply."""
        if not self.model:
            return ""
        with suppress(RefleetError, OSError):
            if self.asked_server and not isinstance(error, StreamError | UsageError):
                with self.stream() as stream:  # the log and not this store: another store may have taken over
                    target = newest_release(stream)
                return f"the fleet's target is still {target.version}" if target else "nothing was published yet"
            with self.book() as book:
                head = book.head() if book else None
            if head and self.asked_server and isinstance(error, StreamError):
                return f"workers keep what they serve; this store's last release is {head.version}"
            return f"the fleet's target is still {head.version}" if head else ""
        return ""


_OPTIONS: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "json": click.option("--json", "as_json", is_flag=True, help="Print JSON; its keys are in docs/cli.md."),
    "model": click.option("--model", required=True, metavar="NAME", help="Name of the model, the same for workers."),
    "redis": click.option("--redis", metavar="URL", help="Server.  [REFLEET_REDIS; redis://127.0.0.1:6379]"),
    "payload_redis": click.option(
        "--payload-redis",
        metavar="URL",
        help="Another server for payloads, the same as the workers'.  [REFLEET_PAYLOAD_REDIS]",
    ),
    "store": click.option(
        "--store", type=FILE, metavar="DIR", help="The publisher's store; or memory.  [REFLEET_STORE]"
    ),
    "key": click.option("--key", type=FILE, metavar="FILE", help="Sign with this private key.  [REFLEET_KEY]"),
    "trust": click.option(
        "--trust", type=FILE, metavar="FILE", help="Count only records signed by these keys.  [REFLEET_TRUST]"
    ),
}


def shared(*names: str) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """A command with a Session as its first argument, and the shared options `names` (and --json) put into it."""

    def decorate(command: Callable[..., R]) -> Callable[..., R]:
        @wraps(command)
        def run(session: Session, *, as_json: bool, **flags: Any) -> R:
            found = session.settings
            session.as_json = as_json
            session.redis, session.payload_redis = found.redis, found.payload_redis
            session.store, session.key, session.trust = found.store, found.key, found.trust
            for name in names:
                given = flags.pop(name)
                if given is not None:
                    setattr(session, name, given)
            session.store = session.store and placed(session.store, "publisher")
            return command(session, **flags)

        with_options: Callable[..., R] = click.pass_obj(cast(Callable[..., R], run))
        for name in ("json", *reversed(names)):
            with_options = _OPTIONS[name](with_options)
        return with_options

    return decorate


class Waiting(click.Command):
    """A command with `--wait [EVIDENCE]`: what follows `--wait` is its value only if it is an evidence."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        plain = []
        for number, word in enumerate(args):
            following = args[number + 1 : number + 2]
            alone = word == "--wait" and not (following and following[0].upper() in EVIDENCE)
            plain.append("--wait=SERVING" if alone else word)
        return super().parse_args(ctx, plain)


def example(*lines: str) -> str:
    """The example at the end of a command's help, kept as it is written."""
    return "\b\nExample:\n" + "\n".join(f"  {line}" for line in lines)
