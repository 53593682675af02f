"""The loop itself: what it reports about the step it took."""

from __future__ import annotations

from dataclasses import replace

import torch
from tests.tiny import tiny_model, tiny_tokenizer

from gruppo.graders.grade import Grading
from gruppo.policies.token import TokenPolicy
from gruppo.recipes.grpo import grpo
from gruppo.rollouts import Parallel
from gruppo.train import iterate
from gruppo.types import Task


def sevens(groups):
    return [{"sevens": [float("7" in p.output) for p in g.paths]} for g in groups]


def gap(rollout) -> float:
    torch.manual_seed(0)
    policy = TokenPolicy(tiny_model("qwen3"), tiny_tokenizer(), temperature=0.7, max_new=12)
    recipe = replace(grpo(n=6, beta=0.0), rollout=rollout)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    rng = torch.Generator().manual_seed(0)
    tasks = [Task("3+4"), Task("a longer one: 1+2")]
    return iterate(policy, tasks, Grading([sevens], {"sevens": 1.0}), recipe, optimizer, rng).stats["gap"]


def test_the_gap_of_a_fresh_iteration_is_rounding() -> None:
    assert gap(Parallel(6)) < 1e-4


def test_a_sampler_that_says_something_else_shows_in_the_gap() -> None:
    def wrong(policy, tasks, grade, rng):
        groups = Parallel(6)(policy, tasks, grade, rng)
        return [g.with_(paths=[replace(p, logp=p.logp - 0.25) for p in g.paths]) for g in groups]

    assert abs(gap(wrong) - 0.25) < 1e-3
