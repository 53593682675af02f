"""REC: masks, weights, PPO's gradient, and the derivation, by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.recipes.batches import EIGHT, THREE, advantages, batch, group, objective
from tests.recipes.trained import trained
from torch import Tensor

from gruppo.core.surrogate import PPOClip
from gruppo.recipe import Recipe
from gruppo.recipes.grpo import GroupNorm
from gruppo.recipes.rec import (
    OneSide,
    Reinforce,
    Ring,
    TwoSide,
    importance,
    rec_oneside,
    rec_oneside_is,
    rec_reinforce,
    rec_ring,
    rec_ring_is,
    rec_twoside,
    rec_twoside_is,
)
from gruppo.types import GruppoError, Loss, Steps

RHO = torch.tensor([0.3, 0.5, 0.79, 1.0, 1.19, 1.5, 2.9, 3.1])
ALL = [rec_reinforce, rec_oneside, rec_oneside_is, rec_twoside, rec_twoside_is, rec_ring, rec_ring_is]


def slope(loss: Loss, rho: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """The loss's values and its gradient in the log-probs, one step per row."""
    b = batch(A.tolist(), [1] * len(A))
    b = b.with_(advantage=A[:, None])
    logp = rho.log()[:, None].requires_grad_()
    value, _ = loss(b, Steps(logp), None)
    value.sum().backward()
    assert logp.grad is not None
    return value.detach()[:, 0], logp.grad[:, 0]


@pytest.mark.parametrize(
    ("mask", "A", "kept"),
    [
        (OneSide(0.2, 0.2), 1.0, [1, 1, 1, 1, 1, 0, 0, 0]),
        (OneSide(0.2, 0.2), -1.0, [0, 0, 0, 1, 1, 1, 1, 1]),
        (OneSide(0.2, 0.2), 0.0, [1, 1, 1, 1, 1, 1, 1, 1]),
        (TwoSide(0.2, 0.2), 1.0, [0, 0, 0, 1, 1, 0, 0, 0]),
        (TwoSide(0.2, 0.2), -1.0, [0, 0, 0, 1, 1, 0, 0, 0]),
        (Ring(0.2, 0.2, 0.6, 2.0), 1.0, [1, 0, 0, 1, 1, 0, 0, 0]),
        (Ring(0.2, 0.2, 0.6, 2.0), -1.0, [0, 0, 0, 1, 1, 0, 0, 1]),
        (OneSide(0.6, 2.0), 1.0, [1, 1, 1, 1, 1, 1, 1, 0]),
        (OneSide(0.6, 2.0), -1.0, [0, 1, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_masks(mask: object, A: float, kept: list[int]) -> None:
    assert mask(RHO, torch.full_like(RHO, A)).int().tolist() == kept  # type: ignore[operator]


def test_a_masked_step_is_counted_on_the_side_it_left() -> None:
    b = batch([1.0, -1.0], [1, 1])
    _, stats = rec_oneside().loss(b, Steps(torch.tensor([[1.5], [0.5]]).log()), None)
    assert stats["clip_high"][:, 0].tolist() == [1.0, 0.0]
    assert stats["clip_low"][:, 0].tolist() == [0.0, 1.0]


def test_oneside_is_has_the_gradient_of_ppos_clip_and_another_value() -> None:
    g = torch.Generator().manual_seed(0)
    rho, A = torch.randn(200, generator=g).exp(), torch.randn(200, generator=g)
    ours, theirs = slope(rec_oneside_is().loss, rho, A), slope(PPOClip(0.2, 0.2), rho, A)
    assert torch.allclose(ours[1], theirs[1], atol=1e-6)
    assert float(ours[1].abs().max()) > 1
    assert float((ours[0] - theirs[0]).abs().max()) > 0.1


def test_without_importance_sampling_the_weight_is_one() -> None:
    rho, A = torch.tensor([0.9, 1.1, 0.5, 3.0]), torch.tensor([2.0, -1.0, 2.0, -1.0])
    assert slope(rec_oneside().loss, rho, A)[1].tolist() == pytest.approx([-2.0, 1.0, -2.0, 1.0])
    assert slope(rec_oneside_is().loss, rho, A)[1].tolist() == pytest.approx([-1.8, 1.1, -1.0, 3.0])


def test_on_policy_all_seven_have_one_gradient() -> None:
    rho, A = torch.ones(6), torch.tensor([1.0, -1.0, 0.5, 0.0, -2.0, 3.0])
    for make in ALL:
        assert torch.equal(slope(make().loss, rho, A)[1], -A)


def test_a_masked_step_with_an_infinite_ratio_has_no_gradient() -> None:
    b = batch([1.0], [1])
    logp = torch.tensor([[200.0]], requires_grad=True)
    rec_oneside_is().loss(b, Steps(logp), None)[0].sum().backward()
    assert logp.grad is not None
    assert float(logp.grad) == 0.0


def test_the_pairwise_surrogate_has_reinforces_gradient() -> None:
    """(1 / K^2) sum_{i<j} (a_i - a_j)^2 with a_i = r_i - tau d_i: its slope at d = 0 is -(2 tau / K)(r_i - mean(r))."""
    reward, tau = torch.tensor([1.0, 0, 0.5, 0]), 0.5
    logp = torch.zeros(4, requires_grad=True)
    a = reward - tau * logp
    ((a[:, None] - a[None]).square().sum() / 2 / 16).backward()
    assert logp.grad is not None
    [A] = advantages(rec_reinforce(), group(reward.tolist()))
    assert torch.allclose(logp.grad, -2 * tau / 4 * torch.tensor(A))
    assert torch.allclose(slope(rec_reinforce().loss, torch.ones(4), torch.tensor(A))[1] * 2 * tau / 4, logp.grad)


def test_advantage_has_no_std() -> None:
    [a] = advantages(rec_oneside(), group(EIGHT))
    assert a[:2] == pytest.approx([0.625, -0.375])


def test_grpo_in_the_same_code_divides_by_the_population_std() -> None:
    [a] = advantages(replace(rec_oneside_is(), advantage=GroupNorm(0, 1e-6)), group([1.0, 0, 0, 0]))
    assert a[:2] == pytest.approx([1.732047, -0.577349], abs=1e-6)
    [a] = advantages(replace(rec_oneside_is(), advantage=GroupNorm(1, 1e-6)), group([1.0, 0, 0, 0]))
    assert a[:2] == pytest.approx([1.499997, -0.499999], abs=1e-6)


@pytest.mark.parametrize("make", ALL)
def test_edges(make: object) -> None:
    r: Recipe = make()  # type: ignore[operator]
    assert advantages(r, group([1.0] * 4), group([0.1] * 7), group([1.0])) == [[0.0] * 4, [0.0] * 7, [0.0]]
    assert advantages(r, group([1.0, 0.0, float("nan")]))[0] == pytest.approx([0.5, -0.5, 0.0])


def test_mean_over_all_steps() -> None:
    assert objective(rec_oneside(), THREE) == pytest.approx(1.111111, abs=1e-6)


def test_the_papers_own_upper_bound_is_allowed() -> None:
    assert rec_oneside(low=0.6, high=2.0).loss == Reinforce(OneSide(0.6, 2.0))


def test_impossible_bands_are_refused() -> None:
    with pytest.raises(GruppoError, match=r"between 1 - 1\.2 and 1 \+ 0\.2; low must lie between 0 and 1"):
        rec_oneside(low=1.2)
    with pytest.raises(GruppoError, match=r"between 1 - 0\.2 and 1 \+ -0\.1"):
        rec_twoside(high=-0.1)
    with pytest.raises(GruppoError, match=r"far bounds 0\.1 and 2\.0 lie inside its band 0\.2 and 0\.2"):
        rec_ring(far_low=0.1)


def test_mask_and_weight_are_chosen_independently() -> None:
    """Seven recipes, seven losses: each of the three masks with and without the weight, and neither of the two."""
    bands = {"one": OneSide(0.2, 0.2), "two": TwoSide(0.2, 0.2), "ring": Ring(0.2, 0.2, 0.6, 2.0)}
    pairs = {
        "one": (rec_oneside(), rec_oneside_is()),
        "two": (rec_twoside(), rec_twoside_is()),
        "ring": (rec_ring(), rec_ring_is()),
    }
    rho, A = RHO.repeat(2), torch.tensor([1.0, -1.0]).repeat_interleave(len(RHO))
    for name, (plain, weighed) in pairs.items():
        kept = bands[name](rho, A)
        assert torch.allclose(slope(plain.loss, rho, A)[1], -A * kept)
        assert torch.allclose(slope(weighed.loss, rho, A)[1], -A * kept * rho)
    assert torch.equal(slope(rec_reinforce().loss, rho, A)[1], -A)


def test_presets() -> None:
    assert rec_ring_is().loss == Reinforce(Ring(0.2, 0.2, 0.6, 2.0), importance)
    assert rec_oneside() == rec_oneside(n=8, low=0.2, high=0.2)
    assert all(make().reference is None for make in ALL)


@pytest.mark.parametrize("name", ["rec-oneside", "rec-oneside-is", "rec-twoside", "rec-ring", "rec-reinforce"])
def test_it_trains_from_the_command_line_on_stale_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    records = trained(monkeypatch, tmp_path, name, "arithmetic", "fit.sync_every=3", "fit.learning_rate=1e-3")
    assert [r["stale"] for r in records] == [0, 1, 2]
    assert [abs(r["ratio"] - 1) > 1e-3 for r in records] == [False, True, True]
