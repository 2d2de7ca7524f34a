"""Small models and their exported graphs: what torch.export makes of common layers, shapes and arguments."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU("tanh"), nn.Dropout(0.5))
        self.register_buffer("mask", torch.tensor([True, False] * 4))

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return self.parts(input).masked_fill(self.mask, float("-inf")).clamp(min=-0.0)


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1, stride=2), nn.BatchNorm2d(4)
        self.bn.running_mean = torch.randn(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x.to(memory_format=torch.channels_last)))).mean((2, 3), dtype=torch.float64)


class Embed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(11, 4, padding_idx=0), nn.Embedding(9, 4)
        self.first = nn.Parameter(torch.randn(1, 1, 4))

    def forward(self, tokens: Tensor) -> Tensor:
        found = torch.cat([self.first.expand(tokens.shape[0], -1, -1), self.words(tokens)], dim=1)
        return found + self.places(torch.arange(found.shape[1], device=tokens.device))


class Attend(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(x.shape[0], x.shape[1], 3, 2, 4).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


class Dynamic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        n = x.shape[0]
        scaled = self.line(x) * torch.sym_float(n) ** 0.5 + n / 2
        pairs = scaled[:, None, 1:3].expand(n, 2, 2).reshape(n * 2, -1)
        return pairs, x.new_ones(torch.sym_max(n, 3), 5 - (n // -2))


class Many(nn.Module):
    def forward(self, x: Tensor, *, scale: Tensor, rest: dict[str, list[Tensor]]) -> dict[str, object]:
        (a, b), (top, places) = rest["pair"], torch.topk(x * scale, 2, dim=-1)
        return {
            "top": (top, places),
            "sliced": x[1:, ::2, ...],
            "picked": x[:, torch.tensor([0, 2])],
            "sum": [a + b, a],
        }


class Taken(nn.Module):
    def forward(self, x: Tensor, places: Tensor) -> tuple[Tensor, ...]:
        last = torch.div(x, 3.0, rounding_mode="floor")[:, :, places]
        both = (x > 0) & (x < math.inf)
        return last, both, torch.einsum("abc,abd->cd", x, x), torch.full((2,), float("nan")), x.add(x, alpha=2)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


BATCH = {0: torch.export.Dim("batch", min=2, max=64)}
MODELS: dict[str, tuple[type[nn.Module], tuple[Any, ...], dict[str, Any], Any]] = {
    "norm": (Norm, (randn(5, 6),), {}, None),
    "conv": (Conv, (randn(2, 3, 8, 8),), {}, None),
    "embed": (Embed, (torch.tensor([[1, 2, 0], [10, 0, 3]]),), {}, {"tokens": BATCH}),
    "attend": (Attend, (randn(2, 3, 8),), {}, None),
    "dynamic": (Dynamic, (randn(5, 4),), {}, {"x": BATCH}),
    "many": (Many, (randn(3, 4),), {"scale": randn(4), "rest": {"pair": [randn(2), randn(2)]}}, None),
    "taken": (Taken, (randn(2, 3, 4), torch.tensor([3, 0])), {}, None),
}


@cache
def exported(name: str) -> Any:
    kind, args, kwargs, dynamic = MODELS[name]
    torch.manual_seed(5)
    program = torch.export.export(kind().eval(), args, kwargs, dynamic_shapes=dynamic)
    return program.run_decompositions().module(check_guards=False)
