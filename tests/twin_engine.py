"""A twin of a TensorRT engine that computes with torch, and a small model around two of them with a hand-made plan.

The model has what is hard: two engines with a part executed by torch between them, a weight that the compiler folded, a
constant, a tensor that nothing reads, and an integer tensor whose effect can't be tried out.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from refleet.common.digest import digest_of, tensor_digest
from refleet.common.tensors import tensor_bytes
from refleet.worker.recipe import Recipe
from refleet.worker.refit_plan import Formula, Item, Kind, RefitPlan
from refleet.worker.resident import Resident
from refleet.worker.signature import Signature
from refleet.worker.torch_trt import Compiled
from refleet.worker.trt_model import Model, build_digest
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

CPU = torch.device("cpu")
Compute = Callable[[Mapping[str, Tensor], Sequence[Any]], list[Tensor]]


class TwinEngine:
    """Holds copies of its weights, as an engine does. Fails where it is told to.

    `rejects`: names that `set` refuses. `fail_refit`: the next `refit` puts in half of the weights and returns False.
    `needs`: weights that can only be put in together. `refits`: names put in, refit by refit.
    """

    def __init__(self, weights: Mapping[str, Tensor], compute: Compute, *, outputs: int = 1):
        self._held = {name: value.clone() for name, value in weights.items()}
        self._given: dict[str, Tensor] = {}
        self._compute = compute
        self.outputs = tuple(f"output{n}" for n in range(outputs))
        self.rejects: set[str] = set()
        self.needs: tuple[frozenset[str], ...] = ()
        self.fail_refit = False
        self.refits: list[frozenset[str]] = []
        self.on_run: Callable[[], None] = lambda: None

    @property
    def weights(self) -> frozenset[str]:
        return frozenset(self._held)

    def prototype(self, name: str) -> tuple[torch.dtype, int]:
        return self._held[name].dtype, self._held[name].numel()

    def set(self, name: str, value: Tensor) -> bool:
        held = self._held.get(name)
        if name in self.rejects or held is None or (held.dtype, held.numel()) != (value.dtype, value.numel()):
            return False
        assert value.is_contiguous()
        self._given[name] = value
        return True

    def unset(self, name: str) -> bool:
        return self._given.pop(name, None) is not None

    def missing(self) -> list[str]:
        together = [group for group in self.needs if group & self._given.keys()]
        return sorted(frozenset().union(*together) - self._given.keys())

    def refit(self) -> bool:
        names = sorted(self._given)
        self.refits.append(frozenset(names))
        failing, self.fail_refit = self.fail_refit, False
        for name in names[: len(names) // 2] if failing else names:
            self._held[name] = self._given[name].view(self._held[name].shape).clone()
        return not failing

    def run(self, inputs: Sequence[Tensor | int]) -> list[Tensor]:
        self.on_run()
        return self._compute(self._held, inputs)

    def serialize(self, *, with_weights: bool = True) -> bytes:
        if not with_weights:
            return digest_of(*(name.encode() for name in sorted(self._held)))
        return b"".join(digest_of(name.encode(), tensor_bytes(value)) for name, value in sorted(self._held.items()))

    def content(self) -> bytes:
        return self.serialize()

    def close(self) -> None:
        self._given = {}


class Two(nn.Module):
    """linear, tanh | + shift, sort (by torch) | linear with a scaled weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3)
        self.shift, self.log_scale = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(()))
        self.register_buffer("seen", torch.tensor(0))  # nothing reads it
        self.register_buffer("order", torch.tensor([2, 0, 1]))

    def forward(self, x: Tensor, *, gain: Tensor) -> dict[str, Tensor]:
        hidden = torch.tanh(self.first(x))
        hidden = torch.sort(hidden + self.shift)[0]
        y = nn.functional.linear(hidden, self.second.weight * self.log_scale.exp(), self.second.bias)
        return {"y": y[:, self.order] * gain, "sum": y.sum(-1)}


A, TORCH, B = "_run_on_acc_0", "_run_on_gpu_1", "_run_on_acc_2"
INPUTS = ((torch.linspace(-1, 1, 24).view(4, 6),), {"gain": torch.tensor([1.5])})


def two_recipe(seed: int = 0) -> Recipe:
    torch.manual_seed(seed)
    return Recipe(Two().eval(), *INPUTS)


def _torch_part(shift: Tensor) -> fx.GraphModule:
    graph = fx.Graph()
    moved = graph.call_function(torch.ops.aten.add.Tensor, (graph.placeholder("hidden"), graph.get_attr("shift")))
    both = graph.call_function(torch.ops.aten.sort.default, (moved,))
    graph.output(graph.call_function(operator.getitem, (both, 0)))
    return fx.GraphModule({"shift": nn.Parameter(shift)}, graph)


def _graph(part: fx.GraphModule) -> fx.GraphModule:
    graph = fx.Graph()
    x, gain = graph.placeholder("x"), graph.placeholder("gain")
    hidden = graph.call_module(A, (x,))
    hidden = graph.call_module(TORCH, (hidden,))
    both = graph.call_module(B, (hidden, gain))
    graph.output(tuple(graph.call_function(operator.getitem, (both, n)) for n in range(2)))
    return fx.GraphModule({A: nn.Module(), TORCH: part, B: nn.Module()}, graph)


def _formula() -> Formula:
    graph = fx.Graph()
    weight, log_scale = graph.placeholder("weight"), graph.placeholder("log_scale")
    scale = graph.call_function(torch.ops.aten.exp.default, (log_scale,))
    graph.output(graph.call_function(torch.ops.aten.mul.Tensor, (weight, scale)))
    return Formula(graph, ("second.weight", "log_scale"))


def two_plan() -> RefitPlan:
    f32 = torch.float32
    items = {
        (A, "first/weight CONSTANT"): Item(Kind.DIRECT, "first.weight", f32, (5, 6)),
        (A, "first/bias CONSTANT"): Item(Kind.DIRECT, "first.bias", f32, (5,)),
        (TORCH, "shift"): Item(Kind.DIRECT, "shift", f32, (5,)),
        (B, "second/weight CONSTANT"): Item(Kind.FOLDED, "fold", f32, (3, 5)),
        (B, "second/bias CONSTANT"): Item(Kind.DIRECT, "second.bias", f32, (3,)),
        (B, "axes CONSTANT"): Item(Kind.CONST, "axes", torch.int32, (1,)),
    }
    names = frozenset({"first.weight", "first.bias", "shift", "log_scale", "second.weight", "second.bias", "order"})
    return RefitPlan(
        items, {"fold": _formula()}, {"axes": torch.tensor([-1], dtype=torch.int32)}, names, frozenset({"seen"}),
        {"order": tensor_digest(tensor_bytes(torch.tensor([2, 0, 1])))}, {}, (A, B),
    )  # fmt: skip


def _first(held: Mapping[str, Tensor], inputs: Sequence[Any]) -> list[Tensor]:
    return [torch.tanh(nn.functional.linear(inputs[0], held["first/weight CONSTANT"], held["first/bias CONSTANT"]))]


def _second(held: Mapping[str, Tensor], inputs: Sequence[Any], *, order: Sequence[int] = (2, 0, 1)) -> list[Tensor]:
    """`order`: the module's integers when the engine was built."""
    y = nn.functional.linear(inputs[0], held["second/weight CONSTANT"], held["second/bias CONSTANT"])
    return [y[:, list(order)] * inputs[1], y.sum(int(held["axes CONSTANT"]))]


def two_load(_compiled: Compiled, name: str) -> TwinEngine:
    """An engine of the model as a bundle's plan gives it: without any weight that means anything."""
    specs = {weight: item for (part, weight), item in two_plan().items.items() if part == name}
    weights = {weight: torch.full(item.shape, 99, dtype=item.dtype) for weight, item in specs.items()}
    return TwinEngine(weights, _first if name == A else _second, outputs=1 if name == A else 2)


def two_model(recipe: Recipe, *, plan: RefitPlan | None = None, lower: Callable[[], Any] | None = None) -> Model:
    """The model as a builder leaves it: the engines hold the module's weights."""
    module = recipe.module
    assert isinstance(module, Two)
    values = {name: tensor.detach() for name, tensor in module.state_dict().items()}
    read = two_plan().values(values.__getitem__)

    def weights(part: str) -> dict[str, Tensor]:
        return {name: read((owner, name)) for owner, name in two_plan().items if owner == part}

    second = partial(_second, order=module.order.tolist())
    engines = {A: TwinEngine(weights(A), _first), B: TwinEngine(weights(B), second, outputs=2)}
    answer = pytree.tree_flatten(module(*recipe.args, **recipe.kwargs))[1]
    signature = Signature(pytree.tree_flatten((recipe.args, dict(recipe.kwargs)))[1], answer)
    resident = Resident(_graph(_torch_part(values["shift"])), engines, device=CPU)
    compiled = {name: Compiled(f"plan of {name}".encode(), ("x",), live.outputs) for name, live in engines.items()}
    return Model(
        recipe, signature, resident, compiled, two_plan() if plan is None else plan, "", lower, build_digest(compiled)
    )


def twins(model: Model) -> tuple[TwinEngine, TwinEngine]:
    one, two = model.resident.engines[A], model.resident.engines[B]
    assert isinstance(one, TwinEngine)
    assert isinstance(two, TwinEngine)
    return one, two
