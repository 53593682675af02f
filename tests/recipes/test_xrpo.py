"""XRPO: the plan's numbers, one budget in unequal groups, examples for stuck prompts, a bonus that no wrong path gets."""

from __future__ import annotations

import json
import math
import pickle
import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.recipes.trained import trained
from tests.runs.small import Quiet, timeless

from gruppo.claims.xrpo import Coins, claim, grade, measured
from gruppo.core.student import student_cdf, student_quantile
from gruppo.graders.grade import Abstained, Grading
from gruppo.recipe import difference
from gruppo.recipes import recipe
from gruppo.recipes.golden import Trial, tiny_policy
from gruppo.recipes.grpo import GroupNorm, grpo
from gruppo.recipes.xrpo import (
    Ambiguity,
    Seeded,
    Sharpened,
    Solved,
    as_posed,
    half_width,
    lexical,
    log_over,
    root_log,
    side_by_side,
    the_right,
    turns,
    xrpo,
)
from gruppo.rollouts.allocate import Allocate, greedy, joined, proportional
from gruppo.runs.session import Session
from gruppo.types import Group, GruppoError, Path, Task

G = torch.Generator


# ---- Student's t


@pytest.mark.parametrize(
    ("df", "t"), [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (5, 2.57058), (10, 2.22814), (30, 2.04227)]
)
def test_quantiles_are_the_tables(df: int, t: float) -> None:
    assert student_quantile(0.975, df) == pytest.approx(t, abs=1e-4)
    assert student_quantile(0.025, df) == pytest.approx(-t, abs=1e-4)
    assert student_cdf(t, df) == pytest.approx(0.975, abs=1e-6)


def test_quantile_of_the_middle_of_many_and_of_nothing() -> None:
    assert student_quantile(0.5, 7) == pytest.approx(0.0, abs=1e-9)
    assert student_quantile(0.975, 10_000) == pytest.approx(1.9602, abs=1e-4)
    assert student_quantile(0.75, 1) == pytest.approx(1.0)  # Cauchy
    with pytest.raises(GruppoError, match=r"no quantile 0\.975 with 0 degrees"):
        student_quantile(0.975, 0)


# ---- the priority


@pytest.mark.parametrize(
    ("grades", "delta"),
    [([1.0, 0, 0, 1], 0.201818), ([1.0, 0, 0, 0], 0.174780), ([1.0, 0] * 4, 0.036002), ([0.0] * 4, 0.0), ([1.0] * 4, 0.0)],
)
def test_narrowing(grades: list[float], delta: float) -> None:
    assert Ambiguity(0.0).narrowing(torch.tensor(grades), len(grades)) == pytest.approx(delta, abs=1e-6)


def test_half_widths() -> None:
    assert half_width(0.577350, 4, 0.05) == pytest.approx(0.918693, abs=1e-5)
    assert half_width(0.577350, 5, 0.05) == pytest.approx(0.716875, abs=1e-5)
    assert half_width(0.534522, 8, 0.05) == pytest.approx(0.446872, abs=1e-5)
    assert half_width(0.534522, 9, 0.05) == pytest.approx(0.410870, abs=1e-5)


def test_both_transcriptions_of_the_bonus() -> None:
    assert [root_log(16, 4), log_over(16, 4)] == pytest.approx([0.841608, 0.708303], abs=1e-6)
    assert [root_log(64, 8), log_over(64, 8)] == pytest.approx([0.722356, 0.521798], abs=1e-6)
    heard = torch.tensor([1.0, 0, 0, 1])
    assert Ambiguity(2.0)(heard, 4, 16) == pytest.approx(0.201818 + 2 * 0.841608, abs=1e-6)
    assert Ambiguity(1.0, bonus=log_over)(heard, 4, 16) == pytest.approx(0.201818 + 0.708303, abs=1e-6)


def test_too_few_grades_have_no_spread_and_the_bonus_decides() -> None:
    for heard in (torch.empty(0), torch.ones(1)):
        assert Ambiguity(1.0)(heard, len(heard), 16) == root_log(16, 1)
    with pytest.raises(GruppoError, match=r"lam of at least 0 and a between 0 and 1, not -1\.0 and 0\.05"):
        Ambiguity(-1.0)


# ---- who gets the budget


def test_greedy_takes_the_best_next_path_each_time() -> None:
    halves = [lambda n: 1.0 / n, lambda n: 0.6 / n]
    assert greedy(halves, [1, 1], 4) == [3, 1]  # 1, .6, .5, .333 (before .3)
    assert greedy([lambda n: 0.0] * 3, [4, 2, 3], 3) == [0, 2, 1]  # equal worth: the smallest group first
    assert greedy(halves, [1, 1], 0) == [0, 0]


def test_proportional_gives_the_rest_to_the_largest_remainders() -> None:
    worths = [lambda n: 0.5, lambda n: 0.3, lambda n: 0.2]
    assert proportional(worths, [2, 2, 2], 10) == [5, 3, 2]
    assert proportional(worths, [2, 2, 2], 3) == [1, 1, 1]
    assert proportional(worths, [2, 2, 2], 2) == [1, 1, 0]
    assert proportional([lambda n: 0.0] * 3, [3, 2, 2], 2) == [0, 1, 1]


@pytest.mark.parametrize("spend", [greedy, proportional])
@pytest.mark.parametrize(
    ("n", "prompts", "phases", "first"), [(8, 5, 3, 0.5), (7, 3, 4, 0.3), (2, 4, 3, 0.5), (5, 1, 2, 1.0), (3, 7, 9, 0.1)]
)
def test_the_budget_is_spent_exactly(spend, n: int, prompts: int, phases: int, first: float) -> None:
    plan = Allocate(n, Ambiguity(0.05), first, phases, spend)
    tasks = [Task(str(p)) for p in torch.linspace(0, 1, prompts).tolist()]
    groups = plan(Coins(), tasks, grade, G().manual_seed(0))
    assert sum(map(len, groups)) == n * prompts
    assert [g.task for g in groups] == tasks
    assert min(map(len, groups)) >= plan.base >= 2
    for g in groups:
        assert g.signals["correct"].tolist() == [float(p.output) for p in g.paths]


def test_undecided_prompts_get_more_than_decided_ones() -> None:
    tasks = [Task("0.0"), Task("0.5"), Task("1.0"), Task("0.5")]
    sizes = [len(g) for g in Allocate(8, Ambiguity(0.05))(Coins(), tasks, grade, G().manual_seed(1))]
    assert sum(sizes) == 32
    assert min(sizes[1], sizes[3]) > max(sizes[0], sizes[2])


def test_the_plan_knows_what_was_spent() -> None:
    seen: list[int] = []

    def note(heard, n: int, T: int) -> float:
        seen.append(T)
        return 0.0

    Allocate(8, note)(Coins(), [Task("0.5")] * 4, grade, G().manual_seed(0))
    assert set(seen) == {16, 24}


def test_grades_that_were_not_given_do_not_count() -> None:
    heard: list[list[float]] = []

    def note(values, n: int, T: int) -> float:
        heard.append(values.tolist())
        assert n >= len(values)
        return 0.0

    def half(groups: list[Group]) -> list[Group]:
        return [g.with_(signals={"correct": torch.tensor([1.0, math.nan] * 4)[: len(g)]}) for g in groups]

    Allocate(4, note)(Coins(), [Task("1.0")], half, G().manual_seed(0))
    assert heard[0] == [1.0]


@pytest.mark.parametrize(("n", "phases", "first"), [(1, 3, 0.5), (8, 0, 0.5), (8, 3, 0.0), (8, 3, 1.5)])
def test_a_plan_that_cannot_be_is_refused(n: int, phases: int, first: float) -> None:
    with pytest.raises(GruppoError, match="a plan needs at least 2 paths per prompt, 1 phase"):
        Allocate(n, Ambiguity(0.0), first, phases)


def test_missing_correctness_is_a_sentence() -> None:
    with pytest.raises(GruppoError, match="the plan reads the signal 'correct', but the graders of this run give only: nothing"):
        Allocate(4, Ambiguity(0.0))(Coins(), [Task("0.5")], lambda groups: groups, G())


def part(correct, **signals) -> Group:
    one = torch.zeros(1)
    return Group(Task("q"), [Path("q", one, one, one > -1, "") for _ in correct], {"correct": torch.tensor(correct), **signals})


def test_parts_of_a_group_join_with_their_signals() -> None:
    both = joined(part([1.0], answers=["a"]), part([0.0, 1.0], answers=torch.tensor([math.nan, 3.0])))
    assert both.signals["correct"].tolist() == [1.0, 0.0, 1.0]
    assert both.signals["answers"] == ["a", None, 3.0]
    fork = part([0.0, 0.0])
    fork.paths[1] = replace(fork.paths[1], fork=(0, 1))
    assert joined(part([1.0, 1.0, 1.0]), fork).paths[4].fork == (3, 1)
    with pytest.raises(GruppoError, match="the signal 'length' was given for some phases"):
        joined(part([1.0]), part([1.0], length=torch.ones(1)))


def test_each_path_is_graded_once() -> None:
    seen: list[int] = []

    class Count:
        def __call__(self, groups):
            seen.extend(id(p) for g in groups for p in g.paths)
            return [{"correct": [Abstained("late") if p.output else 0.0 for p in g.paths]} for g in groups]

    grading = Grading([Count()], {"correct": 1.0})
    Allocate(8, Ambiguity(0.1))(Coins(), [Task("0.5")] * 3, grading, G().manual_seed(0))
    assert len(seen) == len(set(seen)) == 24
    assert sum(grading.abstained.values()) == sum(grading.failures.values()) > 0


# ---- examples for stuck prompts


class Known(Coins):
    """Coins on text prompts: the chance stands at the end; remembers what it was asked."""

    max_new, context = 4, 60

    def __init__(self) -> None:
        self.asked: list[str] = []

    def encode(self, prompt: Any) -> torch.Tensor:
        return torch.tensor([ord(c) for c in str(prompt)])

    def sample(self, prompts, *, g):
        self.asked += prompts
        return [replace(p, prompt=self.encode(q)) for p, q in zip(super().sample([q.split()[-1] for q in prompts], g=g), prompts)]

    def score(self, paths):
        return [torch.full((len(p),), -3.0) for p in paths]


def store(*pairs: tuple[str, str], size: int = 512) -> Solved:
    return Solved(size, items=dict(pairs))


def test_only_prompts_on_which_everything_failed_see_examples() -> None:
    policy = Known()
    plan = Allocate(8, Ambiguity(1.0), rescue=Seeded(store(("sum 1.0", "yes"))))
    groups = plan(policy, [Task("sum 0.0"), Task("sum 1.0"), Task("sum 0.5")], grade, G().manual_seed(0))
    seeded = [p for p in policy.asked if p.startswith("sum 1.0\nyes\n\n")]
    assert set(seeded) == {"sum 1.0\nyes\n\nsum 0.0"}
    assert len(seeded) == len(groups[0]) - 4
    changed = [not torch.equal(p.prompt, policy.encode(groups[0].task.prompt)) for p in groups[0].paths]
    assert changed == [False] * 4 + [True] * len(seeded)


def test_which_prompt_enters_the_loss_is_a_choice() -> None:
    policy = Known()
    plan = Allocate(8, Ambiguity(1.0), rescue=Seeded(store(("sum 1.0", "yes")), kept=as_posed))
    [group] = plan(policy, [Task("sum 0.0")], grade, G().manual_seed(0))
    assert [p.off_policy for p in group.paths] == [False] * 4 + [True] * 4
    assert all(torch.equal(p.prompt, policy.encode("sum 0.0")) for p in group.paths)
    assert group.paths[-1].logp.tolist() == [-3.0]
    assert any(p.endswith("\n\nsum 0.0") and p != "sum 0.0" for p in policy.asked)


def test_an_empty_store_a_store_of_strangers_and_of_the_question_itself_leave_the_prompt_as_it_is() -> None:
    for solved in (store(), store(("other words", "x")), store(("sum 0.0", "its own answer"))):
        policy = Known()
        Allocate(8, Ambiguity(1.0), rescue=Seeded(solved))(policy, [Task("sum 0.0")], grade, G().manual_seed(0))
        assert set(policy.asked) == {"sum 0.0"}


def test_a_prompt_whose_grades_all_abstained_is_not_stuck() -> None:
    policy = Known()

    def silent(groups):
        return [g.with_(signals={"correct": torch.full((len(g),), math.nan)}) for g in groups]

    Allocate(8, Ambiguity(1.0), rescue=Seeded(store(("sum 1.0", "yes"))))(policy, [Task("sum 0.0")], silent, G().manual_seed(0))
    assert set(policy.asked) == {"sum 0.0"}


def test_the_most_similar_examples_are_chosen_and_stand_last() -> None:
    solved = store(("a b c", "1"), ("a b", "2"), ("x y", "3"), ("a b c d", "4"))
    assert Seeded(solved).examples("a b c e") == [("a b c d", "4"), ("a b c", "1")]
    assert Seeded(solved, k=3).examples("a b c e")[0] == ("a b", "2")
    assert Seeded(solved, k=0).examples("a b c e") == []
    assert lexical("3+4=?", ["3 4", "9"]) == pytest.approx([2 / math.sqrt(5 * 2), 0.0])
    backwards = Seeded(solved, k=1, similar=lambda question, known: [float(i) for i in range(len(known), 0, -1)])
    assert backwards.examples("a b c e") == [("a b c", "1")]
    with pytest.raises(GruppoError, match="gave 1 similarities for 4 solved problems"):
        Seeded(solved, similar=lambda question, known: [1.0]).examples("a")


def test_long_solutions_are_cut_and_the_context_is_kept() -> None:
    solved = store(("sum 1", "y" * 100), ("sum 2 0", "z" * 10))
    assert [s for _, s in Seeded(solved, longest=5).examples("sum 0")] == ["yyyyy", "zzzzz"]
    asked = Seeded(solved, longest=30).ask(Known(), Task("sum 2 1"))
    assert asked == f"sum 1\n{'y' * 30}\n\nsum 2 1"  # both would need more than 60 - 4
    assert Seeded(solved).ask(Known(), Task("sum 2 " + "0" * 50)) is None


def test_templates() -> None:
    examples = [("q1", "s1"), ("q2", "s2")]
    assert turns("q", examples) == "q1\ns1\n\nq2\ns2\n\nq"
    assert side_by_side("q", examples) == "q1s1q2s2q"
    system, user = {"role": "system", "content": "be brief"}, {"role": "user", "content": "q"}
    talk = turns([system, user], examples)
    assert [m["role"] for m in talk] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert [m["content"] for m in talk] == ["be brief", "q1", "s1", "q2", "s2", "q"]
    assert turns([user], examples)[0]["content"] == "q1"


# ---- the store


def solved_group(question: str, correct, texts) -> Group:
    g = part([float(c) for c in correct])
    return Group(Task(question), [replace(p, output=t) for p, t in zip(g.paths, texts)], g.signals)


def test_the_store_keeps_verified_solutions_only_one_per_question_and_the_newest() -> None:
    memory = Solved(size=2)
    memory.update(
        [solved_group("a", [0, 1, 1], ["no", "first", "second"]), solved_group("b", [0, math.nan], ["no", "who knows"])]
    )
    assert memory.items == {"a": "first"}
    memory.update([solved_group("c", [1], ["c1"]), solved_group("a", [1], ["newer"])])
    assert list(memory.items.items()) == [("c", "c1"), ("a", "newer")]
    memory.update([solved_group("d", [1], ["d1"])])
    assert list(memory.items) == ["a", "d"]
    with pytest.raises(GruppoError, match="holds 0; it must hold at least 1"):
        Solved(0)


def test_the_store_survives_saving_in_order() -> None:
    memory = store(("b", "1"), ("a", "2"), size=2)
    saved = memory.state_dict()
    memory.update([solved_group("c", [1], ["3"])])
    other = Solved(2)
    other.load_state_dict(saved)
    assert list(other.items.items()) == [("b", "1"), ("a", "2")]
    other.update([solved_group("c", [1], ["3"])])
    assert other == memory


def test_the_rollout_and_the_state_are_one_store_also_after_pickling() -> None:
    made = pickle.loads(pickle.dumps(xrpo()))
    assert isinstance(made.rollout, Allocate)
    assert isinstance(made.rollout.rescue, Seeded)
    assert made.rollout.rescue.solved is made.state[0]
    assert made == xrpo()


# ---- the bonus


def sharpened(correct, scores, *, reward=None, lengths=None, masks=None, **numbers) -> list[float]:
    """Advantages of the last trained step of each path."""
    paths = []
    for i, s in enumerate(scores):
        n = lengths[i] if lengths else 1
        mask = torch.ones(n, dtype=torch.bool) if masks is None else torch.tensor(masks[i])
        logp = torch.where(mask, torch.full((n,), float(s)), torch.tensor(-40.0))
        paths.append(Path(torch.tensor([2]), torch.zeros(n).long(), logp, mask, "x"))
    right = torch.tensor(correct)
    g = Group(Task("q"), paths, {"correct": right}, reward=right if reward is None else torch.tensor(reward))
    A = Sharpened(GroupNorm(ddof=1, eps=1e-6), **{"lam_nov": 2.5, "kappa": 0.5, **numbers})(g)
    return A[:, 0].tolist()


def test_a_rare_right_path_earns_more_up_to_half_of_its_advantage() -> None:
    found = sharpened([1.0, 0, 1, 1], [-0.2, -0.6, -1.0, -0.6])
    assert found == pytest.approx([0.499999, -1.499997, 0.749999, 0.499999], abs=2e-6)
    mild = sharpened([1.0, 0, 1, 1], [-0.2, -0.6, -1.0, -0.6], lam_nov=0.3)
    assert mild[2] == pytest.approx(0.499999 + 0.3 * 0.329680, abs=2e-6)


def test_whom_sbar_is_the_mean_of() -> None:
    correct, scores = [1.0, 0, 1, 0], [-0.5, -0.2, -0.7, -0.6]
    eta = [1.0, 1.349859, 0.818731, 0.904837]
    A = [0.866024, -0.866024, 0.866024, -0.866024]
    over_all = sharpened(correct, scores, lam_nov=1.0, kappa=10.0)
    assert over_all == pytest.approx([a + max(0, 1 - e) * (a > 0) for a, e in zip(A, eta)], abs=2e-6)
    over_right = sharpened(correct, scores, lam_nov=1.0, kappa=10.0, among=the_right)
    assert over_right == pytest.approx([A[0], A[1], A[2] + 1 - 0.904837, A[3]], abs=2e-6)


def test_a_wrong_path_keeps_its_advantage_however_rare() -> None:
    found = sharpened([1.0, 1, 1, 0], [-0.5, -0.5, -0.5, -9.0])
    assert found[3] == pytest.approx(-1.499997, abs=2e-6)
    # a wrong path with a positive advantage (its format was better) is not sharpened either
    odd = sharpened([0.0, 0, 0, 0], [-0.5, -0.5, -0.5, -9.0], reward=[0.0, 0.0, 0.0, 0.1])
    assert odd[3] == pytest.approx(1.5, abs=1e-4)


def test_a_right_path_below_the_mean_of_a_shaped_reward_is_not_sharpened() -> None:
    found = sharpened([1.0, 1.0, 0.0], [-9.0, -0.5, -0.5], reward=[0.1, 1.0, 0.5])
    plain = sharpened([1.0, 1.0, 0.0], [-0.5, -0.5, -0.5], reward=[0.1, 1.0, 0.5])
    assert found[0] == plain[0] < 0


def test_an_all_right_group_stays_zero() -> None:
    assert sharpened([1.0] * 4, [-0.1, -1.0, -2.0, -3.0]) == [0.0] * 4


def test_padding_and_masked_steps_do_not_make_a_path_rare() -> None:
    short_and_long = sharpened([1.0, 0, 1, 1], [-0.6] * 4, lengths=[1, 9, 2, 5])
    assert short_and_long == pytest.approx([0.499999, -1.499997, 0.499999, 0.499999], abs=2e-6)
    tool = [[True, False], [True, True], [True, True], [True, True]]
    assert sharpened([1.0, 0, 1, 1], [-0.6] * 4, lengths=[2] * 4, masks=tool) == pytest.approx(short_and_long)


def test_abstained_paths_and_paths_without_a_step_say_nothing_about_what_is_rare() -> None:
    nan = math.nan
    found = sharpened([1.0, 0, 1, 1, nan], [-0.2, -0.6, -1.0, -0.6, -30.0])
    assert found[:4] == pytest.approx([0.499999, -1.499997, 0.749999, 0.499999], abs=2e-6)
    bare = sharpened([1.0, 0, 1], [-0.6] * 3, lengths=[1, 1, 1], masks=[[True], [True], [False]])
    assert all(math.isfinite(a) for a in bare)
    assert sharpened([1.0], [-1.0]) == [0.0]


def test_negative_numbers_are_refused() -> None:
    with pytest.raises(GruppoError, match="a bonus for novelty cannot be negative"):
        xrpo(kappa=-0.5)


# ---- the recipe


def test_preset() -> None:
    made = xrpo()
    assert set(difference(made, grpo(n=16, beta=0.0, eps=1e-6))) == {"rollout", "advantage", "state", "needs"}
    assert isinstance(made.rollout, Allocate)
    assert (made.rollout.n, made.rollout.base, made.rollout.phases) == (16, 8, 3)
    assert made.rollout.priority == Ambiguity(0.05, 0.05, root_log)
    assert made.advantage == Sharpened(GroupNorm(ddof=1, eps=1e-6), 2.5, 0.5)
    assert [need.name for need in made.needs] == ["correct"]
    assert xrpo(k=0).state == ()


def test_a_tiny_run_fills_the_store_uses_it_and_resumes_bit_for_bit() -> None:
    def made() -> Trial:
        return Trial.of(recipe("xrpo", n=8, template="gruppo.recipes.xrpo:side_by_side", lam=0.5))

    trial = made()
    seeded = 0
    for _ in range(3):
        done = trial.advance()
        assert sum(map(len, done.groups)) == 48
        assert len({len(g) for g in done.groups}) > 1
        seeded += sum(len(p.prompt) > 2 for g in done.groups for p in g.paths)
    assert seeded > 0
    [memory] = trial.recipe.state
    saved = [memory.state_dict(), {k: v.clone() for k, v in trial.policy.model.state_dict().items()}, trial.rng.get_state()]
    stream = list(trial.stream)
    expected = trial.advance()
    other = made()
    other.recipe.state[0].load_state_dict(saved[0])
    other.policy.model.load_state_dict(saved[1])
    other.rng.set_state(saved[2])
    other.stream[:] = stream
    found = other.advance()
    assert found.stats == expected.stats
    assert [len(g) for g in found.groups] == [len(g) for g in expected.groups]
    assert other.recipe.state[0].state_dict() == memory.state_dict()
    for a, b in zip(trial.policy.parameters(), other.policy.parameters()):
        assert torch.equal(a, b)


def test_seeded_paths_agree_with_the_evaluator() -> None:
    policy = tiny_policy(temperature=0.7)
    solved = store(("<a", "bcd"), ("<c", "de"))
    seeded = Seeded(solved, template=side_by_side, similar=lambda question, known: [1.0] * len(known))
    prompt = seeded.ask(policy, Task("<b"))
    assert prompt == "<abcd<cde<b"
    [path] = policy.sample([prompt], g=G().manual_seed(0))
    [read] = policy.score([path])
    assert torch.allclose(read, path.logp, atol=1e-4)
    [moved] = as_posed(policy, Task("<b"), [path])
    assert len(moved.prompt) == 2
    assert torch.allclose(policy.score([moved])[0], moved.logp)
    assert not torch.allclose(moved.logp, path.logp, atol=1e-4)


def test_it_trains_from_the_command_line_and_resumes(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    settings = [
        "recipe_args.bonus=gruppo.recipes.xrpo:log_over",
        "recipe_args.lam=0.2",
        "track.save_every=1",
        "track.keep_last=3",
    ]
    records = trained(monkeypatch, tmp_path, "xrpo", "arithmetic", *settings)
    assert [r["updates"] for r in records] == [1, 1, 1]
    assert all(r["ratio"] == pytest.approx(1, abs=1e-3) for r in records)
    run = tmp_path / "run"
    shutil.rmtree(run / "checkpoints" / "step-000003")
    session = Session.resume(run, say=lambda sentence: None)
    [memory] = session.recipe.state
    assert isinstance(memory, Solved)
    assert memory.items
    session.run(Quiet())
    again = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert timeless(again) == timeless(records)


def test_the_planner_informs() -> None:
    rows = {lam: measured(lam, 0) for lam in (None, 0.05)}
    assert rows[0.05]["informative"] > rows[None]["informative"] + 0.05
    assert rows[0.05]["open"] > rows[0.05]["decided"]


@pytest.mark.claim
def test_claim() -> None:
    found = claim(5)
    assert found.holds, found.verdict
    mean = found.table()[-2]
    assert float(mean["informative 0"]) > float(mean["informative 0.2"]) > float(mean["informative uniform"])
    assert float(mean["mixed 0"]) < float(mean["mixed uniform"])  # what the plan costs
