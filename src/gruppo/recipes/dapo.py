"""DAPO (2503.14476). Five repairs for long chains of thought: a higher upper clip, undecided groups only, the token mean, a soft
length penalty, and optionally no training on truncated paths.

    J   = 1 / (sum_i |o_i|) sum_i sum_t min(rho A_i, clip(rho, 1 - 0.2, 1 + 0.28) A_i),    subject to 0 < #correct < G
    r_i = score_i + soft(|o_i|)
    soft(y) = 0                        y <= length - cache
              ((length - cache) - y) / cache    up to `length`
              -1                       beyond

| | here | paper | reference code (verl recipe/dapo) |
|---|---|---|---|
| std | sample (n - 1), eps 1e-6 | "std" | n - 1, 1e-6 |
| dynamic sampling | on the raw signal `correct` | 0 < #correct < G | std of the metric `acc` > 0 |
| one draw | prompts_per_step prompts | not said | 3 x that |
| surplus groups | dropped | not said | dropped |
| too few groups | the run stops after `refills` = 10 refills | not said | error after 10 generation batches, refills included |
| soft penalty beyond `length` | held at -1 | -1 | goes on falling |
| truncated paths | trained; `drop_truncated=True` masks them, counted in the group's mean | masked in one ablation | trained |
| dual clip for A < 0 | off; `dual=10.0` as in the script | none | 3.0 by default, 10.0 in the script |
| updates per rollout | `parts` = 1 | 16 of 32 prompts | 16 |
| KL | none | none | none |

With one update per rollout the ratios are 1 and the clip does nothing: raise `parts` to 16 for the paper's schedule. Set
`length` to the run's max_new_tokens and `cache` to about a fifth of it; with a smaller max_new_tokens the penalty never acts.

Hyper-parameters: n 16, 512 prompts, lr 1e-6 with 10 warm-up steps, weight decay 0.1, length 20480, cache 4096, T 1, gradient
clip 1 (authors' script).

Cost: sampling. A step draws whole batches until enough groups are undecided, up to `refills` + 1 of them; groups beyond the
number asked for are sampled in vain. No reference.

Not for: tasks without a right-or-wrong grade, and models that solve nearly all or nearly none of them: the run then stops. The
training reward is measured on selected groups and says little about ability; read the held-out score.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gruppo.core.collate import Passes
from gruppo.core.reduce import step_mean
from gruppo.core.surrogate import PPOClip
from gruppo.recipe import Recipe, Signal, unchanged, whole
from gruppo.recipes.grpo import GroupNorm, total
from gruppo.rollouts import Dynamic, Parallel
from gruppo.types import Group, GruppoError


@dataclass(frozen=True)
class Overlong:
    """reward + soft(|o|): nothing up to length - cache, then a straight line down to -1 at `length`, and -1 beyond (Eq. 13)."""

    reward: Callable[[Group], Tensor]
    length: int
    cache: int

    def __post_init__(self) -> None:
        if not 0 < self.cache < self.length:
            raise GruppoError(
                f"the soft length penalty grows over the last {self.cache} of {self.length} steps; `cache` must lie between 1 "
                f"and {self.length - 1}"
            )

    def __call__(self, group: Group) -> Tensor:
        steps = torch.tensor([float(len(p)) for p in group.paths])
        raw = self.reward(group)
        return raw + ((self.length - self.cache - steps) / self.cache).clamp(-1.0, 0.0).to(raw)


def without_truncated(groups: list[Group]) -> list[Group]:
    """Paths that ran into the length limit train nothing; the group's mean and std have counted them already."""

    def narrowed(group: Group) -> Group:
        paths = [replace(p, mask=torch.zeros_like(p.mask)) if p.truncated else p for p in group.paths]
        return group.with_(paths=paths)

    return [narrowed(g) for g in groups]


def dapo(
    n: int = 16,
    length: int = 20480,
    cache: int = 4096,
    low: float = 0.2,
    high: float = 0.28,
    eps: float = 1e-6,
    refills: int = 10,
    parts: int = 1,
    dual: float | None = None,
    drop_truncated: bool = False,
) -> Recipe:
    """Clip-higher, dynamic sampling on raw correctness, the token mean, and a soft penalty for overlong paths."""
    return Recipe(
        rollout=Dynamic(Parallel(n), signal="correct", refills=refills),
        reward=Overlong(total, length, cache),
        advantage=GroupNorm(ddof=1, eps=eps),
        loss=PPOClip(low, high, dual=dual),
        reduce=step_mean,
        across=without_truncated if drop_truncated else unchanged,
        cadence=whole if parts == 1 else Passes(1, parts),
        needs=(Signal("correct", "dynamic sampling keeps the groups with 0 < #correct < G"),),
    )
