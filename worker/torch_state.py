"""The live tensors of a torch module under their `state_dict` names, and how to write them bit-exactly in place."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..common.errors import NotRefittable, UnreadableCheckpoint
from ..common.tensors import spec_of
from ..common.types import TensorSpec

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
Layout = tuple[tuple[str, int, torch.dtype, tuple[int, ...], tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True)
class LiveState:
    """`tensors` are the module's own memory, never copies. `ties`: for a tied name, every name of the same memory."""

    tensors: dict[str, Tensor]
    specs: dict[str, TensorSpec]
    ties: dict[str, tuple[str, ...]]
    layout: Layout

    @property
    def cuda(self) -> list[torch.device]:
        """The CUDA devices that hold any of the tensors."""
        return sorted({t.device for t in self.tensors.values() if t.is_cuda}, key=lambda d: d.index)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module that `torch.compile` wrapped: it has the same tensors, under the names that the trainer knows."""
    inner = getattr(module, "_orig_mod", module)
    return inner if isinstance(inner, nn.Module) else module


def live_state(module: nn.Module, *, known: LiveState | None = None) -> LiveState:
    """Parameters and persistent buffers of `module`. `known`: an earlier result; equal layout needs no second check.

    Raises: NotRefittable for a tensor that can't be written in place without side effects.
    """
    module = unwrapped(module)
    owned = [*module.parameters(), *module.buffers()]
    ids = {id(tensor) for tensor in owned}
    tensors: dict[str, Tensor] = {}
    specs: dict[str, TensorSpec] = {}
    for name, value in module.state_dict(keep_vars=True).items():
        try:
            specs[name] = spec_of(name, value)
        except UnreadableCheckpoint as error:
            problem: str | None = error.what
        else:
            problem = not_writable(name, value)
            if id(value) not in ids and value.numel() and _storage(value) not in map(_storage, owned):
                problem = f"tensor {name!r} is a copy that state_dict() makes: writing it would not change the module"
            tensors[name] = value
        if problem:
            raise NotRefittable(
                f"a version can't carry all of the module's state: {problem}", next=_KEEP_OUT, tensor=name
            )
    groups: dict[object, list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            groups.setdefault(_place(tensor), []).append(name)
    ties = {name: tuple(group) for group in groups.values() if len(group) > 1 for name in group}
    layout = tuple((name, t.data_ptr(), t.dtype, tuple(t.shape), t.stride()) for name, t in tensors.items())
    if known is None or known.layout != layout:
        _refuse_overlaps({group[0]: tensors[group[0]] for group in groups.values()})
    return LiveState(tensors, specs, ties, layout)


def bits(tensor: Tensor) -> Tensor:
    """The same memory as integers of the same width. Copies and comparisons of anything else are not exact: comparing
    misses -0.0 and NaN payloads, and copying strided bools turns every byte but 0 into 1.
    """
    return tensor.detach().view(_INTEGERS[tensor.element_size()])


def put(live: Tensor, new: Tensor) -> None:
    """Copy `new` into the memory of `live` (equal dtype and shape): any stride, any device, every bit."""
    if live.numel():
        with torch.no_grad():
            bits(live).copy_(bits(new))


_KEEP_OUT = "make it a plain tensor in a parameter or buffer, or keep it out of state_dict()"


def not_writable(name: str, tensor: Tensor) -> str | None:
    """Why a tensor with plain bytes can still not be written element by element, or None."""
    if tensor.is_conj() or tensor.is_neg():
        return f"tensor {name!r} is a lazily conjugated or negated view: register its resolve_conj() or resolve_neg()"
    dims = sorted((stride, n) for stride, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1)
    reach = 0
    for stride, n in dims if tensor.numel() else []:
        if stride <= reach:
            return f"tensor {name!r} has elements that share memory (an expanded view): register its contiguous()"
        reach += stride * (n - 1)
    return None


def _storage(tensor: Tensor) -> tuple[torch.device, int] | None:
    try:
        return tensor.device, tensor.untyped_storage().data_ptr()
    except (RuntimeError, ValueError):  # sparse, or not initialized: nobody's memory is in there
        return None


def _place(tensor: Tensor) -> tuple[object, ...]:
    """Equal for two tensors that are the same memory seen in the same way (strides of dims of size 1 don't count)."""
    strides = tuple(stride if n > 1 else 0 for stride, n in zip(tensor.stride(), tensor.shape, strict=True))
    return tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), strides


def _reach(tensor: Tensor) -> tuple[int, int]:
    """Addresses of the first byte and behind the last one."""
    last = sum(stride * (n - 1) for stride, n in zip(tensor.stride(), tensor.shape, strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _refuse_overlaps(tensors: dict[str, Tensor]) -> None:
    """Raise NotRefittable if two of them share some bytes: writing one would change the other's verified content."""
    by_device: dict[torch.device, list[tuple[int, int, str]]] = {}
    for name, tensor in tensors.items():
        by_device.setdefault(tensor.device, []).append((*_reach(tensor), name))
    for spans in by_device.values():
        spans.sort()
        if all(one[1] <= two[0] for one, two in pairwise(spans)):
            continue
        run: list[tuple[int, int, str]] = []
        run_end = 0
        for span in spans:
            if span[0] >= run_end:
                _refuse_shared_bytes(run, tensors)
                run = []
            run.append(span)
            run_end = max(run_end, span[1])
        _refuse_shared_bytes(run, tensors)


def _refuse_shared_bytes(spans: list[tuple[int, int, str]], tensors: dict[str, Tensor]) -> None:
    """The exact test for spans that touch each other: interleaved columns of one matrix share a span but no byte."""
    if len(spans) < 2:
        return
    base = spans[0][0]
    used = torch.zeros(max(end for _, end, _ in spans) - base, dtype=torch.bool)

    def bytes_of(start: int, name: str) -> Tensor:
        tensor, item = tensors[name], tensors[name].element_size()
        return used.as_strided((*tensor.shape, item), (*(s * item for s in tensor.stride()), 1), start - base)

    for start, _, name in spans:
        if bytes_of(start, name).any():
            used.zero_()
            bytes_of(start, name).fill_(True)
            other = next(n for s, _, n in spans if n != name and bytes_of(s, n).any())
            raise NotRefittable(
                f"{name!r} and {other!r} are different views of overlapping memory: writing one changes the other",
                next="give each its own memory, for example by .clone(), or tie them as one and the same tensor",
                tensor=name,
            )
        bytes_of(start, name).fill_(True)
