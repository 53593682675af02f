"""GDPO's claim at toy scale: GRPO's sum maps unlike reward combinations to one advantage, GDPO keeps them apart.

Groups of 4 paths with two rewards of 0 or 1 are drawn at random; counted is how many different advantage vectors come out, the
order of the paths aside. The other columns train the three replies of Multi-Objective GRPO's claim with equal weights, and show
where the decoupling ends: once only safe and harmful help are left in a group, both objectives are two-valued, their normalised
values are equal and opposite, and A is 0 but for the epsilons. The division by the batch's std makes a full update of what is
left, so the objective with the larger spread wins after all. Weights that are not equal decide it, whatever the sizes: at 60 to
40 for safety the policy ends in refusing, which is 0.1 safer and 0.75 less helpful than safe help.
"""

from __future__ import annotations

import torch

from gruppo.claims.claim import Claim
from gruppo.claims.multi_objective import ones, tenths, train
from gruppo.recipe import Recipe
from gruppo.recipes.gdpo import gdpo
from gruppo.recipes.multi_objective import multi_objective
from gruppo.types import Group, Path, Task

EQUAL, SAFER = {"safety": 0.5, "helpfulness": 0.5}, {"safety": 0.6, "helpfulness": 0.4}


def distinct(recipe: Recipe, drawn: torch.Tensor) -> int:
    """How many different advantage vectors the groups [N, n, 2] get before any batch-level scale."""
    one = torch.zeros(1)
    paths = [Path(torch.tensor([0]), torch.tensor([0]), one, one == 0) for _ in range(drawn.shape[1])]
    found = set()
    for rewards in drawn:
        group = Group(Task("q"), paths, {"first": rewards[:, 0], "second": rewards[:, 1]})
        advantage = recipe.advantage(group.with_(reward=recipe.reward(group)))[:, 0]
        found.add(tuple(round(100 * float(a)) for a in advantage.sort().values))
    return len(found)


def claim(seeds: int = 5) -> Claim:
    """Different advantage vectors of GDPO minus those of the sum, over 200 random groups."""
    rows = []
    both = {"first": 1.0, "second": 1.0}
    for seed in range(seeds):
        drawn = torch.bernoulli(torch.full((200, 4, 2), 0.5), generator=torch.Generator().manual_seed(seed))
        row = {"gdpo": float(distinct(gdpo(weights=both), drawn)), "sum": float(distinct(multi_objective(weights=both), drawn))}
        row["gain"] = row["gdpo"] - row["sum"]
        for name, signals in (("ones", ones), ("tenths", tenths)):
            row[f"safe help, {name}"] = float(train(gdpo(weights=EQUAL), signals, seed)[1])
        row["refusal at 60:40"] = float(train(gdpo(weights=SAFER), tenths, seed)[0])
        rows.append(row)
    return Claim(
        name="gdpo",
        sentence="a normalised sum collapses distinct reward combinations into identical advantages; normalising each does not",
        measured="different advantage vectors over 200 random groups of 4 paths with two rewards of 0 or 1",
        figure="gain",
        rows=tuple(rows),
        expected=(1.0, float("inf")),
    )
