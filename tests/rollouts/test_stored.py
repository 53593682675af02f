"""Training on stored groups: the round trip, what is refused, whose reward counts, exact resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path as File
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from tests.runs.fabricate import conversations
from tests.runs.small import Quiet, config, files, session, silent
from tests.runs.test_resume import Killed, assert_same, kill_at
from tests.tiny import tiny_policy, tiny_tokenizer

from gruppo.recipe import Signal
from gruppo.recipes import recipe
from gruppo.rollouts import Dynamic, Parallel, Stored, WithReference
from gruppo.rollouts.conversation import talked
from gruppo.rollouts.stored import offline, read_groups
from gruppo.runs.config import assemble, merge, validate
from gruppo.runs.folder import RunFolder
from gruppo.runs.given import Given
from gruppo.runs.session import Session
from gruppo.types import Group, GruppoError, Path, Task


def groups() -> list[Group]:
    """Two groups with everything that a path can have."""
    tokenizer = tiny_tokenizer()
    made = []
    for n, question in enumerate(("2+2=", "3+4=")):
        prompt = torch.tensor(tokenizer(question)["input_ids"])
        paths = []
        for i, text in enumerate(("4", "17", "9")):
            steps = torch.tensor([*tokenizer(text)["input_ids"], 1])
            T = len(steps)
            paths.append(
                Path(prompt, steps, -torch.rand(T, generator=torch.Generator().manual_seed(i)), torch.ones(T).bool(), text)
            )
        paths[1].fork, paths[1].unit, paths[1].mask[0] = (0, 1), torch.tensor([0, 0, -1]), False
        paths[2].truncated, paths[2].version, paths[2].logp_train = True, 7, paths[2].logp + 0.25
        paths[2].off_policy = True
        correct = torch.tensor([1.0, float("nan"), 0.0])
        signals = {"correct": correct, "answers": ["4", None, "9"], "empty": [None] * 3, "reward": correct + 0.125}
        made.append(Group(Task([{"role": "user", "content": question}], n, {"difficulty": n}), paths, signals))
    return made


@pytest.fixture
def stored(tmp_path: File) -> File:
    return RunFolder(tmp_path).save_groups("groups", 3, groups(), tiny_tokenizer())


def changed(file: File, change: Callable[[list[dict[str, Any]]], Any], drop: tuple[str, ...] = ()) -> File:
    """The file with its rows edited, beside it."""
    table = pyarrow.parquet.read_table(file)
    rows = table.to_pylist()
    change(rows)
    out = file.with_name("changed.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=table.schema).drop_columns(list(drop)), out)
    return out


def test_what_was_stored_is_what_is_read(stored: File) -> None:
    policy = tiny_policy()
    back = read_groups([stored], policy)
    assert len(back) == 2
    for n, (a, b) in enumerate(zip(groups(), back)):
        assert (b.task.prompt, b.task.answer, dict(b.task.extra)) == (a.task.prompt, a.task.answer, dict(a.task.extra))
        assert b.task.at == n  # type: ignore[attr-defined]
        for p, q in zip(a.paths, b.paths, strict=True):
            for name in ("prompt", "steps", "logp", "mask", "unit", "logp_train"):
                one, two = getattr(p, name), getattr(q, name)
                assert (one is None and two is None) or torch.equal(one, two), name
            for name in ("output", "fork", "off_policy", "truncated", "version"):
                assert getattr(p, name) == getattr(q, name), name
        assert torch.equal(b.signals["correct"].nan_to_num(-1), a.signals["correct"].nan_to_num(-1))
        assert b.signals["answers"] == ["4", None, "9"]
        assert "empty" not in b.signals


def test_a_stored_conversation_keeps_its_turns_and_can_be_graded_again(tmp_path: File) -> None:
    file = RunFolder(tmp_path).save_groups("groups", 1, [conversations()], tiny_tokenizer())
    (back,), made = read_groups([file], tiny_policy()), conversations()
    assert [p.output.messages for p in back.paths] == [p.output.messages for p in made.paths]
    assert [p.output.said for p in back.paths] == [p.output.said for p in made.paths]
    assert talked([back])[0]["calls"] == [2.0, 1.0, 0.0, 1.0] == back.signals["calls"].tolist()
    assert [torch.equal(p.mask, q.mask) for p, q in zip(back.paths, made.paths)] == [True] * 4


def test_the_rollout_gives_the_groups_of_the_tasks_in_their_order(stored: File) -> None:
    buffer = read_groups([stored], tiny_policy())
    rollout = Stored("here", buffer)
    out = rollout(None, [buffer[1].task, buffer[0].task, buffer[1].task], list, torch.Generator())
    assert [g is buffer[i] for g, i in zip(out, (1, 0, 1))] == [True] * 3


def test_weights_make_the_reward_anew_and_silence_stays_silence(stored: File) -> None:
    buffer = read_groups([stored], tiny_policy())
    [as_stored] = Stored("here", buffer)(None, [buffer[0].task], list, torch.Generator())
    assert as_stored.signals["reward"].nan_to_num(-1).tolist() == [1.125, -1.0, 0.125]
    [weighed] = Stored("here", buffer, {"correct": 2.0})(None, [buffer[0].task], list, torch.Generator())
    assert weighed.signals["reward"].nan_to_num(-1).tolist() == [2.0, -1.0, 0.0]


def test_a_missing_signal_is_a_sentence(stored: File) -> None:
    buffer = read_groups([stored], tiny_policy())
    with pytest.raises(
        GruppoError, match="needs the signal 'format', but a group stored in here has only: correct, answers, rew"
    ):
        Stored("here", buffer, {"format": 1.0}).check()
    Stored("here", buffer, {"format": 1.0}, regrade=True).check()


def test_stored_groups_replace_what_samples_and_nothing_else(stored: File) -> None:
    rollout = Stored("here", ())
    assert offline(recipe("grpo", n=4), rollout).rollout == rollout
    assert offline(recipe("rloo", n=4), rollout).rollout == WithReference(rollout)
    assert offline(recipe("dapo", n=4), rollout).rollout == Dynamic(rollout, "correct", 10)
    assert recipe("grpo", n=4).rollout == Parallel(4)


def broken(column: str, value: Any) -> Callable[[list[dict[str, Any]]], None]:
    return lambda rows: rows[4].update({column: value})


@pytest.mark.parametrize(
    ("change", "drop", "sentence"),
    [
        (
            broken("tokens", None),
            (),
            r"row 4 of .* \(group 1, path 1\) has no tokens: without its completion it cannot be trained",
        ),
        (broken("logp", None), (), "row 4 .* has no logp: without its behaviour log-probabilities"),
        (broken("prompt_tokens", []), (), "row 4 .* has no prompt_tokens: without its prompt"),
        (broken("logp", [-1.0]), (), "row 4 .* has 3 tokens, 1 log-probabilities and 3 mask entries; all three must be as many"),
        (
            broken("logp", [-1.0, None, float("nan")]),
            (),
            "row 4 .* has no finite log-probability for 2 of 2 trained tokens, .*greedy",
        ),
        (broken("tokens", [4, 5, 9999]), (), "holds the token 9999, but this model has .* tokens: .* another vocabulary"),
        (broken("token_text", ["z", "7", "<eos>"]), (), "the token .* is 'z' in .*, but '1' for this tokenizer"),
        (broken("prompt", "9+9="), (), r"a prompt in .* reads '9\+9=', but its tokens are '3\+4=' for this tokenizer"),
        (list, ("prompt_tokens",), "has no column 'prompt_tokens', which training on stored groups needs; it has: step, group"),
        (list.clear, (), "is empty: it holds no path"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(stored: File, change: Any, drop: tuple[str, ...], sentence: str) -> None:
    file = changed(stored, change, drop)
    with pytest.raises(GruppoError, match=sentence):
        read_groups([file], tiny_policy())


def test_an_untrained_step_needs_no_log_prob(stored: File) -> None:
    file = changed(stored, broken("logp", [None, -1.0, -1.0]))
    assert read_groups([file], tiny_policy())[1].paths[1].logp.isnan().tolist() == [True, False, False]


def test_a_path_longer_than_the_context_is_refused(stored: File) -> None:
    policy = tiny_policy()
    policy.context = 6
    with pytest.raises(GruppoError, match=r"row 1 of .* has 4 \+ 3 tokens, but this model has 6 positions"):
        read_groups([stored], policy)


def test_sources(stored: File, tmp_path: File) -> None:
    policy = tiny_policy()
    assert len(read_groups([stored, stored.parent], policy)) == 4
    with pytest.raises(GruppoError, match="do not exist"):
        read_groups([tmp_path / "nothing"], policy)
    with pytest.raises(GruppoError, match=r"holds no stored groups .* track\.groups_every=1"):
        read_groups([tmp_path], policy)
    (tmp_path / "run.yaml").write_text("")
    assert len(read_groups([tmp_path], policy)) == 2
    (tmp_path / "text.parquet").write_text("no parquet at all")
    with pytest.raises(GruppoError, match="is not a parquet file"):
        read_groups([tmp_path / "text.parquet"], policy)


# ---- runs


@pytest.fixture
def behaviour(tmp_path: File) -> File:
    """A run whose groups are all stored."""
    run = session(
        tmp_path, name="behaviour", fit={"steps": 4, "learning_rate": 1e-2}, track={"groups_every": 1}, eval={"tasks": 0}
    )
    run.run(Quiet())
    return run.folder.path


def trained(tmp_path: File, behaviour: File, given: Given | None = None, **changes: Any) -> Session:
    own = {k: v for k, v in files(tmp_path).items() if k not in ("data", "rewards")}
    own = merge(own, {"offline": [str(behaviour)], "recipe": "rec-oneside", "eval": {"tasks": 0}})
    return Session.new(assemble(merge(own, changes)), given, silent)


def test_a_run_on_stored_groups_never_samples_and_its_ratios_are_real(tmp_path: File, behaviour: File) -> None:
    run = trained(tmp_path, behaviour, fit={"steps": 4, "learning_rate": 1e-2})
    run.policy.sample = None  # type: ignore[method-assign, assignment]
    run.run(Quiet())
    records = run.folder.records(run.folder.metrics)
    assert len(records) == 4
    assert all(abs(r["ratio"] - 1) > 1e-4 for r in records)
    assert run.facts()["stored groups"] == "12 rows"
    first = read_groups([run.folder.path], run.policy)
    every = {tuple(p.steps.tolist()): p.logp for g in run.tasks.stored for p in g.paths}
    for p in (p for g in first for p in g.paths):
        assert torch.equal(every[tuple(p.steps.tolist())], p.logp)  # of the policy that sampled, not of the one that trains


def test_every_group_is_visited_once_per_pass(tmp_path: File, behaviour: File) -> None:
    run = trained(tmp_path, behaviour)
    at = [t.at for t in run.stream.take(24)]  # type: ignore[attr-defined]
    assert sorted(at[:12]) == sorted(at[12:]) == list(range(12))
    assert at[:12] != at[12:]


def test_a_stored_run_resumes_bit_for_bit(tmp_path: File, behaviour: File) -> None:
    changes = {"recipe": "red-drop", "fit": {"steps": 10, "prompts_per_step": 5}, "track": {"save_every": 5}}
    whole = trained(tmp_path, behaviour, name="whole", **changes)
    whole.run(Quiet())
    with pytest.raises(Killed):
        trained(tmp_path, behaviour, name="broken", **changes).run(kill_at(8))
    resumed = Session.resume(tmp_path / "runs" / "broken", say=silent)
    assert resumed.step == 5
    resumed.run(Quiet())
    assert_same(whole, resumed)


def test_a_reward_given_grades_again(tmp_path: File, behaviour: File) -> None:
    (tmp_path / "short.py").write_text("def short(prompts, completions, **_): return [-float(len(t)) for t in completions]")
    as_stored = trained(tmp_path, behaviour, name="as-stored")
    again = trained(tmp_path, behaviour, name="again", rewards=[f"{tmp_path / 'short.py'}:short"])
    for run, names in ((as_stored, {"vowels"}), (again, {"vowels", "short"})):
        run.run(Quiet())
        assert set(run.folder.records(run.folder.metrics)[0]["signals"]) == names
    paths = [(p, r) for g in read_groups([again.folder.path], again.policy) for p, r in zip(g.paths, g.signals["reward"])]
    assert all(float(r) == -len(str(p.output)) for p, r in paths)


def test_needs_are_checked_in_every_stored_group(tmp_path: File, behaviour: File) -> None:
    from dataclasses import replace

    needy = replace(recipe("rec-oneside", n=4), needs=(Signal("correct", "a filter"),))
    with pytest.raises(GruppoError, match=r"reads the signal 'correct' \(a filter\)"):
        trained(tmp_path, behaviour, Given(recipe=needy))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"data": "rows.jsonl"}, r"so data rows\.jsonl would not be used"),
        ({"fit": {"sync_every": 4}}, r"nothing is sampled while training on stored groups; remove fit\.sync_every"),
        ({"eval": {"data": "rows.jsonl"}}, r"completions of eval\.data rows\.jsonl need a grade"),
        ({"weights": [1.0]}, "the weights are a list, but stored signals have names"),
    ],
)
def test_settings_that_contradict_stored_groups(tmp_path: File, changes: dict[str, Any], sentence: str) -> None:
    own = {k: v for k, v in files(tmp_path).items() if k not in ("data", "rewards")}
    with pytest.raises(GruppoError, match=sentence):
        assemble(merge(merge(own, {"offline": ["somewhere"]}), changes), {"folder": str(tmp_path)})


def test_the_model_must_be_named() -> None:
    with pytest.raises(GruppoError, match="needs the model that is trained: give --model PATH, or --world NAME"):
        validate({"offline": ["somewhere"]})


def test_held_out_problems_are_graded_where_a_reward_is_named(tmp_path: File, behaviour: File) -> None:
    given = files(tmp_path)
    run = trained(tmp_path, behaviour, rewards=given["rewards"], eval={"data": given["data"], "tasks": 2})
    before, after = run.run(Quiet())
    assert before is not None
    assert after is not None


def test_config_prints_what_it_trains_on(tmp_path: File) -> None:
    from gruppo.runs.config import derived, dump, parse

    own = {k: v for k, v in files(tmp_path).items() if k not in ("data", "rewards")}
    made = assemble(merge(own, {"offline": ["somewhere"]}))
    assert "3 stored groups" in derived(made)["run"]
    assert "nothing is sampled" in derived(made)["run"]
    assert parse(dump(made))["offline"] == ["somewhere"]
    assert config(tmp_path).offline == []
