"""CISPO (MiniMax-M1, 2506.13585). PPO's clip silences rare steps, often turns of thought; clip the weight, keep the gradient.

    w_{i,t} = clip(rho_{i,t}, 0, 1 + high)                                      no lower bound
    J       = 1 / (sum_i |o_i|) sum_i sum_t sg[w_{i,t}] A_i logp_{i,t}

| | here | paper | reference code |
|---|---|---|---|
| upper bound | 1 + high | 1 + eps_high | verl clip(rho, 1 - 0.2, 1 + 0.28); TRL min(rho, epsilon_high), the bound itself |
| lower bound | 0; `low=0.2` gives 1 - 0.2 | "a large value", none in effect | verl 1 - 0.2 |
| std | sample (n - 1), eps 1e-6 | "std" | verl n - 1, 1e-6; TRL n - 1, 1e-4 |
| aggregation | mean over all steps of the update | the same | the same |
| mini-batches | `parts` = 1 | several per rollout | set by the run |
| KL | none | none | none |

With one update per rollout every weight is 1 and this is REINFORCE with a group baseline; `parts` above 1 gives stale steps.

Hyper-parameters: `low` 1 = no lower bound (paper); high 0.28 and eps 1e-6 from verl, because the paper tunes eps_high without
printing it; n 16 is our choice.

Cost: as GRPO without a reference.

Not for: one update per rollout, where every bound is out of reach; and data so stale that weights sit at the bound, which
hides how far the policy has moved (read `clip_high`).
"""

from __future__ import annotations

from gruppo.core.collate import Passes
from gruppo.core.reduce import step_mean
from gruppo.core.surrogate import WeightClip
from gruppo.recipe import Recipe, whole
from gruppo.recipes.grpo import GroupNorm, total
from gruppo.rollouts import Parallel


def cispo(n: int = 16, low: float = 1.0, high: float = 0.28, parts: int = 1, eps: float = 1e-6) -> Recipe:
    """The importance weight is bounded above and detached; every step keeps its gradient."""
    return Recipe(
        rollout=Parallel(n),
        reward=total,
        advantage=GroupNorm(ddof=1, eps=eps),
        loss=WeightClip(1 - low, 1 + high),
        reduce=step_mean,
        cadence=whole if parts == 1 else Passes(1, parts),
    )
