"""The toy-scale claims of Flow-GRPO, DanceGRPO and MixGRPO, and the known flow on which they are measured."""

from __future__ import annotations

import pytest
import torch

from gruppo.claims import measured
from gruppo.claims.mixture import MEANS, SPREAD, velocity


def test_the_velocity_is_that_of_the_two_distributions() -> None:
    """Against the mean of x1 - x0 over a million pairs whose mixture lies near x."""
    g = torch.Generator().manual_seed(0)
    n, t = 2_000_000, 0.6
    x0 = torch.tensor(MEANS)[torch.randint(2, (n,), generator=g)] + SPREAD * torch.randn(n, generator=g)
    x1 = torch.randn(n, generator=g)
    x = (1 - t) * x0 + t * x1
    for at in (-0.8, 0.1, 0.9):
        near = (x - at).abs() < 0.01
        expected = float((x1 - x0)[near].mean())
        assert float(velocity(torch.tensor([at]), torch.tensor([t]))) == pytest.approx(expected, abs=0.05)


@pytest.mark.claim
@pytest.mark.parametrize("name", ["flow-grpo", "dance-grpo", "mix-grpo/third"])
def test_claims_that_hold(name: str) -> None:
    assert measured(name).holds


@pytest.mark.claim
def test_the_window_helps_less_than_the_threshold() -> None:
    """Every step's ratio lies above 1, but the smallest of the four not above 1.25."""
    found = measured("mix-grpo")
    assert found.interval[0] > 1.0
    assert not found.holds
