"""Remap, Reflect, Adjust, the first stage of ConvRec-R1 (2510.20150): a teacher's lists become demonstrations in a catalogue.

A teacher (a large model, a person, a search) names titles best first, some of which the catalogue lacks. Every item c of the
catalogue is scored:

    p_k          = 1 / sqrt(k)                                        what the k-th line of the teacher counts
    s_remap[c]   = sum_k p_k (S[k, c] + I[k, c]) + lambda S_conv[c]   S: how alike line k and item c are; I: 1 if they are one
    s_reflect[c] = s_remap[c] + gamma r[c]                            r: a judge's rating from -L to L of the best N_r, else 0
    s_final[c]   = w[c] s_reflect[c] + b[c]                           what is recommended too often or too seldom is corrected
    demonstration: the N items with the highest s_final that the conversation has not named

| | here | paper |
|---|---|---|
| teacher, judge | callables that are given | language models |
| similarities | callables that are given | not established here |
| lambda, gamma, L, N_r | 1, 1, 2, 10 | not established here |
| fit of w and b | cross-entropy of training truths, held near w = 1, b = 0 | not established here |
| items that the conversation named | never demonstrated | not established here |
| equal scores | the item that the catalogue has first | not said |

The published code (yaochenzhu/Rank-GRPO) begins after this stage, with the demonstrations as data.

`gruppo.worlds.teacher` runs all of it on the world `catalog`; the demonstrations are data of `gruppo sft`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gruppo.sft import Example
from gruppo.types import GruppoError, Task

Teacher = Callable[[Task], Sequence[str]]  # a conversation -> lines, best first


# ---- the three steps on scores


def positions(n: int) -> Float[Tensor, " K"]:
    """1 / sqrt(k) for the lines 1 to n."""
    return torch.arange(1, n + 1, dtype=torch.float32).rsqrt()


def remap(
    alike: Float[Tensor, "K C"], same: Float[Tensor, "K C"], conversation: Float[Tensor, " C"], lam: float
) -> Float[Tensor, " C"]:
    """A teacher's K lines as scores of the catalogue's C items, with what the conversation itself says."""
    return positions(len(alike)) @ (alike + same) + lam * conversation


def reflect(score: Float[Tensor, " C"], rating: Float[Tensor, " C"], gamma: float) -> Float[Tensor, " C"]:
    """The scores moved by a judge's ratings, which are 0 where it was not asked."""
    return score + gamma * rating


def adjust(score: Float[Tensor, "*T C"], weight: Float[Tensor, " C"], bias: Float[Tensor, " C"]) -> Float[Tensor, "*T C"]:
    """Each item's scores scaled and shifted by numbers of its own."""
    return weight * score + bias


def best(score: Float[Tensor, " C"], n: int, named: Bool[Tensor, " C"]) -> list[int]:
    """The n items of the highest score that were not named; of equals the first."""
    free = int((~named).sum())
    if free < n:
        raise GruppoError(f"a list of {n} was asked for, but the conversation leaves only {free} of {len(score)} items")
    return score.masked_fill(named, -torch.inf).sort(descending=True, stable=True).indices[:n].tolist()


def fit_adjustment(
    scores: Float[Tensor, "T C"],
    truths: Bool[Tensor, "T C"],
    named: Bool[Tensor, "T C"],
    *,
    steps: int = 200,
    rate: float = 0.05,
    hold: float = 0.01,
) -> tuple[Float[Tensor, " C"], Float[Tensor, " C"]]:
    """w and b that make the truths of T training conversations likely under softmax(w s + b), starting at 1 and 0.

    `hold` multiplies the mean of (w - 1)^2 + b^2 in the loss, so that an item that no conversation has as a truth stays where it
    is. Conversations without a truth among the items that were not named are left out.
    """
    wanted = truths & ~named
    use = wanted.any(1)
    if not use.any():
        raise GruppoError(f"none of the {len(scores)} conversations has a truth, so w and b cannot be fitted")
    scores, wanted, named = scores[use], wanted[use], named[use]
    if not scores.isfinite().all():
        raise GruppoError(f"{int((~scores.isfinite()).sum())} scores are not finite, so w and b cannot be fitted")
    weight = torch.ones(scores.shape[1], requires_grad=True)
    bias = torch.zeros(scores.shape[1], requires_grad=True)
    share = wanted / wanted.sum(1, keepdim=True)
    optimizer = torch.optim.Adam([weight, bias], lr=rate)
    for _ in range(steps):
        logp = adjust(scores, weight, bias).masked_fill(named, -torch.inf).log_softmax(1)
        loss = -(share * logp.masked_fill(named, 0.0)).sum(1).mean() + hold * ((weight - 1) ** 2 + bias**2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return weight.detach(), bias.detach()


# ---- from a teacher's lines to a demonstration

Fit = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # scores, truths, named -> w, b


@dataclass(frozen=True, eq=False)
class Repair:
    """Scores of a catalogue for a conversation and a teacher's lines, and the list that they make."""

    items: Sequence[str]  # C lines, as a demonstration writes them
    alike: Callable[[Sequence[str]], Tensor]  # K lines -> [K, C]
    same: Callable[[Sequence[str]], Tensor]  # K lines -> [K, C] of 0 and 1
    conversation: Callable[[Task], Tensor]  # [C]
    named: Callable[[Task], Tensor]  # [C] bool
    judge: Callable[[Task, Sequence[str]], Sequence[float]] | None = None  # rates these items; None leaves Reflect out
    lam: float = 1.0
    gamma: float = 1.0
    L: float = 2.0  # the judge rates from -L to L
    N_r: int = 10  # how many items it rates
    weight: Tensor | None = None  # [C] w; None is 1
    bias: Tensor | None = None  # [C] b; None is 0

    def remapped(self, task: Task, lines: Sequence[str]) -> Tensor:
        """s_remap."""
        if not lines:
            raise GruppoError(f"the teacher gave no line for {task.prompt!r}; a demonstration is never made from nothing")
        score = remap(self.alike(lines).float(), self.same(lines).float(), self.conversation(task).float(), self.lam)
        if not score.isfinite().all():
            raise GruppoError(
                f"{int((~score.isfinite()).sum())} of {len(score)} remapped scores are not finite for {task.prompt!r}"
            )
        return score

    def reflected(self, task: Task, lines: Sequence[str]) -> Tensor:
        """s_reflect; s_remap where there is no judge."""
        score = self.remapped(task, lines)
        if self.judge is None:
            return score
        free = int((~self.named(task)).sum())
        asked = best(score, min(self.N_r, free), self.named(task))
        said = [float(r) for r in self.judge(task, [self.items[c] for c in asked])]
        wrong = [r for r in said if not abs(r) <= self.L]
        if len(said) != len(asked) or wrong:
            told = f"rated one {wrong[0]}" if wrong else f"gave {len(said)} ratings"
            raise GruppoError(f"the judge was asked for {len(asked)} ratings from {-self.L:g} to {self.L:g} and {told}")
        rating = torch.zeros_like(score)
        rating[asked] = torch.tensor(said)
        return reflect(score, rating, self.gamma)

    def final(self, task: Task, lines: Sequence[str]) -> Tensor:
        """s_final."""
        score = self.reflected(task, lines)
        one, zero = torch.ones_like(score), torch.zeros_like(score)
        return adjust(score, one if self.weight is None else self.weight, zero if self.bias is None else self.bias)

    def __call__(self, task: Task, lines: Sequence[str], n: int) -> list[str]:
        """The n lines of the demonstration."""
        return [self.items[c] for c in best(self.final(task, lines), n, self.named(task))]

    def fitted(
        self, tasks: Sequence[Task], teacher: Teacher, truths: Callable[[Task], Tensor], fit: Fit = fit_adjustment
    ) -> Repair:
        """With w and b fitted on training conversations; `truths` says [C] which items are right."""
        scores = torch.stack([self.reflected(t, teacher(t)) for t in tasks])
        weight, bias = fit(scores, torch.stack([truths(t) for t in tasks]), torch.stack([self.named(t) for t in tasks]))
        return replace(self, weight=weight, bias=bias)


def demonstrations(tasks: Iterable[Task], teacher: Teacher, repair: Repair, n: int) -> Iterator[Example]:
    """What `gruppo.sft` trains on: each conversation with the repaired list of its teacher."""
    for task in tasks:
        yield Example(task.prompt, "\n".join(repair(task, teacher(task), n)))
