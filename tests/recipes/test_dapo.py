"""DAPO: clip-higher, token mean, overlong numbers, and a filter that reads raw correctness."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.recipes.batches import EIGHT, THREE, advantages, group, losses, objective, path

from gruppo.core.collate import Passes
from gruppo.recipe import Signal, check_needs, whole
from gruppo.recipes import recipe
from gruppo.recipes.dapo import Overlong, dapo, without_truncated
from gruppo.recipes.golden import Draw, Trial, grading, tiny_policy
from gruppo.recipes.grpo import GroupNorm, total
from gruppo.rollouts.dynamic import Dynamic, undecided
from gruppo.types import Group, GruppoError


@pytest.mark.parametrize(
    ("rho", "A", "loss"), [(1.5, 1.0, -1.28), (1.25, 1.0, -1.25), (0.5, -1.0, 0.8), (0.5, 1.0, -0.5), (5.0, -1.0, 5.0)]
)
def test_clip_higher(rho: float, A: float, loss: float) -> None:
    assert float(losses(dapo(), [A], [[rho]])[0, 0]) == pytest.approx(loss, abs=1e-6)


def test_dual_clip() -> None:
    assert float(losses(dapo(dual=3.0), [-1.0], [[5.0]])[0, 0]) == pytest.approx(3.0, abs=1e-6)
    assert float(losses(dapo(dual=3.0), [1.0], [[5.0]])[0, 0]) == pytest.approx(-1.28, abs=1e-6)


def test_mean_over_all_steps() -> None:
    assert objective(dapo(), THREE) == pytest.approx(1.111111, abs=1e-6)


def test_advantage_is_verls() -> None:
    [a] = advantages(dapo(), group(EIGHT))
    assert a[:2] == pytest.approx([1.207612, -0.724567], abs=1e-6)


@pytest.mark.parametrize(
    ("length", "soft"), [(16384, 0.0), (16385, -0.000244), (18432, -0.5), (20480, -1.0), (20481, -1.0), (1, 0.0)]
)
def test_soft_overlong_reward(length: int, soft: float) -> None:
    g = group([1.0], [length])
    assert float(Overlong(total, 20480, 4096)(g)) == pytest.approx(1.0 + soft, abs=1e-6)


def test_the_penalty_enters_before_the_advantage() -> None:
    [a] = advantages(dapo(length=8, cache=4), group([1.0, 1.0, 0.0, 0.0], [4, 8, 4, 8]))
    assert a[0] > a[1] == pytest.approx(a[2], abs=1e-6)
    assert a[2] > a[3]


@pytest.mark.parametrize("cache", [0, 8, 9])
def test_a_cache_outside_the_length_is_refused(cache: int) -> None:
    with pytest.raises(GruppoError, match=f"the last {cache} of 8 steps; `cache` must lie between 1 and 7"):
        dapo(length=8, cache=cache)


def test_truncated_paths_leave_the_loss_but_not_the_mean() -> None:
    g = group([1.0, 0.0, 1.0])
    g = g.with_(paths=[g.paths[0], path(1, truncated=True), g.paths[2]])
    kept, dropped = dapo(), dapo(drop_truncated=True)
    assert dropped.across is without_truncated
    assert advantages(kept, g) == advantages(dropped, g)
    [after] = dropped.across([g.with_(advantage=torch.zeros(3, 1))])
    assert after.mask.any(1).tolist() == [True, False, True]


# ---- dynamic sampling


def prepared(correct: list[list[float]], reward: list[list[float]] | None = None) -> Any:
    """A rollout that hands out these groups one task at a time, and remembers how many draws it served."""

    class Prepared:
        def __init__(self) -> None:
            self.left, self.draws = [group(r, correct=c) for r, c in zip(reward or correct, correct)], 0

        def __call__(self, policy: Any, tasks: Any, grade: Any, rng: torch.Generator) -> list[Group]:
            self.draws += 1
            return [self.left.pop(0) for _ in tasks]

    return Prepared()


def draw(n: int) -> Draw:
    return Draw(0, 0, [0]).more(n)


G = torch.Generator()


def test_the_filter_reads_raw_correctness_although_the_shaped_reward_varies() -> None:
    all_right = ([1.0, 1.0], [1.0, 0.5])  # a length penalty makes these rewards differ
    mixed = ([1.0, 0.0], [1.0, 0.0])
    source = prepared([all_right[0], mixed[0]], [all_right[1], mixed[1]])
    [kept] = Dynamic(source, refills=3)(None, draw(1), grading(), G)
    assert kept.signals["correct"].tolist() == [1.0, 0.0]
    assert source.draws == 2


def test_groups_accumulate_over_draws_and_surplus_is_dropped() -> None:
    source = prepared([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    kept = Dynamic(source, refills=5)(None, draw(2), grading(), G)
    assert [g.signals["correct"].tolist() for g in kept] == [[1.0, 0.0], [0.0, 1.0]]
    assert source.draws == 2


def test_refills_draw_new_tasks() -> None:
    seen: list[str] = []

    def remembering(policy: Any, tasks: Any, grade: Any, rng: torch.Generator) -> list[Group]:
        seen.extend(str(t.prompt) for t in tasks)
        return [group([1.0, 0.0] if len(seen) > 2 else [1.0, 1.0]) for _ in tasks]

    Dynamic(remembering)(None, draw(2), grading(), G)
    assert len(seen) == len(set(seen)) == 4


def test_too_few_groups_stop_with_the_numbers() -> None:
    source = prepared([[1.0, 0.0]] + [[0.0, 0.0]] * 7)
    with pytest.raises(GruppoError, match="kept 1 of 8 groups after 3 refills, but this step needs 2"):
        Dynamic(source, refills=3)(None, draw(2), grading(), G)
    assert source.draws == 4


def test_abstained_paths_do_not_decide() -> None:
    nan = float("nan")
    assert not undecided(torch.tensor([1.0, nan, 1.0]))
    assert not undecided(torch.tensor([nan, nan]))
    assert undecided(torch.tensor([1.0, nan, 0.0]))


def test_missing_correctness_is_a_sentence() -> None:
    bare = Group(group([1.0, 0.0]).task, group([1.0, 0.0]).paths, {"reward": torch.zeros(2)})
    with pytest.raises(GruppoError, match="reads the signal 'correct', but the graders of this run give only: reward"):
        Dynamic(lambda *a: [bare])(None, draw(1), grading(), G)
    with pytest.raises(GruppoError, match=r"signal 'correct' \(dynamic sampling keeps .*give only: reward"):
        check_needs(dapo(), draw(1), [bare])


def test_every_trained_group_is_undecided_and_the_stream_goes_on() -> None:
    trial = Trial.of(recipe("dapo", n=4, length=8, cache=2))
    done = trial.advance()
    assert len(done.groups) == 6
    assert all(undecided(g.signals["correct"]) for g in done.groups)
    assert trial.stream[0] % 6 == 0
    assert trial.stream[0] >= 6


def test_more_than_the_model_can_vary_stops_before_any_update() -> None:
    policy = tiny_policy()
    before = [p.clone() for p in policy.parameters()]
    hopeless = Dynamic(replace(dapo(n=2).rollout, refills=0).inner, signal="correct", refills=0)
    with pytest.raises(GruppoError, match="after 0 refills, but this step needs 40"):
        hopeless(policy, draw(40), grading(), torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters()))


def test_preset() -> None:
    r = dapo()
    assert r.rollout == Dynamic(recipe("grpo", n=16).rollout, signal="correct", refills=10)
    assert r.reward == Overlong(total, 20480, 4096)
    assert r.advantage == GroupNorm(ddof=1, eps=1e-6)
    assert r.needs == (Signal("correct", "dynamic sampling keeps the groups with 0 < #correct < G"),)
    assert r.reference is None
    assert r.cadence is whole
    assert dapo(parts=16).cadence == Passes(1, 16)


def test_clip_higher_lets_a_rare_right_answer_grow_further() -> None:
    """One batch with one rare correct arm, 20 epochs: the rare arm grows more at .28 than at .2."""
    assert growth(0.28) > growth(0.2) > 1.05


def growth(high: float) -> float:
    """How much more likely the rare arm is after 20 epochs on one batch of 16 draws, one of them the rare, right one."""
    from tests.recipes.batches import batch

    from gruppo.core.reduce import weigh
    from gruppo.types import Steps

    r = dapo(high=high)
    arms = torch.tensor([0] + [1, 2, 3] * 5)
    [a] = advantages(replace(r, reward=total), group((arms == 0).float().tolist()))
    b = weigh(batch(a, [1] * 16), r.reduce)
    logits = torch.tensor([-2.0, 0.0, 0.0, 0.0], requires_grad=True)
    old = logits.detach().log_softmax(0)[arms][:, None]
    b = b.with_(logp_old=old)
    optimizer = torch.optim.SGD([logits], lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        loss, _ = r.loss(b, Steps(logits.log_softmax(0)[arms][:, None]), None)
        (b.weight * loss).sum().backward()
        optimizer.step()
    return float((logits.detach().log_softmax(0)[0] - old[0, 0]).exp())
