"""The unlikeliness reward (2506.02355). GRPO raises what was already likely; here a right answer earns less the likelier it was.

    a_i = how many of the n paths of the group are less likely than path i         0 = the least likely; wrong paths count too
    r_i = R_i (1 - beta_rank a_i / n)                                              the authors' code, `share=as_coded`
    r_i = R_i (1 - beta_rank (a_i + 1) / n)                                        the paper, `share=as_printed`
    A_i = (r_i - mean(r)) / (std(r) + eps)
    J   = 1 / (sum_i |o_i|) sum_i sum_t { min(rho A_i, clip(rho, 1 - 0.2, 1 + 0.2) A_i) - beta KL_t }

R is raw correctness, 0 or 1. Only that part of the reward is discounted: `weight` is what it counts for in the reward, which
a run fills in from its own `weights`, and everything else the reward adds (format, length) stays as it is. Groups that are
all right or all wrong on R are replaced before the discount is taken: an all-right group would otherwise have advantages,
although it has nothing to say about right and wrong.

| | here | paper | reference code (verl fork) |
|---|---|---|---|
| rank's share | a / n | (G - rank) / G, rank 0 the most probable: (a + 1) / n | a / n |
| likelihood | mean log-prob of the trained steps; `score=sum_logp` | "probability" | mean, read again by the trainer |
| equally likely paths | share the mean of their ranks | not said | the order of argsort decides |
| ranked | all paths with a reward | the group | the group, padding rows included |
| discounted | the correctness part | R | the whole reward, binary there |
| filter | on raw `correct`, refilled up to `refills` times | discarded | discarded, buffered until 256 samples |
| surplus groups | dropped | not said | trained: a buffer of up to 256 + 511 samples |
| std | sample (n - 1), eps 1e-6 | "std" | n - 1, 1e-6 |
| KL | k3 held to [-10, 10], in the loss, beta 0.10 | 0.10 | the same; 0.02 in its GRPO baseline |
| passes over a batch | `epochs` = 2 | 1, 2, 3 | 1, 2, 3 |
| steps with a large gradient | `fit.skip_grad_norm=20` skips them | not said | skipped from norm 20 on, clip 1 |
| text after the proof | the grader's business | not said | counted as wrong |

With one right path in a group the std takes the discount back: the method acts from two right paths on. More passes are the
paper's second remedy; they act through the clip and need `fit.paths_per_prompt` large enough for several right paths.

Hyper-parameters: n 32, beta_rank 0.25, beta 0.10, epochs 2, clip 0.2, lr 1e-6, 16 theorems per step, 256 samples per update,
T 1, weight decay 0.01 (authors' script). The embedded worlds set beta to 0; `recipe_args.beta=0.1` is the paper's.

Measured at toy scale (`gruppo claim unlikeliness --seeds 8`): after 30 steps the effective number of right answers is 1.81
[1.37, 2.24] times GRPO's, at 0.90 instead of 0.95 right. That more passes help could not be seen on a table of arms.

Cost: as GRPO with a reference, `epochs` times over in the update; sampling goes on until enough groups are undecided. What it is
for shows in pass@N at large N: `gruppo eval RUN --samples 512`.

Not for: tasks with one right answer, or rewards that are not right-or-wrong; and not together with XRPO's novelty bonus, which
pays for rarity a second time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gruppo.core.collate import Passes
from gruppo.core.kl import k3, with_kl
from gruppo.core.likelihood import mean_logp
from gruppo.core.reduce import step_mean
from gruppo.core.surrogate import PPOClip
from gruppo.policies.reference import initial
from gruppo.recipe import Recipe, Signal, whole
from gruppo.recipes.grpo import GroupNorm, total
from gruppo.rollouts import Dynamic, Parallel
from gruppo.types import Group, GruppoError

Share = Callable[[Tensor, int], Tensor]  # ranks [n], 0 the least likely, and n -> how much of beta_rank is taken off


def as_coded(rank: Tensor, n: int) -> Tensor:
    """a / n: the least likely path keeps its whole reward."""
    return rank / n


def as_printed(rank: Tensor, n: int) -> Tensor:
    """(a + 1) / n: beta_rank / n less than the code gives to every right path."""
    return (rank + 1) / n


def ranks(score: Tensor) -> Tensor:
    """How many entries are smaller, [n]; equal ones share the mean of their places."""
    smaller = (score[:, None] > score[None]).sum(1)
    equal = (score[:, None] == score[None]).sum(1)
    return smaller + (equal - 1) / 2


@dataclass(frozen=True)
class Unlikely:
    """The reward, less weight * correct * beta_rank * share of the path's likelihood rank in its group."""

    reward: Callable[[Group], Tensor]
    beta_rank: float
    share: Share = as_coded
    score: Callable[[Group], Tensor] = mean_logp
    signal: str = "correct"
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.beta_rank <= 1:
            raise GruppoError(f"beta_rank is {self.beta_rank}; it is the share of a right answer's reward that may be taken off")

        if not self.weight > 0:
            raise GruppoError(
                f"the unlikeliness reward takes off a share of what {self.signal!r} counts for, but its weight in the reward is "
                f"{self.weight:g}; weigh {self.signal!r} in the run, or say with recipe_args.weight how much of the reward it is"
            )

    def __call__(self, group: Group) -> Tensor:
        raw = self.reward(group)
        if self.signal not in group.signals:
            raise GruppoError(
                f"the unlikeliness reward discounts the signal {self.signal!r}, but the graders of this run give only: "
                f"{', '.join(group.signals) or 'nothing'}"
            )
        score = self.score(group)
        heard = ~raw.isnan().cpu() & score.isfinite()
        return raw - self.weight * self.discount(group.signals[self.signal], score, heard).to(raw)

    def discount(self, correct: Tensor, score: Tensor, heard: Tensor) -> Tensor:
        """correct * beta_rank * share [n], of ranks among the paths that were heard; 0 for the others."""
        right = correct.float().cpu()
        strange = ~(right.isnan() | (right == 0) | (right == 1))
        if strange.any():
            raise GruppoError(
                f"the signal {self.signal!r} holds {float(right[strange][0]):g}, but the unlikeliness reward discounts a grade "
                "that is 0 or 1 (a negative reward would grow by a discount); give other measures another name"
            )
        out = torch.zeros(len(right))
        if heard.any():
            out[heard] = self.beta_rank * self.share(ranks(score[heard]), int(heard.sum()))
        return out * right.nan_to_num(nan=0.0)


def held_k3(logp: Tensor, logp_ref: Tensor) -> Tensor:
    """k3, held to at most 10 (it is never negative)."""
    return k3(logp, logp_ref).clamp(-10.0, 10.0)


def unlikeliness(
    n: int = 32,
    beta_rank: float = 0.25,
    beta: float = 0.10,
    epochs: int = 2,
    parts: int = 1,
    low: float = 0.2,
    high: float = 0.2,
    eps: float = 1e-6,
    refills: int = 10,
    weight: float = 1.0,
    share: Callable = as_coded,
    score: Callable = mean_logp,
) -> Recipe:
    """A right answer earns less the likelier it was among its siblings; undecided groups only, several passes, a KL."""
    return Recipe(
        rollout=Dynamic(Parallel(n), signal="correct", refills=refills),
        reward=Unlikely(total, beta_rank, share, score, weight=weight),
        advantage=GroupNorm(ddof=1, eps=eps),
        loss=with_kl(PPOClip(low, high), beta, held_k3),
        reduce=step_mean,
        cadence=whole if (epochs, parts) == (1, 1) else Passes(epochs, parts),
        reference=initial if beta else None,
        needs=(Signal("correct", "the filter and the discount read raw correctness"),),
    )
