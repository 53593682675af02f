"""REC (2509.24203). Group-relative REINFORCE needs no on-policy data: what keeps it stable on stale data is the clip, a mask on
steps, and not the importance weight.

    rho_t  = pi(o_t) / pi_b(o_t)                       pi_b is whoever sampled the path, however long ago; no gradient
    A_i    = r_i - mean(r)                             not divided by a std
    loss_t = - w_t M_t A_i logp_t                      w and M are chosen independently; neither carries a gradient

    name                    w      M = 1 where
    rec-reinforce           1      everywhere
    rec-oneside             1      A >= 0 and rho <= 1 + high,  or  A <= 0 and rho >= 1 - low
    rec-oneside-is          rho    the same: PPO's clip, its gradient to the last bit though not its loss value
    rec-twoside, -is        1, rho 1 - low <= rho <= 1 + high, whatever the sign of A
    rec-ring, -is           1, rho in that band,  or  A >= 0 and rho <= 1 - far_low,  or  A <= 0 and rho >= 1 + far_high

Why no weight: max E[r] - tau KL(pi || pi_b), written for pairs of samples, gives a squared loss whose gradient at pi = pi_b is
-(2 tau / K) sum_i (r_i - mean(r)) grad log pi(y_i), whoever drew the samples. While the policy is the one that sampled, every
mask is 1 and all seven recipes have the same gradient.

| | here | paper | reference code (Trinity-RFT `rec`) |
|---|---|---|---|
| mask, weight | two values, one recipe each | the same | two string switches in one loss |
| ring with the weight | `rec-ring-is` | ring without the weight | both switches allowed |
| std | none | none | `std_normalize` False; its GRPO setting divides by the population std + 1e-6 |
| bounds | included, in float32 | not established | included |
| high above 1 | allowed | recommends 2.0 | an early version asserted high <= 1 |
| ring far bounds | 0.6 and 2.0 | not established | default_args 0.6 and 2.0, the class's own defaults 0.4 and 0.4 |
| aggregation | mean over all steps of the update | not established | the same |
| group of one | refused by the rollout; 0 in the advantage | not said | crashes |
| KL to a reference | none | none | k2 with coefficient 0 |
| pi_b | the log-probs kept with each path | the same | the same |

Stale data is a property of the run: `fit.sync_every` and `fit.sync_lag` (sampling with older weights) or `--offline FILE` (stored
groups). Without either, rho is 1 before each step and the masks have nothing to do.

Hyper-parameters: low = high = 0.2 (default of the code), (0.6, 2.0) recommended for speed on stale data; n 8, 96 tasks a step, lr
1e-6, gradient clip 1, T 1, sync interval 20 and offset 10 (examples/rec_gsm8k).

Measured at toy scale (`gruppo claim rec-oneside --seeds 8` and the others of that table): on stored draws the importance weight
changes the value by 0.0002 [0.0000, 0.0004]; bounds of (0.6, 2.0) add 0.167 [0.152, 0.182]; the clip, kimi-opmd and asymre all
stay nearer to the data than rec-reinforce. That rec-reinforce collapses does not hold there: it earns 0.25 more, and drifts.

Cost: as GRPO without a reference: one forward and one backward pass over every path.

Not for: data that is very far off (all stored, never refreshed) with wide bounds: the paper finds (0.6, 2.0) unstable
there. Read `clip_low` and `clip_high`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from gruppo.core.advantage import centred, spread
from gruppo.core.ratio import step_ratio
from gruppo.core.reduce import step_mean
from gruppo.core.surrogate import Ratio
from gruppo.recipe import Recipe
from gruppo.recipes.grpo import total
from gruppo.rollouts import Parallel
from gruppo.types import Batch, Group, GruppoError, Scope, Steps

Mask = Callable[[Tensor, Tensor], Tensor]  # (rho, A) -> bool, where the step keeps its gradient
Weight = Callable[[Tensor], Tensor]  # rho -> the factor of the gradient


def above_mean(group: Group) -> Tensor:
    """r_i - mean(r), the same for every step."""
    assert group.reward is not None
    return spread(centred(group.reward), group)


def everywhere(rho: Tensor, A: Tensor) -> Tensor:
    """Every step keeps its gradient."""
    return torch.ones_like(rho, dtype=torch.bool)


@dataclass(frozen=True)
class OneSide:
    """A good step until it is 1 + high times as likely, a bad one until it is 1 - low times as likely."""

    low: float
    high: float

    def __post_init__(self) -> None:
        check_band(self.low, self.high)

    def __call__(self, rho: Tensor, A: Tensor) -> Tensor:
        return ((A >= 0) & (rho <= 1 + self.high)) | ((A <= 0) & (rho >= 1 - self.low))


@dataclass(frozen=True)
class TwoSide:
    """Only steps whose ratio lies in the band, good or bad."""

    low: float
    high: float

    def __post_init__(self) -> None:
        check_band(self.low, self.high)

    def __call__(self, rho: Tensor, A: Tensor) -> Tensor:
        return (rho >= 1 - self.low) & (rho <= 1 + self.high)


@dataclass(frozen=True)
class Ring:
    """The band, and beyond the far bounds the steps that the update brings back towards it."""

    low: float
    high: float
    far_low: float
    far_high: float

    def __post_init__(self) -> None:
        check_band(self.low, self.high)
        check_band(self.far_low, self.far_high)
        if self.far_low < self.low or self.far_high < self.high:
            raise GruppoError(
                f"the ring's far bounds {self.far_low} and {self.far_high} lie inside its band {self.low} and {self.high}; they "
                "must lie beyond it"
            )

    def __call__(self, rho: Tensor, A: Tensor) -> Tensor:
        inside = TwoSide(self.low, self.high)(rho, A)
        return inside | ((A >= 0) & (rho <= 1 - self.far_low)) | ((A <= 0) & (rho >= 1 + self.far_high))


def check_band(low: float, high: float) -> None:
    """1 - low must be a probability ratio, and the band must hold 1."""
    if not (0 <= low <= 1 and high >= 0):
        raise GruppoError(f"the ratio is kept between 1 - {low} and 1 + {high}; low must lie between 0 and 1, high at or above 0")


def unweighted(rho: Tensor) -> Tensor:
    """1: whoever sampled the step."""
    return torch.ones_like(rho)


def importance(rho: Tensor) -> Tensor:
    """rho: the step as if the present policy had sampled it."""
    return rho


@dataclass(frozen=True)
class Reinforce:
    """-sg[w(rho) M(rho, A)] A logp per step, times `scale`."""

    mask: Mask = everywhere
    weight: Weight = unweighted
    scale: float = 1.0
    ratio: Ratio = step_ratio
    scope: Scope = "path"
    reads_reference: ClassVar[bool] = False

    def __call__(self, batch: Batch, now: Steps, ref: Steps | None) -> tuple[Tensor, dict[str, Tensor]]:
        A, rho = batch.advantage, self.ratio(batch, now.logp).detach()
        kept = self.mask(rho, A)
        # a product with 0 would turn an infinite weight of a masked step into NaN
        factor = torch.where(kept, self.weight(rho) * A, torch.zeros_like(A))
        stats = {"ratio": rho, "clip_low": (~kept & (rho < 1)).float(), "clip_high": (~kept & (rho > 1)).float()}
        entropy = {} if now.entropy is None else {"entropy": now.entropy}
        return -self.scale * factor * now.logp, {**stats, **entropy}


def rec_reinforce(n: int = 8) -> Recipe:
    """Group-relative REINFORCE on whatever was sampled: no weight and no clip."""
    return Recipe(rollout=Parallel(n), reward=total, advantage=above_mean, loss=Reinforce(), reduce=step_mean)


def rec(n: int, mask: Mask, weight: Weight) -> Recipe:
    """REINFORCE with this mask and this weight."""
    return replace(rec_reinforce(n), loss=Reinforce(mask, weight))


def rec_oneside(n: int = 8, low: float = 0.2, high: float = 0.2) -> Recipe:
    """PPO's clip as a mask on REINFORCE's steps, without the importance weight."""
    return rec(n, OneSide(low, high), unweighted)


def rec_oneside_is(n: int = 8, low: float = 0.2, high: float = 0.2) -> Recipe:
    """PPO's clip written as a mask and a detached importance weight."""
    return rec(n, OneSide(low, high), importance)


def rec_twoside(n: int = 8, low: float = 0.2, high: float = 0.2) -> Recipe:
    """REINFORCE on the steps whose ratio lies in the band, whatever the sign of their advantage."""
    return rec(n, TwoSide(low, high), unweighted)


def rec_twoside_is(n: int = 8, low: float = 0.2, high: float = 0.2) -> Recipe:
    """Importance-weighted REINFORCE on the steps whose ratio lies in the band."""
    return rec(n, TwoSide(low, high), importance)


def rec_ring(n: int = 8, low: float = 0.2, high: float = 0.2, far_low: float = 0.6, far_high: float = 2.0) -> Recipe:
    """REINFORCE inside the band, and far outside it for the steps that it brings back."""
    return rec(n, Ring(low, high, far_low, far_high), unweighted)


def rec_ring_is(n: int = 8, low: float = 0.2, high: float = 0.2, far_low: float = 0.6, far_high: float = 2.0) -> Recipe:
    """Importance-weighted REINFORCE inside the band, and far outside it for the steps that it brings back."""
    return rec(n, Ring(low, high, far_low, far_high), importance)
