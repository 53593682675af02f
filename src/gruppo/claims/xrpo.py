"""XRPO's planner at toy scale: the same number of paths, more of them in groups that can teach something.

64 prompts that a fixed policy solves with probability 0 (16 of them), 1 (16), 0.02 to 0.15 (16) and 0.3 to 0.7 (16); 8 paths per
prompt on average, 4 of them before the plan begins. Measured per plan: the share of paths that are in groups with right and
wrong ones, the number of such groups, and the paths that an undecided and a decided prompt get. No prompt is shown solved ones.

The price is shown beside it: with lam = 0 *fewer groups* are mixed than under the uniform plan, because a hard prompt that was
unlucky at first is never tried again; and at lam = 1 the bonus drowns everything else and the plan is uniform.
"""

from __future__ import annotations

from typing import Any

import torch

from gruppo.claims.claim import Claim
from gruppo.recipes.xrpo import Ambiguity
from gruppo.rollouts.allocate import Allocate
from gruppo.rollouts.dynamic import undecided
from gruppo.types import Group, Path, Task

N, KIND = 8, 16


class Coins:
    """A policy whose path on a prompt is right with the probability that is written in the prompt."""

    def sample(self, prompts: list[str], *, g: torch.Generator) -> list[Path]:
        right = torch.rand(len(prompts), generator=g) < torch.tensor([float(p) for p in prompts])
        one = torch.zeros(1)
        return [Path(p, one, one, one > -1, bool(r)) for p, r in zip(prompts, right)]


def grade(groups: list[Group]) -> list[Group]:
    """`correct` from the coin."""
    return [g.with_(signals={"correct": torch.tensor([float(p.output) for p in g.paths])}) for g in groups]


def prompts(seed: int) -> list[Task]:
    """Hopeless, solved, hard and undecided prompts, KIND of each."""
    rng = torch.Generator().manual_seed(seed)
    hard, open_ = (torch.rand(KIND, generator=rng) for _ in range(2))
    chances = [0.0] * KIND + [1.0] * KIND + (0.02 + 0.13 * hard).tolist() + (0.3 + 0.4 * open_).tolist()
    return [Task(str(p)) for p in chances]


def measured(lam: float | None, seed: int) -> dict[str, float]:
    """One step with the planner, or the uniform plan where lam is None."""
    plan: Any = Allocate(N, Ambiguity(lam or 0.0), phases=1 if lam is None else 3)
    groups = plan(Coins(), prompts(seed), grade, torch.Generator().manual_seed(seed + 1000))
    mixed = [g for g in groups if undecided(g.signals["correct"])]
    return {
        "informative": sum(map(len, mixed)) / sum(map(len, groups)),
        "mixed": len(mixed) / len(groups),
        "open": sum(map(len, groups[3 * KIND :])) / KIND,
        "decided": sum(map(len, groups[: 2 * KIND])) / (2 * KIND),
    }


def claim(seeds: int = 5) -> Claim:
    """The share of informative paths with lam 0.05, less the uniform plan's."""
    rows = []
    for seed in range(seeds):
        row: dict[str, float] = {}
        for name, lam in (("uniform", None), ("0", 0.0), ("0.05", 0.05), ("0.2", 0.2), ("1", 1.0)):
            row |= {f"{what} {name}": value for what, value in measured(lam, seed).items()}
        rows.append({**row, "gain": row["informative 0.05"] - row["informative uniform"]})
    return Claim(
        name="xrpo",
        sentence="planning paths by uncertainty spends more of one budget where a group can teach something",
        measured="share of paths in groups with right and wrong ones, lam 0.05 minus uniform, 512 paths on 64 prompts",
        figure="gain",
        rows=tuple(rows),
        expected=(0.0, float("inf")),
    )
