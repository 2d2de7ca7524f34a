"""The doctor's self-test over its really lowered model, with twins in place of engines that only a GPU can build."""

from __future__ import annotations

from lowered_twins import twin_engines
from refleet.worker.recipe import Recipe
from refleet.worker.self_test import on_device
from refleet.worker.torch_trt import Compiled
from twin_engine import CPU, TwinEngine


def test_the_tiny_model_is_on_the_fast_path() -> None:
    twins: dict[str, TwinEngine] = {}

    def build(recipe: Recipe) -> dict[str, Compiled]:
        compiled, engines = twin_engines(recipe)
        twins.update(engines)
        return compiled

    trial = on_device(CPU, build=build, load=lambda _compiled, name: twins[name])
    assert (trial.problem, trial.fast) == ("", True), trial
    assert [what for what, _ in trial.seconds][:3] == ["compile", "plan and its proof", "first refit"]
    assert len(twins) == 1, "one engine holds all of it"
