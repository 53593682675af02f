"""GSPO: the path's geometric mean ratio, its tiny clip, and the token form's equal gradient."""

from __future__ import annotations

import math

import pytest
import torch
from tests.recipes.batches import batch, losses

from gruppo.core.collate import Passes
from gruppo.core.ratio import unit_ratio, unit_token_ratio
from gruppo.core.reduce import sequence_mean, weigh
from gruppo.core.surrogate import PPOClip
from gruppo.recipes.grpo import GroupNorm
from gruppo.recipes.gspo import gspo, gspo_token
from gruppo.types import GruppoError, Steps


def test_the_ratio_is_the_geometric_mean_of_the_steps() -> None:
    s = math.exp((math.log(1.0001) + math.log(1.0003)) / 2)
    assert losses(gspo(), [1.0], [[1.0001, 1.0003]])[0].tolist() == pytest.approx([-s, -s], abs=1e-7)


@pytest.mark.parametrize(
    ("rho", "A", "loss"), [(1.01, 1.0, -1.0004), (0.99, -1.0, 0.9997), (1.01, -1.0, 1.01), (0.99, 1.0, -0.99)]
)
@pytest.mark.parametrize("make", [gspo, gspo_token])
def test_clip_of_the_whole_path(make, rho: float, A: float, loss: float) -> None:
    assert losses(make(), [A], [[rho, rho, rho]])[0].tolist() == pytest.approx([loss] * 3, abs=1e-6)


def test_one_wild_step_clips_the_whole_path() -> None:
    logp = torch.zeros(1, 3)
    logp[0, 0] = 0.01
    logp.requires_grad_()
    gspo().loss(batch([1.0], [3]), Steps(logp), None)[0].sum().backward()
    assert logp.grad is not None
    assert not logp.grad.any()


def test_both_forms_have_the_same_value_and_gradient_for_one_advantage_per_path() -> None:
    b = weigh(batch([1.0, -0.5], [3, 2]), sequence_mean)
    slopes = []
    for r in (gspo(low=0.1, high=0.1), gspo_token(low=0.1, high=0.1)):
        logp = torch.tensor([[0.02, -0.03, 0.05], [0.01, 0.04, 0.0]], requires_grad=True)
        loss, _ = r.loss(b, Steps(logp), None)
        (b.weight * loss).sum().backward()
        assert logp.grad is not None
        slopes.append((loss.detach() * b.mask, logp.grad))
    assert torch.allclose(slopes[0][0], slopes[1][0], atol=1e-6)
    assert torch.allclose(slopes[0][1], slopes[1][1], atol=1e-6)


def test_on_policy_the_value_is_minus_the_advantage() -> None:
    assert losses(gspo(), [0.7], [[1.0, 1.0]])[0].tolist() == pytest.approx([-0.7, -0.7])


def test_preset() -> None:
    assert gspo().loss == PPOClip(3e-4, 4e-4, ratio=unit_ratio)
    assert gspo_token().loss == PPOClip(3e-4, 4e-4, ratio=unit_token_ratio)
    assert gspo().reduce is sequence_mean
    assert gspo().cadence == Passes(1, 4)
    assert gspo().advantage == GroupNorm(ddof=1, eps=1e-4)
    assert gspo().reference is None


def test_four_mini_batches_of_whole_groups() -> None:
    b = batch([0.0] * 8, [1] * 8, groups=[0, 0, 1, 1, 2, 2, 3, 3])
    assert [p.group.tolist() for p in gspo().cadence(b)] == [[0, 0], [1, 1], [2, 2], [3, 3]]


def test_fewer_groups_than_mini_batches_is_a_sentence() -> None:
    with pytest.raises(GruppoError, match="4 optimizer steps per pass need at least as many groups, this batch has 1"):
        list(gspo().cadence(batch([0.0], [1])))
