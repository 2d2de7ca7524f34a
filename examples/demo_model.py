"""The demo's model and data: a small network that learns to read scikit-learn's handwritten digits.

The trainer keeps fp32 weights and publishes them as bf16, as most trainers do; the workers serve the bf16 network.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH = 1024
#: weights larger than usual, so that each one moves by little of its own size: training stays lazy, deltas small
_GAIN = 2.2
_BATCH = 64
_SEED = 0


class DigitReader(nn.Module):
    """8 x 8 pixels in 0 ... 1 (flat, 64) -> 10 logits; 1.1 million weights."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.eyes = nn.Linear(64, width)
        self.middle = nn.Linear(width, width)
        self.mouth = nn.Linear(width, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        seen = functional.relu(self.eyes(pixels))
        return self.mouth(functional.relu(self.middle(seen)))  # type: ignore[no-any-return]


def served_network() -> DigitReader:
    """What a worker serves: bf16, one thread, no training. Its weights are placeholders until a version arrives."""
    torch.set_num_threads(1)
    return DigitReader().bfloat16().eval()


def probe_inputs() -> tuple[Tensor, ...]:
    """Fixed pixels, which every worker answers after each switch, before anybody else is answered."""
    return (torch.linspace(0, 1, 4 * 64).reshape(4, 64).bfloat16(),)


def answer(network: DigitReader, images: list[list[int]]) -> bytes:
    """The logits of `images` (64 grey values in 0 ... 16 each) as bytes, bf16, images x 10."""
    pixels = (torch.tensor(images, dtype=torch.float32) / 16).bfloat16()
    with torch.inference_mode():
        logits: Tensor = network(pixels)
    return bytes(logits.contiguous().view(torch.uint8).numpy())


def accuracy(logits: bytes, labels: Tensor) -> float:
    """Share of `labels` that these answers (from `answer`) get right."""
    found = torch.frombuffer(bytearray(logits), dtype=torch.bfloat16).reshape(len(labels), 10).argmax(1)
    return float((found == labels).float().mean())


@dataclass(frozen=True, slots=True)
class Digits:
    """1797 images that people wrote; a quarter of them is never trained on."""

    train_pixels: Tensor
    train_labels: Tensor
    test_images: list[list[int]]
    test_labels: Tensor


def digits() -> Digits:
    """The data set that ships with scikit-learn, shuffled with a fixed seed."""
    from sklearn.datasets import load_digits  # here: the worker processes need neither data nor scikit-learn

    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(_SEED))
    images, labels = torch.tensor(found.data)[order], torch.tensor(found.target)[order]
    tests = len(labels) // 4
    return Digits(
        train_pixels=(images[tests:] / 16).float(),
        train_labels=labels[tests:],
        test_images=images[:tests].int().tolist(),
        test_labels=labels[:tests],
    )


class Trainer:
    """Plain SGD on the cross entropy. `steps`: after so many the learning rate is down to a tenth, and stays there."""

    def __init__(self, data: Digits, *, steps: int, warm_up: int, rate: float = 0.06) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(_SEED)
        self._data, self._steps, self._warm_up, self._rate = data, steps, warm_up, rate
        self._network = DigitReader()
        for layer in (self._network.eyes, self._network.middle, self._network.mouth):
            nn.init.normal_(layer.weight, std=_GAIN / layer.in_features**0.5)
            nn.init.zeros_(layer.bias)
        self._batches = torch.Generator().manual_seed(_SEED)
        self.step = 0

    @property
    def version(self) -> str:
        return f"step-{self.step}"

    def train_step(self) -> None:
        """One batch."""
        done = min(self.step / self._steps, 1.0)
        warm = min((self.step + 1) / self._warm_up, 1.0) ** 2
        rate = self._rate * warm * (1 - 0.9 * done)
        chosen = torch.randint(0, len(self._data.train_labels), (_BATCH,), generator=self._batches)
        loss = functional.cross_entropy(self._network(self._data.train_pixels[chosen]), self._data.train_labels[chosen])
        loss.backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():  # by hand: torch.optim would first import a compiler, for seconds
            for parameter in self._network.parameters():
                assert parameter.grad is not None
                parameter.sub_(parameter.grad, alpha=rate)
                parameter.grad = None
        self.step += 1

    def weights(self) -> dict[str, Tensor]:
        """What is published: the weights as they are now, in bf16."""
        return {name: tensor.detach().bfloat16() for name, tensor in self._network.state_dict().items()}

    def answer(self) -> bytes:
        """What the published weights answer to the test images in this process: the workers must say the same."""
        return answer(copy.deepcopy(self._network).bfloat16().eval(), self._data.test_images)
