"""`--engine` on the command line: what it may say, and what is said about everything else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from refleet.common.errors import UsageError
from refleet.worker.file_engine import FileEngine
from refleet.worker.load_engine import load_engine
from refleet.worker.torch_engine import TorchEngine


def test_a_torch_engine_comes_from_a_factory_with_its_probe_inputs() -> None:
    engine = load_engine("torch:engine_cases:zoo")
    assert isinstance(engine, TorchEngine)
    assert engine.probe() is not None
    assert isinstance(load_engine("torch:torch.nn:Identity"), TorchEngine)


def test_a_file_engine_comes_from_its_path(tmp_path: Path) -> None:
    engine = load_engine(f"file:{tmp_path}/a:b.safetensors", on_serving="true")
    assert isinstance(engine, FileEngine)
    assert engine.path == tmp_path.resolve() / "a:b.safetensors"


MODULE = """
import torch
not_callable = 3
class Models:
    tiny = torch.nn.Identity
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def test_a_module_in_the_current_folder_is_found(home: Path) -> None:
    (home / "my_own_models.py").write_text(MODULE)
    assert isinstance(load_engine("torch:my_own_models:Models.tiny"), TorchEngine)


def test_the_current_folder_comes_first_as_for_python_dash_m(tmp_path: Path) -> None:
    (tmp_path / "statistics.py").write_text(MODULE)  # beside one of the standard library
    code = "from refleet.worker.load_engine import load_engine as load; load('torch:statistics:Models.tiny')"
    subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("", "starts with torch:, tensorrt:, bundle: or file:"),
        ("model.safetensors", "starts with torch:, tensorrt:, bundle: or file:"),
        ("onnx:model", "starts with torch:, tensorrt:, bundle: or file:"),
        ("file:", "nothing follows 'file:'"),
        ("torch:", "nothing follows 'torch:'"),
        ("torch:module_only", "torch:package.module:factory"),
        ("torch:a/b.py:make", "torch:package.module:factory"),
        ("torch:m:make()", "torch:package.module:factory"),
        ("torch:no_such_module_here:make", "no module 'no_such_module_here'"),
        ("torch:refleet.no_such_part:make", "no module 'refleet.no_such_part'"),
        ("torch:engine_cases:no_such", "has no 'no_such'"),
        ("torch:engine_cases:zoo.inner", "has no 'zoo.inner'"),
        ("torch:engine_cases:ODD_F32", "not a callable"),
        ("torch:engine_cases:version", "TypeError"),
        ("torch:engine_cases:zoo_version", "TypeError"),
    ],
)
def test_a_spec_that_can_not_be_meant_is_explained(home: Path, spec: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_engine(spec)
    assert words in caught.value.what
    assert repr(spec) in caught.value.about
    assert caught.value.next


def test_a_wrong_name_is_answered_with_the_names_there_are(home: Path) -> None:
    with pytest.raises(UsageError, match="'Zoo'"):
        load_engine("torch:engine_cases:zo")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import no_such_dependency", "No module named 'no_such_dependency'"),
        ("1/0", "ZeroDivisionError"),
        ("(", "SyntaxError"),
    ],
)
def test_a_module_that_can_not_be_imported_is_not_called_missing(home: Path, text: str, words: str) -> None:
    (home / f"broken_{len(text)}.py").write_text(text)
    with pytest.raises(UsageError, match=words) as caught:
        load_engine(f"torch:broken_{len(text)}:make")
    assert "failed" in caught.value.what


def test_a_command_after_a_switch_is_for_files_only() -> None:
    with pytest.raises(UsageError, match="for file engines"):
        load_engine("torch:engine_cases:zoo", on_serving="true")
