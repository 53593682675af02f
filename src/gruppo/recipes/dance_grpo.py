"""DanceGRPO (2505.07818). Every picture of a prompt begins at the same noise; noise of constant strength is drawn on the way.

    x_{t+1} = x + [v - eta^2/2 score] dt + eta sqrt(h) eps,    score = -(x - (1 - sigma) x0_hat) / sigma^2
    A_i     = sum_k w_k (r_i^k - mean_k) / (std_k + eps)                     each reward normalised by itself, then added
    rho_t   = exp(logp - logp_old),   logp = mean over latent elements
    J       = 1/G sum_i 1/|S_i| sum_{t in S_i} min(rho_t A_i, clip(rho_t, 1 - c, 1 + c) A_i)
    S_i     = a random part tau of path i's steps, drawn for each path

The picture is what the network expects at its last call, x0_hat: the last step draws no noise and is not trained. For networks
that predict epsilon (SD 1.x) the step is DDIM with noise (`ddim` = its eta).

| | here | paper | reference code |
|---|---|---|---|
| trained steps | int((T - 1) tau); with `up` ceil(tau T) of the T - 1 | ceil(tau T) | int((T - 1) tau) |
| log-density | mean over elements | sum | mean over elements |
| std | sample (n - 1), eps 1e-8 | "std" | the same |
| advantage | clamped to +-5 | not said | the same |
| several rewards | normalised, then added (`weights`) | the same | the same; Hunyuan adds two clipped losses |
| best-of-N | `best`: upper and lower half; the rest trains and weighs nothing | the same | the same; odd: one more from the top |
| optimizer steps | `updates` equal parts of a batch | 4 per iteration | every few samples of a rank |
| told noise level | sigma | not said | int(1000 sigma) / 1000 |
| diffusion step | DDIM | Euler step of an SDE | DDIM, eta 1 |
| first noise of SD 1.x | one per prompt | one per prompt | one for the whole batch |
| a reward that fails | abstains: the path is left out | not said | -1 |
| KL | none | none | none |

At toy scale (`gruppo claim dance-grpo`, 5 seeds) one first noise per prompt raises the signal-to-noise ratio of the steps'
gradients 4.0 [3.3, 4.8] times, with eta .3; it is the steps' own noise that is compared then.

Hyper-parameters: n 12, eta .3, tau .6, clip 1e-4, lr 1e-5, 4 updates, 25 steps (16 in the FLUX script), shift 3. The clip range
goes with the mean over some 1e5 elements.

Cost: T network calls per path to sample, int((T - 1) tau) with gradient. With `best` the dropped paths are sampled and scored
but not trained.

Not for: classifier-free guidance with several updates per rollout (the authors advise one then), or rewards in a single number
whose parts differ much in scale without `weights`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from gruppo.core.reduce import sequence_mean
from gruppo.core.surrogate import PPOClip
from gruppo.policies.kernels import DDIM, DanceSDE
from gruppo.recipe import Recipe, unchanged, whole
from gruppo.recipes.flow_grpo import Clamped, Compared
from gruppo.recipes.gdpo import Columns, Decoupled
from gruppo.recipes.grpo import total
from gruppo.recipes.multi_objective import listed, objectives
from gruppo.rollouts.trajectories import RandomShare, Trajectories, but_last
from gruppo.types import Batch, Group, GruppoError


@dataclass(frozen=True)
class Best:
    """Only the `keep` paths of a group with the highest and lowest rewards train: the upper half from the top, the rest below."""

    keep: int

    def __post_init__(self) -> None:
        if self.keep < 2:
            raise GruppoError(
                f"best-of-N is to keep {self.keep} paths of a group; it needs one from the top and one from the bottom"
            )

    def __call__(self, groups: list[Group]) -> list[Group]:
        return [self.narrowed(g) for g in groups]

    def narrowed(self, group: Group) -> Group:
        assert group.reward is not None
        reward = group.reward if group.reward.dim() == 1 else group.reward.sum(1)
        heard = [i for i in reward.argsort().tolist() if not bool(reward[i].isnan())]
        if self.keep >= len(heard):
            return group
        top = (self.keep + 1) // 2
        kept = {*heard[len(heard) - top :], *heard[: self.keep - top]}
        paths = [p if i in kept else replace(p, mask=torch.zeros_like(p.mask)) for i, p in enumerate(group.paths)]
        return group.with_(paths=paths)


@dataclass(frozen=True)
class Parts:
    """`parts` optimizer steps per batch; part j trains the rows j, j + parts, j + 2 parts, ... so every prompt is in each."""

    parts: int
    splits_groups = True

    def __call__(self, batch: Batch) -> Iterable[Batch]:
        live = batch.mask.any(1).nonzero()[:, 0].tolist()
        if self.parts > len(batch):
            raise GruppoError(f"a batch of {len(batch)} paths cannot be cut into {self.parts} optimizer steps")
        parts = min(self.parts, len(live))  # where most rewards abstained: fewer steps, none of them empty
        for j in range(parts):
            yield batch.rows(live[j::parts])


def dance_grpo(
    n: int = 12,
    eta: float = 0.3,
    tau: float = 0.6,
    clip: float = 1e-4,
    updates: int = 4,
    weights: Mapping[str, int | float] | None = None,
    best: int | None = None,
    shared_noise: bool = True,
    ddim: float | None = None,
    up: bool = False,
    eps: float = 1e-8,
) -> Recipe:
    """Shared first noise, a random part of the steps trained, and rewards that are normalised before they are added."""
    named = None if weights is None else listed(weights)
    return Recipe(
        rollout=Trajectories(
            n, DanceSDE(eta) if ddim is None else DDIM(ddim), but_last, RandomShare(tau, up), shared_noise=shared_noise
        ),
        reward=total if named is None else Columns(named),
        advantage=Clamped(Compared(ddof=1, eps=eps) if named is None else Decoupled(named, ddof=1, eps=eps)),
        loss=PPOClip(clip, clip, scope="step"),
        reduce=sequence_mean,
        across=unchanged if best is None else Best(best),
        cadence=whole if updates == 1 else Parts(updates),
        needs=() if named is None else objectives(named),
    )
