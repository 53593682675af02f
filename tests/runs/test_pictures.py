"""A whole run of an image model, from its description to its report: trained, resumed bit for bit, looked at."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tests.runs.small import Quiet, silent

from gruppo.api import Run, evaluation_of
from gruppo.policies.flow import FlowPolicy
from gruppo.policies.painters import load_painter
from gruppo.policies.reference import swapped
from gruppo.recipes import recipe
from gruppo.recipes.golden_flow import Points
from gruppo.runs.build import painting_policy
from gruppo.runs.compare import compare
from gruppo.runs.config import assemble
from gruppo.runs.evaluate import evaluate
from gruppo.runs.given import Given
from gruppo.runs.report import browsable, side_by_side, write_report
from gruppo.runs.session import Session
from gruppo.types import GruppoError
from gruppo.worlds.glyphs import GLYPHS

SMALL: dict[str, Any] = {
    "recipe": "mix-grpo",
    "recipe_args": {"window": 2, "tau": 1, "updates": 1, "clip": 0.1},
    "world": "glyphs",
    "policy": {"denoising_steps": 3, "threads": 1, "device": "cpu"},
    "fit": {"steps": 3, "prompts_per_step": 2, "paths_per_prompt": 3},
    "eval": {"tasks": 3, "samples": 2},
    "track": {"save_every": 1, "groups_every": 1},
}


def run(folder: Path, **changes: Any) -> Session:
    made = Session.new(assemble(SMALL, {"folder": str(folder), **changes}), say=silent)
    made.run(Quiet())
    return made


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Session:
    return run(tmp_path_factory.mktemp("pictures"))


def test_the_window_moves_and_costs_are_recorded(done: Session) -> None:
    records = done.folder.records(done.folder.metrics)
    assert [r["counts"]["sampled"] for r in records] == [2 * 3 * 3] * 3
    assert [r["counts"]["trained"] for r in records] == [2 * 3 * 2] * 3
    assert [r["pictures"] for r in records] == [6] * 3
    assert not any("tokens" in r or "length" in r for r in records)
    starts = [pq.read_table(done.folder.path / f"groups/step-{s:06d}.parquet")["mask"][0].as_py() for s in (1, 2, 3)]
    assert starts == [[True, True, False], [False, True, True], [False, True, True]]


def test_evaluation_has_no_greedy_picture_and_no_lengths(done: Session) -> None:
    scores = done.folder.records(done.folder.evals)[-1]["scores"]
    assert {"mean@2", "pass@1", "pass@2"} <= set(scores)
    assert not {"greedy", "length", "truncated"} & set(scores)


def test_stored_pictures_can_be_looked_at(done: Session) -> None:
    row = pq.read_table(done.folder.path / "groups/step-000001.parquet").to_pylist()[4]
    (image,) = row["images"]
    assert Image.open(io.BytesIO(image)).size == (32, 32)
    assert row["fork"] == "0:0"  # the second prompt's paths begin at one noise
    assert len(row["sigmas"]) == 4
    assert row["deviations"][2] == 0


def test_the_report_shows_every_group_and_both_evaluations(done: Session) -> None:
    text = write_report(done.folder.path).read_text()
    assert text.count("data:image/png;base64,") >= 3 * 2 * 3
    group = browsable(done.folder.path)["steps"][0]["groups"][0]
    assert [len(p["denoising"]) for p in group["paths"]] == [3, 3, 3]
    assert [step[3] is None for step in group["paths"][0]["denoising"]] == [False, False, True]
    assert group["paths"][1]["marks"] == ["begins at the noise of path 0"]
    pair = side_by_side(done.folder.path)["pairs"][0]
    assert len(pair["before"]["images"]) == len(pair["before"]["right"]) == 2


def test_resumed_after_two_steps_the_third_is_the_same(done: Session, tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def stop(step: int) -> None:
        if step == 3:
            raise Stopped

    first = Session.new(assemble(SMALL, {"folder": str(tmp_path)}), say=silent)
    with pytest.raises(Stopped):
        first.run(Quiet(stop))
    again = Session.resume(first.folder.path, say=silent)
    again.run(Quiet())
    for a, b in zip(done.policy.parameters(), again.policy.parameters()):
        assert torch.equal(a, b)
    ours, theirs = (s.folder.records(s.folder.metrics)[-1] for s in (again, done))
    for key in ("reward", "loss", "grad_norm"):
        assert ours[key] == theirs[key]


def test_from_python_a_run_evaluates_its_averaged_weights_and_no_greedy_picture(tmp_path: Path) -> None:
    fit = {**SMALL["fit"], "steps": 2, "learning_rate": 1e-2, "ema": {"every": 1, "slow": 1000}}
    made = run(tmp_path, fit=fit)
    found = Run(made, *made.scores()).evaluate(samples=2)
    recorded = made.folder.records(made.folder.evals)[-1]["scores"]
    assert "greedy" not in found.scores
    with swapped(made.policy, made.average.weights if made.average is not None else []):
        averaged = evaluate(
            made.policy, made.held_out, made.stages[0].grade, torch.Generator().manual_seed(0), samples=2, greedy=False
        )
    assert found.scores["plain"] == averaged.scores["plain"]
    own = evaluate(made.policy, made.held_out, made.stages[0].grade, torch.Generator().manual_seed(0), samples=2, greedy=False)
    assert found.scores["plain"] != own.scores["plain"]
    assert recorded.keys() == found.as_dict()["scores"].keys()
    again = evaluation_of(str(made.folder.path), samples=2, say=silent)
    assert again.scores["plain"] == found.scores["plain"]


STAGES: list[dict[str, Any]] = [
    {"fit": {"steps": 2}},
    {"fit": {"steps": 1}, "only": {"count": [1, 2]}},  # the same recipe: its window goes on
    {"fit": {"steps": 3}, "recipe_args": {"tau": 2, "stride": 1}},  # another one: a window of its own
]


def windows(made: Session) -> list[int]:
    steps = range(1, made.step + 1)
    tables = [pq.read_table(made.folder.path / f"groups/step-{s:06d}.parquet") for s in steps]
    return [t["mask"][0].as_py().index(True) for t in tables]


def test_a_window_goes_on_through_stages_of_its_recipe_and_is_resumed_there(tmp_path: Path) -> None:
    changes = {"stages": STAGES, "eval": {"tasks": 0}, "policy": {**SMALL["policy"], "denoising_steps": 6}}
    whole = run(tmp_path / "whole", **changes)
    assert windows(whole) == [0, 1, 2, 0, 0, 1]
    for killed in (3, 4):  # after the last step of a stage

        class Stopped(Exception):
            pass

        def stop(step: int, at: int = killed, kind: type[Exception] = Stopped) -> None:
            if step == at:
                raise kind

        first = Session.new(assemble(SMALL, {"folder": str(tmp_path / f"killed-{killed}"), **changes}), say=silent)
        with pytest.raises(Stopped):
            first.run(Quiet(stop))
        again = Session.resume(first.folder.path, say=silent)
        again.run(Quiet())
        assert windows(again) == windows(whole)
        for a, b in zip(whole.policy.parameters(), again.policy.parameters()):
            assert torch.equal(a, b)


def test_two_runs_of_one_recipe_object_have_a_window_each(tmp_path: Path) -> None:
    mine = recipe("mix-grpo", n=3, window=2, tau=1, updates=1)
    asked = {**SMALL, "recipe": "grpo", "recipe_args": {}, "eval": {"tasks": 0}, "folder": str(tmp_path)}
    for _ in range(2):
        made = Session.new(assemble(asked), Given(recipe=mine), silent)
        made.run(Quiet())
        assert windows(made) == [0, 1, 1]  # the last two of three steps from the second iteration on
        assert made.recipe.state[0].state_dict() == {"start": 1, "held": 0, "steps": 3}
        assert mine.state[0].state_dict() == {"start": 0, "held": 0, "steps": 0}


def test_checkpointing_reaches_the_network() -> None:
    class Layers(torch.nn.Sequential):
        again = False

        def enable_gradient_checkpointing(self) -> None:
            self.again = True

    for asked in (False, True):
        painter = Points()
        painter.model = Layers(*painter.model.children())
        config = assemble({**SMALL, "policy": {**SMALL["policy"], "gradient_checkpointing": asked}})
        assert painting_policy(config, painter, None).model.again == asked


def test_checkpointing_that_a_network_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GruppoError, match=r"policy\.gradient_checkpointing is on, but a \w+ cannot compute its layers a second"):
        run(tmp_path, policy={**SMALL["policy"], "gradient_checkpointing": True})


def test_an_adapter_that_no_checkpoint_could_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GruppoError, match=r"policy\.lora is set, but a GlyphPainter names no lora_targets"):
        run(tmp_path, policy={**SMALL["policy"], "lora": {"rank": 2, "targets": ["qkv"]}})


def test_a_checkpoint_is_a_model_of_its_own(done: Session, tmp_path: Path) -> None:
    folder = done.folder.checkpoint(3)
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "GlyphPipeline"
    again = Session.new(assemble(SMALL, {"folder": str(tmp_path), "model": str(folder)}), say=silent)
    assert isinstance(again.policy, FlowPolicy)
    for a, b in zip(done.policy.parameters(), again.policy.parameters()):
        assert torch.equal(a, b)


def test_a_recipe_for_text_is_refused_for_a_painter_and_the_other_way_round(tmp_path: Path) -> None:
    with pytest.raises(GruppoError, match="the recipe grpo is for text models, but the model of this run paints"):
        Session.new(assemble({**SMALL, "recipe": "grpo", "recipe_args": {}, "folder": str(tmp_path)}), say=silent)
    with pytest.raises(GruppoError, match="the recipe mix-grpo is for image models, but the model of this run writes"):
        run(tmp_path, world="arithmetic")
    assert list(tmp_path.iterdir()) == []


def test_a_comparison_counts_calls_of_the_network(tmp_path: Path) -> None:
    numbers = {**SMALL["recipe_args"], "ratio": 0.5}
    settings = {**{k: SMALL[k] for k in ("policy", "eval", "track")}, "recipe_args": numbers, "fit": {**SMALL["fit"], "steps": 1}}
    settings["policy"] = {**settings["policy"], "denoising_steps": 8}
    names = ["mix-grpo", "mix-grpo-flash"]
    found = compare(names, world="glyphs", seeds=1, name="two", folder=tmp_path, say=silent, settings=settings)
    mix, flash = found.lines
    assert (mix.rows, mix.tokens) == (6, 6 * 8)
    assert (flash.rows, flash.tokens) == (6, 6 * 4)  # two steps of the window, int((8 - 1) .5) = 3 nodes behind them
    assert flash.marked
    assert list(found.table()[0])[-3:] == ["paths", "network calls", "time"]
    assert "48 network calls if painted one by one" in found.notes()[0]


def test_only_the_named_weights_of_a_painter_train(tmp_path: Path) -> None:
    made = run(tmp_path, policy={**SMALL["policy"], "trained": ["blocks.1"]}, fit={**SMALL["fit"], "steps": 1})
    now, base = dict(made.policy.model.named_parameters()), load_painter(GLYPHS.base).model.named_parameters()
    assert {name for name, weight in base if not torch.equal(weight, now[name])} == {n for n in now if n.startswith("blocks.1")}


def test_compiling_without_a_compiler_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(GruppoError, match=r"no C\+\+ compiler here \(no-such-compiler\)"):
        run(tmp_path, policy={**SMALL["policy"], "compile": True})


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # what torch.compile warns of is its own
def test_a_compiled_network_trains_as_the_eager_one(tmp_path: Path) -> None:
    plain, quick = (
        run(tmp_path / str(on), policy={**SMALL["policy"], "compile": on}, fit={**SMALL["fit"], "steps": 1})
        for on in (False, True)
    )
    for a, b in zip(plain.policy.parameters(), quick.policy.parameters()):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
    a, b = (r.folder.records(r.folder.metrics)[0] for r in (plain, quick))
    assert b["reward"] == pytest.approx(a["reward"], abs=1e-3)
    assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-2)
    assert quick.policy.model._compiled_call_impl is not None
    assert quick.folder.checkpoint(1).joinpath("model.safetensors").exists()


def test_what_the_painter_names_trains_unless_the_run_says_otherwise(tmp_path: Path) -> None:
    usual, whole = (
        painting_policy(assemble({**SMALL, "policy": {**SMALL["policy"], "trained": named}}), None, None)
        for named in (None, [""])
    )
    names = {n for n, w in usual.model.named_parameters() if w.requires_grad}
    assert {n.split(".")[0] for n in names} == set(usual.painter.trained)
    assert all(w.requires_grad for w in whole.model.parameters())
