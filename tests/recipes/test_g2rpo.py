"""G2RPO: advantages added over views, an optimizer step for every perturbed step, one forward pass per anchor."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gruppo.core.collate import collate, drop_abstained
from gruppo.core.reduce import weigh
from gruppo.graders.grade import Grading
from gruppo.policies.flow import Course
from gruppo.policies.kernels import FlowSDE
from gruppo.policies.schedules import linear
from gruppo.recipe import difference
from gruppo.recipes import recipe
from gruppo.recipes.g2rpo import Summed, Views, by_step, g2rpo
from gruppo.recipes.golden_flow import QUADRANTS, Quadrant, flow_grading, task, tiny_flow
from gruppo.rollouts.branching import Branches, visits
from gruppo.train import iterate
from gruppo.types import Batch, Group, GruppoError, Path, Task

R1, R2, R3 = [0.30, 0.34, 0.28, 0.32], [0.31, 0.30, 0.29, 0.34], [0.25, 0.35, 0.30, 0.30]
SUM = [-1.61204276, 1.92372929, -2.08771423, 1.77602769]


def group_of(signals: dict[str, list[float]], k: int = 0, T: int = 4) -> Group:
    course = Course.of("a", linear(T, 3.0), FlowSDE(), [k])
    n = len(next(iter(signals.values())))
    path = Path(course, torch.zeros(T + 1, 2), torch.zeros(T), torch.arange(T) == k, QUADRANTS["a"])
    return Group(Task("a"), [path] * n, {name: torch.tensor(v) for name, v in signals.items()})


def advantages(signals: dict[str, list[float]], **numbers: Any) -> Tensor:
    """[G] through the recipe's own reward and advantage."""
    made = g2rpo(**numbers)
    group = group_of(signals)
    return made.advantage(group.with_(reward=made.reward(group)))[:, 0]


def test_advantages_are_added_over_granularities() -> None:
    first = [-0.38729818, 1.16189455, -1.16189455, 0.38729818]
    second = [0, -0.46290984, -0.92581967, 1.38872951]
    third = [-1.22474457, 1.22474457, 0, 0]
    for reward, expected in ((R1, first), (R2, second), (R3, third)):
        assert advantages({"reward": reward}).tolist() == pytest.approx(expected, abs=1e-5)
    found = advantages({"reward": R1, "reward@2": R2, "reward@3": R3, "near@2": R1})
    assert found.tolist() == pytest.approx(SUM, abs=1e-5)
    # adding first and normalising once is something else
    pooled = advantages({"reward": [sum(r) for r in zip(R1, R2, R3)]})
    assert (pooled - found).abs().max() > 0.5


def test_advantages_are_added_over_rewards() -> None:
    """Every reward model in every view is normalised by itself, whatever its scale, and counts by its weight."""
    big = [1000 * r for r in R2]
    signals = {"hps": R1, "clip": big, "hps@3": R3, "clip@3": big, "reward": R1}
    found = advantages(signals, weights={"hps": 1.0, "clip": 2.0}, strides=[1, 3])
    alone = [advantages({"reward": r}) for r in (R1, R3, R2, R2)]
    expected = (alone[0] + alone[1] + 2 * alone[2] + 2 * alone[3]).clamp(-5, 5)
    assert torch.allclose(found, expected, atol=1e-4)
    assert [need.name for need in g2rpo(weights={"hps": 1, "clip": 2}).needs] == ["hps", "clip"]


def test_equal_rewards_and_nearly_equal_ones() -> None:
    """eps 1e-8 protects against equal rewards, not against a judge's noise of 1e-7."""
    made = Summed((("reward", 1.0),), ddof=1, eps=1e-8)
    group = group_of({"reward": [0.3] * 4})
    assert torch.equal(made(group.with_(reward=torch.full((4,), 0.3))), torch.zeros(4, 4))
    noisy = torch.tensor([0.3, 0.3, 0.3, 0.3000001], dtype=torch.float64)
    assert made(group.with_(reward=noisy))[:, 0].tolist() == pytest.approx([-0.41666667] * 3 + [1.25], abs=1e-5)


def test_the_sum_is_clamped() -> None:
    """The best of sixteen has (1 - 1/16) / .25 = 3.75 in each view."""
    signals = {name: [1.0] + [0.0] * 15 for name in ("reward", "reward@2", "reward@3")}
    assert float(advantages({"reward": signals["reward"]})[0]) == pytest.approx(3.75, abs=1e-4)
    assert float(advantages(signals)[0]) == 5.0


def test_more_granularities_lengthen_the_step() -> None:
    g = torch.Generator().manual_seed(0)
    rewards = torch.randn(3, 64, generator=g).tolist()
    made = Summed((("reward", 1.0),), ddof=1, eps=1e-8)
    columns = torch.tensor(rewards).T
    group = group_of({"reward": rewards[0]})

    def size(reward: Tensor) -> float:
        return float(made(group.with_(reward=reward))[:, 0].square().mean())

    assert size(columns[:, :1].repeat(1, 3)) == pytest.approx(9 * size(columns[:, :1]), rel=1e-4)  # views that agree
    assert size(columns) == pytest.approx(3 * size(columns[:, :1]), rel=0.3)  # views that have nothing in common


def test_a_path_that_one_view_did_not_grade_is_left_out() -> None:
    group = group_of({"reward": R1, "reward@2": [0.31, float("nan"), 0.29, 0.34]})
    made = g2rpo()
    group = drop_abstained(group.with_(reward=made.reward(group)))
    found = made.advantage(group)[:, 0]
    assert not bool(group.paths[1].mask.any())
    rest = advantages({"reward": [0.30, 0.28, 0.32], "reward@2": [0.31, 0.29, 0.34]})
    assert torch.allclose(found[[0, 2, 3]], rest, atol=1e-5)


def test_every_view_is_a_column() -> None:
    policy = tiny_flow(steps=8)
    made = g2rpo(3, strides=[1, 2, 3])
    groups = made.rollout(policy, [task(0)], flow_grading(), torch.Generator().manual_seed(0))
    assert len(made.reward(groups[0]).unique()) == 9
    for group in groups:
        reward = made.reward(group)
        assert reward.shape == (3, 3)
        assert torch.equal(reward, torch.stack([group.signals[f"reward{v}"] for v in ("", "@2", "@3")], 1))


# ---- one optimizer step for every k


def batch_of(steps: list[int], n: int = 3) -> Batch:
    groups = [group_of({"reward": R1[:n]}, k) for k in steps]
    return collate([g.with_(advantage=torch.ones(n, 4)) for g in groups])


def test_steps_come_one_by_one_earliest_first() -> None:
    batch = batch_of([1, 0, 3, 0])
    parts = [weigh(part, g2rpo().reduce) for part in by_step(batch)]
    assert [part.mask.any(0).nonzero()[:, 0].tolist() for part in parts] == [[0], [1], [3]]
    assert [len(part) for part in parts] == [6, 3, 3]
    assert [part.group.unique().tolist() for part in parts] == [[1, 3], [0], [2]]
    for part in parts:
        assert part.weight[part.mask].tolist() == pytest.approx([1 / len(part)] * len(part))


def test_an_iteration_takes_as_many_optimizer_steps_as_it_branches() -> None:
    """Later steps are off-policy towards the anchor: their first ratio is not 1. One forward pass per anchor and step."""
    policy, made = tiny_flow(steps=16), g2rpo(4, strides=[1, 2], clip=0.2)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    done = iterate(policy, [task(0), task(1)], flow_grading(), made, optimizer, torch.Generator().manual_seed(0))
    assert done.updates == 8
    assert policy.counts["trained"] == 2 * 8 * 4
    assert policy.counts["forwards"] == 2 * 8
    assert abs(done.stats["ratio"] - 1) > 1e-4
    assert done.stats["gap"] < 1e-5  # before the first of these steps the policy is the sampler


def test_granularities_change_what_is_learnt() -> None:
    """With strides ignored the second view would be the first one again."""
    policy = tiny_flow(steps=8)
    found = {}
    for strides in ([1], [1, 3]):
        made = g2rpo(6, strides=strides)
        groups = made.rollout(policy, [task(0)], flow_grading(), torch.Generator().manual_seed(0))
        groups = [g.with_(reward=made.reward(g)) for g in groups]
        found[len(strides)] = torch.stack([made.advantage(g)[:, 0] for g in groups])
    assert not torch.allclose(found[2], 2 * found[1], atol=1e-2)


def test_what_it_changes() -> None:
    made = recipe("g2rpo")
    changed = set(difference(made, recipe("flow-grpo", n=12)))
    assert changed == {"rollout", "reward", "advantage", "loss", "reduce", "cadence", "reference"}
    assert made.cadence is by_step
    assert made.reference is None
    assert made.rollout.strides == (1, 2, 3)
    other = g2rpo(eta=0.9, clip=1e-5)
    assert isinstance(other.rollout, Branches)
    assert other.rollout.kernel == FlowSDE(0.9)
    assert set(difference(other, made)) == {"rollout", "loss"}


def test_endings_that_coincide_on_a_short_grid_count_twice() -> None:
    assert visits(3, 8, 2) == visits(3, 8, 3) == [4, 5, 8]
    groups = g2rpo(3).rollout(tiny_flow(steps=8), [task(0)], flow_grading(), torch.Generator().manual_seed(0))
    assert torch.equal(groups[3].signals["near@2"], groups[3].signals["near@3"])
    assert not torch.equal(groups[0].signals["near@2"], groups[0].signals["near@3"])


def test_an_objective_that_nobody_measures() -> None:
    group = group_of({"reward": R1})
    with pytest.raises(GruppoError, match="weighs the objective 'hps'"):
        Views((("hps", 1.0),))(group)
    grade = Grading([Quadrant()], {"near": 1.0})
    made = replace(g2rpo(3, weights={"near": 1.0}))
    groups = made.rollout(tiny_flow(), [task(0)], grade, torch.Generator().manual_seed(0))
    assert made.reward(groups[0]).shape == (3, 3)
