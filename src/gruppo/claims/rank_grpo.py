"""Rank-GRPO's claim at toy scale: with one reward for the whole list its tail learns from the luck of its head.

A list of 8 ranks, each drawn from a softmax over 10 items of its own, one of them right. One reward per list (its DCG,
standardised over the group, on every rank) is dominated by the head, and what is left for the tail is noise; judged rank by
rank, all ranks learn at once. Measured after 20 steps of 2 groups of 8 lists: the probability of a hit over all ranks, at
the first and at the last.

The other claim lets all ranks draw from the same 16 items, 8 of them right, each counted once. There exp_inf ignores that an
early pick takes a later hit away, and the sequence reward does not; whether it still ends higher is measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gruppo.claims.claim import Claim
from gruppo.core.collate import collate
from gruppo.core.reduce import weigh
from gruppo.graders.ranking import Item, hits
from gruppo.recipe import Recipe
from gruppo.recipes.grpo import GroupNorm
from gruppo.recipes.rank_grpo import exp_inf, log_decay, per_rank, rank_grpo
from gruppo.train import accumulate
from gruppo.types import Batch, Group, Path, Scope, Steps, Task

RANKS, N, GROUPS = 8, 8, 2
YEAR = 2000
OWN, SHARED = 10, 16  # items to choose from at each rank


class Lists:
    """A policy: every rank draws its item from a softmax of its own."""

    def __init__(self, items: int) -> None:
        self.logits = torch.zeros(RANKS, items, requires_grad=True)

    def evaluate(self, batch: Batch) -> Steps:
        """The log-probabilities of the items that were drawn."""
        drawn = torch.stack([p.steps for p in batch.paths])
        return Steps(logp=self.logits.log_softmax(1).expand(len(batch), -1, -1).gather(2, drawn[:, :, None])[:, :, 0])

    def split(self, batch: Batch, scope: Scope, size: int) -> Iterator[Batch]:
        yield batch

    def parameters(self) -> list[Tensor]:
        return [self.logits]


def dcg(group: Group) -> Tensor:
    """One reward per list: its DCG."""
    return log_decay(group.signals["hits"])[:, 0]


def recipes() -> dict[str, Recipe]:
    """The recipe with two of its rewards, and the same with one reward and one advantage for the whole list."""
    numbers: dict[str, Any] = {"n": N, "ranks": RANKS, "beta": 0.0, "end": None, "early": None, "weighing": per_rank}
    base = rank_grpo(**numbers)
    return {
        "sequence": replace(base, reward=dcg, advantage=GroupNorm(ddof=1, eps=1e-4)),
        "log_decay": rank_grpo(**numbers, gain=log_decay),
        "exp_inf": rank_grpo(**numbers, gain=exp_inf),
    }


def name(rank: int, item: int, shared: bool) -> str:
    """What an item is called: the same at every rank when ranks share their items."""
    return f"item {item}" if shared else f"item {item} of rank {rank}"


def found(drawn: Tensor, shared: bool) -> Tensor:
    """[n, RANKS] hits of lists of item numbers, by the grader's own rules."""
    truths = [(name(k, k if shared else 0, shared), YEAR) for k in range(RANKS)]
    lists = [[Item(name(k, i, shared), YEAR, (k, k + 1)) for k, i in enumerate(row)] for row in drawn.tolist()]
    catalog = {(name(k, i, shared), YEAR) for k in range(RANKS) for i in range(SHARED if shared else OWN)}
    return torch.tensor([hits(items, truths, catalog=catalog, ranks=RANKS) for items in lists])


def sampled(policy: Lists, shared: bool, n: int, rng: torch.Generator) -> Group:
    """n lists with their hits."""
    logp = policy.logits.detach().log_softmax(1)
    drawn = torch.multinomial(logp.exp(), n, replacement=True, generator=rng).T.contiguous()
    unit, mask = torch.arange(RANKS), torch.ones(RANKS, dtype=torch.bool)
    paths = [Path(torch.zeros(1), row, logp.gather(1, row[:, None])[:, 0], mask, unit=unit) for row in drawn]
    return Group(Task("list"), paths, {"hits": found(drawn, shared)})


def train(recipe: Recipe, seed: int, *, shared: bool = False, steps: int = 20, rate: float = 1.0) -> Lists:
    """The policy after `steps` plain gradient steps on the sum over ranks of the recipe's objective."""
    rng = torch.Generator().manual_seed(seed)
    policy = Lists(SHARED if shared else OWN)
    for _ in range(steps):
        groups = [sampled(policy, shared, N, rng) for _ in range(GROUPS)]
        groups = [g.with_(reward=recipe.reward(g)) for g in groups]
        groups = [g.with_(advantage=recipe.advantage(g)) for g in groups]
        policy.logits.grad = None
        accumulate(policy, weigh(collate(groups), recipe.reduce), recipe, ref=None, budget=10**9)
        with torch.no_grad():
            assert policy.logits.grad is not None
            policy.logits -= rate * RANKS * policy.logits.grad
    return policy


def claim(seeds: int = 10) -> Claim:
    """Rewards by rank teach the last rank what one reward per list does not."""
    rows = []
    for seed in range(seeds):
        row = {}
        for variant, recipe in recipes().items():
            right = train(recipe, seed).logits.detach().softmax(1)[:, 0]
            row |= {
                f"all {variant}": float(right.mean()),
                f"first {variant}": float(right[0]),
                f"last {variant}": float(right[-1]),
            }
        rows.append({**row, "gain": row["last exp_inf"] - row["last sequence"]})
    return Claim(
        name="rank-grpo",
        sentence="rewards, advantages and ratios by rank train the tail of a list, which one reward per list does not",
        measured="P(hit) at rank 8 of exp_inf minus that of one DCG per list after 20 steps, 8 ranks of 10 items",
        figure="gain",
        rows=tuple(rows),
        expected=(0.2, float("inf")),
    )


def duplicates(seeds: int = 5, steps: int = 300) -> Claim:
    """exp_inf recalls at least as much as one reward per list where ranks share their items."""
    rows = []
    for seed in range(seeds):
        row = {}
        for variant, recipe in recipes().items():
            for when, at in {"early": steps // 6, "late": steps}.items():
                judged = sampled(train(recipe, seed, shared=True, steps=at), True, 200, torch.Generator().manual_seed(seed))
                per_rank_hits = judged.signals["hits"].mean(0)
                row[f"{when} {variant}"] = float(per_rank_hits.mean())
                row[f"{when} tail {variant}"] = float(per_rank_hits[RANKS // 2 :].mean())
        rows.append({**row, "gain": row["late exp_inf"] - row["late sequence"]})
    return Claim(
        name="rank-grpo/duplicates",
        sentence="a reward per rank that ignores later ranks is at least as good as one reward per list",
        measured=f"recall of exp_inf minus that of one DCG per list after {steps} steps, 8 ranks that share 16 items",
        figure="gain",
        rows=tuple(rows),
        expected=(0.0, float("inf")),
    )
