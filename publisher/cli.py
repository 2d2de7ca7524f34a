"""`refleet`: the publisher's command line. Commands are in files of their own; this one is their edge.

Exit codes: 0 what was asked is true; 1 refused or failed; 2 usage; 3 workers failed, or not in time; 4 no server;
130 interrupted.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence

import click

from ..common.config import command_settings, redacted
from ..common.errors import RefleetError, UsageError
from .commands import gc, publish, rollback, status
from .history_cli import diff_command, history, show
from .keys_cli import keys
from .screen import Screen
from .serve import serve
from .server import server
from .session import Session, example
from .verify_cli import verify_command


class InOrder(click.Group):
    """Lists its commands as they were added: the main job first."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(self.commands)


@click.group(
    cls=InOrder,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=example(
        "refleet server &                       # or your own Redis or Valkey",
        "refleet-worker run --model policy --engine file:model.safetensors \\",
        "  --state ./w0 &",
        "refleet publish step-1.safetensors --model policy --store ./store --wait",
        "refleet status --model policy",
    ),
)
@click.version_option(package_name="refleet", message="refleet %(version)s")
def cli() -> None:
    """Keep a fleet of inference engines on the right weights.

    Publish a checkpoint: what changed is sent, and every worker verifies it, switches to it, and says so. Roll back by
    version id.
    """


for command in (publish, rollback, status, history, show, diff_command, verify_command, serve, gc, keys, server):
    cli.add_command(command)


def main() -> None:
    """The entry point."""
    sys.exit(run(sys.argv[1:], os.environ))


def run(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """One command; returns its exit code. Errors end here: as text on standard error, or as JSON on standard output."""
    screen = Screen()
    as_json = screen.quiet = "--json" in arguments
    session: Session | None = None
    try:
        session = Session(command_settings(arguments, environ), screen)
        code = cli.main(args=list(arguments), prog_name="refleet", standalone_mode=False, obj=session)
        return code if isinstance(code, int) else 0
    except RefleetError as error:
        if session and not error.serving:
            error.serving = session.target_now(error)
        return _failed(error, session, as_json)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return 2
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        usage = UsageError(
            re.sub(r"\S+://\S+", lambda url: redacted(url[0]), error.format_message()),
            next=f"{context.command_path if context else 'refleet'} --help",
        )
        return _failed(usage, session, as_json)
    except (KeyboardInterrupt, click.Abort):
        announced = session.release if session else None
        if announced:
            screen.note(f"interrupted; {announced['version']} stays announced, `refleet status` shows who serves it")
        else:
            screen.note("interrupted")
        return 130
    except BrokenPipeError:  # `refleet history | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _failed(error: RefleetError, session: Session | None, as_json: bool) -> int:
    announced = session.release if session else None
    if as_json:
        click.echo(json.dumps({"error": error.to_dict(), **({"release": announced} if announced else {})}, indent=2))
    else:
        click.echo(f"refleet: {error}", err=True)
    return error.exit_code
