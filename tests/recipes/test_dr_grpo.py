"""Dr.GRPO: no scale, a constant denominator, and what that does to length."""

from __future__ import annotations

import pytest
import torch
from tests.recipes.batches import EIGHT, THREE, advantages, group, objective

from gruppo.recipe import Recipe
from gruppo.recipes import recipe
from gruppo.recipes.dr_grpo import dr_grpo
from gruppo.recipes.rloo import rloo


def test_advantage_is_the_distance_from_the_mean() -> None:
    [a] = advantages(dr_grpo(), group(EIGHT))
    assert a == pytest.approx([0.625 if r else -0.375 for r in EIGHT], abs=1e-6)


def test_it_is_rloo_times_g_minus_one_over_g() -> None:
    [ours], [theirs] = advantages(dr_grpo(), group(EIGHT)), advantages(rloo(beta=0.0), group(EIGHT))
    assert ours == pytest.approx([x * 7 / 8 for x in theirs], abs=1e-6)


def test_sum_over_paths_times_length() -> None:
    assert objective(dr_grpo(length=8), THREE) == pytest.approx(0.416667, abs=1e-6)


def test_preset_has_the_authors_length_and_no_reference() -> None:
    r = dr_grpo()
    assert r == dr_grpo(n=8, length=3000, beta=0.0)
    assert r.reference is None


@pytest.mark.claim
def test_length_bias() -> None:
    """Answers right or wrong by a coin, each with its own stop probability: under GRPO wrong answers grow, under Dr.GRPO none do.

    From 5.48 steps on average, 400 updates of 16 paths, 3 seeds.
    """
    wrong, right = zip(*(lengths_after(recipe("grpo", n=16, beta=0.0), seed) for seed in range(3)))
    assert sum(wrong) > 5 * sum(right)
    wrong, right = zip(*(lengths_after(recipe("dr-grpo", n=16, length=64), seed) for seed in range(3)))
    assert abs(sum(wrong) / 3 - 5.48) < 1
    assert abs(sum(right) / 3 - 5.48) < 1


def lengths_after(r: Recipe, seed: int, updates: int = 400) -> tuple[float, float]:
    """Expected lengths of wrong and right answers after plain gradient descent on their two stop logits."""
    from gruppo.core.collate import collate
    from gruppo.core.reduce import weigh
    from gruppo.types import Group, Path, Steps, Task

    g = torch.Generator().manual_seed(seed)
    stop = torch.full((2,), -1.5, requires_grad=True)  # p = .18: 5.48 steps on average
    for _ in range(updates):
        answer = torch.randint(0, 2, (16,), generator=g)
        paths = []
        for a in answer.tolist():
            n = 1 + int(torch.empty(1).geometric_(float(stop[a].detach().sigmoid()), generator=g)) - 1
            paths.append(
                Path(None, torch.zeros(min(n, 1000)), torch.zeros(min(n, 1000)), torch.ones(min(n, 1000), dtype=torch.bool))
            )
        made = Group(Task("q"), paths, reward=answer.float())
        made = made.with_(advantage=r.advantage(made))
        batch = weigh(collate([made]), r.reduce)
        last = batch.mask & (batch.mask.cumsum(1) == batch.mask.sum(1, keepdim=True))
        logit = stop[answer][:, None]
        now = torch.where(last, torch.nn.functional.logsigmoid(logit), torch.nn.functional.logsigmoid(-logit)) * batch.mask
        batch = batch.with_(logp_old=now.detach())
        loss, _ = r.loss(batch, Steps(now), None)
        (slope,) = torch.autograd.grad((batch.weight * loss).sum(), stop)
        with torch.no_grad():
            stop -= slope
    mean = 1 / stop.detach().sigmoid()
    return float(mean[0]), float(mean[1])
