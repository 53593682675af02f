"""Sampling with older weights, as a run does whose sampler and trainer are two machines: off-policy data at any scale.

iteration   0  1  2  3  4  5  6  7  8 ...        iterations finished before this one samples
every 4     0  0  0  0  4  4  4  4  8            the weights are sent every 4 iterations
lag 2       0  0  0  0  2  2  2  2  6            and are 2 iterations old when they arrive
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from gruppo.policies.reference import snapshot, swapped
from gruppo.recipe import Recipe
from gruppo.types import Grade, Group, GruppoError, Rollout


@dataclass
class Snapshots:
    """The weights that sampling still needs, by the number of iterations they had seen."""

    seen: int = field(default=0, compare=False)  # memory is no part of what a recipe is
    weights: dict[int, list[Tensor]] = field(default_factory=dict, compare=False, repr=False)

    def update(self, groups: list[Group]) -> None:
        self.seen += 1

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "weights": dict(self.weights)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen, self.weights = state["seen"], dict(state["weights"])


@dataclass(frozen=True)
class Stale:
    """The inner rollout, sampling with the weights of iteration `floor(k / every) * every - lag` in iteration k.

    So every path is `lag` to `lag + every - 1` iterations old, or as old as the run. Everything that the inner rollout reads
    from the policy, old log-probs included, is read from those weights. Costs one copy of the trained parameters, and
    one more for each `every` iterations that begin within the lag.
    """

    inner: Rollout
    every: int
    lag: int = 0
    past: Snapshots = field(default_factory=Snapshots, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.every < 1 or self.lag < 0:
            raise GruppoError(
                f"weights cannot be sent every {self.every} iterations, {self.lag} iterations old: the first number must be at "
                "least 1, the second at least 0"
            )

    def __call__(self, policy: Any, tasks: Any, grade: Grade, rng: torch.Generator) -> list[Group]:
        past, k = self.past, self.past.seen
        if not past.weights or (k + self.lag) % self.every == 0:
            past.weights[k] = snapshot(policy)
        wanted = k // self.every * self.every - self.lag
        version = max((v for v in past.weights if v <= wanted), default=min(past.weights))
        for old in [v for v in past.weights if v < version]:
            del past.weights[old]
        with swapped(policy, past.weights[version]):
            groups = self.inner(policy, tasks, grade, rng)
        return [g.with_(paths=[replace(p, version=version) for p in g.paths]) for g in groups]


def stale(recipe: Recipe, every: int, lag: int = 0, begin: int = 0) -> Recipe:
    """The recipe with its rollout sampling from older weights; unchanged when they would never be older."""
    if every == 1 and lag == 0:
        return recipe
    rollout = Stale(recipe.rollout, every, lag, Snapshots(begin))
    return replace(recipe, rollout=rollout, state=(*recipe.state, rollout.past))
