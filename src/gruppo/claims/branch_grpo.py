"""BranchGRPO's claim at toy scale: a tree of 203 network calls tells more than 10 paths of 200 calls.

A flow of known velocity (`gruppo.claims.mixture`), 20 steps; flat paths as in DanceGRPO: one noise per prompt, sample std.
"""

from __future__ import annotations

from dataclasses import replace

from gruppo.claims.claim import Claim
from gruppo.claims.mixture import gradients
from gruppo.policies.kernels import DanceSDE
from gruppo.recipe import Recipe
from gruppo.recipes.branch_grpo import branch_grpo
from gruppo.recipes.flow_grpo import Clamped, Compared, flow_grpo
from gruppo.rollouts.trajectories import Trajectories, but_last

PROMPTS, STEPS, ETA = 150, 20, 0.3


def flat(n: int) -> Recipe:
    """n paths from one noise, each step as noisy as the tree's."""
    return replace(
        flow_grpo(n, clip=1e-3, beta=0.0),
        rollout=Trajectories(n, DanceSDE(ETA), but_last, shared_noise=True),
        advantage=Clamped(Compared(ddof=1, eps=1e-8)),
    )


def claim(seeds: int = 5) -> Claim:
    """Mean signal-to-noise of the steps' gradients, of a tree over that of flat paths for as many network calls."""
    rows = []
    for seed in range(seeds):
        row: dict[str, float] = {}
        for name, made in (("tree", branch_grpo(eta=ETA)), ("flat 10", flat(10)), ("flat 16", flat(16))):
            found = gradients(made, seed, prompts=PROMPTS, steps=STEPS)
            row |= {name: float(found.ratio().mean()), f"calls {name}": found.calls}
        rows.append({**row, "ratio": row["tree"] / row["flat 10"]})
    return Claim(
        name="branch-grpo",
        sentence="for the same number of network calls, a tree's gradient is more reliable than that of separate paths",
        measured=f"mean over steps of |mean| / std over {PROMPTS} prompts of the gradient, tree over 10 flat paths, eta {ETA}",
        figure="ratio",
        rows=tuple(rows),
        expected=(1.15, float("inf")),
    )
