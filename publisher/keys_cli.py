"""`refleet keys`: make signing keys, and say whose records count."""

from __future__ import annotations

import base64
import sys
from pathlib import Path

import click

from ..common.errors import UsageError
from ..common.signing import KEY_KIND, SigningKey, Trust
from .session import FILE, Session, example, shared


@click.group(epilog=example(
    "refleet keys new publisher.pem",
    "refleet keys show publisher.pem | refleet keys trust trusted-keys.txt -",
))  # fmt: skip
def keys() -> None:
    """Make signing keys, and list whose records workers act on.

    A publisher signs with its private key (--key). Workers get a trust file of public keys (--trust), and refuse
    everything else.
    """


@keys.command(epilog=example("refleet keys new publisher.pem"))
@click.argument("file", type=FILE)
@shared()
def new(session: Session, file: Path) -> None:
    """Make a private key in FILE, and print its public line.

    FILE can be read by its owner only. The public line belongs into the trust file of every worker.
    """
    key = SigningKey.new()
    key.save(file)
    session.screen.note(f"wrote the private key to {file}; this is its public line:")
    session.screen.say(key.public_text)
    session.result({"path": str(file), "key_id": key.key_id.hex(), "public": key.public_text})


@keys.command(epilog=example(
    "refleet keys show publisher.pem | refleet keys trust trusted-keys.txt -",
))  # fmt: skip
@click.argument("file", type=FILE)
@click.argument("line", nargs=-1, required=True)
@shared()
def trust(session: Session, file: Path, line: tuple[str, ...]) -> None:
    """Add a public LINE to the trust file FILE, which is made if it is missing. LINE `-` reads standard input."""
    text = " ".join(line)
    if text == "-":
        text = sys.stdin.read()
    added = Trust.add(file, text)
    trusted = Trust.load(file)
    what = "added to" if added else "was already in"
    session.screen.say(f"the key {what} {file}; keys trusted there: {len(trusted.keys)}")
    session.result({"path": str(file), "added": added, "keys": _keys(trusted)})


@keys.command("show", epilog=example("refleet keys show publisher.pem"))
@click.argument("file", type=FILE)
@shared()
def show_key(session: Session, file: Path) -> None:
    """Print the public line of a private key, or the lines of a trust file."""
    found, kind = _read(file)
    for key in found:
        session.screen.say(key["public"])
    session.result({"path": str(file), "kind": kind, "keys": found})


def _read(file: Path) -> tuple[list[dict[str, str]], str]:
    try:
        with file.open("rb") as opened:
            private = opened.read(11) == b"-----BEGIN "
    except OSError as error:
        raise UsageError(f"can't read the key: {error.strerror}", about=str(file)) from None
    if private:
        key = SigningKey.load(file)
        return [{"key_id": key.key_id.hex(), "public": key.public_text}], "private"
    return _keys(Trust.load(file)), "trust"


def _keys(trusted: Trust) -> list[dict[str, str]]:
    texts = {key_id.hex(): base64.b64encode(key.public_bytes_raw()).decode() for key_id, key in trusted.keys.items()}
    return [{"key_id": key_id, "public": f"{KEY_KIND} {text} {key_id}"} for key_id, text in texts.items()]
