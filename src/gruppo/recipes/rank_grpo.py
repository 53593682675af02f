"""Rank-GRPO, of ConvRec-R1 (2510.20150). The answer is a ranked list: each rank earns, is compared and is clipped by itself.

    rel_k   = 1 if the item at rank k is a truth that no rank before it found
    r_k     = rel_k                                        exp_inf, the default: a rank earns what it finds
    r_k     = sum_{j>=k} rel_j / log2(j + 1)               log_decay: DCG from rank k down
    r_k     = sum_{j>=k} rel_j / Gamma^(j - k)             exp_Gamma
    A_{i,k} = (r_{i,k} - mean_i r_{i,k}) / (std_i r_{i,k} + eps)                      over the group, each rank by itself
    w_{i,k} = exp( mean over the tokens of rank k of (logp - logp_old) )              geometric mean
    J       = 1/(G N) sum_i sum_k min(w A, clip(w, 1 - low, 1 + high) A) - beta KL    per_rank
    J       = the same as a mean over tokens: a rank counts by its length             per_token, the default

The last token of a path that ended gets `end` in place of its rank's advantage when the list has exactly N items, `early` when
it has fewer (None: it keeps its rank's advantage); every token beyond rank N gets `overflow`.

| | here | paper | reference code (TRL 0.21 fork) |
|---|---|---|---|
| aggregation | `weighing` = per_token or per_rank | 1/(G N) sum over ranks | token mean of the micro-batch |
| ranks of the tokens | the spans that the reward read | not said | line ends counted, apart from the reward's parse |
| blank lines | part of the item before | not said | count as ranks for the loss, not for the reward |
| line that is no item | takes no rank, has advantage 0 | not said | takes a rank in the loss, none in the reward |
| anything behind item N | overflow | not said | overflow |
| line end behind item N | part of item N | not said | the end token counts as overflow |
| no item at all | the whole text is rank 1, reward 0 | not said | zeros; tokens by lines |
| token over a border | belongs to the rank it ends | not said | the same |
| rank missing in a list | reward 0 there, no tokens | not said | the same |
| seen titles | compared without case | not said | letter for letter |
| std | sample (n - 1), eps 1e-4 | "std" | n - 1, 1e-4 |
| end and overflow | 0.1, -0.1, -0.1, not divided by a std | named by a reviewer | the same |
| KL | k3 per token, beta 1e-3 | KL to the reference | the same |

Hyper-parameters: n 8, N = `ranks` 20, beta 1e-3, low 0.06, high 0.08, lr 1e-6, Adam (0.9, 0.99), 48 prompts a step, T 1,
at most 1024 new tokens, one update per batch (reference code); the paper's off-policy runs take two (`epochs`). Training starts
from a model tuned on a teacher's repaired lists.

Cost: as GRPO with a reference; reading where each token stands in the text is linear in the tokens.

Measured at toy scale: where every rank has items of its own, P(hit) at rank 8 is 0.697 [0.619, 0.775] higher than with one
DCG per list (`gruppo claim rank-grpo --seeds 10`). Where ranks share their items, exp_inf is ahead early and ends 0.058
[-0.026, 0.142] lower in recall, below one DCG per list in each of five seeds: that claim does not hold (`gruppo claim
rank-grpo/duplicates`).

Not for: lists that depend on an early pick (exp_inf ignores that it may take a later hit away), answers that are one thing, and
sequence-level ratios, filters or bonuses, which need one reward per path.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from gruppo.core.advantage import spread, standardize
from gruppo.core.collate import Passes
from gruppo.core.kl import with_kl
from gruppo.core.ratio import unit_ratio
from gruppo.core.reduce import step_mean
from gruppo.core.surrogate import PPOClip
from gruppo.policies.reference import initial
from gruppo.recipe import Recipe, Signal, whole
from gruppo.rollouts import Parallel
from gruppo.rollouts.segmented import Segmented, scored
from gruppo.types import Batch, Group, GruppoError

Gain = Callable[[Tensor], Tensor]  # hits [G, K] -> reward [G, K]


def exp_inf(hits: Float[Tensor, "G K"]) -> Float[Tensor, "G K"]:
    """Each rank earns its own hit."""
    return hits


def log_decay(hits: Float[Tensor, "G K"]) -> Float[Tensor, "G K"]:
    """DCG@k:N: the discounted hits from rank k down."""
    gain = hits / torch.log2(torch.arange(hits.shape[1]) + 2.0)
    return gain.flip(1).cumsum(1).flip(1)


@dataclass(frozen=True)
class ExpGamma:
    """The hits from rank k down, each rank's worth 1/Gamma of the one before."""

    Gamma: float

    def __post_init__(self) -> None:
        if not self.Gamma >= 1:
            raise GruppoError(f"Gamma is {self.Gamma}; below 1 a hit would count more the farther down it stands")

    def __call__(self, hits: Float[Tensor, "G K"]) -> Float[Tensor, "G K"]:
        reward, tail = torch.zeros_like(hits), torch.zeros_like(hits[:, 0])
        for k in reversed(range(hits.shape[1])):
            tail = hits[:, k] + tail / self.Gamma
            reward[:, k] = tail
        return reward


@dataclass(frozen=True)
class RankReward:
    """[G, ranks] from the hits of every rank; a signal of one number per path is what each of its ranks finds."""

    ranks: int
    gain: Gain
    signal: str = "hits"

    def __call__(self, group: Group) -> Tensor:
        if self.signal not in group.signals:
            raise GruppoError(
                f"Rank-GRPO reads the signal {self.signal!r}, but the graders of this run give only: "
                f"{', '.join(group.signals) or 'nothing'}. Add graders.ranking.Ranking"
            )
        found = group.signals[self.signal]
        found = found if isinstance(found, Tensor) else torch.stack([torch.as_tensor(h) for h in found])
        if found.dim() == 1:
            found = found[:, None].expand(-1, self.ranks)
        if found.shape[1] != self.ranks:
            raise GruppoError(
                f"the recipe has ranks = {self.ranks}, but the grader judges {found.shape[1]} of them; give both the same number"
            )
        return self.gain(found.float())


@dataclass(frozen=True)
class PerRank:
    """Each rank standardised over the group by itself, with advantages of their own for the end and the overflow."""

    ranks: int
    end: float | None
    early: float | None
    overflow: float
    ddof: int
    eps: float

    def __call__(self, group: Group) -> Tensor:
        assert group.reward is not None
        A = spread(standardize(group.reward, ddof=self.ddof, eps=self.eps), group).clone()
        unit = group.unit.to(A.device)
        A[unit >= self.ranks] = self.overflow
        for i, path in enumerate(group.paths):
            longest = int(unit[i].max()) if len(path) else -1
            if path.truncated or longest in (-1, self.ranks):
                continue
            said = self.end if longest == self.ranks - 1 else self.early
            if said is not None:
                A[i, len(path) - 1] = said
        return A


@dataclass(frozen=True)
class RankMean:
    """1/(G N) sum over paths and ranks of the mean over the rank's tokens; a missing rank adds nothing, overflow is one more."""

    ranks: int

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        inside = batch.mask & (batch.unit >= 0)
        index = batch.unit.clamp(min=0)
        width = int(index.max()) + 1 if index.numel() else 1
        zeros = torch.zeros(len(batch), width, device=inside.device)
        count = zeros.scatter_add(1, index, inside.float()).gather(1, index)
        return inside / count.clamp(min=1), batch.mask.any(1).sum().float() * self.ranks


def per_rank(ranks: int) -> Callable[[Batch], tuple[Tensor, Tensor]]:
    """The paper's aggregation: every rank counts 1/(G N)."""
    return RankMean(ranks)


def per_token(ranks: int) -> Callable[[Batch], tuple[Tensor, Tensor]]:
    """The reference code's aggregation: every token counts the same."""
    return step_mean


def rank_grpo(
    n: int = 8,
    ranks: int = 20,
    beta: float = 0.001,
    low: float = 0.06,
    high: float = 0.08,
    end: float | None = 0.1,
    early: float | None = -0.1,
    overflow: float = -0.1,
    epochs: int = 1,
    eps: float = 1e-4,
    gain: Callable = exp_inf,
    weighing: Callable = per_token,
    signal: str = "hits",
    spans: Callable = scored,
) -> Recipe:
    """Reward, advantage, ratio and clip by rank of a list, with the end and the overflow judged apart."""
    hits = (Signal(signal, "what each rank of the list found"),)
    return Recipe(
        rollout=Segmented(Parallel(n), ranks, spans),
        reward=RankReward(ranks, gain, signal),
        advantage=PerRank(ranks, end, early, overflow, ddof=1, eps=eps),
        loss=with_kl(PPOClip(low, high, ratio=unit_ratio), beta),
        reduce=weighing(ranks),
        cadence=whole if epochs == 1 else Passes(epochs, 1),
        reference=initial if beta else None,
        needs=(*hits, Signal("spans", "the characters each rank was read from")) if spans is scored else hits,
    )
