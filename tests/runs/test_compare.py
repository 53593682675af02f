"""The table by hand on made-up run folders, and one real comparison of two recipes on a tiny model."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.rollouts.scripted import Scripted
from tests.runs.small import files, silent, timeless

from gruppo.rollouts.conversation import Talk, WithTools
from gruppo.runs.compare import Plan, Watch, compare, differences, judge, named, own_settings, plan, write
from gruppo.runs.folder import RunFolder
from gruppo.runs.interrupt import Interrupted
from gruppo.tools import tool
from gruppo.types import GruppoError

CORRECT = """
def correct(prompts, completions, **columns):
    return [float(sum(map(ord, text)) % 5 == 0) for text in completions]
"""


# -- the table ----------------------------------------------------------------------------------------------------------------


def run_folder(path: Path, greedy: float | None, tokens: int = 100, rows: int = 10, counted: int = 2) -> None:
    """A run of two steps as it lies on the disk; only its first `counted` steps were counted."""
    path.mkdir(parents=True)
    (path / "run.yaml").write_text("recipe: grpo\n")
    lines = {
        "metrics": [{"step": s, "reward": 0.5, "seconds": 1.5, "tokens": 1} for s in (1, 2)],
        "evals": [{"step": 0, "scores": {"greedy": {"value": 0.0}}}, {"step": 2, "scores": {"greedy": {"value": greedy}}}],
        "sampled": [{"step": s, "rows": rows // 2, "tokens": tokens // 2} for s in (1, 2)][:counted],
    }
    for name, records in lines.items():
        (path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def fabricated(folder: Path, scores: dict[str, list[float | None]], **numbers: dict[str, Any]) -> Plan:
    made = plan(list(scores), seeds=len(next(iter(scores.values()))), folder=folder.parent, name=folder.name)
    for nickname, values in scores.items():
        for seed, value in enumerate(values):
            run_folder(folder / f"{nickname}-seed{seed}", value, **numbers.get(nickname, {}))
    return made


def test_scores_and_paired_differences_have_students_intervals(tmp_path: Path) -> None:
    # grpo 0.1 0.2 0.3, rloo 0.2 0.3 0.5: the differences are 0.1 0.1 0.2, s = 0.0577, and t = 4.302653 for 2 degrees of freedom
    found = judge(fabricated(tmp_path, {"grpo": [0.1, 0.2, 0.3], "rloo": [0.2, 0.3, 0.5]}))
    first, second = found.lines
    score, apart = first.scores["greedy"], second.differences["greedy"]
    assert score is not None
    assert apart is not None
    assert (score.mean, score.high) == pytest.approx((0.2, 0.2 + 4.302653 * 0.1 / math.sqrt(3)))
    assert (apart.mean, apart.low) == pytest.approx((0.4 / 3, 0.4 / 3 - 4.302653 * math.sqrt(1 / 300) / math.sqrt(3)))
    assert first.differences == {}
    assert found.table()[1]["greedy accuracy % - grpo"] == "+13.3 ± 14.3"
    assert (first.seconds, found.table()[0]["time"]) == (3.0, "0:03")


def test_one_seed_has_no_interval(tmp_path: Path) -> None:
    found = judge(fabricated(tmp_path, {"grpo": [0.1], "rloo": [0.2]}))
    assert found.table()[1]["greedy accuracy %"] == "20.0"
    assert any("One seed" in note for note in found.notes())


@pytest.mark.parametrize(("tolerance", "marked"), [(0.0, True), (0.1, True), (0.25, False)])
def test_a_measured_difference_beyond_the_tolerance_is_marked(tmp_path: Path, tolerance: float, marked: bool) -> None:
    made = fabricated(tmp_path, {"grpo": [0.1, 0.2], "dapo": [0.2, 0.3]}, dapo={"tokens": 120, "rows": 10})
    found = judge(made, tolerance)
    assert [line.marked for line in found.lines] == [False, marked]
    assert found.lines[1].tokens_ratio == pytest.approx(1.2)
    assert found.table()[1]["tokens"] == "120 (1.20x)" + " *" * marked
    if tolerance:
        assert any(f"tolerated {100 * tolerance:g} %" in note for note in found.notes())


def test_paths_are_judged_as_tokens_are(tmp_path: Path) -> None:
    made = fabricated(tmp_path, {"grpo": [0.1], "dapo": [0.2]}, dapo={"rows": 12})
    assert [line.marked for line in judge(made).lines] == [False, True]


def test_steps_that_were_not_counted_leave_no_number(tmp_path: Path) -> None:
    found = judge(fabricated(tmp_path, {"grpo": [0.1, 0.2], "dapo": [0.2, 0.3]}, dapo={"counted": 1}), 0.5)
    assert (found.lines[1].tokens, found.lines[1].rows, found.lines[1].marked) == (None, None, True)
    assert found.table()[1]["tokens"] == "- (not counted) *"
    assert any("not counted" in note for note in found.notes())


def test_a_score_that_one_run_lacks_is_no_mean_of_the_others(tmp_path: Path) -> None:
    found = judge(fabricated(tmp_path, {"grpo": [0.1, 0.2], "rloo": [0.3, None]}))
    assert found.lines[1].scores["greedy"] is None
    assert found.lines[1].differences["greedy"] is None
    assert found.table()[1]["greedy accuracy %"] == "abstained"


def test_a_run_without_its_last_evaluation_is_not_judged(tmp_path: Path) -> None:
    made = fabricated(tmp_path, {"grpo": [0.1], "rloo": [0.2]})
    file = tmp_path / "rloo-seed0" / "evals.jsonl"
    file.write_text(file.read_text().splitlines()[0] + "\n")
    with pytest.raises(GruppoError, match=r"rloo-seed0 has no evaluation of its last step"):
        judge(made)


# -- descriptions -------------------------------------------------------------------------------------------------------------


def test_unequal_budgets_are_refused_with_both_numbers() -> None:
    with pytest.raises(
        GruppoError, match=r"paths_per_prompt is 16 for grpo and 8 for rloo \(at most .* tokens and at most .* tokens per run"
    ):
        plan(["grpo", "rloo"], own={"rloo": {"fit": {"paths_per_prompt": 8}}})
    with pytest.raises(GruppoError, match="steps is 50 for grpo and 51 for rloo"):
        plan(["grpo", "rloo"], own={"rloo": {"fit": {"steps": 51}}})


@pytest.mark.parametrize(
    "own", [{"policy": {"max_new_tokens": 9}}, {"eval": {"tasks": 3}}, {"world": "countdown"}, {"fit": {"seed": 3}}]
)
def test_only_recipe_args_and_fit_differ_between_recipes(own: dict[str, Any]) -> None:
    with pytest.raises(GruppoError, match="set for rloo alone, but it is the same for all"):
        plan(["grpo", "rloo"], own={"rloo": own})


def test_a_number_reaches_the_recipes_that_take_it() -> None:
    made = plan(["grpo", "dapo"], settings={"recipe_args": {"cache": 7}})
    assert made.configs["dapo"].recipe_args["cache"] == 7
    assert "cache" not in made.configs["grpo"].recipe_args
    with pytest.raises(GruppoError, match="takes no number 'cach'"):
        plan(["grpo", "dapo"], settings={"recipe_args": {"cach": 7}})


def test_what_a_recipe_has_in_front_is_its_own() -> None:
    common, alone = own_settings(["fit.steps=3", "2503.14476:fit.learning_rate=1e-5", "dapo:recipe_args.f=a.py:b"])
    assert common == ["fit.steps=3"]
    assert alone == {"2503.14476": ["fit.learning_rate=1e-5"], "dapo": ["recipe_args.f=a.py:b"]}
    made = plan(["grpo", "dapo"], own={"2503.14476": {"fit": {"learning_rate": 1e-5}}})
    assert (made.configs["grpo"].fit.learning_rate, made.configs["dapo"].fit.learning_rate) == (4e-5, 1e-5)


@pytest.mark.parametrize(
    ("words", "changes", "sentence"),
    [
        (["grpo"], {}, "1 recipe is named; a comparison needs at least two"),
        (["grpo", "2402.03300"], {}, "grpo is named twice"),
        (["grpo", "rloo"], {"seeds": 0}, "seeds is 0"),
        (["grpo", "rloo"], {"settings": {"stages": [{}]}}, "'stages' cannot be set"),
        (["grpo", "rloo"], {"own": {"dapo": {"fit": {"epochs": 2}}}}, "settings for dapo, which is not compared"),
        (["grpo", "rloo"], {"settings": {"eval": {"tasks": 0}}}, "eval.tasks is 0"),
        (["grpo", "rloo"], {"name": "a/b"}, "'a/b' would make a strange folder"),
        (["grpo", "rlo"], {}, "did you mean 'rloo'"),
        (["grpo", "other=rlo"], {}, "did you mean 'rloo'"),
        (["x=grpo"], {}, "1 recipe is named"),
        (["x=grpo", "x=rloo"], {}, "x is named twice"),
        (["grpo", "dapo=grpo"], {}, "dapo is the name of a recipe, so it cannot be the label of grpo"),
        (["grpo", "a/b=dapo"], {}, "the label 'a/b' becomes a folder's name"),
        (["grpo", "=dapo"], {}, "the label '' becomes"),
        (["grpo", "x=grpo"], {}, "grpo and x are the same recipe with the same numbers"),
        (["grpo", "x=grpo"], {"own": {"x": {"recipe_args": {"high": 0.2}}}}, "grpo and x are the same recipe"),  # its default
        (
            ["x=grpo", "rloo"],
            {"own": {"grpo": {"fit": {"epochs": 2}}}},
            "settings for grpo, which is not compared; compared are: x",
        ),
        (["grpo", "x=grpo"], {"own": {"x": {"fit": {"steps": 51}}}}, "steps is 50 for grpo and 51 for x"),
    ],
)
def test_what_cannot_be_compared_is_refused(words: list[str], changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(GruppoError, match=re.escape(sentence)):
        plan(words, **changes)


def test_words_are_recipes_labels_or_settings() -> None:
    words = ["grpo", "x=dapo", "fit.steps=3", "x:recipe_args.high=0.5", "world=search", "x=a.b", "model=dapo"]
    recipes, settings = named(words)
    assert recipes == ["grpo", "x=dapo", "x=a.b"]
    assert settings == ["fit.steps=3", "x:recipe_args.high=0.5", "world=search", "model=dapo"]


def test_one_recipe_with_two_numbers_is_two_lines(tmp_path: Path) -> None:
    made = plan(
        ["grpo", "loose=2402.03300", "other=rloo"],
        seeds=2,
        own={"loose": {"recipe_args": {"beta": 0.5}}},
        folder=tmp_path,
        name="mine",
    )
    assert made.runs == [(n, s) for s in (0, 1) for n in ("grpo", "loose", "other")]
    assert made.described["recipes"] == ["grpo", "loose=grpo", "other=rloo"]
    one, two = (made.run(n, 1) for n in ("grpo", "loose"))
    assert (one.recipe, two.recipe) == ("grpo", "grpo")
    assert (one.name, two.name) == ("grpo-seed1", "loose-seed1")
    assert {d[0] for d in differences(one.model_dump(mode="json"), two.model_dump(mode="json"))} == {"name", "recipe_args.beta"}
    for n, score in (("grpo", 0.1), ("loose", 0.3), ("other", 0.2)):
        for seed in (0, 1):
            run_folder(tmp_path / "mine" / f"{n}-seed{seed}", score + seed / 10)
    found = judge(made)
    assert [(x.recipe, x.nickname) for x in found.lines] == [("grpo", "grpo"), ("loose", "grpo"), ("other", "rloo")]
    assert [r["recipe"] for r in found.table()] == ["grpo", "loose", "other"]
    assert found.table()[1]["greedy accuracy % - grpo"] == "+20.0 ± 0.0"
    assert "loose is grpo with recipe_args.beta=0.5." in found.notes()
    assert "other is rloo." in found.notes()
    page = write(found).read_text()
    assert "<b>loose</b> (grpo, 2402.03300)" in page
    assert "<b>grpo</b> (2402.03300)" in page


def test_runs_differ_in_recipe_and_seed_and_nothing_else() -> None:
    made = plan(["grpo", "rloo"], seeds=2, settings={"fit": {"seed": 5}})
    assert made.runs == [("grpo", 5), ("rloo", 5), ("grpo", 6), ("rloo", 6)]
    one, two = (made.run(n, 6).model_dump(mode="json") for n in ("grpo", "rloo"))
    assert {d[0] for d in differences(one, two)} <= {"recipe", "name", "recipe_args.beta"}
    assert one["fit"]["seed"] == 6
    assert one["eval"]["every"] == 10  # 50 steps, 5 evaluations


# -- runs ---------------------------------------------------------------------------------------------------------------------


def settings(folder: Path) -> dict[str, Any]:
    own = files(folder)
    (folder / "correct.py").write_text(CORRECT)
    own |= {"rewards": [f"{folder / 'correct.py'}:correct"], "recipe_args": {"cache": 2}}
    own["fit"] |= {"steps": 2}
    own["eval"] |= {"greedy": True}
    own["track"] |= {"save_every": 1, "groups_every": 0}
    return {k: v for k, v in own.items() if k != "folder"}


def run(folder: Path, **changes: Any) -> Any:
    numbers = {"seeds": 2, "name": "mine", "folder": folder / "runs", "say": silent, "settings": settings(folder), **changes}
    return compare(["grpo", "dapo"], **numbers)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run(tmp_path_factory.mktemp("compared"))


def test_everything_sampled_is_counted_also_what_is_thrown_away_but_no_evaluation(done: Any) -> None:
    grpo, dapo = done.lines
    for line in done.lines:
        for one in line.runs:
            folder = RunFolder(done.folder / one.folder)
            recorded = sum(r["tokens"] for r in folder.records(folder.metrics))
            assert one.tokens == recorded  # the run counts at its sampler too
            assert one.rows == done.budget.paths if line is grpo else one.rows > done.budget.paths
    assert dapo.marked
    assert dapo.tokens_ratio > 1


def test_before_training_all_recipes_are_evaluated_alike(done: Any) -> None:
    for seed in range(2):
        grpo, dapo = (line.runs[seed].curve[0] for line in done.lines)
        assert grpo == dapo
    assert done.lines[0].runs[0].curve[0] != done.lines[0].runs[1].curve[0]


def test_the_page_holds_all_that_it_shows(done: Any) -> None:
    (done.folder / "dapo-seed1" / "report.html").write_text("a report")
    text = write(done).read_text()
    assert not re.findall(r'(?:src|href)="(?!data:|dapo-seed1/report\.html")', text)
    assert text.count("report.html") == 1
    assert (done.folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    for row in done.table():
        assert all(value in text for value in row.values())
    saved = json.loads((done.folder / "compare.json").read_text())
    assert [r["recipe"] for r in saved["recipes"]] == ["grpo", "dapo"]
    assert saved["budget"]["paths"] == 2 * 3 * 4


def test_a_stopped_comparison_goes_on_as_if_nothing_had_happened(
    done: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation = Watch.evaluation

    def stop(self: Watch, step: int, scores: Any) -> None:
        if self.folder.path.name == "dapo-seed0" and step == 2:
            raise KeyboardInterrupt
        evaluation(self, step, scores)

    with monkeypatch.context() as patch:
        patch.setattr(Watch, "evaluation", stop)
        with pytest.raises(Interrupted, match=r"stopped in .*dapo-seed0; the same `gruppo compare` goes on"):
            run(tmp_path)
    finished = tmp_path / "runs" / "mine" / "grpo-seed0"
    before = {f: f.stat().st_mtime_ns for f in finished.rglob("*")}
    again = run(tmp_path)
    assert {f: f.stat().st_mtime_ns for f in finished.rglob("*")} == before
    for name in ("grpo-seed0", "dapo-seed0", "grpo-seed1", "dapo-seed1"):
        one, two = (RunFolder(c.folder / name) for c in (done, again))
        assert timeless(one.records(one.metrics)) == timeless(two.records(two.metrics))
        assert one.records(one.path / "sampled.jsonl") == two.records(two.path / "sampled.jsonl")


def test_another_comparison_does_not_enter_the_folder(done: Any) -> None:
    before = {f: f.stat().st_mtime_ns for f in done.folder.rglob("*")}
    at = done.folder.parent.parent
    changed = settings(at)
    changed["fit"] |= {"learning_rate": 0.5}
    with pytest.raises(GruppoError, match=r"settings\.fit\.learning_rate is 0\.001 there and 0\.5 now"):
        run(at, settings=changed)
    with pytest.raises(GruppoError, match=r"seeds is \[0, 1\] there and \[0, 1, 2\] now"):
        run(at, seeds=3)
    assert {f: f.stat().st_mtime_ns for f in done.folder.rglob("*")} == before


def test_a_recipe_that_lacks_a_signal_is_named_before_anything_trains(tmp_path: Path) -> None:
    wrong = {**settings(tmp_path), "rewards": [f"{tmp_path / 'vowels.py'}:vowels"]}
    with pytest.raises(GruppoError, match=r"^dapo: .*'correct'"):
        run(tmp_path, settings=wrong)
    assert not (tmp_path / "runs" / "mine").exists()


def test_a_strangers_folder_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("all of it")
    with pytest.raises(GruppoError, match="is no comparison"):
        run(tmp_path)
    assert (folder / "thesis.txt").read_text() == "all of it"


def test_without_right_and_wrong_the_mean_reward_is_compared(tmp_path: Path) -> None:
    made = plan(
        ["grpo", "rloo"],
        seeds=1,
        name="mine",
        folder=tmp_path,
        settings={k: v for k, v in files(tmp_path).items() if k != "folder"},
    )
    for nickname in made.configs:
        run_folder(tmp_path / "mine" / f"{nickname}-seed0", 0.5)
        file = tmp_path / "mine" / f"{nickname}-seed0" / "evals.jsonl"
        file.write_text(file.read_text().replace("greedy", "reward"))
    found = judge(made)
    assert found.names == ["reward"]
    assert write(found).stat().st_size > 10_000


def shout(text: str) -> str:
    """Say it louder."""
    return text.upper()


def test_turns_are_counted_below_a_worlds_tools(tmp_path: Path) -> None:
    sampler = Scripted({"q:": ["<shout>a</shout>", "done"]})
    policy = WithTools(sampler, Talk((tool(shout),)))
    watch = Watch(RunFolder(tmp_path), policy, 0, silent)
    (path,) = policy.sample(["q:"], g=torch.Generator())
    assert path.output == "<shout>a</shout><result>A</result>done"
    assert (watch.rows, watch.tokens) == (2, 16 + 4 + 1)  # two turns; the reply is read, not sampled; the end token is sampled
