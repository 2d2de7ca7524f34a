"""The serving side.

follow   accepts or refuses records        receive, stage  rebuild a version and verify it, the engine untouched
apply    switches the engine, whole        pursue          the state machine between log and engine
gate     requests hold one version         engine          what an engine must do; torch_engine, file_engine
board    status of this worker             acks, heart     tell the fleet
worker   the Worker and its loop           http, metrics   tell probes and Prometheus
cli      `refleet-worker`                 doctor         can this machine serve?
upkeep   what a served version leaves to do: settled, older ones removed, now and then one written whole
early    receives a payload while it is written; early_decode decodes it; staging: from goal to bytes in the store
turn     one at a time of the workers that share a store

TensorRT, in the order in which a version flows:
recipe     what a factory returns           tensorrt_engine  the engine: which way a version goes in
torch_trt, graph_capture, lowering          what torch_tensorrt makes of a module
plan_build, refit_plan                      how each engine weight follows from a version's tensors, and the proof
device_copy, device_digest                  the version's tensors on the GPU, and what they really hold
live_engine, trt_live, resident             engines whose weights are replaced while they serve
trt_model, trt_make, compare, official      built models, their proof against PyTorch, torch_tensorrt's own way
bundle*, graph_text, signature              all of it on disk
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .file_engine import FileEngine
    from .http import HttpFront
    from .recipe import Recipe
    from .tensorrt_engine import TensorRTEngine
    from .torch_engine import TorchEngine
    from .worker import Worker

__all__ = ["Worker", "TensorRTEngine", "Recipe", "TorchEngine", "FileEngine", "HttpFront"]

_HOMES = {
    "Worker": "worker", "TensorRTEngine": "tensorrt_engine", "Recipe": "recipe", "TorchEngine": "torch_engine",
    "FileEngine": "file_engine", "HttpFront": "http",
}  # fmt: skip

if not TYPE_CHECKING:  # a type checker would take it as leave to use any name

    def __getattr__(name: str) -> object:
        """Imports on first use: a worker with a file engine never pays for torch."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
        globals()[name] = found
        return found
