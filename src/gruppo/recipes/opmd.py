"""OPMD, online policy mirror descent, as 2509.24203 reads it. REINFORCE that is pulled back to whoever sampled, not clipped.

    kimi-opmd   loss_t = - A_i logp_t + c (logp_t - logp_b,t)^2              A_i = r_i - mean(r),  c stands for tau / 2
    opmd        loss_t = - A_i logp_t / (1 + tau)                            A_i = r_i - b

    b = mean(r),  or with `soft`  b = tau log mean exp(r / tau)              between the mean (tau large) and the maximum

The square comes from max E[r] - tau KL(pi || pi_b): at its optimum r_i - tau (log pi(y_i) - log pi_b(y_i)) is the same for every
answer, and kimi-opmd has the gradient of mean_i (r_i - mean(r) - tau d_i)^2 / (2 tau) with d_i = log pi(y_i) - log pi_b(y_i).

| | here | paper | reference code (Trinity-RFT) |
|---|---|---|---|
| names | kimi-opmd; opmd | "OPMD" (after Kimi k1.5); not established | `rec` with a k2 regulariser; `opmd` |
| squared | each step; with `whole` the whole answer | the whole answer: (sum_t d_t)^2 | each step: sum_t d_t^2 |
| aggregation | mean over steps; with `whole` mean over paths of the sum over steps | sums over the answer | mean over steps |
| sampler's log-probs in opmd | unused | - | unused |
| group of one | refused by the rollout; 0 in the advantage | not said | baseline 0, so the raw reward |
| KL to a reference | none | none | opmd's example adds 0.001 |

With `whole`, each of the |o| steps carries c (sum_t d_t)^2 / |o|, so that the path's sum is the paper's term.
Equal rewards: A is 0 and kimi-opmd only pulls back to the sampler.

Hyper-parameters: c 0.1 (the code's example); tau 1 (default of the code; its opmd example uses 4 with lr 2e-6, betas (0, 0.95),
sync interval 10); n 8. `soft` False is the code's default baseline.

Cost: as GRPO without a reference.

Not for: data from many different samplers at once: kimi-opmd pulls every path towards its own. opmd has nothing at all that holds
it near the data; its 1 / (1 + tau) is a learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gruppo.core.advantage import spread
from gruppo.core.reduce import sequence_sum
from gruppo.recipe import Recipe
from gruppo.recipes.rec import Reinforce, rec_reinforce
from gruppo.types import Batch, Group, GruppoError, Loss, Scope, Steps, reads_reference


def step_squares(batch: Batch, logp: Tensor) -> Tensor:
    """(logp_t - logp_b,t)^2 of each step."""
    return ((logp - batch.logp_old) * batch.mask).square()


def path_square(batch: Batch, logp: Tensor) -> Tensor:
    """(sum_t d_t)^2 of the whole path, an equal share of it at each trained step."""
    square = ((logp - batch.logp_old) * batch.mask).sum(1, keepdim=True).square()
    return square / batch.mask.sum(1, keepdim=True).clamp(min=1) * batch.mask


@dataclass(frozen=True)
class Held:
    """loss + c * square(logp - logp_b): the policy is held to the one that sampled."""

    loss: Loss
    c: float
    square: Callable[[Batch, Tensor], Tensor] = step_squares

    def __post_init__(self) -> None:
        if not self.c >= 0:
            raise GruppoError(f"c is {self.c}; a negative coefficient drives the policy away from the one that sampled")

    @property
    def scope(self) -> Scope:
        return self.loss.scope

    @property
    def reads_reference(self) -> bool:
        return reads_reference(self.loss)

    def __call__(self, batch: Batch, now: Steps, ref: Steps | None) -> tuple[Tensor, dict[str, Tensor]]:
        loss, stats = self.loss(batch, now, ref)
        square = self.square(batch, now.logp)
        return loss + self.c * square, {**stats, "square": square}


@dataclass(frozen=True)
class AboveSoft:
    """r_i - tau log mean exp(r / tau), the same for every step; 0 in a group whose rewards are all equal."""

    tau: float

    def __call__(self, group: Group) -> Tensor:
        assert group.reward is not None
        return spread(self.of(group.reward), group)

    def of(self, reward: Tensor) -> Tensor:
        """A [G] of rewards [G]; abstained (NaN) rewards count nowhere and come back as 0."""
        heard = reward[~reward.isnan()]
        if len(heard) == 0 or bool((heard == heard[0]).all()):
            return torch.zeros_like(reward)
        b = self.tau * (torch.logsumexp(heard / self.tau, 0) - math.log(len(heard)))
        return torch.nan_to_num(reward - b, nan=0.0)


def kimi_opmd(n: int = 8, c: float = 0.1, whole: bool = False) -> Recipe:
    """REINFORCE with a squared pull of the log-probabilities to those of the sampler."""
    base = rec_reinforce(n)
    if whole:
        return replace(base, loss=Held(base.loss, c, path_square), reduce=sequence_sum)
    return replace(base, loss=Held(base.loss, c))


def opmd(n: int = 8, tau: float = 1.0, soft: bool = False) -> Recipe:
    """REINFORCE divided by 1 + tau, against the mean or the soft maximum of the group."""
    if not tau > 0:
        raise GruppoError(f"tau is {tau}; the temperature of the mirror step must be above 0")
    base = replace(rec_reinforce(n), loss=Reinforce(scale=1 / (1 + tau)))
    return replace(base, advantage=AboveSoft(tau)) if soft else base
