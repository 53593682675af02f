"""Importance correction where sampler and trainer are two programs: drawn from one, differentiated in the other.

    w_t  = exp(logp_train_t - logp_sampler_t)                                   1 where both are the same program
    loss = l_t * min(w_t, high)                                                 truncated (TIS, Yao et al. 2025)
    loss = l_t * w_t if low <= w_t <= high else 0                               masked
    + beta * KL_t                                                               the weight is not for this term

`corrected(recipe, weight)` works on any recipe: it puts the weight inside the KL wrapper, where there is one, and lets the
trainer read every sampled path again before the first update, so that the ratio's denominator is the trainer's.

| | here | sources | reference code |
|---|---|---|---|
| truncated | step by step, high 2 | token level | verl threshold 2; TRL `token_truncate` |
| masked | the SUM of the path's gaps, high 3 | sequence level | TRL `sequence_mask`, its default, 3.0 |
| log weight | held to [-20, 20] | not said | verl the same |
| order | after the min of PPO's clip, before the KL | not said | TRL the same |
| normalised to mean 1 | no | no | verl optional |

Cost: one more forward pass over every sampled path. Where both are one program, w is 1 and nothing else changes.

Hyper-parameters: those of GRPO; high 2 (verl), 3 (TRL).

Not for: the built-in sampler, whose log-probs agree with the trainer's already (`gruppo doctor` measures the gap).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from gruppo.core.correct import Corrected, Masked, Truncated, path_gap
from gruppo.core.kl import WithKL
from gruppo.recipe import Recipe
from gruppo.recipes.grpo import grpo
from gruppo.rollouts import Reread
from gruppo.types import Batch, Loss


def corrected(recipe: Recipe, weight: Callable[[Batch], Tensor]) -> Recipe:
    """The recipe with its policy term, and only that, weighed for the gap between sampler and trainer."""

    def inside(loss: Loss) -> Loss:
        return replace(loss, loss=inside(loss.loss)) if isinstance(loss, WithKL) else Corrected(loss, weight)

    return replace(recipe, loss=inside(recipe.loss), rollout=Reread(recipe.rollout))


def grpo_tis(n: int = 64, beta: float = 0.04, bound: float = 2.0) -> Recipe:
    """GRPO with each step's loss weighed by min(w, bound)."""
    return corrected(grpo(n, beta), Truncated(bound))


def grpo_mis(n: int = 64, beta: float = 0.04, bound: float = 3.0) -> Recipe:
    """GRPO without the paths whose sampler and trainer disagree by more than a factor `bound`, the others weighed by it."""
    return corrected(grpo(n, beta), Masked(bound, gap=path_gap))
