"""A checkpoint in this process: the tensors of a trainer's state_dict, read where they are.

The tensors are not copied first, so training must not go on before `confirm` returned. What slips through is noticed
in two ways. torch counts in-place changes of a tensor, but not those through `.data`, and none at all by a fused
optimizer (torch 2.13: `AdamW(fused=True)` leaves the counter alone). So a sample of every tensor is compared too: a
step that changes 1 % of the elements goes unseen in one tensor of 30 000.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..common.digest import digest_of
from ..common.errors import CheckpointChanged, LimitExceeded, UnreadableCheckpoint
from ..common.limits import LIMITS
from ..common.tensors import bits_of, spec_of, tensor_blocks, tensor_bytes
from ..common.types import TensorSpec

if TYPE_CHECKING:
    from typing import Self

    import torch

SAMPLE_ELEMENTS = 1024


class TensorCheckpoint:
    """A mapping of names to torch tensors, on the CPU or on a GPU. Only references are kept."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        self.source = f"a state_dict of {len(tensors)} tensors"
        if not tensors:
            raise UnreadableCheckpoint("the state_dict holds no tensors", next="pass model.state_dict()")
        if len(tensors) > LIMITS.tensors:
            raise LimitExceeded(f"{len(tensors)} tensors exceed the limit of {LIMITS.tensors}", about=self.source)
        specs = {name: spec_of(name, tensor) for name, tensor in tensors.items()}
        self.specs: dict[str, TensorSpec] = {name: specs[name] for name in sorted(specs, key=str.encode)}
        self._tensors = {name: tensors[name] for name in self.specs}
        self._marks = {name: self._mark(name) for name in self.specs}

    def blocks(self, name: str, *, block_bytes: int = LIMITS.block_bytes) -> Iterator[memoryview]:
        with self._naming(name):
            yield from tensor_blocks(self._tensors[name], block_bytes=block_bytes)

    def read_into(self, name: str, out: NDArray[np.uint8]) -> None:
        start = 0
        for block in self.blocks(name):
            out[start : start + len(block)] = np.frombuffer(block, np.uint8)
            start += len(block)

    def confirm(self) -> None:
        for name, mark in self._marks.items():
            if self._mark(name) != mark:
                raise CheckpointChanged(
                    f"tensor {name!r} changed while the state_dict was being published",
                    about=self.source,
                    tensor=name,
                    next="publish between two training steps, or pass copies: {k: v.clone() for k, v in ...}",
                )

    def close(self) -> None:
        self._tensors, self._marks = {}, {}

    def _mark(self, name: str) -> tuple[object, ...]:
        with self._naming(name):
            return _mark(self._tensors[name])

    @contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        """Errors say which tensor it was; what torch can't do with it (ZeroTensor, a lost GPU) is an error of ours."""
        try:
            yield
        except (UnreadableCheckpoint, RuntimeError) as error:
            reason = error.what if isinstance(error, UnreadableCheckpoint) else str(error).strip()[:300]
            raise UnreadableCheckpoint(f"tensor {name!r}: {reason}", about=self.source, tensor=name) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _mark(tensor: torch.Tensor) -> tuple[object, ...]:
    """What changes with the tensor: where and how it lies in memory, torch's count of changes, a sample."""
    import torch

    version = None if tensor.is_inference() else tensor._version
    layout = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.device)
    if tensor.numel() <= SAMPLE_ELEMENTS:
        return (version, layout, digest_of(tensor_bytes(tensor)))
    positions = tuple(torch.from_numpy(axis).to(tensor.device) for axis in _positions(tuple(tensor.shape)))
    return (version, layout, digest_of(tensor_bytes(bits_of(tensor)[positions])))


@lru_cache(maxsize=256)  # a model has few different shapes
def _positions(shape: tuple[int, ...]) -> tuple[NDArray[np.int64], ...]:
    """SAMPLE_ELEMENTS positions in a tensor, as one array per axis, always the same."""
    count = int(np.prod(shape, dtype=np.int64))
    flat = np.random.default_rng(0).integers(count, size=SAMPLE_ELEMENTS)
    return tuple(axis.astype(np.int64) for axis in np.unravel_index(flat, shape))
