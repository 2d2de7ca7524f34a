"""The engines of one model with everything around them: the graph that calls them, the buffers they are refitted from.

A refit has two halves. `stage` computes the new values into persistent buffers, which nothing that answers requests
reads. `commit` hands the buffers to the engines and enqueues one refit for each engine, and the copies for the parts
that torch executes, between two requests.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..common.digest import digest_of, tensor_digest_of
from ..common.errors import NotRefittable, RefitFailed
from ..common.tensors import tensor_blocks
from .engine import named_few
from .graph_capture import attribute_of
from .live_engine import LiveEngine
from .refit_plan import Address, Kind, RefitPlan

#: keep weights set that did not change as long as they are at most so many times those that did: putting one in costs
#: the host about 60 us, and unsetting and setting it again costs that and an object that the refitter keeps for ever
_SURPLUS = 4


class EnginePart(nn.Module):
    """An engine where the graph calls its part."""

    def __init__(self, live: LiveEngine):
        super().__init__()
        self.live = live

    def forward(self, *inputs: Tensor | int) -> Tensor | tuple[Tensor, ...]:
        outputs = self.live.run(inputs)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


class Resident:
    """Engines, graph and buffers of one model.

    Args: `graph` the partitioned graph, whose parts of these names become engines; its other parts get tensors of their
    own. `device` where buffers live. `concurrent`: several requests may run at once, on their callers' streams.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        engines: Mapping[str, LiveEngine],
        *,
        device: torch.device,
        concurrent: bool = False,
    ):
        self.engines, self.device = dict(engines), device
        self._parts: dict[str, nn.Module] = {}
        for node in graph.graph.nodes:
            if node.op == "call_module":
                name = str(node.target)
                self._parts[name] = (
                    EnginePart(engines[name]) if name in engines else _own(graph.get_submodule(name), device)
                )
        self._graph = fx.GraphModule(self._parts | _attributes(graph, device), _flat(graph.graph))
        self._buffers: dict[Address, Tensor] = {}
        self._memory: dict[Address, Tensor] = {}  # what each weight is, or would be, put in from
        self._set: dict[str, dict[str, int]] = {name: {} for name in engines}  # weight -> address of its memory
        self._staged: dict[Address, Tensor] = {}
        self._prototypes: dict[Address, tuple[torch.dtype, int]] = {}
        self.poisoned = True  # nothing is known of what the engines hold until every weight was put in once
        self._stream = _new_stream(device) if device.type == "cuda" and not concurrent else None
        self._lock = threading.Lock()

    @property
    def graph(self) -> fx.GraphModule:
        """The graph that calls the engines and the torch-executed parts."""
        return self._graph

    # ------------------------------------------------------------------ requests

    def __call__(self, flat: Sequence[Any]) -> Any:
        """Answer one request: flat inputs in, flat outputs out, ordered with the caller's current stream."""
        with torch.no_grad(), self._on_stream() as caller:
            answer = self._graph(*flat)
            if caller is not None:
                for output in pytree.tree_leaves(answer):
                    if isinstance(output, Tensor) and output.is_cuda:
                        output.record_stream(caller)  # its memory must not go to the next request while it is read
        return answer

    @contextmanager
    def _on_stream(self) -> Iterator[torch.cuda.Stream | None]:
        """Run on the engines' stream, after what the caller enqueued and before what it enqueues next.

        Without one stream of their own, requests run on their callers' streams.
        """
        if self._stream is None:
            yield None
            return
        caller = torch.cuda.current_stream(self.device)
        with self._lock:  # two requests must not interleave on the stream: they share the engines' contexts
            self._stream.wait_stream(caller)
            with torch.cuda.stream(self._stream):
                yield caller
            caller.wait_stream(self._stream)

    # ------------------------------------------------------------------ refit

    def stage(self, plan: RefitPlan, addresses: Iterable[Address], read: Callable[[str], Tensor]) -> None:
        """Compute the values of `addresses` into their buffers. Requests are not affected.

        Raises: NotRefittable for a weight without a rule, or with another size or dtype than the engine's.
        """
        wanted = list(plan.items) if self.poisoned else list(addresses)
        wanted = [address for address in wanted if self._is_live(address)]
        values = plan.values(read)
        staged = {}
        for address in wanted:
            item = plan.items[address]
            self._check_prototype(address, item.dtype, item.numel)
            value = values(address)
            shared = item.kind is Kind.DIRECT and address[0] in self.engines and value.device == self.device
            # a tensor of the version that has the engine's dtype and layout is handed over as it is
            if shared and value.data_ptr() == read(item.origin).data_ptr():
                staged[address] = value
                continue
            buffer = self._buffers.get(address)
            if buffer is None:
                buffer = self._buffers[address] = torch.empty(item.shape, dtype=item.dtype, device=self.device)
            buffer.copy_(value)
            staged[address] = buffer
        self._staged = staged
        self._memory |= staged

    def commit(self) -> int:
        """Put what was staged into the engines and the torch-executed parts, all of it between two requests.

        Returns the number of engine weights that depend on the change. No request may be running (the gate is closed),
        but work of earlier ones may still be in the stream. Raises: RefitFailed; if `poisoned` is set then, the engines
        may hold some of the new weights.
        """
        by_engine: dict[str, dict[str, Tensor]] = {}
        for (part, name), value in self._staged.items():
            if part in self.engines:
                by_engine.setdefault(part, {})[name] = value
        for part, wanted in by_engine.items():
            self._hand_over(part, wanted)
        with self._on_stream():
            self.poisoned = True
            for part in by_engine:
                if not self.engines[part].refit():
                    raise RefitFailed(f"TensorRT failed to refit {part}: it may hold some of the new weights")
            for (part, name), value in self._staged.items():
                if part not in self.engines:
                    attribute_of(self._parts[part], name).copy_(value)
            self.synchronize()
            self.poisoned = False
        self._staged = {}
        return sum(map(len, by_engine.values()))

    def synchronize(self) -> None:
        """Wait until everything that was enqueued is done; an error of it shows here."""
        if self._stream is not None:
            self._stream.synchronize()
        elif self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def check_covered(self, plan: RefitPlan) -> None:
        """Raise NotRefittable unless the plan has a rule for every weight of every engine, of the engine's own size."""
        for part, live in self.engines.items():
            plan.check_covers(part, live.weights)
        for part, module in self._parts.items():
            if part not in self.engines:
                plan.check_covers(part, module.state_dict())
        for address, item in plan.items.items():
            if self._is_live(address):
                self._check_prototype(address, item.dtype, item.numel)

    def content_digest(self) -> bytes:
        """BLAKE3 over the serialized engines and the tensors of the parts that torch executes, in the graph's order."""
        parts = []
        for name, part in self._parts.items():
            if name in self.engines:
                parts.append(digest_of(self.engines[name].content()))
            else:
                held = sorted(part.state_dict().items())
                parts += [digest_of(key.encode(), tensor_digest_of(tensor_blocks(tensor))) for key, tensor in held]
        return digest_of(*parts)

    def close(self) -> None:
        for live in self.engines.values():
            live.close()
        self._buffers, self._staged = {}, {}

    # ------------------------------------------------------------------ steps

    def _is_live(self, address: Address) -> bool:
        """Whether the weight exists: TensorRT drops constants that it can do without."""
        part, name = address
        return name in self.engines[part].weights if part in self.engines else part in self._parts

    def _check_prototype(self, address: Address, dtype: torch.dtype, numel: int) -> None:
        part, name = address
        if part not in self.engines:
            return
        has = self._prototypes.get(address)
        if has is None:
            has = self._prototypes[address] = self.engines[part].prototype(name)
        if has != (dtype, numel):
            raise NotRefittable(
                f"{name!r} of {part} has {has[1]} elements of {has[0]}; the plan has {numel} of {dtype}"
            )

    def _hand_over(self, part: str, wanted: Mapping[str, Tensor]) -> None:
        """Set exactly what has to be put in, and nothing whose memory is gone. Changes no engine weight yet."""
        live, now = self.engines[part], self._set[part]
        if len(now) > _SURPLUS * len(wanted):
            for name in now.keys() - wanted.keys():
                if not live.unset(name):
                    raise RefitFailed(f"TensorRT refused to leave the weight {name!r} of {part} alone", tensor=name)
                del now[name]
        for name, value in wanted.items():
            if now.get(name) == value.data_ptr():
                continue
            if not live.set(name, value):
                raise RefitFailed(f"TensorRT rejected the weight {name!r} of {part}", tensor=name)
            now[name] = value.data_ptr()
        # standard TensorRT fuses weights: one of them can only be put in together with the others, which did not change
        for name in live.missing():
            known = self._memory.get((part, name))
            if known is None or not live.set(name, known):
                raise RefitFailed(
                    f"TensorRT wants {name!r} of {part} too, and the plan has no value for it", tensor=name
                )
            now[name] = known.data_ptr()
        if missing := live.missing():
            raise RefitFailed(f"TensorRT still lacks {named_few(missing)} of {part}", tensor=missing[0])


def _new_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _flat(graph: fx.Graph) -> fx.Graph:
    """The graph with flat inputs and outputs: some versions keep the nesting of the exported program in it."""
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph, {}))
    return copied


def _own(module: nn.Module, device: torch.device) -> nn.Module:
    """The part with tensors of its own: those of the lowered graph may be the version's, which `stage` overwrites."""
    assert isinstance(module, fx.GraphModule)
    called = {str(node.target) for node in module.graph.nodes if node.op == "call_module"}
    parts = {name: _own(module.get_submodule(name), device) for name in called}
    return fx.GraphModule(_attributes(module, device) | parts, module.graph)


def _attributes(module: fx.GraphModule, device: torch.device) -> dict[str, Any]:
    """Copies of the tensors that the graph reads."""
    names = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    return {name: attribute_of(module, name).to(device, copy=True) for name in names}
