"""AsymRE (asymmetric REINFORCE) as 2509.24203 reads it. On stale data a baseline below the mean imitates more than it punishes.

    A_i    = r_i - (mean(r) - c)                       c > 0: the group's advantages sum to G c, not to 0
    loss_t = - A_i logp_t / (1 + tau)
           = - (r_i - mean(r)) logp_t - c logp_t       (tau 0): the last term is the log-likelihood of what was sampled,
                                                       which tends to c KL(pi_b || pi) and so holds the policy near pi_b

| | here | paper | reference code (Trinity-RFT) |
|---|---|---|---|
| where c enters | the baseline | a regulariser or the baseline: the same | `rec`: -c logp; `asymre`: baseline, shift -0.1 |
| divided by 1 + tau | no (tau 0) | no | `asymre` reuses opmd's loss, so by 2 at its tau of 1; `rec` no |
| mean over | all steps of the update | not established | the same |
| equal rewards | A = c: right or wrong, the group is imitated | follows from the formula | the same |
| group of one | refused by the rollout; 0 in the advantage | not said | baseline 0 - 0.1, so the raw reward + 0.1 |

A group of all-wrong paths has the advantage +c throughout: it is made more likely. That is the method, and the reason why it must
not be combined with methods that rescue all-wrong groups or expect them to teach nothing.

Hyper-parameters: c 0.1 (the code's shift and its example's coefficient); tau 0; n 8.

Cost: as GRPO without a reference.

Not for: tasks that mostly fail: every failure is imitated with weight c. Use it where the sampler is worth staying near.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gruppo.core.advantage import centred, spread
from gruppo.recipe import Recipe
from gruppo.recipes.rec import Reinforce, rec_reinforce
from gruppo.types import Group, GruppoError


@dataclass(frozen=True)
class AboveShifted:
    """r_i - (mean(r) - c), the same for every step; a path without siblings is compared with nothing and gets 0."""

    c: float

    def __post_init__(self) -> None:
        if not self.c >= 0:
            raise GruppoError(
                f"c is {self.c}; AsymRE lowers the baseline by c, a negative one would punish every path on average"
            )

    def __call__(self, group: Group) -> Tensor:
        assert group.reward is not None
        return spread(self.of(group.reward), group)

    def of(self, reward: Tensor) -> Tensor:
        """A [G] of rewards [G]; abstained (NaN) rewards come back as 0."""
        heard = ~reward.isnan()
        if int(heard.sum()) < 2:
            return torch.zeros_like(reward)
        return torch.where(heard, centred(reward) + self.c, torch.zeros_like(reward))


def asymre(n: int = 8, c: float = 0.1, tau: float = 0.0) -> Recipe:
    """REINFORCE against a baseline that is lower than the mean by c."""
    if not tau >= 0:
        raise GruppoError(f"tau is {tau}; the loss is divided by 1 + tau, which must be at least 1")
    return replace(rec_reinforce(n), advantage=AboveShifted(c), loss=Reinforce(scale=1 / (1 + tau)))
