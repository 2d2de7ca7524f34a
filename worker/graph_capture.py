"""What happens to a graph's tensors while torch_tensorrt lowers it, captured by hooks in its passes and converters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from .torch_trt import Compiler


@dataclass(frozen=True, slots=True)
class Fold:
    """A sub-graph that the compiler replaced by its value. `inputs` are attributes: tensors of the module, or folds."""

    graph: fx.Graph
    inputs: dict[str, Tensor]
    value: Tensor


@dataclass(frozen=True, slots=True)
class Norm:
    """A batch norm that the compiler folded: what went in, and the scale and shift that came out."""

    parts: tuple[Tensor, ...]  # weight, bias, mean, variance
    eps: float
    scale: Tensor
    shift: Tensor
    function: Callable[..., Any]


@contextmanager
def captured_folds(tt: Compiler, folds: dict[str, Fold]) -> Iterator[None]:
    """Keep each sub-graph that constant folding replaces, under the name of the parameter that takes its place."""
    replace = tt.folding.replace_node_with_constant

    def capturing(gm: fx.GraphModule, node: fx.Node, constant: Tensor) -> None:
        graph, inputs = _subgraph(gm, node)
        before = {n for n, _ in gm.named_parameters(recurse=False)}
        replace(gm, node, constant)
        (name,) = {n for n, _ in gm.named_parameters(recurse=False)} - before
        folds[name] = Fold(graph, inputs, constant.detach())

    tt.folding.replace_node_with_constant = capturing  # type: ignore[attr-defined]
    try:
        yield
    finally:
        tt.folding.replace_node_with_constant = replace  # type: ignore[attr-defined]


@contextmanager
def captured_norms(tt: Compiler, norms: list[Norm]) -> Iterator[None]:
    """Keep what the batch norm converter folded, with the eps that it used."""
    fold = getattr(tt.norms, "batch_norm_constant_folding", None)
    if fold is None:
        yield
        return

    def capturing(weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, eps: float) -> Any:
        scale, shift = fold(weight, bias, mean, variance, eps)
        norms.append(Norm((weight, bias, mean, variance), eps, scale, shift, fold))
        return scale, shift

    tt.norms.batch_norm_constant_folding = capturing  # type: ignore[attr-defined]
    try:
        yield
    finally:
        tt.norms.batch_norm_constant_folding = fold  # type: ignore[attr-defined]


def _subgraph(module: nn.Module, node: fx.Node) -> tuple[fx.Graph, dict[str, Tensor]]:
    """The node with everything above it, as a graph of its attributes, and these by name."""
    above: set[fx.Node] = set()
    stack = [node]
    while stack:
        found = stack.pop()
        if found not in above:
            above.add(found)
            stack += found.all_input_nodes
    graph, new, inputs = fx.Graph(), dict[fx.Node, fx.Node](), dict[str, fx.Node]()
    ordered = [found for found in node.graph.nodes if found in above]
    for attribute in ordered:
        if attribute.op == "get_attr":
            name = str(attribute.target)
            if name not in inputs:
                inputs[name] = graph.placeholder(f"input_{len(inputs)}")
            new[attribute] = inputs[name]
    for found in ordered:
        if found.op != "get_attr":
            new[found] = graph.node_copy(found, lambda n: new[n])
            new[found].meta = {}
    graph.output(new[node])
    return graph, {name: attribute_of(module, name) for name in inputs}


def attribute_of(module: nn.Module, name: str) -> Tensor:
    path, _, attribute = name.rpartition(".")
    found: Tensor = getattr(module.get_submodule(path), attribute)
    return found.detach()


def own_metadata(graph: fx.Graph) -> None:
    """Naming a node pops from its module stack, which nodes share: copied with the sharing, so that names repeat."""
    memo: dict[int, Any] = {}
    for node in graph.nodes:
        if "nn_module_stack" in node.meta:
            node.meta["nn_module_stack"] = copy.deepcopy(node.meta["nn_module_stack"], memo)


def without_guards(module: fx.GraphModule) -> None:
    """Remove what checks inputs: it is no part of the computation, and newer versions add it as a module."""
    for node in list(module.graph.nodes):
        if node.op == "call_module" and "guard" in str(node.target).lower():
            module.graph.erase_node(node)
            module.delete_submodule(str(node.target))


def put_attribute(module: nn.Module, name: str, value: Tensor) -> None:
    """Put `value` in place of the attribute; the tensor that was there, the user's own, stays as it is."""
    path, _, attribute = name.rpartition(".")
    try:
        owner = module.get_submodule(path)
    except AttributeError:
        return  # a tied name that the export left out, or a tensor that it does not use
    if attribute in owner._parameters:
        owner._parameters[attribute] = nn.Parameter(value, requires_grad=False)
    elif attribute in owner._buffers:
        owner._buffers[attribute] = value
