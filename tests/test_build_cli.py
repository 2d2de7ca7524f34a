"""`refleet-worker build` and `export`, and what `run` says of TensorRT engines: on twins, in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bundle_twin import built, loaded
from engine_cases import Staged
from refleet.common.errors import NotRefittable
from refleet.common.store import Store
from refleet.common.types import Manifest
from refleet.worker import cli, trt_load, trt_make
from refleet.worker.bundle import Bundle
from refleet.worker.state import WorkerState, probe_name, save
from test_tensorrt_engine import asked, near, put, versions
from twin_engine import CPU, two_load, two_recipe


def make() -> object:
    """The factory that the command lines name."""
    return two_recipe()


FACTORY = "tensorrt:test_build_cli:make"


@pytest.fixture(autouse=True)
def twins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt_load, "cuda", lambda: CPU)
    monkeypatch.setattr(trt_make.Maker, "model", lambda _maker, recipe: built(recipe))
    monkeypatch.setattr(trt_make, "_load", lambda engine, name, *, contexts: two_load(engine, name))


class Ran:
    def __init__(self, code: int, out: str, err: str):
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.out)
        return found


@pytest.fixture
def ran(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    def run(*words: object) -> Ran:
        code = cli.execute([str(word) for word in words], {})
        out, err = capfd.readouterr()
        return Ran(code, out, err)

    return run


# ---------------------------------------------------------------------- build


def test_build_writes_a_bundle_and_says_what_is_in_it(ran: Callable[..., Ran], tmp_path: Path) -> None:
    said = ran("build", "--engine", FACTORY, "--out", tmp_path / "b")
    assert said.code == 0, said.err
    rows = dict(line.split(maxsplit=1) for line in said.out.splitlines())
    assert list(rows) == ["bundle", "for", "parts", "weights", "path", "seconds"]
    assert rows["parts"] == "2 by TensorRT, 1 by PyTorch"
    assert rows["weights"] == "5 of 5 covered by the refit plan"
    assert rows["path"].startswith("fast")
    assert rows["bundle"].startswith(str(tmp_path / "b"))
    assert "writing the bundle" in said.err
    assert Bundle.open(tmp_path / "b").misfit() is None


def test_build_as_json_prints_one_object_and_nothing_else(ran: Callable[..., Ran], tmp_path: Path) -> None:
    said = ran("build", "--engine", FACTORY, "--out", tmp_path / "b", "--strip-weights", "--json")
    assert (said.code, said.err) == (0, "")
    facts = said.json
    record = Bundle.open(tmp_path / "b").record
    assert facts["build"] == record.build.hex()
    assert facts["stripped"] is record.stripped is True
    assert facts["bytes"] == sum(path.stat().st_size for path in (tmp_path / "b").iterdir())
    assert (facts["weights"], facts["covered"], facts["path"], facts["why"]) == (5, 5, "fast", "")
    assert facts["torch_parts"] == ["_run_on_gpu_1"]
    assert facts["seconds"].keys() == {"compile", "plan", "proof"}


def test_the_seconds_of_a_build_are_told_by_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    from refleet.worker import build_cli

    clock = iter([0.0, 1.0, 4.0, 5.0, 7.0, 10.0, 11.0])
    monkeypatch.setattr(build_cli.time, "perf_counter", lambda: next(clock))
    steps = build_cli.Steps(quiet=True)
    for text in (
        "exporting the module", "building the TensorRT engine", "comparing the engine with PyTorch",
        "lowering with random weights, 1", "proving the plan with other weights",
        "proving the refit plan on the engine",
    ):  # fmt: skip
        steps(text)
    assert steps.seconds == {"compile": 4.0, "plan": 5.0, "proof": 2.0}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--engine", "torch:torch.nn:Identity", "--out", "b"), "from a factory"),
        (("--engine", "tensorrt:nope", "--out", "b"), "tensorrt:package.module:factory"),
        (("--engine", FACTORY, "--out", "nowhere/b"), "there is no folder"),
        (("--engine", FACTORY), "--out"),
    ],
)
def test_a_build_that_can_not_be_meant_is_exit_code_2(
    ran: Callable[..., Ran], words: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plain = ran("build", *words)
    assert (plain.code, plain.out) == (2, "")
    assert said in plain.err
    as_json = ran("build", *words, "--json")
    assert (as_json.code, as_json.json["error"]["code"]) == (2, "UsageError")


def test_a_model_that_can_not_be_compiled_is_exit_code_1(
    ran: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_maker: object, _recipe: object) -> None:
        raise NotRefittable("TensorRT can't build the engine: no converter")

    monkeypatch.setattr(trt_make.Maker, "model", fails)
    said = ran("build", "--engine", FACTORY, "--out", tmp_path / "b")
    assert said.code == 1
    assert "no converter" in said.err
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------- export


def held(folder: Path, *stageds: Staged, serving: Staged | None) -> Store:
    """A worker's state folder with these versions."""
    store = Store(folder)
    for staged in stageds:
        with store.writing():
            with store.batch() as batch:
                for name in staged.manifest.by_name:
                    batch.add([staged.tensors[name]])
            store.put_manifest(staged.manifest)
    save(store, WorkerState("w0", "two", None, serving.serving if serving else None, (), False))
    return store


def files(folder: Path) -> dict[Path, bytes]:
    """What is in a state folder; a lock file says who holds it."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.parent.name != "locks"}


def test_export_takes_the_served_version_while_the_worker_runs(ran: Callable[..., Ran], tmp_path: Path) -> None:
    (first, _), (second, expected), *_ = versions(2)
    store = held(tmp_path / "w0", first, second, serving=second)
    ran("build", "--engine", FACTORY, "--out", tmp_path / "b")
    before = files(tmp_path / "w0")
    with store.lock("worker", holder="worker w0"):
        said = ran(
            "export", "--engine", f"bundle:{tmp_path / 'b'}", "--state", tmp_path / "w0", "--out", tmp_path / "e"
        )
    assert said.code == 0, said.err
    assert said.out == f"{tmp_path / 'e'} holds version v1, fingerprint {second.manifest.fingerprint.hex()}\n"
    assert files(tmp_path / "w0") == before
    record = Bundle.open(tmp_path / "e").record
    assert (record.version, record.fingerprint) == ("v1", second.manifest.fingerprint)
    reference = loaded(tmp_path / "b")
    put(reference, second)
    plans = {name: live.serialize() for name, live in reference.model.resident.engines.items()}
    assert {part: engine.plan for part, engine in Bundle.open(tmp_path / "e").engines.items()} == plans
    engine = loaded(tmp_path / "e")
    put(engine, second)
    assert near(asked(engine), expected)


def test_export_takes_another_version_by_the_beginning_of_its_fingerprint(
    ran: Callable[..., Ran], tmp_path: Path
) -> None:
    (first, _), (second, _), *_ = versions(2)
    held(tmp_path / "w0", first, second, serving=second)
    digits = first.manifest.fingerprint.hex()
    arguments = ["export", "--engine", FACTORY, "--state", tmp_path / "w0", "--out", tmp_path / "e", "--json"]
    facts = ran(*arguments, "--version", digits[:12]).json
    assert (facts["version"], facts["fingerprint"], facts["kind"]) == (None, digits, "bundle")
    assert facts["applied"].startswith("fast: ")
    assert ran(*arguments, "--version", "v1").json["version"] == "v1"
    for wanted in ("v7", digits[:7], "0" * 8):
        said = ran(*arguments, "--version", wanted)
        error = said.json["error"]
        assert (said.code, error["code"]) == (1, "UnknownVersion")
        assert "'v1'" in error["next"] and repr(digits[:16]) in error["next"]


def test_an_export_that_can_not_be_proven_writes_nothing(ran: Callable[..., Ran], tmp_path: Path) -> None:
    (first, _), *_ = versions(1)
    store = held(tmp_path / "w0", first, serving=first)
    ran("build", "--engine", FACTORY, "--out", tmp_path / "b")
    store.put_record(probe_name(loaded(tmp_path / "b").build, first.manifest.fingerprint), bytes(32))
    said = ran("export", "--engine", f"bundle:{tmp_path / 'b'}", "--state", tmp_path / "w0", "--out", tmp_path / "e")
    assert (said.code, "differently than it did in the worker" in said.err) == (1, True)
    assert not (tmp_path / "e").exists()


def test_a_version_that_lost_bytes_is_not_exported(ran: Callable[..., Ran], tmp_path: Path) -> None:
    (first, _), *_ = versions(1)
    held(tmp_path / "w0", first, serving=first).close()
    (pack,) = (tmp_path / "w0" / "packs").iterdir()
    data = bytearray(pack.read_bytes())
    spoiled = first.tensors["first.weight"]
    data[data.index(spoiled)] ^= 1
    pack.write_bytes(data)
    said = ran("export", "--engine", FACTORY, "--state", tmp_path / "w0", "--out", tmp_path / "e", "--json")
    assert (said.code, said.json["error"]["code"], said.json["error"]["tensor"]) == (1, "DamagedTensor", "first.weight")


def test_a_version_of_another_model_is_not_exported(ran: Callable[..., Ran], tmp_path: Path) -> None:
    (first, _), *_ = versions(1)
    other = Staged(first.serving, Manifest(first.manifest.tensors[:-1]), first.tensors)
    other = Staged(type(first.serving)("v0", 1, 1, other.manifest.fingerprint), other.manifest, first.tensors)
    held(tmp_path / "w0", other, serving=other)
    said = ran("export", "--engine", FACTORY, "--state", tmp_path / "w0", "--out", tmp_path / "e", "--json")
    assert (said.code, said.json["error"]["code"]) == (1, "NotRefittable")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--engine", "torch:torch.nn:Identity", "--out", "e"), "only TensorRT engines"),
        (("--engine", FACTORY, "--out", "e.onnx"), "neither a file for torch_tensorrt.load (.ep or .pt2) nor a bundle"),
        (("--engine", "bundle:b", "--out", "e.ep"), "needs the module"),
        (("--engine", FACTORY, "--out", "nowhere/e"), "there is no folder"),
        (("--engine", FACTORY, "--out", "nowhere/e.ep"), "there is no folder"),
        (("--engine", FACTORY, "--out", "e"), "no worker's state folder"),
    ],
)
def test_an_export_that_can_not_be_meant_is_exit_code_2(
    ran: Callable[..., Ran], words: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plain = ran("export", "--state", "w0", *words)
    assert (plain.code, plain.out) == (2, "")
    assert said in plain.err
    assert list(tmp_path.iterdir()) == [], "and no folder was made for looking"


def test_a_publishers_store_is_no_workers_state(ran: Callable[..., Ran], tmp_path: Path) -> None:
    Store(tmp_path / "store").close()
    said = ran("export", "--engine", FACTORY, "--state", tmp_path / "store", "--out", tmp_path / "e")
    assert (said.code, "no worker's state folder" in said.err) == (2, True)


def test_a_worker_that_serves_nothing_yet_has_nothing_to_export(ran: Callable[..., Ran], tmp_path: Path) -> None:
    held(tmp_path / "w0", serving=None)
    said = ran("export", "--engine", FACTORY, "--state", tmp_path / "w0", "--out", tmp_path / "e", "--json")
    assert (said.code, said.json["error"]["code"]) == (1, "UnknownVersion")


# ---------------------------------------------------------------------- run


def test_run_shows_what_takes_time(ran: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def load(spec: str, **arguments: Any) -> None:
        given.update(arguments)
        arguments["on_step"]("building the TensorRT engine")
        raise NotRefittable("no memory")

    monkeypatch.setattr(cli, "load_engine", load)
    words = ("run", "--model", "m", "--id", "w0", "--engine", FACTORY, "--state", tmp_path / "w0")
    options = ("--apply", "fast", "--contexts", "2", "--bundle", tmp_path / "b")
    said = ran(*words, *options, "--json")
    lines = [json.loads(line) for line in said.out.splitlines()]
    assert [(line["event"], line["text"]) for line in lines] == [
        ("step", "building the TensorRT engine"), ("failed", "no memory"),
    ]  # fmt: skip
    assert lines[0].keys() == {"event", "time", "worker", "model", "state", "serving", "text"}
    assert (given["apply"], given["contexts"], given["bundle"]) == ("fast", 2, tmp_path / "b")
    plain = ran(*words)
    assert "w0 STARTING building the TensorRT engine\n" in plain.out
    assert (given["apply"], given["contexts"], given["bundle"]) == (None, None, None)


@pytest.mark.parametrize("option", [("--apply", "auto"), ("--contexts", "1"), ("--bundle", "b")])
@pytest.mark.parametrize("engine", ["torch:torch.nn:Identity", "file:m.safetensors"])
def test_options_of_tensorrt_engines_are_refused_elsewhere(
    ran: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, option: tuple[str, str]
) -> None:
    monkeypatch.chdir(tmp_path)
    said = ran("run", "--model", "m", "--engine", engine, "--state", "w0", *option)
    assert said.code == 2
    assert f"only TensorRT engines know {option[0]}" in said.err
