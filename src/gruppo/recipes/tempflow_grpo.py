"""TempFlow-GRPO (2508.04324). A reward at the end says little about one step of many: branch at one step, owe it what the
branch earns, and weigh the steps by how much noise they can bring in.

    x_k+1(c) = K children of the trunk's x_k by one stochastic step, each finished without noise
    A_k(c)   = (r_k(c) - mean) / (std + eps)     over the K children of the same prompt, noise and step (the seed group)
    w_k      = sd_k / mean_k(sd),  sd_k = s_k sqrt(h_k)                          mean 1 over the trained steps
    J        = mean over prompts, seeds, steps k and children c of  w_k { min(rho A, clip(rho, 1 - c, 1 + c) A) - beta KL_k }
    KL_k     = mean_D (mu - mu_ref)^2 / (2 s_k^2 h_k)

The gradient of a step's log-density grows as |d mu / d v| / sd: tiny at the first steps, where a branch decides most, and large
at the last ones, where children hardly differ. The weight turns it into one that is proportional to h.

| | here | paper, as far as known | reference code |
|---|---|---|---|
| body of the paper | not read: third-party accounts | | the code file by file |
| w_k | over the mean of this batch's trained steps | mean 1 | `constant` * sd_k |
| constant | none | | 2.25 (SD3.5), 1.73 (FLUX) |
| group | `by_seed`: prompt and noise; `by_prompt` | prompt and noise | the same at batch 1 per rank |
| std | population, eps 1e-4, clamped to +-5 | "std" | the same |
| branched steps | all but the last | not known to us | all but the last |
| KL | with h; weighted by w_k as well | not known to us | with h; not weighted |
| first two epochs | trained | not known to us | left out |

The constants of the reference code are 1 / mean(sd) of one grid and eta each; here the mean is that of the steps trained, so it
is right for any grid, eta and kernel.

Hyper-parameters: K 6, 4 seeds, eta .7, clip 1e-4, beta .004 (GenEval) or .001 (PickScore), 10 steps (SD3.5-M); FLUX.1-dev eta
.9.

Cost: with N steps and K children a seed needs N - 1 calls of the network for its trunk and K ((N - 1) + ... + 1) for the
endings: 279 at N 10, K 6, so 1116 per prompt where Flow-GRPO paints 24 pictures in 240. 216 pictures are judged instead of 24.
Training costs less: one forward pass per seed and step, shared by its children.

On a flow of known velocity (five seeds) a step's gradient had at least 2.5 [2.1, 3.0] times the signal-to-noise ratio of plain
paths' at 4.5 times the network calls (`gruppo claim tempflow-grpo`); the weight raised that of the whole gradient 1.06 [1.02,
1.10] times on branches and 1.37 times on plain paths (`gruppo claim tempflow-grpo/weight`). Trained for 30 iterations, branches
without the weight ended 0.234 [0.058, 0.410] above plain paths and 0.077 +- 0.078 above as many calls of plain paths, and the
weight changed nothing (`gruppo claim tempflow-grpo/alone`).

Not for: a dear judge, or late steps alone: their children are nearly the same picture, and the group's std blows the judge's
noise up to full advantages. Without the weight (`weighted=False`) this happens at every late step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gruppo.core.reduce import step_mean
from gruppo.policies.flow import course_of
from gruppo.policies.kernels import FlowSDE
from gruppo.recipe import Recipe
from gruppo.recipes.flow_grpo import flow_grpo
from gruppo.rollouts.branching import Branches, by_seed
from gruppo.types import Batch, GruppoError


def deviations(batch: Batch) -> Tensor:
    """[B, T] the deviation of each step's Gaussian; 0 where it draws nothing."""
    out = torch.zeros(batch.mask.shape, device=batch.mask.device)
    for i, path in enumerate(batch.paths):
        out[i, : len(path)] = course_of(path).deviations.to(out)
    return out


@dataclass(frozen=True)
class NoiseAware:
    """Steps weigh what noise they inject. Without `constant` the weights' mean over the trained steps is 1, on any grid.

    The mean is that of one optimizer step: a cadence that trains one denoising step at a time (G2RPO's) makes every weight 1.
    It is meant for log-densities with a variance (FlowSDE, DanceSDE): those of CPS have none, and their gradients hold the factor
    sd already.
    """

    constant: float | None = None

    def __post_init__(self) -> None:
        if self.constant is not None and not self.constant > 0:
            raise GruppoError(f"the noise-aware weight is {self.constant} * sd; a weight must be greater than 0")

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        raw = batch.mask * deviations(batch)
        if self.constant is None:
            return raw, raw.sum()
        return self.constant * raw, batch.mask.sum().float()


def tempflow_grpo(
    n: int = 6,
    seeds: int = 4,
    eta: float = 0.7,
    clip: float = 1e-4,
    beta: float = 0.004,
    compared: Callable = by_seed,
    weighted: bool = True,
    constant: float | None = None,
    eps: float = 1e-4,
) -> Recipe:
    """Children of one step share all else, so their rewards judge that step; steps weigh what noise they inject."""
    if constant is not None and not weighted:
        raise GruppoError(f"the weight's constant is {constant}, but the steps are not weighted; remove one of the two")
    return replace(
        flow_grpo(n, eta, clip, beta, eps=eps),
        rollout=Branches(n, FlowSDE(eta), seeds=seeds, compared=compared),
        reduce=NoiseAware(constant) if weighted else step_mean,
    )
