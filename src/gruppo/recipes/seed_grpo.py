"""SEED-GRPO, semantic entropy enhanced GRPO (2505.12346). The less a prompt's answers agree, the smaller its whole update.

    l_i  = mean over t of logp_{i,t}                          under the policy that sampled
    w    = softmax(l_1 .. l_n)                                over the n paths of the prompt
    p_c  = sum of w over the paths of cluster c               paths whose answers mean the same
    H    = - sum_c p_c log p_c                                nats; 0 one answer, log n all different and equally likely
    x    = alpha H / log n
    A^_i = f(x) (r_i - mean(r))                               Dr.GRPO's advantage, Dr.GRPO's loss

    reciprocal   f = 1 / (1 + x)           the authors' code, the default with alpha 0.0417
    linear       f = max(0, 1 - x)         our reading of a word in the paper, whose alpha is 0.02
    exponential  f = exp(-x)               our reading
    Focal(2)     f = max(0, 1 - x)^2       our reading

A path without an answer is a cluster of its own. The factor comes last, after whatever makes the advantage: `Seed` is a recipe's
`across` and takes the recipe's own one, a scale of the whole batch for example, as `after`. Each group's factor is kept as the
signal `seed_factor`, so its mean stands in the metrics of every step.

| | here | paper | reference code (as maxent-grpo documents it) |
|---|---|---|---|
| f | reciprocal | named "linear", "exponential", "focal"; no formula | 1 / (1 + alpha' H), alpha' = alpha / log G |
| alpha | 0.0417 | 0.02 | 0.0417; alpha' = 0.02005 at G = 8, the paper's figure |
| entropy | Shannon, self-normalised | Eq. 5: -(1/K) sum_k log p(C_k), raw sequence probabilities | Shannon, self-normalised |
| likelihood | mean log-prob of the trained steps | sequence probability | length-normalised |
| Eq. 5 | `entropy=printed`, of self-normalised masses only | of raw masses | not there |
| largest entropy | log n of this prompt's graded paths | log G | log G |
| same answer | equal text of the answer; injected | equal text of the answer | equal text |
| no answer | a cluster of its own | not said | the same |
| abstained path | left out of H and of n | not said | not said |
| one path | factor 1 | not said | not said |

Eq. 5 as printed is not bounded by log G: of the masses (0.9, 0.1) it is 1.204 > log 2, and of raw sequence probabilities it is of
the size of a log-likelihood, tens to hundreds, which turns a linear f negative. So it exists here on self-normalised masses only.

Answers are the signal `answers` where a grader gives it, else `answer(path)`: what stands between `<answer>` tags, or the last
number. `same` decides which answers mean the same: `clusters.exact`, `clusters.numeric`, `clusters.Embedded(encode)` or
`clusters.Entailed(judge)`; the last two load sentence-transformers models unless given others (extra `embed`). On the command
line a function is named as module:name, for example `recipe_args.same=gruppo.clusters:numeric`.

Hyper-parameters: alpha 0.0417 (code); n 8, 128 prompts, length 3000, clip 0.2, beta 0, lr 1e-6, T 1 (paper, after Dr.GRPO). The
paper tries alpha 0.01, 0.02, 0.03. Set `length` to the run's max_new_tokens, as for Dr.GRPO. At the published alpha the factor
stays within 0.96 and 1; an independent study (maxent-grpo) finds no gain from alpha 1 at 0.5B and harm at 3B.

Measured at toy scale (`gruppo claim seed-grpo --seeds 8`): with alpha 1 the policy drifts 0.36 [0.33, 0.38] times as far on
prompts with random rewards as without the factor, and learns clean ones as well. At the published alpha no difference can be
seen.

Cost: as Dr.GRPO. Embeddings or entailment add one model call per prompt, over its different answers only.

Not for: prompts whose answers are long texts and `exact`, where every path is a cluster and every prompt gets the same factor; or
XRPO's planner beside it, which buys paths for the very prompts that this shrinks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gruppo.clusters import Answer, Same, exact, labels, tagged
from gruppo.core.likelihood import mean_logp
from gruppo.recipe import Recipe, unchanged
from gruppo.recipes.dr_grpo import dr_grpo
from gruppo.types import Group, GruppoError


def reciprocal(x: float) -> float:
    """1 / (1 + x): the authors' code."""
    return 1 / (1 + x)


def linear(x: float) -> float:
    """max(0, 1 - x): our reading of the paper's "linear"."""
    return max(0.0, 1 - x)


def exponential(x: float) -> float:
    """exp(-x): our reading of the paper's "exponential"."""
    return math.exp(-x)


@dataclass(frozen=True)
class Focal:
    """max(0, 1 - x) ** gamma: our reading of the paper's "focal"; the paper gives neither formula nor gamma."""

    gamma: float = 2.0

    def __call__(self, x: float) -> float:
        return max(0.0, 1 - x) ** self.gamma


def masses(label: Tensor, likelihood: Tensor) -> Tensor:
    """The softmax of the paths' log-likelihoods, summed over the paths that carry the same label."""
    w = likelihood.double().softmax(0)
    _, cluster = label.unique(return_inverse=True)
    return w.new_zeros(int(cluster.max()) + 1).scatter_add(0, cluster, w)


def shannon(mass: Tensor) -> float:
    """-sum p log p, in nats."""
    return max(0.0, float(torch.special.entr(mass).sum()))


def printed(mass: Tensor) -> float:
    """Eq. 5 as printed, -(1/K) sum log p, of masses that sum to 1; not bounded by log n."""
    if not math.isclose(float(mass.sum()), 1.0, abs_tol=1e-6):
        raise GruppoError(f"Eq. 5 is taken of cluster masses that sum to 1; these sum to {float(mass.sum()):.3g}")
    return max(0.0, float(-mass.log().mean()))


@dataclass(frozen=True)
class Seed:
    """Every group's advantages times form(alpha * entropy / log n), one factor for the whole group, after another batch step."""

    alpha: float
    form: Callable[[float], float] = reciprocal
    entropy: Callable[[Tensor], float] = shannon
    answer: Answer = tagged
    same: Same = exact
    after: Callable[[list[Group]], list[Group]] = unchanged

    def __post_init__(self) -> None:
        if not self.alpha >= 0:
            raise GruppoError(f"alpha is {self.alpha}; below 0 the update would grow where the answers disagree")

    def __call__(self, groups: list[Group]) -> list[Group]:
        return [self.shrunk(g) for g in self.after(groups)]

    def shrunk(self, group: Group) -> Group:
        """The group with its factor on the advantage and in `signals["seed_factor"]`."""
        assert group.advantage is not None
        factor = self.factor(group)
        told = {**group.signals, "seed_factor": torch.full((len(group),), factor)}
        return group.with_(advantage=group.advantage * factor, signals=told)

    def factor(self, group: Group) -> float:
        """f of this group's answers, over the paths that have a reward and a step of their own."""
        assert group.reward is not None
        heard = ~(group.reward.isnan() if group.reward.dim() == 1 else group.reward.isnan().all(1)).cpu()
        likelihood = mean_logp(group)
        keep = heard & likelihood.isfinite()
        return self.of(torch.tensor(labels(group, self.answer, self.same))[keep], likelihood[keep])

    def of(self, label: Tensor, likelihood: Tensor) -> float:
        """f of cluster labels [n] and log-likelihoods [n]; 1 for fewer than two paths."""
        n = len(label)
        if n < 2:
            return 1.0
        return max(0.0, self.form(self.alpha * self.entropy(masses(label, likelihood)) / math.log(n)))


def seed_grpo(
    n: int = 8,
    alpha: float = 0.0417,
    length: int = 3000,
    beta: float = 0.0,
    low: float = 0.2,
    high: float = 0.2,
    form: Callable = reciprocal,
    entropy: Callable = shannon,
    answer: Callable = tagged,
    same: Callable = exact,
) -> Recipe:
    """Every prompt's advantages shrink with the semantic entropy of its own answers."""
    base = dr_grpo(n, length, beta, low, high)
    return replace(base, across=Seed(alpha, form, entropy, answer, same, base.across))
