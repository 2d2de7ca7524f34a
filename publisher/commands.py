"""`refleet publish`, `rollback`, `status` and `gc`."""

from __future__ import annotations

from pathlib import Path

import click

from ..common.errors import StoreBusy, UsageError
from ..common.messages import Ack
from ..common.store import Store
from .checkpoint import open_checkpoint
from .fleet import Fleet, fleet
from .inspect import freeable_bytes, release_dict
from .publish import Publisher
from .published import Published
from .retention import reasons_to_keep
from .screen import share_text, short, size_text
from .session import EVIDENCE, FILE, Session, Waiting, example, shared

#: name of the lock that `refleet serve` holds in its store
SERVE_LOCK = "serve"

_WAIT = click.option(
    "--wait", type=click.Choice(EVIDENCE, case_sensitive=False), metavar="[EVIDENCE]",
    help="Wait until workers proved so much: RECEIVED, STAGED, REFITTED, PROBED or SERVING (the default).",
)  # fmt: skip
_WORKERS = click.option(
    "--workers", type=click.IntRange(1), metavar="N", help="With --wait: so many workers.  [every live one]"
)
_TIMEOUT = click.option(
    "--timeout", type=click.FloatRange(0), default=60.0, show_default=True, metavar="S",
    help="With --wait: fail after so many seconds.",
)  # fmt: skip
_KEEP = click.option(
    "--keep", type=click.IntRange(1), default=16, show_default=True, metavar="N",
    help="Versions kept for rollbacks, besides those still needed.",
)  # fmt: skip
_BUDGET = click.option(
    "--budget", type=click.IntRange(1), metavar="BYTES",
    help="Server memory for payloads.  [80 % of its maxmemory; 8 GiB where it has none]",
)  # fmt: skip
_TAKE_OVER = click.option("--take-over", is_flag=True, help="Fence off another store that publishes this model.")
_MESSAGE = click.option("--message", default="", metavar="TEXT", help="A note for the history.")
_ALLOW = click.option(
    "--allow-structure-change", is_flag=True,
    help="Allow other names, dtypes or shapes than before. Workers whose engine can't follow refuse it.",
)  # fmt: skip


@click.command(
    cls=Waiting,
    epilog=example(
        "refleet publish step-100.safetensors --model policy --store ./store \\",
        "  --version step-100 --wait",
    ),
)
@click.argument("path", type=FILE)
@click.option("--version", metavar="ID", help="Version id.  [the next free v<n>]")
@_MESSAGE
@_WAIT
@_WORKERS
@_TIMEOUT
@_KEEP
@_BUDGET
@_TAKE_OVER
@_ALLOW
@shared("model", "store", "key", "redis", "payload_redis")
def publish(
    session: Session, path: Path, version: str | None, message: str, wait: str | None, workers: int | None,
    timeout: float, keep: int, budget: int | None, take_over: bool, allow_structure_change: bool,
) -> None:  # fmt: skip
    """Make a checkpoint the version that every worker serves.

    PATH is a .safetensors file, or a folder with a model.safetensors.index.json. Only what changed since the last
    version is sent. Without --wait it is done when the release is announced.
    """
    _check_wait(wait, workers)
    session.store_folder()
    open_checkpoint(path).close()  # a wrong path is told before anything is asked of the server
    with session.publisher(take_over=take_over, keep=keep, budget=budget) as publisher:
        with session.screen.phases() as on_progress:
            published = publisher.publish(
                path, version=version, message=message, allow_structure_change=allow_structure_change,
                on_progress=on_progress,
            )  # fmt: skip
        _announced(session, publisher, published, wait=wait, workers=workers, timeout=timeout)


@click.command(
    cls=Waiting,
    epilog=example("refleet rollback --model policy --store ./store --to step-50 --wait"),
)
@click.option("--to", required=True, metavar="ID", help="The version to serve again; `refleet history` lists them.")
@_MESSAGE
@_WAIT
@_WORKERS
@_TIMEOUT
@_KEEP
@_TAKE_OVER
@_ALLOW
@shared("model", "store", "key", "redis", "payload_redis")
def rollback(
    session: Session, to: str, message: str, wait: str | None, workers: int | None, timeout: float, keep: int,
    take_over: bool, allow_structure_change: bool,
) -> None:  # fmt: skip
    """Make an earlier version the target again.

    It is a new release of the old content: nothing is read from a checkpoint, and workers that still hold the version
    need no payload.
    """
    _check_wait(wait, workers)
    session.existing_store()
    with session.publisher(take_over=take_over, keep=keep) as publisher:
        with session.screen.phases() as on_progress:
            published = publisher.rollback(
                to, message=message, allow_structure_change=allow_structure_change, on_progress=on_progress
            )
        _announced(session, publisher, published, wait=wait, workers=workers, timeout=timeout)


def _check_wait(wait: str | None, workers: int | None) -> None:
    if workers is not None and wait is None:
        raise UsageError("--workers says how many workers to wait for", next="add --wait")


def _announced(
    session: Session, publisher: Publisher, published: Published, *, wait: str | None, workers: int | None,
    timeout: float,
) -> None:  # fmt: skip
    """Say what was announced, then wait for the fleet if asked to."""
    screen, release = session.screen, published.release
    session.release = {**release_dict(release), "already": published.already}
    done = "rolled back to" if release.kind == "rollback" else "published"
    said = f"{release.version} is the target already" if published.already else f"{done} {release.version}"
    screen.say(f"{said} (model {release.model}, release {release.epoch}-{release.seq})")
    sent = f"{size_text(release.payload_bytes)} of {size_text(release.full_bytes)}"
    screen.facts(
        [
            ("fingerprint", short(release.fingerprint)),
            ("changed", f"{release.changed_tensors} of {release.total_tensors} tensors"),
            ("payload", f"{sent} ({share_text(release.payload_bytes, release.full_bytes)})"),
            *([("structure", "other names, dtypes or shapes")] if release.restructure else []),
        ]
    )
    now = fleet(publisher.stream)
    _warn_unsigned(session, publisher, now)
    if wait is None:
        _not_waited(session, publisher, now)
        session.result({**session.release, "live_workers": len(now.live), "waited": None})
        return
    with screen.fleet() as on_fleet:
        acks = published.wait(workers, evidence=wait, timeout_s=timeout, on_progress=on_fleet)
    screen.facts([("workers", f"{len(acks)} reached {wait}: {_few(sorted(acks))}")])
    for worker in sorted(acks):
        if acks[worker].applied:
            screen.say(f"{worker}: {acks[worker].applied}")
    session.result({
        **session.release,
        "live_workers": len(fleet(publisher.stream).live),
        "waited": {"evidence": wait, "workers": [_ack_dict(acks[worker]) for worker in sorted(acks)]},
    })  # fmt: skip


def _not_waited(session: Session, publisher: Publisher, now: Fleet) -> None:
    live = len(now.live)
    session.screen.facts([("workers", f"{live} live, not waited for (--wait does)")])
    if not _daemon_runs(publisher.store):
        session.screen.say(
            "Workers that come later, or miss the payload, need a publisher to ask:\n"
            f"  refleet serve --model {publisher.model} --store {publisher.store.root.parent}"
        )


def _warn_unsigned(session: Session, publisher: Publisher, now: Fleet) -> None:
    demanding = [worker.id for worker in now.live if worker.status and worker.status.signed]
    if demanding and publisher.key is None:
        session.screen.note(f"this release is unsigned (no --key): {_few(demanding)} will refuse it")


def _daemon_runs(store: Store) -> bool:
    try:
        with store.lock(SERVE_LOCK, holder="refleet, looking for a daemon"):
            return False
    except StoreBusy:
        return True


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _ack_dict(ack: Ack) -> dict[str, object]:
    return {
        "id": ack.worker,
        "evidence": ack.evidence.name,
        "fingerprint": ack.fingerprint.hex() if ack.fingerprint else None,
        "payload_bytes": ack.payload_bytes,
        "timings_ms": ack.timings_ms,
        "applied": ack.applied,
    }


# ---------------------------------------------------------------------- status


@click.command(epilog=example("refleet status --model policy"))
@shared("model", "redis", "trust")
def status(session: Session) -> None:
    """Show the target, and what every worker serves.

    `lag` counts the releases that a worker is behind, `seen` is the age of its last heartbeat.
    """
    trust = session.trusted()
    with session.stream() as stream:
        now = fleet(stream, trust=trust)
    session.screen.status(now)
    session.result(now.to_dict())


# ---------------------------------------------------------------------- gc


@click.command(epilog=example("refleet gc --model policy --store ./store --keep 4 --dry-run"))
@_KEEP
@click.option("--dry-run", is_flag=True, help="Only say what would be kept, and why.")
@_TAKE_OVER
@shared("model", "store", "redis", "payload_redis")
def gc(session: Session, keep: int, dry_run: bool, take_over: bool) -> None:
    """Drop versions from the store that nobody needs, and say why each of the others stays.

    Every publish does this too. The history is kept; only the tensors go.
    """
    session.existing_store()
    with session.publisher(take_over=take_over, keep=keep, answer=False) as publisher:
        book, store = publisher.book, publisher.store
        before = set(store.manifests())
        if dry_run:
            reasons = reasons_to_keep(book.releases(), fleet(publisher.stream), book.payloads(), keep=keep)
            kept = {v.version: reasons[v.fingerprint] for v in book.versions() if v.fingerprint in reasons}
            going = before - reasons.keys()
            freed = freeable_bytes(store, going)
        else:
            kept, collected = publisher.collect(keep)
            going, freed = set(collected.removed_manifests), collected.freed_bytes
        dropped = [v.version for v in book.versions() if v.fingerprint in going]
    rows = [(version, f"kept: {why}") for version, why in kept.items()]
    rows += [(version, "would be dropped" if dry_run else "dropped") for version in dropped]
    if rows:
        session.screen.table(("version", "what happens" if dry_run else "what happened"), rows)
    session.screen.say(f"{'would free about' if dry_run else 'freed'} {size_text(freed)}")
    session.result({
        "kept": [{"version": version, "reason": why} for version, why in kept.items()],
        "dropped": dropped, "freed_bytes": freed, "dry_run": dry_run,
    })  # fmt: skip
