"""What is shipped for deployment agrees with the code: compose file, Dockerfile, CI script."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

ROOT = Path(__file__).parent.parent
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]


def parses(command: list[str]) -> click.Context:
    """The leaf context of a refleet command line, parsed by the real command but not run."""
    from refleet.publisher.cli import cli as refleet
    from refleet.worker.cli import cli as worker

    group = {"refleet": refleet, "refleet-worker": worker}[command[0]]
    arguments = command[1:]
    context = click.Context(group)
    current: click.Command = group
    while isinstance(current, click.Group):
        found = current.get_command(context, arguments[0])
        assert found is not None, f"{command}: no command {arguments[0]!r}"
        current, arguments = found, arguments[1:]
    return current.make_context(command[0], arguments, parent=context)


def test_there_is_one_server_one_publisher_that_watches_and_two_workers() -> None:
    commands = [service.get("command", []) for service in SERVICES.values()]
    assert sum(command[:2] == ["refleet-worker", "run"] for command in commands) == 2
    assert sum(command[:2] == ["refleet", "serve"] and "--watch" in command for command in commands) == 1


def test_the_server_keeps_what_it_acknowledged_and_drops_nothing() -> None:
    options = " ".join(SERVICES["redis"]["command"])
    assert "--appendonly yes" in options
    assert "--maxmemory-policy noeviction" in options


@pytest.mark.parametrize("name", ["publisher", "worker-a", "worker-b"])
def test_every_command_in_the_compose_file_is_one_that_we_have(name: str) -> None:
    context = parses(SERVICES[name]["command"])
    assert context.params["model"] == "demo"


def test_workers_have_ids_and_volumes_of_their_own() -> None:
    workers = [SERVICES["worker-a"], SERVICES["worker-b"]]
    ids = {worker["command"][worker["command"].index("--id") + 1] for worker in workers}
    state = {volume.split(":")[0] for worker in workers for volume in worker["volumes"]}
    assert len(ids) == 2
    assert len(state) == 4
    assert state <= set(COMPOSE["volumes"])


def test_services_wait_for_the_server_and_have_time_to_drain() -> None:
    for name in ("publisher", "worker-a", "worker-b"):
        assert SERVICES[name]["depends_on"]["redis"]["condition"] == "service_healthy"
        assert int(SERVICES[name]["stop_grace_period"].rstrip("s")) > 30


def test_compose_itself_accepts_the_file() -> None:
    compose = shutil.which("docker-compose")
    if compose is None:
        pytest.skip("docker-compose is not installed")
    found = subprocess.run([compose, "-f", ROOT / "compose.yaml", "config", "-q"], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_the_dockerfile_copies_every_folder_that_the_package_is_made_of() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    copied = {word for line in lines if line.startswith("COPY") for word in shlex.split(line)[1:-1]}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = {path.split("/")[0] for path in project["tool"]["setuptools"]["package-dir"].values()}
    assert folders <= copied
    assert {"pyproject.toml", "README.md", "LICENSE"} <= copied


def test_ci_runs_what_the_readme_names_and_nothing_else() -> None:
    commands = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line and line[0] != "#"]
    assert commands == [
        "set -euo pipefail",
        'cd "$(dirname "$0")/.."',
        "export CI=true",
        "make check",
        "make test-plan",
    ]
    readme = (ROOT / "README.md").read_text()
    assert "make check" in readme
    assert "make test-plan" in readme
