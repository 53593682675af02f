"""RLOO, REINFORCE leave-one-out (2402.14740). The baseline of a path is the mean of the others; the path is one action.

    r_i  <- r_i - beta * sum_t (logp_old_t - logp_ref_t)                        k1, may be negative, inside the reward
    A_i  = r_i - mean_{j != i} r_j = G / (G - 1) (r_i - mean(r))
    rho_i = exp( sum_t logp_t - sum_t logp_old_t )                              the whole path, not divided by its length
    J    = 1/G sum_i min(rho_i A_i, clip(rho_i, 1 - low, 1 + high) A_i)

| | here | paper | reference code (TRL RLOOTrainer) |
|---|---|---|---|
| baseline | mean of the others | the same | the same |
| scale | none | none | none; optional batch z-score |
| ratio | whole path, clipped at 0.2 | none: one update per batch, plain REINFORCE | whole path, clipped at 0.2 |
| KL | k1, sampled log-probs against the reference, in the reward | the same | the same |
| mean over | paths | paths | paths |

With one update per batch rho is 1 and its gradient is REINFORCE's, so the clip changes nothing until a cadence asks for more.

Hyper-parameters: n 4 (paper: 2 and 4), beta 0.03, lr 1e-6 (paper, as TRL quotes it; TRL's defaults are n 2 and beta 0.05).

Cost: as GRPO, plus one forward pass of the reference over every path before the update (the reward needs it) while beta > 0.

Not for: several updates per batch on long paths: the ratio is a product over all steps and leaves the clip range after a small
change of each.
"""

from __future__ import annotations

from torch import Tensor

from gruppo.core.advantage import leave_one_out, spread
from gruppo.core.kl import MinusKL
from gruppo.core.ratio import path_ratio
from gruppo.core.reduce import sequence_mean
from gruppo.core.surrogate import PPOClip
from gruppo.policies.reference import initial
from gruppo.recipe import Recipe
from gruppo.recipes.grpo import total
from gruppo.rollouts import Parallel, WithReference
from gruppo.types import Group


def against_others(group: Group) -> Tensor:
    """r_i minus the mean of the other paths, the same for every step."""
    assert group.reward is not None
    return spread(leave_one_out(group.reward), group)


def rloo(n: int = 4, beta: float = 0.03, low: float = 0.2, high: float = 0.2) -> Recipe:
    """Leave-one-out baseline, the ratio of the whole path, and the KL inside the reward."""
    return Recipe(
        rollout=WithReference(Parallel(n)) if beta else Parallel(n),
        reward=MinusKL(total, beta) if beta else total,
        advantage=against_others,
        loss=PPOClip(low, high, ratio=path_ratio),
        reduce=sequence_mean,
        reference=initial if beta else None,
    )
