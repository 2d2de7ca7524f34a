"""Low-rank adapters of a version, as trainers hold them: what the version is, about, relative to the one before any."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from ..common.delta import as_bytes
from ..common.errors import UsageError
from ..common.limits import LIMITS
from ..common.lowrank import DTYPES, RANK_MAX, Factors
from ..common.types import TensorSpec

if TYPE_CHECKING:
    import torch

    #: B [rows, rank], A [rank, cols] and the scale of their product
    Adapter: TypeAlias = tuple[torch.Tensor, torch.Tensor, float]


def factors_of(adapters: Mapping[str, Adapter], specs: Mapping[str, TensorSpec]) -> dict[str, Factors]:
    """By the name of the merged tensor, which is a matrix [rows, cols]. Raises: UsageError naming it."""
    return {name: _factors(name, *adapter, specs.get(name)) for name, adapter in adapters.items()}


def _factors(name: str, b: torch.Tensor, a: torch.Tensor, scale: float, spec: TensorSpec | None) -> Factors:
    from ..common.tensors import dtype_text, tensor_bytes

    def refused(why: str) -> UsageError:
        return UsageError(f"the adapter of tensor {name!r}: {why}", next="pass (B, A, scale) of a merged float matrix")

    if spec is None:
        raise refused("the checkpoint has no such tensor")
    if len(spec.shape) != 2 or spec.dtype not in DTYPES:
        raise refused(f"{spec} is no matrix of {', '.join(DTYPES)}")
    rows, cols = spec.shape
    rank = a.shape[0] if a.dim() == 2 else 0
    if tuple(b.shape) != (rows, rank) or tuple(a.shape) != (rank, cols):
        raise refused(f"B {list(b.shape)} times A {list(a.shape)} does not make {list(spec.shape)}")
    if a.dtype != b.dtype or dtype_text(a.dtype) not in DTYPES:
        a, b = a.float(), b.float()
    if rank > RANK_MAX or cols * spec.item_bytes > LIMITS.block_bytes:
        raise refused(f"rank {rank} or {cols} columns are too many")
    of_a, of_b = (as_bytes(tensor_bytes(each.contiguous())) for each in (a, b))
    try:
        return Factors(of_a, of_b, dtype_text(a.dtype), rows, cols, rank, float(np.float32(scale)))
    except ValueError as error:
        raise refused(str(error)) from None
