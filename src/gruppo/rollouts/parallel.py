"""n independent completions per task, and wrappers that add readings to finished groups."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from gruppo.types import Grade, Group, GruppoError, Rollout


def check_siblings(n: int) -> None:
    """A sentence when a group of n paths could not be compared."""
    if n < 2:
        raise GruppoError(
            f"paths_per_prompt is {n}; a group needs at least 2 paths, because a path is only ever compared with its siblings"
        )


@dataclass(frozen=True)
class Parallel:
    """n completions of every task, sampled together."""

    n: int

    def __post_init__(self) -> None:
        check_siblings(self.n)

    def __call__(self, policy: Any, tasks: Any, grade: Grade, rng: torch.Generator) -> list[Group]:
        tasks = list(tasks)
        paths = policy.sample([t.prompt for t in tasks for _ in range(self.n)], g=rng)
        return grade([Group(t, paths[i * self.n : (i + 1) * self.n]) for i, t in enumerate(tasks)])


@dataclass(frozen=True)
class WithReference:
    """Adds `signals["logp_ref"]`, the reference's reading of every path, for rewards that contain a KL term."""

    inner: Rollout

    def __call__(self, policy: Any, tasks: Any, grade: Grade, rng: torch.Generator) -> list[Group]:
        groups = self.inner(policy, tasks, grade, rng)
        if policy.reference is None:
            raise GruppoError("this recipe reads the reference's log-probs, but the policy has no reference")
        logp = iter(policy.reference.score([p for g in groups for p in g.paths]))
        return [g.with_(signals={**g.signals, "logp_ref": [next(logp) for _ in g.paths]}) for g in groups]


@dataclass(frozen=True)
class Reread:
    """The trainer reads every sampled path again, for samplers whose log-probs are another program's."""

    inner: Rollout

    def __call__(self, policy: Any, tasks: Any, grade: Grade, rng: torch.Generator) -> list[Group]:
        groups = self.inner(policy, tasks, grade, rng)
        logp = iter(policy.score([p for g in groups for p in g.paths]))
        return [g.with_(paths=[replace(p, logp_train=next(logp)) for p in g.paths]) for g in groups]
