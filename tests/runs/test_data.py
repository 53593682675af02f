from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
from tests.runs.small import rows, write_rows
from tests.tiny import tiny_policy

from gruppo.runs.data import Stream, check_lengths, digest, load_data, only, only_at, shuffled, split
from gruppo.types import GruppoError, Task


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "csv", "folder", "dataset", "list"])
def test_every_source_gives_the_same_tasks(tmp_path: Path, kind: str) -> None:
    some = [{"prompt": f"{i}+1=", "answer": str(i + 1), "level": str(i)} for i in range(5)]
    data = datasets.Dataset.from_list(some)
    file = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        write_rows(file, some)
    elif kind == "json":
        file.write_text(json.dumps(some))
    elif kind == "parquet":
        data.to_parquet(file)
    elif kind == "csv":
        file.write_text("prompt,answer,level\n" + "".join(f"{r['prompt']},{r['answer']},{r['level']}\n" for r in some))
    elif kind == "folder":
        data.save_to_disk(file)
    source = {"dataset": data, "list": some}.get(kind, file)
    assert load_data(source) == [Task(r["prompt"], r["answer"], {"level": r["level"]}) for r in some]


def test_chat_messages_lose_the_keys_that_parquet_filled_with_none(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "s", "name": "x"}, {"role": "user", "content": "2+2", "name": None}]
    datasets.Dataset.from_list([{"prompt": messages}]).to_parquet(tmp_path / "rows.parquet")
    assert load_data(tmp_path / "rows.parquet")[0].prompt[1] == {"role": "user", "content": "2+2"}


def test_a_missing_prompt_column_lists_the_columns(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"prompts": "2+2", "solution": "4"}])
    with pytest.raises(GruppoError) as error:
        load_data(file)
    assert str(error.value) == f"{file} has no column 'prompt' (row 0 has: prompts, solution); did you mean 'prompts'?"


def test_an_empty_data_set_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n")
    with pytest.raises(GruppoError, match=r"rows\.jsonl is empty: it has no rows to train on"):
        load_data(tmp_path / "rows.jsonl")
    with pytest.raises(GruppoError, match="the dataset is empty"):
        load_data(datasets.Dataset.from_list([]))


def test_a_missing_file_is_named_with_the_folder_it_was_looked_for_in() -> None:
    with pytest.raises(GruppoError, match=r"the data file nowhere\.jsonl does not exist \(looked from /"):
        load_data("nowhere.jsonl")


def test_a_broken_line_is_named_by_its_number(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    with pytest.raises(GruppoError, match=r"line 2 of .*rows\.jsonl is not JSON"):
        load_data(tmp_path / "rows.jsonl")


def test_several_splits_are_refused_with_what_to_write() -> None:
    with pytest.raises(GruppoError, match=r"with the keys train, test; pass one split, for example data\['train'\]"):
        load_data(
            datasets.DatasetDict({"train": datasets.Dataset.from_list(rows(2)), "test": datasets.Dataset.from_list(rows(2))})
        )


@pytest.mark.parametrize("prompt", ["", None, 3, [], ["text"]])
def test_a_prompt_that_is_neither_text_nor_messages_is_refused(prompt: object) -> None:
    with pytest.raises(GruppoError, match="the prompt in row 1 of the list of rows is"):
        load_data([{"prompt": "fine"}, {"prompt": prompt}])


def test_a_prompt_longer_than_the_context_is_named_with_its_numbers() -> None:
    policy = tiny_policy(max_new=12)
    tasks = [Task("short"), Task("x" * 250), Task("y" * 300)]
    with pytest.raises(GruppoError) as error:
        check_lengths(policy, tasks, 12, "rows.jsonl")
    assert str(error.value) == (
        "the prompt in row 1 of rows.jsonl has 250 tokens, and 12 new ones must fit as well, but this model has 256 positions "
        "(2 of 3 rows are too long); shorten or remove it, or lower policy.max_new_tokens"
    )
    assert check_lengths(policy, [Task("x" * 244)], 12, "rows.jsonl") == 244


def test_each_epoch_visits_every_task_once_in_an_order_of_its_own() -> None:
    tasks = load_data(rows(10))
    at = shuffled(tasks, seed=3)
    first, second = [at(i) for i in range(10)], [at(i) for i in range(10, 20)]
    assert sorted(t.prompt for t in first) == sorted(t.prompt for t in second) == sorted(t.prompt for t in tasks)
    assert first != second
    assert first != [shuffled(tasks, seed=4)(i) for i in range(10)]


def test_the_position_alone_resumes_a_stream() -> None:
    at = shuffled(load_data(rows(7)), seed=0)
    stream = Stream(at)
    drawn = [*stream.take(5), *stream.take(6)]
    again = Stream(at, position=5)
    assert list(again.take(6)) == drawn[5:]
    assert again.position == stream.position == 11


def test_asking_for_more_goes_on_in_the_same_stream() -> None:
    stream = Stream(lambda i: Task(str(i)))
    step = stream.take(2)
    assert [t.prompt for t in step.more(3)] == ["2", "3", "4"]
    assert [t.prompt for t in stream.take(1)] == ["5"]


def test_the_held_out_part_does_not_depend_on_row_order_and_keeps_copies_together() -> None:
    tasks = load_data(rows(30) + rows(30))
    train, held = split(tasks, 0.2, 100)
    assert len({t.prompt for t in held}) == 6
    assert len(held) == 12
    assert not {digest(t.prompt) for t in train} & {digest(t.prompt) for t in held}
    assert {t.prompt for t in split(tasks[::-1], 0.2, 100)[1]} == {t.prompt for t in held}


def test_two_prompts_leave_one_on_each_side() -> None:
    train, held = split(load_data(rows(2)), 0.1, 100)
    assert (len(train), len(held)) == (1, 1)


def test_a_single_prompt_is_trained_on_and_nothing_is_held_out() -> None:
    train, held = split(load_data(rows(1)), 0.5, 100)
    assert (len(train), len(held)) == (1, 0)


def test_only_keeps_the_rows_with_the_named_values() -> None:
    tasks = load_data(rows(9))
    assert {t.extra["difficulty"] for t in only(tasks, {"difficulty": [0, 2]})} == {0, 2}
    with pytest.raises(GruppoError, match=r"none of the 9 tasks has \{'difficulty': 5\}"):
        only(tasks, {"difficulty": 5})


def test_an_endless_stream_can_be_narrowed_and_stays_random_access() -> None:
    at = only_at(lambda i: Task(str(i), extra={"even": i % 2 == 0}), {"even": True}, tries=4)
    assert [at(i).prompt for i in range(3)] == ["0", "4", "8"]
    never = only_at(lambda i: Task(str(i), extra={"even": False}), {"even": True}, tries=4)
    with pytest.raises(GruppoError, match="4 tasks in a row of this world had no"):
        never(0)
