"""Dr.GRPO, "GRPO done right" (2503.20783). Dividing by a path's length and by the group's std biases the update: do neither.

    A_i  = r_i - mean(r)
    loss = sum_{i,t} l_{i,t} / (B * L),    L = the longest completion allowed, a constant

A_i is (G - 1) / G times RLOO's advantage. With 1/|o_i| a long wrong path is pushed down less per step than a short one, so
wrong paths grow; with 1/std a group that is almost all right or all wrong weighs more than one in the middle.

| | here | paper | reference code |
|---|---|---|---|
| advantage | r - mean | the same | the same |
| denominator | paths with a trained step x `length` | "a constant" | TRL B x max_completion_length; older verl L, without B |
| weights sum to | mean length / `length`, not 1 | the same | the same |
| KL | none | none | none |

Set `length` to the run's max_new_tokens: it only scales the loss, but the gradient clip and weight decay see that scale.

Hyper-parameters: n 8, 128 prompts, L 3000, lr 1e-6 constant, beta 0, one epoch per batch, T 1 (authors' code, oat).
low = high = 0.2 is PPO's usual value, which has no effect with one update per batch.

Cost: as GRPO without a reference.

Not for: comparing loss values between runs with different `length`, or batches that mix very easy and very hard prompts and need
one scale (ScaleRL divides by the batch's).
"""

from __future__ import annotations

from torch import Tensor

from gruppo.core.advantage import centred, spread
from gruppo.core.kl import with_kl
from gruppo.core.reduce import Constant
from gruppo.core.surrogate import PPOClip
from gruppo.policies.reference import initial
from gruppo.recipe import Recipe
from gruppo.recipes.grpo import total
from gruppo.rollouts import Parallel
from gruppo.types import Group


def without_scale(group: Group) -> Tensor:
    """r - mean(r), the same for every step of a path."""
    assert group.reward is not None
    return spread(centred(group.reward), group)


def dr_grpo(n: int = 8, length: int = 3000, beta: float = 0.0, low: float = 0.2, high: float = 0.2) -> Recipe:
    """Advantages without a scale, and every step weighs the same whatever its path's length."""
    return Recipe(
        rollout=Parallel(n),
        reward=total,
        advantage=without_scale,
        loss=with_kl(PPOClip(low, high), beta),
        reduce=Constant(length),
        reference=initial if beta else None,
    )
