"""Pref-GRPO: win rates in place of scores, objectives normalised each by itself, DanceGRPO's trainer around them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.graders.clips import picture
from tests.recipes.batches import advantages, path

from gruppo.core.collate import collate
from gruppo.core.gaussian import WithGaussianKL, without_dt
from gruppo.graders.grade import Grading
from gruppo.graders.images import ImageScore, JpegSize
from gruppo.graders.judge import Margin, WinRate
from gruppo.policies.kernels import FlowSDE
from gruppo.recipe import difference
from gruppo.recipes.dance_grpo import dance_grpo
from gruppo.recipes.golden_flow import FlowDraw, Points, flow_grading, tiny_flow
from gruppo.recipes.pref_grpo import Preferred, pref_grpo, won
from gruppo.train import iterate
from gruppo.types import Group, GruppoError, Task

NAN = math.nan


def scored(**signals: list[float]) -> Group:
    """A group with these signals."""
    n = len(next(iter(signals.values())))
    return Group(Task("p"), [path(1) for _ in range(n)], {k: torch.tensor(v) for k, v in signals.items()})


def by_rank(*scores: float, **numbers: Any) -> list[float]:
    """The advantages of win rates by one perfect judge's score."""
    return advantages(pref_grpo(weights={"q": 1.0}, ranked=["q"], **numbers), scored(q=list(scores)))[0]


# -- the worked numbers --------------------------------------------------------------------------------------------------------


def test_a_perfect_judge() -> None:
    assert won(torch.tensor([0.8, 0.2, 0.5, 0.9])).tolist() == pytest.approx([0.667, 0.0, 0.333, 1.0])
    assert by_rank(0.8, 0.2, 0.5, 0.9) == pytest.approx([0.387995, -1.161662, -0.387995, 1.161662], abs=2e-6)


def test_the_judges_own_win_rate_gives_the_same_advantage() -> None:
    found = advantages(pref_grpo(), scored(win_rate=[0.667, 0.0, 0.333, 1.0]))[0]
    assert found == pytest.approx([0.387995, -1.161662, -0.387995, 1.161662], abs=2e-6)


def test_cycles_and_ties_teach_nothing() -> None:
    assert advantages(pref_grpo(), scored(win_rate=[0.5] * 3))[0] == [0.0] * 3
    assert by_rank(2.0, 2.0, 2.0) == [0.0] * 3


def test_a_judge_that_always_says_first() -> None:
    assert advantages(pref_grpo(), scored(win_rate=[1.0, 0.5, 0.0]))[0] == pytest.approx([1.0, 0.0, -1.0], abs=1e-6)


CLOSE = [3.501, 3.502, 3.500, 3.503] * 2


def test_near_equal_scores_become_large_advantages_without_the_judge() -> None:
    """A std of .0012, and yet +-1.25."""
    pointwise = advantages(pref_grpo(weights={"q": 1.0}), scored(q=CLOSE))[0]
    assert pointwise == pytest.approx([-0.418, 0.418, -1.255, 1.255] * 2, abs=1e-3)


def test_eight_strictly_ordered() -> None:
    found = by_rank(*[float(8 - i) for i in range(8)])
    assert found[:4] == pytest.approx([1.429345, 1.020552, 0.61176, 0.202967], abs=2e-6)
    assert found[:4] == pytest.approx([-a for a in found[:3:-1]], abs=2e-6)


def test_two_pictures() -> None:
    assert by_rank(0.1, 0.7) == pytest.approx([-0.707107, 0.707107], abs=2e-6)


def test_rounding_is_a_number() -> None:
    assert won(torch.tensor([1.0, 2.0, 3.0, 4.0]), digits=None).tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert by_rank(0.8, 0.2, 0.5, 0.9, digits=None)[0] == pytest.approx(0.387298, abs=2e-6)


# -- laws of win rates ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turn", [lambda x: 5 * x - 3, torch.exp, lambda x: x**3])
def test_only_the_order_of_scores_matters(turn: Any) -> None:
    g = torch.Generator().manual_seed(0)
    scores = torch.randn(8, generator=g)
    assert torch.equal(won(scores), won(turn(scores)))
    assert torch.equal(won(-scores), (1 - won(scores)).round(decimals=3))


def test_win_rates_sum_to_half_the_group_up_to_rounding() -> None:
    g = torch.Generator().manual_seed(1)
    for n in range(2, 25):
        rates = won(torch.randn(n, generator=g).round(decimals=1))
        assert float(rates.sum()) == pytest.approx(n / 2, abs=n * 5e-4 + 1e-6)


def test_one_outlier_moves_the_pointwise_advantages_and_not_the_win_rates() -> None:
    calm, wild = [1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 400.0]
    assert by_rank(*calm) == by_rank(*wild)
    pointwise = [advantages(pref_grpo(weights={"q": 1.0}), scored(q=v))[0] for v in (calm, wild)]
    assert abs(pointwise[0][2] - pointwise[1][2]) > 0.5


def test_an_abstained_path_meets_nobody() -> None:
    assert won(torch.tensor([2.0, NAN, 1.0])).tolist() == pytest.approx([1.0, NAN, 0.0], nan_ok=True)
    [with_it] = advantages(pref_grpo(weights={"q": 1.0}, ranked=["q"]), scored(q=[0.8, 0.2, NAN, 0.5, 0.9]))
    assert [*with_it[:2], *with_it[3:]] == pytest.approx(by_rank(0.8, 0.2, 0.5, 0.9))
    assert with_it[2] == 0.0
    assert won(torch.tensor([NAN, NAN])).isnan().all()


# -- several rewards -----------------------------------------------------------------------------------------------------------


def z(values: list[float]) -> torch.Tensor:
    x = torch.tensor(values, dtype=torch.float64)
    return (x - x.mean()) / (x.std() + 1e-8)


W, C = [0.667, 0.0, 0.333, 1.0], [0.31, 0.35, 0.30, 0.29]


def test_advantages_are_added_and_not_the_rewards() -> None:
    found = advantages(pref_grpo(weights={"win_rate": 0.7, "clip": 1.4}), scored(win_rate=W, clip=C))[0]
    assert found == pytest.approx((0.7 * z(W) + 1.4 * z(C)).tolist(), abs=1e-5)
    large = advantages(pref_grpo(weights={"win_rate": 0.7, "clip": 1.4}), scored(win_rate=W, clip=[100 * c for c in C]))[0]
    assert large == pytest.approx(found, abs=1e-4)


def test_the_batch_scale_divides_by_the_batches_std() -> None:
    other = [0.0, 0.5, 0.5, 1.0]
    numbers: dict[str, Any] = {"weights": {"win_rate": 0.4, "clip": 0.6}}
    groups = scored(win_rate=W, clip=C), scored(win_rate=other, clip=C)
    plain = torch.tensor(advantages(pref_grpo(**numbers), *groups))
    scaled = torch.tensor(advantages(pref_grpo(**numbers, batch_scale=True), *groups))
    assert scaled.flatten().tolist() == pytest.approx((plain / plain.std()).flatten().tolist(), abs=1e-5)
    assert float(scaled.std()) == pytest.approx(1.0, abs=1e-5)


def test_advantages_are_clamped_with_and_without_the_batch_scale() -> None:
    one = [1.0, *[0.0] * 7]  # z = 2.4749
    assert max(advantages(pref_grpo(weights={"win_rate": 3.0}), scored(win_rate=one))[0]) == 5.0
    calm = [scored(win_rate=[0.5] * 8) for _ in range(30)]
    found = advantages(pref_grpo(batch_scale=True), scored(win_rate=one), *calm)
    assert found[0][0] == 5.0


def test_nothing_is_clamped_before_the_batch_scale() -> None:
    one, strict = [1.0, *[0.0] * 7], [i / 7 for i in range(8)]
    found = advantages(pref_grpo(weights={"win_rate": 3.0}, batch_scale=True), scored(win_rate=one), scored(win_rate=strict))
    whole = 3 * torch.cat([z(one), z(strict)])
    assert float(whole.max()) > 5
    assert [a for row in found for a in row] == pytest.approx((whole / whole.std()).tolist(), abs=1e-5)


def test_flex_is_another_signal() -> None:
    """The reward of UnifiedReward-Flex."""
    flex = [0.795833, 0.618088, 0.517888, 0.067987]
    assert advantages(pref_grpo(weights={"flex": 1.0}), scored(flex=flex))[0] == pytest.approx(z(flex).tolist(), abs=1e-5)


# -- the recipe ----------------------------------------------------------------------------------------------------------------


def groups_of(**numbers: Any) -> list[Group]:
    """Two sampled groups on a grid of six steps."""
    numbers = {"weights": {"reward": 1.0}, "ranked": ["reward"], **numbers}
    made = pref_grpo(**numbers)
    return made.rollout(tiny_flow(), FlowDraw(0, 2), flow_grading(), torch.Generator().manual_seed(0))


def test_the_pictures_of_a_prompt_begin_at_one_noise() -> None:
    for group in groups_of():
        starts = torch.stack([p.steps[0] for p in group.paths])
        assert torch.equal(starts, starts[:1].expand_as(starts))
    apart = torch.stack([p.steps[0] for p in groups_of(shared_noise=False)[0].paths])
    assert len(apart.unique(dim=0)) == 8


def test_a_random_part_of_all_but_the_last_step_is_trained() -> None:
    """int(.6 * 5) = 3 of the first five steps, another choice for each path."""
    masks = torch.cat([g.mask for g in groups_of()])
    assert masks.sum(1).tolist() == [3] * 16
    assert not masks[:, -1].any()
    assert len(masks.unique(dim=0)) > 4
    for p in groups_of()[0].paths:
        assert float(p.prompt.levels[-1]) == 0.0  # the picture is what the last call expects


def test_every_prompt_is_in_each_optimizer_step() -> None:
    graded = [g.with_(advantage=torch.zeros(8, 6)) for g in groups_of()]
    parts = list(pref_grpo().cadence(collate(graded)))
    assert [b.group.tolist() for b in parts] == [[0] * 4 + [1] * 4] * 2


class Painted(Points):
    """Points whose pictures are squares of a size."""

    def decode(self, x: torch.Tensor) -> list[Any]:
        return [picture(size=8 + int(10 * abs(float(point[0])))) for point in x]


def test_it_trains_on_a_judge_of_pictures() -> None:
    from gruppo.policies.flow import FlowPolicy

    policy = FlowPolicy(Painted(), steps=4)
    graders: list[Any] = [WinRate(Margin(JpegSize())), ImageScore(JpegSize(), "kb")]
    before = [p.detach().clone() for p in policy.parameters()]
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    made = pref_grpo(n=4, weights={"win_rate": 0.7, "kb": 1.4})
    done = iterate(policy, FlowDraw(0, 2), Grading(graders, {"win_rate": 1.0}), made, optimizer, torch.Generator().manual_seed(0))
    assert done.updates == 2
    assert any(not torch.equal(a, b) for a, b in zip(before, policy.parameters()))
    for group in done.groups:
        sizes = [v for v in JpegSize()([p.output for p in group.paths], [""] * 4) if isinstance(v, float)]
        assert len(set(sizes)) > 1
        wins = [sum((s > t) + 0.5 * (s == t) for j, t in enumerate(sizes) if j != i) / 3 for i, s in enumerate(sizes)]
        assert group.signals["win_rate"].tolist() == pytest.approx(wins, abs=6e-4)


def test_what_it_needs_is_said() -> None:
    assert [need.name for need in pref_grpo(weights={"win_rate": 0.4, "clip": 0.6}).needs] == ["win_rate", "clip"]
    with pytest.raises(GruppoError, match="'taste' is to be ranked, but the weights name: win_rate"):
        pref_grpo(ranked=["taste"])
    with pytest.raises(GruppoError, match="'win_rate'"):
        pref_grpo().reward(scored(clip=[1.0, 2.0]))


def test_preset() -> None:
    made = pref_grpo()
    assert made.reward == Preferred((("win_rate", 1.0),))
    assert made.reference is None
    assert isinstance(pref_grpo(beta=0.004).loss, WithGaussianKL)
    assert pref_grpo(beta=0.004).reference is not None
    assert made.rollout.kernel == FlowSDE(0.7)  # type: ignore[attr-defined]
    other = pref_grpo(eta=0.9, tau=0.3, clip=1e-5)
    assert other.rollout.kernel == FlowSDE(0.9)  # type: ignore[attr-defined]
    assert set(difference(other, made)) == {"rollout", "loss"}
    assert groups_of(tau=0.3)[0].mask.sum(1).tolist() == [1] * 8  # int(.3 * 5)
    assert pref_grpo(beta=0.1, form=without_dt).loss == WithGaussianKL(made.loss, 0.1, without_dt)
    assert set(difference(made, dance_grpo(n=8, updates=2, weights={"win_rate": 1.0}))) == {"rollout", "reward", "needs"}
