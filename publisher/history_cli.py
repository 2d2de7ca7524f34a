"""`refleet history`, `show` and `diff`."""

from __future__ import annotations

from pathlib import Path

import click

from ..common.messages import Release
from .checkpoint import open_checkpoint
from .inspect import Diff, Shown, diff, iso_time, release_dict, releases_in_log, show_from_book, show_from_log
from .screen import share_text, short, size_text
from .session import FILE, Session, example, shared
from .structure import compatible

_LINES = 20  # tensors that a person is shown; --json has all of them


@click.command(epilog=example("refleet history --model policy --last 10"))
@click.option("--last", type=click.IntRange(1), metavar="N", help="Only the newest N.  [all]")
@shared("model", "store", "redis", "trust")
def history(session: Session, last: int | None) -> None:
    """List the releases of a model, oldest first.

    Reads the publisher's store where it is at hand, and the log in the server where it is not.
    """
    found = _releases(session)
    found = found[-last:] if last else found
    rows = [
        (
            release.version,
            f"{release.epoch}-{release.seq}",
            release.kind,
            f"{release.changed_tensors}/{release.total_tensors}",
            size_text(release.payload_bytes),
            iso_time(release.created_at_ms)[:16].replace("T", " "),
            release.message,
        )
        for release in found
    ]
    if rows:
        columns = ("version", "release", "kind", "changed", "payload", "time (UTC)", "message")
        session.screen.table(columns, rows, right=("changed", "payload"))
    else:
        session.screen.say(f"nothing was published as model {session.model} yet")
    session.result([release_dict(release) for release in found])


def _releases(session: Session) -> list[Release]:
    with session.book() as book:
        if book is not None:
            return book.releases()
    trust = session.trusted()
    with session.stream() as stream:
        return releases_in_log(stream, trust=trust)


@click.command(epilog=example("refleet show step-100 --model policy --store ./store"))
@click.argument("version", metavar="ID")
@shared("model", "store", "redis", "trust")
def show(session: Session, version: str) -> None:
    """Show one version: where it came from, its releases, its tensors."""
    with session.book() as book:
        if book is not None:
            shown = show_from_book(book, version)
    if book is None:
        shown = show_from_log(_releases(session), version)
    _print_version(session, shown)
    session.result(shown.to_dict())


def _print_version(session: Session, shown: Shown) -> None:
    screen, record = session.screen, shown.record
    screen.say(f"version {shown.version} of model {session.model}")
    facts = [("fingerprint", shown.fingerprint.hex())]
    if record:
        held = "yes" if shown.manifest else "no: past retention, it can't be rolled back to"
        facts += [("source", record.source), ("message", record.message or "-"), ("in the store", held)]
    for release in shown.releases:
        at = f"{release.epoch}-{release.seq}, {release.kind}, {iso_time(release.created_at_ms)[:19].replace('T', ' ')}"
        facts.append(("release", at))
    screen.facts(facts)
    if shown.manifest is None:
        return
    changed = shown.changed
    entries = shown.manifest.tensors if changed is None else shown.manifest.changed_from(shown.base)
    of = f"{len(entries)} of {len(shown.manifest.tensors)} tensors changed, {size_text(shown.manifest.size_bytes)}"
    screen.say(of if changed is not None else f"{len(entries)} tensors, {size_text(shown.manifest.size_bytes)}")
    rows = [
        (e.spec.name, e.spec.dtype, str(list(e.spec.shape)), size_text(e.spec.size_bytes), short(e.digest))
        for e in entries[:_LINES]
    ]
    if rows:
        screen.table(("tensor", "dtype", "shape", "size", "digest"), rows, right=("size",))
    if len(entries) > _LINES:
        screen.say(f"... and {len(entries) - _LINES} more; --json lists all")


@click.command("diff", epilog=example("refleet diff step-101.safetensors --model policy --store ./store"))
@click.argument("path", type=FILE)
@shared("model", "store")
def diff_command(session: Session, path: Path) -> None:
    """Say what publishing a checkpoint would change and send. Nothing is written.

    The payload is that for workers which serve the store's last version.
    """
    session.store_folder()
    with session.book() as book, open_checkpoint(path) as checkpoint:
        head = book.head() if book else None
        if book and head:
            base = book.store.manifest(head.fingerprint)
            compatible(checkpoint.specs, base, version=str(path), earlier_version=head.version)
        with session.screen.phases() as on_progress:
            found = diff(checkpoint, book.store if book else None, head, on_progress=on_progress)
    _print_diff(session, found)
    session.result(found.to_dict())


def _print_diff(session: Session, found: Diff) -> None:
    screen = session.screen
    if found.base_version is None:
        screen.say(f"this would be the first version of model {session.model} in this store")
    else:
        screen.say(f"against {found.base_version}, the last version of model {session.model}")
    elements = share_text(found.changed_elements, found.total_elements)
    payload = share_text(found.payload_bytes, found.full_bytes)
    screen.facts(
        [
            ("fingerprint", short(found.fingerprint)),
            ("tensors", f"{len(found.tensors)} of {found.total_tensors} change"),
            ("elements", f"{found.changed_elements:,} of {found.total_elements:,} change ({elements})"),
            ("payload", f"{size_text(found.payload_bytes)} of {size_text(found.full_bytes)} ({payload})"),
        ]
    )
    largest = sorted(found.tensors, key=lambda tensor: -tensor.payload_bytes)
    rows = [
        (t.name, f"{t.changed_elements:,}", share_text(t.changed_elements, t.elements), size_text(t.payload_bytes))
        for t in largest[:_LINES]
    ]
    if rows:
        screen.table(("tensor", "elements", "share", "payload"), rows, right=("elements", "share", "payload"))
    if len(largest) > _LINES:
        screen.say(f"... and {len(largest) - _LINES} more; --json lists all")
