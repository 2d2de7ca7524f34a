"""A small Llama-style model in plain torch, real text for it, and a task whose answers can be checked."""

from __future__ import annotations

import re
import sysconfig
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

#: the task's tokens: `COUNT n n+1 ...`; words follow
UNKNOWN, COUNT, NUMBERS = 0, 1, 100
FIRST_NUMBER, FIRST_WORD = 2, 2 + NUMBERS

Cache = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Size:
    """`BASE` has 56 tensors and 23.5 M parameters, half of them in MLPs; `QUICK` is only to see that things run."""

    vocabulary: int
    width: int
    wide: int
    layers: int
    heads: int


BASE = Size(vocabulary=8192, width=512, wide=1408, layers=6, heads=8)
QUICK = Size(vocabulary=512, width=64, wide=176, layers=2, heads=4)


class Layer(nn.Module):
    """Attention with rotary positions, then a gated MLP, each behind its RMS norm."""

    def __init__(self, size: Size):
        super().__init__()
        self.heads = size.heads
        for name in ("q", "k", "v", "o"):
            self.register_module(name, nn.Linear(size.width, size.width, bias=False))
        self.gate, self.up = (nn.Linear(size.width, size.wide, bias=False) for _ in range(2))
        self.down = nn.Linear(size.wide, size.width, bias=False)
        self.norm_in, self.norm_mlp = nn.RMSNorm(size.width), nn.RMSNorm(size.width)

    def forward(self, x: Tensor, turn: Tensor, before: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        rows, length, width = x.shape
        inside = self.norm_in(x)
        q, k, v = (
            linear(inside).view(rows, length, self.heads, -1).transpose(1, 2) for linear in (self.q, self.k, self.v)
        )
        q, k = rotate(q, turn), rotate(k, turn)
        if before is not None:
            k, v = torch.cat((before[0], k), 2), torch.cat((before[1], v), 2)
        # with a cache there is one new token, which sees everything
        seen = functional.scaled_dot_product_attention(q, k, v, is_causal=before is None)
        x = x + self.o(seen.transpose(1, 2).reshape(rows, length, width))
        inside = self.norm_mlp(x)
        return x + self.down(functional.silu(self.gate(inside)) * self.up(inside)), k, v


class Llama(nn.Module):
    """Embedding (tied to the output), layers, a last norm."""

    def __init__(self, size: Size, *, seed: int):
        super().__init__()
        self.size = size
        self.embed = nn.Embedding(size.vocabulary, size.width)
        self.layers = nn.ModuleList(Layer(size) for _ in range(size.layers))
        self.norm = nn.RMSNorm(size.width)
        generator = torch.Generator().manual_seed(seed)
        for name, weights in self.named_parameters():
            if weights.dim() > 1:
                deep = name.endswith(("o.weight", "down.weight"))
                std = 0.02 / (2 * size.layers) ** 0.5 if deep else 0.02
                weights.data.normal_(0, std, generator=generator)

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """Logits of `tokens`, and the keys and values so far. `cache`: those of the tokens before them."""
        start = cache[0][0].shape[2] if cache else 0
        turn = angles(start, tokens.shape[1], self.size.width // self.size.heads)
        x, after = self.embed(tokens), []
        for n, layer in enumerate(self.layers):
            x, k, v = layer(x, turn, cache[n] if cache else None)
            after.append((k, v))
        return functional.linear(self.norm(x), self.embed.weight), after


def angles(start: int, count: int, width: int) -> Tensor:
    speeds = 10000.0 ** (-torch.arange(0, width, 2) / width)
    return torch.arange(start, start + count)[:, None] * speeds


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    cos, sin = turn.cos(), turn.sin()
    return torch.cat((first * cos - second * sin, first * sin + second * cos), -1)


# ---------------------------------------------------------------------- text


def texts(size: Size, files: int) -> tuple[Tensor, Tensor]:
    """Token ids of two real texts with one vocabulary: modules of the standard library, and its asyncio package."""
    library = Path(sysconfig.get_path("stdlib"))
    general = _words(sorted(library.glob("*.py"))[:files])
    special = _words(sorted((library / "asyncio").glob("*.py"))[:files])
    common = Counter(general + special).most_common(size.vocabulary - FIRST_WORD)
    ids = {word: n for n, (word, _) in enumerate(common, FIRST_WORD)}
    return tuple(torch.tensor([ids.get(word, UNKNOWN) for word in words]) for words in (general, special))  # type: ignore[return-value]


def _words(paths: list[Path]) -> list[str]:
    return re.findall(r"\w+|[^\w\s]|\n *| +", "".join(path.read_text("utf-8", "replace") for path in paths))


def pieces(text: Tensor, rows: int, length: int, generator: torch.Generator) -> Tensor:
    """Random pieces of a text."""
    starts = torch.randint(0, len(text) - length, (rows,), generator=generator)
    return text[starts[:, None] + torch.arange(length)]


# ---------------------------------------------------------------------- task


def counting(rows: int, length: int, generator: torch.Generator, *, noise: float) -> Tensor:
    """Rows of `COUNT n n+1 n+2 ...`; a share `noise` of the numbers is wrong, so that a model is never sure."""
    starts = torch.randint(0, NUMBERS, (rows, 1), generator=generator)
    numbers = (starts + torch.arange(length - 1)) % NUMBERS
    wrong = torch.rand(numbers.shape, generator=generator) < noise
    numbers[wrong] = torch.randint(0, NUMBERS, (int(wrong.sum()),), generator=generator)
    return torch.cat((torch.full((rows, 1), COUNT), numbers + FIRST_NUMBER), 1)


def rewards(prompts: Tensor, answers: Tensor) -> Tensor:
    """Share of the answer that counts on from the prompt's last number; a number out of order is worth a fifth."""
    right = (prompts[:, -1:] - FIRST_NUMBER + 1 + torch.arange(answers.shape[1])) % NUMBERS + FIRST_NUMBER
    number = (answers >= FIRST_NUMBER) & (answers < FIRST_WORD)
    return (0.8 * (answers == right) + 0.2 * number).mean(1)
