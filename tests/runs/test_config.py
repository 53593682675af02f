from __future__ import annotations

from pathlib import Path

import pytest
from tests.runs.small import files

from gruppo.runs.config import assemble, derived, dump, merge, overrides, parse, read, validate
from gruppo.types import GruppoError

MINE = {"model": "m", "data": "d.jsonl", "rewards": ["r:f"]}


@pytest.mark.parametrize(
    ("text", "value"), [("1e-6", 1e-6), ("3e-4", 3e-4), ("1E+3", 1000.0), (".5e1", 5.0), ("1.0e-6", 1e-6), ("-2e-3", -2e-3)]
)
def test_a_number_in_scientific_notation_is_a_number(text: str, value: float) -> None:
    assert parse(f"x: {text}") == {"x": value}


@pytest.mark.parametrize("text", ["e5", "1e", "1e-6x", "v1e-6"])
def test_a_word_that_looks_like_one_stays_a_word(text: str) -> None:
    assert parse(f"x: {text}") == {"x": text}


def test_a_learning_rate_reaches_the_run_from_every_layer(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: m\ndata: d.jsonl\nrewards: [r:f]\nfit: {learning_rate: 1e-6, steps: 7}\n")
    given = read(tmp_path / "run.yaml")
    assert assemble(given).fit.learning_rate == 1e-6
    beaten = assemble(given, {}, overrides(["fit.learning_rate=3e-4", "policy.temperature=0.8"]))
    assert (beaten.fit.learning_rate, beaten.fit.steps, beaten.policy.temperature) == (3e-4, 7, 0.8)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("fit.stepz", "fit.steps"),
        ("steps", "fit.steps"),
        ("fit.temperature", "policy.temperature"),
        ("policy.lora.rnk", "policy.lora.rank"),
        ("recipee", "recipe"),
        ("lerning_rate", "fit.learning_rate"),
        ("eval.sample", "eval.samples"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_match(wrong: str, right: str) -> None:
    with pytest.raises(GruppoError) as error:
        validate(merge(MINE, overrides([f"{wrong}=3"])))
    assert str(error.value) == f"the run has the unknown key {wrong!r}; did you mean {right!r}?"


def test_an_unknown_key_without_a_relative_lists_its_section() -> None:
    with pytest.raises(GruppoError, match=r"unknown key 'eval\.qqqqqq'; known here: eval\.data, eval\.share, eval\.tasks"):
        validate(merge(MINE, overrides(["eval.qqqqqq=3"])))


def test_one_path_per_prompt_is_refused() -> None:
    with pytest.raises(GruppoError) as error:
        validate(merge(MINE, overrides(["fit.paths_per_prompt=1"])))
    assert str(error.value) == (
        "fit.paths_per_prompt is 1; a group needs at least 2 paths, because a path is only ever compared with its siblings"
    )


def test_the_number_of_paths_is_given_once() -> None:
    with pytest.raises(
        GruppoError, match=r"recipe_args\.n is 16, but the number of paths is given once, as fit\.paths_per_prompt"
    ):
        validate({**MINE, "recipe_args": {"n": 16}})


@pytest.mark.parametrize("setting", ["policy.top_p=0.9", "policy.top_k=50"])
def test_truncated_sampling_is_refused(setting: str) -> None:
    with pytest.raises(GruppoError, match=r"policy\.top_[pk] is .* full tempered distribution.*policy\.temperature"):
        validate(merge(MINE, overrides([setting])))


def test_temperature_zero_is_refused() -> None:
    with pytest.raises(GruppoError, match=r"policy\.temperature is 0.* must be above 0"):
        validate(merge(MINE, overrides(["policy.temperature=0"])))


def test_a_value_of_the_wrong_kind_is_named_with_its_place() -> None:
    with pytest.raises(GruppoError, match=r"fit\.steps in the run is 'many': input should be a valid integer"):
        validate(merge(MINE, overrides(["fit.steps=many"])))


def test_an_unknown_recipe_is_refused_with_the_nearest_match() -> None:
    with pytest.raises(GruppoError, match="there is no recipe 'gsp'; did you mean 'gspo'"):
        assemble(MINE, {"recipe": "gsp"})


def test_an_unknown_recipe_number_is_refused_with_the_nearest_match() -> None:
    with pytest.raises(GruppoError, match="the recipe grpo takes no number 'bta'; did you mean 'beta'"):
        assemble(MINE, {"recipe_args": {"bta": 0.1}})


def test_an_unknown_world_is_refused_with_the_nearest_match() -> None:
    with pytest.raises(GruppoError, match="there is no world 'arithmetik'; did you mean 'arithmetic'"):
        assemble({"world": "arithmetik"})


def test_a_run_without_rewards_says_what_is_missing() -> None:
    with pytest.raises(GruppoError, match="names no world and lacks rewards: give --world NAME, or all of"):
        validate({"model": "m", "data": "d"})


def test_a_key_that_stands_twice_is_refused() -> None:
    with pytest.raises(GruppoError, match="the key 'steps' stands twice, the second time in line 3"):
        parse("fit:\n  steps: 3\n  steps: 4\n")


def test_a_setting_without_equals_sign_is_refused() -> None:
    with pytest.raises(GruppoError, match=r"'fit\.steps' is not a setting; write section\.key=value"):
        overrides(["fit.steps"])


def test_nothing_at_all_is_grpo_on_arithmetic_with_the_worlds_defaults() -> None:
    from gruppo.worlds import WORLDS

    config = assemble({})
    assert (config.recipe, config.world) == ("grpo", "arithmetic")
    assert config.fit.learning_rate == WORLDS["arithmetic"].defaults["fit"]["learning_rate"]
    assert assemble({}, overrides(["fit.learning_rate=1e-5"])).fit.learning_rate == 1e-5


def test_a_worlds_recipe_numbers_go_only_to_recipes_that_take_them() -> None:
    from gruppo.recipes import find
    from gruppo.worlds import WORLDS

    suited = WORLDS["arithmetic"].defaults.get("recipe_args", {})
    for recipe in ("grpo", "rloo", "gspo", "cispo"):
        kept = assemble({"world": "arithmetic", "recipe": recipe}).recipe_args
        assert kept == {k: v for k, v in suited.items() if k in find(recipe).numbers}


def test_the_dumped_file_means_the_same_run(tmp_path: Path) -> None:
    config = assemble(
        files(tmp_path),
        overrides(["policy.lora.rank=4", "fit.betas=[0.9, 0.98]", "stages=[{fit: {steps: 2}}, {fit: {steps: 3}}]"]),
    )
    (tmp_path / "run.yaml").write_text(dump(config))
    assert assemble(read(tmp_path / "run.yaml")) == config


def test_the_batch_is_shown_with_everything_derived() -> None:
    config = validate(merge(MINE, overrides(["fit.epochs=2", "fit.updates_per_epoch=3", "fit.steps=5"])))
    assert derived(config)["run"] == (
        "5 steps of 16 prompts x 8 paths = 128 rows, at most 32768 sampled tokens, 6 optimizer steps per step"
    )


def test_stages_follow_one_another_with_their_own_numbers() -> None:
    config = validate(
        {
            **MINE,
            "fit": {"steps": 4},
            "stages": [{"only": {"difficulty": 1}}, {"fit": {"steps": 6}, "policy": {"temperature": 0.7}}],
        }
    )
    assert config.ends == [4, 10]
    assert (config.at(0).policy.temperature, config.at(1).policy.temperature) == (1.0, 0.7)
    assert (config.at(0).only, config.at(1).only) == ({"difficulty": 1}, None)


def test_a_stage_may_not_change_the_model() -> None:
    with pytest.raises(GruppoError, match=r"unknown key 'stages\.0\.model'"):
        validate({**MINE, "stages": [{"model": "other"}]})


def test_a_mistake_inside_a_stage_is_found_before_the_run() -> None:
    with pytest.raises(GruppoError, match=r"stage 2 has the unknown key 'fit\.stepz'; did you mean 'fit\.steps'"):
        validate({**MINE, "stages": [{"fit": {"steps": 2}}, {"fit": {"stepz": 2}}]})
