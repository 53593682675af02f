"""Data: rows into tasks, a fixed held-out part, and an endless stream of tasks whose whole state is one integer."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from gruppo.types import GruppoError, Task

READERS = "JSONL, JSON (a list of objects), Parquet, CSV, or a folder written by datasets.save_to_disk"


class Stream:
    """An endless sequence of tasks; `position` is all there is to save."""

    def __init__(self, at: Callable[[int], Task], position: int = 0) -> None:
        self.at, self.position = at, position

    def take(self, n: int) -> Draw:
        """The next n tasks."""
        tasks = [self.at(self.position + i) for i in range(n)]
        self.position += n
        return Draw(tasks, self)


class Draw(Sequence[Task]):
    """One step's tasks; `more(n)` goes on in the same stream, for rollouts that sample again."""

    def __init__(self, tasks: list[Task], stream: Stream) -> None:
        self.tasks, self.stream = tasks, stream

    def __len__(self) -> int:
        return len(self.tasks)

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)

    def __getitem__(self, index: Any) -> Any:
        return self.tasks[index]

    def more(self, n: int) -> Draw:
        """n further tasks."""
        return self.stream.take(n)


def shuffled(tasks: Sequence[Task], seed: int) -> Callable[[int], Task]:
    """Task i of an endless stream that visits every task once per epoch, in an order of its own each epoch."""
    tasks = list(tasks)

    @lru_cache(maxsize=2)
    def order(epoch: int) -> list[int]:
        out = list(range(len(tasks)))
        random.Random(f"{seed}:{epoch}").shuffle(out)
        return out

    return lambda i: tasks[order(i // len(tasks))[i % len(tasks)]]


def load_data(source: Any) -> list[Task]:
    """Tasks from a file, a folder, a `datasets.Dataset` or a list of dictionaries."""
    rows, name = rows_of(source)
    if not rows:
        raise GruppoError(f"{name} is empty: it has no rows to train on")
    return [task_of(row, i, name) for i, row in enumerate(rows)]


def rows_of(source: Any) -> tuple[list[Any], str]:
    """The rows as dictionaries, and what to call their source in a sentence."""
    if isinstance(source, (str, Path)):
        path = Path(source).expanduser()
        if not path.exists():
            raise GruppoError(f"the data file {path} does not exist (looked from {Path.cwd()})")
        return list(read_rows(path)), str(path)
    if hasattr(source, "column_names") and hasattr(source, "to_list"):
        return source.to_list(), "the dataset"
    if isinstance(source, Mapping):
        splits = ", ".join(map(str, source))
        raise GruppoError(
            f"the data is a dictionary with the keys {splits}; pass one split, for example data[{next(iter(source), 'train')!r}]"
        )
    if isinstance(source, Sequence):
        return list(source), "the list of rows"
    raise GruppoError(f"data is a {type(source).__name__}; give a path ({READERS}), a datasets.Dataset or a list of dictionaries")


def read_rows(path: Path) -> Sequence[Any]:
    """Rows of one file or dataset folder."""
    if path.is_dir():
        import datasets

        try:
            loaded: Any = datasets.load_from_disk(str(path))
        except (FileNotFoundError, ValueError) as error:
            raise GruppoError(f"{path} is a folder but not a saved dataset ({error}); give {READERS}") from None
        return rows_of(loaded)[0]
    kind = path.suffix.lower()
    if kind in (".jsonl", ".ndjson"):
        rows = []
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise GruppoError(f"line {number} of {path} is not JSON: {error.msg} at column {error.colno}") from None
        return rows
    if kind == ".json":
        try:
            rows = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise GruppoError(f"{path} is not JSON: {error.msg} in line {error.lineno}; one object per line is .jsonl") from None
        if not isinstance(rows, list):
            raise GruppoError(f"{path} holds a {type(rows).__name__}; a .json data file is a list of objects")
        return rows
    if kind == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path).to_pylist()
    if kind == ".csv":
        import csv

        with path.open(newline="") as file:
            return list(csv.DictReader(file))
    raise GruppoError(f"cannot read {path}: {kind or 'no ending'} is none of {READERS}")


def task_of(row: Any, number: int, name: str) -> Task:
    """One row as a task: `prompt` and `answer` by name, the other columns in `extra`."""
    if not isinstance(row, Mapping):
        raise GruppoError(f"row {number} of {name} is a {type(row).__name__}; every row is an object with the column 'prompt'")
    if "prompt" not in row:
        from gruppo.runs.config import nearest

        raise GruppoError(
            f"{name} has no column 'prompt' (row {number} has: {', '.join(map(str, row))}); {nearest('prompt', map(str, row))}"
        )
    prompt = row["prompt"]
    if isinstance(prompt, list) and prompt and all(isinstance(m, Mapping) and "role" in m for m in prompt):
        prompt = [{k: v for k, v in m.items() if v is not None} for m in prompt]  # parquet fills absent keys with None
    elif not isinstance(prompt, str) or not prompt:
        raise GruppoError(
            f"the prompt in row {number} of {name} is {repr(prompt)[:60]}; a prompt is a string that is not empty or a list of "
            "chat messages"
        )
    extra = {k: v for k, v in row.items() if k not in ("prompt", "answer")}
    return Task(prompt, row.get("answer"), extra)


def only(tasks: Sequence[Task], where: Mapping[str, Any] | None) -> list[Task]:
    """The tasks whose columns have (one of) the values asked for."""
    kept = [t for t in tasks if matches(t, where)]
    if not kept:
        raise GruppoError(f"none of the {len(tasks)} tasks has {where}")
    return kept


def matches(task: Task, where: Mapping[str, Any] | None) -> bool:
    """Whether every named column has (one of) the values."""
    return all(task.column(k) in (v if isinstance(v, list) else [v]) for k, v in (where or {}).items())


def only_at(at: Callable[[int], Task], where: Mapping[str, Any] | None, tries: int = 2000) -> Callable[[int], Task]:
    """An endless stream with only the matching tasks: place i looks through `tries` places of its own."""
    if not where:
        return at

    def matching(i: int) -> Task:
        for j in range(i * tries, (i + 1) * tries):
            task = at(j)
            if matches(task, where):
                return task
        raise GruppoError(f"{tries} tasks in a row of this world had no {where}")

    return matching


def split(tasks: Sequence[Task], share: float, most: int) -> tuple[list[Task], list[Task]]:
    """(training, held-out): a share of the distinct prompts, chosen by their hash, so that it never depends on row order.

    Rows with the same prompt stay on one side. At least one prompt is held out and at least one is left to train on.
    """
    keys = [digest(t.prompt) for t in tasks]
    distinct = sorted(set(keys))
    n = 0 if share == 0 or most == 0 else min(max(1, round(share * len(distinct))), len(distinct) - 1)
    held = set(distinct[:n])
    train = [t for t, k in zip(tasks, keys) if k not in held]
    out = sorted(((k, i) for i, k in enumerate(keys) if k in held))[:most]
    return train, [tasks[i] for _, i in out]


def digest(prompt: Any) -> str:
    """A hash of the prompt's content."""
    return hashlib.sha256(json.dumps(prompt, sort_keys=True, ensure_ascii=False, default=str).encode()).hexdigest()


def check_lengths(policy: Any, tasks: Sequence[Task], max_new: int, name: str) -> int:
    """The longest prompt in tokens; a sentence for a prompt that does not fit the model together with its answer."""
    lengths = [len(policy.encode(t.prompt)) for t in tasks]
    room = policy.context - max_new
    long = [i for i, n in enumerate(lengths) if n > room]
    if long:
        row = long[0]
        others = f" ({len(long)} of {len(tasks)} rows are too long)" if len(long) > 1 else ""
        raise GruppoError(
            f"the prompt in row {row} of {name} has {lengths[row]} tokens, and {max_new} new ones must fit as well, but this "
            f"model has {policy.context} positions{others}; shorten or remove it, or lower policy.max_new_tokens"
        )
    return max(lengths, default=0)
