from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from tests.runs.small import Quiet, config, files, rows, session, silent, write_rows
from tests.tiny import FAMILIES, tiny_folder, tiny_model, tiny_tokenizer

from gruppo.policies import products
from gruppo.policies.load import load_model, load_tokenizer
from gruppo.policies.reference import snapshot
from gruppo.recipe import Column, Signal
from gruppo.recipes import recipe
from gruppo.runs import session as sessions
from gruppo.runs.config import merge, validate
from gruppo.runs.evaluate import evaluate, headline
from gruppo.runs.given import Given
from gruppo.runs.session import Session
from gruppo.runs.stages import rate_of
from gruppo.types import GruppoError


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([[20, 21, 22, 23, 24, 9]])).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_full_run_leaves_a_plain_folder_with_the_trained_logits(tmp_path: Path, family: str) -> None:
    from transformers import AutoModelForCausalLM

    run = session(tmp_path, family, fit={"steps": 2})
    run.run(Quiet())
    folder = run.folder.checkpoint(2)
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(again), logits(run.policy.model))
    assert not torch.equal(logits(again), logits(tiny_model(family)))
    assert load_tokenizer(folder)("2+2=")["input_ids"] == tiny_tokenizer()("2+2=")["input_ids"]
    assert (folder / "generation_config.json").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_run_leaves_an_adapter_that_peft_loads_and_its_merged_model(tmp_path: Path, family: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = session(tmp_path, family, fit={"steps": 2, "learning_rate": 1e-2}, policy={"lora": {"rank": 2, "merge": True}})
    trained = sum(p.numel() for p in run.policy.parameters())
    assert 0 < trained < 0.2 * sum(p.numel() for p in run.policy.model.parameters())
    run.run(Quiet())
    folder = run.folder.checkpoint(2)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert not torch.allclose(logits(base), logits(run.policy.model), atol=1e-4)
    assert torch.equal(logits(PeftModel.from_pretrained(base, folder)), logits(run.policy.model))
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(folder / "merged")), logits(run.policy.model))
    torch.testing.assert_close(logits(load_model(folder)), logits(run.policy.model))


def test_the_adapter_starts_as_the_seed_says_and_the_global_generator_is_left_alone(tmp_path: Path) -> None:
    changes = {"policy": {"lora": {"rank": 2}}}
    before = torch.get_rng_state()
    one, two = (session(tmp_path, **changes).policy.model.state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_only_the_named_weights_train_and_the_checkpoint_holds_all(tmp_path: Path) -> None:
    named = ["model.layers.1.", "model.norm"]
    run = session(tmp_path, fit={"steps": 2, "learning_rate": 1e-2}, policy={"trained": named})
    before = {name: w.clone() for name, w in run.policy.model.state_dict().items()}
    run.run(Quiet())
    saved = load_model(run.folder.checkpoint(2)).state_dict()
    moved = {name for name, w in before.items() if not torch.equal(w, saved[name])}
    assert moved == {name for name in before if name.startswith(tuple(named))}


def test_weights_that_the_model_does_not_have_cannot_be_named(tmp_path: Path) -> None:
    with pytest.raises(
        GruppoError, match=r"policy.trained \['transformer'\]: no weight's name begins so; .* begin with model.embed"
    ):
        session(tmp_path, policy={"trained": ["model.norm", "transformer"]})
    with pytest.raises(GruppoError, match=r"policy.trained \[\]: no weight"):
        session(tmp_path, policy={"trained": []})
    with pytest.raises(GruppoError, match="beside an adapter no weight of the model trains"):
        session(tmp_path, policy={"trained": ["model.norm"], "lora": {"rank": 2}})


@pytest.mark.parametrize("setting", [{"autocast": True}, {"gradient_checkpointing": True}, {"dtype": "bfloat16"}])
def test_the_policy_settings_train(tmp_path: Path, setting: dict[str, Any]) -> None:
    run = session(tmp_path, policy=setting, fit={"steps": 1})
    run.run(Quiet())
    assert not torch.equal(logits(run.policy.model).float(), logits(tiny_model()))


def test_a_run_writes_the_files_it_promises(tmp_path: Path) -> None:
    run = session(tmp_path, name="mine")
    before, after = run.run(Quiet())
    found = {str(p.relative_to(run.folder.path)) for p in run.folder.path.rglob("*") if p.is_file()}
    wanted = {"run.yaml", "metrics.jsonl", "evals.jsonl", "checkpoints/best.json", "checkpoints/step-000004/state.pt"}
    wanted |= {f"groups/step-{n:06d}.parquet" for n in (1, 2, 4)} | {f"evals/step-{n:06d}.parquet" for n in (0, 4)}
    assert wanted <= found
    assert not [name for name in found if ".partial" in name]
    assert before is not None
    assert after is not None
    assert before.keys() == after.keys()
    record = run.folder.records(run.folder.metrics)[-1]
    named = (
        "step time seconds lr reward reward_std live zero_variance length truncated abstained signals signals_std length_correct "
        "length_wrong tokens tokens_per_s updates loss ratio clip_low clip_high entropy kl grad_norm"
    )
    assert set(named.split()) <= set(record)
    assert len(pyarrow.parquet.read_table(run.folder.path / "groups" / "step-000002.parquet")) == 12


def test_the_best_checkpoint_by_held_out_score_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.1, 0.7, 0.5, 0.6, 0.2])
    monkeypatch.setattr("gruppo.runs.session.headline", lambda found: ("mean@2", next(scores)))
    run = session(tmp_path, eval={"every": 1}, track={"keep_last": 1, "save_every": 1})
    run.run(Quiet())
    assert run.folder.steps() == [1, 4]
    assert json.loads((run.folder.checkpoints / "best.json").read_text()) == {"step": 1, "metric": "mean@2", "score": 0.7}


def broken(tmp_path: Path, **changes: Any) -> str:
    with pytest.raises(GruppoError) as error:
        session(tmp_path, **changes)
    runs = tmp_path / "runs"
    assert not runs.exists() or not list(runs.iterdir()), "a refused run left something behind"
    return str(error.value)


def test_data_without_a_prompt_column_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "bad.jsonl", [{"question": "2+2"}])
    assert "has no column 'prompt' (row 0 has: question)" in broken(tmp_path, data=str(file))


def test_a_long_prompt_is_refused_before_step_0(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "long.jsonl", [*rows(20), {"prompt": "1" * 300}])
    said = broken(tmp_path, data=str(file))
    assert "the prompt in row 20 of" in said
    assert "has 300 tokens" in said
    assert "this model has 256 positions" in said


def test_a_tokenizer_without_eos_is_refused(tmp_path: Path) -> None:
    tiny_folder(tmp_path / "endless", eos=False)
    assert "names an end-of-sequence token, so a completion could never end" in broken(tmp_path, model=str(tmp_path / "endless"))


def test_a_model_that_is_nowhere_is_refused(tmp_path: Path) -> None:
    assert "the model folder /nowhere/model does not exist" in broken(tmp_path, model="/nowhere/model")


def test_a_hub_id_that_cannot_be_loaded_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def offline(*_: object, **__: object) -> None:
        raise OSError("We couldn't connect to the hub\nand more lines")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", offline)
    said = broken(tmp_path, model="someone/some-model")
    assert said == (
        "cannot load 'someone/some-model' from the hub, and there is no folder of that name here: We couldn't connect to the hub"
    )


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "is not a transformers model folder: it holds no config.json" in broken(tmp_path, model=str(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("return [1.0]", "returned 1 rewards for 2 completions"),
        ("return [float('nan')] * len(completions)", None),
        ("raise KeyError('solution')", "KeyError: 'solution'"),
        ("return None", "NoneType"),
        ("return ['good'] * len(completions)", "good"),
    ],
)
def test_a_broken_reward_is_refused_before_step_0(tmp_path: Path, body: str, sentence: str | None) -> None:
    (tmp_path / "mine.py").write_text(f"def mine(completions, **columns):\n    {body}\n")
    changes = {"rewards": [f"{tmp_path / 'mine.py'}:mine"]}
    if sentence is not None:
        assert sentence in broken(tmp_path, **changes)
        return
    with pytest.raises(GruppoError, match=r"step 1: .*every reward abstained"):
        session(tmp_path, **changes).run(Quiet())


def test_a_signal_that_the_recipe_needs_and_nobody_gives_is_refused(tmp_path: Path) -> None:
    needy = replace(recipe("grpo", n=4), needs=(Signal("process", "gates the outcome"),))
    with pytest.raises(
        GruppoError, match=r"reads the signal 'process' \(gates the outcome\), but .* give only: vowels, reward\."
    ):
        Session.new(config(tmp_path), Given(recipe=needy), silent)


def test_a_column_that_the_recipe_needs_and_the_data_lack_is_refused(tmp_path: Path) -> None:
    needy = replace(recipe("grpo", n=4), needs=(Column("hints"),))
    with pytest.raises(
        GruppoError, match=r"reads the column 'hints', but 36 of 36 tasks lack it, .* its columns are: prompt, difficulty, answer"
    ):
        Session.new(config(tmp_path), Given(recipe=needy), silent)


def test_a_sampler_that_disagrees_with_the_trainer_is_refused_before_step_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gruppo.policies.token import TokenPolicy

    right: Callable[..., Any] = TokenPolicy._choose
    monkeypatch.setattr(TokenPolicy, "_choose", lambda self, x, t, g: right(self, x, 1.0 if t else t, g))  # drops temperature
    with pytest.raises(GruppoError, match=r"log-probabilities of the same steps differ by .* before step 0"):
        session(tmp_path, policy={"temperature": 0.7})


def poison(run: Session) -> None:
    with torch.no_grad():
        run.policy.model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")


def test_nan_weights_stop_the_run_and_save_what_the_step_was_working_on(tmp_path: Path) -> None:
    run = session(tmp_path, name="mine", track={"save_every": 1})
    with pytest.raises(GruppoError) as error:
        run.run(Quiet(lambda step: poison(run) if step == 2 else None))
    said = str(error.value)
    assert said.startswith("step 3: the model's log-probability is not finite at step 0 of sampling")
    assert "1 weights of the model are not finite, the first in model.layers.1.mlp.up_proj.weight" in said
    assert "the last good checkpoint is" in said
    prompts = json.loads((run.folder.path / "broken" / "step-000003.json").read_text())
    assert len(prompts) == 3
    assert {"prompt", "answer", "difficulty"} <= set(prompts[0])


def test_a_gradient_that_is_not_finite_saves_the_groups(tmp_path: Path) -> None:
    run = session(tmp_path, name="mine")
    head = run.policy.model.model.norm.weight
    head.register_hook(lambda grad: grad * float("nan"))
    before = head.detach().clone()
    with pytest.raises(GruppoError, match=r"step 1: .*no optimizer step was taken.*saved in .*broken/step-000001\.parquet"):
        run.run(Quiet())
    assert torch.equal(head, before)
    assert len(pyarrow.parquet.read_table(run.folder.path / "broken" / "step-000001.parquet")) == 12


def test_a_full_disk_at_a_checkpoint_names_the_last_good_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    run = session(tmp_path, track={"save_every": 1})
    right = torch.save

    def fill(state: dict[str, Any], file: Path) -> None:
        if state["step"] == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        right(state, file)

    monkeypatch.setattr("gruppo.runs.folder.torch.save", fill)
    with pytest.raises(GruppoError, match=r"the disk is full: .*step-000003 could not.*last complete checkpoint is of step 2"):
        run.run(Quiet())
    assert run.folder.steps()[-1] == 2


def test_the_models_own_sampling_settings_are_ignored_aloud(tmp_path: Path) -> None:
    model = tiny_model()
    model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.8, top_k=20)
    files(tmp_path)
    model.save_pretrained(tmp_path / "model")
    said = session(tmp_path).facts()["note"]
    assert said.startswith("the model's generation_config asks for temperature 0.6, top_p 0.8, top_k 20; it is ignored")
    assert "note" not in session(tmp_path, model=str(tiny_folder(tmp_path / "plain"))).facts()


def test_warm_up_rises_to_the_rate_and_the_cosine_ends_at_its_fraction() -> None:
    mine = {"model": "m", "data": "d", "rewards": ["r:f"]}
    rate = rate_of(validate({**mine, "fit": {"steps": 10, "learning_rate": 1.0, "warmup_steps": 4}}), 0)
    assert [rate(k) for k in (1, 2, 4, 5, 10)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    down = rate_of(validate({**mine, "fit": {"steps": 10, "learning_rate": 1.0, "warmup_steps": 2, "decay_to": 0.2}}), 5)
    assert down(7) == 1.0
    assert down(11) == pytest.approx(0.6)
    assert down(15) == pytest.approx(0.2)


def test_the_rate_reaches_the_optimizer_and_the_record(tmp_path: Path) -> None:
    shown = Quiet()
    run = session(tmp_path, fit={"warmup_steps": 4, "learning_rate": 4e-4})
    run.run(shown)
    assert [r["lr"] for r in shown.records] == pytest.approx([1e-4, 2e-4, 3e-4, 4e-4])
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(4e-4)


def test_epochs_and_updates_multiply(tmp_path: Path) -> None:
    shown = Quiet()
    session(tmp_path, fit={"steps": 1, "epochs": 2, "updates_per_epoch": 3}).run(shown)
    assert shown.records[0]["updates"] == 6


def test_the_evaluation_leaves_the_training_alone(tmp_path: Path) -> None:
    one, two = (session(tmp_path, eval={"every": every}) for every in (0, 1))
    one.run(Quiet())
    two.run(Quiet())
    assert torch.equal(logits(one.policy.model), logits(two.policy.model))


def test_evaluations_use_the_moving_average_and_training_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After n steps of the optimizer the average stands where its formula says, evaluated and saved beside the weights."""
    seen: list[list[torch.Tensor]] = []

    def watched(policy: Any, *given: Any, **numbers: Any) -> Any:
        seen.append(snapshot(policy))
        return evaluate(policy, *given, **numbers)

    monkeypatch.setattr(sessions, "evaluate", watched)
    changes: dict[str, Any] = {"fit": {"epochs": 2}, "track": {"save_every": 1, "keep_last": 9}}
    plain = session(tmp_path, name="plain", **changes)
    plain.run(Quiet())
    before = seen[:]
    seen.clear()
    made = session(tmp_path, name="averaged", **merge(changes, {"fit": {"ema": {"most": 0.5, "slow": 4, "every": 2}}}))
    made.run(Quiet())
    for a, b in zip(plain.policy.parameters(), made.policy.parameters()):
        assert torch.equal(a, b)  # what is trained and sampled from is untouched
    trained = [[t.clone() for t in before[0]]]
    for step in range(1, 5):
        made.policy.restore(made.folder.checkpoint(step))
        trained.append(snapshot(made.policy))
    expected = trained[0]
    for n, weights in zip((1, 3, 5, 7), trained[1:]):  # two optimizer steps an iteration; n were taken before the second
        d = min((1 + n) / (4 + n), 0.5)
        expected = [d * e + (1 - d) * w for e, w in zip(expected, weights)]
    assert len(seen) == len(before) == 2
    for first, last, start, wanted, end in zip(seen[0], seen[1], trained[0], expected, trained[-1]):
        assert torch.equal(first, start)
        torch.testing.assert_close(last, wanted, atol=1e-6, rtol=0)
        assert float((wanted - end).abs().max()) > 1e-5
    made.policy.restore(made.folder.checkpoint(4) / "average")
    for saved, wanted in zip(made.policy.parameters(), seen[1]):
        assert torch.equal(saved, wanted)


def test_an_optimizer_step_that_is_left_out_does_not_move_the_average(tmp_path: Path) -> None:
    made = session(tmp_path, fit={"ema": {}, "skip_grad_norm": 1e-9})
    made.run(Quiet())
    assert made.average is not None
    assert made.average.seen == 0


def test_a_moving_average_of_one_stage_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GruppoError, match=r"stage 2 sets fit\.ema, but the moving average goes on over all stages"):
        config(tmp_path, stages=[{}, {"fit": {"ema": {}}}])


def test_checkpoints_are_compared_by_sampled_accuracy_first() -> None:
    from gruppo.runs.evaluate import Evaluation, Score

    score = {name: Score(value, 0.0, 1.0, 4) for name, value in (("greedy", 0.5), ("reward", 0.9), ("mean@4", 0.3))}
    assert headline(Evaluation(score)) == ("mean@4", 0.3)
    assert headline(Evaluation({"reward": score["reward"]})) == ("reward", 0.9)


def test_held_out_rows_are_never_trained_on(tmp_path: Path) -> None:
    run = session(tmp_path, fit={"steps": 4, "prompts_per_step": 20}, eval={"tasks": 100, "share": 0.2})
    held = {t.prompt for t in run.held_out}
    assert len(held) == 8
    assert not held & {t.prompt for t in run.stream.take(64)}


def test_what_abstains_in_an_evaluation_is_not_counted_as_training(tmp_path: Path) -> None:
    (tmp_path / "shy.py").write_text(
        "def shy(completions, **_): return [None if t[:1] in 'I%/2KL' else 1.0 for t in completions]"
    )
    run = session(tmp_path, rewards=[f"{tmp_path / 'shy.py'}:shy"], eval={"every": 1})
    run.run(Quiet())
    counted = sum(r["abstained"] for r in run.folder.records(run.folder.metrics))
    assert counted > 0
    assert run.stages[0].grade.abstained["shy"] == counted


def test_tokens_count_what_was_sampled_and_failed_grades_are_recorded(tmp_path: Path) -> None:
    """Dynamic sampling throws groups away; their tokens were sampled all the same."""
    (tmp_path / "moody.py").write_text(
        "class Moody:\n"
        "    signals = ('correct', 'odd')\n"
        "    calls = 0\n"
        "    def __call__(self, groups):\n"
        "        Moody.calls += 1\n"
        "        if Moody.calls == 2:\n"
        "            same = [1.0]\n"
        "        else:\n"
        "            same = [0.0]\n"
        "        odd = [Abstained('late')]\n"
        "        return [{'correct': [1.0] + same * (len(g) - 1), 'odd': odd + [0.0] * (len(g) - 1)} for g in groups]\n"
        "from gruppo.graders.grade import Abstained\n"
    )
    run = session(
        tmp_path, recipe="dapo", rewards=[f"{tmp_path / 'moody.py'}:Moody"], weights={"correct": 1.0}, recipe_args={"refills": 1},
        fit={"steps": 1, "prompts_per_step": 2, "paths_per_prompt": 4}, eval={"tasks": 0},
    )  # fmt: skip
    display = Quiet()
    run.run(display)
    [record] = display.records
    kept = 2 * 4 * record["length"]
    assert record["tokens"] > 1.5 * kept
    assert record["tokens_per_s"] == pytest.approx(record["tokens"] / record["seconds"])
    assert record["failures"] == {"odd: late": 4}


def test_the_settings_of_the_sampler_s_room_arrive_and_compiling_text_is_refused(tmp_path: Path) -> None:
    run = session(tmp_path, policy={"sample_rows": 3, "sample_tokens": 77})
    assert (run.policy.sample_rows, run.policy.sample_tokens) == (3, 77)
    for graphs in (None, True, False):
        assert session(tmp_path / str(graphs), policy={"graphs": graphs}).policy.graphs is graphs
    with pytest.raises(GruppoError, match=r"policy\.compile is for image models"):
        session(tmp_path, policy={"compile": True})


@pytest.mark.skipif(not products.usable(), reason="this build of torch has no oneDNN")
def test_the_choice_of_products_arrives(tmp_path: Path) -> None:
    with_it, without = (session(tmp_path / str(on), policy={"onednn": on, "device": "cpu"}).policy for on in (True, False))
    assert with_it.linears is not None
    assert with_it.cost.onednn
    assert with_it.head.onednn
    assert without.linears is None
    assert not without.cost.onednn
    assert not without.head.onednn
