"""The tasks of a run: what each stage trains on, what the run holds out, and what was sampled before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gruppo.policies.flow import FlowPolicy
from gruppo.rollouts.stored import read_groups
from gruppo.runs.build import world_of
from gruppo.runs.config import RunConfig
from gruppo.runs.data import check_lengths, digest, load_data, only, split
from gruppo.types import Group, GruppoError, Task


@dataclass(frozen=True)
class Tasks:
    """What a run learns from and what it is tried on."""

    training: list[list[Task] | None]  # of each stage; None where a world makes them
    held_out: list[Task]
    stored: list[Group]  # groups to train on instead of sampling; empty where the run samples


def tasks_of(config: RunConfig, policy: Any, say: Callable[[str], None]) -> Tasks:
    """Read and checked, with nothing held out that any stage trains on."""
    if config.offline and isinstance(policy, FlowPolicy):
        raise GruppoError("stored groups of an image model hold no latents, so it cannot be trained on them; remove offline")
    stored = read_groups(config.offline, policy) if config.offline else []
    world = world_of(config)
    training: list[list[Task] | None] = []
    held: list[Task] = []
    for n in range(max(1, len(config.stages))):
        own = config.at(n)
        if stored:
            training.append(only([g.task for g in stored], own.only))
        elif own.data is None:
            training.append(None)
        else:
            rows = rows_for(policy, own.data, own.policy.max_new_tokens, own.data)
            inside = 0.0 if own.eval.data or world else own.eval.share
            train, away = split(only(rows, own.only), inside, own.eval.tasks)
            held = held or away
            training.append(train)
    if config.eval.data:
        held = rows_for(policy, config.eval.data, config.policy.max_new_tokens, "the held-out data", most=config.eval.tasks)
        _warn(training, held, say)
        return Tasks(training, held, stored)
    if world is not None and config.eval.tasks:
        held = world.held_out(config.eval.tasks)
    # a later stage must not train on what an earlier one holds out
    away = {digest(t.prompt) for t in held}
    training = [t if t is None else [x for x in t if digest(x.prompt) not in away] for t in training]
    return Tasks(training, held, stored)


def rows_for(policy: Any, source: str, longest: int, name: str, most: int | None = None) -> list[Task]:
    """The tasks of a file, the first `most` of them, each of which fits the model together with its answer."""
    rows = load_data(source)[:most]
    if not isinstance(policy, FlowPolicy):  # what a painter reads of a prompt is cut by its text encoder, not by us
        check_lengths(policy, rows, longest, name)
    return rows


def _warn(training: list[list[Task] | None], held: list[Task], say: Callable[[str], None]) -> None:
    own = {digest(t.prompt) for t in held}
    for train in training:
        shared = sum(digest(t.prompt) in own for t in train or ())
        if shared:
            say(f"{shared} training rows have the same prompt as a held-out row: the evaluation will look too good")


def held_out_tasks(config: RunConfig, *, whole: bool) -> list[Task]:
    """The tasks that a run of this description holds out; every row when the data was named for this purpose."""
    if config.eval.data:
        return load_data(config.eval.data)
    if config.data is not None:
        rows = only(load_data(config.data), config.only)
        return rows if whole else split(rows, config.eval.share, config.eval.tasks)[1]
    return world_of(config).held_out(max(config.eval.tasks, 1))
