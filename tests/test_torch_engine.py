"""What only a torch module brings: ties, views, modes, random state, and answers to compare."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engine_cases import ODD_F32, SPECS, Staged, Zoo, version, zoo_version
from refleet.common.errors import DigestMismatch, NotRefittable, RefitFailed, UsageError
from refleet.common.types import DTYPE_BYTES, TensorSpec
from refleet.worker.torch_engine import TorchEngine
from torch import Tensor, nn


class Tied(nn.Module):
    """A language model's head that is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))


def tied_version(**tensors: bytes) -> Staged:
    named = {name.replace("_", "."): data for name, data in tensors.items()}
    return version(named, [TensorSpec(name, "F32", (4, 3)) for name in named])


ONE, TWO = ODD_F32.tobytes() * 3, ODD_F32[::-1].tobytes() * 3


def lone(tensor: Tensor) -> nn.Module:
    module = nn.Module()
    module.register_buffer("x", tensor)
    return module


def test_one_name_of_a_tied_pair_is_enough_and_both_read_back() -> None:
    engine = TorchEngine(Tied())
    for name in ("embed_weight", "head_weight"):
        staged = tied_version(**{name: ONE if name == "embed_weight" else TWO})
        engine.check(staged.manifest)
        engine.apply(staged, staged.names)
        digest = next(iter(staged.digests.values()))
        assert dict(engine.read_back(["embed.weight", "head.weight"])) == {
            "embed.weight": digest,
            "head.weight": digest,
        }


def test_tied_names_must_agree() -> None:
    engine = TorchEngine(Tied())
    same = tied_version(embed_weight=ONE, head_weight=ONE)
    engine.apply(same, same.names)
    with pytest.raises(NotRefittable, match=r"'embed\.weight' and 'head\.weight' are one tensor"):
        engine.check(tied_version(embed_weight=ONE, head_weight=TWO).manifest)
    assert dict(engine.read_back(same.names)) == same.digests


def test_a_version_without_any_name_of_a_tied_pair_is_refused() -> None:
    with pytest.raises(NotRefittable, match=r"lacks 'embed\.weight', 'head\.weight'"):
        TorchEngine(Tied()).check(version({}, []).manifest)


def test_views_that_overlap_without_being_the_same_are_refused() -> None:
    module, whole = nn.Module(), torch.zeros(6, 4)
    module.upper, module.lower = nn.Parameter(whole[:4]), nn.Parameter(whole[3:])
    with pytest.raises(NotRefittable, match=r"'lower' and 'upper'|'upper' and 'lower'"):
        TorchEngine(module)
    crossing = nn.Module()
    crossing.column, crossing.row = nn.Parameter(whole[:, 1]), nn.Parameter(whole[2])
    with pytest.raises(NotRefittable, match="overlapping memory"):
        TorchEngine(crossing)


def test_views_side_by_side_in_one_memory_are_separate_tensors() -> None:
    module, whole = nn.Module(), torch.zeros(3, 4)
    module.left, module.right = nn.Parameter(whole[:, :2]), nn.Parameter(whole[:, 2:])
    engine = TorchEngine(module)
    half = TensorSpec("left", "F32", (3, 2)), TensorSpec("right", "F32", (3, 2))
    staged = version({"left": ONE[:24], "right": TWO[:24]}, half)
    engine.apply(staged, staged.names)
    assert dict(engine.read_back(staged.names)) == staged.digests


class Stateful(nn.Module):
    def get_extra_state(self) -> object:
        return {"step": 3}

    def set_extra_state(self, state: object) -> None:
        raise AssertionError("never loaded")


class Copying(nn.Module):
    """Its state_dict holds a tensor that is nobody's memory."""

    def get_extra_state(self) -> object:
        return torch.ones(2)

    def set_extra_state(self, state: object) -> None:
        raise AssertionError("never loaded")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Stateful, "'_extra_state' is not a tensor but dict"),
        (Copying, "'_extra_state' is a copy"),
        (lambda: nn.LazyLinear(2), "not initialized"),
        (lambda: nn.Linear(2, 2, device="meta"), "meta device"),
        (lambda: lone(torch.eye(2).to_sparse()), "sparse"),
        (lambda: lone(torch.ones(1).expand(4)), "share memory"),
        (lambda: lone(torch.ones(2, dtype=torch.complex64).conj()), "conjugated"),
        (lambda: lone(torch.ones(2, dtype=torch.complex128)), "complex128"),
        (lambda: lone(torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)), "quantized"),
    ],
    ids=["extra", "copy", "lazy", "meta", "sparse", "expanded", "conjugated", "complex128", "quantized"],
)
@pytest.mark.filterwarnings("ignore")  # torch warns about sparse, lazy and quantized tensors themselves
def test_state_that_no_version_can_carry_is_refused_when_the_engine_is_made(
    make: Callable[[], nn.Module], words: str
) -> None:
    with pytest.raises(NotRefittable) as caught:
        TorchEngine(make())
    assert words in caught.value.what
    assert caught.value.tensor


@pytest.mark.parametrize("dtype", sorted(DTYPE_BYTES))
@pytest.mark.parametrize("strided", [False, True])
def test_every_bit_of_every_dtype_arrives_in_any_layout(dtype: str, strided: bool) -> None:
    from refleet.common.tensors import torch_dtype

    tensor = torch.zeros(6, 4, dtype=torch_dtype(dtype))
    engine = TorchEngine(lone(tensor[::2].t() if strided else tensor[:4, :3].contiguous()))
    spec = TensorSpec("x", dtype, (4, 3))
    data = (bytes(range(1, 256, 2)) + ONE)[-spec.size_bytes :]
    staged = version({"x": data}, [spec])
    engine.apply(staged, staged.names)
    assert dict(engine.read_back(["x"])) == staged.digests


def test_only_changed_tensors_are_written() -> None:
    engine, staged = TorchEngine(Zoo()), zoo_version(1)
    engine.apply(staged, staged.names)
    versions = {name: t._version for name, t in engine.module.state_dict(keep_vars=True).items()}
    engine.apply(staged, frozenset({"wide"}))
    after = {name: t._version for name, t in engine.module.state_dict(keep_vars=True).items()}
    assert {name for name in SPECS if after[name] != versions[name]} == {"wide"}


def test_a_module_made_in_inference_mode_is_updated_too() -> None:
    with torch.inference_mode():
        module = nn.Linear(3, 4, bias=False)
    staged = version({"weight": ONE}, [TensorSpec("weight", "F32", (4, 3))])
    engine = TorchEngine(module)
    engine.apply(staged, staged.names)
    assert dict(engine.read_back(staged.names)) == staged.digests


def test_a_tensor_that_its_owner_replaced_is_the_one_that_is_updated() -> None:
    module = nn.Linear(3, 4, bias=False)
    engine = TorchEngine(module)
    module.weight = nn.Parameter(torch.zeros(4, 3))
    staged = version({"weight": ONE}, [TensorSpec("weight", "F32", (4, 3))])
    engine.apply(staged, staged.names)
    assert module.weight.detach().numpy().tobytes() == ONE


def test_tensors_that_come_to_overlap_later_are_refused_before_a_write() -> None:
    module, whole = nn.Module(), torch.zeros(6, 4)
    module.upper, module.lower = nn.Parameter(torch.zeros(4, 4)), nn.Parameter(torch.zeros(3, 4))
    engine = TorchEngine(module)
    module.upper, module.lower = nn.Parameter(whole[:4]), nn.Parameter(whole[3:])
    with pytest.raises(NotRefittable, match="overlapping memory"):
        engine.check(version({}, []).manifest)


def test_a_compiled_module_keeps_the_names_of_the_module_inside() -> None:
    module = nn.Linear(3, 4, bias=False)
    engine = TorchEngine(torch.compile(module, backend="eager"))
    staged = version({"weight": ONE}, [TensorSpec("weight", "F32", (4, 3))])
    engine.apply(staged, staged.names)
    assert module.weight.detach().numpy().tobytes() == ONE


@pytest.mark.parametrize("made", [None, 3, (nn.Identity(),), {"module": nn.Identity()}])
def test_a_factory_must_return_a_module(made: object) -> None:
    with pytest.raises(UsageError, match="factory returned a"):
        TorchEngine(lambda: made)  # type: ignore[arg-type,return-value]


def test_the_build_tells_apart_what_may_change_an_output_bit() -> None:
    def build(module: nn.Module, inputs: object = (1,)) -> str:
        return TorchEngine(module, probe_inputs=inputs).build

    usual = build(nn.Linear(2, 2))
    assert usual == build(nn.Linear(2, 2))  # the weights themselves are no part of it
    assert f"torch {torch.__version__}" in usual
    assert "Linear" in usual
    others = [
        build(nn.Linear(2, 3)), build(nn.Linear(2, 2, dtype=torch.float64)), build(nn.Linear(2, 2).eval()),
        build(nn.Linear(2, 2), (2,)), build(nn.LayerNorm(2)), build(nn.LayerNorm(2, eps=1e-3)),
    ]  # fmt: skip
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        others.append(build(nn.Linear(2, 2)))
    finally:
        torch.set_num_threads(threads)
    assert len({usual, *others}) == 1 + len(others)


MODEL_WITH_A_FUNCTION = """
import torch
class Mine(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.activation = lambda x: x
    def extra_repr(self):
        return repr(self.activation)
"""


def test_the_build_changes_with_the_code_and_the_rounding_but_not_with_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "a_model_of_my_own.py"
    file.write_text(MODEL_WITH_A_FUNCTION)
    module, other = (importlib.import_module("a_model_of_my_own").Mine() for _ in range(2))
    assert repr(module) != repr(other)  # it shows an address in memory
    usual = TorchEngine(module).build
    assert TorchEngine(other).build == usual
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", not torch.backends.cudnn.benchmark)
    assert TorchEngine(module).build != usual
    monkeypatch.undo()
    file.write_text(file.read_text() + "# forward was wrong\n")
    assert TorchEngine(module).build != usual


def test_an_error_of_torch_while_writing_is_a_failed_refit() -> None:
    engine, staged = TorchEngine(Zoo()), zoo_version(1)
    staged.broken = {"mask": RuntimeError("CUDA error: out of memory")}
    with pytest.raises(RefitFailed, match="'mask' failed: RuntimeError: CUDA error"):
        engine.apply(staged, staged.names)


def test_a_tensor_that_left_the_module_is_named_when_read_back() -> None:
    module = nn.Linear(2, 2)
    engine = TorchEngine(module)
    del module.bias
    with pytest.raises(DigestMismatch) as caught:
        list(engine.read_back(["weight", "bias"]))
    assert caught.value.tensor == "bias"
