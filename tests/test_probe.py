"""A probe: fixed inputs, every bit of the answer, and nothing changed by asking."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch
from engine_cases import ZOO_INPUTS, Zoo, zoo
from refleet.common.errors import ProbeMismatch, UsageError
from refleet.worker.torch_engine import TorchEngine
from torch import Tensor, nn


class Noisy(nn.Module):
    """Draws random numbers, switches its own mode and keeps statistics, as modules in training do."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.drop = nn.Dropout(0.5)
        self.seen: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(self.training)
        answer = self.drop(self.norm(x)) + torch.rand(3)
        x.zero_()
        self.eval()
        return answer


@pytest.mark.parametrize("training", [True, False])
def test_a_probe_leaves_mode_random_state_inputs_and_buffers_alone(training: bool) -> None:
    inputs = torch.arange(12.0).reshape(4, 3)
    module = Noisy().train(training)
    engine = TorchEngine(module, probe_inputs=(inputs,))
    held = dict(engine.read_back(module.state_dict()))
    torch.manual_seed(7)
    wanted = torch.rand(4)
    torch.manual_seed(7)
    first = engine.probe()
    assert torch.equal(torch.rand(4), wanted)
    assert engine.probe() == first  # from another random state
    assert [part.training for part in module.modules()] == [training] * 3
    assert module.seen == [training] * 2
    assert dict(engine.read_back(module.state_dict())) == held
    assert inputs.sum() == 66.0


def test_a_probe_builds_no_graph_and_leaves_no_inference_tensors_behind() -> None:
    class Caching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            self.last = x * nn.Parameter(torch.ones(2))
            return self.last

    module = Caching()
    TorchEngine(module, probe_inputs=(torch.ones(2),)).probe()
    assert not module.last.requires_grad
    assert not module.last.is_inference()


class Answer(nn.Module):
    def __init__(self, answer: object) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, *args: object, **kwargs: object) -> object:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def answer(value: object) -> bytes:
    digest = TorchEngine(Answer(value), probe_inputs=()).probe()
    assert digest is not None
    return digest


@dataclass
class Output:
    logits: Tensor
    loss: float | None = None


def test_answers_that_differ_in_any_way_have_different_digests() -> None:
    x = torch.tensor([[1.0, -0.0]])
    answers = [
        x, x.abs(), x.t(), x.double(), x.view(torch.int32), x[:, :1], (x,), [x], (x, x), ((x,), x), ((x, x),),
        (x, (x,)), {"a": x}, {"b": x}, {1: x}, {"1": x}, {"a": [x, {"c": None}]}, {"a": [x, {"c": False}]}, {}, (),
        None, 0, 0.0, -0.0, True, "1", 1, b"1", Output(x), Output(x, 1.0), torch.zeros(0, 2), torch.zeros(2, 0),
        torch.tensor(1.0), torch.zeros(2, dtype=torch.complex64), torch.zeros(2, dtype=torch.complex128),
        torch.zeros(2, dtype=torch.bool),
    ]  # fmt: skip
    assert len({answer(value) for value in answers}) == len(answers)


def test_equal_answers_have_equal_digests_whatever_their_layout_or_key_order() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    assert answer(x) == answer(x.t().contiguous().t()) == answer(nn.Parameter(x))
    assert answer({"a": 1, "b": x}) == answer(OrderedDict([("b", x), ("a", 1)]))
    assert answer(torch.tensor([1 - 2j]).conj()) == answer(torch.tensor([1 + 2j]))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (RuntimeError("no such head"), "RuntimeError.*no such head"),
        (object(), "a object"),
        ([{1}], r"output\[0\] is a set"),
    ],
)
def test_a_module_that_fails_or_answers_with_something_else_is_a_probe_mismatch(value: object, words: str) -> None:
    with pytest.raises(ProbeMismatch, match=words):
        answer(value)


def test_a_probe_that_changes_the_shape_of_the_modules_own_state_is_a_mismatch() -> None:
    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("log", torch.zeros(1))

        def forward(self) -> None:
            self.log = torch.zeros(2)

    with pytest.raises(ProbeMismatch, match="'log'"):
        TorchEngine(Growing(), probe_inputs=()).probe()


@pytest.mark.parametrize(
    "inputs", [torch.ones(2), [torch.ones(2)], (object(),), (torch.ones(2, requires_grad=True) * 2,)]
)
def test_probe_inputs_that_can_not_be_meant_are_refused(inputs: object) -> None:
    with pytest.raises(UsageError, match="probe inputs"):
        TorchEngine(nn.Identity(), probe_inputs=inputs)


def test_without_probe_inputs_there_is_no_probe() -> None:
    assert TorchEngine(Zoo()).probe() is None
    module, inputs = zoo()
    answers = {TorchEngine(lambda: (module, inputs)).probe(), TorchEngine(module, probe_inputs=ZOO_INPUTS).probe()}
    assert len(answers) == 1
    assert None not in answers
