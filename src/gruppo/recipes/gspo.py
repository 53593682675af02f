"""GSPO, group sequence policy optimization (2507.18071). The reward judges the whole path, so the ratio and its clip do too.

    s_i     = exp( 1/|o_i| sum_t (logp_t - logp_old_t) )                        Eq. 7: the geometric mean of the step ratios
    J       = 1/G sum_i min(s_i A_i, clip(s_i, 1 - low, 1 + high) A_i)          gspo
    s_{i,t} = sg[s_i] * pi(o_t) / sg[pi(o_t)]                                   Eq. 14: same value, the gradient of one step
    J       = 1/G sum_i 1/|o_i| sum_t min(s_{i,t} A_{i,t}, clip(s_{i,t}, ...) A_{i,t})     gspo-token

While A is one number per path the two forms have the same value and the same gradient; gspo-token is for advantages that
differ from step to step. A ratio that is a mean of logs moves little, which is why the clip range is a thousand times smaller
than PPO's. Before the first update s = 1 and nothing is clipped: the method acts from the second mini-batch on.

| | here | paper | reference code |
|---|---|---|---|
| std | sample (n - 1), eps 1e-4 | "std" | TRL n - 1, 1e-4; verl n - 1, 1e-6 |
| aggregation | mean over paths of the mean over steps | mean over paths | TRL the same; verl seq-mean-token-mean |
| form | two recipes | both | TRL the sequence form; verl's "gspo" is the token form, log ratio held below 10 |
| mini-batches | `parts` = 4 per rollout, whole groups, in order | 4 | TRL `steps_per_generation=4` |
| KL | none | none mentioned | TRL beta 0 |

Hyper-parameters: low 3e-4, high 4e-4, 4 mini-batches (paper, section 5.1). The paper names no group size; n 8 is TRL's default.

Cost: as GRPO without a reference, with `parts` optimizer steps per rollout.

Not for: fewer than `parts` prompts per step, or one update per rollout, where the ratio is 1 and only the missing KL
distinguishes it from GRPO.
"""

from __future__ import annotations

from dataclasses import replace

from gruppo.core.collate import Passes
from gruppo.core.ratio import unit_ratio, unit_token_ratio
from gruppo.core.reduce import sequence_mean
from gruppo.core.surrogate import PPOClip
from gruppo.recipe import Recipe
from gruppo.recipes.grpo import GroupNorm, total
from gruppo.rollouts import Parallel


def gspo(n: int = 8, low: float = 3e-4, high: float = 4e-4, parts: int = 4, eps: float = 1e-4) -> Recipe:
    """One ratio per path, the geometric mean of its step ratios, clipped as a whole."""
    return Recipe(
        rollout=Parallel(n),
        reward=total,
        advantage=GroupNorm(ddof=1, eps=eps),
        loss=PPOClip(low, high, ratio=unit_ratio),
        reduce=sequence_mean,
        cadence=Passes(1, parts),
    )


def gspo_token(n: int = 8, low: float = 3e-4, high: float = 4e-4, parts: int = 4, eps: float = 1e-4) -> Recipe:
    """GSPO's ratio in value, with the gradient of each step's own log-probability."""
    return replace(gspo(n, low, high, parts, eps), loss=PPOClip(low, high, ratio=unit_token_ratio))
