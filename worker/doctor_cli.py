"""`refleet-worker doctor`: can this machine serve? A table, or JSON."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable

import click

from ..common.config import Settings
from .doctor import FAIL, OK, WARN, Check, checks

EXAMPLE = """\b
Example:
  refleet-worker doctor --redis redis://127.0.0.1:6379 --model policy
  refleet-worker doctor --no-self-test --json
"""
_COLORS = {OK: "green", WARN: "yellow", FAIL: "red"}


@click.command(epilog=EXAMPLE)
@click.option("--redis", metavar="URL", help="Also look at this server.  [REFLEET_REDIS]")
@click.option("--read-from", metavar="URL", help="Also look at this replica of it.  [REFLEET_READ_FROM]")
@click.option("--payload-redis", metavar="URL", help="Also at this server of payloads.  [REFLEET_PAYLOAD_REDIS]")
@click.option("--model", metavar="NAME", default="", help="Also look whether the server has releases of this model.")
@click.option("--engine", metavar="SPEC", default="", help="Also load this engine, as `refleet-worker run` does.")
@click.option(
    "--self-test/--no-self-test", default=True, show_default=True, help="Build a tiny engine on the GPU and refit it."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object; its keys are in docs/worker.md.")
@click.pass_obj
def doctor(
    found: Settings, redis: str | None, read_from: str | None, payload_redis: str | None, model: str, engine: str,
    self_test: bool, as_json: bool,
) -> int:  # fmt: skip
    """Tell whether this machine can serve, and what to do where it can't.

    Exit code 0 if nothing failed, 1 otherwise. Nothing on the server is changed.
    """
    from .doctor_facts import gather

    url = redis
    if url is None and (model or found.redis != Settings().redis):
        url = found.redis
    say = _silent if as_json else _say
    facts = gather(
        redis=url, read_from=read_from or found.read_from, payload_redis=payload_redis or found.payload_redis,
        model=model, engine=engine, self_test=self_test, say=say,
    )  # fmt: skip
    verdict = checks(facts)
    failed = sum(check.status == FAIL for check in verdict)
    _print(as_object(verdict) if as_json else "\n".join([*table(verdict), "", summary(verdict)]))
    return 1 if failed else 0


def table(verdict: Iterable[Check]) -> list[str]:
    """Lines for people: status, name, sentence, and below what to do next."""
    verdict = list(verdict)
    wide = max(len(check.name) for check in verdict)
    lines = []
    for check in verdict:
        status = click.style(f"{check.status:<4}", fg=_COLORS[check.status])
        lines.append(f"{status}  {check.name:<{wide}}  {check.text}")
        if check.status != OK and check.next:
            lines.append(f"{'':<4}  {'':<{wide}}  next: {check.next}")
    return lines


def summary(verdict: Iterable[Check]) -> str:
    statuses = [check.status for check in verdict]
    failed, warned = statuses.count(FAIL), statuses.count(WARN)
    warnings = f", {warned} warning{'s' if warned != 1 else ''}" if warned else ""
    if failed:
        return f"{failed} of {len(statuses)} checks failed{warnings}"
    return f"nothing failed{warnings}: this machine can serve"


def as_object(verdict: Iterable[Check]) -> str:
    """One JSON object in one line."""
    found = [{"name": check.name, "status": check.status, "text": check.text, "next": check.next} for check in verdict]
    return json.dumps({"ok": all(check["status"] != FAIL for check in found), "checks": found})


def _say(text: str) -> None:
    click.echo(f"refleet-worker doctor: {text}", err=True)


def _silent(_text: str) -> None:
    pass


def _print(text: str) -> None:
    try:
        click.echo(text)
        sys.stdout.flush()
    except OSError:  # a reader that went away; also what is in the buffer would fail, again at the exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
