"""Pref-GRPO (2508.20751). A pointwise reward model gives the pictures of a group nearly equal scores, and dividing by their tiny
std makes large advantages of its noise. A judge that compares two pictures gives each the share of its pairs that it wins.

    w_i = (wins + 1/2 ties) / (G - 1)                        over all G(G-1)/2 pairs of the group
    A_i = sum_k c_k (w_k(i) - mean(w_k)) / (std(w_k) + eps)  the win rate, and whatever else is weighed, each by itself
    J   = 1/G sum_i 1/|S_i| sum_{t in S_i} { min(rho_t A_i, clip(rho_t, 1 - c, 1 + c) A_i) - beta KL_t }

The rest is DanceGRPO's trainer with Flow-GRPO's noise: the pictures of a prompt begin at one noise, the last step is
deterministic and not trained, and every path trains a random part of the others.

The win rate is a signal: `gruppo.graders.judge.WinRate` gives it from a callable, a scorer's margin or a vision-language model.
`weights` names it beside pointwise ones, as in `{win_rate: .7, clip: 1.4}`. `ranked` names pointwise signals that the recipe
turns into win rates itself, the paper's cheaper and weaker variant. `batch_scale` is GDPO's step: one scale for the batch.
The mean win rate of a group is 1/2 whatever the policy learns, so progress shows in other signals only.
`{flex: 1}` with `gruppo.graders.flex.FlexRate` is the reward of UnifiedReward-Flex.

| | here | paper | reference code |
|---|---|---|---|
| body of the paper | setup and result tables of a later version read | | |
| pairs | within each prompt | within the group | over all pictures of the process: right with one prompt per process only |
| order of a pair | one (`swap` of the grader: both) | not known to us | one; a judge that favours the first ranks by index |
| ties, unreadable answers | 1/2, counted | not known to us | 1/2 |
| a request never answered | 1/2, counted; a path with none answered is dropped | not known to us | stops with a KeyError |
| win rate | 3 decimals (`digits`) | not known to us | 3 decimals |
| std | sample (n - 1), eps 1e-8 | "std" | the same |
| several rewards | advantages added | CLIP was added; how is not known to us | advantages added; optional GDPO |
| advantage | clamped to +-5 | not known to us | clamped to +-5 |
| trained steps | int(tau (T - 1)) of the first T - 1, random per path | not known to us | the same |
| picture | what the last call expects (x0_hat) | not known to us | the same |
| optimizer steps | `updates` per batch | 4 accumulation steps | one per 4 of a process's 8 paths |
| KL | 0; exact form | 0 | 0 for FLUX, .004 for Wan, exact form |
| ratio of GRPO-Guard | not here | | `rationorm` |

Hyper-parameters: G 8, 25 steps, shift 3, eta .7, tau .6, clip 1e-4, 2 updates, lr 1e-5 (FLUX.1-dev). With few latent
elements the clip range is wider, as for Flow-GRPO.

Cost: as DanceGRPO, and G(G-1)/2 questions to the judge per prompt: 28 for G 8, 276 for G 24; twice that with `swap`.

Not for: a judge that costs more than the painter, or one whose preferences are nearly coin flips: win rates of a group have the
same spread whether its pictures differ or not, so noise is trained at full size. Nor against hacking by itself: a win rate
derived from a score that can be hacked is hacked as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gruppo.core.gaussian import exact, with_gaussian_kl
from gruppo.graders.judge import pairs_of, win_rates
from gruppo.policies.kernels import FlowSDE
from gruppo.policies.reference import initial
from gruppo.recipe import Recipe, Signal
from gruppo.recipes.dance_grpo import dance_grpo
from gruppo.recipes.gdpo import Decoupled, OneScale
from gruppo.recipes.multi_objective import Weights, columns, listed
from gruppo.types import Group, GruppoError

WIN_RATE = {"win_rate": 1.0}
WHY = "the share of its pairs that a path wins; gruppo.graders.judge.WinRate gives it"


def won(scores: Tensor, digits: int | None = 3) -> Tensor:
    """[G] win rates by a pointwise score: the higher one wins, equal ones tie, abstained ones meet nobody."""
    heard = (~scores.isnan()).nonzero()[:, 0].tolist()
    s = [float(scores[i]) for i in heard]
    preferences = [0.5 if s[i] == s[j] else float(s[i] > s[j]) for i, j in pairs_of(len(s))]
    out = torch.full_like(scores, math.nan)
    out[heard] = torch.tensor(win_rates(preferences, len(s), digits=digits)).to(out)
    return out


@dataclass(frozen=True)
class Preferred:
    """[G, K] weighted objectives, those in `ranked` as win rates within the group."""

    weights: Weights
    ranked: tuple[str, ...] = ()
    digits: int | None = 3

    def __post_init__(self) -> None:
        unknown = [name for name in self.ranked if name not in dict(self.weights)]
        if unknown:
            raise GruppoError(f"the signal {unknown[0]!r} is to be ranked, but the weights name: {', '.join(dict(self.weights))}")

    def __call__(self, group: Group) -> Tensor:
        rates = {name: won(group.signals[name], self.digits) for name in self.ranked if name in group.signals}
        return columns(group.with_(signals={**group.signals, **rates}), self.weights)


@dataclass(frozen=True)
class ClampedAfter:
    """Every advantage within +-most once the batch-level step is done."""

    across: Callable[[list[Group]], list[Group]]
    most: float = 5.0

    def __call__(self, groups: list[Group]) -> list[Group]:
        done = self.across(groups)
        return [g.with_(advantage=g.advantage.clamp(-self.most, self.most)) for g in done if g.advantage is not None]


def pref_grpo(
    n: int = 8,
    weights: Mapping[str, int | float] = WIN_RATE,
    ranked: Sequence[str] = (),
    batch_scale: bool = False,
    eta: float = 0.7,
    tau: float = 0.6,
    clip: float = 1e-4,
    updates: int = 2,
    beta: float = 0.0,
    form: Callable[..., Tensor] = exact,
    shared_noise: bool = True,
    digits: int | None = 3,
    eps: float = 1e-8,
) -> Recipe:
    """The share of its group that a picture beats, by a pairwise judge, in place of a score."""
    named = listed(weights)
    base = dance_grpo(n, eta, tau, clip, updates, weights, shared_noise=shared_noise, eps=eps)
    return replace(
        base,
        rollout=replace(base.rollout, kernel=FlowSDE(eta)),  # type: ignore[type-var]
        reward=Preferred(named, tuple(ranked), digits),
        advantage=Decoupled(named, ddof=1, eps=eps) if batch_scale else base.advantage,
        across=ClampedAfter(OneScale(ddof=1, eps=eps)) if batch_scale else base.across,
        loss=with_gaussian_kl(base.loss, beta, form),
        needs=tuple(Signal(name, WHY if name == "win_rate" else f"an objective, weight {w:g}") for name, w in named),
        reference=initial if beta else None,
    )
