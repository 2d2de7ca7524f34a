"""A live engine, whose weights can be replaced while it stays in memory: what the rest of the worker needs of TensorRT.

`trt_live.TensorRTLive` is the real one; tests have a twin that computes with torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class LiveEngine(Protocol):
    """Used by one thread at a time, but for `run`. Memory given to `set` must stay valid until `unset` or `close`."""

    @property
    def weights(self) -> frozenset[str]:
        """Name of every weight that can be replaced."""
        ...

    @property
    def outputs(self) -> tuple[str, ...]: ...

    def prototype(self, name: str) -> tuple[torch.dtype, int]:
        """dtype and number of elements of a weight."""
        ...

    def set(self, name: str, value: Tensor) -> bool:
        """Take `value`'s memory, contiguous and on the engine's device, as the weight's at every `refit` from now on.

        Returns False when the engine rejects it; nothing changed then.
        """
        ...

    def unset(self, name: str) -> bool:
        """Leave the weight alone from now on. Returns False when it was not set."""
        ...

    def missing(self) -> list[str]:
        """Weights that have to be set too before those that are set can be put in."""
        ...

    def refit(self) -> bool:
        """Enqueue putting in all weights that are set, between the requests before and after it.

        Returns False when that failed: the engine may then hold some of them.
        """
        ...

    def run(self, inputs: Sequence[Tensor | int]) -> list[Tensor]:
        """One request on the current stream. Raises: RuntimeError for inputs that the engine does not take."""
        ...

    def serialize(self, *, with_weights: bool = True) -> bytes:
        """The engine with its present weights, or without those that can be replaced. Slow."""
        ...

    def content(self) -> bytes:
        """The engine with its present weights in a form that does not depend on how they got in. Slow."""
        ...

    def close(self) -> None: ...
