"""TempFlow-GRPO's claims at toy scale: what a branch tells about its step, and what the noise-aware weight is good for.

Numbers from a flow of known velocity (`gruppo.claims.mixture`), 10 steps, 24 children per step against 24 plain paths. These
are not the same cost: a prompt's branches need 1089 network calls, its plain paths 240.
"""

from __future__ import annotations

from gruppo.claims.claim import Claim
from gruppo.claims.mixture import gradients, trained
from gruppo.recipe import Recipe
from gruppo.recipes.flow_grpo import flow_grpo
from gruppo.recipes.tempflow_grpo import tempflow_grpo

PROMPTS, STEPS, N = 40, 10, 24


def plain(n: int) -> Recipe:
    """Flow-GRPO without its divergence."""
    return flow_grpo(n, beta=0.0)


def branches(n: int, *, weighted: bool = True) -> Recipe:
    """TempFlow-GRPO on one trunk per prompt, without its divergence."""
    return tempflow_grpo(n, seeds=1, beta=0.0, weighted=weighted)


def claim(seeds: int = 5) -> Claim:
    """Signal-to-noise of each step's gradient, a branch's over a plain path's: the smallest of the nine steps."""
    rows = []
    for seed in range(seeds):
        flat = gradients(plain(N), seed, prompts=PROMPTS, steps=STEPS)
        branch = gradients(branches(N), seed, prompts=PROMPTS, steps=STEPS)
        ratio = branch.ratio() / flat.ratio()
        rows.append(
            {
                "plain, mean": float(flat.ratio().mean()),
                "branch, mean": float(branch.ratio().mean()),
                "first step": float(ratio[0]),
                "last step": float(ratio[-1]),
                "calls plain": flat.calls,
                "calls branch": branch.calls,
                "smallest ratio": float(ratio.min()),
            }
        )
    return Claim(
        name="tempflow-grpo",
        sentence="a reward that only one step can have earned says more about this step than a reward for a whole path",
        measured=f"|mean| / std over {PROMPTS} prompts of the gradient of each step, {N} children against {N} plain paths",
        figure="smallest ratio",
        rows=tuple(rows),
        expected=(1.0, float("inf")),
    )


def weight(seeds: int = 5) -> Claim:
    """Signal-to-noise of the gradient of what all steps share, with the noise-aware weight over without."""
    rows = []
    for seed in range(seeds):
        row: dict[str, float] = {}
        for name, made in (("plain", plain(N)), ("branch", branches(N))):
            found = gradients(made, seed, prompts=PROMPTS, steps=STEPS)
            row |= {f"{name}, even": found.summed(weighted=False), f"{name}, weighted": found.summed(weighted=True)}
        row |= {f"{name} ratio": row[f"{name}, weighted"] / row[f"{name}, even"] for name in ("plain", "branch")}
        rows.append(row)
    return Claim(
        name="tempflow-grpo/weight",
        sentence="weighing steps by the noise they inject makes the gradient of the whole more reliable",
        measured=f"|mean| / std over {PROMPTS} prompts of the gradient of a bias shared by all steps of the branches",
        figure="branch ratio",
        rows=tuple(rows),
        expected=(1.0, float("inf")),
    )


def alone(seeds: int = 5) -> Claim:
    """Reward after training one shared bias: branches without the weight, minus Flow-GRPO after as many iterations."""
    makes = {
        "plain": plain(8),
        "plain 37": plain(37),  # as many network calls as the branches
        "branch, even": branches(8, weighted=False),
        "branch, weighted": branches(8),
    }
    rows = []
    for seed in range(seeds):
        row = {name: trained(made, seed, steps=STEPS, iterations=30, prompts=4, rate=0.02) for name, made in makes.items()}
        equal = row["branch, even"] - row["plain 37"]
        rows.append({**row, "gain at equal calls": equal, "gain": row["branch, even"] - row["plain"]})
    return Claim(
        name="tempflow-grpo/alone",
        sentence="branching by itself, without the weight, already learns faster than Flow-GRPO",
        measured="reward after 30 iterations of Adam on one bias shared by all steps, even branches minus plain, n 8",
        figure="gain",
        rows=tuple(rows),
        expected=(0.0, float("inf")),
    )
