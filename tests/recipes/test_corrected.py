"""Importance correction: bounds, order against clip and KL, and a no-op where sampler and trainer are one program."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tests.recipes.batches import batch

from gruppo.core.correct import Corrected, Masked, Truncated, path_gap
from gruppo.core.kl import WithKL
from gruppo.recipe import Recipe
from gruppo.recipes import RECIPES, recipe
from gruppo.recipes.corrected import corrected, grpo_mis, grpo_tis
from gruppo.rollouts import Reread
from gruppo.types import Batch, Steps


def gapped(weights: list[float], A: float = 1.0) -> Batch:
    """One path whose trainer / sampler ratios are these."""
    b = batch([A], [len(weights)])
    return b.with_(logp_sampler=-torch.tensor([weights]).log())


def test_truncated_weights() -> None:
    assert Truncated(2.0)(gapped([0.5, 1.0, 7.0]))[0].tolist() == pytest.approx([0.5, 1.0, 2.0])
    assert Truncated(2.0, low=0.8)(gapped([0.5, 1.0, 7.0]))[0].tolist() == pytest.approx([0.8, 1.0, 2.0])


def test_masked_weights() -> None:
    assert Masked(3.0)(gapped([0.5, 1.0, 7.0]))[0].tolist() == pytest.approx([0.5, 1.0, 0.0])


def test_the_path_weight_is_the_product_of_its_steps() -> None:
    assert Masked(3.0, gap=path_gap)(gapped([1.2, 1.5]))[0].tolist() == pytest.approx([1.8, 1.8])
    assert Masked(3.0, gap=path_gap)(gapped([2.0, 2.0]))[0].tolist() == pytest.approx([0.0, 0.0])


def test_an_absurd_gap_stays_finite() -> None:
    b = batch([1.0], [1]).with_(logp_sampler=torch.tensor([[-500.0]]))
    assert Truncated(2.0)(b).tolist() == [[2.0]]
    assert float(Truncated(math.inf)(b)) == pytest.approx(math.exp(20), rel=1e-5)


def test_the_weight_is_for_the_policy_term_only() -> None:
    b, now, ref = gapped([4.0]), Steps(torch.zeros(1, 1)), Steps(torch.full((1, 1), -1.0))
    kl = math.exp(-1.0) + 1 - 1
    assert float(grpo_tis(n=8).loss(b, now, ref)[0]) == pytest.approx(-2.0 + 0.04 * kl, abs=1e-6)


def test_it_comes_after_the_clip() -> None:
    b, now = gapped([2.0]), Steps(torch.tensor([[1.5]]).log())
    assert float(grpo_tis(n=8, beta=0.0).loss(b, now, None)[0]) == pytest.approx(-1.2 * 2.0, abs=1e-6)


@pytest.mark.parametrize("name", [e.nickname for e in RECIPES.values()])
def test_any_recipe_can_be_corrected(name: str) -> None:
    base = recipe(name)
    made: Recipe = corrected(base, Truncated(2.0))
    assert made.rollout == Reread(base.rollout)
    if isinstance(base.loss, WithKL):
        assert isinstance(made.loss, WithKL)
        assert isinstance(made.loss.loss, Corrected)
    else:
        assert made.loss == Corrected(base.loss, Truncated(2.0))
    assert replace(made, rollout=base.rollout, loss=base.loss) == base


def test_presets() -> None:
    assert grpo_tis() == corrected(recipe("grpo"), Truncated(2.0))
    assert grpo_mis() == corrected(recipe("grpo"), Masked(3.0, gap=path_gap))
