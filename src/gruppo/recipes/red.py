"""RED (2509.24203). Shape the data instead of the loss: drop surplus failures, or weigh answers by how good they are.

    red-drop     N+ = #{r_i >= mean(r)}, N- = the others; if N- > N+, N- - N+ of the others are dropped at random.
                 A_i = r_i - mean of the kept r      for the kept;   0 for the dropped
    red-weight   A_i = (r_i - mean(r)) exp((r_i - mean(r)) / T)

    loss_t = - A_i logp_t                                                    no ratio, no clip

red-weight with w_i = exp((r_i - mean(r)) / T) and the weighted mean m = sum w_i r_i / sum w_i is two things at once:

    sum w_i (r_i - mean(r)) grad_i = sum w_i (r_i - m) grad_i + (m - mean(r)) sum w_i grad_i

pairwise-weighted REINFORCE, and imitation of everything in proportion to w.

| | here | paper | reference code (Trinity-RFT) |
|---|---|---|---|
| how many are dropped | N- - N+: failures do not outnumber successes | not established | `drop="balance"` |
| dropped paths | A = 0, still counted in the mean over steps | not established | the same |
| which are dropped | the lowest lots; the rollout draws a signal `lot` for every path | at random | at random |
| equal rewards | all count as successes, nothing is dropped, A = 0 | not said | the same |
| baseline of red-weight | mean(r) | mean(r); one account of the paper writes m | mean(r) |
| exp overflows | refused with the numbers | not said | infinite advantage |
| group of one | refused by the rollout; 0 in the advantage | not said | crashes |
| std | none | none | none |

Hyper-parameters: T 1, n 8 (the code's defaults and example).

Measured at toy scale (`gruppo claim red-weight --seeds 8`): with T 1 it earns 0.012 [0.004, 0.020] more than rec-reinforce, since
rewards that lie within 1 of each other are hardly weighed.

Cost: as GRPO without a reference. red-drop trains on fewer paths than it samples.

Not for: red-drop on rewards of many values (what counts as a success is then only the mean). red-weight with a T far below the
spread of the rewards: a few paths carry everything; and it does not sum to 0, so that failures are also imitated a little.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gruppo.core.advantage import centred, spread
from gruppo.recipe import Recipe
from gruppo.recipes.rec import rec_reinforce
from gruppo.rollouts import Parallel
from gruppo.types import Grade, Group, GruppoError, Rollout


@dataclass(frozen=True)
class WithLots:
    """Adds `signals["lot"]`, a uniform number per path, for methods that choose among paths at random.

    Drawn here because chance is an argument of the rollout; and kept with the group, so that what was chosen can be looked up.
    """

    inner: Rollout

    def __call__(self, policy: Any, tasks: Any, grade: Grade, rng: torch.Generator) -> list[Group]:
        groups = self.inner(policy, tasks, grade, rng)
        return [g.with_(signals={**g.signals, "lot": torch.rand(len(g), generator=rng)}) for g in groups]


def kept(reward: Tensor, lot: Tensor) -> Tensor:
    """[G] bool: not abstained, and not among the failures that outnumber the successes."""
    heard = ~reward.isnan()
    good = heard & (centred(reward) >= 0)
    bad = heard & ~good
    surplus = max(0, int(bad.sum()) - int(good.sum()))
    keep = heard.clone()
    order = lot.masked_fill(~bad, torch.inf).argsort(stable=True)
    keep[order[:surplus]] = False
    return keep


def balanced(group: Group) -> Tensor:
    """r_i - mean of the kept for the kept paths, 0 for the dropped, the same for every step."""
    assert group.reward is not None
    if "lot" not in group.signals:
        raise GruppoError("red-drop drops paths by the lots that its rollout draws, but the group has no signal 'lot'")
    keep = kept(group.reward, group.signals["lot"])
    return spread(centred(group.reward.masked_fill(~keep, torch.nan)), group)


@dataclass(frozen=True)
class Exponential:
    """(r_i - mean(r)) exp((r_i - mean(r)) / T), the same for every step."""

    T: float

    def __post_init__(self) -> None:
        if not self.T > 0:
            raise GruppoError(f"T is {self.T}; the temperature of the weights exp((r - mean) / T) must be above 0")

    def __call__(self, group: Group) -> Tensor:
        assert group.reward is not None
        return spread(self.of(group.reward), group)

    def of(self, reward: Tensor) -> Tensor:
        """A [G] of rewards [G]."""
        above = centred(reward)
        A = above * (above / self.T).exp()
        if not A.isfinite().all():
            most = float(above.max())
            raise GruppoError(
                f"a reward {most:.4g} above its group's mean has the weight exp({most:.4g} / {self.T}), which is too large for a "
                "number of 32 bits; raise T"
            )
        return A


def red_drop(n: int = 8) -> Recipe:
    """REINFORCE on groups from which random failures are dropped until they do not outnumber the successes."""
    return replace(rec_reinforce(n), rollout=WithLots(Parallel(n)), advantage=balanced)


def red_weight(n: int = 8, T: float = 1.0) -> Recipe:
    """REINFORCE in which better answers weigh exponentially more."""
    return replace(rec_reinforce(n), advantage=Exponential(T))
