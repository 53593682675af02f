"""The catalog world: its films, conversations and truths, its rewards and metrics, its base model, and runs on it."""

from __future__ import annotations

from pathlib import Path as File
from random import Random

import pytest
import torch
from tests.runs.small import Quiet, silent
from transformers import AutoModelForCausalLM, AutoTokenizer

from gruppo.api import evaluation_of
from gruppo.graders.grade import Grading
from gruppo.graders.ranking import parse
from gruppo.policies.token import TokenPolicy
from gruppo.recipes.rank_grpo import rank_grpo
from gruppo.rollouts.segmented import Segmented
from gruppo.runs.compare import chosen
from gruppo.runs.config import assemble
from gruppo.runs.session import Session
from gruppo.runs.show import label, shown
from gruppo.types import Group, Path, Task
from gruppo.worlds.catalog import (
    CATALOG,
    CORRECTED,
    DECADES,
    GENRES,
    IMPLIED,
    PER_CELL,
    RANKS,
    STATED,
    by_title,
    catalog,
    films,
    key,
    listed,
    near_miss,
    of,
    right,
    task_of,
    usual,
    work,
)
from gruppo.worlds.measure import correct

CELL = ("crime", 1990)
KINDS = [STATED, IMPLIED, CORRECTED]


def graded(task: Task, *texts: str) -> dict[str, torch.Tensor]:
    paths = [Path(torch.tensor([0]), torch.tensor([1]), torch.zeros(1), torch.ones(1, dtype=torch.bool), t) for t in texts]
    return Grading(CATALOG.graders(), dict(CATALOG.weights))([Group(task, paths)])[0].signals


def lines(*some: object) -> str:
    return "\n".join(map(str, some))


# -- films and conversations


def test_six_films_of_every_genre_and_decade_are_listed_and_no_two_share_a_title() -> None:
    assert len(listed()) == len(GENRES) * len(DECADES) * PER_CELL == 108
    assert all(len(of((g, d))) == PER_CELL for g in GENRES for d in DECADES)
    assert len(by_title()) == len(films()) == 144
    assert len(catalog()) == 108
    assert [(i.title, i.year) for i in parse(lines(*films()))] == [(f.title, f.year) for f in films()]


def test_conversations_by_hand() -> None:
    a, b, *rest = of(CELL)
    liked = next(f for f in listed() if f.cell == ("war", 1990))
    stated, implied = task_of(STATED, CELL, (a, liked)), task_of(IMPLIED, CELL, (a, b, liked))
    corrected = task_of(CORRECTED, CELL, (liked, a))
    assert [m["content"] for m in stated.prompt] == [f"Seen {a.title} and {liked.title}. Crime of the 90s?"]
    assert [m["content"] for m in implied.prompt] == [f"Loved {a.title} and {b.title}, not {liked.title}. More?"]
    assert [(m["role"], m["content"]) for m in corrected.prompt] == [
        ("user", f"Loved {liked.title}."),
        ("assistant", "More war?"),
        ("user", f"No, crime. Seen {a.title}."),
    ]
    assert stated.answer == corrected.answer == [(f.title, f.year) for f in (b, *rest)]
    assert implied.answer == [(f.title, f.year) for f in rest]
    assert key(implied) == key(task_of(IMPLIED, CELL, (b, a, liked))) != key(stated)


@pytest.mark.parametrize("kind", KINDS)
def test_truths_are_what_the_person_would_like_and_did_not_name(kind: int) -> None:
    tasks = [t for t in (CATALOG.task(0, i) for i in range(300)) if t.extra["difficulty"] == kind]
    assert len(tasks) > 60
    for i, task in enumerate(tasks):
        taste = {(f.title, f.year) for f in listed() if (f.genre, f.decade) == (task.extra["genre"], task.extra["decade"])}
        assert set(task.answer) == {(t, y) for t, y in taste if t not in task.extra["seen"]}
        assert len(task.answer) == (4 if kind == IMPLIED else 5)
        said = " ".join(m["content"] for m in task.prompt)
        assert all(t in said for t in task.extra["seen"])
        assert not any(t in said for t, _ in task.answer)
        assert len(right(Random(i), task)) == RANKS


# -- rewards and habits


def test_hits_recall_and_ndcg_of_one_list() -> None:
    a, b, c, d, e, f = of(CELL)
    task = task_of(IMPLIED, CELL, (a, b, next(x for x in listed() if x.cell != CELL)))
    found = graded(task, lines(c, a, c, d, e), lines(c, d, e, f, a), "nothing")
    assert found["hits"].tolist() == [[1, 0, 0, 1, 1], [1, 1, 1, 1, 0], [0] * 5]
    assert found["recall"].tolist() == [0.75, 1, 0]
    assert found["ndcg"].tolist() == pytest.approx([(1 + 0.430677 + 0.386853) / 2.561606, 1, 0], abs=1e-5)
    assert torch.equal(found["reward"], found["ndcg"])
    assert found["in_catalog"].tolist() == [1, 1, 0]


def test_films_that_teachers_know_are_not_in_the_catalogue() -> None:
    abroad = next(f for f in films() if not f.listed and f.cell == CELL)
    task = task_of(STATED, CELL, (of(CELL)[0], listed()[0]))
    found = graded(task, lines(abroad, of(CELL)[1]), lines(f"{of(CELL)[1].title} ({of(CELL)[1].year + 1})"))
    assert found["hits"].tolist() == [[0, 1, 0, 0, 0], [0] * 5]  # a year beside the catalogue's is another film
    assert found["in_catalog"].tolist() == [0.5, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_right_lists_are_right_and_the_habit_is_not(kind: int) -> None:
    tasks = [t for t in (CATALOG.task(1, i) for i in range(150)) if t.extra["difficulty"] == kind]
    best = [graded(t, t.extra["solution"], lines(*right(Random(i), t))) for i, t in enumerate(tasks)]
    assert all(torch.equal(f["reward"], torch.ones(2)) for f in best)
    habits = [graded(t, "\n".join(usual(Random(i), t))) for i, t in enumerate(tasks)]
    assert 0.2 < float(torch.cat([f["recall"] for f in habits]).mean()) < 0.45
    assert 0.85 < float(torch.cat([f["in_catalog"] for f in habits]).mean()) < 1
    lengths = [len(usual(Random(i), t)) for i, t in enumerate(tasks)]
    assert set(lengths) == {RANKS - 1, RANKS, RANKS + 1}


def test_lessons_are_mostly_right() -> None:
    tasks = [CATALOG.task(2, i) for i in range(100)]
    rewards = [float(graded(t, work(Random(i), t).completion)["reward"][0]) for i, t in enumerate(tasks)]
    assert 0.7 < sum(r == 1 for r in rewards) / len(rewards) < 0.9


def test_a_near_miss_misses_one_of_genre_and_decade() -> None:
    task = task_of(STATED, CELL, (of(CELL)[0], listed()[0]))
    assert {(f.genre == "crime", f.decade == 1990) for f in listed() if near_miss(f, task)} == {(True, False), (False, True)}


def test_measuring_a_world_without_right_and_wrong_counts_its_reward() -> None:
    task = CATALOG.task(0, 0)
    path = Path(torch.tensor([0]), torch.tensor([1]), torch.zeros(1), torch.ones(1, dtype=torch.bool), task.extra["solution"])
    assert correct(CATALOG, path, task) == 1


# -- the base model


@pytest.fixture(scope="module")
def policy() -> TokenPolicy:
    model = AutoModelForCausalLM.from_pretrained(CATALOG.base)
    return TokenPolicy(model, AutoTokenizer.from_pretrained(CATALOG.base), max_new=CATALOG.defaults["policy"]["max_new_tokens"])


@pytest.fixture(scope="module")
def groups(policy: TokenPolicy) -> list[Group]:
    tasks, grade = CATALOG.held_out(40), Grading(CATALOG.graders(), CATALOG.weights)
    recipe = rank_grpo(n=4, ranks=RANKS)
    assert isinstance(recipe.rollout, Segmented)
    return recipe.rollout(policy, tasks, grade, torch.Generator().manual_seed(1))


def test_the_base_model_writes_lists_of_the_catalogue_that_are_mostly_beside_the_taste(groups: list[Group]) -> None:
    lengths = [len(parse(p.output)) for g in groups for p in g.paths]
    assert {RANKS - 1, RANKS, RANKS + 1} <= set(lengths)
    assert sum(n == RANKS for n in lengths) / len(lengths) > 0.6
    assert all(len(parse(p.output)) == p.output.rstrip("\n").count("\n") + 1 for g in groups for p in g.paths if not p.truncated)
    assert float(torch.stack([g.signals["in_catalog"] for g in groups]).mean()) > 0.85
    assert 0.08 < float(torch.stack([g.signals["recall"] for g in groups]).mean()) < 0.35


def test_every_rank_finds_something_and_misses_something_within_groups(groups: list[Group]) -> None:
    hits = torch.stack([g.signals["hits"] for g in groups])  # [tasks, paths, ranks]
    assert float((hits.amax(1) > hits.amin(1)).float().mean(0).min()) > 0.15


def test_every_token_of_a_list_stands_in_its_rank(groups: list[Group], policy: TokenPolicy) -> None:
    for path in (p for g in groups[:10] for p in g.paths):
        assert path.unit is not None
        for k, item in enumerate(parse(path.output)[:RANKS]):
            text = policy.decode(path.steps[path.unit == k])
            assert [(i.title, i.year) for i in parse(text)] == [(item.title, item.year)]


def test_the_base_model_ends_by_itself_and_is_small(groups: list[Group], policy: TokenPolicy) -> None:
    assert sum(p.truncated for g in groups for p in g.paths) <= 10
    assert sum(f.stat().st_size for f in CATALOG.base.iterdir()) <= 4 * 2**20
    assert next(policy.model.parameters()).dtype == torch.float32


# -- runs


@pytest.mark.parametrize("recipe", ["rank-grpo", "grpo"])
def test_a_run_reports_recall_ndcg_and_the_share_in_the_catalogue(recipe: str, tmp_path: File) -> None:
    config = assemble(
        {
            "world": "catalog",
            "recipe": recipe,
            "policy": {"threads": 1, "device": "cpu"},
            "fit": {"steps": 1, "prompts_per_step": 2, "paths_per_prompt": 4},
            "eval": {"tasks": 3, "samples": 2},
            "track": {"report": False},
            "folder": str(tmp_path),
        }
    )
    assert config.recipe_args == ({"beta": 0.0, "ranks": RANKS} if recipe == "rank-grpo" else {"beta": 0.0})
    run = Session.new(config, say=silent)
    before, after = run.run(Quiet())
    assert before is not None
    assert after is not None
    assert {"recall@5", "ndcg@5", "catalog_share"} <= set(before) & set(after)
    # the signals of the same lists, averaged by the evaluation itself
    for metric, signal in {"recall@5": "recall", "ndcg@5": "ndcg", "catalog_share": "in_catalog"}.items():
        assert after[metric]["value"] == pytest.approx(after[signal]["value"], abs=1e-6)
    assert chosen([before, after]) == ["recall@5", "catalog_share", "ndcg@5"]
    found = evaluation_of(str(run.folder.path), tasks=2, samples=1, say=silent)
    assert {"recall@5", "ndcg@5", "catalog_share"} <= set(found.scores)


def test_how_the_scores_are_called() -> None:
    assert (label("recall@5"), shown("recall@5", 0.5)) == ("recall in the first 5", "50.0 %")
    assert (label("ndcg@5"), shown("ndcg@5", 0.5)) == ("NDCG of the first 5", "0.5")
    assert (label("catalog_share"), shown("catalog_share", 0.5)) == ("titles in the catalogue", "50.0 %")
