"""ScaleRL's objective (2510.13786). CISPO with a plain upper bound on the weight, one scale for the batch, equal prompts.

    w_{i,t} = min(rho_{i,t}, bound)
    A_i     = (r_i - mean(group)) / (std(batch) + eps)
    J       = 1/P sum_p 1 / (sum_{i in p} |o_i|) sum_{i in p} sum_t sg[w_{i,t}] A_i logp_{i,t}

`bound` is the largest weight itself, not an excess over 1 as in CISPO.

| | here | paper | reference code |
|---|---|---|---|
| bound | 5 | truncated, eps_max | TRL `loss_type="cispo"`, `epsilon_high=5.0` |
| scale | sample std of all raw rewards of the batch, eps 1e-4 | batch level | TRL `scale_rewards="batch"`: the same |
| aggregation | mean over prompts of the mean over their steps | prompt level | TRL mean over steps of the batch |
| groups without variance | advantage 0, still counted | left out of the loss | TRL: counted |
| prompts solved in 90 % of their rollouts | stay | not drawn again | not there |
| asynchrony, forced endings, fp32 output layer | not part of a recipe | yes | engine's and model's business |

Hyper-parameters: n 16 (paper), bound 5 and eps 1e-4 (TRL's page for the paper).

Cost: as GRPO without a reference.

Not for: steps with few prompts, where the batch's std is as noisy as a group's; and batches of tasks with rewards on different
scales, which one std cannot serve.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gruppo.core.advantage import std
from gruppo.core.collate import Passes
from gruppo.core.surrogate import WeightClip
from gruppo.recipe import Recipe, whole
from gruppo.recipes.dr_grpo import without_scale
from gruppo.recipes.grpo import total
from gruppo.rollouts import Parallel
from gruppo.types import Batch, Group


@dataclass(frozen=True)
class BatchScale:
    """Divide every advantage by the std of all raw rewards of the batch, abstained ones left out."""

    ddof: int
    eps: float

    def __call__(self, groups: list[Group]) -> list[Group]:
        scale = std(torch.cat([g.reward for g in groups if g.reward is not None]), ddof=self.ddof) + self.eps
        return [g.with_(advantage=g.advantage / scale) for g in groups if g.advantage is not None]


def prompt_mean(batch: Batch) -> tuple[Tensor, Tensor]:
    """The mean over prompts of each prompt's mean over all steps of its paths."""
    size = int(batch.group.max()) + 1
    steps = batch.weight.new_zeros(size).scatter_add(0, batch.group, batch.mask.sum(1).to(batch.weight.dtype))
    return batch.mask / steps.clamp(min=1)[batch.group][:, None], (steps > 0).sum().float()


def scalerl(n: int = 16, bound: float = 5.0, parts: int = 1, eps: float = 1e-4) -> Recipe:
    """min(rho, bound) as a detached weight, advantages on one scale for the batch, and every prompt weighs the same."""
    return Recipe(
        rollout=Parallel(n),
        reward=total,
        advantage=without_scale,
        loss=WeightClip(0.0, bound),
        reduce=prompt_mean,
        across=BatchScale(ddof=1, eps=eps),
        cadence=whole if parts == 1 else Passes(1, parts),
    )
