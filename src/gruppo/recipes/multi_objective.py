"""Multi-Objective GRPO (2503.21819). One reward model scores politeness, meaningfulness, actionability and safety; the scores are
added, and only the sum is normalised.

    r_i = sum_k w_k s_k(i)                      K objectives, for example the heads of one reward model
    A_i = (r_i - mean(r)) / (std(r) + eps)      once over the group, the same for every step of path i
    J   = GRPO's

Scalarise first, normalise once. So an objective with a large spread decides: of the scores (1, 0, 1, 0) and (0, 0, 10, 10) the
first hardly shows in A = (-0.78, -0.95, 0.95, 0.78). And two objectives that cancel leave a group without variance, which
teaches nothing although both vary. GDPO normalises every objective before adding them.

`weights` None means the run's own: `weights` in the run file, one number per signal. Given here, as in
`recipe_args.weights={safety: 2, politeness: 1}`, the recipe reads those signals itself and the run's weights only decide what
else is measured. Both may change from stage to stage; no reward model is trained again for it. `gruppo reward-model fit`
trains the model with K heads.

| | here | paper | reference code |
|---|---|---|---|
| body of the paper | not read: abstract and summaries only | | none found |
| objectives | any signals | politeness, meaningfulness, actionability, safety | |
| weights | the run's, or named | not known to us | |
| order | sum, then normalise | the scores are aggregated to one scalar for GRPO | |
| std | sample (n - 1), eps 1e-6 | not known to us; verl's convention | |
| a path whose objective abstains | dropped | not known to us | |
| reward model | K heads, mean squared error | multi-label regression | |
| group size, KL, learning rate, steps | GRPO's, n 8 | not known to us | |

Hyper-parameters: n 8, beta 0.04, low = high = 0.2, eps 1e-6 are ours: the paper's are not known to us. Do not confuse it with
MO-GRPO (Ichihara et al. 2025), which normalises every objective by itself.

Measured at toy scale (`gruppo claim multi-objective-grpo --seeds 8`): each weighting of two objectives ends in the reply that
maximises it with probability 0.998; with one objective in tenths, equal weights miss the reply that serves both.

Cost: as GRPO, plus one forward pass of the reward model over every path, whatever the number of its heads.

Not for: objectives on unlike scales whose spread says nothing about their worth (GDPO), or a constraint that must never be traded
away: a sum trades everything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gruppo.recipe import Recipe, Signal
from gruppo.recipes.grpo import GroupNorm, grpo
from gruppo.types import Group, GruppoError

Weights = tuple[tuple[str, float], ...]


def listed(weights: Mapping[str, Any]) -> Weights:
    """The objectives that weigh something, in order; a sentence when there are none or one is not a number."""
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise GruppoError(f"the objective {name!r} weighs {weight!r}; a weight is a finite number")
    kept = tuple((name, float(weight)) for name, weight in weights.items() if weight)
    if not kept:
        raise GruppoError(f"the weights {dict(weights)} leave no objective that counts; give at least one a weight other than 0")
    return kept


def columns(group: Group, weights: Weights) -> Tensor:
    """[G, K] weighted objectives; a path for which one of them abstained is NaN in all of them."""
    found = []
    for name, weight in weights:
        value = group.signals.get(name)
        if not isinstance(value, Tensor) or value.dim() != 1:
            known = [n for n, v in group.signals.items() if isinstance(v, Tensor) and v.dim() == 1]
            raise GruppoError(f"the recipe weighs the objective {name!r}, but the signals with one number per path are: {known}")
        found.append(weight * value.float())
    out = torch.stack(found, 1)
    return out.masked_fill(out.isnan().any(1, keepdim=True), math.nan)


@dataclass(frozen=True)
class Scalarised:
    """sum_k w_k s_k."""

    weights: Weights

    def __call__(self, group: Group) -> Tensor:
        return columns(group, self.weights).sum(1)


def objectives(weights: Weights) -> tuple[Signal, ...]:
    """What the run must measure."""
    return tuple(Signal(name, f"an objective, weight {weight:g}") for name, weight in weights)


def multi_objective(
    n: int = 8,
    weights: Mapping[str, int | float] | None = None,
    beta: float = 0.04,
    low: float = 0.2,
    high: float = 0.2,
    eps: float = 1e-6,
) -> Recipe:
    """Several objectives added to one reward, which is normalised once over the group."""
    base = replace(grpo(n, beta, low, high), advantage=GroupNorm(ddof=1, eps=eps))
    if weights is None:
        return base
    named = listed(weights)
    return replace(base, reward=Scalarised(named), needs=objectives(named))
