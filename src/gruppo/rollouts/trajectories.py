"""n pictures per prompt, each a row of denoising steps, and where on the way noise is drawn and trained.

    Trajectories(n=16, kernel=FlowSDE(.7), noisy=but_last)

`noisy` names the steps that draw noise, anew in every iteration; `trained` which of these a path trains. Everything else of
a path is deterministic, costs a forward pass and no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gruppo.policies.flow import Course, Walk
from gruppo.policies.kernels import FlowSDE, Kernel, Solver
from gruppo.rollouts.parallel import check_siblings
from gruppo.types import Grade, Group, GruppoError, Path, Task

FLOW_SDE = FlowSDE()
Noisy = Callable[[int, torch.Generator], Sequence[int]]  # steps of the grid -> those that draw noise, ascending
Trained = Callable[[Sequence[int], int, torch.Generator], Sequence[int]]  # noisy steps, T -> those that one path trains
Grid = Callable[[Tensor, Sequence[int]], Tensor]  # the policy's grid and the noisy steps -> the grid that is walked


def everywhere(T: int, g: torch.Generator) -> list[int]:
    """Every step draws noise, the last one too, so pictures carry the last step's noise."""
    return list(range(T))


def but_last(T: int, g: torch.Generator) -> list[int]:
    """Every step but the last: the picture is what the network expects at the last call (x0_hat), without noise on it."""
    return list(range(T - 1))


@dataclass(frozen=True)
class First:
    """The first k steps."""

    k: int

    def __call__(self, T: int, g: torch.Generator) -> list[int]:
        if not 1 <= self.k <= T:
            raise GruppoError(f"the first {self.k} steps are to be noisy, but a path has {T}")
        return list(range(self.k))


def all_noisy(noisy: Sequence[int], T: int, g: torch.Generator) -> list[int]:
    """Every noisy step is trained."""
    return list(noisy)


@dataclass(frozen=True)
class Share:
    """The earliest int(T * share) steps (Flow-GRPO's timestep_fraction: .99 leaves out the nearly noiseless last one)."""

    share: float

    def __call__(self, noisy: Sequence[int], T: int, g: torch.Generator) -> list[int]:
        return [t for t in noisy if t < int(T * self.share)]


@dataclass(frozen=True)
class RandomShare:
    """A random part of the noisy steps, drawn for every path: int(share * number of them); with `up` ceil(share * T)."""

    share: float
    up: bool = False

    def __call__(self, noisy: Sequence[int], T: int, g: torch.Generator) -> list[int]:
        k = math.ceil(round(T * self.share, 9)) if self.up else int(len(noisy) * self.share)
        return sorted(noisy[i] for i in torch.randperm(len(noisy), generator=g)[:k].tolist())


def as_it_is(sigmas: Tensor, noisy: Sequence[int]) -> Tensor:
    """The policy's own grid."""
    return sigmas


@dataclass(frozen=True)
class Trajectories:
    """n independent ways from noise to picture for every prompt, all of one step's prompts walked together."""

    n: int
    kernel: Kernel = FLOW_SDE
    noisy: Noisy = everywhere
    trained: Trained = all_noisy
    shared_noise: bool = False  # the paths of a prompt begin at one and the same noise
    grid: Grid = as_it_is
    solver: Solver | None = None  # takes the deterministic steps behind the last noisy one
    keep_means: bool = False  # paths remember the sampler's means, for a ratio that reads them

    def __post_init__(self) -> None:
        check_siblings(self.n)

    def __call__(self, policy: Any, tasks: Any, grade: Grade, rng: torch.Generator) -> list[Group]:
        tasks = list(tasks)
        sigmas = policy.sigmas
        noisy = list(self.noisy(len(sigmas) - 1, rng))
        sigmas = self.grid(sigmas, noisy)
        T = len(sigmas) - 1
        if not noisy:
            raise GruppoError(f"no step of the {T} draws noise in this iteration, so there is nothing to train")
        courses = [Course.of(t.prompt, sigmas, self.kernel, noisy) for t in tasks]
        x = start(policy, len(tasks), self.n, rng, shared=self.shared_noise)
        done = self.walk(policy, x, [c for c in courses for _ in range(self.n)], noisy[-1] + 1, rng)
        images = policy.decode(done.last)
        groups = []
        for i, (task, course) in enumerate(zip(tasks, courses)):
            rows = range(i * self.n, (i + 1) * self.n)
            masks = [mask_of(T, self.trained(noisy, T, rng), course) for _ in rows]
            groups.append(self.group(task, course, done, rows, masks, images))
        return grade(groups)

    def walk(self, policy: Any, x: Tensor, courses: list[Course], tail: int, g: torch.Generator) -> Walk:
        """From noise to picture; from step `tail` on the solver takes the steps, and remembers the noisy one before them."""
        T, means = len(courses[0]), self.keep_means
        if self.solver is None:
            return policy.walk(x, courses, 0, T, g=g, means=means)
        first = policy.walk(x, courses, 0, tail - 1, g=g, means=means)
        return joined(first, policy.walk(first.last, courses, tail - 1, T, g=g, solver=self.solver, means=means))

    def group(
        self, task: Task, course: Course, done: Walk, rows: Sequence[int], masks: Sequence[Tensor], images: list[Any]
    ) -> Group:
        """The rows of one prompt as a group."""
        logp = done.logp.cpu()
        return Group(
            task,
            [
                Path(
                    course,
                    done.x[r],
                    logp[r],
                    mask,
                    images[r],
                    fork=(0, 0) if self.shared_noise and r != rows[0] else None,
                    mean=None if done.mean is None else done.mean[r],
                )
                for r, mask in zip(rows, masks)
            ],
        )


def start(policy: Any, prompts: int, n: int, g: torch.Generator, *, shared: bool) -> Tensor:
    """[prompts * n, ...] noise; with `shared`, one noise per prompt."""
    if not shared:
        return policy.noise(prompts * n, g)
    return policy.noise(prompts, g).repeat_interleave(n, 0)


def mask_of(T: int, trained: Sequence[int], course: Course) -> Tensor:
    """[T] bool: these steps, where they really draw something (the step to sigma 0 of some kernels does not)."""
    mask = torch.zeros(T, dtype=torch.bool)
    mask[list(trained)] = True
    return mask & course.stochastic


def joined(first: Walk, second: Walk) -> Walk:
    """Two legs as one walk."""
    return Walk(
        torch.cat([first.x, second.x[:, 1:]], 1),
        second.last,
        torch.cat([first.logp, second.logp], 1),
        None if first.mean is None or second.mean is None else torch.cat([first.mean, second.mean], 1),
        second.clean,
        second.history,
    )
