"""One step with noise, everything around it without: what a picture earns is owed to that one step.

    Branches(n=6, kernel=FlowSDE(.7), seeds=4)                                       TempFlow-GRPO
    Branches(n=12, branched=first_half, strides=(1, 2, 3))                           G2RPO

A trunk is painted without noise. At every branched step k its latent x_k gets n children by one stochastic step, and each child
is finished without noise. The children of one trunk and step are a group. With several strides each child is finished several
times, the later the coarser, and every ending is a *view*: graders judge each view by itself, the first one under the names of
their signals, the others under name@stride.

The trunk's own network call at x_k serves its children too, endings of one child share their calls until they part, and
everything that stands at the same point of the grid walks together: one call of the network per point of the grid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gruppo.policies.flow import Course
from gruppo.policies.kernels import Kernel, over
from gruppo.rollouts.trajectories import FLOW_SDE, Noisy, but_last
from gruppo.types import Grade, Group, GruppoError, Path, Task

Compared = Callable[[int], list[list[int]]]  # number of trunks of a prompt -> those whose children are one group


def by_seed(seeds: int) -> list[list[int]]:
    """Children are compared with those of the same noise: the luck of the noise is nobody's merit."""
    return [[s] for s in range(seeds)]


def by_prompt(seeds: int) -> list[list[int]]:
    """Children are compared with those of all noises of the prompt."""
    return [list(range(seeds))]


def first_half(T: int, g: torch.Generator) -> list[int]:
    """The first T // 2 steps."""
    return list(range(T // 2))


def visits(k: int, T: int, stride: int) -> list[int]:
    """The grid points from the child of step k to the picture: k + 1, then k + 2 and every stride-th point behind it.

    Where that misses the picture, the walk's last point is given up and the picture is what the network expects at the point
    before it (x0_hat), which is the step without noise from there to sigma = 0.
    """
    nodes = [k + 1, *range(k + 2, T + 1, stride)]
    return nodes if nodes[-1] == T else [*nodes[:-1], T]


@dataclass
class Twig:
    """The children of step k of every trunk, on their way along the routes of some views."""

    k: int
    trail: list[Tensor]  # latents [P * n, ...] at the points passed since the branch
    logp: Tensor  # [P * n] of the noisy step
    routes: dict[int, list[int]]  # view -> the points from where the twig stands to the picture

    @property
    def at(self) -> int:
        return next(iter(self.routes.values()))[0]

    @property
    def x(self) -> Tensor:
        return self.trail[-1]

    def forward(self, step: Callable[[int], Tensor]) -> list[Twig]:
        """One twig per next point; `step` gives the latents there."""
        parted: dict[int, dict[int, list[int]]] = {}
        for view, route in self.routes.items():
            parted.setdefault(route[1], {})[view] = route[1:]
        return [Twig(self.k, [*self.trail, step(node)], self.logp, routes) for node, routes in parted.items()]


@dataclass(frozen=True)
class Branches:
    """n children of each branched step of `seeds` trunks per prompt; each (prompt, trunk, step) is a group of its own."""

    n: int
    kernel: Kernel = FLOW_SDE
    branched: Noisy = but_last
    seeds: int = 1
    compared: Compared = by_seed
    strides: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise GruppoError(f"{self.seeds} trunks per prompt were asked for; there must be at least 1")
        smallest = self.n * min(len(s) for s in self.compared(self.seeds))
        if smallest < 2:
            raise GruppoError(
                f"paths_per_prompt is {self.n}: the group of a step would hold {smallest}; it needs at least 2 children, "
                "because a path is only ever compared with its siblings"
            )
        if not self.strides or min(self.strides) < 1 or len(set(self.strides)) < len(self.strides):
            raise GruppoError(f"the strides are {self.strides}; name one or more different whole numbers of at least 1")

    def __call__(self, policy: Any, tasks: Any, grade: Grade, rng: torch.Generator) -> list[Group]:
        tasks = list(tasks)
        sigmas = policy.sigmas
        steps = sorted(self.branched(len(sigmas) - 1, rng))
        full = Course.of(None, sigmas, policy.fitting(self.kernel))
        if not steps or not bool(full.stochastic[steps].all()):
            raise GruppoError(
                f"the steps {steps} are to branch, but of the grid's {len(full)} steps only "
                f"{full.stochastic.nonzero()[:, 0].tolist()} draw noise; children of one latent would all be the same"
            )
        trunk, ends = self.grow(policy, [t.prompt for t in tasks for _ in range(self.seeds)], full, steps, rng)
        images = iter(policy.decode(torch.cat([e.x for e in ends])))
        seen = [[next(images) for _ in range(len(e.x))] for e in ends]
        views: list[list[Group]] = [[] for _ in self.strides]
        found = {(e.k, view): (e, shown) for e, shown in zip(ends, seen) for view in e.routes}
        for i, task in enumerate(tasks):
            for seeds in self.compared(self.seeds):
                for k in steps:
                    twig, first = found[k, 0]
                    trunks = [i * self.seeds + s for s in seeds]
                    group = self.group(task, full, trunk, twig, trunks, first)
                    views[0].append(group)
                    for view in range(1, len(self.strides)):
                        shown = found[k, view][1]
                        rows = [shown[p * self.n + c] for p in trunks for c in range(self.n)]
                        paths = [replace(path, output=image) for path, image in zip(group.paths, rows)]
                        views[view].append(group.with_(paths=paths))
        return self.graded(views, grade)

    @torch.no_grad()
    def grow(
        self, policy: Any, prompts: Sequence[Any], full: Course, steps: Sequence[int], g: torch.Generator
    ) -> tuple[list[Tensor], list[Twig]]:
        """Latents [P, ...] of the trunks up to the last branched step, and the finished twigs."""
        P, T = len(prompts), len(full)
        x = policy.noise(P, g)
        sigma, level = full.sigmas.to(x.device).float(), full.levels.to(x.device).float()
        trunk, alive, ends = [x], [], []
        for t in range(T):
            here = [w for w in alive if w.at == t]
            alive = [w for w in alive if w.at != t]
            rooted = t <= steps[-1]
            if not here and not rooted:
                continue
            together = torch.cat([*([x] if rooted else []), *(w.x for w in here)])
            who = [*(prompts if rooted else []), *([p for p in prompts for _ in range(self.n)] * len(here))]
            v = policy.velocity(together, sigma[t].expand(len(together)), who, counted="sampled")
            if rooted:
                if t in steps:
                    child, logp = self.children(x, v[:P], sigma[t], sigma[t + 1], level[t], g)
                    routes = {view: visits(t, T, stride) for view, stride in enumerate(self.strides)}
                    alive.append(Twig(t, [child], logp, routes))
                x = self.still(x, v[:P], sigma[t], sigma[t + 1])
                trunk.append(x)
                v = v[P:]
            for twig, own in zip(here, v.split(P * self.n)):
                alive += twig.forward(lambda node, w=twig, own=own, t=t: self.still(w.x, own, sigma[t], sigma[node]))
            ends += [w for w in alive if w.at == T]
            alive = [w for w in alive if w.at != T]
        return trunk, ends

    def still(self, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """The step without noise."""
        n = len(x)
        return self.kernel.mean(x, v, sigma.expand(n), sigma_next.expand(n), torch.zeros_like(sigma).expand(n))

    def children(
        self, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, level: Tensor, g: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """n draws of one stochastic step from every latent [P, ...]: [P * n, ...] and their log-probabilities [P * n]."""
        P = len(x)
        mean = self.kernel.mean(x, v, sigma.expand(P), sigma_next.expand(P), level.expand(P)).repeat_interleave(self.n, 0)
        std = self.kernel.deviation(sigma.expand(len(mean)), sigma_next.expand(len(mean)), level.expand(len(mean)))
        after = mean + over(std, mean) * torch.randn(mean.shape, generator=g).to(mean)
        return after, self.kernel.logp(after, mean, std)

    def group(self, task: Task, full: Course, trunk: list[Tensor], twig: Twig, trunks: list[int], images: list[Any]) -> Group:
        """The children of these trunks at the twig's step, as rows that run from the noise to the first view's picture."""
        k = twig.k
        nodes = [*range(k + 1), *visits(k, len(full), self.strides[0])]
        only = torch.arange(len(nodes) - 1) == k
        level = torch.where(only, full.levels[k], torch.zeros((), dtype=full.levels.dtype))
        course = Course(task.prompt, self.kernel, full.sigmas[nodes], level)
        paths = []
        for p in trunks:
            prefix = torch.stack([x[p] for x in trunk[: k + 1]]).cpu()
            first = len(paths)
            for row in range(p * self.n, (p + 1) * self.n):
                tail = torch.stack([x[row] for x in twig.trail]).cpu()
                logp = torch.where(only, twig.logp[row].cpu(), torch.zeros(()))
                fork = None if len(paths) == first else (first, k)
                paths.append(Path(course, torch.cat([prefix, tail]), logp, only.clone(), images[row], fork))
        return Group(task, paths)

    def graded(self, views: list[list[Group]], grade: Grade) -> list[Group]:
        """All views judged in one call; the signals of the later ones beside those of the first."""
        flat = grade([g for groups in views for g in groups])
        size = len(views[0])
        out = flat[:size]
        for view, stride in enumerate(self.strides[1:], 1):
            others = flat[view * size : (view + 1) * size]
            out = [
                g.with_(signals={**g.signals, **{f"{name}@{stride}": value for name, value in other.signals.items()}})
                for g, other in zip(out, others)
            ]
        return out
