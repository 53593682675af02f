"""What an iteration costs beside DanceGRPO's, on the world `glyphs`: `gruppo bench flow`.

Every method begins at the same weights and paints the same prompts, with the papers' grid of 20 or more steps: T steps, G paths,
one optimizer step, no evaluation. The methods take turns, one iteration each per round, so that what else the machine does falls
on all of them. Times are CPU seconds of the one thread. Calls of the network and trained steps are counted, not timed.
"""

from __future__ import annotations

import json
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from gruppo.policies.flow import FlowPolicy
from gruppo.policies.painters import load_painter
from gruppo.recipe import Recipe
from gruppo.recipes import recipe
from gruppo.recipes.branch_grpo import extremes
from gruppo.runs.disk import whole
from gruppo.train import iterate
from gruppo.types import Group, GruppoError
from gruppo.worlds import WORLDS

PAPERS = {  # seconds per iteration on FLUX, over DanceGRPO's of the same table
    "mix-grpo": "0.51 of tau .6",
    "mix-grpo-flash": "0.39 of tau .6",
    "mix-grpo-flash*": "0.29 of tau .6",
    "branch-grpo": "0.71 of tau 1",
    "branch-grpo, width pruned": "0.45 of tau 1",
    "branch-grpo, depth pruned": "0.45 of tau 1",
    "branch-grpo-mix": "0.21 of tau 1",
}


@dataclass(frozen=True)
class Timed:
    """One method on its own copy of the weights."""

    name: str
    recipe: Recipe
    policy: FlowPolicy
    optimizer: torch.optim.Optimizer

    def iteration(self, round: int, prompts: int) -> float:
        """CPU seconds of one iteration on this round's prompts."""
        world = WORLDS["glyphs"]
        tasks = [world.task(0, round * prompts + i) for i in range(prompts)]
        rng = torch.Generator().manual_seed(round)
        began = time.process_time()
        iterate(self.policy, tasks, scored, self.recipe, self.optimizer, rng)
        return time.process_time() - began


def scored(groups: list[Group]) -> list[Group]:
    """Groups with the world's grade as their reward."""
    (found,) = [WORLDS["glyphs"].graders()[0](groups)]
    return [
        g.with_(signals={**g.signals, "reward": torch.as_tensor(f["colour"]) + torch.as_tensor(f["count"])})
        for g, f in zip(groups, found)
    ]


def methods(n: int) -> dict[str, Recipe]:
    """DanceGRPO, and those that say that they are cheaper; one optimizer step each."""
    return {
        "dance-grpo": recipe("dance-grpo", n=n, updates=1),
        "dance-grpo, tau 1": recipe("dance-grpo", n=n, updates=1, tau=1.0),
        "mix-grpo": recipe("mix-grpo", n=n, updates=1),
        "mix-grpo-flash": recipe("mix-grpo-flash", n=n, updates=1),
        "mix-grpo-flash*": recipe("mix-grpo-flash", n=n, updates=1, stride=0, ratio=0.2),
        "branch-grpo": recipe("branch-grpo", n=n),
        "branch-grpo, width pruned": recipe("branch-grpo", n=n, width=extremes),
        "branch-grpo, depth pruned": recipe("branch-grpo", n=n, depth=5),
        "branch-grpo-mix": recipe("branch-grpo-mix", n=n),
    }


def run(steps: int = 20, n: int = 16, prompts: int = 2, rounds: int = 3) -> list[dict[str, Any]]:
    """One row per method; ratios are medians over rounds of the method's time over DanceGRPO's in the same round."""
    timed = []
    for name, made in methods(n).items():
        policy = FlowPolicy(load_painter(WORLDS["glyphs"].base, dtype=torch.float32, device="cpu"), steps=steps)
        timed.append(Timed(name, made, policy, torch.optim.AdamW(policy.parameters(), lr=1e-6)))
    for one in timed:
        one.iteration(0, prompts)  # untimed: the first call of everything
        one.policy.counts.clear()
    seconds: dict[str, list[float]] = {one.name: [] for one in timed}
    for k in range(1, rounds + 1):
        for one in timed:
            seconds[one.name].append(one.iteration(k, prompts))
    rows = []
    for one in timed:
        ratios, whole_ones = (
            [a / b for a, b in zip(seconds[one.name], seconds[base])] for base in ("dance-grpo", "dance-grpo, tau 1")
        )
        per = {k: v / rounds / prompts for k, v in one.policy.counts.items()}
        rows.append(
            {
                "method": one.name,
                "seconds": median(seconds[one.name]),
                "ratio": median(ratios),
                "low": min(ratios),
                "high": max(ratios),
                "of tau 1": median(whole_ones),
                "sampling calls": per["sampled"],
                "training calls": per["forwards"],
                "trained steps": per["trained"],
                "paper": PAPERS.get(one.name, ""),
            }
        )
    return rows


def table(rows: list[dict[str, Any]], about: str) -> str:
    """The rows as a page."""
    columns = (
        "method",
        "CPU s",
        "dance-grpo = 1",
        "its tau 1 = 1",
        "calls to sample",
        "calls to train",
        "steps trained",
        "paper",
    )
    head = f"| {' | '.join(columns)} |\n" + "|---" * len(columns) + "|\n"
    lines = [
        f"| {r['method']} | {r['seconds']:.2f} | {r['ratio']:.2f} ({r['low']:.2f} to {r['high']:.2f}) | {r['of tau 1']:.2f} | "
        f"{r['sampling calls']:.0f} | {r['training calls']:.0f} | {r['trained steps']:.0f} | {r['paper']} |"
        for r in rows
    ]
    return head + "\n".join(lines) + f"\n\n{about}\n"


def report(steps: int = 20, paths: int = 16, prompts: int = 2, rounds: int = 5, out: Path | None = None) -> str:
    """Run the methods on one thread; the page, written with its numbers where `out` is a folder."""
    if rounds < 1:
        raise GruppoError(f"{rounds} rounds were asked for; at least one is needed")
    torch.set_num_threads(1)
    rows = run(steps, paths, prompts, rounds)
    what = f"{steps} denoising steps, {paths} paths, {prompts} prompts an iteration"
    where = f"one thread of {platform.processor() or platform.machine()}, torch {torch.__version__}"
    text = table(rows, f"{what}, median of {rounds} rounds; calls and steps per prompt; {where}.")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        with whole(out / "flow.md") as file:
            file.write_text("# Flow models: what an iteration costs\n\n`gruppo bench flow --out docs/bench`\n\n" + text)
        with whole(out / "flow.json") as file:
            file.write_text(json.dumps(rows, indent=1))
    return text
