"""GRPO: advantages, clip, mean of means and k3 by hand."""

from __future__ import annotations

import pytest
import torch
from tests.recipes.batches import EIGHT, THREE, advantages, batch, group, losses, objective

from gruppo.core.kl import WithKL
from gruppo.core.surrogate import PPOClip
from gruppo.recipes.grpo import GroupNorm, grpo
from gruppo.types import GruppoError, Steps

BARE = grpo(n=8, beta=0.0)


def test_advantage_is_the_sample_std_with_1e_4() -> None:
    [a] = advantages(BARE, group(EIGHT))
    assert a[0] == pytest.approx(1.207381, abs=1e-6)
    assert a[1] == pytest.approx(-0.724429, abs=1e-6)


@pytest.mark.parametrize(
    ("ddof", "eps", "right", "wrong"),
    [(1, 1e-4, 1.207381, -0.724429), (1, 1e-6, 1.207612, -0.724567), (0, 0.0, 1.290994, -0.774597)],
)
def test_std_conventions(ddof: int, eps: float, right: float, wrong: float) -> None:
    g = group(EIGHT)
    a = GroupNorm(ddof, eps)(g.with_(reward=g.signals["reward"]))[:, 0]
    assert float(a[0]) == pytest.approx(right, abs=1e-6)
    assert float(a[1]) == pytest.approx(wrong, abs=1e-6)


def test_equal_rewards_give_exactly_zero() -> None:
    assert advantages(BARE, group([1.0] * 4), group([0.1] * 7)) == [[0.0] * 4, [0.0] * 7]


def test_mean_of_the_paths_means() -> None:
    assert objective(BARE, THREE) == pytest.approx(1.166667, abs=1e-6)


@pytest.mark.parametrize(
    ("rho", "A", "loss"), [(1.5, 1.0, -1.2), (0.5, -1.0, 0.8), (0.5, 1.0, -0.5), (3.0, -1.0, 3.0), (1.1, 1.0, -1.1)]
)
def test_clip(rho: float, A: float, loss: float) -> None:
    assert float(losses(BARE, [A], [[rho]])[0, 0]) == pytest.approx(loss, abs=1e-6)


def test_cap_bounds_the_unclipped_branch() -> None:
    from dataclasses import replace

    assert float(losses(replace(BARE, loss=PPOClip(0.2, 0.2, cap=2.0)), [-1.0], [[3.0]])[0, 0]) == pytest.approx(2.0, abs=1e-6)


@pytest.mark.parametrize(("ref", "kl"), [(-1.2, 0.0187308), (-0.8, 0.0214028)])
def test_k3_enters_with_beta(ref: float, kl: float) -> None:
    b = batch([0.0], [1])
    loss, stats = grpo(n=8).loss(b, Steps(torch.tensor([[-1.0]])), Steps(torch.tensor([[ref]])))
    assert float(stats["kl"][0, 0]) == pytest.approx(kl, abs=1e-7)
    assert float(loss[0, 0]) == pytest.approx(0.04 * kl, abs=1e-8)


@pytest.mark.parametrize("A", [1.0, -1.0])
def test_gradient_raises_good_paths_and_lowers_bad_ones(A: float) -> None:
    b = batch([A], [2])
    logp = torch.zeros(1, 2, requires_grad=True)
    BARE.loss(b, Steps(logp), None)[0].sum().backward()
    assert logp.grad is not None
    assert torch.equal(-logp.grad.sign(), torch.full((1, 2), A))


@pytest.mark.parametrize("off", [0.3, -0.3])
def test_kl_pulls_back_to_the_reference(off: float) -> None:
    logp = torch.full((1, 1), -1.0 + off, requires_grad=True)
    grpo(n=8).loss(batch([0.0], [1]), Steps(logp), Steps(torch.full((1, 1), -1.0)))[0].sum().backward()
    assert logp.grad is not None
    assert float(logp.grad) * off > 0


def test_beta_zero_needs_no_reference() -> None:
    assert BARE.reference is None
    assert not isinstance(BARE.loss, WithKL)


def test_the_kl_without_a_reference_is_a_sentence() -> None:
    with pytest.raises(GruppoError, match=r"adds 0\.04 \* KL to the reference, but the run has no reference policy"):
        grpo(n=8).loss(batch([0.0], [1]), Steps(torch.zeros(1, 1)), None)


def test_negative_beta_is_refused() -> None:
    with pytest.raises(GruppoError, match=r"beta is -0\.1; a negative KL coefficient"):
        grpo(n=8, beta=-0.1)


def test_group_of_one_is_refused() -> None:
    with pytest.raises(GruppoError, match="paths_per_prompt is 1; a group needs at least 2 paths"):
        grpo(n=1)


def test_preset() -> None:
    assert grpo() == grpo(n=64, beta=0.04, low=0.2, high=0.2, eps=1e-4)
    assert grpo().advantage == GroupNorm(ddof=1, eps=1e-4)
