"""`refleet verify`."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import click

from ..common.messages import Ack
from .fleet import fleet
from .screen import short
from .session import Session, example, shared
from .verify import Verification, verify


@click.command("verify", epilog=example("refleet verify --model policy --timeout 120"))
@click.option("--deep", is_flag=True, help="Also prove all content by BLAKE3, and hash engines as a whole. Slow.")
@click.option(
    "--timeout", type=click.FloatRange(0), default=60.0, show_default=True, metavar="S",
    help="How long workers may take to read back their engines.",
)  # fmt: skip
@shared("model", "key", "redis", "store")
def verify_command(session: Session, deep: bool, timeout: float) -> int:
    """Make every worker hash again what its engine holds.

    Fails (exit code 3) when an engine holds other bytes than its version, naming the first tensor, when a live worker
    does not answer in time, and when no worker is there; with --deep also when an engine's bytes are not those in the
    publisher's store (--store; said, and no failure, where that lacks the version), and when workers with the same
    engine build and the same version hold different engines. Sign the request with --key where workers have a trust
    file.
    """
    key = session.signing_key()
    with session.stream() as stream:
        now = fleet(stream)
        with session.book() if deep else nullcontext() as book:
            store = book.store if book else None
            found = verify(stream, key=key, deep=deep, timeout_s=timeout, store=store)
    absent = sorted({w.id for w in now.workers} - found.answers.keys() - set(found.silent))
    _show(session, found, absent)
    return 0 if found.ok else 3


def _show(session: Session, found: Verification, absent: list[str]) -> None:
    rows, answers = [], []
    for worker, ack in sorted(found.answers.items()):
        verified = ack.verified
        assert verified is not None, "answers to this request carry it"
        if worker in found.unproven:
            result = "content differs"
        elif verified.ok:
            result = "ok"
        elif verified.first_bad:
            result = f"differs in {verified.first_bad}"
        else:
            result = "engine differs" if verified.engine else "not verified"
        engine = short(verified.engine) if verified.engine else verified.note or "-"
        rows.append((worker, result, ack.serving or "-", str(verified.tensors), engine))
        answers.append({
            "id": worker, "ok": verified.ok and worker not in found.unproven, "serving": ack.serving,
            "tensors": verified.tensors, "first_bad": verified.first_bad,
            "fingerprint": ack.fingerprint.hex() if ack.fingerprint else None,
            "error": _error(found, worker, ack),
            "engine": verified.engine.hex() if verified.engine else None, "note": verified.note,
            "proof": verified.proof.hex() if verified.proof else None, "content": _content(found, worker),
        })  # fmt: skip
    rows += [(worker, "no answer", "-", "-", "-") for worker in found.silent]
    rows += [(worker, "gone, not asked", "-", "-", "-") for worker in absent]
    columns = ("worker", "result", "serving", "tensors", "engine")
    shown = len(columns) if found.deep else len(columns) - 1
    if rows:
        session.screen.table(columns[:shown], [row[:shown] for row in rows], right=("tensors",))
    for group in found.disagree:
        session.screen.say(f"{', '.join(group)}: same engine build and same version, but not the same engine")
    for worker, why in sorted(found.unproven.items()):
        session.screen.say(f"{worker}: {why}")
    for why in sorted(set(found.not_compared.values())):
        workers = sorted(worker for worker, reason in found.not_compared.items() if reason == why)
        session.screen.say(f"{', '.join(workers)}: content not compared: {why}")
    good = sum(1 for answer in answers if answer["ok"])
    if not found.answers and not found.silent:
        session.screen.say(f"not verified: no live worker of model {session.model}")
    else:
        session.screen.say(f"{'verified' if found.ok else 'NOT verified'}: {good} of {len(rows) - len(absent)} workers")
    session.result({
        "model": session.model, "ok": found.ok, "deep": found.deep, "workers": answers, "silent": list(found.silent),
        "absent": absent, "disagree": [list(group) for group in found.disagree],
    })  # fmt: skip


def _error(found: Verification, worker: str, ack: Ack) -> dict[str, Any] | None:
    if worker in found.unproven:
        return {"code": "DigestMismatch", "what": found.unproven[worker]}
    return {"code": ack.failure.code, "what": ack.failure.what} if ack.failure else None


def _content(found: Verification, worker: str) -> str | None:
    """What comparing the proofs gave; None: they were not, as the answer is none or a failure, or not deep."""
    if worker in found.not_compared:
        return f"not compared: {found.not_compared[worker]}"
    if worker in found.unproven:
        return "differs"
    return "proven" if worker in found.proven else None
