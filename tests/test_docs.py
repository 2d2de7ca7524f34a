"""Documents, help texts and error messages name only what exists: commands, flags, files, targets, tests, names."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from documents import ROOT, code, commands, every_command, files, flags, leaf, markdown, said_in_source

DOCUMENTS = [str(path.relative_to(ROOT)) for path in markdown()]
SHIPPED = [*DOCUMENTS, "compose.yaml"]
EVERY = {context.command_path: context for context in every_command()}


def check(command: str) -> None:
    """Fails unless the command exists, and takes every flag that stands next to it."""
    words = command.replace(",", " ").replace("'", "").replace('"', "").split()
    context, rest = leaf(words)
    named = {flag for word in rest for flag in re.findall(r"^\[?(--[a-z][a-z-]*)", word)}
    assert named <= flags(context), f"{context.command_path} has no {sorted(named - flags(context))}"


def read(name: str) -> str:
    return (ROOT / name).read_text()


def as_lines(compose: str) -> str:
    """A compose file with `["refleet", "serve"]` and `docker compose exec SERVICE refleet` as plain command lines."""
    return re.sub(r"docker compose exec \S+ ", "\n", re.sub(r'[\[\]",]', "", compose))


@pytest.mark.parametrize("name", SHIPPED)
def test_every_command_in_a_document_exists_and_takes_the_flags_next_to_it(name: str) -> None:
    text = read(name)
    spans = list(code(text)) if name.endswith(".md") else [as_lines(text)]
    for span in spans:
        for said in commands(span, name):
            check(said.command)


def test_every_command_in_a_message_of_the_source_exists() -> None:
    said = list(said_in_source())
    assert len({each.command.split()[1] for each in said}) > 5, "the search finds nothing any more"
    for each in said:
        # after a message's command may come prose, but never a flag that does not exist
        check(re.sub(r"(?<!-)\b(makes|shows|answers|lists).*", "", each.command))


def test_a_command_or_flag_that_does_not_exist_is_found() -> None:
    found = [
        said.command for said in commands("run\n    refleet publsh PATH --wait\nor refleet status --modle x", "here")
    ]
    assert len(found) == 2
    for command in found:
        with pytest.raises(AssertionError, match="has no"):
            check(command)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_flag_in_a_document_is_one_of_some_command(name: str) -> None:
    known = set().union(*(flags(context) for context in EVERY.values()))
    named = {flag for span in code(read(name)) for flag in re.findall(r"^--[a-z][a-z-]*", span)}
    assert named <= known, sorted(named - known)


def test_commands_in_the_compose_file_are_seen() -> None:
    seen = [said.command.split()[:2] for said in commands(as_lines(read("compose.yaml")), "compose.yaml")]
    assert sorted(map(tuple, seen)) == [("refleet", "serve"), ("refleet", "status"), *[("refleet-worker", "run")] * 2]


def test_the_command_table_lists_every_command_of_refleet() -> None:
    rows = re.findall(r"^\| (`.*?`) \|", read("docs/cli.md").split("## Settings")[0], re.M)
    listed = {" ".join(re.findall(r"^(?:keys )?[a-z]+", span)) for row in rows for span in re.findall(r"`(.+?)`", row)}
    groups = {"refleet", "refleet keys"}
    assert {f"refleet {name}" for name in listed} == {
        path for path in EVERY if path.startswith("refleet ") and path not in groups
    }


def test_the_option_table_lists_every_option_of_the_worker() -> None:
    listed = set(re.findall(r"^\| `(--[a-z-]+)", read("docs/worker.md"), re.M))
    assert listed == flags(EVERY["refleet-worker run"]) - {"-h", "--help"}


@pytest.mark.parametrize("path", sorted(EVERY))
def test_help_ends_with_an_example_that_parses(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    context = EVERY[path]
    text = context.command.get_help(context)
    assert "Example:\n" in text
    lines = re.sub(r"\\\n", " ", text.split("Example:\n")[1]).splitlines()
    parts = [shlex.split(part, comments=True) for line in lines for part in re.split(r"[|&]", line.split("#")[0])]
    examples = [words for words in parts if words and words[0] in ("refleet", "refleet-worker")]
    assert any(path in " ".join(words) for words in examples), text
    for words in examples:
        named, rest = leaf(words)
        assert named.command.make_context(str(named.info_name), rest, parent=named.parent)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_relative_links_lead_to_files(name: str) -> None:
    for link in re.findall(r"\]\(([^)#\s]+)", re.sub(r"^```.*?^```$", "", read(name), flags=re.S | re.M)):
        if "://" not in link:
            assert ((ROOT / name).parent / link).exists(), link


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_that_a_document_names_exist(name: str) -> None:
    for path in re.findall(
        r"\b((?:common|publisher|worker|tests|docs|deploy|benchmarks|examples)/[\w/.-]+\.\w+)", read(name)
    ):
        assert (ROOT / path).exists(), path


def test_tests_in_the_table_of_invariants_exist() -> None:
    rows = re.findall(r"^\| I\d.*$", read("docs/architecture.md"), re.M)
    assert len(rows) > 15
    for row in rows:
        named = re.findall(r"\btest_\w+", row)
        assert named, row
        for test in named:
            assert (ROOT / "tests" / f"{test}.py").exists(), row


@pytest.mark.parametrize("name", DOCUMENTS)
def test_names_that_python_examples_import_exist(name: str) -> None:
    for block in re.findall(r"^```python\n(.*?)^```$", read(name), re.S | re.M):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module:
                module = importlib.import_module(node.module)
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_make_targets_that_a_document_names_exist(name: str) -> None:
    targets = set(re.findall(r"^([a-z]+):", read("Makefile"), re.M))
    named = {target for span in code(read(name)) for target in re.findall(r"^ *make ([a-z]+)", span)}
    assert named <= targets, sorted(named - targets)


@pytest.mark.parametrize(
    ("target", "extra", "last"), [("demo", ".[demo]", "python examples/demo.py"), ("test", ".[dev]", "pytest")]
)
def test_make_installs_into_a_virtual_environment_and_then_does_what_the_readme_says(
    target: str, extra: str, last: str, tmp_path: Path
) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    made = subprocess.run(
        ["make", "-n", target, f"VENV={tmp_path}/venv"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert made.returncode == 0, made.stderr
    steps = ["-m venv ", f"-e '{extra}'", f"{tmp_path}/venv/bin/{last}"]
    at = [made.stdout.find(step) for step in steps]
    assert -1 not in at and at == sorted(at), made.stdout
    assert not list(tmp_path.iterdir()), "make -n did something"


def test_no_file_leans_on_folders_outside_the_repository() -> None:
    outside = [b"/".join(parts) for parts in ((b"..", b"shared"), (b"", b"tmp", b"dev"))]
    found = [str(path.relative_to(ROOT)) for path in files() if any(word in path.read_bytes() for word in outside)]
    assert found == []
