"""GDPO, group reward-decoupled normalization (2601.05242). Every objective is normalised over the group by itself; then they are
added, and the sum is brought to one scale for the batch.

    A_k(i) = (s_k(i) - mean(s_k)) / (std(s_k) + eps)        over the group, one objective at a time
    A(i)   = sum_k w_k A_k(i)
    A^(i)  = (A(i) - mean(A)) / (std(A) + eps)              over all paths of the batch

A weight means the same whatever the scale of its objective, and reward combinations that have the same sum, or differ only by the
sum's scale, stay apart: of two paths (0, 0) and (1, 0) GRPO makes -0.71 and 0.71, and the same of (0, 0) and (1, 1), where the
sum of the A_k is 1.41. The mean of A over the batch is 0 by construction, because every A_k sums to 0 over its group; here the
batch-level step is the division alone.

| | here | paper | reference code (authors' TRL patch) | authors' verl patch |
|---|---|---|---|---|
| body of the paper | not read: abstract and the authors' README | | | |
| std | sample (n - 1), eps 1e-4, both times | not read | the same | n - 1, 1e-6 |
| batch statistics | over paths | not read | over paths | over steps: long paths count more |
| batch mean | 0, not computed | subtracted | subtracted | subtracted, and not 0 over steps |
| weights | named here | w_k | w_k | all 1 |
| a path whose objective abstains | dropped | not read | the missing score becomes 0 | not there |
| group without variance in one objective | the others decide | not read | the same | the same |

The objectives and their weights are numbers of the recipe, `recipe_args.weights={politeness: 1, safety: 2}`; the run's own
`weights` do not enter. The reward that is shown is their weighted sum.

Hyper-parameters: weights 1 for correctness and format (the authors' tool-calling task), eps 1e-4 (their TRL patch); n 8, beta
0.04, low = high = 0.2 are ours.

Cost: as Multi-Objective GRPO.

Not for: objectives whose noise should stay small. One that hardly varies is scaled up until it counts as much as the others,
and in a group in which a single path differs by a hair that path gets the full advantage. Nor for trade-offs whose size matters:
where only two kinds of replies are left and each is better in one objective, their normalised values are equal and opposite,
so the larger weight wins however little it gains; with equal weights the advantages cancel but for the epsilons, and the
batch's scale makes a full update of that remainder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gruppo.core.advantage import spread, standardize, std
from gruppo.recipe import Recipe
from gruppo.recipes.multi_objective import Weights, columns, listed, multi_objective, objectives
from gruppo.types import Group

CORRECT_AND_FORMAT = {"correct": 1.0, "format": 1.0}


@dataclass(frozen=True)
class Columns:
    """The weighted objectives [G, K]; their sum is the reward."""

    weights: Weights

    def __call__(self, group: Group) -> Tensor:
        return columns(group, self.weights)


@dataclass(frozen=True)
class Decoupled:
    """sum_k w_k (s_k - mean) / (std + eps), each objective normalised over the group by itself."""

    weights: Weights
    ddof: int
    eps: float

    def __call__(self, group: Group) -> Tensor:
        assert group.reward is not None
        return spread(self.of(group.reward.reshape(len(group), -1)), group)

    def of(self, reward: Tensor) -> Tensor:
        """A [G] of weighted objectives [G, K]."""
        w = torch.tensor([weight for _, weight in self.weights]).to(reward)
        return standardize(reward / w, ddof=self.ddof, eps=self.eps) @ w


@dataclass(frozen=True)
class OneScale:
    """Divide every advantage by the std of the paths' advantages over the batch; abstained paths do not enter it."""

    ddof: int
    eps: float

    def __call__(self, groups: list[Group]) -> list[Group]:
        scale = std(torch.cat([per_path(g) for g in groups]), ddof=self.ddof) + self.eps
        return [g.with_(advantage=g.advantage / scale) for g in groups if g.advantage is not None]


def per_path(group: Group) -> Tensor:
    """[G] the advantage that all steps of a path share; NaN where the path abstained."""
    assert group.reward is not None
    assert group.advantage is not None
    gone = group.reward.reshape(len(group), -1).isnan().all(1)
    value = group.advantage.masked_fill(group.unit.to(group.advantage.device) < 0, math.nan).nanmean(1)
    return value.masked_fill(gone.to(value.device), math.nan)


def gdpo(
    n: int = 8,
    weights: Mapping[str, int | float] = CORRECT_AND_FORMAT,
    beta: float = 0.04,
    low: float = 0.2,
    high: float = 0.2,
    eps: float = 1e-4,
) -> Recipe:
    """Every objective normalised over the group by itself, then added, then one scale for the batch."""
    named = listed(weights)
    return replace(
        multi_objective(n, None, beta, low, high, eps),
        reward=Columns(named),
        advantage=Decoupled(named, ddof=1, eps=eps),
        across=OneScale(ddof=1, eps=eps),
        needs=objectives(named),
    )
