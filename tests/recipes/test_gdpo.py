"""GDPO: every objective by itself, then the sum, then one scale for the batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path as File

import pytest
import torch
from tests.recipes.batches import advantages
from tests.recipes.test_multi_objective import advantage as scalarised
from tests.recipes.test_multi_objective import scored, two_heads
from tests.runs.small import Quiet, session

from gruppo.recipe import difference
from gruppo.recipes.gdpo import Columns, Decoupled, OneScale, gdpo
from gruppo.recipes.multi_objective import multi_objective
from gruppo.types import Group

E3 = [[1.0, 0.0], [0.0, 0.0], [1.0, 10.0], [0.0, 10.0]]
EQUAL = {"a": 1.0, "b": 1.0}


def decoupled(group: Group, weights: Mapping[str, int | float], eps: float = 1e-6) -> list[float]:
    """The advantage before the batch's scale."""
    made = gdpo(weights=weights, eps=eps)
    return made.advantage(group.with_(reward=made.reward(group)))[:, 0].tolist()


def test_each_objective_is_normalised_by_itself() -> None:
    assert decoupled(scored(E3, "ab"), EQUAL) == pytest.approx([0.0, -1.732049, 1.732049, 0.0], abs=4e-6)


def test_the_scale_of_an_objective_does_not_matter_and_its_weight_does() -> None:
    large = scored([[a, 1000 * b] for a, b in E3], "ab")
    assert decoupled(large, EQUAL) == pytest.approx(decoupled(scored(E3, "ab"), EQUAL), abs=4e-6)
    # z-scores are +-0.866025: three times the first plus once the second
    assert decoupled(large, {"a": 3, "b": 1}) == pytest.approx([1.73205, -3.4641, 3.4641, -1.73205], abs=1e-5)
    assert decoupled(large, {"a": -1, "b": 1}) == pytest.approx([-1.732049, 0, 0, 1.732049], abs=4e-6)


def test_combinations_that_the_sum_confounds_stay_apart() -> None:
    one, both = scored([[0, 0], [1, 0]], "ab"), scored([[0, 0], [1, 1]], "ab")
    assert scalarised(one, EQUAL) == pytest.approx([-0.707107, 0.707107], abs=2e-6)
    assert scalarised(both, EQUAL) == pytest.approx([-0.707107, 0.707107], abs=2e-6)
    assert decoupled(one, EQUAL) == pytest.approx([-0.707107, 0.707107], abs=2e-6)
    assert decoupled(both, EQUAL) == pytest.approx([-1.414214, 1.414214], abs=4e-6)


def test_objectives_that_cancel_in_the_sum_do_not_cancel_here() -> None:
    rows = [[1, 0], [0, 1], [0.5, 0.5], [0.9, 0.1]]
    assert scalarised(scored(rows, "ab"), EQUAL) == pytest.approx([0.0] * 4, abs=1e-6)
    skewed = [[a, 3 * b] for a, b in rows]
    assert decoupled(scored(skewed, "ab"), {"a": 1, "b": 2}) != pytest.approx([0.0] * 4, abs=0.1)


def test_the_batch_has_one_scale() -> None:
    made = gdpo(weights=EQUAL, eps=0.0)
    # A is (0, -s, s, 0) with s = sqrt 3, and (-r, r) with r = sqrt 2: the batch's sample std is sqrt((2 * 3 + 2 * 2) / 5)
    found = advantages(made, scored(E3, "ab"), scored([[0, 0], [1, 1]], "ab"))
    scale = math.sqrt(10 / 5)
    assert found[0] == pytest.approx([0.0, -math.sqrt(3) / scale, math.sqrt(3) / scale, 0.0], abs=1e-5)
    assert found[1] == pytest.approx([-math.sqrt(2) / scale, math.sqrt(2) / scale], abs=1e-5)


def test_the_batch_mean_that_is_not_subtracted_is_zero() -> None:
    g = torch.Generator().manual_seed(0)
    groups = [scored(torch.rand(n, 2, generator=g).tolist(), "ab") for n in (3, 5, 8)]
    every = [a for row in advantages(gdpo(weights={"a": 1, "b": 3}), *groups) for a in row]
    assert sum(every) / len(every) == pytest.approx(0.0, abs=1e-6)
    assert float(torch.tensor(every).std()) == pytest.approx(1.0, abs=1e-3)


def test_an_objective_without_variance_leaves_the_others() -> None:
    a = decoupled(scored([[0, 1], [1, 1], [2, 1]], "ab"), EQUAL)
    assert a == pytest.approx(decoupled(scored([[0], [1], [2]], "a"), {"a": 1}))
    assert decoupled(scored([[1, 1]] * 3, "ab"), EQUAL) == [0.0] * 3


def test_a_group_of_one_is_zero_beside_others() -> None:
    found = advantages(gdpo(weights=EQUAL), scored([[1, 5]], "ab"), scored(E3, "ab"))
    assert found[0] == [0.0]


def test_an_abstained_path_counts_nowhere() -> None:
    made = gdpo(weights=EQUAL)
    silent = scored([*E3, [math.nan, 5.0]], "ab")
    assert made.reward(silent)[4].isnan().all()
    [[*with_it, last]] = advantages(made, silent)
    [without] = advantages(made, scored(E3, "ab"))
    assert last == 0.0
    assert with_it == pytest.approx(without, abs=1e-6)


def test_the_shown_reward_is_the_weighted_sum() -> None:
    reward = gdpo(weights={"a": 2, "b": -1}).reward(scored([[1, 3], [2, 0]], "ab"))
    assert reward.tolist() == [[2, -3], [4, 0]]


def test_weights_change_from_stage_to_stage(tmp_path: File) -> None:
    run = session(
        tmp_path,
        recipe="gdpo",
        recipe_args={"weights": {"vowels": 1.0, "short": 1.0}},
        rewards=two_heads(tmp_path),
        stages=[{"fit": {"steps": 1}}, {"fit": {"steps": 1}, "recipe_args": {"weights": {"short": 3.0, "vowels": 1.0}}}],
    )
    display = Quiet()
    run.run(display)
    for record, weights in zip(display.records, ({"vowels": 1, "short": 1}, {"vowels": 1, "short": 3})):
        assert record["reward"] == pytest.approx(sum(w * record["signals"][k] for k, w in weights.items()))


def test_preset() -> None:
    made = gdpo()
    named = (("correct", 1.0), ("format", 1.0))
    assert made.reward == Columns(named)
    assert made.advantage == Decoupled(named, ddof=1, eps=1e-4)
    assert made.across == OneScale(ddof=1, eps=1e-4)
    assert [need.name for need in made.needs] == ["correct", "format"]
    assert set(difference(made, multi_objective())) == {"reward", "advantage", "across", "needs"}


def test_a_trade_off_between_two_kinds_of_replies_is_decided_by_the_weights_alone() -> None:
    two = scored([[0.9, 0.85], [0.05, 1.0]] * 4, "ab")  # much safer, a little less helpful
    assert decoupled(two, EQUAL, eps=0.0) == pytest.approx([0.0] * 8, abs=1e-6)
    assert decoupled(two, {"a": 2, "b": 3}, eps=0.0)[0] == pytest.approx(-math.sqrt(7 / 8), abs=1e-5)
    assert scalarised(two, {"a": 2, "b": 3})[0] > 0
    # with an epsilon the objective with the larger spread keeps a remainder, which the batch's scale makes a full update
    [a] = advantages(gdpo(weights=EQUAL), two)
    assert a[0] > 0.3
