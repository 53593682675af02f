"""The three replies of the multi-objective claims, and what GDPO keeps apart."""

from __future__ import annotations

import pytest
import torch

from gruppo.claims import gdpo as decoupled
from gruppo.claims.multi_objective import claim, ones, tenths, train
from gruppo.recipes.gdpo import gdpo
from gruppo.recipes.multi_objective import multi_objective

EQUAL = {"safety": 0.5, "helpfulness": 0.5}


def test_a_few_steps_of_safety_alone_raise_the_refusal() -> None:
    policy = train(multi_objective(weights={"safety": 1}), ones, seed=0, steps=10)
    assert float(policy.sum()) == pytest.approx(1.0)
    assert policy[0] > policy[1] > policy[2]


def test_the_signals_differ_by_the_scale_of_one_objective() -> None:
    reply = torch.tensor([0, 1, 2])
    assert torch.equal(ones(reply)["safety"], tenths(reply)["safety"])
    assert torch.allclose(10 * ones(reply)["helpfulness"], tenths(reply)["helpfulness"])


def test_two_rewards_on_two_paths_have_three_outcomes_and_the_sum_two() -> None:
    pairs = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 4).view(16, 2, 2)
    both = {"first": 1.0, "second": 1.0}
    assert decoupled.distinct(gdpo(weights=both), pairs) == 3
    assert decoupled.distinct(multi_objective(weights=both), pairs) == 2


@pytest.mark.claim
def test_multi_objective() -> None:
    found = claim(3)
    assert found.holds, found.verdict
    assert float(found.table()[-2]["safe help, tenths"]) < 0.05


@pytest.mark.claim
def test_gdpo() -> None:
    found = decoupled.claim(3)
    assert found.holds, found.verdict
    mean = found.table()[-2]
    assert float(mean["safe help, ones"]) > 0.95
    assert float(mean["safe help, tenths"]) < 0.05  # a trade-off at equal weights is decided by the epsilons
    assert float(mean["refusal at 60:40"]) > 0.95
