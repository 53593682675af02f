"""Sampling that continues until enough groups are undecided: groups that teach nothing are replaced, not trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gruppo.types import Grade, Group, GruppoError, Rollout


@dataclass(frozen=True)
class Dynamic:
    """Keeps groups in which some but not all paths are right, and draws more tasks until there are as many as were asked for.

    `signal` is the RAW grade: a shaped reward (length penalty, KL) varies in a group that is all right or all wrong too, and
    such a group would pass (2503.14476, section 3.2, asks for 0 < #correct < G). Surplus groups of the last draw are dropped.
    """

    inner: Rollout
    signal: str = "correct"
    refills: int = 10

    def __call__(self, policy: Any, tasks: Any, grade: Grade, rng: torch.Generator) -> list[Group]:
        want, seen = len(tasks), 0
        kept: list[Group] = []
        for draw in range(self.refills + 1):
            groups = self.inner(policy, tasks, grade, rng)
            seen += len(groups)
            kept += [g for g in groups if undecided(self.measured(g))]
            if len(kept) >= want:
                return kept[:want]
            if draw < self.refills:
                tasks = tasks.more(want)
        raise GruppoError(
            f"dynamic sampling kept {len(kept)} of {seen} groups after {self.refills} refills, but this step needs {want}: in "
            f"the others {self.signal!r} is the same for every path. The tasks are too easy or too hard for this model; mix the "
            "difficulty, sample more paths per prompt, or raise `refills`"
        )

    def measured(self, group: Group) -> Tensor:
        """The signal [G], or a sentence when no grader gives it."""
        if self.signal not in group.signals:
            raise GruppoError(
                f"dynamic sampling reads the signal {self.signal!r}, but the graders of this run give only: "
                f"{', '.join(group.signals) or 'nothing'}"
            )
        return group.signals[self.signal]


def undecided(value: Tensor) -> bool:
    """Whether the paths that were graded differ; abstained (NaN) paths do not vote."""
    heard = value[~value.isnan()]
    return len(heard) > 0 and bool(heard.min() < heard.max())
