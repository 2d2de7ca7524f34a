"""Every crash point of the source is one at which a test kills a process: a new one needs a test, too."""

from __future__ import annotations

import ast
from pathlib import Path

import refleet.common
import refleet.publisher
import refleet.worker

TESTS = Path(__file__).parent


def calls(folder: Path) -> list[ast.Call]:
    trees = [ast.parse(path.read_text()) for path in sorted(folder.glob("*.py"))]
    return [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]


def text(node: ast.AST) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def points() -> set[str]:
    """What `crash_point` is called with; `store.{kind}-...` for each kind of file that is written so."""
    found: set[str] = set()
    kinds: dict[str, set[str]] = {"sync": set(), "rename": set()}
    for module in (refleet.common, refleet.publisher, refleet.worker):
        for call in calls(Path(module.__path__[0])):
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            texts = {said for argument in call.args if (said := text(argument))}
            if name in ("sync", "rename", "rename_as_newest"):
                kinds["sync" if name == "sync" else "rename"] |= texts
            elif name == "crash_point":
                found |= texts or {ast.unparse(call.args[0])}
    for step, doing in (("written", "sync"), ("synced", "sync"), ("renamed", "rename")):
        found.remove(f"f'store.{{kind}}-{step}'")
        found |= {f"store.{kind}-{step}" for kind in kinds[doing]}
    return found


def armed() -> set[str]:
    """What tests name: a string of its own that is no part of a text."""
    return {
        said.partition("+")[0]
        for path in TESTS.glob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if (said := text(node))
    }


def test_a_test_kills_a_process_at_every_crash_point() -> None:
    found = points()
    assert len(found) > 30
    assert {"store.pack-written", "store.delta-renamed", "worker.applied", "publisher.recorded"} <= found
    assert not any("{" in point for point in found), "a point whose name is put together in a way unknown here"
    assert found - armed() == set(), "no test kills a process there"
