"""Scores of held-out tasks against counting by hand, enumeration and simulation."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from tests.tiny import tiny_policy

from gruppo.runs.evaluate import bootstrap, evaluate, majority, over_tasks, pass_at, score, votes, wilson
from gruppo.types import Group, GruppoError, Path, Task

NAN = math.nan


def path(text: str = "", length: int = 3, truncated: bool = False) -> Path:
    return Path(torch.tensor([5]), torch.zeros(length), torch.zeros(length), torch.ones(length) > 0, text, truncated=truncated)


def group(correct, answers=None, difficulty=None, **signals) -> Group:
    extra = {} if difficulty is None else {"difficulty": difficulty}
    found = {"correct": torch.tensor([float(c) for c in correct])}
    if answers is not None:
        found["answers"] = answers
    found |= {k: torch.tensor(v) for k, v in signals.items()}
    return Group(Task("q", extra=extra), [path() for _ in correct], found)


class Scripted:
    """Answers with its temperature, its prompt and how many paths it has given, so that a grader can tell them apart."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, float | None]] = []

    def sample(self, prompts, *, g, temperature=None):
        self.asked.append((len(prompts), temperature))
        kind = "greedy" if temperature == 0 else "drawn"
        return [path(f"{kind} {p} {int(torch.randint(2, (1,), generator=g)) if kind == 'drawn' else 1}") for p in prompts]


def by_last_digit(groups):
    return [g.with_(signals={"correct": torch.tensor([float(p.output[-1]) for p in g.paths])}) for g in groups]


@pytest.mark.parametrize(("n", "c", "k"), [(4, 1, 2), (5, 2, 4), (6, 3, 3), (8, 8, 8), (8, 0, 4), (3, 3, 1)])
def test_pass_at_k_is_the_share_of_k_subsets_that_hold_a_correct_path(n, c, k):
    subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
    assert pass_at(k, n, c) == pytest.approx(sum(any(s) for s in subsets) / len(subsets))


def test_pass_at_k_is_unbiased_over_draws_of_n_paths():
    p, n, k = 0.3, 6, 2
    expected = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at(k, n, c) for c in range(n + 1))
    assert expected == pytest.approx(1 - (1 - p) ** k)


def test_wilson_gives_the_textbook_intervals():
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_bootstrap_is_seeded_and_close_to_the_normal_interval():
    x = torch.rand(400, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    low, high = bootstrap(x.tolist())
    half = 1.96 * float(x.std()) / 20
    assert (low, high) == bootstrap(x.tolist())
    assert low == pytest.approx(float(x.mean()) - half, abs=0.1 * half)
    assert high == pytest.approx(float(x.mean()) + half, abs=0.1 * half)


def test_one_task_says_nothing_about_the_spread_of_a_mean():
    assert math.isnan(over_tasks([0.5]).low)


def test_a_share_of_certain_tasks_gets_wilson_and_not_an_empty_interval():
    s = over_tasks([0.0, 0.0, 0.0, 0.0], single=True)
    assert (s.value, s.low) == (0.0, 0.0)
    assert s.high == pytest.approx(wilson(0, 4)[1])


def test_the_kind_of_an_interval_does_not_depend_on_how_well_the_score_stands():
    mixed = score([group([1, 1, 1, 0]), group([1, 1, 1, 1]), group([0, 1, 1, 1])], []).scores
    certain = score([group([1, 1, 1, 1])] * 3, []).scores
    for name in ("mean@4", "pass@1", "pass@2"):  # means over paths: never Wilson's, and nothing where all tasks agree
        s = mixed[name]
        assert (s.value == 1.0 and math.isnan(s.low)) or (s.low, s.high) != wilson(3 * s.value, 3)
        assert math.isnan(certain[name].low)
    for scores in (mixed, certain):  # one 0 or 1 per task
        s = scores["pass@4"]
        assert (s.low, s.high) == wilson(3, 3)
    once = score([group([1]), group([1])], []).scores
    assert (once["mean@1"].low, once["mean@1"].high) == wilson(2, 2)


def test_no_tasks_score_is_nan_and_not_zero():
    s = over_tasks([NAN, NAN])
    assert math.isnan(s.value)
    assert s.n == 0


def test_scores_of_two_tasks_by_hand():
    groups = [group([1, 0, 0, 0], ["7", "8", "8", "9"]), group([1, 1, 0, 0], ["3", "3", "4", "4"])]
    s = score(groups, [group([0]), group([1])]).scores
    assert s["pass@1"].value == pytest.approx((1 / 4 + 2 / 4) / 2)
    assert s["pass@2"].value == pytest.approx((3 / 6 + 5 / 6) / 2)
    assert s["pass@4"].value == 1.0
    assert s["mean@4"].value == pytest.approx(0.375)
    assert s["majority@4"].value == pytest.approx((0 + 0.5) / 2)
    assert s["greedy"].value == 0.5


def test_majority_ties_are_worth_their_expectation():
    assert majority(["a", "b", "c", "a", "b"], [1, 0, 0, 1, 0]) == 0.5
    assert majority(["a", "b", "c"], [1, 0, 0]) == pytest.approx(1 / 3)


def test_majority_lets_no_answer_and_abstained_grades_cast_no_vote():
    assert majority([None, None, None, "a"], [0, 0, 0, 1]) == 1.0
    assert majority(["b", "b", "b", "a"], [NAN, NAN, NAN, 1]) == 1.0
    assert majority([None, None], [0, 0]) == 0.0
    assert math.isnan(majority(["a", "b"], [NAN, NAN]))


def test_votes_read_the_answer_tag_when_no_grader_extracted_answers():
    g = Group(Task("q"), [path("<think>1</think><answer> 4 </answer>"), path("no idea"), path("<answer></answer>")])
    assert votes(g) == ["4", None, None]
    assert votes(Group(Task("q"), [path("x"), path("y")])) is None


def test_abstained_paths_are_left_out_and_counted_never_zero():
    e = score([group([1, NAN, NAN, 1]), group([NAN] * 4)], [group([NAN]), group([1])])
    assert e.scores["mean@4"].value == 1.0
    assert e.scores["mean@4"].n == 1
    assert e.scores["pass@2"].value == 1.0
    assert e.scores["pass@4"].n == 0
    assert e.scores["greedy"].value == 1.0
    assert (e.counts["abstained"], e.counts["greedy_abstained"]) == (6, 1)


def test_scores_by_difficulty_are_the_scores_of_those_tasks_in_numeric_order():
    groups = [group([1, 1], difficulty=2), group([0, 1], difficulty=10), group([0, 0], difficulty=10), group([0, 0])]
    by = score(groups, []).by
    assert list(by) == ["difficulty=2", "difficulty=10"]
    assert by["difficulty=2"]["mean@2"].value == 1.0
    assert by["difficulty=10"]["mean@2"].value == 0.25
    assert by["difficulty=10"]["mean@2"].n == 2


def test_lengths_truncation_and_other_signals_are_means_over_tasks():
    a = group([1, 0], format=[1.0, 0.0])
    b = group([1, 0], format=[1.0, NAN])
    a.paths[0] = path(length=9, truncated=True)
    s = score([a, b], []).scores
    assert s["length"].value == pytest.approx((6 + 3) / 2)
    assert s["truncated"].value == pytest.approx(0.25)
    assert s["format"].value == pytest.approx((0.5 + 1.0) / 2)


def test_user_metrics_read_the_groups_and_may_not_shadow_a_score():
    def spread(groups):
        return {"distinct": float(len({p.output for g in groups for p in g.paths}))}

    def greedy(groups):
        return {"mean@2": 1.0}

    assert score([group([1, 0])], [], metrics=[spread]).scores["distinct"].value == 1.0
    with pytest.raises(GruppoError, match="the metric greedy returns 'mean@2', which is already the name"):
        score([group([1, 0])], [], metrics=[greedy])


def test_graded_correctness_is_refused_with_the_number():
    with pytest.raises(GruppoError, match=r"'correct' holds 0\.25; it must be 0, 1, or NaN"):
        score([group([1, 0.25])], [])


def test_a_run_without_correctness_still_has_its_reward_and_lengths():
    g = Group(Task("q"), [path(), path()], {"reward": torch.tensor([1.0, 3.0])})
    s = score([g], []).scores
    assert s["reward"].value == 2.0
    assert "pass@1" not in s


def test_evaluate_samples_at_the_policys_temperature_and_once_greedily():
    policy = Scripted()
    e = evaluate(policy, [Task("a"), Task("b")], by_last_digit, torch.Generator().manual_seed(0), samples=4)
    assert policy.asked == [(8, None), (2, 0.0)]
    assert e.scores["greedy"].value == 1.0
    assert [p.output.split()[1] for p in e.groups[1].paths] == ["b"] * 4


def test_the_same_generator_state_gives_the_same_evaluation():
    def run(seed):
        return evaluate(Scripted(), [Task(str(i)) for i in range(20)], by_last_digit, torch.Generator().manual_seed(seed))

    assert run(1).as_dict() == run(1).as_dict()
    assert run(1).as_dict() != run(2).as_dict()


def test_json_is_strict_and_rows_hold_every_score():
    e = score([group([NAN, NAN], difficulty=1), group([1, 0], difficulty=2)], [])
    back = json.loads(e.to_json())
    assert back["scores"]["mean@2"]["value"] == 0.5
    assert back["by"]["difficulty=1"]["mean@2"]["value"] is None
    rows = {(r["part"], r["metric"]): r["value"] for r in e.rows()}
    assert rows["difficulty=2", "pass@2"] == 1.0
    assert len(rows) == len(e.scores) + sum(map(len, e.by.values()))


def test_nothing_to_evaluate_is_a_sentence():
    rng = torch.Generator()
    with pytest.raises(GruppoError, match="no tasks to evaluate on"):
        evaluate(Scripted(), [], by_last_digit, rng)
    with pytest.raises(GruppoError, match="samples is 0 and greedy is False"):
        evaluate(Scripted(), [Task("a")], by_last_digit, rng, samples=0, greedy=False)


def test_a_real_policy_goes_through_with_greedy_paths_that_carry_no_log_probability():
    tasks = [Task("1+1="), Task("20+3=")]
    e = evaluate(tiny_policy(max_new=4), tasks, lambda gs: [_right(g) for g in gs], torch.Generator().manual_seed(0), samples=2)
    assert e.scores["greedy"].value == 1.0
    assert all(p.logp.isnan().all() for g in e.greedy_groups for p in g.paths)


def _right(g: Group) -> Group:
    return g.with_(signals={"correct": torch.ones(len(g))})
