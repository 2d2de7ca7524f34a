"""The doctor's self-test over its really lowered model, with a twin of the engine that only a GPU can build."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from refleet.worker.lowering import Lowering
from refleet.worker.recipe import Recipe
from refleet.worker.self_test import on_device
from refleet.worker.torch_trt import Compiled
from torch import Tensor
from torch.nn import functional
from twin_engine import CPU, TwinEngine


def compute(held: Mapping[str, Tensor], inputs: Sequence[Any]) -> list[Tensor]:
    """The tiny model as the engine's layers compute it: newer versions fold the BatchNorm into a scale layer."""

    def weight(suffix: str, *shape: int) -> Tensor:
        (found,) = (value for name, value in held.items() if name.endswith(suffix))
        return found.reshape(shape)

    hidden = functional.conv2d(inputs[0], weight(" KERNEL", 8, 3, 3, 3), weight(" BIAS", 8))
    if any(name.endswith(" SCALE") for name in held):
        hidden = hidden * weight(" SCALE", 8, 1, 1) + weight(" SHIFT", 8, 1, 1)
    else:
        parts = [weight(f"training_{name} CONSTANT", 8) for name in ("running_mean", "running_var", "weight", "bias")]
        hidden = functional.batch_norm(hidden, *parts, eps=float(weight("_eps CONSTANT")))
    hidden = hidden.relu().mean((2, 3))
    return [functional.linear(hidden, weight("linear_weight CONSTANT", 5, 8), weight("linear_bias CONSTANT", 5))]


def test_the_tiny_model_is_on_the_fast_path() -> None:
    twins: dict[str, TwinEngine] = {}

    def build(recipe: Recipe) -> dict[str, Compiled]:
        weights = Lowering(recipe).network().weights
        twins.update({part: TwinEngine(found, compute) for part, found in weights.items()})
        return {part: Compiled(twin.serialize(), ("x",), twin.outputs) for part, twin in twins.items()}

    trial = on_device(CPU, build=build, load=lambda _compiled, name: twins[name])
    assert (trial.problem, trial.fast) == ("", True), trial
    assert [what for what, _ in trial.seconds][:3] == ["compile", "plan and its proof", "first refit"]
    assert len(twins) == 1, "one engine holds all of it"
