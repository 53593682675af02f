from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tests.runs.small import files, rows, timeless
from tests.tiny import tiny_model, tiny_tokenizer

import gruppo

FIT = {"steps": 2, "prompts_per_step": 2, "learning_rate": 1e-3}
POLICY = {"max_new_tokens": 5, "threads": 1, "device": "cpu"}
SMALL: dict[str, Any] = {"policy": POLICY, "eval": {"tasks": 2, "samples": 2}, "track": {"report": False}, "quiet": True}


def vowels(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """A TRL reward function, as people write them."""
    return [sum(c in "aeiou0123" for c in text) / 10 for text in completions]


def test_loaded_objects_train_and_can_be_resumed_without_them(tmp_path: Path) -> None:
    model = tiny_model()
    run = gruppo.train(
        model=model,
        tokenizer=tiny_tokenizer(),
        recipe=gruppo.recipe("grpo", n=3, beta=0.01),
        data=datasets.Dataset.from_list(rows(12)),
        rewards=[vowels],
        fit=FIT,
        folder=tmp_path,
        name="mine",
        **SMALL,
    )
    assert run.folder == tmp_path / "mine"
    assert run.model is model
    assert [r["step"] for r in run.metrics] == [1, 2]
    assert run.metrics[0]["reward"] is not None
    assert set(run.evaluate(samples=2).scores) >= {"reward", "length"}
    settings = gruppo.runs.config.read(run.folder / "run.yaml")
    assert settings["rewards"] == [f"{vowels.__module__}:vowels"]
    assert settings["fit"]["paths_per_prompt"] == 3
    with pytest.raises(gruppo.GruppoError, match="is finished: 2 of 2 steps"):
        gruppo.resume(run.folder)


def test_the_same_call_gives_the_same_run(tmp_path: Path) -> None:
    given = files(tmp_path)
    brought = {"model": given["model"], "data": given["data"], "rewards": vowels}
    one, two = (gruppo.train(**brought, recipe="rloo", fit=FIT, folder=tmp_path / "runs", **SMALL) for _ in range(2))
    assert one.folder.name == "rloo-rows"
    assert two.folder.name == "rloo-rows-2"
    assert timeless(one.metrics) == timeless(two.metrics)


def test_a_peft_config_of_any_kind_is_trained_and_resumed(tmp_path: Path) -> None:
    from peft import LoraConfig

    given = files(tmp_path)
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"], use_rslora=True, task_type="CAUSAL_LM")
    run = gruppo.train(
        model=given["model"], data=given["data"], rewards=vowels, peft_config=config, fit=FIT, folder=tmp_path / "runs", **SMALL
    )
    names = [name for name, p in run.model.named_parameters() if p.requires_grad]
    assert names
    assert all("q_proj.lora_" in name for name in names)
    (run.folder / "checkpoints" / "step-000002" / "state.pt").unlink()  # as if it had been killed before
    again = gruppo.resume(run.folder, quiet=True)
    for name, weight in run.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name])


def test_a_changed_recipe_is_a_value_that_trains(tmp_path: Path) -> None:
    from gruppo.core.reduce import step_mean

    given = files(tmp_path)
    mine = replace(gruppo.recipe("grpo", n=2), reduce=step_mean)
    run = gruppo.train(
        model=given["model"], data=given["data"], rewards=vowels, recipe=mine, fit=FIT, folder=tmp_path / "r", **SMALL
    )
    assert run.session.recipe.reduce is step_mean
    assert run.folder.name == "recipe-rows"


def test_the_number_of_paths_is_said_once() -> None:
    with pytest.raises(gruppo.GruppoError, match=r"fit\.paths_per_prompt is 4, but the recipe given samples 3 paths"):
        gruppo.train(
            model="m", data="d", rewards="r:f", recipe=gruppo.recipe("grpo", n=3), fit={"paths_per_prompt": 4}, quiet=True
        )


def test_an_unknown_setting_is_refused_in_python_too() -> None:
    with pytest.raises(gruppo.GruppoError, match=r"unknown key 'fit\.step'; did you mean 'fit\.steps'"):
        gruppo.train(model="m", data="d", rewards="r:f", fit={"step": 3}, quiet=True)


def test_functions_of_the_package_are_not_hidden_by_modules_of_the_same_name() -> None:
    import importlib

    importlib.import_module("gruppo.train")
    importlib.import_module("gruppo.recipe")
    assert callable(gruppo.train)
    assert callable(gruppo.recipe)
    assert all(hasattr(gruppo, name) for name in gruppo.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        gruppo.trian  # noqa: B018
