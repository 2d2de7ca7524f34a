"""A bundle of another model than the factory makes does not fit, and says how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bundle_twin import loaded
from refleet.common.errors import NotRefittable
from refleet.worker.bundle import Bundle
from refleet.worker.bundle_fit import options_text
from refleet.worker.recipe import Recipe
from torch import nn
from twin_engine import CPU, INPUTS, Two, two_load, two_recipe


class Renamed(Two):
    def __init__(self) -> None:
        super().__init__()
        self.moved = self.shift
        del self.shift
        self.moved.requires_grad_(False)


class Wider(Two):
    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(5, 4)


class More(Two):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("more", torch.ones(1))


class Tied(Two):
    def __init__(self) -> None:
        super().__init__()
        self.first.bias = self.shift


class OtherCode(Two):
    def forward(self, x: torch.Tensor, *, gain: torch.Tensor) -> dict[str, torch.Tensor]:
        answer = super().forward(x, gain=gain)
        return {name: value + 0.5 for name, value in answer.items()}


OtherCode.__name__ = "Two"  # a module prints the name of its class


class OtherLayers(Two):
    def extra_repr(self) -> str:
        return "eps=0.001"


def recipe_of(kind: type[nn.Module], args: Any = INPUTS[0], kwargs: Any = INPUTS[1], **more: Any) -> Recipe:
    torch.manual_seed(0)
    return Recipe(kind().eval(), args, kwargs, **more)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (lambda: recipe_of(Renamed), "'moved', which the bundle lacks"),
        (lambda: recipe_of(Wider), r"second.weight F32\[4, 5\], the bundle's second.weight F32\[3, 5\]"),
        (lambda: recipe_of(More), "'more', which the bundle lacks"),
        (lambda: recipe_of(Tied), "ties 'shift' to first.bias, the bundle to nothing"),
        (lambda: Recipe(two_recipe().module.half(), *INPUTS), "F16"),
        (lambda: recipe_of(Two, kwargs={"gain": torch.ones(1), "more": torch.ones(1)}), "other probe inputs"),
        (
            lambda: recipe_of(Two, args=(torch.ones(2, 6),)),
            r"input 0 is F32\[2, 6\], the bundle's is F32\[4, 6\]",
        ),
        (lambda: recipe_of(Two, kwargs={"gain": torch.ones(1).half()}), r"probe input 1 is F16\[1\]"),
        (lambda: recipe_of(Two, options={"min_block_size": 1}), "compile options"),
        (lambda: recipe_of(OtherLayers), "layers"),
        (lambda: recipe_of(OtherCode), "fail their proof with this factory"),
    ],
)
def test_a_bundle_of_another_model_does_not_fit_the_factory(saved_bundle: Path, recipe: Any, words: str) -> None:
    lives: list[Any] = []

    def load(compiled: Any, name: str) -> Any:
        lives.append(two_load(compiled, name))
        lives[-1].close = lambda: lives.remove(lives[0])
        return lives[-1]

    with pytest.raises(NotRefittable, match=words):
        Bundle.open(saved_bundle).model(device=CPU, load=load, recipe=recipe())
    assert lives == [], "engines that are not used are freed"


def test_compile_options_have_one_text_in_every_process() -> None:
    one = options_text({"torch_executed_ops": {"b", "a", "c"}, "min_block_size": 1})
    assert one == options_text({"min_block_size": 1, "torch_executed_ops": {"c", "b", "a"}})
    assert one != options_text({"min_block_size": 2, "torch_executed_ops": {"c", "b", "a"}})


def test_the_probe_inputs_of_all_workers_are_those_of_the_bundle(saved_bundle: Path) -> None:
    other = recipe_of(Two, args=(torch.ones(4, 6),))
    engines = [loaded(saved_bundle), loaded(saved_bundle, recipe=other)]
    assert len({engine.build for engine in engines}) == 1
