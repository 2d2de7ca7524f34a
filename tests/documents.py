"""What documents, help texts and error messages say: the code in Markdown files, and the commands and flags in it."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
from refleet.publisher.cli import cli as refleet
from refleet.worker.cli import cli as refleet_worker

ROOT = Path(__file__).parent.parent
GROUPS: dict[str, click.Group] = {"refleet": refleet, "refleet-worker": refleet_worker}
#: a command starts a text or a line, or follows a prompt for one; prose about refleet ("the refleet that") does neither
_START = r"(?:^|[`(|;&]|: |\bor |\band |, )[ \t]*"
_COMMAND = re.compile(_START + r"(refleet(?:-worker)? +[a-z][^\n`|;&#()]*)", re.M)


@dataclass(frozen=True)
class Said:
    """A command that some text tells its reader to run."""

    place: str
    command: str

    def __str__(self) -> str:
        return f"{self.place}: {self.command}"


def files() -> Iterator[Path]:
    """Every file of the repository, without what tools leave in it."""
    for folder, names, found in os.walk(ROOT):
        names[:] = [
            n for n in names if (n[0] != "." or n == ".ci") and not n.endswith(("__pycache__", ".egg-info", "-state"))
        ]
        names[:] = [n for n in names if Path(folder) != ROOT or n not in ("build", "dist")]
        yield from (Path(folder) / name for name in found)


def markdown() -> list[Path]:
    return sorted(path for path in files() if path.suffix == ".md")


def code(text: str) -> Iterator[str]:
    """The code of a Markdown text: fenced blocks, indented blocks, and what stands in backticks."""
    fence = re.compile(r"^```\w*\n(.*?)^```$", re.S | re.M)
    yield from fence.findall(text)
    rest = fence.sub("", text)
    yield from re.findall(r"^    .*$", rest, re.M)
    yield from (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", rest))


def commands(text: str, place: str) -> Iterator[Said]:
    """The commands in a text that is code."""
    for found in _COMMAND.findall(text.replace("\\\n", " ")):
        yield Said(place, " ".join(found.split()))


def said_in_source() -> Iterator[Said]:
    """Commands in the messages of the package: what `next=` says, and what stands in backticks."""
    for path in sorted(path for name in ("publisher", "worker", "common") for path in (ROOT / name).glob("*.py")):
        tree = ast.parse(path.read_text())
        place = str(path.relative_to(ROOT))
        advice = [node.value for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "next"]
        names = {part.id for value in advice for part in ast.walk(value) if isinstance(part, ast.Name)}
        for node in ast.walk(tree):  # `new = "refleet keys new makes one"`, used as `next=new` further down
            if isinstance(node, ast.Assign) and names & {at.id for at in node.targets if isinstance(at, ast.Name)}:
                advice += [node.value]
        for value in advice:
            for text in _texts(value):
                yield from commands(text, place)
        for text in _texts(tree):
            for span in re.findall(r"`([^`]+)`", text):
                yield from commands(span, place)
            yield from commands("\n".join(re.findall(r"(?:^  |: )(refleet.*)$", text, re.M)), place)


def _texts(tree: ast.AST) -> Iterator[str]:
    """The strings below a node, an f-string as one with `x` for what it fills in."""
    if isinstance(tree, ast.JoinedStr):
        yield "".join(str(part.value) if isinstance(part, ast.Constant) else "x" for part in tree.values)
    elif isinstance(tree, ast.Constant) and isinstance(tree.value, str):
        yield tree.value
    else:
        for child in ast.iter_child_nodes(tree):
            yield from _texts(child)


def leaf(words: list[str]) -> tuple[click.Context, list[str]]:
    """The command that a command line names, as its context, and the words after it. Fails if there is none."""
    group: click.Command = GROUPS[words[0]]
    context, rest = click.Context(group, info_name=words[0]), words[1:]
    while isinstance(group, click.Group) and rest and not rest[0].startswith("-"):
        found = group.get_command(context, rest[0])
        assert found is not None, f"{context.command_path} has no command {rest[0]!r}"
        group, rest = found, rest[1:]
        context = click.Context(group, info_name=found.name, parent=context)
    return context, rest


def flags(context: click.Context) -> set[str]:
    """The flags that a command takes, those of its help included."""
    parameters = context.command.get_params(context)
    return {name for each in parameters for name in (*each.opts, *each.secondary_opts) if name[0] == "-"}


def every_command() -> Iterator[click.Context]:
    """All commands of both programs, groups included."""
    waiting = [click.Context(group, info_name=name) for name, group in GROUPS.items()]
    while waiting:
        context = waiting.pop(0)
        yield context
        if isinstance(context.command, click.Group):
            for name, found in context.command.commands.items():
                waiting.append(click.Context(found, info_name=name, parent=context))
