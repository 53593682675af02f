from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from tests.runs.fabricate import conversations
from tests.tiny import tiny_tokenizer

from gruppo.runs import folder as module
from gruppo.runs.disk import whole
from gruppo.runs.folder import RunFolder
from gruppo.types import Group, GruppoError, Task
from gruppo.types import Path as Row


def made(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "runs", "one", numbered=False)


def test_an_existing_run_name_is_refused_and_nothing_is_touched(tmp_path: Path) -> None:
    run = made(tmp_path)
    run.write("run.yaml", "mine")
    with pytest.raises(
        GruppoError, match=r"one exists already and nothing in it was touched.*--name one-2 is free.*gruppo resume"
    ):
        RunFolder.create(tmp_path / "runs", "one", numbered=False)
    assert (run.path / "run.yaml").read_text() == "mine"


def test_a_made_up_name_is_numbered(tmp_path: Path) -> None:
    names = [RunFolder.create(tmp_path, "grpo-x", numbered=True).path.name for _ in range(3)]
    assert names == ["grpo-x", "grpo-x-2", "grpo-x-3"]


def test_a_file_where_the_folder_should_be_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(GruppoError, match=r"runs is a file, so no folder can be made there; choose another with --folder"):
        made(tmp_path)


@pytest.mark.parametrize(
    ("number", "sentence"),
    [(errno.EACCES, "cannot be written"), (errno.EROFS, "cannot be written"), (errno.ENOSPC, "the disk is full")],
)
def test_what_the_system_refuses_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, sentence: str
) -> None:
    def refuse(self: Path, *_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(GruppoError, match=sentence):
        made(tmp_path)


def test_a_full_disk_leaves_the_old_file_and_no_piece_of_the_new_one(tmp_path: Path) -> None:
    run = made(tmp_path)
    run.write("a.txt", "old")

    def fill() -> None:
        with whole(run.path / "a.txt") as temporary:
            temporary.write_text("half of the n")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(GruppoError, match="the disk is full"):
        fill()
    assert [p.name for p in run.path.iterdir()] == ["a.txt"]
    assert (run.path / "a.txt").read_text() == "old"


def test_a_checkpoint_is_there_as_a_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made(tmp_path)
    run.save(1, lambda folder: (folder / "weights").write_text("1"), {"step": 1})

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.torch, "save", fail)
    with pytest.raises(GruppoError, match="step-000002 could not be written; free some space and resume"):
        run.save(2, lambda folder: (folder / "weights").write_text("2"), {"step": 2})
    assert run.steps() == [1]
    assert [p.name for p in run.checkpoints.iterdir()] == ["step-000001"]


def test_a_checkpoint_can_be_written_again(tmp_path: Path) -> None:
    run = made(tmp_path)
    for text in ("old", "new"):
        run.save(3, lambda folder, text=text: (folder / "weights").write_text(text), {"step": 3})
    assert (run.checkpoint(3) / "weights").read_text() == "new"
    assert [p.name for p in run.checkpoints.iterdir()] == ["step-000003"]


def test_a_checkpoint_without_its_state_does_not_count(tmp_path: Path) -> None:
    run = made(tmp_path)
    run.save(1, lambda folder: None, {"step": 1})
    run.checkpoint(2).mkdir()
    assert run.steps() == [1]


def test_the_newest_checkpoints_and_the_best_are_kept(tmp_path: Path) -> None:
    run = made(tmp_path)
    for step in range(1, 7):
        run.save(step, lambda folder: None, {"step": step})
        run.prune(2, best=2 if step >= 2 else None)
    assert run.steps() == [2, 5, 6]


def test_rewinding_forgets_what_came_after_and_what_was_left_unfinished(tmp_path: Path) -> None:
    run = made(tmp_path)
    for step in range(1, 6):
        run.append(run.metrics, {"step": step})
    with run.metrics.open("a") as file:
        file.write('{"step": 6, "rew')  # killed in the middle of a line
    for step in (2, 4):
        run.save_groups("groups", step, [group()], tiny_tokenizer())
    (run.path / "checkpoints").mkdir()
    (run.path / "checkpoints" / ".step-000009.partial").mkdir()
    run.rewind(3)
    assert [r["step"] for r in run.records(run.metrics)] == [1, 2, 3]
    assert run.metrics.read_text().endswith("\n")
    assert [p.name for p in (run.path / "groups").iterdir()] == ["step-000002.parquet"]
    assert list((run.path / "checkpoints").iterdir()) == []


def test_nan_is_written_as_null(tmp_path: Path) -> None:
    run = made(tmp_path)
    run.append(run.metrics, {"step": 1, "reward": math.nan, "signals": {"correct": math.inf}})
    assert json.loads(run.metrics.read_text()) == {"step": 1, "reward": None, "signals": {"correct": None}}


def group() -> Group:
    tokenizer = tiny_tokenizer()
    prompt = torch.tensor(tokenizer("2+2=")["input_ids"])
    paths = []
    for text in ("4", "17"):
        steps = torch.tensor([*tokenizer(text)["input_ids"], 1])
        paths.append(Row(prompt, steps, torch.full((len(steps),), -0.5), torch.ones(len(steps), dtype=torch.bool), text))
    paths[1].fork = (0, 1)
    signals = {"correct": torch.tensor([1.0, math.nan]), "answers": ["4", None], "reward": torch.tensor([1.0, math.nan])}
    reward = torch.tensor([1.0, math.nan])
    advantage = torch.tensor([[0.5, 0.5, 0.0], [-0.5, -0.5, -0.5]])
    return Group(Task("2+2=", "4", {"difficulty": 1}), paths, signals, reward, advantage)


def test_a_saved_path_has_its_text_tokens_and_every_signal(tmp_path: Path) -> None:
    run = made(tmp_path)
    file = run.save_groups("groups", 10, [group()], tiny_tokenizer())
    assert file.name == "step-000010.parquet"
    first, second = pyarrow.parquet.read_table(file).to_pylist()
    assert {k: first[k] for k in ("step", "group", "row", "prompt", "answer", "task", "output", "fork", "reward")} == {
        "step": 10,
        "group": 0,
        "row": 0,
        "prompt": "2+2=",
        "answer": "4",
        "task": '{"difficulty": 1}',
        "output": "4",
        "fork": None,
        "reward": 1.0,
    }
    assert first["token_text"] == ["4", "<eos>"]
    assert first["advantage"] == [0.5, 0.5]
    assert (second["fork"], second["tokens"][-1], second["mask"]) == ("0:1", 1, [True] * 3)
    assert json.loads(second["signals"]) == {"correct": None, "answers": None, "reward": None}


def test_rewards_with_columns_are_lists(tmp_path: Path) -> None:
    two = group().with_(reward=torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    file = made(tmp_path).save_groups("groups", 1, [two], tiny_tokenizer())
    assert [r["reward"] for r in pyarrow.parquet.read_table(file).to_pylist()] == [[1.0, 2.0], [3.0, 4.0]]


def test_a_folder_that_is_no_run_names_the_runs_beside_it(tmp_path: Path) -> None:
    made(tmp_path).write("run.yaml", "")
    with pytest.raises(GruppoError, match=r"two is not a run folder \(it has no run\.yaml\); runs there: one"):
        RunFolder.open(tmp_path / "runs" / "two")


def test_a_conversation_is_stored_with_its_turns_once_and_a_path_with_its_stratum(tmp_path: Path) -> None:
    file = made(tmp_path).save_groups("groups", 1, [conversations()], tiny_tokenizer(), lambda g: [1.0, "b", 2, 1.0])
    rows = pyarrow.parquet.read_table(file).to_pylist()
    assert [r["stratum"] for r in rows] == ["1", "b", "2", "1"]
    assert [m["role"] for m in json.loads(rows[1]["messages"])] == ["assistant", "tool", "assistant"]
    assert all("messages" not in json.loads(r["signals"]) for r in rows)
    plain = made(tmp_path / "plain").save_groups("groups", 1, [group()], tiny_tokenizer())
    assert [(r["messages"], r["stratum"]) for r in pyarrow.parquet.read_table(plain).to_pylist()] == [(None, None)] * 2
