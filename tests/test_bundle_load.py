"""Bundles beside a factory: used where they fit, else replaced, always with the reason; and without a factory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bundle_twin import built
from refleet.common.errors import NotRefittable, StoreFull, UsageError
from refleet.common.types import Manifest
from refleet.worker import bundle_save, load_engine, trt_load
from refleet.worker.bundle import Bundle, save
from refleet.worker.bundle_record import Platform
from refleet.worker.recipe import Recipe
from refleet.worker.tensorrt_engine import TensorRTEngine
from refleet.worker.trt_make import Maker
from test_tensorrt_engine import asked, near, put, versions
from twin_engine import CPU, two_load, two_recipe

OTHER = Platform("2.13", "", "tensorrt 99", "", "")


def make() -> Recipe:
    return two_recipe()


class Here:
    """A machine on which the twin compiles: it counts, and keeps what is said."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.compiled, self.steps = 0, list[str]()
        monkeypatch.setattr(Maker, "model", lambda _maker, recipe: self._model(recipe))

    def _model(self, recipe: Recipe) -> Any:
        self.compiled += 1
        return built(recipe)

    def start(self, bundle: Path | None, factory: Callable[[], object] = make, apply: str = "auto") -> Any:
        self.steps.clear()
        return trt_load.load_tensorrt(
            factory, apply=apply, contexts=1, bundle=bundle, on_step=self.steps.append, device=CPU, load=two_load
        )

    @property
    def why(self) -> str:
        """Why the bundle was not used, as it was said."""
        said = [step for step in self.steps if step.startswith("the bundle is not used")]
        return said[0].partition("factory: ")[2] if said else ""


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Here:
    return Here(monkeypatch)


def serves(engine: TensorRTEngine) -> bool:
    good = []
    for staged, expected in versions(2):
        put(engine, staged)
        engine.probe()
        good.append(near(asked(engine), expected))
    return all(good)


def test_the_first_start_compiles_and_writes_and_the_next_one_reads(here: Here, tmp_path: Path) -> None:
    first = here.start(tmp_path / "b")
    assert (here.compiled, here.why) == (1, "")
    assert f"writing the bundle {tmp_path / 'b'}" in here.steps
    second = here.start(tmp_path / "b")
    assert (here.compiled, here.why) == (1, "")
    assert serves(first)
    assert serves(second)
    assert first.build == second.build


def test_without_a_bundle_nothing_is_written(here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bundle_save, "replace_folder", None)
    assert serves(here.start(None))
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_of_another_tensorrt_is_replaced_and_refused_without_the_factory(
    here: Here, own_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Platform, "here", lambda: OTHER)
    with pytest.raises(NotRefittable, match="here is tensorrt 99") as caught:
        trt_load.load_bundle(own_bundle, apply="auto", contexts=1, on_step=here.steps.append, device=CPU, load=two_load)
    assert "build one on this machine" in caught.value.next
    assert serves(here.start(own_bundle))
    assert (here.compiled, "here is tensorrt 99" in here.why) == (1, True)
    assert Bundle.open(own_bundle).misfit() is None
    here.start(own_bundle)
    assert here.compiled == 1


@pytest.mark.parametrize("name", ["bundle.msgpack", "engine-0.plan", "tensors.safetensors"])
def test_a_damaged_bundle_is_replaced(here: Here, own_bundle: Path, name: str) -> None:
    data = bytearray((own_bundle / name).read_bytes())
    data[-1] ^= 1
    (own_bundle / name).write_bytes(data)
    assert serves(here.start(own_bundle))
    assert (here.compiled, name in here.why) == (1, True)
    (own_bundle / name).unlink()
    assert serves(here.start(own_bundle))
    assert (here.compiled, "missing" in here.why) == (2, True)
    assert serves(here.start(own_bundle))
    assert here.compiled == 2


def test_a_bundle_of_another_model_is_replaced(here: Here, own_bundle: Path) -> None:
    def other() -> Recipe:
        recipe = two_recipe()
        return Recipe(recipe.module, recipe.args, recipe.kwargs, options={"min_block_size": 1})

    assert serves(here.start(own_bundle, other))
    assert (here.compiled, "compile options" in here.why) == (1, True)
    assert serves(here.start(own_bundle, other))
    assert here.compiled == 1


def test_a_bundle_whose_engine_is_wrong_is_replaced(
    here: Here, own_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A load that gives other answers, as a driver might."""
    calls = iter([True, True])

    def load(compiled: Any, name: str) -> Any:
        live = two_load(compiled, name)
        if next(calls, False):
            live._compute = lambda held, inputs: [out * 1.5 for out in two_load(compiled, name)._compute(held, inputs)]
        return live

    engine = trt_load.load_tensorrt(
        make, apply="auto", contexts=1, bundle=own_bundle, on_step=here.steps.append, device=CPU, load=load
    )
    assert (here.compiled, "fail their proof" in here.why) == (1, True)
    assert serves(engine)


def test_a_bundle_that_can_not_be_written_does_not_keep_the_engine_from_serving(
    here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_arguments: object) -> None:
        raise StoreFull("the disk has no room")

    monkeypatch.setattr(bundle_save, "replace_folder", full)
    assert serves(here.start(tmp_path / "b"))
    assert "the bundle was not written, the next start compiles again: the disk has no room" in here.steps


def test_where_no_bundle_can_be_is_said_before_anything_is_compiled(here: Here, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    for path in (tmp_path / "mine", tmp_path / "nowhere" / "b"):
        with pytest.raises(UsageError):
            here.start(path)
    assert here.compiled == 0


def test_a_bundle_without_refit_plan_serves_with_its_factory(here: Here, tmp_path: Path) -> None:
    model = built()
    model.plan, model.why_not_fast = None, "no rule for a weight"
    save(model, tmp_path / "b")
    engine = here.start(tmp_path / "b")
    assert here.compiled == 0
    assert "no rule for a weight" in engine.plan_summary
    with pytest.raises(NotRefittable, match="fast path can't be used: no rule"):
        here.start(tmp_path / "b", apply="fast")


def test_another_structure_can_follow_with_the_factory_only(here: Here, own_bundle: Path) -> None:
    (staged, _), *_ = versions(1)
    other = Manifest(staged.manifest.tensors[:-1])
    here.start(own_bundle).check(other, restructure=True)
    alone = trt_load.load_bundle(
        own_bundle, apply="auto", contexts=1, on_step=here.steps.append, device=CPU, load=two_load
    )
    with pytest.raises(NotRefittable) as caught:
        alone.check(other, restructure=True)
    assert "factory" in caught.value.next


def test_several_contexts_are_another_build(own_bundle: Path) -> None:
    builds = set()
    for contexts in (1, 2):
        engine = trt_load.load_bundle(
            own_bundle, apply="fast", contexts=contexts, on_step=lambda _: None, device=CPU, load=two_load
        )
        builds.add(engine.build)
    assert len(builds) == 2


# ---------------------------------------------------------------------- on the command line


@pytest.mark.parametrize(
    ("spec", "arguments", "words"),
    [
        ("torch:engine_cases:zoo", {"apply": "fast"}, "only TensorRT engines know --apply, and this is a torch engine"),
        ("file:x", {"contexts": 2, "bundle": "b"}, "know --contexts and --bundle, and this is a file engine"),
        ("bundle:b", {"bundle": "c"}, "a bundle already"),
        ("bundle:b", {"apply": "reference"}, "nothing to compile"),
        ("bundle:b", {"on_serving": "true"}, "for file engines: a bundle engine"),
        ("bundle:b", {"apply": "quick"}, "choose auto, fast, reference"),
        ("tensorrt:engine_cases:zoo", {"contexts": 0}, "at least one request"),
        ("bundle:", {}, "nothing follows 'bundle:'"),
        ("tensorrt:", {}, "nothing follows 'tensorrt:'"),
        ("tensorrt:module_only", {}, "a tensorrt engine is tensorrt:package.module:factory"),
        ("tensorrt:no_such_module_here:make", {}, "no module 'no_such_module_here'"),
        ("bundle:/no/such/folder", {}, "no bundle at /no/such/folder"),
    ],
)
def test_an_engine_that_can_not_be_meant_is_explained(spec: str, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        load_engine.load_engine(spec, **arguments)
    assert repr(spec) in caught.value.about
    assert caught.value.next or "choose" in caught.value.what or "at least" in caught.value.what


def test_without_a_gpu_a_tensorrt_engine_says_so_before_the_factory_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="CUDA"):
        load_engine.load_engine("tensorrt:os:abort")
