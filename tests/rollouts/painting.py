"""Painters whose velocity is written down, so that walks can be checked by hand."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gruppo.policies.flow import FlowPolicy
from gruppo.recipes.golden_flow import flow_grading, task, tiny_flow
from gruppo.rollouts.branching import Branches
from gruppo.rollouts.tree import Tree
from gruppo.types import Group


class Written:
    """Velocity `v(x)` plus a bias that can be trained; the picture is the latent as a tuple."""

    shape, tokens = (2,), 1

    def __init__(self, v: Callable[[Tensor], Tensor], grid: Sequence[float]) -> None:
        self.model = torch.nn.Linear(1, 2, bias=False)
        torch.nn.init.zeros_(self.model.weight)
        self.v, self.grid, self.calls = v, torch.tensor(grid, dtype=torch.float64), 0

    def encode(self, prompts: list[Any]) -> list[Any]:
        return list(prompts)

    def predict(self, x: Tensor, sigma: Tensor, conditions: list[Any]) -> Tensor:
        self.calls += 1
        return self.v(x) + self.model(torch.ones(len(x), 1))

    def decode(self, x: Tensor) -> list[Any]:
        return [tuple(row) for row in x.tolist()]

    def sigmas(self, steps: int) -> Tensor:
        return self.grid

    def save(self, folder: pathlib.Path) -> None: ...

    def restore(self, folder: pathlib.Path) -> None: ...


class Started(FlowPolicy):
    """Begins at a given latent instead of noise."""

    first = (0.5, -1.0)

    def noise(self, n: int, g: torch.Generator) -> Tensor:
        return torch.tensor(self.first).repeat(n, 1)


def written(v: Callable[[Tensor], Tensor], grid: Sequence[float], kind: type[FlowPolicy] = Started) -> FlowPolicy:
    """A policy of the written velocity on this grid."""
    return kind(Written(v, grid), steps=len(grid) - 1)


def steady(x: Tensor) -> Tensor:
    """v = [.2, .4] everywhere, the velocity of the worked steps."""
    return torch.tensor([0.2, 0.4]).expand(x.shape)


def grown(rollout: Branches | Tree, steps: int, prompts: int = 1, seed: int = 0) -> tuple[FlowPolicy, list[Group]]:
    """The rollout's groups on the tiny task, and the policy whose counts tell what they cost."""
    policy = tiny_flow(steps=steps)
    groups = rollout(policy, [task(i) for i in range(prompts)], flow_grading(), torch.Generator().manual_seed(seed))
    return policy, groups
