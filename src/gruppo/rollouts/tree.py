"""A tree of latents per prompt: at split steps a node gets several children, elsewhere one. Shared prefixes are computed once.

    Tree(splits=(0, 3, 6, 9), fan=2, kernel=DanceSDE(.3))            16 pictures from 203 network calls instead of 320

Leaves are the paths of the group; `fork` says where a path leaves its elder sibling, and of a shared transition exactly one
row, the first that has it, is trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gruppo.core.tree import owners
from gruppo.policies.flow import Course
from gruppo.policies.kernels import DanceSDE, Kernel, over
from gruppo.rollouts.trajectories import Noisy, but_last
from gruppo.rollouts.window import Window
from gruppo.types import Grade, Group, GruppoError, Path, Task

SplitNoise = Callable[[int, int, Sequence[int], torch.Generator], Tensor]  # nodes, children, shape -> [nodes, children, ...]
DANCE_SDE = DanceSDE()


def _positive(s: float) -> None:
    if not s > 0:
        raise GruppoError(f"the noise of a split has the strength {s}; siblings would be the same picture")


@dataclass(frozen=True)
class Correlated:
    """xi_b = (xi_0 + s eta_b) / sqrt(1 + s^2) with one xi_0 per node.

    Every child's noise has variance 1, so its log-probability is that of the step; siblings correlate by 1 / (1 + s^2).
    """

    s: float = 4.0

    def __post_init__(self) -> None:
        _positive(self.s)

    def __call__(self, nodes: int, children: int, shape: Sequence[int], g: torch.Generator) -> Tensor:
        common = torch.randn(nodes, 1, *shape, generator=g)
        return self.blend(common, torch.randn(nodes, children, *shape, generator=g))

    def blend(self, common: Tensor, own: Tensor) -> Tensor:
        return (common + self.s * own) / math.sqrt(1 + self.s**2)


CORRELATED = Correlated()


@dataclass(frozen=True)
class Scaled:
    """s eta_b, as Fredreic1849/BranchGRPO draws it: s times the deviation that the log-probability assumes.

    Biased: the draws are not from the Gaussian whose ratio is trained. Their log-probability per element lies (s^2 - 1) / 2
    below that of honest draws on average (7.5 at s = 4), and the gradient of log-density is s times as long.
    """

    s: float = 4.0

    def __post_init__(self) -> None:
        _positive(self.s)

    def __call__(self, nodes: int, children: int, shape: Sequence[int], g: torch.Generator) -> Tensor:
        return self.s * torch.randn(nodes, children, *shape, generator=g)


@dataclass(frozen=True)
class EveryThird:
    """`count` splits at 0, 3, 6, ...; closer to one another where the grid is too short for that."""

    count: int

    def __call__(self, T: int) -> tuple[int, ...]:
        apart = 3 if self.count == 1 else min(3, (T - 2) // (self.count - 1))  # the last step draws nothing
        if apart < 1:
            raise GruppoError(f"the tree is to split {self.count} times, but a grid of {T} steps has room for {max(0, T - 1)}")
        return tuple(range(0, self.count * apart, apart))


Splits = tuple[int, ...] | EveryThird


def placed(splits: Splits, T: int) -> tuple[int, ...]:
    """The steps of a grid of T at which a tree splits."""
    return splits(T) if isinstance(splits, EveryThird) else splits


@dataclass(frozen=True)
class AtSplits:
    """Noise at the splits and in a window of steps, none elsewhere (BranchGRPO-Mix).

    The window stands at `begin`, or is the `moving` one, which a recipe tells of each iteration.
    """

    splits: Splits
    begin: int = 0
    width: int = 4
    moving: Window | None = None

    def __post_init__(self) -> None:
        if self.begin < 0 or self.width < 1:
            raise GruppoError(f"the window of noisy steps begins at {self.begin} and has {self.width} steps; it needs 0 and 1")

    def __call__(self, T: int, g: torch.Generator) -> list[int]:
        if self.begin >= T:
            raise GruppoError(f"the window of noisy steps begins at {self.begin}, but the grid has only the steps 0 to {T - 1}")
        window = range(self.begin, min(self.begin + self.width, T)) if self.moving is None else self.moving(T, g)
        return sorted({*placed(self.splits, T), *window})


@dataclass(frozen=True)
class Tree:
    """One tree per prompt, all of one step's prompts grown together; every split multiplies the leaves by `fan`."""

    splits: Splits
    fan: int = 2
    kernel: Kernel = DANCE_SDE
    noise: SplitNoise = CORRELATED
    noisy: Noisy = but_last

    def __post_init__(self) -> None:
        at = placed(self.splits, 10**6)
        if not at or list(at) != sorted(set(at)) or at[0] < 0 or self.fan < 2:
            raise GruppoError(
                f"the tree splits into {self.fan} at the steps {at}; it needs at least one step, in ascending order, "
                "and at least 2 children, because a path is only ever compared with its siblings"
            )

    @property
    def n(self) -> int:
        return self.fan ** len(placed(self.splits, 10**6))

    def __call__(self, policy: Any, tasks: Any, grade: Grade, rng: torch.Generator) -> list[Group]:
        tasks = list(tasks)
        sigmas = policy.sigmas
        T = len(sigmas) - 1
        noisy = list(self.noisy(T, rng))
        full = Course.of(None, sigmas, policy.fitting(self.kernel), noisy)
        splits = placed(self.splits, T)
        still = [t for t in splits if t >= T or not bool(full.stochastic[t])]
        if still:
            raise GruppoError(
                f"the tree splits at step {still[0]}, but of the grid's {T} steps only "
                f"{full.stochastic.nonzero()[:, 0].tolist()} draw noise; the children would all be the same"
            )
        xs, logps = self.grow(policy, [t.prompt for t in tasks], full, splits, rng)
        images = policy.decode(xs[-1].flatten(0, 1))
        xs, logps = [x.cpu() for x in xs], [logp.cpu() for logp in logps]
        return grade(
            [
                self.group(task, full, [x[i] for x in xs], [p[i] for p in logps], images[i * self.n : (i + 1) * self.n])
                for i, task in enumerate(tasks)
            ]
        )

    @torch.no_grad()
    def grow(
        self, policy: Any, prompts: Sequence[Any], full: Course, splits: Sequence[int], g: torch.Generator
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Latents [P, R_t, ...] at every depth and log-probabilities [P, R_t+1] of the steps between.

        Row r at depth t comes from row r % R_t-1 at depth t - 1: first children keep their parent's row, second ones follow.
        """
        P, shape = len(prompts), policy.painter.shape
        x = policy.noise(P, g)
        sigma, level = full.sigmas.to(x.device).float(), full.levels.to(x.device).float()
        xs, logps, R = [x[:, None]], [], 1
        for t in range(len(full)):
            rows = P * R
            a, b, s = sigma[t].expand(rows), sigma[t + 1].expand(rows), level[t].expand(rows)
            v = policy.velocity(x, a, [p for p in prompts for _ in range(R)], counted="sampled")
            mean = self.kernel.mean(x, v, a, b, s)
            std = self.kernel.deviation(a, b, s)
            fan = self.fan if t in splits else 1
            if fan > 1:
                eps = self.noise(rows, fan, shape, g)
            else:  # a node with one child
                eps = torch.randn(rows, 1, *shape, generator=g) if bool(std[0] > 0) else torch.zeros(rows, 1, *shape)
            mean = mean[:, None].expand(rows, fan, *shape).flatten(0, 1)
            std = std.repeat_interleave(fan)
            after = mean + over(std, mean) * eps.flatten(0, 1).to(mean)
            logp = self.kernel.logp(after, mean, std) if bool(std[0] > 0) else torch.zeros_like(std)
            # [P, R, fan] -> [P, fan, R]: the elder children stay where their parents stood
            x = after.reshape(P, R, fan, *shape).transpose(1, 2).flatten(0, 2)
            logps.append(logp.reshape(P, R, fan).transpose(1, 2).flatten(1))
            R *= fan
            xs.append(x.reshape(P, R, *shape))
        return xs, logps

    def group(self, task: Task, full: Course, xs: list[Tensor], logps: list[Tensor], images: list[Any]) -> Group:
        """One prompt's leaves as paths; each shared transition is trained by the first row that has it."""
        course = replace(full, prompt=task.prompt)
        free = course.stochastic
        paths = []
        for r in range(self.n):
            steps = torch.stack([x[r % len(x)] for x in xs])
            logp = torch.stack([p[r % len(p)] for p in logps])
            own = next((t for t, p in enumerate(logps) if len(p) > r), 0)  # where this row comes into being
            fork = None if r == 0 else (r % len(xs[own]), own)
            paths.append(Path(course, steps, logp, free.clone(), images[r], fork))
        group = Group(task, paths)
        once = owners(group.edges(), group.mask)
        return group.with_(paths=[replace(p, mask=m) for p, m in zip(paths, once)])
