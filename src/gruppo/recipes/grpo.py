"""GRPO, group-relative policy optimization (DeepSeekMath, 2402.03300). A path is judged against its siblings; no critic.

    A_i   = (r_i - mean(r)) / (std(r) + eps)                                   the same for every step of path i
    rho_t = pi(o_t) / pi_old(o_t)
    J     = 1/G sum_i 1/|o_i| sum_t { min(rho_t A_i, clip(rho_t, 1 - low, 1 + high) A_i) - beta KL_t }
    KL_t  = exp(d) - d - 1,  d = logp_ref - logp                                (k3, in the loss)

| | here | paper | reference code |
|---|---|---|---|
| std | sample (n - 1), eps 1e-4 | "std" | TRL n - 1, 1e-4; verl n - 1, 1e-6 |
| group of one | refused | not said | verl lets the raw reward through |
| aggregation | mean over paths of the mean over steps | the same | TRL `loss_type="grpo"` |
| KL | k3 in the loss, beta 0.04 | the same | TRL's default is beta 0 |

Hyper-parameters: n 64, beta 0.04, lr 1e-6, one update per batch (paper). low = high = 0.2 is PPO's usual value; the paper
names epsilon without one.

Cost: one forward and one backward pass over every path; while beta > 0 one more forward pass for the reference and a second copy
of the weights (no copy with an adapter).

Not for: answers whose length is free to grow (a long wrong path is pushed down less per step: Dr.GRPO), or tasks that most groups
solve entirely or not at all (they teach nothing: DAPO's dynamic sampling).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gruppo.core.advantage import spread, standardize
from gruppo.core.kl import with_kl
from gruppo.core.reduce import sequence_mean
from gruppo.core.surrogate import PPOClip
from gruppo.policies.reference import initial
from gruppo.recipe import Recipe
from gruppo.rollouts import Parallel
from gruppo.types import Group


def total(group: Group) -> Tensor:
    """The weighted sum of the run's graders."""
    return group.signals["reward"]


@dataclass(frozen=True)
class GroupNorm:
    """(r - mean) / (std + eps) over the group, with the sample (ddof 1) or population (ddof 0) std."""

    ddof: int
    eps: float

    def __call__(self, group: Group) -> Tensor:
        assert group.reward is not None
        return spread(standardize(group.reward, ddof=self.ddof, eps=self.eps), group)


def grpo(n: int = 64, beta: float = 0.04, low: float = 0.2, high: float = 0.2, eps: float = 1e-4) -> Recipe:
    """Group-normalised advantages, clipped step ratios, k3 penalty towards the initial policy."""
    return Recipe(
        rollout=Parallel(n),
        reward=total,
        advantage=GroupNorm(ddof=1, eps=eps),
        loss=with_kl(PPOClip(low, high), beta),
        reduce=sequence_mean,
        reference=initial if beta else None,
    )
