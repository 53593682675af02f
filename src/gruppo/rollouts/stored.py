"""Training on groups that some run stored: token in, token out, without sampling and without tokenising anything again.

A run stores its groups as one row per path (`groups/step-000010.parquet`, every `track.groups_every` steps). What is read back is
what was trained: prompt and completion as token ids, the sampler's own log-probabilities, masks, forks, signals. A path that the
storing run masked (abstained, truncated and dropped) stays masked.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor

from gruppo.graders.grade import Grading, column
from gruppo.recipe import Recipe
from gruppo.rollouts.conversation import Transcript
from gruppo.types import Grade, Group, GruppoError, Path, Rollout, Task

COLUMNS = ("step", "group", "row", "prompt", "prompt_tokens", "tokens", "token_text", "logp", "mask", "signals", "truncated")


@dataclass(frozen=True)
class StoredTask(Task):
    """A task whose group is in a buffer, at this place."""

    at: int = 0


@dataclass(frozen=True)
class Stored:
    """The buffer's groups in the order in which their tasks are drawn; the policy samples nothing.

    Rewards are the stored ones, or with `weights` the weighted sum of the stored signals, or with `regrade` whatever the run's
    graders say about the stored outputs now.
    """

    source: str
    groups: Sequence[Group] = field(repr=False, compare=False)
    weights: Mapping[str, float] | None = None
    regrade: bool = False

    def __call__(self, policy: Any, tasks: Any, grade: Grade, rng: torch.Generator) -> list[Group]:
        groups = [self.groups[t.at] for t in tasks]
        if self.regrade:
            return grade(groups)
        return groups if self.weights is None else Grading([], dict(self.weights))(groups)

    def check(self) -> None:
        """A sentence when a group lacks a signal that its reward is made of."""
        if self.regrade:
            return
        for group in self.groups:
            missing = [name for name in self.weights or ("reward",) if name not in group.signals]
            if missing:
                raise GruppoError(
                    f"the reward needs the signal {missing[0]!r}, but a group stored in {self.source} has only: "
                    f"{', '.join(group.signals) or 'nothing'}; grade the completions again with --reward module:function, or "
                    "name other weights"
                )


def offline(recipe: Recipe, stored: Stored) -> Recipe:
    """The recipe on stored groups: they replace what samples, and whatever is wrapped around it stays."""

    def instead(rollout: Rollout) -> Rollout:
        inner = getattr(rollout, "inner", None)
        return stored if inner is None else replace(rollout, inner=instead(inner))  # pyright: ignore[reportArgumentType, reportCallIssue]

    return replace(recipe, rollout=instead(recipe.rollout))


def read_groups(sources: Sequence[str | File], policy: Any) -> list[Group]:
    """All groups of these files, folders and runs, in order; refused where this policy could not have sampled them."""
    files = [file for source in sources for file in files_of(source)]
    groups = [group for file in files for group in groups_of(file, policy)]
    heard = {name for g in groups for name, v in g.signals.items() if not silent(v)}

    def numbered(at: int, group: Group) -> Group:
        task = StoredTask(group.task.prompt, group.task.answer, group.task.extra, at)
        # per-step tensors are not stored, only their name is: a signal without one value anywhere is none
        return group.with_(task=task, signals={k: v for k, v in group.signals.items() if k in heard})

    return [numbered(at, group) for at, group in enumerate(groups)]


def silent(value: Any) -> bool:
    """Whether no path has a value of this signal."""
    return bool(value.isnan().all()) if isinstance(value, Tensor) else all(v is None for v in value)


def files_of(source: str | File) -> list[File]:
    """The parquet files behind a file, a folder of them, or a run."""
    path = File(source).expanduser()
    if not path.exists():
        raise GruppoError(f"the stored groups {path} do not exist (looked from {File.cwd()})")
    if path.is_file():
        return [path]
    folder = path / "groups" if (path / "run.yaml").exists() else path
    found = sorted(folder.glob("*.parquet"))
    if not found:
        raise GruppoError(
            f"{folder} holds no stored groups (*.parquet); a run stores them every `track.groups_every` steps, so train with "
            "track.groups_every=1 to keep them all"
        )
    return found


def groups_of(file: File, policy: Any) -> Iterator[Group]:
    """The groups of one file."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file)
    except pyarrow.ArrowInvalid as error:
        raise GruppoError(f"{file} is not a parquet file: {error}") from None
    absent = [name for name in COLUMNS if name not in table.column_names]
    if absent:
        raise GruppoError(
            f"{file} has no column {absent[0]!r}, which training on stored groups needs; it has: {', '.join(table.column_names)}"
        )
    rows = table.to_pylist()
    if not rows:
        raise GruppoError(f"{file} is empty: it holds no path")
    check_vocabulary(rows, file, policy)
    for key, some in groupby(enumerate(rows), lambda at: (at[1]["step"], at[1]["group"])):
        members = list(some)
        paths = [path_of(row, f"row {n} of {file} (group {key[1]}, path {row['row']})", policy) for n, row in members]
        first = members[0][1]
        asked = json.loads(first.get("problem") or "{}") or {"prompt": first["prompt"], "answer": first.get("answer")}
        task = Task(asked["prompt"], asked["answer"], json.loads(first.get("task") or "{}"))
        signals = [json.loads(row["signals"] or "{}") for _, row in members]
        names = dict.fromkeys(name for s in signals for name in s)
        yield Group(task, paths, {k: column(k, [s.get(k) for s in signals], len(paths), str(file)) for k in names})


def path_of(row: Mapping[str, Any], where: str, policy: Any) -> Path:
    """One row as the path that it was; a sentence for what it lacks."""
    for name, meaning in (("tokens", "completion"), ("prompt_tokens", "prompt"), ("logp", "behaviour log-probabilities")):
        if not row[name]:
            raise GruppoError(f"{where} has no {name}: without its {meaning} it cannot be trained on")
    steps, prompt = torch.tensor(row["tokens"]), torch.tensor(row["prompt_tokens"])
    T = len(steps)
    if not len(row["logp"]) == len(row["mask"] or ()) == T:
        raise GruppoError(
            f"{where} has {T} tokens, {len(row['logp'])} log-probabilities and {len(row['mask'] or ())} mask entries; all three "
            "must be as many"
        )
    logp = torch.tensor([float("nan") if x is None else x for x in row["logp"]])
    mask = torch.tensor(row["mask"])
    bad = int((mask & ~logp.isfinite()).sum())
    if bad:
        raise GruppoError(
            f"{where} has no finite log-probability for {bad} of {int(mask.sum())} trained tokens, so how likely they "
            "were is not known (greedy completions of an evaluation have none)"
        )
    if len(prompt) + T > policy.context:
        raise GruppoError(f"{where} has {len(prompt)} + {T} tokens, but this model has {policy.context} positions")
    fork = None if row.get("fork") is None else tuple(int(x) for x in row["fork"].split(":"))
    return Path(
        prompt,
        steps,
        logp,
        mask,
        output=output_of(row),
        fork=fork,  # pyright: ignore[reportArgumentType]
        unit=None if row.get("unit") is None else torch.tensor(row["unit"]),
        off_policy=bool(row.get("off_policy")),
        truncated=bool(row["truncated"]),
        logp_train=None if row.get("logp_train") is None else torch.tensor(row["logp_train"]),
        version=row.get("version") or 0,
    )


def output_of(row: Mapping[str, Any]) -> Any:
    """The completion; a conversation with its turns, so that graders tell the model's words from the tools'."""
    return Transcript(row["output"], json.loads(row["messages"])) if row.get("messages") else row.get("output")


def check_vocabulary(rows: Sequence[Mapping[str, Any]], file: File, policy: Any) -> None:
    """A sentence when the stored token ids mean something else to this policy's model or tokenizer."""
    meant = {pair for row in rows for pair in zip(row["tokens"] or (), row["token_text"] or ())}
    prompts = {(tuple(row["prompt_tokens"] or ()), row["prompt"]) for row in rows}
    size = policy.config.vocab_size
    largest = max([*(token for token, _ in meant), *(i for ids, _ in prompts for i in ids)], default=0)
    if largest >= size:
        raise GruppoError(
            f"{file} holds the token {largest}, but this model has {size} tokens: the groups were sampled with another vocabulary"
        )
    decode = policy.tokenizer.decode
    for token, text in sorted(meant):
        if decode([token]) != text:
            raise GruppoError(
                f"the token {token} is {text!r} in {file}, but {decode([token])!r} for this tokenizer: the groups were sampled "
                "with another vocabulary"
            )
    for ids, text in sorted(prompts):
        if ids and decode(list(ids)) != text:
            raise GruppoError(
                f"a prompt in {file} reads {text[:60]!r}, but its tokens are {decode(list(ids))[:60]!r} for this tokenizer: the "
                "groups were sampled with another vocabulary"
            )
