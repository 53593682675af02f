"""A flow whose velocity is known: numbers from two equally likely normal distributions, and what gradients say about a bias.

    data     x0 from N(-2, .5^2) or N(2, .5^2);  x_t = (1 - t) x0 + t x1 with x1 from N(0, 1)
    v        E[x1 - x0 | x_t] + b(t), where the bias b is all that is trained and begins at 0
    reward   -(x - 3)^2 of the finished number

Early steps decide between the two distributions, late ones hardly move the number. For gradients every prompt has a bias of its
own at every step, so that one backward pass gives one gradient per prompt and step: their signal-to-noise ratio over prompts,
|mean| / std, says how much one prompt's rollout tells about that step. For training all prompts and steps share one bias.
"""

from __future__ import annotations

import pathlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gruppo.core.collate import collate
from gruppo.core.reduce import step_mean, weigh
from gruppo.policies.flow import Course, FlowPolicy
from gruppo.policies.kernels import FlowSDE, Kernel
from gruppo.policies.schedules import linear
from gruppo.recipe import Recipe
from gruppo.types import Batch, Group, Task

MEANS, SPREAD, GOAL, SHIFT = (-2.0, 2.0), 0.5, 3.0, 3.0


def velocity(x: Tensor, t: Tensor) -> Tensor:
    """E[x1 - x0 | x_t = x] for x and t of one shape."""
    var = (1 - t) ** 2 * SPREAD**2 + t**2
    centres = [(1 - t) * m for m in MEANS]
    share = torch.stack([-((x - c) ** 2) / (2 * var) for c in centres]).softmax(0)
    x0 = [m + (1 - t) * SPREAD**2 / var * (x - c) for m, c in zip(MEANS, centres)]
    x1 = [t / var * (x - c) for c in centres]
    return sum((w * (b - a) for w, a, b in zip(share, x0, x1)), torch.zeros_like(x))


class Known:
    """A painter of single numbers with the known velocity. Prompts are the rows of the bias, as text."""

    shape, tokens = (1,), 1

    def __init__(self, prompts: int, steps: int) -> None:
        self.model: torch.nn.Module = torch.nn.Module()
        self.bias = torch.nn.Parameter(torch.zeros(prompts, steps))
        self.model.register_parameter("bias", self.bias)
        self.grid = linear(steps, SHIFT)

    def encode(self, prompts: list[Any]) -> list[Any]:
        return [int(p) for p in prompts]

    def predict(self, x: Tensor, sigma: Tensor, conditions: list[Any]) -> Tensor:
        step = (sigma[:, None] - self.grid.float()).abs().argmin(1).clamp(max=self.bias.shape[1] - 1)
        return velocity(x, sigma[:, None]) + self.bias[torch.tensor(conditions), step][:, None]

    def decode(self, x: Tensor) -> list[Any]:
        return x[:, 0].tolist()

    def sigmas(self, steps: int) -> Tensor:
        return linear(steps, SHIFT)

    def save(self, folder: pathlib.Path) -> None:
        torch.save(self.model.state_dict(), folder / "bias.pt")

    def restore(self, folder: pathlib.Path) -> None:
        self.model.load_state_dict(torch.load(folder / "bias.pt"))


class Shared(Known):
    """One bias for all prompts and steps."""

    def __init__(self, steps: int) -> None:
        super().__init__(1, 1)
        self.grid = linear(steps, SHIFT)

    def encode(self, prompts: list[Any]) -> list[Any]:
        return [0 for _ in prompts]


def graded(groups: list[Group]) -> list[Group]:
    """Every group with its rewards."""
    return [g.with_(signals={**g.signals, "reward": reward(torch.tensor([float(p.output) for p in g.paths]))}) for g in groups]


def reward(x: Tensor) -> Tensor:
    """-(x - 3)^2"""
    return -((x - GOAL) ** 2)


def tasks(n: int) -> list[Task]:
    """n prompts, each with its own row of the bias."""
    return [Task(str(i)) for i in range(n)]


@dataclass(frozen=True)
class Gradients:
    """Of one rollout per prompt: the reward's gradient [prompts, steps], and what the rollout cost."""

    by_step: Tensor
    deviations: Tensor  # [steps] of the steps' Gaussians
    calls: float  # of the network per prompt, while sampling

    def ratio(self) -> Tensor:
        """[steps] |mean| / std over prompts, of the trained steps."""
        live = self.by_step.abs().sum(0) > 0
        return snr(self.by_step[:, live])

    def summed(self, *, weighted: bool) -> float:
        """The same of the gradient for a bias that all steps share, with or without the noise-aware weight."""
        w = self.deviations if weighted else torch.ones_like(self.deviations)
        return float(snr((self.by_step * w).sum(1, keepdim=True)))


def snr(gradient: Tensor) -> Tensor:
    """|mean| / std over the first axis."""
    return gradient.mean(0).abs() / gradient.std(0)


def prepared(recipe: Recipe, groups: list[Group]) -> Batch:
    """From graded groups to one batch, every trained step weighing the same."""
    groups = [g.with_(reward=recipe.reward(g)) for g in groups]
    groups = recipe.across([g.with_(advantage=recipe.advantage(g)) for g in groups])
    return weigh(collate(groups), step_mean)


def gradients(recipe: Recipe, seed: int, *, prompts: int, steps: int) -> Gradients:
    """One rollout for each of `prompts` prompts under the starting policy, and the gradient of its surrogate."""
    painter = Known(prompts, steps)
    policy = FlowPolicy(painter, steps=steps, rows=10**6)
    kernel: Kernel = recipe.rollout.kernel  # type: ignore[attr-defined]
    groups = recipe.rollout(policy, tasks(prompts), graded, torch.Generator().manual_seed(seed))
    batch = prepared(recipe, groups)
    sampled = policy.counts["sampled"] / prompts
    loss, _ = recipe.loss(batch, policy.evaluate(batch), None)
    (batch.weight * loss).sum().backward()
    assert painter.bias.grad is not None
    deviations = Course.of(None, policy.sigmas, kernel).deviations.float()
    return Gradients(-painter.bias.grad, deviations, sampled)


def trained(recipe: Recipe, seed: int, *, steps: int, iterations: int, prompts: int, rate: float) -> float:
    """The mean reward of 2000 numbers drawn without noise after training the shared bias with Adam."""
    painter = Shared(steps)
    policy = FlowPolicy(painter, steps=steps, rows=10**6)
    optimizer = torch.optim.Adam(policy.parameters(), lr=rate)
    rng = torch.Generator().manual_seed(seed)
    for _ in range(iterations):
        groups = recipe.rollout(policy, tasks(prompts), graded, rng)
        groups = [g.with_(reward=recipe.reward(g)) for g in groups]
        groups = recipe.across([g.with_(advantage=recipe.advantage(g)) for g in groups])
        for batch in recipe.cadence(collate(groups)):
            batch = weigh(batch, recipe.reduce)
            optimizer.zero_grad()
            loss, _ = recipe.loss(batch, policy.evaluate(batch), None)
            (batch.weight * loss).sum().backward()
            optimizer.step()
    course = Course.of("0", policy.sigmas, FlowSDE(), ())
    done = policy.walk(policy.noise(2000, torch.Generator().manual_seed(seed + 1000)), [course], 0, steps)
    return float(reward(done.last[:, 0]).mean())
