"""Compare what an engine answers with what PyTorch computes from the same weights and inputs.

The measure of a floating output is ||engine - torch|| / ||torch||, in double precision: one number per output that does
not depend on its size, and that a wrong weight moves far more than rounding does. NaN and infinity must be in the same
places. For integers and booleans it is the share of elements that differ: the order of almost equal logits may.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..common.errors import ProbeMismatch

#: what rounding alone may do, as seen over the families of docs/tensorrt.md: (least, most) tolerance
_FLOAT = {
    torch.float64: (1e-6, 1e-3),
    torch.float32: (2e-3, 2e-2),
    torch.float16: (1e-2, 1e-1),
    torch.bfloat16: (4e-2, 2e-1),
}
_OTHER = (1e-2, 1e-2)
#: an engine's tolerance is so many times what was measured right after it was built
_MARGIN = 4.0


@dataclass(frozen=True, slots=True)
class Difference:
    """One output: where it is in the answer, and how far it is from PyTorch's. `error` may be infinite."""

    where: str
    dtype: torch.dtype
    error: float


def differences(answer: object, expected: object) -> list[Difference]:
    """One for each tensor in `expected`. Raises: ProbeMismatch when the answers are not built alike."""
    found, wanted = _leaves(answer), _leaves(expected)
    if [where for where, _ in found] != [where for where, _ in wanted]:
        raise ProbeMismatch("the engine's answer has other parts than PyTorch's")
    result = []
    for (where, got), (_, want) in zip(found, wanted, strict=True):
        if got.shape != want.shape or got.dtype != want.dtype:
            raise ProbeMismatch(
                f"output {where} is {_text(got)} where PyTorch gives {_text(want)}",
                next="the engine and the module are not the same model",
            )
        result.append(Difference(where, want.dtype, _error(got, want)))
    return result


def tolerance_of(dtype: torch.dtype, measured: float) -> float:
    """The tolerance for an output of an engine that was `measured` off by so much when it was built."""
    least, most = _FLOAT.get(dtype, _OTHER)
    return min(max(least, _MARGIN * measured), most)


def check(found: Iterable[Difference], measured: dict[str, float], *, tolerance: float | None) -> None:
    """Raise ProbeMismatch naming the worst output that is farther from PyTorch than its tolerance.

    `measured`: errors right after building, by output; `tolerance` overrides what follows from them.
    """
    excess = []
    for difference in found:
        limit = tolerance_of(difference.dtype, measured.get(difference.where, 0.0)) if tolerance is None else tolerance
        if not difference.error <= limit:
            excess.append((difference.error / limit, difference, limit))
    if excess:
        _, worst, limit = max(excess, key=lambda pair: pair[0])
        raise ProbeMismatch(
            f"output {worst.where} is {worst.error:.2g} away from PyTorch on equal weights, {limit:.2g} is tolerated"
        )


def _error(got: Tensor, want: Tensor) -> float:
    if want.numel() == 0:
        return 0.0
    if not want.is_floating_point() and not want.is_complex():
        return float((got != want).double().mean())
    one, two = got.detach().double(), want.detach().double()
    if not bool((one.isfinite() == two.isfinite()).all()):
        return float("inf")
    odd = ~two.isfinite()
    if bool(odd.any()) and not torch.equal(one[odd].nan_to_num(1.5), two[odd].nan_to_num(1.5)):
        return float("inf")
    one, two = one.masked_fill(odd, 0), two.masked_fill(odd, 0)
    size, off = float(two.norm()), float((one - two).norm())
    return off / size if size else (0.0 if off == 0 else float("inf"))


def _leaves(value: object) -> list[tuple[str, Tensor]]:
    leaves, _ = pytree.tree_flatten_with_path(value)
    return [(pytree.keystr(path) or "0", leaf) for path, leaf in leaves if isinstance(leaf, Tensor)]


def _text(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
