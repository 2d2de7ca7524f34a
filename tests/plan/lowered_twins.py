"""Twin engines of a really lowered model: each computes its partition with torch, from weights under engine names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from refleet.common.tensors import bits_of
from refleet.worker.graph_capture import attribute_of
from refleet.worker.lowering import Lowering, Network
from refleet.worker.plan_build import Sources
from refleet.worker.recipe import Recipe
from refleet.worker.torch_trt import Compiled
from torch import Tensor, fx
from twin_engine import TwinEngine


def twin_engines(recipe: Recipe) -> tuple[dict[str, Compiled], dict[str, TwinEngine]]:
    """What compiling the recipe's module would give, and the engines that loading it would give."""
    lowering = Lowering(recipe)
    network = lowering.network()
    tried = lowering.network(Sources.of(lowering).drawn(0))  # with random values no two weights are equal by chance
    twins = {part: _twin(network, tried, part) for part in network.weights}
    compiled = {part: Compiled(twin.serialize(), ("x",), twin.outputs) for part, twin in twins.items()}
    return compiled, twins


def _twin(network: Network, tried: Network, part: str) -> TwinEngine:
    module, weights = network.graph.get_submodule(part), network.weights[part]
    assert isinstance(module, fx.GraphModule)
    names = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    attributes = {name: _attribute(module, name) for name in names}
    sources = {
        name: _source(attribute_of(tried.graph.get_submodule(part), name), tried.weights[part]) for name in names
    }

    def compute(held: Mapping[str, Tensor], inputs: Sequence[Any]) -> list[Tensor]:
        for name, weight in sources.items():
            if weight is not None:
                attributes[name].copy_(held[weight].reshape(attributes[name].shape))
        with torch.no_grad():
            answer = module(*inputs)
        return [part.clone() for part in (answer if isinstance(answer, tuple | list) else [answer])]

    output = next(node for node in module.graph.nodes if node.op == "output").args[0]
    return TwinEngine(weights, compute, outputs=len(output) if isinstance(output, tuple | list) else 1)


def _attribute(module: fx.GraphModule, name: str) -> Tensor:
    """A copy in the place of the lowered one, which may be the user's own tensor."""
    path, _, attribute = name.rpartition(".")
    owner = module.get_submodule(path)
    value: Tensor = getattr(owner, attribute).detach().clone()
    for kind in (owner._parameters, owner._buffers):
        kind.pop(attribute, None)
    setattr(owner, attribute, value)
    return value


def _source(value: Tensor, weights: Mapping[str, Tensor]) -> str | None:
    """The engine weight of this content."""
    flat = value.cpu().contiguous().view(-1)
    for name, weight in weights.items():
        same = weight.dtype == flat.dtype and weight.numel() == flat.numel() and flat.numel()
        if same and torch.equal(bits_of(weight).view(-1), bits_of(flat)):
            return name
    return None
