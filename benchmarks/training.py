"""The steps that make checkpoints: next-token training, GRPO, LoRA. fp32 master weights and AdamW throughout."""

from __future__ import annotations

import copy

import torch
from llama import Llama, counting, rewards
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

Weights = dict[str, Tensor]


class Run:
    """A model and its optimizer at one learning rate; `branch` goes on from here at another one."""

    def __init__(self, model: Llama, lr: float, *, seed: int):
        self.model, self.generator = model, torch.Generator().manual_seed(seed)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.999), weight_decay=0.01)

    def branch(self, lr: float) -> Run:
        """The same weights, Adam state and random numbers."""
        made = Run(copy.deepcopy(self.model), lr, seed=0)
        made.generator.set_state(self.generator.get_state())
        made.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        for group in made.optimizer.param_groups:
            group["lr"] = lr
        return made

    def step(self, loss: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def weights(self, dtype: torch.dtype) -> Weights:
        return {name: value.detach().to(dtype, copy=True) for name, value in self.model.named_parameters()}


def next_token(logits: Tensor, tokens: Tensor) -> Tensor:
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def supervised(run: Run, tokens: Tensor) -> float:
    loss = next_token(run.model(tokens)[0], tokens)
    run.step(loss)
    return loss.item()


@torch.no_grad()
def sample(model: Llama, prompts: Tensor, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Answers drawn from the model at temperature 1, and the log probability of each token."""
    tokens, cache, drawn, scores = prompts, None, [], []
    for _ in range(length):
        logits, cache = model(tokens, cache)
        chances = logits[:, -1].log_softmax(-1)
        tokens = torch.multinomial(chances.exp(), 1, generator=generator)
        drawn.append(tokens)
        scores.append(chances.gather(1, tokens))
    return torch.cat(drawn, 1), torch.cat(scores, 1)


def grpo(run: Run, *, prompts: int, group: int, length: int, clip: float = 0.2) -> float:
    """One GRPO step on the counting task: sample a group of answers for each prompt, normalize their rewards inside
    the group, and take one step on the clipped objective. Returns the mean reward."""
    asked = counting(prompts, 4, run.generator, noise=0.0).repeat_interleave(group, 0)
    answers, old = sample(run.model, asked, length, run.generator)
    reward = rewards(asked, answers)
    grouped = reward.view(prompts, group)
    advantage = (grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)
    logits, _ = run.model(torch.cat((asked, answers), 1))
    chances = logits[:, asked.shape[1] - 1 : -1].log_softmax(-1)
    ratio = (chances.gather(2, answers[:, :, None])[:, :, 0] - old).exp()
    weight = advantage.view(-1, 1)
    run.step(-torch.minimum(ratio * weight, ratio.clamp(1 - clip, 1 + clip) * weight).mean())
    return reward.mean().item()


class Lora:
    """Low-rank adapters on q and v of a frozen model."""

    def __init__(self, model: Llama, lr: float, *, rank: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.adapters = {}
        for name, weights in self.model.named_parameters():
            if name.endswith((".q.weight", ".v.weight")):
                a = torch.empty(rank, weights.shape[1]).normal_(0, weights.shape[1] ** -0.5, generator=generator)
                self.adapters[name] = (a.requires_grad_(), torch.zeros(weights.shape[0], rank, requires_grad=True))
        parts = [part for pair in self.adapters.values() for part in pair]
        self.optimizer = torch.optim.AdamW(parts, lr=lr, weight_decay=0.0)

    def merged(self) -> Weights:
        """W + 2 B A (alpha = 2 x rank) of every adapted tensor."""
        own = dict(self.model.named_parameters())
        return {name: own[name] + 2 * (b @ a) for name, (a, b) in self.adapters.items()}

    def step(self, tokens: Tensor) -> float:
        loss = next_token(functional_call(self.model, self.merged(), (tokens,))[0], tokens)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def weights(self, dtype: torch.dtype) -> Weights:
        all_weights = dict(self.model.named_parameters()) | self.merged()
        return {name: value.detach().to(dtype, copy=True) for name, value in all_weights.items()}


def ema(average: Weights, weights: Weights, decay: float) -> None:
    """Moves `average` (fp32) towards `weights`."""
    for name, value in average.items():
        value.lerp_(weights[name], 1 - decay)
