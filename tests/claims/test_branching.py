"""The claims of TempFlow-GRPO, G2RPO and BranchGRPO on a flow of known velocity, as they came out."""

from __future__ import annotations

import pytest
import torch

from gruppo.claims import branch_grpo, g2rpo, tempflow_grpo
from gruppo.claims.mixture import MEANS, SPREAD, velocity


def test_the_velocity_is_known() -> None:
    """Against the mean of x1 - x0 over draws whose x_t lies near a point."""
    g = torch.Generator().manual_seed(0)
    n, t, at = 2_000_000, 0.6, 0.3
    x0 = torch.tensor(MEANS)[torch.randint(2, (n,), generator=g)] + SPREAD * torch.randn(n, generator=g)
    x1 = torch.randn(n, generator=g)
    near = ((1 - t) * x0 + t * x1 - at).abs() < 0.02
    expected = float((x1 - x0)[near].mean())
    assert float(velocity(torch.tensor([at]), torch.tensor([t]))) == pytest.approx(expected, abs=0.05)


@pytest.mark.claim
def test_several_granularities_help_a_noisy_judge_and_only_a_noisy_one() -> None:
    found = g2rpo.claim(5)
    assert found.holds, found.verdict  # five seeds: 0.150 [0.131, 0.168]
    exact = g2rpo.exact(5)
    assert not exact.holds, exact.verdict  # five seeds: -0.0078 [-0.0104, -0.0052]
    assert all(row["gain"] < 0 for row in exact.rows)


@pytest.mark.claim
def test_a_tree_tells_more_than_flat_paths_of_as_many_calls() -> None:
    """But not surely by the 15 % that were asked for, and less than as many flat paths as it has leaves."""
    found = branch_grpo.claim(5)
    assert not found.holds, found.verdict  # five seeds: 1.153 [1.130, 1.176]
    assert found.interval[0] > 1.0
    assert all(row["flat 16"] > row["tree"] for row in found.rows)
    assert all((row["calls tree"], row["calls flat 10"], row["calls flat 16"]) == (203, 200, 320) for row in found.rows)


@pytest.mark.claim
def test_a_branch_tells_more_of_its_step_and_the_weight_helps() -> None:
    found = tempflow_grpo.claim(5)
    assert found.holds, found.verdict  # five seeds: 2.52 [2.08, 2.97]
    weighed = tempflow_grpo.weight(5)
    assert weighed.holds, weighed.verdict  # five seeds: 1.06 [1.02, 1.10]
    assert all(row["plain ratio"] > 1.2 for row in weighed.rows)


@pytest.mark.claim
def test_branches_without_the_weight_learn_as_well_here() -> None:
    """The paper's weight is not needed on this toy; for as many network calls the gain may be none."""
    found = tempflow_grpo.alone(5)
    assert found.holds, found.verdict  # five seeds: 0.234 [0.058, 0.410]; at equal calls 0.077 +- 0.078
    assert all(abs(row["branch, even"] - row["branch, weighted"]) < 0.05 for row in found.rows)
