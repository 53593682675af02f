"""Multi-Objective GRPO: the sum is normalised, not its parts; weights that change while a run goes on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path as File

import pytest
import torch
from tests.recipes.batches import group as plain_group
from tests.runs.small import Quiet, session

from gruppo.graders.grade import Grading
from gruppo.recipe import difference
from gruppo.recipes.grpo import GroupNorm, grpo, total
from gruppo.recipes.multi_objective import Scalarised, listed, multi_objective
from gruppo.types import Group, GruppoError

HEADS = ("politeness", "meaningfulness", "actionability", "safety")
ROWS = [[0.9, 0.8, 0.7, 0.1], [0.5, 0.5, 0.5, 0.9], [0.2, 0.9, 0.9, 0.9], [0.9, 0.1, 0.1, 1.0]]


def scored(rows: Sequence[Sequence[float]], names: Sequence[str] = HEADS) -> Group:
    """A group whose signals are the columns of `rows`."""
    g = plain_group([0.0] * len(rows))
    return g.with_(signals={name: torch.tensor([row[k] for row in rows]) for k, name in enumerate(names)})


def advantage(group: Group, weights: Mapping[str, int | float]) -> list[float]:
    made = multi_objective(weights=weights)
    group = group.with_(reward=made.reward(group))
    return made.advantage(group)[:, 0].tolist()


def test_equal_weights() -> None:
    weights = dict.fromkeys(HEADS, 0.25)
    g = scored(ROWS)
    assert multi_objective(weights=weights).reward(g).tolist() == pytest.approx([0.625, 0.6, 0.725, 0.525])
    assert advantage(g, weights) == pytest.approx([0.075664, -0.226992, 1.286289, -1.134961], abs=2e-6)


def test_safety_alone() -> None:
    a = advantage(scored(ROWS), {"politeness": 0, "safety": 1.0})
    assert a == pytest.approx([-1.490488, 0.417337, 0.417337, 0.655815], abs=2e-6)


def test_the_sum_is_normalised_so_the_larger_spread_decides() -> None:
    a = advantage(scored([[1, 0], [0, 0], [1, 10], [0, 10]], "ab"), {"a": 1, "b": 1})
    assert a == pytest.approx([-0.775555, -0.9479, 0.9479, 0.775555], abs=2e-6)


def test_objectives_that_cancel_teach_nothing() -> None:
    assert advantage(scored([[1, 0], [0, 1], [0.25, 0.75]], "ab"), {"a": 1, "b": 1}) == [0.0] * 3


def test_a_negative_weight_is_a_cost() -> None:
    g = scored([[1, 0], [1, 1]], "ab")
    assert multi_objective(weights={"a": 2, "b": -1}).reward(g).tolist() == [2.0, 1.0]


def test_a_path_whose_objective_abstained_has_no_reward() -> None:
    g = scored([[1, math.nan], [1, 1]], "ab")
    reward = multi_objective(weights={"a": 1, "b": 1}).reward(g)
    assert reward.isnan().tolist() == [True, False]
    # an objective that weighs nothing is only measured: its silence costs nothing
    assert multi_objective(weights={"a": 1, "b": 0}).reward(g).tolist() == [1.0, 1.0]


def test_without_weights_the_runs_own_decide() -> None:
    heads = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([0.0, 1.0])}
    for weights, expected in (({"a": 3.0, "b": 1.0}, [3.0, 1.0]), ({"b": 2.0}, [0.0, 2.0])):
        graded = Grading([lambda groups: [heads for _ in groups]], weights)([plain_group([0.0, 0.0])])[0]
        assert multi_objective().reward(graded).tolist() == expected


def test_a_missing_objective_is_a_sentence() -> None:
    with pytest.raises(GruppoError, match=r"weighs the objective 'safety', but the signals .* are: \['a', 'b'\]"):
        multi_objective(weights={"safety": 1}).reward(scored([[1, 0], [0, 1]], "ab"))


@pytest.mark.parametrize("weight", [math.nan, math.inf, True, "1"])
def test_a_weight_is_a_finite_number(weight: object) -> None:
    with pytest.raises(GruppoError, match="the objective 'a' weighs"):
        listed({"a": weight})


@pytest.mark.parametrize("weights", [{}, {"a": 0}])
def test_no_objective_at_all_is_refused(weights: dict[str, int]) -> None:
    with pytest.raises(GruppoError, match="leave no objective that counts"):
        multi_objective(weights=weights)


def test_preset() -> None:
    made = multi_objective()
    assert made.reward is total
    assert made.advantage == GroupNorm(ddof=1, eps=1e-6)
    assert set(difference(made, grpo(n=8))) == {"advantage"}
    named = multi_objective(weights={"a": 1, "b": 0, "c": 2})
    assert named.reward == Scalarised((("a", 1.0), ("c", 2.0)))
    assert [need.name for need in named.needs] == ["a", "c"]


TWO_HEADS = """
class Heads:
    signals = ("vowels", "short")

    def __call__(self, groups):
        return [
            {
                "vowels": [sum(c in "aeiou0123" for c in p.output) / 10 for p in g.paths],
                "short": [1 - len(p.output) / 10 for p in g.paths],
            }
            for g in groups
        ]
"""


def two_heads(folder: File) -> list[str]:
    (folder / "heads.py").write_text(TWO_HEADS)
    return [f"{folder / 'heads.py'}:Heads"]


def test_the_runs_weights_change_from_stage_to_stage(tmp_path: File) -> None:
    run = session(
        tmp_path,
        recipe="multi-objective-grpo",
        rewards=two_heads(tmp_path),
        weights={"vowels": 1.0},
        stages=[{"fit": {"steps": 1}}, {"fit": {"steps": 1}, "weights": {"vowels": 0.5, "short": 2.0}}],
    )
    display = Quiet()
    run.run(display)
    first, second = display.records
    assert first["reward"] == pytest.approx(first["signals"]["vowels"])
    assert second["reward"] == pytest.approx(0.5 * second["signals"]["vowels"] + 2 * second["signals"]["short"])


def test_the_recipes_weights_change_from_stage_to_stage(tmp_path: File) -> None:
    run = session(
        tmp_path,
        recipe="multi-objective-grpo",
        recipe_args={"weights": {"vowels": 1.0, "short": 0.0}},
        rewards=two_heads(tmp_path),
        stages=[{"fit": {"steps": 1}}, {"fit": {"steps": 1}, "recipe_args": {"weights": {"vowels": 0.0, "short": 1.0}}}],
    )
    display = Quiet()
    run.run(display)
    first, second = display.records
    assert first["reward"] == pytest.approx(first["signals"]["vowels"])
    assert second["reward"] == pytest.approx(second["signals"]["short"])


def test_a_run_without_the_objective_stops_before_step_0(tmp_path: File) -> None:
    with pytest.raises(GruppoError, match=r"reads the signal 'safety' \(an objective, weight 1\)"):
        session(tmp_path, recipe="multi-objective-grpo", recipe_args={"weights": {"safety": 1}})
