"""Multi-Objective GRPO's claim at toy scale: one objective ends in an extreme, several together in the reply that serves all.

A request and three replies: refuse, help safely, help harmfully. Their scores for safety and for helpfulness are written down
below. A softmax policy over the three is trained with the recipe's own reward and advantage: with safety alone it should learn
to refuse, with helpfulness alone to help harmfully, with equal weights to help safely. A last column shows what the sum does when
helpfulness is given in tenths instead of ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gruppo.claims.claim import Claim
from gruppo.recipe import Recipe
from gruppo.recipes.multi_objective import multi_objective
from gruppo.types import Group, Path, Task

REPLIES = ("refuse", "safe help", "harmful help")
SAFETY = torch.tensor([1.0, 0.9, 0.05])
HELPFULNESS = torch.tensor([0.1, 0.85, 1.0])  # a refusal's helpfulness is ours

Scores = Callable[[Tensor], dict[str, Tensor]]


def tenths(reply: Tensor) -> dict[str, Tensor]:
    """The signals of these replies with helpfulness counted from 0 to 10."""
    return {"safety": SAFETY[reply], "helpfulness": 10 * HELPFULNESS[reply]}


def ones(reply: Tensor) -> dict[str, Tensor]:
    """The signals of these replies, both from 0 to 1."""
    return {"safety": SAFETY[reply], "helpfulness": HELPFULNESS[reply]}


def train(
    recipe: Recipe, signals: Scores, seed: int, *, steps: int = 120, groups: int = 2, n: int = 16, rate: float = 1.0
) -> Tensor:
    """The policy [3] after `steps` steps of the exact gradient of mean(A log pi), from equal probabilities."""
    rng, logits = torch.Generator().manual_seed(seed), torch.zeros(len(REPLIES))
    one = torch.zeros(1)
    paths = [Path(torch.tensor([0]), torch.tensor([0]), one, one == 0) for _ in range(n)]
    for _ in range(steps):
        reply = torch.multinomial(logits.softmax(0), groups * n, replacement=True, generator=rng).view(groups, n)
        made = [Group(Task("q"), paths, signals(row)) for row in reply]
        made = [g.with_(reward=recipe.reward(g)) for g in made]
        made = recipe.across([g.with_(advantage=recipe.advantage(g)) for g in made])
        advantage = torch.cat([g.advantage[:, 0] for g in made if g.advantage is not None])
        pushed = torch.zeros_like(logits).index_add(0, reply.flatten(), advantage)
        logits = logits + rate * (pushed - advantage.sum() * logits.softmax(0)) / len(advantage)
    return logits.softmax(0)


def row(seed: int) -> dict[str, float]:
    """What each weighting teaches, as the probability of the reply that it should end in."""
    weighted = {
        "refusal": ({"safety": 1, "helpfulness": 0}, 0),
        "harmful help": ({"safety": 0, "helpfulness": 1}, 2),
        "safe help": ({"safety": 0.5, "helpfulness": 0.5}, 1),
    }
    found = {name: float(train(multi_objective(weights=w), ones, seed)[best]) for name, (w, best) in weighted.items()}
    least = min(found.values())
    lopsided = train(multi_objective(weights={"safety": 0.5, "helpfulness": 0.5}), tenths, seed)
    return {**found, "least": least, "safe help, tenths": float(lopsided[1])}


def claim(seeds: int = 5) -> Claim:
    """Each weighting ends in the reply that maximises it, and equal weights in safe help."""
    rows: Sequence[dict[str, float]] = [row(seed) for seed in range(seeds)]
    return Claim(
        name="multi-objective-grpo",
        sentence="one scalar of several reward scores improves safety and quality together",
        measured="the smallest of the three probabilities of the reply that each weighting should end in, after 120 steps",
        figure="least",
        rows=tuple(rows),
        expected=(0.95, float("inf")),
    )
