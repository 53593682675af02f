"""Unlikeliness reward: ranks and rewards by hand, the raw filter, several passes, skipped steps, and pass@512."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path as File

import pytest
import torch
from tests.recipes.trained import trained
from tests.runs.small import session

from gruppo.claims.unlikeliness import claim, fresh, measured
from gruppo.claims.unlikeliness import train as train_claim
from gruppo.core.advantage import standardize
from gruppo.core.collate import Passes
from gruppo.core.kl import WithKL, k3
from gruppo.core.likelihood import mean_logp, sum_logp
from gruppo.core.reduce import step_mean
from gruppo.core.surrogate import PPOClip
from gruppo.graders.grade import Grading
from gruppo.policies.reference import initial
from gruppo.recipe import whole
from gruppo.recipes.golden import Draw, Trial, grading
from gruppo.recipes.grpo import GroupNorm, total
from gruppo.recipes.unlikeliness import Unlikely, as_coded, as_printed, held_k3, ranks, unlikeliness
from gruppo.rollouts import Dynamic, Parallel
from gruppo.runs.evaluate import evaluate, pass_at
from gruppo.train import iterate
from gruppo.types import Group, GruppoError, Path, Task
from gruppo.worlds import WORLDS

R, S = [1.0, 1, 0, 1], [-0.2, -1.0, -0.5, -2.0]


def group(correct, scores, lengths=None, **signals) -> Group:
    lengths = lengths or [1] * len(correct)
    paths = [
        Path(torch.tensor([2]), torch.zeros(n).long(), torch.full((n,), float(s)), torch.ones(n) > 0, "x")
        for s, n in zip(scores, lengths)
    ]
    right = torch.tensor(correct)
    return Group(Task("q"), paths, {"correct": right, "reward": right, **{k: torch.tensor(v) for k, v in signals.items()}})


def rewards(correct, scores, **numbers) -> list[float]:
    return unlikeliness(**numbers).reward(group(correct, scores)).tolist()


def advantages(r) -> list[float]:
    return standardize(torch.tensor(r), ddof=1, eps=1e-6).tolist()


# ---- the reward


def test_code_form() -> None:
    r = rewards(R, S)
    assert r == pytest.approx([0.8125, 0.9375, 0.0, 1.0])
    assert advantages(r) == pytest.approx([0.268866, 0.537732, -1.478762, 0.672165], abs=1e-5)


def test_paper_form() -> None:
    r = rewards(R, S, share=as_printed)
    assert r == pytest.approx([0.75, 0.875, 0.0, 0.9375])
    assert advantages(r) == pytest.approx([0.251935, 0.539861, -1.475619, 0.683823], abs=1e-5)


def test_the_code_gives_a_constant_more_than_the_paper_to_every_right_path() -> None:
    gap = torch.tensor(rewards(R, S)) - torch.tensor(rewards(R, S, share=as_printed))
    assert gap.tolist() == pytest.approx([0.0625, 0.0625, 0.0, 0.0625])


def test_without_a_discount_it_is_grpo() -> None:
    assert rewards(R, S, beta_rank=0.0) == R
    assert advantages(R) == pytest.approx([0.5, 0.5, -1.5, 0.5], abs=1e-5)


def test_a_single_right_path_gets_its_discount_back_from_the_std() -> None:
    r = rewards([1.0, 0, 0, 0], [-0.1, -1, -2, -3])
    assert r == pytest.approx([0.8125, 0, 0, 0])
    assert advantages(r) == pytest.approx([1.499996, *[-0.499999] * 3], abs=2e-6)


def test_ranks_are_over_wrong_paths_too() -> None:
    assert rewards([1.0, 0, 0, 0], [-3, -0.1, -0.2, -0.3])[0] == 1.0
    assert rewards([1.0, 0, 0, 0], [-0.1, -3, -2, -1])[0] == 0.8125


def test_equally_likely_paths_share_their_ranks() -> None:
    assert ranks(torch.tensor([-1.0, -1.0, -2.0, -0.5])).tolist() == [1.5, 1.5, 0.0, 3.0]
    assert ranks(torch.zeros(4)).tolist() == [1.5] * 4
    assert rewards([1.0, 1.0, 0, 0], [-1, -1, -1, -1])[0] == rewards([1.0, 1.0, 0, 0], [-1, -1, -1, -1])[1]


def test_mean_and_sum_rank_a_long_path_differently() -> None:
    g = group([1.0, 1.0, 0.0], [-1.0, -2.0, -3.0], [6, 2, 1])  # means -1 -2 -3, sums -6 -4 -3
    assert unlikeliness().reward(g).tolist() == pytest.approx([1 - 0.25 * 2 / 3, 1 - 0.25 / 3, 0.0])
    assert unlikeliness(score=sum_logp).reward(g).tolist() == pytest.approx([1.0, 1 - 0.25 / 3, 0.0])


def test_only_trained_steps_are_ranked() -> None:
    g = group([1.0, 1.0], [-1.0, -2.0], [3, 3])
    mask = torch.tensor([True, False, False])
    hidden = replace(g.paths[0], logp=torch.tensor([-1.0, -50.0, -50.0]), mask=mask)
    assert unlikeliness().reward(g.with_(paths=[hidden, g.paths[1]])).tolist() == unlikeliness().reward(g).tolist()


def test_only_the_correctness_part_is_discounted() -> None:
    g = group(R, S, reward=[1.1, 1.0, 0.1, 0.5])  # format adds 0.1, a length penalty takes 0.5
    assert unlikeliness().reward(g).tolist() == pytest.approx([1.1 - 0.1875, 1.0 - 0.0625, 0.1, 0.5])
    twice = group(R, S, reward=[2.1, 2.0, 0.1, 2.0])
    assert unlikeliness(weight=2.0).reward(twice).tolist() == pytest.approx([2.1 - 0.375, 2.0 - 0.125, 0.1, 2.0])


def test_a_negative_reward_of_a_wrong_path_stays_as_it_is() -> None:
    assert unlikeliness().reward(group([1.0, 0.0], [-1, -2], reward=[1.0, -1.0])).tolist() == pytest.approx([0.875, -1.0])


@pytest.mark.parametrize("grade", [0.5, -1.0, 2.0])
def test_a_grade_that_is_not_right_or_wrong_is_refused(grade: float) -> None:
    with pytest.raises(GruppoError, match=r"holds .*, but the unlikeliness reward discounts a grade that is 0 or 1"):
        unlikeliness().reward(group([1.0, grade], [-1, -2]))


def test_an_abstained_path_has_no_rank() -> None:
    nan = math.nan
    heard = rewards([1.0, 1.0, 0.0], [-1, -3, -4])
    silent = rewards([1.0, nan, 1.0, 0.0], [-1, -2, -3, -4])
    assert [silent[0], silent[2], silent[3]] == pytest.approx(heard)
    assert math.isnan(silent[1])


def test_a_path_of_unknown_correctness_is_ranked_and_not_discounted() -> None:
    g = group([1.0, math.nan, 0.0], [-3, -1, -2], reward=[1.0, 0.4, 0.0])  # another grader gave the second one a reward
    assert unlikeliness().reward(g).tolist() == pytest.approx([1.0, 0.4, 0.0])
    g = group([1.0, math.nan, 0.0], [-1, -3, -2], reward=[1.0, 0.4, 0.0])
    assert unlikeliness().reward(g).tolist() == pytest.approx([1 - 0.25 * 2 / 3, 0.4, 0.0])


def test_a_path_without_a_trained_step_has_no_rank() -> None:
    g = group([1.0, 1.0, 1.0], [-1, -2, -3])
    bare = replace(g.paths[1], mask=torch.tensor([False]))
    found = unlikeliness().reward(g.with_(paths=[g.paths[0], bare, g.paths[2]]))
    assert found.tolist() == pytest.approx([1 - 0.25 / 2, 1.0, 1.0])


def test_missing_correctness_is_a_sentence() -> None:
    with pytest.raises(GruppoError, match="discounts the signal 'correct', but the graders of this run give only: reward"):
        unlikeliness().reward(Group(Task("q"), group([1.0], [0.0]).paths, {"reward": torch.ones(1)}))


@pytest.mark.parametrize("beta_rank", [-0.1, 1.1, math.nan])
def test_beta_rank_is_a_share(beta_rank: float) -> None:
    with pytest.raises(GruppoError, match="share of a right answer's reward"):
        unlikeliness(beta_rank=beta_rank)


def test_a_weight_that_leaves_correctness_out_is_refused() -> None:
    with pytest.raises(GruppoError, match="its weight in the reward is 0; weigh 'correct' in the run"):
        unlikeliness(weight=0.0)


GRADES = """
class Both:
    signals = ("correct", "format")

    def __call__(self, groups):
        return [{"correct": [float(i % 2) for i in range(len(g))], "format": [1.0] * len(g)} for g in groups]
"""


def test_the_weight_of_correctness_is_the_runs_own_stage_by_stage(tmp_path: File) -> None:
    (tmp_path / "grades.py").write_text(GRADES)
    given = {"recipe": "unlikeliness", "rewards": [f"{tmp_path / 'grades.py'}:Both"], "recipe_args": {"beta": 0.0}}
    fit = {"steps": 1, "paths_per_prompt": 4}
    stages = [{"fit": fit}, {"fit": fit, "weights": {"correct": 3.0}}, {"fit": fit, "recipe_args": {"weight": 0.5}}]
    run = session(tmp_path, **given, weights={"correct": 2.0, "format": 0.5}, stages=stages)
    assert [stage.recipe.reward.weight for stage in run.stages] == [2.0, 3.0, 0.5]
    with pytest.raises(GruppoError, match="its weight in the reward is 0"):
        session(tmp_path, **given, weights={"format": 1.0})


def test_a_group_of_one() -> None:
    assert rewards([1.0], [-1.0]) == [1.0]


# ---- the filter


def test_an_all_right_group_has_advantages_after_the_discount_and_is_filtered_on_raw_correctness() -> None:
    all_right, mixed = group([1.0] * 4, S, reward=[1.0, 0.9, 1.0, 0.9]), group(R, S)  # a format part varies
    assert max(map(abs, advantages(unlikeliness().reward(all_right).tolist()))) > 0.5
    made = unlikeliness()
    assert isinstance(made.rollout, Dynamic)
    source = [all_right, group([0.0] * 4, S), mixed]
    filtered = replace(made.rollout, inner=lambda policy, tasks, grade, rng: [source.pop(0) for _ in tasks])
    [kept] = filtered(None, Draw(0, 0, [0]).more(1), grading(), torch.Generator())
    assert kept is mixed


# ---- the loss and the passes


def test_preset() -> None:
    made = unlikeliness()
    assert made.rollout == Dynamic(Parallel(32), signal="correct", refills=10)
    assert made.reward == Unlikely(total, 0.25, as_coded, mean_logp)
    assert made.advantage == GroupNorm(ddof=1, eps=1e-6)
    assert made.loss == WithKL(PPOClip(0.2, 0.2), 0.10, held_k3)
    assert made.reduce is step_mean
    assert made.cadence == Passes(2, 1)
    assert made.reference is initial
    assert [n.name for n in made.needs] == ["correct"]
    assert unlikeliness(epochs=1).cadence is whole
    assert unlikeliness(beta=0.0).reference is None


def test_the_kl_is_held() -> None:
    assert float(held_k3(torch.tensor(-1.0), torch.tensor(-1.2))) == pytest.approx(0.0187308, abs=1e-6)
    assert float(held_k3(torch.tensor(-9.0), torch.tensor(-1.0))) == 10.0
    assert float(k3(torch.tensor(-9.0), torch.tensor(-1.0))) > 2000


def test_two_passes_are_two_updates_and_the_second_is_off_policy() -> None:
    done = Trial.of(unlikeliness(n=8)).advance()
    assert done.updates == 2
    once = Trial.of(unlikeliness(n=8, epochs=1)).advance()
    assert once.updates == 1
    assert once.stats["ratio"] == pytest.approx(1, abs=1e-5)
    assert done.stats["ratio"] != pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("bound", "skipped"), [(1e-9, 1.0), (1e9, 0.0)])
def test_a_step_with_a_large_gradient_is_left_out(bound: float, skipped: float) -> None:
    trial = Trial.of(unlikeliness(n=8))
    before = [p.detach().clone() for p in trial.policy.parameters()]
    draw = Draw(0, 0, [0]).more(4)
    done = iterate(
        trial.policy, draw, grading(), trial.recipe, trial.optimizer, trial.rng, ref=trial.reference, skip_grad_norm=bound
    )
    assert done.stats["skipped"] == skipped
    assert done.updates == (0 if skipped else 2)
    assert done.stats["grad_norm"] > 0
    assert all(torch.equal(a, b) for a, b in zip(before, trial.policy.parameters())) == bool(skipped)


def test_without_a_bound_nothing_is_counted() -> None:
    assert "skipped" not in Trial.of(unlikeliness(n=8)).advance().stats


# ---- pass@N


def test_pass_at_512_is_exact() -> None:
    n = 512
    for k in (1, 2, 256, 511, 512):
        for correct in (0, 1, 3, 256, 511, 512):
            miss = Fraction(1)
            for i in range(k):
                miss *= Fraction(max(0, n - correct - i), n - i)
            assert pass_at(k, n, correct) == pytest.approx(float(1 - miss), abs=1e-12)
    assert pass_at(512, 512, 1) == 1.0
    assert pass_at(256, 512, 1) == 0.5


class Guess:
    """A policy that writes the task's own solution in `right` of its paths, spread evenly."""

    def __init__(self, solutions: dict[int, str], right: int, of: int) -> None:
        self.solutions, self.every = solutions, of // right

    def sample(self, prompts, *, g, temperature=None):
        one = torch.zeros(1)
        texts = [self.solutions[id(p)] if i % self.every == 0 else "<answer>0</answer>" for i, p in enumerate(prompts)]
        return [Path(one.long(), one.long(), one, one > -1, text) for text in texts]


def test_pass_at_n_up_to_512_on_countdown() -> None:
    world = WORLDS["countdown"]
    tasks = world.held_out(4)
    policy = Guess({id(t.prompt): t.extra["solution"] for t in tasks}, right=4, of=512)
    grade = Grading(world.graders(), dict(world.weights))
    found = evaluate(policy, tasks, grade, torch.Generator().manual_seed(0), samples=512, greedy=False)
    assert [name for name in found.scores if name.startswith("pass@")] == [f"pass@{2**i}" for i in range(10)]
    assert found.scores["pass@1"].value == pytest.approx(4 / 512)
    assert found.scores["pass@512"].value == 1.0
    assert found.scores["pass@128"].value == pytest.approx(1 - math.comb(508, 128) / math.comb(512, 128))
    assert found.counts["paths"] == 4 * 512


# ---- end to end


def test_it_trains_from_the_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    settings = ["recipe_args.beta=0.1", "recipe_args.share=gruppo.recipes.unlikeliness:as_printed", "fit.skip_grad_norm=20"]
    records = trained(monkeypatch, tmp_path, "unlikeliness", "countdown", "policy.max_new_tokens=40", *settings)
    assert len(records) == 3
    for r in records:
        assert r["updates"] == 2
        assert r["skipped"] == 0.0
        assert r["live"] == 1.0
        assert 0 < r["signals"]["correct"] < 1
        assert r["reward"] < r["signals"]["correct"] + 0.1 * r["signals"]["format"]


def test_the_discount_keeps_modes() -> None:
    start = fresh(0)
    plain, kept = (measured(train_claim(b, 0, steps=40), start)["modes"] for b in (0.0, 0.5))
    assert kept > 1.3 * plain


@pytest.mark.claim
def test_claim() -> None:
    found = claim()
    assert len(found.rows) == 8
    assert found.holds, found.verdict
    mean = found.table()[-2]
    assert 0.85 < float(mean["P(right) 0.25"]) < float(mean["P(right) 0"])
