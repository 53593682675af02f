"""Pref-GRPO's claims at toy scale: a pointwise score is hacked where a pairwise judge is not, and near-equal scores train noise.

The first is a bandit over two numbers: quality q and a flaw h, drawn from a Gaussian around the policy's mean, with true utility
q - h^2/2 - 0.15 q^2. A pointwise model says 3.5 + 0.01 q + 0.02 h: its scores lie close together, and it likes the flaw. A
pairwise judge prefers by the true utility with logistic noise. The judge sees the truth here, so this says that win rates carry
what a judge knows at full size, not that judges cannot be hacked; the column `derived` ranks by the pointwise model instead, and
is hacked as it is. `told` gives the pointwise model the true utility too: then there is nothing to choose between the two.

The second draws groups whose true scores differ by ever less and adds the same noise of 0.005 to each: the advantages stay as
large while they say ever less of the truth. Win rates by the same noisy scores (`ranked`) do not help: what helps is a judge
whose noise is smaller than a pointwise model's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gruppo.claims.claim import Claim
from gruppo.graders.judge import pairs_of, win_rates
from gruppo.recipes.pref_grpo import pref_grpo, won
from gruppo.types import Group, Path, Task

Signal = Callable[[Tensor, torch.Generator], Tensor]  # paths [n, 2] -> their signal [n]
G = 8
SPREADS = (1.0, 0.1, 0.01, 0.001)
NOISE = 0.005


def utility(x: Tensor) -> Tensor:
    """[..., 2] -> what a path is worth; at best 1.67, at q = 3.33 without flaw."""
    q, h = x[..., 0], x[..., 1]
    return q - h.square() / 2 - 0.15 * q.square()


def model(x: Tensor) -> Tensor:
    """What the pointwise reward model says."""
    return 3.5 + 0.01 * x[..., 0] + 0.02 * x[..., 1]


def judged(x: Tensor, rng: torch.Generator) -> Tensor:
    """Win rates [n] by a judge who prefers i to j with probability 1 / (1 + exp(u_j - u_i))."""
    u = utility(x)
    likely = torch.stack([u[i] - u[j] for i, j in pairs_of(len(x))]).sigmoid()
    return torch.tensor(win_rates(torch.bernoulli(likely, generator=rng).tolist(), len(x)))


SIGNALS: dict[str, Signal] = {
    "pairwise": judged,
    "pointwise": lambda x, rng: model(x),
    "derived": lambda x, rng: won(model(x)),
    "told": lambda x, rng: utility(x),
}


def advantage(signal: Tensor) -> Tensor:
    """[n] the recipe's own advantage of one group with this signal."""
    recipe, one = pref_grpo(), torch.zeros(1)
    paths = [Path(torch.tensor([0]), torch.tensor([0]), one, one == 0) for _ in signal]
    group = Group(Task("p"), paths, {"win_rate": signal})
    return recipe.advantage(group.with_(reward=recipe.reward(group)))[:, 0]


def train(signal: Signal, seed: int, *, steps: int = 300, groups: int = 4, rate: float = 0.06) -> Tensor:
    """The mean (q, h) of a Gaussian policy of deviation 1 after `steps` steps of the gradient of mean(A log pi), from (0, 0)."""
    rng, mean = torch.Generator().manual_seed(seed), torch.zeros(2)
    for _ in range(steps):
        drawn = torch.randn(groups, G, 2, generator=rng)
        A = torch.stack([advantage(signal(mean + x, rng)) for x in drawn])
        mean = mean + rate * (A[..., None] * drawn).mean((0, 1))
    return mean


def claim(seeds: int = 5) -> Claim:
    """The true utility that a pairwise judge's win rates reach, minus what the hackable pointwise score leaves."""
    rows = []
    for seed in range(seeds):
        done = {name: train(signal, seed) for name, signal in SIGNALS.items()}
        row = {name: float(utility(mean)) for name, mean in done.items()}
        rows.append({**row, "score": float(model(done["pointwise"])), "gain": row["pairwise"] - row["pointwise"]})
    return Claim(
        name="pref-grpo",
        sentence="pairs won, in place of pointwise scores that hardly differ, keep training from being hacked",
        measured="true utility of a Gaussian bandit after 300 steps: win rates by a noisy judge minus a hackable score",
        figure="gain",
        rows=tuple(rows),
        expected=(0.0, float("inf")),
    )


def spread(scale: float, seed: int, groups: int = 200) -> tuple[float, float, float]:
    """At this spread of true scores: correlation of advantage and truth, mean largest advantage, correlation by ranks."""
    rng = torch.Generator().manual_seed(seed)
    truth = torch.randn(groups, G, generator=rng) * scale
    said = truth + NOISE * torch.randn(groups, G, generator=rng)
    A = torch.stack([advantage(row) for row in said.double()])
    ranks = torch.stack([advantage(won(row)) for row in said.double()])
    return correlation(A, truth), float(A.abs().amax(1).mean()), correlation(ranks, truth)


def correlation(a: Tensor, b: Tensor) -> float:
    """Of all entries together."""
    return float(torch.corrcoef(torch.stack([a.flatten().double(), b.flatten().double()]))[0, 1])


def noise(seeds: int = 5) -> Claim:
    """Pointwise scores that differ by less than their noise get advantages of full size that hardly follow the truth."""
    rows = []
    for seed in range(seeds):
        row = {}
        for scale in SPREADS:
            row[f"corr {scale:g}"], row[f"max|A| {scale:g}"], row[f"ranked {scale:g}"] = spread(scale, seed)
        rows.append({**row, "lost": row["corr 1"] - row["corr 0.001"], "size": row["max|A| 0.001"] / row["max|A| 1"]})
    return Claim(
        name="pref-grpo/noise",
        sentence="minimal differences between pointwise scores are amplified into illusory advantages",
        measured="correlation of advantage and truth at a spread of 1 minus that at .001, the scores' noise being .005",
        figure="lost",
        rows=tuple(rows),
        expected=(0.5, 1.0),
    )
