"""`refleet-worker`: one worker as a process.

Exit codes: 0 ended as asked by a signal; 1 the worker failed, or its state or engine is unusable; 2 usage; 4 the
server refuses; 128 + n a second signal n ended it at once.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType

import click

from ..common.config import Settings, command_settings, redacted
from ..common.errors import RefleetError, UsageError
from ..common.signing import Trust
from .build_cli import build, export
from .doctor_cli import doctor
from .http import HttpFront, parse_address
from .load_engine import APPLY, load_engine
from .log import Log
from .state import default_id, owned_state
from .worker import Worker

FILE = click.Path(path_type=Path)
#: no answer from the server for so many heartbeats makes a serving worker STALE
_STALE_BEATS = 5
_LOOK_S = 0.2
EXAMPLE = """\b
Example:
  refleet server &                       # or your own Redis or Valkey
  refleet-worker run --model policy --engine file:./policy.safetensors \\
    --state ./w0 --http 8080 &
  curl http://127.0.0.1:8080/status
"""


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, epilog=EXAMPLE)
@click.version_option(package_name="refleet", message="refleet-worker %(version)s")
def cli() -> None:
    """Keep an inference engine on the version that its fleet is asked to serve."""


for command in (build, export, doctor):
    cli.add_command(command)


@cli.command(epilog=EXAMPLE)
@click.option("--model", required=True, metavar="NAME", help="Name of the model, as it is published.")
@click.option(
    "--engine", required=True, metavar="SPEC",
    help="torch:package.module:factory, tensorrt:package.module:factory, bundle:DIR; file:PATH for any other runtime.",
)  # fmt: skip
@click.option(
    "--state",
    required=True,
    type=FILE,
    metavar="DIR",
    help="This worker's own folder: store and record; or memory.",
)
@click.option(
    "--share", type=FILE, metavar="DIR",
    help="A folder that this host's workers share: each version is received, decoded and kept once.",
)  # fmt: skip
@click.option("--redis", metavar="URL", help="Server.  [REFLEET_REDIS; redis://127.0.0.1:6379]")
@click.option("--read-from", metavar="URL", help="Read log and payloads from this replica.  [REFLEET_READ_FROM]")
@click.option("--payload-redis", metavar="URL", help="Read payloads from this server.  [REFLEET_PAYLOAD_REDIS]")
@click.option("--id", "worker_id", metavar="ID", help="Name in the fleet.  [host name and state folder]")
@click.option("--http", metavar="[HOST:]PORT", help="Answer /livez /readyz /status /metrics; 0 takes a free port.")
@click.option("--trust", type=FILE, metavar="FILE", help="Refuse records not signed by these keys.  [REFLEET_TRUST]")
@click.option(
    "--keep", type=click.IntRange(1), default=4, show_default=True, metavar="N", help="Versions kept for rollbacks."
)
@click.option("--on-serving", metavar="CMD", help="Run after each switch of a file engine.")
@click.option("--apply", type=click.Choice(APPLY), help="TensorRT: the way in which versions go in.  [auto]")
@click.option("--contexts", type=click.IntRange(1), metavar="N", help="TensorRT: how many requests run at once.  [1]")
@click.option(
    "--bundle", type=FILE, metavar="DIR", help="TensorRT: use this bundle if it fits, else compile and write it."
)
@click.option(
    "--drain", type=click.FloatRange(0, 86400), default=30.0, show_default=True, metavar="S",
    help="How long a switch, and the end, wait for requests in flight.",
)  # fmt: skip
@click.option(
    "--heartbeat", type=click.FloatRange(0.05, 3600), default=1.0, show_default=True, metavar="S",
    help="How often to tell the fleet its status; five times that without an answer is STALE.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per line; its keys are in docs/worker.md.")
@click.pass_obj
def run(
    found: Settings, model: str, engine: str, state: Path, share: Path | None, redis: str | None, read_from: str | None,
    payload_redis: str | None, worker_id: str | None, http: str | None, trust: Path | None, keep: int,
    on_serving: str | None, apply: str | None, contexts: int | None,
    bundle: Path | None, drain: float, heartbeat: float, as_json: bool,
) -> int:  # fmt: skip
    """Run one worker until SIGTERM or Ctrl-C.

    It follows the model, puts every released version into the engine once all of it is verified, and acknowledges. It
    goes on serving its last version while the server is away, also when it is started then.
    """
    log = Log(worker=worker_id or default_id(state), model=model, as_json=as_json)
    with ExitStack() as closing, log.errors(), stopping_on_signals() as signals:
        # whatever can be wrong is looked at before the engine is made, which may take minutes and a whole GPU
        listen = parse_address(http) if http is not None else None
        trusted_path = trust or found.trust
        trusted = Trust.load(trusted_path) if trusted_path else None
        with owned_state(state, worker=log.worker, model=model, share=share):
            pass
        made = load_engine(
            engine, on_serving=on_serving, apply=apply, contexts=contexts, bundle=bundle, on_step=log.step
        )
        closing.callback(made.close)
        worker = Worker(
            redis or found.redis, read_from=read_from or found.read_from or None,
            payload_redis=payload_redis or found.payload_redis or None, model=model, engine=made, state_dir=state,
            share=share,
            worker_id=log.worker, trust=trusted,
            keep=keep, heartbeat_s=heartbeat, stale_after_s=_STALE_BEATS * heartbeat, drain_s=drain,
            poll_s=min(1.0, heartbeat), on_event=log.event,
        )  # fmt: skip
        closing.callback(worker.stop)
        log.serving = lambda: worker.gate.current
        front = closing.enter_context(HttpFront(worker, host=listen[0], port=listen[1])) if listen else None
        closing.callback(worker.stop)  # again, before `front` is closed: probes see the worker drain
        log.started(engine, state, redacted(redis or found.redis), front.url if front else None)
        worker.start()
        signals.graceful = True
        while not signals.asked.wait(_LOOK_S):
            if worker.crash is not None:
                raise RefleetError(
                    f"the worker failed: {type(worker.crash).__name__}: {worker.crash}", about=_place(worker.crash),
                    serving="nothing", next="start it again; report it if that does not help",
                )  # fmt: skip
        log.stopping(signals.name)
    log.ended()
    return log.exit_code


class Signals:
    """The first SIGTERM or SIGINT asks the worker to end, a second one ends the process at once."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.name = ""
        self.graceful = False  # before that there is nothing to drain: the first signal interrupts whatever goes on

    def handle(self, number: int, _frame: FrameType | None) -> None:
        if self.asked.is_set():
            os._exit(128 + number)
        self.name = signal.Signals(number).name
        self.asked.set()
        if not self.graceful:
            raise Interrupted


class Interrupted(BaseException):
    """Asked to end before the worker was started."""


@contextmanager
def stopping_on_signals() -> Iterator[Signals]:
    """Handles SIGTERM and SIGINT during the block; the handlers stay, for the end may take its time."""
    signals = Signals()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signals.handle)
    try:
        with suppress(Interrupted):
            yield signals
    finally:
        signals.graceful = True  # what is being closed now is not interrupted by a first signal


def _place(error: BaseException) -> str:
    """Where an error came from, in one line: the worker prints no tracebacks."""
    at = error.__traceback__
    if at is None:
        return ""
    while at.tb_next is not None:
        at = at.tb_next
    code = at.tb_frame.f_code
    return f"{code.co_name} in {code.co_filename}, line {at.tb_lineno}"


def main() -> None:
    """The entry point."""
    sys.exit(execute(sys.argv[1:], os.environ))


def execute(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """One command; returns its exit code."""
    log = Log(worker="", model="", as_json="--json" in arguments)
    threading.excepthook = _quiet
    try:
        code = cli.main(
            list(arguments), "refleet-worker", standalone_mode=False, obj=command_settings(arguments, environ)
        )
    except RefleetError as error:
        return log.failed(error)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return 2
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        what = re.sub(r"\S+://\S+", lambda url: redacted(url[0]), error.format_message())
        return log.failed(UsageError(what, next=f"{context.command_path if context else 'refleet-worker'} --help"))
    return code if isinstance(code, int) else 0


def _quiet(failed: threading.ExceptHookArgs) -> None:
    """A thread that ends by an error tells nobody here: the worker says why it failed, in words."""
