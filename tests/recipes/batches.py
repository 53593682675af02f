"""Hand-made groups and batches for worked numbers: no model, every log-probability written down."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gruppo.core.collate import collate, drop_abstained
from gruppo.core.reduce import weigh
from gruppo.recipe import Recipe
from gruppo.types import Batch, Group, Path, Steps, Task


def path(length: int, logp: Sequence[float] | None = None, *, truncated: bool = False) -> Path:
    """A path of that many trained steps."""
    old = torch.zeros(length) if logp is None else torch.tensor(logp)
    return Path(
        torch.tensor([2]),
        torch.zeros(length, dtype=torch.long),
        old,
        torch.ones(length, dtype=torch.bool),
        "",
        truncated=truncated,
    )


def group(reward: Sequence[float], lengths: Sequence[int] | None = None, correct: Sequence[float] | None = None) -> Group:
    """Paths with these raw rewards."""
    paths = [path(n) for n in (lengths or [1] * len(reward))]
    return Group(Task("q"), paths, {"reward": torch.tensor(reward), "correct": torch.tensor(correct or reward)})


def advantages(recipe: Recipe, *groups: Group) -> list[list[float]]:
    """The advantage of every path's first step, after reward, abstention, advantage and the batch-level step."""
    graded = [drop_abstained(g.with_(reward=recipe.reward(g))) for g in groups]
    done = recipe.across([g.with_(advantage=recipe.advantage(g)) for g in graded])
    return [[float(a) for a in g.advantage[:, 0]] for g in done if g.advantage is not None]


def batch(advantage: Sequence[float], lengths: Sequence[int], groups: Sequence[int] | None = None) -> Batch:
    """Rows with one advantage each and old log-probs of 0, by default all of one group."""
    ids = list(groups or [0] * len(lengths))
    made = []
    for i in sorted(set(ids)):
        rows = [k for k, at in enumerate(ids) if at == i]
        g = Group(Task("q"), [path(lengths[k]) for k in rows])
        made.append(g.with_(advantage=torch.tensor([advantage[k] for k in rows])[:, None].expand(len(rows), g.width)))
    return collate(made)


def losses(recipe: Recipe, advantage: Sequence[float], ratios: Sequence[Sequence[float]]) -> Tensor:
    """The recipe's loss [B, T] where the policy's step ratios are these."""
    b = batch(advantage, [len(r) for r in ratios])
    logp = torch.zeros(b.mask.shape)
    for i, row in enumerate(ratios):
        logp[i, : len(row)] = torch.tensor(row).log()
    return recipe.loss(b, Steps(logp=logp), None)[0]


def objective(recipe: Recipe, per_step: Sequence[Sequence[float]]) -> float:
    """sum(weight * loss) for losses written down step by step, one group."""
    b = weigh(batch([0.0] * len(per_step), [len(r) for r in per_step]), recipe.reduce)
    value = torch.zeros(b.mask.shape)
    for i, row in enumerate(per_step):
        value[i, : len(row)] = torch.tensor(row)
    return float((b.weight * value).sum())


EIGHT = [1.0, 0, 0, 1, 1, 0, 0, 0]  # mean .375, sample std .517549, population std .484123
THREE = [[1.0, 1.0], [0.5, 0.5, 0.5, 0.5], [2.0, 2.0, 2.0]]
