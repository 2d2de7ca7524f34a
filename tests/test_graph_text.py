"""A graph that was stored comes back the same and computes the same bits; what can't be stored is refused by name."""

from __future__ import annotations

import json
import math
import operator
import os
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import msgpack
import pytest
import torch
from graph_models import MODELS, exported, randn
from refleet.common.errors import NotRefittable
from refleet.worker import graph_text
from refleet.worker.graph_text import bound, from_data, graph_digest, to_data
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

#: torch.export's own
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
ATEN = torch.ops.aten


def loaded(module: fx.GraphModule, data: object = None) -> fx.GraphModule:
    graph = from_data(data or to_data(module.graph))
    return bound(graph, values={t: operator.attrgetter(t)(module) for t in targets(graph, "get_attr")})


def targets(graph: fx.Graph, op: str) -> list[Any]:
    return [node.target for node in graph.nodes if node.op == op]


def exact(found: Any) -> object:
    """Compares equal only for equal bits and types."""
    if isinstance(found, Tensor):
        return found.dtype, tuple(found.shape), found.stride(), found.detach().contiguous().numpy().tobytes()
    if isinstance(found, float):
        return "float", struct.pack(">d", found)
    if isinstance(found, complex):
        return "complex", exact(found.real), exact(found.imag)
    if isinstance(found, slice):
        return "slice", exact(found.start), exact(found.stop), exact(found.step)
    if isinstance(found, dict):
        return "dict", [(key, exact(value)) for key, value in found.items()]
    if isinstance(found, list | tuple):
        return "tuple" if isinstance(found, tuple) else "list", [exact(item) for item in found]
    return ("node", found.name) if isinstance(found, fx.Node) else (type(found), found)


def listed(graph: fx.Graph) -> list[object]:
    return [(n.op, n.name, n.target, exact(n.args), {k: exact(v) for k, v in n.kwargs.items()}) for n in graph.nodes]


@pytest.mark.parametrize("carry", ["msgpack", "json"])
@pytest.mark.parametrize("name", MODELS)
def test_a_loaded_graph_computes_the_same_bits(name: str, carry: str) -> None:
    module, (_, args, kwargs, _) = exported(name), MODELS[name]
    plain = to_data(module.graph)
    data = (
        msgpack.unpackb(msgpack.packb(plain)) if carry == "msgpack" else json.loads(json.dumps(plain, allow_nan=False))
    )
    assert data == plain
    graph = from_data(data)
    graph.lint()
    assert listed(graph) == listed(module.graph)
    assert to_data(graph) == data and graph_digest(graph) == graph_digest(module.graph)

    again, inputs = loaded(module, data), pytree.tree_leaves((args, kwargs))
    wanted = exact(pytree.tree_leaves(module(*args, **kwargs)))
    assert exact(pytree.tree_leaves(again(*inputs))) == wanted
    assert exact(pytree.tree_leaves(fx.Interpreter(again).run(*inputs))) == wanted


def test_the_models_have_what_they_are_here_for() -> None:
    calls = {target for name in MODELS for target in targets(exported(name).graph, "call_function")}
    assert {torch.sym_float, torch.sym_max, operator.floordiv, operator.getitem, ATEN.sym_size.int} <= calls
    assert {ATEN.native_layer_norm.default, ATEN.convolution.default, ATEN.embedding.default, ATEN.cat.default} <= calls
    index = exported("taken").graph.find_nodes(op="call_function", target=ATEN.index.Tensor)[0]
    assert index.args[1][0] is None


def test_a_dynamic_batch_stays_dynamic() -> None:
    module = exported("dynamic")
    for size in (2, 9, 33):
        assert exact(list(loaded(module)(randn(size, 4)))) == exact(list(module(randn(size, 4))))


class Named(nn.Module):
    def forward(self, input: Tensor, mask: Tensor) -> Tensor:  # noqa: A002
        return input - mask * 2


def test_names_that_only_torch_export_gives_are_kept() -> None:
    """It names an input `input` in its own graph, and fx.Graph would name it `input_1`."""
    program = torch.export.export(Named(), (torch.ones(2), torch.ones(2))).run_decompositions()
    graph = from_data(to_data(program.graph))
    assert [node.name for node in graph.nodes][:2] == ["input", "mask"]
    assert bound(graph, values={})(torch.ones(2), torch.zeros(2))[0].tolist() == [1, 1]


def graph_of(*args: object, target: Any = ATEN.add.Tensor) -> fx.Graph:
    """One call, with the graph's input for each "$x"."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    given: Any = tuple(x if isinstance(arg, str) and arg == "$x" else arg for arg in args)
    graph.output(graph.create_node("call_function", target, given, name="made"))
    return graph


def argument(graph: fx.Graph) -> Any:
    return next(node for node in graph.nodes if node.op == "call_function").args[-1]


NANS = struct.unpack(">2d", bytes.fromhex("fff80000000001237ff0000000000001"))
ARGUMENTS = [
    None, True, False, 0, 1, -1, (1 << 63) - 1, -(1 << 63), (1 << 64) - 1, 0.0, -0.0, 1.5, 0.1, 1e308, 5e-324, *NANS,
    math.inf, -math.inf, math.nan, complex(1, -0.0), complex(math.nan, -math.inf), complex(-0.0, 0.1), "", "floor",
    "ab,bc->ac", 'it\'s "so"\n\\', "größer", "float", "node", torch.float32, torch.bfloat16, torch.float8_e4m3fn,
    torch.strided, torch.sparse_coo, torch.channels_last, torch.device("cpu"), torch.device("cuda:3"),
    torch.device("cuda"), [], (), {}, [[]], ((),), [1, (2, [3.0])], ("list", "node"), ["node", "x"], ["float", 1],
    {"node": [1], "a b": ()},
]  # fmt: skip


@pytest.mark.parametrize("value", ARGUMENTS, ids=repr)
def test_an_argument_comes_back_exactly(value: Any) -> None:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y", default_value=value)
    held = ([value, (value, y)], slice(x, value, None), {"k": value, "other": [x]})
    graph.output(graph.call_function(ATEN.add.Tensor, held, {"key": value, "alpha": y}))
    carried = msgpack.unpackb(msgpack.packb(json.loads(json.dumps(to_data(graph), allow_nan=False))))
    assert listed(from_data(carried)) == listed(graph)


def test_every_constant_of_torch_and_every_function_comes_back() -> None:
    for constants in graph_text._CONSTANTS.values():
        for value in constants.values():
            assert argument(from_data(to_data(graph_of("$x", value)))) == value
    for function, count in graph_text._PYTHON.values():
        assert targets(from_data(to_data(graph_of(*["$x"] * count, target=function))), "call_function") == [function]


def test_custom_operators_and_engines_in_a_glue_graph() -> None:
    twice = torch.library.custom_op(
        "refleet_test::twice", lambda x: x * 2, mutates_args=(), schema="(Tensor x) -> Tensor"
    )
    graph = fx.Graph()
    part = graph.create_node("call_module", "engines.0", (graph.placeholder("x"),), {"inplace": False}, "part")
    graph.output((graph.call_function(torch.ops.refleet_test.twice.default, (part,)),))
    engine = torch.nn.Module()
    engine.forward = lambda x, inplace: x + 1  # type: ignore[method-assign]
    again = bound(from_data(to_data(graph)), values={"engines.0": engine})
    assert twice and again(torch.tensor([2]))[0].tolist() == [6]


def test_cuda_devices_follow_the_one_given() -> None:
    data = to_data(graph_of([torch.device("cuda:3"), torch.device("cuda"), torch.device("cpu")]))
    for device in (torch.device("cuda:1"), torch.device("cpu"), torch.device("meta")):
        assert argument(from_data(data, device=device)) == [device, device, torch.device("cpu")]


class Pair(NamedTuple):
    a: int


DEEP: list[Any] = [[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]], [[[[[[[[[[[[[[[{"k": 1}]]]]]]]]]]]]]]]]
REFUSED = [torch.ones(1), range(3), ..., Pair(1), fx.Graph().placeholder("x"), ATEN.add.Tensor, b"x", {1: 2}, DEEP[:1],
           DEEP[1:], 1 << 64, -(1 << 63) - 1, "x" * 513, "\udc80", torch.device("fpga")]  # fmt: skip


@pytest.mark.parametrize("value", REFUSED, ids=lambda value: type(value).__name__)
def test_an_argument_that_can_not_be_stored_is_refused(value: object) -> None:
    by_size = type(value) in (int, str, torch.device)
    with pytest.raises(NotRefittable, match="the graph" if by_size else "node 'made': a .* can't be stored"):
        to_data(graph_of("$x", value))


@pytest.mark.parametrize("target", [
    os.system, eval, getattr, operator.setitem, torch.add, ATEN.__and__.Tensor,
    torch.load, torch.ops.higher_order.cond, ATEN.add, ATEN.save.default, ATEN.from_file.default, ATEN._print.default,
    getattr(ATEN.random, "from"), torch.ops.profiler._record_function_exit._RecordFunction,
    nn.functional.linear, lambda x: x,
], ids=lambda target: getattr(target, "__name__", "packet"))  # fmt: skip
def test_a_call_of_anything_else_is_refused(target: Callable[..., Any]) -> None:
    with pytest.raises(NotRefittable, match=r"the graph (calls|needs) "):
        to_data(graph_of("$x", target=target))


def test_a_refusal_names_node_type_and_callee() -> None:
    with pytest.raises(NotRefittable, match=r"node 'made': a torch\.Tensor can't be stored\n  next: leave"):
        to_data(graph_of("$x", torch.ones(1)))
    with pytest.raises(NotRefittable, match="the graph calls system, which can't be stored\n  next: leave"):
        to_data(graph_of("x", target=os.system))
    graph = fx.Graph()
    graph.output(graph.call_method("numpy", (graph.placeholder("x"),)))
    with pytest.raises(NotRefittable, match="the graph calls numpy, which"):
        to_data(graph)


class Clash(nn.Module):
    def forward(self, input: Tensor, input_1: Tensor) -> Tensor:  # noqa: A002
        return input - input_1


class Hides(nn.Module):
    def forward(self, x: Tensor, device: Tensor) -> Tensor:
        return x + device + torch.ones(2)


@pytest.mark.parametrize("lifted", [True, False])
@pytest.mark.parametrize("model", [Clash(), Hides()], ids=repr)
def test_inputs_whose_names_torch_would_mix_up_are_refused(model: nn.Module, lifted: bool) -> None:
    """torch's own module of `Clash` gives input - input: its code has `input_1 = input` before it reads `input_1`."""
    program = torch.export.export(model, (torch.ones(2), torch.ones(2))).run_decompositions()
    with pytest.raises(NotRefittable, match="would stand for something else"):
        to_data((program if lifted else program.module(check_guards=False)).graph)


def small(*, alpha: float = 2.0, op: Any = ATEN.add.Tensor, swap: bool = False, name: str | None = None) -> fx.Graph:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    made = graph.create_node("call_function", op, (y, x) if swap else (x, y), {"alpha": alpha}, name)
    graph.output((made, [1]))
    return graph


def test_the_digest_is_of_nodes_and_arguments_not_of_metas() -> None:
    marked, reordered, moved, retyped = small(), small(), small(), small()
    for node in marked.nodes:
        node.meta["val"], node.type = object(), Tensor
    assert graph_digest(marked) == graph_digest(small()) and len(graph_digest(marked)) == 32
    call = reordered.find_nodes(op="call_function", target=ATEN.add.Tensor)[0]
    call.kwargs = {"out": None, "alpha": 2.0}
    first = graph_digest(reordered)
    call.kwargs = {"alpha": 2.0, "out": None}
    assert graph_digest(reordered) == first
    x, y, *_ = moved.nodes
    y.append(x)
    retyped.output_node().args = (list(retyped.output_node().args[0]),)  # type: ignore[arg-type]
    others = [small(alpha=-2.0), small(alpha=2), small(op=ATEN.sub.Tensor), small(swap=True), small(name="z"), moved]
    assert len({graph_digest(graph) for graph in [small(), *others, retyped, reordered]}) == 9


def test_the_encoding_is_pinned() -> None:
    """Stored bundles hold these bytes: a change needs another FORMAT."""
    graph = fx.Graph()
    moved = graph.call_function(ATEN.mul.Tensor, (graph.placeholder("x"), -0.5))
    wide = graph.call_function(ATEN.sum.dim_IntList, (moved, [0, 1]), {"keepdim": True, "dtype": torch.float64})
    graph.output((wide,))
    assert to_data(graph) == ["refleet graph", 1, [
        ["placeholder", "x", "x"],
        ["call_function", "mul_tensor", "aten.mul.Tensor", [["node", "x"], ["float", "bfe0000000000000"]], {}],
        ["call_function", "sum_dim_int_list", "aten.sum.dim_IntList", [["node", "mul_tensor"], ["list", 0, 1]],
         {"dtype": ["dtype", "float64"], "keepdim": True}],
        ["output", "output", ["tuple", ["node", "sum_dim_int_list"]]],
    ]]  # fmt: skip
    assert graph_digest(graph).hex() == "522da40eca6c5d114c7d8deead264a573875b805f0e18a30ef8279ad29808376"
