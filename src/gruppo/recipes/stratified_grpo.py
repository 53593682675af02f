"""Stratified GRPO (2510.06214). Rollouts of a search agent that searched 0, 1 or 2 times are unlike one another: each is judged
against its own kind first, and against the whole group only in part.

    SAN_i = (r_i - mu_k) / (sigma_k + eps)         over the paths of stratum k, the one that path i is in
    GN_i  = (r_i - mu) / (sigma + eps)             over the group
    A_i   = alpha SAN_i + (1 - alpha) GN_i         0 <= alpha <= 1
    r_i - mu = (r_i - mu_k) + (mu_k - mu)          the last term is the cross-stratum bias that SAN leaves out
    Var[r - mu] - Var[r - mu_k] = 1/G sum_k n_k (mu_k - mu)^2                   population variances

The stratum of a path is its number of search calls; any function of the group that names one hashable stratum per path will do.
SAN sums to 0 over every stratum. So alpha = 1 puts no gradient at all on the decision which stratum to be in (how often to
search), wherever that decision's log-prob is common to the stratum: only the GN part can learn it.

| | here | paper |
|---|---|---|
| stratum | number of tool calls, the signal `calls` | number of search calls in all runs; the text allows placement or outcome |
| std | population (ddof 0) | unit variance per stratum, which is exact with the population std |
| eps | 1e-6 | not established |
| stratum of one | SAN 0, so (1 - alpha) GN is left | not established |
| stratum decides the reward | SAN 0, so (1 - alpha) GN is left | not established |
| group of one | refused by the rollout; 0 in the advantage | not said |
| loss | PPO clip 0.2, mean over paths of the mean over the model's tokens | not established beyond "GRPO" |
| tool tokens | context, never trained | retrieved tokens masked (search-agent practice) |
| KL | k3 in the loss, beta 0.001 | not established |

There is no published code, so the reference column of other recipes is missing here.

What is not established follows Search-R1's GRPO script, the setting the paper starts from: n 5, beta 0.001 with k3, T 1, lr 1e-6,
at most 2 turns of search with the top 3 passages.

Hyper-parameters: alpha 0.6 is Qwen2.5-3B-Base's (App. D.1, as a reviewer of the paper reports it); the value for Instruct, G, lr,
beta, eps and steps are not established. On a bandit with an easy and a hard stratum
(`gruppo.claims.stratified_grpo`, 10 seeds) the reward was 0.398 with the group alone, 0.397 with alpha 0.6, 0.62 +- 0.18 with
alpha 0.8 and 0.558 with strata alone, which found the right arm and left the choice of stratum where it was. The gain of 0.8
over the group alone, 0.221 [0.0393, 0.402], is above 0 and not surely above the expected 0.2: the claim does not hold.

On the search world (`gruppo compare grpo stratified-grpo --world search --seeds 5`) sampled accuracy went from 27 % to
79.1 +- 2.2 %, with GRPO to 81.2 +- 2.1 %; the difference by seed, -2.2 +- 2.3 points, contains 0.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gruppo.core.advantage import spread, standardize, within
from gruppo.core.kl import with_kl
from gruppo.core.surrogate import PPOClip
from gruppo.recipe import Recipe, Signal
from gruppo.recipes.grpo import grpo
from gruppo.types import Group, GruppoError

Stratum = Callable[[Group], Sequence[Hashable]]


def calls(group: Group) -> list[Hashable]:
    """The number of tool calls of each path."""
    if "calls" not in group.signals:
        raise GruppoError(
            "the strata are the paths' numbers of tool calls, but the group has no signal 'calls'; hold conversations "
            "(rollouts.Conversation), add the grader rollouts.talked, or give another `stratum`"
        )
    return group.signals["calls"].tolist()


def lengths(group: Group) -> list[Hashable]:
    """The number of steps of each path: strata for paths that call no tools."""
    return [len(p) for p in group.paths]


def numbered(labels: Sequence[Hashable], n: int) -> Tensor:
    """Any hashable labels as the numbers 0, 1, ... in order of appearance; a missing label is refused, not made a stratum."""
    labels = list(labels)
    if len(labels) != n:
        raise GruppoError(f"the stratum function returned {len(labels)} labels for {n} paths; every path needs exactly one")
    missing = [i for i, label in enumerate(labels) if label is None or label != label]
    if missing:
        raise GruppoError(f"path {missing[0]} has no stratum: its label is {labels[missing[0]]!r}")
    known: dict[Hashable, int] = {}
    return torch.tensor([known.setdefault(label, len(known)) for label in labels], dtype=torch.long)


@dataclass(frozen=True)
class Stratified:
    """alpha * (standardised within the stratum) + (1 - alpha) * (standardised over the group)."""

    alpha: float
    stratum: Stratum
    ddof: int
    eps: float

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise GruppoError(f"alpha is {self.alpha}; it blends two advantages and must lie between 0 (group) and 1 (strata)")

    def __call__(self, group: Group) -> Tensor:
        assert group.reward is not None
        labels = numbered(self.stratum(group), len(group))
        return spread(self.blend(group.reward, labels), group)

    def blend(self, reward: Tensor, labels: Tensor) -> Tensor:
        """A [G] of rewards [G] and stratum numbers [G]."""
        strata = within(reward, labels, ddof=self.ddof, eps=self.eps)
        return self.alpha * strata + (1 - self.alpha) * standardize(reward, ddof=self.ddof, eps=self.eps)


def stratified_grpo(
    n: int = 5,
    alpha: float = 0.6,
    beta: float = 0.001,
    low: float = 0.2,
    high: float = 0.2,
    ddof: int = 0,
    eps: float = 1e-6,
    stratum: Callable = calls,
) -> Recipe:
    """Advantages within strata of equally many tool calls, blended with the group's."""
    return replace(
        grpo(n, beta, low, high),
        advantage=Stratified(alpha, stratum, ddof, eps),
        loss=with_kl(PPOClip(low, high), beta),
        needs=(Signal("calls", "the strata are the numbers of tool calls"),) if stratum is calls else (),
    )
