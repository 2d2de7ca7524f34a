"""The PyTorch side of a model whose factory is not here: the graph that its bundle kept, with tensors of its own.

It computes what the module computes, bit for bit like the decomposed program that the engines were compiled from, and
has the names, dtypes, shapes and ties of the module's `state_dict`.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..common.errors import MalformedRecord
from ..common.tensors import torch_dtype
from .bundle_record import StoredTensor
from .signature import Signature


class BundledModule(nn.Module):
    """Takes and returns what the original does. Its tensors are parameters, whatever they were before."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        run = self.__dict__["_refleet"]
        return run.signature.answered(_Run(self, run).run(*run.signature.flatten(args, kwargs)))

    @property
    def reference(self) -> tuple[fx.Graph, dict[str, Tensor]]:
        """The graph, and the tensors that it reads besides those of a version."""
        run = self.__dict__["_refleet"]
        return run.graph, run.attributes

    def extra_repr(self) -> str:
        return f"{len(self.reference[0].nodes)} operations from a bundle"


def bundled_module(
    name: str, state: Iterable[StoredTensor], values: Mapping[str, Tensor], graph: fx.Graph,
    attributes: Mapping[str, Tensor], signature: Signature, device: torch.device,
) -> BundledModule:  # fmt: skip
    """Filled with plausible weights, the same ones every time. `values`: tensors that are what they were.

    Raises: MalformedRecord when the graph reads what is not there, or calls modules.
    """
    kind = type(name, (BundledModule,), {"__qualname__": name})
    module: BundledModule = kind()
    known: dict[str, nn.Parameter] = {}
    for entry in state:
        first = entry.same_as or entry.spec.name
        if first not in known:
            drawn = values[first].to(device) if first in values else _drawn(entry, first, device)
            known[first] = nn.Parameter(drawn, requires_grad=False)
        if tuple(known[first].shape) != entry.spec.shape or known[first].dtype != torch_dtype(entry.spec.dtype):
            raise MalformedRecord(f"{entry.spec.name!r} and {first!r} are one tensor in a bundle, but differ")
        _put(module, entry.spec.name, known[first])
    held = {entry.spec.name for entry in state}
    readable = held.union(attributes)
    for node in graph.nodes:
        if node.op == "call_module" or (node.op == "get_attr" and str(node.target) not in readable):
            raise MalformedRecord(f"the bundle's graph needs {str(node.target)[:80]!r}, and it is not there")
    module.__dict__["_refleet"] = _Graph(graph, dict(attributes), signature, held)
    module.eval()
    return module


class _Graph:
    """Not a module: what it holds must not show in the state_dict."""

    def __init__(self, graph: fx.Graph, attributes: dict[str, Tensor], signature: Signature, state: set[str]):
        self.graph, self.attributes, self.signature, self.state = graph, attributes, signature, state


class _Run(fx.Interpreter):
    """Reads the tensors where they are at the moment: `functional_call` puts others in their place."""

    def __init__(self, module: BundledModule, run: _Graph):
        super().__init__(nn.Module(), graph=run.graph)
        self._tensors, self._run = module, run

    def fetch_attr(self, target: str) -> Any:
        if target not in self._run.state:
            return self._run.attributes[target]
        *path, last = target.split(".")
        owner: nn.Module = self._tensors
        for step in path:
            owner = owner._modules[step]  # type: ignore[assignment]
        return owner._parameters[last]


def _put(module: nn.Module, name: str, tensor: nn.Parameter) -> None:
    """Under its dotted name. Not through `register_parameter`, whose rules are those of another class than the one
    that had this name."""
    *path, last = name.split(".")
    owner = module
    for step in path:
        if step not in owner._modules:
            owner._modules[step] = nn.Module()
        owner = owner._modules[step]  # type: ignore[assignment]
    owner._parameters[last] = tensor


def _drawn(entry: StoredTensor, name: str, device: torch.device) -> Tensor:
    """Like those that were there: positive if they were (variances), never all zero (a norm's bias at the start)."""
    dtype, shape, spread = torch_dtype(entry.spec.dtype), entry.spec.shape, entry.spread
    if spread is None:
        return torch.zeros(shape, dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))

    def draw() -> Tensor:
        if spread.positive:
            return spread.mean * (0.5 + torch.rand(shape, device=device, generator=generator))
        return spread.mean + (spread.deviation or 0.02) * torch.randn(shape, device=device, generator=generator)

    return (torch.complex(draw(), draw()) if dtype.is_complex else draw()).to(dtype)
