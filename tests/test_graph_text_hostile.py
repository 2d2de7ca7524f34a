"""No data makes a graph that is more than a graph: it is refused, or torch.fx can write harmless code for it."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refleet.common.errors import MalformedRecord, NotRefittable
from refleet.worker.graph_text import bound, from_data, to_data
from torch import fx, nn

VALID: list[Any] = ["refleet graph", 1, [
    ["placeholder", "x", "x"],
    ["placeholder", "y", "y", ["float", "3ff0000000000000"]],
    ["get_attr", "weight", "parts.0.weight"],
    ["call_module", "part", "engines.e-1", [["node", "x"]], {"alpha": 2}],
    ["call_function", "add", "aten.add.Tensor", [["node", "part"], ["node", "weight"]], {"alpha": 2}],
    ["call_function", "half", "operator.floordiv", [["node", "y"], 2], {}],
    ["call_function", "full", "aten.full.default", [["list", 2, ["node", "half"]], ["complex", ["float", "0" * 16],
     ["float", "8" + "0" * 15]]], {"device": ["device", "cuda:0"], "dtype": ["dtype", "float32"]}],
    ["call_function", "taken", "operator.getitem", [["node", "full"], ["tuple", ["slice", None, 1, None], None]], {}],
    ["output", "output", ["tuple", ["node", "add"], {"taken": ["node", "taken"], "odd": [
     "list", ["memory_format", "contiguous_format"], ["layout", "strided"], True, "text"]}]],
]]  # fmt: skip


def at(*path: Any, put: object) -> Any:
    data = copy.deepcopy(VALID)
    inner(path[:-1], data)[path[-1]] = put
    return data


def inner(path: tuple[Any, ...], data: Any = VALID) -> Any:
    for step in path:
        data = data[step]
    return data


def node(*parts: object, where: int = 4) -> Any:
    return ["refleet graph", 1, [*VALID[2][:where], list(parts), *VALID[2][where:]]]


def calling(target: object, *args: object, **kwargs: object) -> Any:
    return node("call_function", "extra", target, list(args), kwargs)


def taking(value: object) -> Any:
    return calling("aten.neg.default", value)


def given_as(target: object, *default: object) -> Any:
    return node("placeholder", "extra", target, *default)


def tensors_for(graph: fx.Graph) -> dict[str, Any]:
    kinds = {"get_attr": lambda: torch.ones(1), "call_module": nn.Identity}
    return {str(node.target): kinds[node.op]() for node in graph.nodes if node.op in kinds}


CYCLE: list[object] = ["list"]
CYCLE.extend([CYCLE] * 50)
LONG = "x" * 513
SPACES = ["a b", "a=1", "x\n", "x);import os", 'x"', "x'", "x\\", "größe", "\uff58", "\udc80", LONG, "", 7, None, ["x"]]
NOT_NAMES = [*SPACES, "1x", "a.b", "class", "__class__", "__x"]
NOT_DOTTED = [*SPACES, ".", "a.", ".a", "a..b", "__class__", "a.__dict__", "a.__globals__.b", "a.class", "if", "if.a"]
NOT_CALLED = [
    *SPACES, "os.system", "eval", "builtins.eval", "torch.load", "operator.attrgetter", "operator.setitem", "math.pow",
    "aten.__init__.x", "aten.add.__class__", "__class__.a.b", "aten.add", "aten.add.Tensor.x", "aten..x", "a.b.c/d",
    "aten.random.from", "aten.from_file.default", "aten._print.default", "higher_order.cond", "aten.add.Tensor\n",
]  # fmt: skip
NOT_VALUES = [
    1.0, b"x", (1,), object(), 1 << 64, -(1 << 63) - 1, 10**6000, LONG, "\udc80", {1: 2}, {LONG: 1}, {"a": 1.0},
    [], [1, 2], [["list"], 1], [{}, 1], [None], ["eval", "1"], ["eval", 1, 2], ["text"], ["list", []], CYCLE,
    ["node", "nobody"], ["node", "add"], ["node", "extra"], ["node", 1], ["node", ["x"]], ["node", "x", "y"], ["node"],
    ["float", 1.0], ["float", "00"], ["float", "3FF0000000000000"], ["float", "0" * 16, "0" * 16], ["float", "0" * 17],
    ["complex", 1, 2], ["complex", ["float", "0" * 16]], ["complex", "0" * 16], ["slice", 1], ["slice", 1, 2],
    ["slice", 1, 2, 3, 4], ["device", "cuda:300"], ["device", "cuda:01"], ["device", "cuda:"], ["device", "cpu\n"],
    ["device", 0], ["dtype", "float32; x"], ["dtype", "__class__"], ["dtype", "torch.float32"], ["dtype", None],
]  # fmt: skip
MALFORMED = [
    None, "x", {}, [], b"", tuple(VALID), [*VALID, 1], VALID[:2], ["refleet graph", 1, []], at(0, put="other"),
    at(1, put=2), at(1, put=True), at(1, put=1.0), at(2, put={}), at(2, put=VALID[2][:-1]), at(2, put=[None]),
    [*VALID[:2], [*VALID[2], VALID[2][-1]]], node("output", "out", None), node("get_attr"), node(), at(2, 1, put="x"),
    at(2, 8, put=["output", "output"]), at(2, 8, put=["output", "output", 1, 2]), node("call_method", "n", "m", [], {}),
    node([], "n", "m"), node("get_attr", "weight", "w"), node("get_attr", "self", "w"), node("get_attr", "n", "w", 1),
    node("call_function", "n", "aten.neg.default", []), node("call_function", "n", "aten.neg.default", [], [], {}),
    node("call_module", "n", "m", {}, {}), node("call_module", "n", "m", [], []), node("call_module", "n", "m", 1, {}),
    given_as("extra"), given_as("extra", ["node", "x"]), given_as("extra", 1, 2), given_as("x", 1), *(given_as(name, 1)
     for name in ["self", "torch", "device", "inf", "slice_1", "math_floor", "_operator_xor_2", "weight"]),
    at(2, put=[["get_attr", "input", "w"], ["placeholder", "input_1", "input_1"], ["output", "output", 1]]),
    at(2, put=[["placeholder", "a", "t"], ["placeholder", "b", "t"], ["output", "output", 1]]),
    calling("operator.add", 1), calling("operator.neg", 1, 2), calling("operator.neg", 1, a=1),
    calling("operator.getitem", None, 0), calling("operator.pow", -2, ["node", "x"]),
    *map(calling, NOT_CALLED), *map(taking, NOT_VALUES),
    *(taking(["list", x]) for x in NOT_VALUES), *(taking({"k": x}) for x in NOT_VALUES),
    *(node("get_attr", name, "w") for name in NOT_NAMES), *map(given_as, NOT_NAMES),
    *(node("call_module", "n", "m", [], {name: 1}) for name in NOT_NAMES if name != ["x"]),
    *(node("get_attr", "n", x) for x in NOT_DOTTED), *(node("call_module", "n", x, [], {}) for x in NOT_DOTTED),
]  # fmt: skip
UNKNOWN = [
    "aten.no_such_op.default", "aten.add.no_such_overload", "no_such_space.add.default", "os.system.default",
    "higher_order.cond.default", "import_module.os.default", "loaded_libraries.add.default", "aten.name.default",
    "aten.save.default", "prim.Print.default", "aten.add.op", "aten.add.overloads", "aten.add._schemas",
    "profiler._record_function_exit._RecordFunction",
]  # fmt: skip


def test_the_graph_that_is_damaged_below_is_valid() -> None:
    assert to_data(from_data(VALID)) == VALID
    bound(from_data(VALID), values=tensors_for(from_data(VALID)))
    assert from_data(taking(1)) and from_data(given_as("extra", 1)) and from_data(calling("operator.neg", 1))


@pytest.mark.parametrize("number", range(len(MALFORMED)))
def test_malformed_data_is_refused(number: int) -> None:
    with pytest.raises(MalformedRecord) as caught:
        from_data(MALFORMED[number])
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("text", UNKNOWN)
def test_an_operator_that_this_torch_lacks_is_named(text: str) -> None:
    spaces = set(torch.ops)
    with pytest.raises(NotRefittable, match=rf"needs {text}, which this torch .* lacks\n  next: import"):
        from_data(calling(text, 1))
    assert set(torch.ops) == spaces, "the lookup left a namespace behind"


def test_a_constant_that_this_torch_lacks_is_named() -> None:
    for tag, text in [("dtype", "float2"), ("layout", "folded"), ("memory_format", "cubes"), ("device", "tpu")]:
        with pytest.raises(NotRefittable, match=f"needs the {tag} {text}, which this torch"):
            from_data(taking([tag, text]))


def test_the_bounds_hold() -> None:
    deep: Any = 1
    for depth in range(100_000):
        if depth == 16:
            assert to_data(from_data(taking(deep))) == taking(deep)
            with pytest.raises(MalformedRecord, match="nested deeper than 15"):
                from_data(taking(deep), depth=15)
        if depth in (17, 99_999):
            with pytest.raises(MalformedRecord, match="nested deeper than 16"):
                from_data(taking(deep))
        deep = ["list", deep]
    wide: Any = ["list", 1]
    for _ in range(14):
        wide = ["list", *[wide] * 50]  # one object many times over: small here, endless if copied out
    for value, nodes in [(wide, 1000), (["list", *[1] * 201], 10)]:
        with pytest.raises(MalformedRecord, match="too many values"):
            from_data(taking(value), nodes=nodes)
    assert from_data(VALID, nodes=9, text=17)
    with pytest.raises(MalformedRecord, match="1 to 8 nodes"):
        from_data(VALID, nodes=8)
    with pytest.raises(MalformedRecord, match="at most 16 characters"):
        from_data(VALID, text=16)


def test_a_bound_graph_reaches_nothing_but_its_values() -> None:
    graph = from_data(VALID)
    values = tensors_for(graph)
    module = bound(graph, values={**values, "unused": torch.ones(1)})
    assert set(module.state_dict()) == {"parts.0.weight"} and not hasattr(module, "unused")
    for target in values:
        others: list[Any] = [torch.ones(1), nn.Identity(), os.system, None]
        for wrong in others:
            if type(wrong) is not type(values[target]):
                with pytest.raises(MalformedRecord, match=f"needs the .* '{target}', and there is none"):
                    bound(graph, values={**values, target: wrong})
        with pytest.raises(MalformedRecord, match=f"needs the .* '{target}', and there is none"):
            bound(graph, values={name: value for name, value in values.items() if name != target})
    with pytest.raises(MalformedRecord, match="needs the Module 'to_folder'"):
        bound(from_data(node("call_module", "n", "to_folder", ["/nowhere"], {})), values=values)


@pytest.mark.parametrize("target", ["forward", "graph", "code", "training", "_parameters", "parts.0.weight.data",
                                    "parts", "parts.0", "a.forward", "a.forward.b", "state_dict"])  # fmt: skip
def test_a_value_never_replaces_a_part_of_the_module(target: str) -> None:
    graph = from_data(node("get_attr", "n", target))
    with pytest.raises(NotRefittable, match="can't hold"):
        bound(graph, values=tensors_for(graph))


def paths(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    steps = range(len(data)) if isinstance(data, list) else list(data) if isinstance(data, dict) else ()
    for step in steps:
        yield (*path, step)
        yield from paths(data[step], (*path, step))


PATHS = list(paths(VALID))
WORDS = ["x", "node", "list", "float", "device", "placeholder", "output", "get_attr", "call_function", "call_module",
         "self", "aten.add.Tensor", "operator.getitem", "torch", "__class__", "os.system", "input", "input_1", "class",
         'a"b', "a.b", "0" * 16, "cuda:0", "float32", "slice", "tuple", "complex", "dtype", ""]  # fmt: skip
LEAVES = [st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.binary(max_size=4)]
WORD, PIECE = st.sampled_from(WORDS), st.sampled_from(PATHS).map(lambda path: copy.deepcopy(inner(path)))
KEYS = WORD | st.text(max_size=4) | st.integers()
JUNK = st.recursive(
    st.one_of(*LEAVES, WORD, PIECE),
    lambda inside: st.lists(inside, max_size=4) | st.dictionaries(KEYS, inside, max_size=3) | st.tuples(WORD, inside),
    max_leaves=12,
).map(lambda junk: list(junk) if isinstance(junk, tuple) else junk)


def load_or_refuse(data: object) -> None:
    """A refusal, or a graph that torch.fx can make a module of, and that can be stored again."""
    try:
        graph = from_data(data)
    except (MalformedRecord, NotRefittable) as error:
        assert len(str(error)) < 1000
        return
    graph.lint()
    kept = to_data(graph)
    assert to_data(from_data(kept)) == kept
    try:
        bound(graph, values=tensors_for(graph))
    except NotRefittable as error:
        assert "can't hold" in error.what


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.sampled_from(PATHS), st.sampled_from("pdir"), JUNK), min_size=1, max_size=3))
def test_a_graph_damaged_anywhere_is_refused_or_harmless(edits: list[tuple[tuple[Any, ...], str, Any]]) -> None:
    data: Any = copy.deepcopy(VALID)
    for path, how, junk in edits:
        try:
            holder = inner(path[:-1], data)
            if how == "p":
                holder[path[-1]] = junk
            elif how == "d":
                del holder[path[-1]]
            elif how == "i":
                holder.insert(path[-1], junk)
            else:
                holder[junk] = holder.pop(path[-1])
        except (LookupError, TypeError, AttributeError):  # an earlier edit took the place away
            continue
    load_or_refuse(data)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(JUNK, st.lists(JUNK, max_size=4))
def test_junk_is_refused_or_harmless(junk: object, nodes: list[object]) -> None:
    load_or_refuse(junk)
    load_or_refuse(["refleet graph", 1, nodes])
    load_or_refuse(taking(junk))
    load_or_refuse(["refleet graph", 1, [*VALID[2][:3], *nodes, ["output", "output", junk]]])


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=12))
def test_no_text_gets_into_generated_code(text: str) -> None:
    load_or_refuse(node("get_attr", text, f"w.{text}"))
    load_or_refuse(given_as(text, {text: text}))
    load_or_refuse(node("placeholder", text, text, 1))
    load_or_refuse(node("call_module", "n", text, [text], {text: {text: text}}))


NAMES = ["input", "input_1", "input_2", "input_1_1", "x", "x_1", "torch", "torch_1", "math_floor", "_operator_abs",
         "_operator_abs_1", "list", "slice", "slice_1", "device", "getattr", "inf", "nan_1", "weight"]  # fmt: skip
CALL = st.tuples(st.sampled_from(NAMES), st.sampled_from(["input", "input", "value", "abs", "full", "sub"]),
                 st.sampled_from(["", *NAMES]), st.integers(0, 9))  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.lists(CALL, max_size=9, unique_by=lambda call: call[0]))
def test_generated_code_computes_what_the_graph_says(calls: list[tuple[str, str, str, int]]) -> None:
    """Whatever nodes and inputs are named: torch.fx's code confuses some, and those graphs are refused."""
    nodes: list[list[Any]] = [["placeholder", "first", "first"]]
    for name, call, target, pick in calls:
        taken, last = ["node", nodes[pick % len(nodes)][1]], ["node", nodes[-1][1]]
        nodes.append({
            "input": ["placeholder", name, target or name], "value": ["get_attr", name, "weight"],
            "abs": ["call_function", name, "operator.abs", [taken], {}],
            "sub": ["call_function", name, "aten.sub.Tensor", [taken, last], {}],
            "full": ["call_function", name, "aten.full.default", [["list"], 3], {"device": ["device", "cpu"]}],
        }[call])  # fmt: skip
    try:
        graph = from_data(["refleet graph", 1, [*nodes, ["output", "o", ["list", *(["node", n[1]] for n in nodes)]]]])
    except MalformedRecord:
        return
    inputs = [torch.tensor(-float(7**number)) for number, _ in enumerate(graph.find_nodes(op="placeholder"))]
    module = bound(graph, values={"weight": torch.tensor(101.0)} if any(n[0] == "get_attr" for n in nodes) else {})
    assert module(*inputs) == fx.Interpreter(module).run(*inputs)
