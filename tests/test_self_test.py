"""The doctor's self-test, on twins that compute with torch: it passes where all is well, and sees what is not."""

from __future__ import annotations

import pytest
import torch
from refleet.common.errors import RefitFailed
from refleet.common.tensors import tensor_from
from refleet.worker.machine import Trial
from refleet.worker.self_test import Example, Tiny, example, self_test
from refleet.worker.tensorrt_engine import TensorRTEngine
from twin_engine import CPU, INPUTS, Two, twins, two_model, two_recipe


def example_of(seed: int) -> Example:
    torch.manual_seed(seed)
    return example(Two().eval(), *INPUTS, name=f"v{seed}", seq=seed)


def made() -> TensorRTEngine:
    return TensorRTEngine(two_model(two_recipe(seed=9)), device=CPU)


def tried(engine: TensorRTEngine, one: Example | None = None, two: Example | None = None) -> Trial:
    return self_test(engine, *INPUTS, one or example_of(1), two or example_of(2))


def test_it_passes_on_an_engine_that_follows() -> None:
    found = tried(made())
    assert (found.problem, found.fast, len(found.applied)) == ("", True, 3)
    assert [what for what, _ in found.seconds] == ["first refit", "second refit", "third refit"]


def test_it_sees_an_answer_that_is_not_pytorch() -> None:
    """The engine's own probe follows the engine's tensors; this compares with the version itself."""
    wrong = Example(example_of(2).staged, example_of(3).answer)
    found = tried(made(), two=wrong)
    assert "away from PyTorch" in found.problem
    assert len(found.applied) == 2


def test_it_sees_a_refit_that_fails_and_one_without_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = made()
    twins(engine.model)[0].fail_refit = True
    assert tried(engine).problem
    one = example_of(1)
    assert "no effect" in tried(made(), one, one).problem

    def refuses(*_: object) -> None:
        raise RefitFailed("no memory today", next="buy some")

    engine = made()
    monkeypatch.setattr(engine, "apply", refuses)
    found = tried(engine)
    assert (found.problem, found.next, found.fast) == ("no memory today", "buy some", False)
    monkeypatch.setattr(engine, "apply", lambda *_: [].pop())
    assert "IndexError" in tried(engine).problem


def test_it_sees_bits_that_do_not_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, count = made(), iter(range(1, 100))
    ask = engine.model.answer

    def drifts(*inputs: object) -> object:
        answer = ask(*inputs)  # type: ignore[arg-type]
        return {key: value * (1 + 1e-6 * next(count)) for key, value in answer.items()}

    monkeypatch.setattr(type(engine.model), "answer", lambda _self, *inputs: drifts(*inputs))
    assert "bit for bit" in tried(engine).problem


@pytest.mark.parametrize(
    ("digests", "said"),
    [
        ([b"a", b"b", b"c"], "content digest is another"),
        ([b"a", b"a", b"a"], "does not tell"),
        ([None, None, None], "does not tell"),
    ],
)
def test_it_sees_contents_that_do_not_come_back(
    digests: list[bytes | None], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, left = made(), iter(digests)
    monkeypatch.setattr(engine, "content_digest", lambda: next(left))
    assert said in tried(engine).problem


def test_it_sees_a_tensor_with_other_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = made()
    monkeypatch.setattr(engine, "read_back", lambda names: ((name, b"\0" * 32) for name in names))
    assert "read back" in tried(engine).problem


class Slow(TensorRTEngine):
    """Says that it never took the fast path."""

    @property
    def applied(self) -> str:
        return "reference: asked for"

    @applied.setter
    def applied(self, _how: str) -> None:
        pass


def test_the_way_that_was_taken_is_told() -> None:
    found = tried(Slow(two_model(two_recipe(seed=9)), device=CPU))
    assert (found.problem, found.fast, found.applied) == ("", False, ("reference: asked for",) * 3)


def test_the_tiny_model_tells_another_eps_apart_from_its_own() -> None:
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    module = Tiny(1).eval()
    made = example(module, (x,), {}, name="v", seq=1)
    for name, entry in made.staged.manifest.by_name.items():
        assert torch.equal(tensor_from(made.staged.read(name), entry.spec), module.state_dict()[name])
    module.norm.eps = 1e-5
    with torch.no_grad():
        off = (module(x) - made.answer).norm() / made.answer.norm()
    assert off > 0.04, "more than what float32 is tolerated"
    assert not torch.equal(made.answer, example(Tiny(2).eval(), (x,), {}, name="w", seq=2).answer)
