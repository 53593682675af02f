"""Remap, Reflect, Adjust by hand, on a catalogue of four items, and on the world `catalog` with teachers good and bad."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path as File
from random import Random

import pytest
import torch
from torch import Tensor

from gruppo.demonstrations import Repair, adjust, best, demonstrations, fit_adjustment, positions, reflect, remap
from gruppo.graders.ranking import parse
from gruppo.policies.token import TokenPolicy
from gruppo.sft import fine_tune, read_examples, sft
from gruppo.types import GruppoError, Task
from gruppo.worlds import teacher as taught
from gruppo.worlds.catalog import CATALOG, RANKS, catalog, films, listed

ITEMS = ("A (1990)", "B (1990)", "C (1990)", "D (1990)")
ALIKE = torch.tensor([[0.5, 0.2, 0.0], [0.0, 0.4, 1.0]])
SAME = torch.tensor([[1.0, 0, 0], [0, 0, 0]])
CONVERSATION = torch.tensor([0.0, 0.0, 0.5])
NOBODY = torch.zeros(3, dtype=torch.bool)


# ---- worked numbers


def test_a_line_counts_one_over_the_root_of_its_place() -> None:
    assert positions(4).tolist() == pytest.approx([1, 0.707107, 0.577350, 0.5], abs=1e-6)


def test_remap() -> None:
    # 1.5 = 1 x (0.5 + 1);  0.482843 = 0.2 + 0.4 / sqrt 2;  1.707107 = 1 / sqrt 2 + 2 x 0.5
    assert remap(ALIKE, SAME, CONVERSATION, 2.0).tolist() == pytest.approx([1.5, 0.482843, 1.707107], abs=1e-6)


def test_reflect() -> None:
    score = remap(ALIKE, SAME, CONVERSATION, 2.0)
    assert reflect(score, torch.tensor([2.0, -1, 0]), 0.5).tolist() == pytest.approx([2.5, -0.017157, 1.707107], abs=1e-6)


def test_adjust_and_the_list_it_makes() -> None:
    score = torch.tensor([2.5, -0.017157, 1.707107])
    final = adjust(score, torch.tensor([1.0, 2, 1]), torch.tensor([-1.0, 0, 0]))
    assert final.tolist() == pytest.approx([1.5, -0.034314, 1.707107], abs=1e-6)
    assert best(score, 3, NOBODY) == [0, 2, 1]
    assert best(final, 3, NOBODY) == [2, 0, 1]


def test_named_items_are_not_listed_and_equals_keep_their_order() -> None:
    assert best(torch.tensor([1.0, 1, 2, 1]), 3, torch.tensor([False, False, True, False])) == [0, 1, 3]
    assert best(torch.tensor([-1.0, -2, 5]), 2, torch.tensor([False, False, True])) == [0, 1]
    with pytest.raises(GruppoError, match="leaves only 2 of 3"):
        best(torch.zeros(3), 3, torch.tensor([True, False, False]))


# ---- w and b


def test_an_item_that_is_a_truth_more_often_than_it_scores_rises() -> None:
    scores = torch.tensor([[2.0, 1, 0]] * 4)
    truths = torch.tensor([[True, False, False], *[[False, True, False]] * 3])
    weight, bias = fit_adjustment(scores, truths, torch.zeros(4, 3, dtype=torch.bool))
    assert best(scores[0], 1, NOBODY) == [0]
    assert best(adjust(scores[0], weight, bias), 1, NOBODY) == [1]
    logp = adjust(scores, weight, bias).log_softmax(1)
    before = scores.log_softmax(1)
    assert float(logp[truths].mean()) > float(before[truths].mean()) + 0.5


def test_an_item_that_was_named_in_every_conversation_stays_where_it_is() -> None:
    named = torch.tensor([[False, False, True]] * 4)
    truths = torch.tensor([[False, True, False]] * 4)
    weight, bias = fit_adjustment(torch.tensor([[2.0, 1, 9]] * 4), truths, named)
    assert (float(weight[2]), float(bias[2])) == (1, 0)


def test_holding_keeps_w_and_b_near_their_start() -> None:
    data = torch.tensor([[2.0, 1]] * 2), torch.tensor([[False, True]] * 2), torch.zeros(2, 2, dtype=torch.bool)
    free, held = (fit_adjustment(*data, hold=h)[1].abs().max() for h in (0.0, 100.0))
    assert float(held) < 0.1 < float(free)


def test_a_conversation_without_a_truth_changes_nothing() -> None:
    named = torch.zeros(2, 2, dtype=torch.bool)
    one = fit_adjustment(torch.tensor([[2.0, 1]]), torch.tensor([[False, True]]), named[:1])
    two = fit_adjustment(torch.tensor([[2.0, 1], [9, 0]]), torch.tensor([[False, True], [False, False]]), named)
    assert all(torch.equal(a, b) for a, b in zip(one, two))
    with pytest.raises(GruppoError, match="has a truth"):
        fit_adjustment(torch.zeros(2, 2), named, named)


def test_a_truth_that_the_conversation_named_is_none() -> None:
    scores, truths = torch.tensor([[2.0, 1, 0], [9, 0, 1]]), torch.tensor([[False, True, False], [True, False, False]])
    named = torch.tensor([[False, False, False], [True, False, False]])
    one, two = fit_adjustment(scores[:1], truths[:1], named[:1]), fit_adjustment(scores, truths, named)
    assert all(torch.equal(a, b) for a, b in zip(one, two))


def test_scores_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(GruppoError, match="1 scores are not finite"):
        fit_adjustment(torch.tensor([[float("nan"), 1]]), torch.tensor([[True, False]]), torch.zeros(1, 2, dtype=torch.bool))


# ---- the repair


def alike(lines: Sequence[str]) -> Tensor:
    """Every line is a little like the item behind it."""
    return torch.tensor([[0.5 * (ITEMS.index(line) + 1 == c if line in ITEMS else c == 3) for c in range(4)] for line in lines])


def same(lines: Sequence[str]) -> Tensor:
    return torch.tensor([[float(line == item) for item in ITEMS] for line in lines])


def named(task: Task) -> Tensor:
    return torch.tensor([item[0] in task.extra.get("seen", "") for item in ITEMS])


REPAIR = Repair(ITEMS, alike, same, lambda task: torch.zeros(4), named)


def test_lines_beyond_the_catalogue_become_what_they_are_like() -> None:
    task = Task("q")
    assert REPAIR.remapped(task, ["B (1990)", "Z (2000)"]).tolist() == pytest.approx([0, 1, 0.5, 0.353553], abs=1e-6)
    assert REPAIR(task, ["B (1990)", "Z (2000)"], 3) == ["B (1990)", "C (1990)", "D (1990)"]
    assert REPAIR(Task("q", extra={"seen": "C"}), ["B (1990)", "Z (2000)"], 3) == ["B (1990)", "D (1990)", "A (1990)"]


def test_the_judge_rates_the_best_only_and_what_was_not_named() -> None:
    asked = []

    def judge(task: Task, lines: Sequence[str]) -> list[float]:
        asked.append(list(lines))
        return [2.0 if line.startswith("C") else -2.0 for line in lines]

    strict = replace(REPAIR, judge=judge, N_r=2)
    score = strict.reflected(Task("q"), ["B (1990)", "Z (2000)"])
    assert asked == [["B (1990)", "C (1990)"]]
    assert score.tolist() == pytest.approx([0, -1, 2.5, 0.353553], abs=1e-6)
    assert replace(strict, gamma=0.25).reflected(Task("q"), ["B (1990)", "Z (2000)"])[2] == 1.0
    strict.reflected(Task("q", extra={"seen": "BCD"}), ["B (1990)"])
    assert asked[-1] == ["A (1990)"]


@pytest.mark.parametrize(("said", "told"), [([3.0], "rated one 3"), ([float("nan")], "rated one nan"), ([1.0, 1.0], "gave 2")])
def test_a_judge_that_leaves_its_scale_is_refused(said, told: str) -> None:
    with pytest.raises(GruppoError, match=f"asked for 1 ratings from -2 to 2 and {told}"):
        replace(REPAIR, judge=lambda task, lines: said, N_r=1).reflected(Task("q"), ["A (1990)"])


def test_nothing_is_demonstrated_from_nothing() -> None:
    with pytest.raises(GruppoError, match="gave no line"):
        REPAIR(Task("q"), [], 2)
    with pytest.raises(GruppoError, match="4 of 4 remapped scores are not finite"):
        replace(REPAIR, conversation=lambda task: torch.full((4,), float("nan")))(Task("q"), ["A (1990)"], 2)


def test_fitted_numbers_are_used_and_come_from_the_reflected_scores() -> None:
    seen = {}

    def fit(scores: Tensor, truths: Tensor, ban: Tensor) -> tuple[Tensor, Tensor]:
        seen.update(scores=scores, truths=truths, ban=ban)
        return torch.tensor([1.0, -1, 1, 1]), torch.tensor([0.0, 0, 0, 9])

    right = torch.tensor([False, False, False, True])
    ready = replace(REPAIR, judge=lambda t, lines: [1.0] * len(lines), N_r=1).fitted(
        [Task("q", extra={"seen": "C"})], lambda t: ["B (1990)"], lambda t: right, fit
    )
    assert seen["scores"].tolist() == [[0, 2, 0.5, 0]]
    assert seen["truths"].tolist() == [right.tolist()]
    assert seen["ban"].tolist() == [[False, False, True, False]]
    assert ready(Task("q"), ["B (1990)"], 4) == ["D (1990)", "C (1990)", "A (1990)", "B (1990)"]


def test_demonstrations_are_examples() -> None:
    [example] = demonstrations([Task("q")], lambda t: ["B (1990)"], REPAIR, 2)
    assert (example.prompt, example.completion) == ("q", "B (1990)\nC (1990)")


# ---- on the world


def careless(task: Task) -> list[str]:
    """Films of any kind, known or not, named or not."""
    random = Random(str(task.prompt))
    return [*map(str, random.sample(films(), 5)), "Nothing (1900)", "no film at all"]


@pytest.mark.parametrize("by", [taught.teacher, careless])
def test_a_demonstration_is_five_different_unnamed_titles_of_the_catalogue(by) -> None:
    ready = replace(taught.repair(), weight=torch.full((108,), -1.0))
    for repair in (taught.repair(), ready):
        for i in range(30):
            task = CATALOG.task(0, i)
            made = parse("\n".join(repair(task, by(task), RANKS)))
            assert len({(m.title, m.year) for m in made} & catalog()) == RANKS == len(made)
            assert not {m.title for m in made} & set(task.extra["seen"])


def test_each_step_makes_better_lists_than_the_one_before() -> None:
    tasks = [CATALOG.task(0, i) for i in range(150)]
    ready = taught.repair().fitted(tasks, taught.teacher, taught.truths)
    rows = {r.lists: r for r in taught.compared(CATALOG.held_out(60), taught.teacher, ready)}
    assert [r.catalog_share for r in rows.values()][1:] == [1, 1, 1]
    assert rows["teacher"].catalog_share < 0.9
    assert rows["teacher"].recall + 0.15 < rows["remap"].recall < rows["reflect"].recall - 0.05
    assert rows["reflect"].ndcg < rows["adjust"].ndcg


def test_similarity_and_sameness_know_films_and_nothing_else() -> None:
    first, abroad = listed()[0], films()[-1]
    rows = taught.similarity([str(first), str(abroad), "Nothing (1900)", f"{first.title} (1900)"])
    assert float(rows[0, 0]) == pytest.approx(1)
    assert float(rows[1].max()) > 0.3
    assert not rows[2:].any()
    assert taught.sameness([str(first), str(abroad)]).sum(1).tolist() == [1, 0]


def test_from_the_command_line_to_a_tuned_model(tmp_path: File, monkeypatch, capsys) -> None:
    (tmp_path / "mine.py").write_text(f"def best(task):\n    return {[str(listed()[3])]}\n")
    file = tmp_path / "rows.jsonl"
    asked = ["teacher", str(file), "--rows", "12", "--tasks", "4", "--teacher", f"{tmp_path / 'mine.py'}:best"]
    monkeypatch.setattr(sys, "argv", asked)
    taught.main()
    told = capsys.readouterr().out
    assert [line.split()[0] for line in told.splitlines()] == ["lists", "teacher", "remap", "reflect", "adjust", "12"]
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [r["prompt"] for r in rows] == [CATALOG.task(0, i).prompt for i in range(12)]
    list(fine_tune(CATALOG.base, file, tmp_path / "tuned", steps=1, step_tokens=256))
    assert (tmp_path / "tuned" / "model.safetensors").exists()
    assert len(read_examples(file)) == 12


def test_the_model_learns_the_demonstrations() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(CATALOG.base, dtype=torch.float32)
    policy = TokenPolicy(model, AutoTokenizer.from_pretrained(CATALOG.base), entropy=False)
    some = list(demonstrations([CATALOG.task(0, i) for i in range(16)], taught.teacher, taught.repair(), RANKS))
    losses = [
        done.loss
        for done in sft(policy, some, steps=12, step_tokens=1200, rate=lambda step: 1e-3, rng=torch.Generator().manual_seed(0))
    ]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
