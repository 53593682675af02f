"""G2RPO's claim at toy scale: do advantages over several granularities say more about a perturbation than those of one?

The truth is the advantage of an ending in 128 steps. A flow of known velocity (`gruppo.claims.mixture`), 16 steps, 12 children
of the steps 0 and 4; the judge's noise is as large as the rewards' own spread within a group, drawn anew for every picture.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gruppo.claims.claim import Claim
from gruppo.claims.mixture import Known, graded, reward, tasks
from gruppo.core.advantage import standardize
from gruppo.policies.flow import Course, FlowPolicy
from gruppo.policies.kernels import FlowSDE
from gruppo.recipes.g2rpo import Summed
from gruppo.rollouts.branching import Branches
from gruppo.types import Group

PROMPTS, STEPS, N, FINE = 100, 16, 12, 128
BRANCHED = (0, 4)


@dataclass(frozen=True)
class At:
    """The same steps in every iteration."""

    steps: tuple[int, ...]

    def __call__(self, T: int, g: torch.Generator) -> list[int]:
        return list(self.steps)


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's, over everything."""
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def fine(policy: FlowPolicy, groups: list[Group], k: int) -> Tensor:
    """[P, G] rewards of endings in 128 equal steps from where the children of step k stand."""
    grid = torch.linspace(float(policy.sigmas[k + 1]), 0, FINE + 1, dtype=torch.float64)
    x = torch.stack([p.steps[k + 1] for group in groups for p in group.paths])
    done = policy.walk(x, [Course.of("0", grid, FlowSDE(), ())], 0, FINE)  # one course: no prompt has learnt anything yet
    return reward(done.last[:, 0]).reshape(len(groups), N)


def agreement(seed: int) -> dict[str, float]:
    """How well the advantages of Lambda {1}, {1, 2}, {1, 2, 3} follow the truth, with and without noise in the judge."""
    policy = FlowPolicy(Known(PROMPTS, STEPS), steps=STEPS, rows=10**6)
    g = torch.Generator().manual_seed(seed)
    groups = Branches(N, branched=At(BRANCHED), strides=(1, 2, 3))(policy, tasks(PROMPTS), graded, g)
    advantage = Summed((("reward", 1.0),), ddof=1, eps=1e-8)
    out: dict[str, float] = {}
    for k in BRANCHED:
        here = [group for group in groups if bool(group.paths[0].mask[k])]
        true = standardize(fine(policy, here, k).T, ddof=1, eps=1e-8).T
        seen = torch.stack(
            [torch.stack([group.signals[f"reward{v}"] for v in ("", "@2", "@3")], 1) for group in here]
        )  # [P, G, J]
        noise = torch.randn(seen.shape, generator=g) * seen.std(1, keepdim=True)
        for name, judged in (("exact", seen), ("noisy", seen + noise)):
            for views in (1, 2, 3):
                made = torch.stack([advantage(p.with_(reward=r[:, :views]))[:, 0] for p, r in zip(here, judged)])
                out[f"{name} {views} k{k}"] = correlation(made, true)
    return out


def rows(seeds: int, judge: str) -> tuple[dict[str, float], ...]:
    """Correlations per seed, and the gain of three granularities over one, averaged over the two steps."""
    found = [agreement(seed) for seed in range(seeds)]
    kept = [{name: value for name, value in row.items() if name.startswith(judge)} for row in found]
    return tuple(
        {**row, "gain": sum(row[f"{judge} 3 k{k}"] - row[f"{judge} 1 k{k}"] for k in BRANCHED) / len(BRANCHED)} for row in kept
    )


def claim(seeds: int = 5) -> Claim:
    """Correlation with the truth of advantages over three granularities minus those over one, under a noisy judge."""
    return Claim(
        name="g2rpo",
        sentence="endings of several granularities judge a perturbation better than one ending does",
        measured=f"correlation with the advantage of a {FINE}-step ending, a judge as noisy as the rewards differ",
        figure="gain",
        rows=rows(seeds, "noisy"),
        expected=(0.0, float("inf")),
    )


def exact(seeds: int = 5) -> Claim:
    """The same under a judge without noise, where a coarse ending has only its own error to add."""
    return Claim(
        name="g2rpo/exact",
        sentence="endings of several granularities judge a perturbation better than one ending does, whoever judges",
        measured=f"correlation with the advantage of a {FINE}-step ending, a judge without noise",
        figure="gain",
        rows=rows(seeds, "exact"),
        expected=(0.0, float("inf")),
    )
