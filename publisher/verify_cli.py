"""`refleet verify`."""

from __future__ import annotations

import click

from .fleet import fleet
from .screen import short
from .session import Session, example, shared
from .verify import Verification, verify


@click.command("verify", epilog=example("refleet verify --model policy --timeout 120"))
@click.option("--deep", is_flag=True, help="Also hash every engine as a whole, in its own serialized form. Slow.")
@click.option(
    "--timeout", type=click.FloatRange(0), default=60.0, show_default=True, metavar="S",
    help="How long workers may take to read back their engines.",
)  # fmt: skip
@shared("model", "key", "redis")
def verify_command(session: Session, deep: bool, timeout: float) -> int:
    """Make every worker hash again what its engine holds.

    Fails (exit code 3) when an engine holds other bytes than its version, naming the first tensor, when a live worker
    does not answer in time, and when no worker is there; with --deep also when workers with the same engine build and
    the same version hold different engines. Sign the request with --key where workers have a trust file.
    """
    key = session.signing_key()
    with session.stream() as stream:
        now = fleet(stream)
        found = verify(stream, key=key, deep=deep, timeout_s=timeout)
    absent = sorted({w.id for w in now.workers} - found.answers.keys() - set(found.silent))
    _show(session, found, absent)
    return 0 if found.ok else 3


def _show(session: Session, found: Verification, absent: list[str]) -> None:
    rows, answers = [], []
    for worker, ack in sorted(found.answers.items()):
        verified = ack.verified
        assert verified is not None, "answers to this request carry it"
        if verified.ok:
            result = "ok"
        elif verified.first_bad:
            result = f"differs in {verified.first_bad}"
        else:
            result = "engine differs" if verified.engine else "not verified"
        engine = short(verified.engine) if verified.engine else verified.note or "-"
        rows.append((worker, result, ack.serving or "-", str(verified.tensors), engine))
        answers.append({
            "id": worker, "ok": verified.ok, "serving": ack.serving, "tensors": verified.tensors,
            "first_bad": verified.first_bad,
            "fingerprint": ack.fingerprint.hex() if ack.fingerprint else None,
            "error": {"code": ack.failure.code, "what": ack.failure.what} if ack.failure else None,
            "engine": verified.engine.hex() if verified.engine else None, "note": verified.note,
        })  # fmt: skip
    rows += [(worker, "no answer", "-", "-", "-") for worker in found.silent]
    rows += [(worker, "gone, not asked", "-", "-", "-") for worker in absent]
    columns = ("worker", "result", "serving", "tensors", "engine")
    shown = len(columns) if found.deep else len(columns) - 1
    if rows:
        session.screen.table(columns[:shown], [row[:shown] for row in rows], right=("tensors",))
    for group in found.disagree:
        session.screen.say(f"{', '.join(group)}: same engine build and same version, but not the same engine")
    good = sum(1 for answer in answers if answer["ok"])
    if not found.answers and not found.silent:
        session.screen.say(f"not verified: no live worker of model {session.model}")
    else:
        session.screen.say(f"{'verified' if found.ok else 'NOT verified'}: {good} of {len(rows) - len(absent)} workers")
    session.result({
        "model": session.model, "ok": found.ok, "deep": found.deep, "workers": answers, "silent": list(found.silent),
        "absent": absent, "disagree": [list(group) for group in found.disagree],
    })  # fmt: skip
