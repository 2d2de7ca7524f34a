"""A torch.fx graph of aten operators <-> plain data for msgpack or JSON: no pickle, and no text that could become code.

The data is ["refleet graph", 1, nodes]. A node is one of

    ["placeholder", name, target] or [..., default]      ["get_attr", name, target]      ["output", name, value]
    ["call_function" or "call_module", name, target, arguments, keyword arguments]

None, a bool, an int, a str or a dict is written as it is, all else as a tagged list: ["list", ...], ["tuple", ...],
["node", name], ["float", bits], ["slice", start, stop, step], ["dtype", "float32"], ["device", "cuda:0"] and so on.

`torch.fx.GraphModule` writes a graph as Python text and runs that, so the reader lets through only plain names, known
operators and a fixed list of functions. What these do it does not judge: run only a graph that you trust as code.
"""

from __future__ import annotations

import builtins
import keyword
import math
import operator
import re
import struct
from collections.abc import Callable, Mapping
from typing import Any

import msgpack
import torch
from torch import fx, nn
from torch._ops import OpOverload, OpOverloadPacket, _OpNamespace
from torch.fx.immutable_collections import immutable_dict, immutable_list

from ..common.digest import digest_of
from ..common.errors import MalformedRecord, NotRefittable

TAG, FORMAT, DEPTH, VALUES_PER_NODE = "refleet graph", 1, 16, 20
#: Python functions that a graph may call, and the number of their arguments; they take no keyword arguments
_PYTHON: dict[str, tuple[Callable[..., Any], int]] = {
    f"{module.__name__}.{name}": (getattr(module, name), count)
    for module, count, names in [
        (operator, 1, "abs index invert neg not_ pos truth"),
        (operator, 2, "add sub mul matmul truediv floordiv mod pow getitem"),
        (operator, 2, "and_ or_ xor lshift rshift eq ne lt le gt ge"),
        (math, 1, "ceil floor trunc"),
        (torch, 1, "sqrt _sym_sqrt sym_float sym_int sym_not sym_sum"),
        (torch, 2, "sym_max sym_min"),
        (torch, 3, "sym_ite"),
    ]
    for name in names.split()
    if hasattr(module, name)
}
_TEXT_OF = {id(function): text for text, (function, _) in _PYTHON.items()}
#: operators that reach files or the terminal
_REFUSED = frozenset(["aten.from_file", "aten._print", "debugprims.load_tensor"])
_PARTS = {slice: ("start", "stop", "step"), complex: ("real", "imag")}
_TAG_OF = {torch.dtype: "dtype", torch.layout: "layout", torch.memory_format: "memory_format", torch.device: "device"}
_CONSTANTS: dict[object, dict[str, Any]] = {
    tag: {str(value).removeprefix("torch."): value for value in vars(torch).values() if type(value) is kind}
    for kind, tag in _TAG_OF.items()
}
_DEVICE = re.compile(r"(cpu|cuda|meta|mps|xpu|hpu)(:(0|[1-9][0-9]?))?")
_BITS = re.compile(r"[0-9a-f]{16}")
#: torch.fx puts a step of a dotted target between double quotes where it is no identifier ("0" of a Sequential)
_STEP = rf"(?!__|(?:{'|'.join(keyword.kwlist)})(?:\.|$))[A-Za-z0-9_:/-]+"
_DOTTED = re.compile(rf"{_STEP}(\.{_STEP})*")
_OWN = {"self", "torch", "device", "inf", "nan", "NoneType", "fx_pytree", "pytree", "getattr", "slice", "complex"}
#: names that mean something else in generated code: a node is called name_1, name_2, ... there
_RENAMED = _OWN.union(dir(builtins))
#: an input is an argument under its target, and would hide these
_HIDING = _OWN.union(text.replace("operator.", "_operator_").replace(".", "_") for text in _PYTHON)
#: attributes that a tensor or module can't replace
_OF_MODULES, _OF_GRAPHS = frozenset(dir(nn.Module())), frozenset(dir(fx.GraphModule({}, fx.Graph())))
_NEXT = "leave this part out of the exported model, or serve the module itself with TorchEngine"


class _Mismatch(Exception):
    """Internal: data that is not of a graph."""


def to_data(graph: fx.Graph) -> list[object]:
    """The graph as lists, dicts, str, int, bool and None; `from_data` gives the same graph again, without metas.

    Names of nodes are kept. A code generator (the pytrees of an exported module's inputs and outputs) is not: the
    loaded graph takes its placeholders one by one, and returns what its output node lists.
    Raises: NotRefittable for a graph that calls, holds or is named what can't be stored.
    """
    data: list[object] = [TAG, FORMAT, [_written(node) for node in graph.nodes]]
    try:
        from_data(data)  # what is written can be read
    except MalformedRecord as error:
        why = error.what.removeprefix("not a stored graph: ")
        raise NotRefittable(f"the graph can't be stored: {why}", next=_NEXT) from None
    return data


def from_data(
    data: object, *, device: torch.device | None = None, nodes: int = 200_000, depth: int = DEPTH, text: int = 512
) -> fx.Graph:
    """The graph that `to_data` described. `device` replaces every CUDA device that the graph names.

    Bounds: `nodes` of the graph, `depth` of nesting in an argument, characters of one `text`.
    Raises: MalformedRecord for any other data, NotRefittable for an operator or constant that this torch lacks.
    """
    if type(data) is not list or [type(part) for part in data[:4]] != [str, int, list] or data[0] != TAG:
        raise MalformedRecord("not a stored graph")
    if data[1] != FORMAT:
        raise MalformedRecord(f"a stored graph of another format than {FORMAT}", next="use the refleet that wrote it")
    if not 0 < len(data[2]) <= nodes:
        raise MalformedRecord(f"a stored graph has 1 to {nodes} nodes")
    reader = _Reader(device, depth, text, VALUES_PER_NODE * nodes)
    try:
        for number, item in enumerate(data[2], 1):
            reader.node(item, last=number == len(data[2]))
        reader.check_inputs()
    except _Mismatch as error:
        raise MalformedRecord(f"not a stored graph: {error} (after {len(reader.nodes)} nodes)") from None
    return reader.graph


def graph_digest(graph: fx.Graph) -> bytes:
    """BLAKE3-256 of the graph's data as msgpack: the same for the same nodes, arguments and names in the same order.

    Raises: NotRefittable as `to_data`.
    """
    return digest_of(msgpack.packb(to_data(graph), use_bin_type=True))


def bound(graph: fx.Graph, *, values: Mapping[str, torch.Tensor | nn.Module]) -> fx.GraphModule:
    """A runnable module. `values`: the tensor of each `get_attr` target, the module of each `call_module` target.

    Only these can be reached. With a whole module as root, a target might name its methods (`to_folder` writes files).
    Raises: MalformedRecord for a target without its value, NotRefittable for one that a module can't hold.
    """
    used: dict[str, torch.Tensor | nn.Module] = {}
    for node in graph.nodes:
        if node.op in ("get_attr", "call_module"):
            target, kind = str(node.target), torch.Tensor if node.op == "get_attr" else nn.Module
            if not isinstance(values.get(target), kind):
                raise MalformedRecord(f"node {node.name!r} needs the {kind.__name__} {target!r}, and there is none")
            used[target] = values[target]
    for target in used:
        steps = target.split(".")
        inside = any(".".join(steps[:count]) in used for count in range(1, len(steps)))
        if inside or steps[0] in _OF_GRAPHS or not _OF_MODULES.isdisjoint(steps):
            raise NotRefittable(f"a torch.fx.GraphModule can't hold {target!r} of the graph", next=_NEXT)
    return fx.GraphModule(used, graph)


def _written(node: fx.Node) -> list[object]:
    target: Any = node.target
    args = [_value(value, node) for value in node.args]
    if node.op in ("placeholder", "get_attr", "output"):
        return [node.op, node.name, *([] if node.op == "output" else [target]), *args]
    if node.op != "call_module":
        called, target = target, str(target) if isinstance(target, OpOverload) else _TEXT_OF.get(id(target))
        if target is None:
            named = getattr(called, "__name__", None) or str(called)[:80]
            raise NotRefittable(f"node {node.name!r}: the graph calls {named}, which can't be stored", next=_NEXT)
    return [node.op, node.name, target, args, {key: _value(node.kwargs[key], node) for key in sorted(node.kwargs)}]


def _value(value: Any, node: fx.Node, depth: int = 0) -> object:
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return ["float", struct.pack(">d", value).hex()]
    if kind is fx.Node and value.graph is node.graph:
        return ["node", value.name]
    if kind in _TAG_OF:
        return [_TAG_OF[kind], str(value).removeprefix("torch.")]
    if kind in (dict, immutable_dict) and depth < DEPTH and all(type(key) is str for key in value):
        return {key: _value(item, node, depth + 1) for key, item in value.items()}
    if kind in (tuple, list, immutable_list, slice, complex) and depth < DEPTH:
        parts = [getattr(value, name) for name in _PARTS[kind]] if kind in _PARTS else value
        tag = "list" if kind is immutable_list else kind.__name__
        return [tag, *(_value(part, node, depth + 1) for part in parts)]
    raise NotRefittable(f"node {node.name!r}: a {kind.__module__}.{kind.__qualname__} can't be stored", next=_NEXT)


def _is_name(text: str) -> bool:
    """A plain identifier: ASCII, because Python takes letters that look alike for the same; none like `__class__`."""
    return text.isascii() and text.isidentifier() and not keyword.iskeyword(text) and not text.startswith("__")


def _called(text: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    parts = text.split(".")
    function, arity = _PYTHON.get(text, (None, -1))
    # torch.fx would write None[0], a syntax error, and -2 ** x, which is -(2 ** x)
    literal = text in ("operator.getitem", "operator.pow") and not any(isinstance(arg, fx.Node) for arg in args[:1])
    if function and len(args) == arity and not kwargs and not literal:
        return function
    if len(parts) == 3 and all(map(_is_name, parts)) and ".".join(parts[:2]) not in _REFUSED:
        return _operator(*parts) or _lacking(text)
    raise _Mismatch(f"the graph calls {text[:80]!r} with {len(args)} arguments, which can't be stored")


def _operator(space: str, name: str, overload: str) -> Any:
    try:  # not by attributes at once: they find TorchScript's operators too, and `aten.save` writes files
        torch._C._dispatch_find_schema_or_throw(f"{space}::{name}", "" if overload == "default" else overload)
    except RuntimeError:
        return None
    found: Any = torch.ops
    for step, kind in ((space, _OpNamespace), (name, OpOverloadPacket), (overload, OpOverload)):
        found = getattr(found, step, None)
        if type(found) is not kind:  # an attribute of torch's own, or an operator on TorchScript objects
            return None
    return found


class _Reader:
    """Builds the graph node by node. `nodes`: those so far, under the names that the data gives them."""

    def __init__(self, device: torch.device | None, depth: int, length: int, room: int):
        self.graph, self.nodes = fx.Graph(), dict[str, fx.Node]()
        self._device, self._depth, self._length, self._room = device, depth, length, room

    def node(self, item: object, *, last: bool) -> None:
        if type(item) is not list or len(item) < 3 or (item[0] == "output") is not last:
            raise _Mismatch("not a node, or the output is not at the end")
        op, name, target, *rest = item
        if self._text(name, _is_name) in self.nodes or name == "self":
            raise _Mismatch(f"the name {name[:40]!r} is taken")
        args, kwargs = tuple[Any, ...](), dict[str, Any]()
        if op == "output" and not rest:
            target, args = op, (self._value(target),)
        elif op == "placeholder" and len(rest) <= 1:
            target, args = self._text(target, _is_name), tuple(map(self._value, rest))
        elif op == "get_attr" and not rest:
            target = self._text(target, _DOTTED.fullmatch)
        elif op in ("call_function", "call_module") and [type(part) for part in rest] == [list, dict]:
            args = tuple(map(self._value, rest[0]))
            kwargs = {self._text(key, _is_name): self._value(value) for key, value in rest[1].items()}
            target = self._text(target, _DOTTED.fullmatch if op == "call_module" else None)
            target = target if op == "call_module" else _called(target, args, kwargs)
        else:
            raise _Mismatch("not a node")
        self.nodes[name] = self.graph.create_node(op, target, args, kwargs, name)
        self.nodes[name].name = name  # torch.fx makes "input" "input_1", torch.export does not

    def check_inputs(self) -> None:
        """Generated code has the targets of inputs as they are, and all other values under names that may differ."""
        renamed, seen, optional = _RENAMED.intersection(self.nodes), set[str](), False
        for node in self.graph.find_nodes(op="placeholder"):
            target = str(node.target)
            base, _, number = target.rpartition("_")
            stem = base if number.isdigit() else target
            other = self.nodes.get(target, node) is not node or (stem != target and stem in renamed)
            if other or stem in _HIDING or target in seen:
                raise _Mismatch(f"in torch.fx's code the input {target[:40]!r} would stand for something else too")
            if node.all_input_nodes or (optional and not node.args):
                raise _Mismatch(f"the input {target[:40]!r} lacks a default, or has one that is no constant")
            seen.add(target)
            optional = bool(node.args)

    def _value(self, item: Any, depth: int = 0) -> Any:
        kind = type(item)
        self._room -= 1
        if self._room < 0 or depth > self._depth:
            raise _Mismatch(f"too many values, or nested deeper than {self._depth}")
        if item is None or kind is bool or (kind is int and -(1 << 63) <= item < 1 << 64):
            return item
        if kind is str:
            return self._text(item)
        if kind is dict:
            return {self._text(key): self._value(value, depth + 1) for key, value in item.items()}
        if kind is list and len(item) == 2 and item[0] not in ("list", "tuple"):
            return self._leaf(item[0], self._text(item[1]))
        tag = item[0] if kind is list and item else None
        parts = [self._value(value, depth + 1) for value in item[1:]] if tag else []
        if tag in ("list", "tuple"):
            return parts if tag == "list" else tuple(parts)
        if tag == "slice" and len(parts) == 3:
            return slice(*parts)
        if tag == "complex" and [type(part) for part in parts] == [float, float]:
            return complex(*parts)
        raise _Mismatch(f"not a value: {kind.__name__}")

    def _leaf(self, tag: object, text: str) -> Any:
        if tag == "node" and text in self.nodes:
            return self.nodes[text]
        if tag == "float" and _BITS.fullmatch(text):
            return struct.unpack(">d", bytes.fromhex(text))[0]
        if tag == "device" and _DEVICE.fullmatch(text):
            return self._device if self._device and text.startswith("cuda") else torch.device(text)
        if type(tag) is str and tag in _CONSTANTS and _is_name(text):
            return _CONSTANTS[tag].get(text) or _lacking(f"the {tag} {text}")
        raise _Mismatch("not a value")

    def _text(self, item: object, allowed: Callable[[str], object] | None = None) -> str:
        if type(item) is not str or len(item) > self._length or item.encode(errors="replace").decode() != item:
            raise _Mismatch(f"not a text of at most {self._length} characters")
        if allowed and not allowed(item):
            raise _Mismatch(f"not a name: {item[:40]!r}")
        return item


def _lacking(what: str) -> Any:
    next_ = "import the package that brings it, or use the torch that the graph was stored with"
    raise NotRefittable(f"the graph needs {what}, which this torch ({torch.__version__}) lacks", next=next_)
