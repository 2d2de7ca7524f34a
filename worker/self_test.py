"""Two versions of a tiny model, in and back: does this machine refit a TensorRT engine, fast, and to the bit?"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..common.digest import tensor_digest
from ..common.errors import RefleetError
from ..common.messages import Serving
from ..common.tensors import spec_of, tensor_bytes
from ..common.types import Manifest, TensorEntry
from . import compare
from .machine import Trial
from .probe import digest_value
from .recipe import Recipe
from .tensorrt_engine import TensorRTEngine
from .torch_trt import Compiled, compiled
from .trt_make import Build
from .trt_model import Load, OnStep


@dataclass(frozen=True, slots=True)
class InMemory:
    """A staged version whose bytes lie in memory."""

    serving: Serving
    manifest: Manifest
    tensors: Mapping[str, bytes]
    restructure: bool = False

    def read(self, name: str) -> memoryview:
        return memoryview(bytearray(self.tensors[name]))


@dataclass(frozen=True, slots=True)
class Example:
    """A version, and what PyTorch answers with it."""

    staged: InMemory
    answer: Any


class Tiny(nn.Module):
    """Convolution, BatchNorm with an eps of its own, a linear layer: a kernel, a folded value, a matrix and biases."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, eps=1e-3), nn.Linear(8, 5)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for tensor in (*self.parameters(), *self.buffers()):
                if tensor.is_floating_point():
                    tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.5)
            # small variances, so that another eps would be seen
            self.norm.running_var.copy_(0.002 + 0.01 * torch.rand(8, generator=generator))  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.norm(self.conv(x)))
        answer: Tensor = self.head(hidden.mean((2, 3)))
        return answer


def example(
    module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object], *, name: str, seq: int
) -> Example:
    """The module's weights as a version, and its answer."""
    state = {key: tensor.detach().cpu() for key, tensor in module.state_dict().items()}
    tensors = {key: bytes(tensor_bytes(tensor)) for key, tensor in state.items()}
    manifest = Manifest.of(TensorEntry(spec_of(key, state[key]), tensor_digest(data)) for key, data in tensors.items())
    with torch.no_grad():
        answer = module(*args, **kwargs)
    return Example(InMemory(Serving(name, 1, seq, manifest.fingerprint), manifest, tensors), answer)


def self_test(
    engine: TensorRTEngine, args: tuple[object, ...], kwargs: Mapping[str, object], one: Example, two: Example
) -> Trial:
    """Put version one, two, and one again into the engine, and compare whatever can be compared.

    The engine should have been made with other weights than those of `one`. Never raises what an engine may raise.
    """
    applied: list[str] = []
    seconds: list[tuple[str, float]] = []
    seen: list[tuple[bytes, bytes | None]] = []
    problem = after = ""
    try:
        for what, version in (("first refit", one), ("second refit", two), ("third refit", one)):
            started = time.perf_counter()
            _put(engine, version)
            seconds.append((what, time.perf_counter() - started))
            applied.append(engine.applied)
            problem = _held(engine, version)
            if problem:
                break
            engine.probe()
            answer = engine(*args, **kwargs)
            found = compare.differences(answer, version.answer)
            compare.check(found, {difference.where: 1.0 for difference in found}, tolerance=None)
            seen.append((digest_value(answer), engine.content_digest()))
            engine.served(version.staged.serving)
        problem = problem or _compared(seen)
    except RefleetError as error:
        problem, after = error.what, error.next
    except Exception as error:  # whatever TensorRT and torch raise
        problem = f"{type(error).__name__}: {error}"
    return Trial(problem=problem, next=after, applied=tuple(applied), seconds=tuple(seconds))


def _put(engine: TensorRTEngine, version: Example) -> None:
    """The version goes in, as a worker puts it in."""
    staged = version.staged
    engine.check(staged.manifest)
    names = frozenset(staged.manifest.by_name)
    engine.prepare(staged, names)
    engine.apply(staged, names)
    if any(isinstance(leaf, Tensor) and leaf.is_cuda for leaf in pytree.tree_leaves(version.answer)):
        torch.cuda.synchronize()  # a refit is enqueued only: its time is told


def _held(engine: TensorRTEngine, version: Example) -> str:
    """What is wrong with what the engine says it holds, or ""."""
    wanted = {name: entry.digest for name, entry in version.staged.manifest.by_name.items()}
    other = [name for name, digest in engine.read_back(sorted(wanted)) if digest != wanted[name]]
    return f"read back, tensor {other[0]!r} has other bytes than the version" if other else ""


def _compared(seen: list[tuple[bytes, bytes | None]]) -> str:
    """What is wrong with the digests of answers and contents after A, B, A, or ""."""
    first, other, again = seen
    if first[0] == other[0]:
        return "two versions with entirely other weights answer alike: the refit has no effect"
    if first[0] != again[0]:
        return "after A, B, A the engine does not answer bit for bit as with A before"
    if first[1] is None or first[1] == other[1]:
        return "the engine's content digest does not tell two versions apart"
    if first[1] != again[1]:
        return "after A, B, A the engine's content digest is another than with A before"
    return ""


def on_device(
    device: torch.device, *, build: Build = compiled, load: Load | None = None, say: OnStep = lambda _text: None
) -> Trial:
    """The self-test with an engine built for the device. Raises: what building an engine raises."""
    args = (torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).to(device),)
    one, two = (example(Tiny(n).to(device).eval(), args, {}, name=f"test-{n}", seq=n) for n in (1, 2))
    compile_s = 0.0

    def timed(recipe: Recipe) -> Mapping[str, Compiled]:
        nonlocal compile_s
        started = time.perf_counter()
        engines = build(recipe)
        compile_s = time.perf_counter() - started
        return engines

    started = time.perf_counter()
    recipe = Recipe(Tiny(3).eval(), args, options={"min_block_size": 1})
    engine = TensorRTEngine(recipe, device=device, build=timed, load=load, on_step=say)
    plan_s = time.perf_counter() - started - compile_s
    try:
        trial = self_test(engine, args, {}, one, two)
    finally:
        engine.close()
    times = (("compile", compile_s), ("plan and its proof", plan_s), *trial.seconds)
    return replace(trial, seconds=times)
