"""CISPO and ScaleRL: bounded weights, gradients that never vanish, the batch's scale, equal prompts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.recipes.batches import THREE, advantages, batch, group, objective

from gruppo.core.reduce import weigh
from gruppo.recipe import Recipe
from gruppo.recipes.cispo import cispo
from gruppo.recipes.grpo import GroupNorm
from gruppo.recipes.scalerl import BatchScale, prompt_mean, scalerl
from gruppo.types import Steps

RATIOS = torch.tensor([[0.5, 1.0, 7.0]])


def weights(r: Recipe) -> list[float]:
    _, stats = r.loss(batch([1.0], [3]), Steps(RATIOS.log()), None)
    return stats["weight"][0].tolist()


def test_bounds() -> None:
    assert weights(cispo()) == pytest.approx([0.5, 1.0, 1.28])
    assert weights(cispo(low=0.2)) == pytest.approx([0.8, 1.0, 1.28])
    assert weights(scalerl()) == pytest.approx([0.5, 1.0, 5.0])


def test_a_clipped_step_keeps_its_gradient() -> None:
    logp = RATIOS.log().requires_grad_()
    cispo().loss(batch([2.0], [3]), Steps(logp), None)[0].sum().backward()
    assert logp.grad is not None
    assert logp.grad[0].tolist() == pytest.approx([-1.0, -2.0, -2.56], abs=1e-6)


def test_mean_over_all_steps() -> None:
    assert objective(cispo(), THREE) == pytest.approx(1.111111, abs=1e-6)


def test_presets() -> None:
    assert cispo().advantage == GroupNorm(ddof=1, eps=1e-6)
    assert scalerl().across == BatchScale(ddof=1, eps=1e-4)
    assert scalerl().reduce is prompt_mean


def test_the_scale_is_the_std_of_all_raw_rewards_of_the_batch() -> None:
    a, b = advantages(scalerl(), group([1.0, 0.0]), group([1.0, 1.0, 1.0, 0.0]))
    std = torch.tensor([1.0, 0, 1, 1, 1, 0]).std().item() + 1e-4
    assert a == pytest.approx([0.5 / std, -0.5 / std], abs=1e-6)
    assert b == pytest.approx([0.25 / std] * 3 + [-0.75 / std], abs=1e-6)


def test_abstained_rewards_do_not_enter_the_scale() -> None:
    silent = group([1.0, 0.0, float("nan")])
    assert advantages(scalerl(), silent)[0][:2] == pytest.approx(advantages(scalerl(), group([1.0, 0.0]))[0], abs=1e-6)


def test_every_prompt_weighs_the_same() -> None:
    b = weigh(batch([0.0] * 3, [2, 4, 3], groups=[0, 0, 1]), prompt_mean)
    assert b.weight[b.group == 0].sum().item() == pytest.approx(0.5)
    assert b.weight[b.group == 1].sum().item() == pytest.approx(0.5)
    assert b.weight[0, 0].item() == pytest.approx(1 / 12)


def test_a_prompt_without_trained_steps_counts_nowhere() -> None:
    b = batch([0.0] * 3, [2, 4, 3], groups=[0, 0, 1])
    mask = b.mask.clone()
    mask[2] = False
    assert weigh(replace(b, mask=mask), prompt_mean).weight.sum().item() == pytest.approx(1.0)
