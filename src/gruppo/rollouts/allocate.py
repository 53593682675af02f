"""One budget of paths for all prompts of a step, spent in phases: what was just scored decides who gets the next ones.

Groups come out with unequal sizes; their sum is the budget, always.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from gruppo.rollouts.parallel import Parallel
from gruppo.types import Grade, Group, GruppoError, Path, Task

Priority = Callable[[Tensor, int, int], float]  # grades heard so far, paths counted for the prompt, paths spent in this step
Worth = Callable[[int], float]  # what one more path is worth to a prompt that has n
Spend = Callable[[Sequence[Worth], Sequence[int], int], list[int]]  # worths, sizes, budget -> how many more for each


@runtime_checkable
class Rescue(Protocol):
    """Another way to ask a task on which every path failed."""

    def ask(self, policy: Any, task: Task) -> Any:
        """The prompt for the next paths; None = as before."""
        ...

    def keep(self, policy: Any, task: Task, paths: list[Path]) -> list[Path]:
        """The paths that were sampled so, as they enter the group."""
        ...


def greedy(worths: Sequence[Worth], sizes: Sequence[int], budget: int) -> list[int]:
    """One path after the other to the prompt with the highest worth; among equals to the smallest group, then the first."""
    extra = [0] * len(sizes)
    queue = [(-worth(n), n, i) for i, (worth, n) in enumerate(zip(worths, sizes))]
    heapq.heapify(queue)
    for _ in range(budget):
        _, n, i = queue[0]
        extra[i] += 1
        heapq.heapreplace(queue, (-worths[i](n + 1), n + 1, i))
    return extra


def proportional(worths: Sequence[Worth], sizes: Sequence[int], budget: int) -> list[int]:
    """Shares in proportion to the worths as they are, the rest by largest remainder; equal shares where all worths are 0."""
    now = [max(0.0, worth(n)) for worth, n in zip(worths, sizes)]
    now = now if sum(now) > 0 else [1.0] * len(sizes)
    exact = [budget * w / sum(now) for w in now]
    extra = [math.floor(e) for e in exact]
    order = sorted(range(len(exact)), key=lambda i: (extra[i] - exact[i], sizes[i], i))
    for i in order[: budget - sum(extra)]:
        extra[i] += 1
    return extra


@dataclass(frozen=True)
class Allocate:
    """n paths per prompt on average: the first phase gives every prompt the same, the others follow the priority.

    New paths are graded as they come, in groups of their own, and join their siblings afterwards.
    """

    n: int
    priority: Priority
    first: float = 0.5  # the share of the budget that the first phase spends, at least 2 paths per prompt
    phases: int = 3
    spend: Spend = greedy
    signal: str = "correct"
    rescue: Rescue | None = None

    def __post_init__(self) -> None:
        if self.n < 2 or not 0 < self.first <= 1 or self.phases < 1:
            raise GruppoError(
                f"{self.n} paths per prompt in {self.phases} phases, {self.first:g} of them in the first: a plan needs at least "
                "2 paths per prompt, 1 phase, and a first share above 0 and not above 1"
            )

    @property
    def base(self) -> int:
        """Paths of every prompt in the first phase; 2 at least, because one grade has no spread."""
        return self.n if self.phases == 1 else min(self.n, max(2, round(self.n * self.first)))

    def __call__(self, policy: Any, tasks: Any, grade: Grade, rng: torch.Generator) -> list[Group]:
        tasks = list(tasks)
        groups = Parallel(self.base)(policy, tasks, grade, rng)
        spent, budget = self.base * len(tasks), self.n * len(tasks)
        for phase in range(1, self.phases):
            share = (budget - spent) // (self.phases - phase)
            if share:
                groups = self.more(policy, groups, self.plan(groups, share, spent), grade, rng)
                spent += share
        assert sum(map(len, groups)) == budget
        return groups

    def plan(self, groups: list[Group], budget: int, spent: int) -> list[int]:
        """How many more paths each group gets of this phase's budget."""
        heard = [self.heard(g) for g in groups]
        worths = [lambda n, h=h: float(self.priority(h, n, spent)) for h in heard]
        return self.spend(worths, [len(h) for h in heard], budget)

    def more(self, policy: Any, groups: list[Group], extra: list[int], grade: Grade, rng: torch.Generator) -> list[Group]:
        """The groups with this many new graded paths each."""
        asks = {i: self.ask(policy, g) for i, g in enumerate(groups) if extra[i]}
        prompts = {i: groups[i].task.prompt if asked is None else asked for i, asked in asks.items()}
        new = iter(policy.sample([prompts[i] for i in prompts for _ in range(extra[i])], g=rng))
        parts = {i: Group(groups[i].task, [next(new) for _ in range(extra[i])]) for i in prompts}
        for i, part in parts.items():
            if self.rescue is not None and asks[i] is not None:
                parts[i] = part.with_(paths=self.rescue.keep(policy, part.task, part.paths))
        graded = dict(zip(parts, grade(list(parts.values()))))
        return [joined(g, graded[i]) if i in graded else g for i, g in enumerate(groups)]

    def ask(self, policy: Any, group: Group) -> Any:
        heard = self.heard(group)
        stuck = len(heard) > 0 and not bool((heard > 0).any())
        return self.rescue.ask(policy, group.task) if stuck and self.rescue is not None else None

    def heard(self, group: Group) -> Tensor:
        """The grades that were given, or a sentence when no grader gives the signal."""
        if self.signal not in group.signals:
            raise GruppoError(
                f"the plan reads the signal {self.signal!r}, but the graders of this run give only: "
                f"{', '.join(group.signals) or 'nothing'}"
            )
        value = group.signals[self.signal]
        return value[~value.isnan()]


def joined(group: Group, more: Group) -> Group:
    """The paths of both with their signals, forks pointing at the new rows."""
    only = set(group.signals) ^ set(more.signals)
    if only:
        raise GruppoError(f"the signal {min(only)!r} was given for some phases of a group only; a grader must always give it")
    shifted = [p if p.fork is None else replace(p, fork=(p.fork[0] + len(group), p.fork[1])) for p in more.paths]
    signals = {name: _chained(value, more.signals[name]) for name, value in group.signals.items()}
    return group.with_(paths=group.paths + shifted, signals=signals)


def _chained(a: Any, b: Any) -> Any:
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape[1:] == b.shape[1:]:
        return torch.cat([a, b])
    return [*_listed(a), *_listed(b)]


def _listed(value: Any) -> list[Any]:
    """A list; numbers out of a tensor, NaN (what a list of only None became) as None."""
    if not isinstance(value, Tensor):
        return list(value)
    return [None if v != v else v for v in value.tolist()] if value.dim() == 1 else list(value)
