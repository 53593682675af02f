"""BranchGRPO (2509.06040). Paths of one prompt grow as a tree: what they share is computed once, and every depth of the tree is
judged among itself, so that early steps hear of all the leaves below them.

    xi_b   = (xi_0 + s eta_b) / sqrt(1 + s^2)                        noise of child b at a split; unit variance, siblings alike
    r(n)   = sum over the leaves l below n of w_l r_l,   w = softmax(beta log p(l | n))       beta 0: the plain mean
    A_d(n) = (r(n) - mean_d) / (std_d + eps)                          over the nodes at depth d; a transition has its child's A
    J      = mean over the tree's transitions of min(rho A, clip(rho, 1 - c, 1 + c) A)
    width pruning, depth pruning: transitions left out of the gradient, after everything is normalised
    Mix: noise at the splits and in a window of steps, none elsewhere; only transitions with noise are trained

| | here | paper, as far as known | reference code |
|---|---|---|---|
| body of the paper | not read: third-party accounts | | the code file by file |
| split noise | `Correlated` | the formula above | `Scaled`: biased |
| fusion | `uniform`; `ByPath(beta)`; `by_edges` | `ByPath` | `uniform` or `by_edges` |
| log p in the fusion | mean over elements | mean or sum not known to us | mean over elements |
| std | sample (n - 1), eps 1e-8 | "std", eps | sample |
| std below 1e-6, or one node | A is 0 | not known to us | A is 0 |
| depth of two nodes | +-.7071 whatever the rewards are | | the same |
| last step | without noise, not trained | not known to us | with noise, trained |
| picture | x0_hat of the last call | not known to us | the same |
| width pruning | `parent_top1`, `extremes`, `first_half` | the first two | the last two |
| depth pruning | a window that moves up | the same | the same, or a list |
| Mix | window where it is put, steps 0 to 3; `tau`: it moves as MixGRPO's | not known to us | steps 0 to 3 (1) |
| optimizer step | one per batch | not known to us | every 12 transitions, shuffled |

`Scaled` draws a split's noise s times as wide as its log-probability assumes. `by_edges` is the softmax over the logarithms of
a node's own transitions, applied from the leaves up, which is not the softmax over whole paths. In the reference code the
picture does not show the last step's noise, so training that step adds noise to the gradient and nothing else. Behind the last
split a leaf's transitions all have one advantage; `first_half`, which keeps the earlier half of each chain and goes there by
the name of keeping the best half, drops depths whatever the rewards are. Depth pruning leaves out `depth` depths, at first the
last ones, one further up every `every` iterations, until it begins at the last split. (1) with the script's stride of 30; with
the default of 1 every step is noisy and Mix changes nothing; it never moves with the iterations. With `tau` it does here, by
`stride` steps every `tau` iterations, and stops before the last step.

Hyper-parameters: n 16 from splits 0, 3, 6, 9 in two, 20 steps with shift 3, eta .3, s 4, clip 1e-3, lr 1e-5 (FLUX.1-dev). On a
grid too short for every third step the splits move together. Which split noise the paper's runs had is not known to us.

Cost: 203 calls of the network for 16 pictures of 20 steps, against 320 for paths without a tree (splits at 0, 1, 2, 3: 271; at
10 to 13: 121); training: one forward pass per node that has a trained transition.

On a flow of known velocity (five seeds) a tree's gradient had 1.15 [1.13, 1.18] times the signal-to-noise ratio of 10 flat
paths, which cost 200 calls, and 0.9 times that of 16 flat paths, which cost 320 (`gruppo claim branch-grpo`).

Not for: few splits that come late (the first two nodes of a depth only tell a sign), or pictures that must differ from their
first noise on: all leaves share it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from gruppo.core.advantage import standardize, std
from gruppo.core.reduce import step_mean
from gruppo.core.tree import edges, owners
from gruppo.policies.flow import course_of
from gruppo.policies.kernels import DanceSDE
from gruppo.recipe import Recipe
from gruppo.recipes.flow_grpo import Clamped, flow_grpo
from gruppo.rollouts.trajectories import but_last
from gruppo.rollouts.tree import CORRELATED, AtSplits, EveryThird, Splits, Tree
from gruppo.rollouts.window import Constant, Place, Window
from gruppo.types import Group, GruppoError

Fusion = Callable[[Tensor, Tensor, Tensor], Tensor]  # edges [G, T], logp [G, T], reward [G] -> values of children [G, T]


# ---- what a node is worth


def fused(edge: Tensor, reward: Tensor, weight: Tensor) -> Tensor:
    """[G, T] weighted mean of the rewards of the rows that share each edge; NaN where all of them abstained."""
    out = torch.full(edge.shape, torch.nan, dtype=reward.dtype)
    heard = (~reward.isnan())[:, None] & (edge >= 0)
    flat, there = edge[heard], heard.nonzero()[:, 0]
    size = int(edge.max()) + 1
    w = weight.to(reward)[heard]
    top = reward.new_zeros(size).scatter_add(0, flat, w * reward[there])
    mean = top / reward.new_zeros(size).scatter_add(0, flat, w)  # 0 / 0 = NaN
    return torch.where(edge >= 0, mean[edge.clamp(min=0)], out)


def uniform(edge: Tensor, logp: Tensor, reward: Tensor) -> Tensor:
    """The mean over the leaves below."""
    return fused(edge, reward, torch.ones_like(logp))


@dataclass(frozen=True)
class ByPath:
    """Leaves weigh softmax(beta * log p of their way from here); 1 is the probability of that way, 0 the plain mean."""

    beta: float = 1.0

    def __call__(self, edge: Tensor, logp: Tensor, reward: Tensor) -> Tensor:
        logp = logp.double()
        rest = logp.flip(1).cumsum(1).flip(1) - logp  # what comes after each step
        weight = torch.zeros_like(rest)
        for t in range(rest.shape[1]):
            for e in edge[:, t].unique().tolist():
                here = (edge[:, t] == e) & ~reward.isnan()
                weight[here, t] = (self.beta * rest[here, t]).softmax(0)
        return fused(edge, reward, weight)


def by_edges(edge: Tensor, logp: Tensor, reward: Tensor) -> Tensor:
    """Each node the mean of its children, weighed by the softmax of their own transitions' log-probabilities."""
    value = reward[:, None].repeat(1, edge.shape[1])
    for t in range(edge.shape[1] - 2, -1, -1):
        for e in edge[:, t].unique().tolist():
            rows = (edge[:, t] == e).nonzero()[:, 0].tolist()
            children = list({int(edge[r, t + 1]): r for r in reversed(rows)}.values())
            heard = [r for r in children if not bool(value[r, t + 1].isnan())]
            w = logp[heard, t + 1].to(reward).softmax(0)
            value[rows, t] = (w * value[heard, t + 1]).sum() if heard else torch.nan
    return value


@dataclass(frozen=True)
class Depthwise:
    """(r(n) - mean) / (std + eps) over the nodes of each depth; a transition has what its child has."""

    fuse: Fusion = uniform
    ddof: int = 1
    eps: float = 1e-8
    least: float = 1e-6  # a std below this is rounding

    def __call__(self, group: Group) -> Tensor:
        assert group.reward is not None
        edge = edges(group)
        value = self.fuse(edge, group.logp, group.reward)
        out = torch.zeros_like(value)
        for t in range(group.width):
            inside = edge[:, t] >= 0
            nodes, which = edge[inside, t].unique(return_inverse=True)
            r = value.new_zeros(len(nodes)).scatter(0, which, value[inside, t])  # rows of one node agree
            if float(std(r, ddof=self.ddof)) >= self.least:
                out[inside, t] = standardize(r, ddof=self.ddof, eps=self.eps)[which]
        return out


# ---- which transitions enter the gradient


def handed_over(groups: list[Group]) -> list[Group]:
    """A transition whose first row abstained is trained by the next row that shares it."""

    def one(group: Group) -> Group:
        assert group.reward is not None
        if not bool(group.reward.isnan().any()):
            return group
        free = torch.stack([course_of(p).stochastic for p in group.paths]) & ~group.reward.isnan()[:, None]
        mask = owners(edges(group), free)
        return group.with_(paths=[replace(p, mask=m) for p, m in zip(group.paths, mask)])

    return [one(g) for g in groups]


def last_split(group: Group) -> int:
    """The step at which the last rows came into being."""
    return max((p.fork[1] for p in group.paths if p.fork is not None), default=0)


def parent_top1(group: Group) -> Tensor:
    """[G, T] kept: behind the last split, of the leaves of one parent the best; before it, everything."""
    assert group.reward is not None
    at = last_split(group)
    family = edges(group)[:, at - 1] if at else torch.zeros(len(group), dtype=torch.long)
    reward = group.reward.nan_to_num(nan=-torch.inf)
    keep = torch.ones(len(group), group.width, dtype=torch.bool)
    keep[:, at + 1 :] = False
    for parent in family.unique().tolist():
        rows = (family == parent).nonzero()[:, 0]
        keep[rows[reward[rows].argmax()]] = True
    return keep


def extremes(group: Group) -> Tensor:
    """[G, T] kept: behind the last split, the best and the worst quarter of the leaves; before it, everything."""
    assert group.reward is not None
    heard = (~group.reward.isnan()).nonzero()[:, 0]
    order = heard[group.reward[heard].argsort(descending=True, stable=True)]
    many = max(2, len(group) // 2)
    keep = torch.ones(len(group), group.width, dtype=torch.bool)
    keep[:, last_split(group) + 1 :] = False
    keep[order[: many // 2]] = True
    keep[order[len(order) - many // 2 :]] = True
    return keep


def first_half(group: Group) -> Tensor:
    """[G, T] kept: the earlier half of the steps behind the last split, in every row, whatever the rewards are."""
    begin = last_split(group) + 1
    keep = torch.ones(len(group), group.width, dtype=torch.bool)
    keep[:, begin + (group.width - begin) // 2 :] = False
    return keep


@dataclass
class DepthWindow:
    """A window of depths that are left out; it begins at the last ones and moves up by one every `every` iterations."""

    width: int
    every: int
    seen: int = 0  # iterations

    def __post_init__(self) -> None:
        if self.width < 1 or self.every < 1:
            raise GruppoError(
                f"the depth window is {self.width} wide and moves every {self.every} iterations; both must be at least 1"
            )

    def steps(self, T: int, stop: int) -> list[int]:
        """The steps that are left out now; the transition to depth d is step d - 1. The window begins at `stop` or later."""
        if self.width >= T:
            raise GruppoError(f"the depth window leaves out {self.width} depths, but a tree of {T} steps has only {T}")
        begin = T - self.width + 1
        begin -= min(self.seen // self.every, max(0, begin - stop))
        return [d - 1 for d in range(begin, begin + self.width) if 1 <= d <= T]

    def update(self, groups: list[Group]) -> None:
        self.seen += 1

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


@dataclass(frozen=True)
class Pruned:
    """Narrows masks after the advantages are made; what is left out neither trains nor counts."""

    width: Callable[[Group], Tensor] | None = None
    depth: DepthWindow | None = field(default=None)

    def __call__(self, groups: list[Group]) -> list[Group]:
        return [self.one(g) for g in handed_over(groups)]

    def one(self, group: Group) -> Group:
        keep = torch.ones(len(group), group.width, dtype=torch.bool) if self.width is None else self.width(group)
        if self.depth is not None:
            keep[:, self.depth.steps(group.width, last_split(group))] = False
        return group.with_(paths=[replace(p, mask=p.mask & k[: len(p)]) for p, k in zip(group.paths, keep)])


# ---- the recipe


def splitting(splits: Sequence[int] | None, n: int, fan: int) -> Splits:
    """These splits, or as many as n leaves need."""
    if splits is not None:
        return tuple(splits)
    return EveryThird(next(m for m in range(1, 64) if fan**m >= n))


def branch_grpo(
    n: int = 16,
    splits: Sequence[int] | None = None,
    fan: int = 2,
    eta: float = 0.3,
    noise: Callable = CORRELATED,
    fuse: Callable = uniform,
    clip: float = 1e-3,
    beta: float = 0.0,
    width: Callable | None = None,
    depth: int | None = None,
    every: int = 30,
    noisy: Callable = but_last,
) -> Recipe:
    """Paths grow as a tree, and a transition is worth what the leaves below it earn, against its own depth."""
    if fan < 2:
        raise GruppoError(f"every split has {fan} children; it needs at least 2")
    at = splitting(splits, n, fan)
    tree = Tree(at, fan, DanceSDE(eta), noise, noisy)
    if tree.n != n:
        raise GruppoError(
            f"paths_per_prompt is {n}, but its splits into {fan} make {tree.n} leaves; choose a power of {fan}, or other splits"
        )
    window = None if depth is None else DepthWindow(depth, every)
    return replace(
        flow_grpo(n, clip=clip, beta=beta),
        rollout=tree,
        advantage=Clamped(Depthwise(fuse)),
        reduce=step_mean,
        across=handed_over if width is None and window is None else Pruned(width, window),
        state=() if window is None else (window,),
    )


def branch_grpo_mix(
    n: int = 16,
    splits: Sequence[int] | None = None,
    begin: int = 0,
    window: int = 4,
    eta: float = 0.3,
    clip: float = 1e-3,
    tau: int | None = None,
    stride: int = 1,
) -> Recipe:
    """BranchGRPO with noise at the splits and in a window of steps only."""
    if tau is None and stride != 1:
        raise GruppoError(f"the window is to move by {stride} steps, but nothing says when: give tau, in iterations")
    at = AtSplits(splitting(splits, n, 2), begin, window)
    moving = None if tau is None else Window(window, Constant(tau), stride, spare=1, place=Place(begin))
    at = replace(at, moving=moving)
    base = branch_grpo(n, splits, eta=eta, clip=clip, noisy=at)
    return base if moving is None else replace(base, state=(moving,))
