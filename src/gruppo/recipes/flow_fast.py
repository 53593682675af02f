"""Flow-GRPO-Fast (2505.05470, v5) and its two companions. Noise only in a short window at a random early place.

    Fast:   start ~ Uniform{r0, .., r1 - w};  SDE on [start, start + w), ODE elsewhere; only the window is trained
    CPS:    sd = sigma' sin(eta pi / 2),  logp = -mean (x' - mu)^2                                         (2509.05952)
    Guard:  rho_t = exp( (logp - logp_old + |mu - mu_old|^2 / (2 sd^2)) sd ),  loss_t / h                  (2510.22319)

GRPO-Guard: the log-ratio of two Gaussians has the negative mean -|mu - mu_old|^2 / (2 sd^2) under the policy that sampled, and a
spread of 1/sd, so ratios sit left of the clip range, and the more so the later the step. Adding the mean back and multiplying
by sd centres them and gives all steps one scale; the gradient's own scale is taken back by 1/h.

| | here | paper | reference code |
|---|---|---|---|
| place of the window | one draw per iteration | random | one per call; in the Qwen script constant per rank |
| children of one latent | no: every path has its own prefix | not said | July 2025: yes; October 2025: no |
| last step of CPS | not trained: it draws nothing | not said | logp 0, then a ratio that is not of a distribution |
| Guard's bias | per path | per path | SD3: one number for the whole micro-batch (a mean over an empty tuple of axes) |
| sd in Guard | of each step | of each step | batch mean of s times the mean of sqrt(h) |

Hyper-parameters: Fast with SD3.5-M: w 3 in steps 0 to 4, CPS eta .8, clip 1e-5, beta 0, n 24, no guidance while sampling; Guard:
clip 2e-6, lr 1e-4, beta 0. Clip ranges go with the mean over some 1e5 latent elements.

Cost: T calls to sample, w with gradient.

Not for: CPS with a closed-form divergence or with weights by sd: its log-density has no variance in it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gruppo.core.reduce import sequence_mean
from gruppo.core.surrogate import PPOClip
from gruppo.policies.kernels import CPS, FlowSDE
from gruppo.recipe import Recipe
from gruppo.recipes.flow_grpo import Clamped, Compared, flow_grpo
from gruppo.recipes.grpo import total
from gruppo.rollouts.trajectories import Share, Trajectories, but_last, everywhere
from gruppo.rollouts.window import RandomWindow
from gruppo.types import Batch, GruppoError, Scope, Steps, pad


def flow_grpo_fast(
    n: int = 24,
    window: int = 3,
    begin: int = 0,
    end: int = 5,
    eta: float = 0.8,
    clip: float = 1e-5,
    cps: bool = True,
    eps: float = 1e-4,
) -> Recipe:
    """Flow-GRPO with noise in a short random window of early steps, the only ones that are trained."""
    return Recipe(
        rollout=Trajectories(n, CPS(eta) if cps else FlowSDE(eta), RandomWindow(window, begin, end)),
        reward=total,
        advantage=Clamped(Compared(ddof=0, eps=eps)),
        loss=PPOClip(clip, clip, scope="step"),
        reduce=sequence_mean,
    )


def flow_cps(n: int = 24, eta: float = 0.8, clip: float = 1e-5, share: float = 0.99, eps: float = 1e-4) -> Recipe:
    """Flow-GRPO whose steps keep the coefficients of picture and noise, so that no step is noisier than the grid says."""
    base = flow_grpo(n, 0.7, clip, 0.0, share=share, eps=eps)
    return replace(base, rollout=Trajectories(n, CPS(eta), but_last, Share(share)))


@dataclass(frozen=True)
class Guarded:
    """PPO's clip on ratios that are centred and brought to one scale, divided by the step size."""

    low: float
    high: float
    scope: Scope = "step"

    def __call__(self, batch: Batch, now: Steps, ref: Steps | None) -> tuple[Tensor, dict[str, Tensor]]:
        if now.mean is None or now.std is None:
            raise GruppoError("GRPO-Guard reads the means of Gaussian steps, which this policy does not report")
        sd = now.std.flatten(2)[:, :, 0]
        bias = (now.mean - old_means(batch, now.mean)).square().flatten(2).mean(2) / (2 * sd.square())
        rho = torch.where(batch.mask, ((now.logp - batch.logp_old + bias) * sd).exp(), torch.ones_like(sd))
        A = batch.advantage
        loss = torch.maximum(-rho * A, -rho.clamp(1 - self.low, 1 + self.high) * A) / step_sizes(batch)
        low = (rho < 1 - self.low) & (A < 0)
        high = (rho > 1 + self.high) & (A > 0)
        return loss, {"ratio": rho, "clip_low": low.float(), "clip_high": high.float()}


def old_means(batch: Batch, like: Tensor) -> Tensor:
    """[B, T, ...] the means that the sampler drew around."""
    out = torch.zeros_like(like)
    for i, path in enumerate(batch.paths):
        if path.mean is None:
            raise GruppoError("GRPO-Guard reads the sampler's means; its rollout must keep them (keep_means)")
        out[i, : len(path)] = path.mean.to(like)
    return out


def step_sizes(batch: Batch) -> Tensor:
    """[B, T] h of every step, 1 beyond a path's end."""
    rows = [path.prompt.sigmas[:-1] - path.prompt.sigmas[1:] for path in batch.paths]
    return pad(rows, batch.mask.shape[1], 1.0).to(batch.advantage)


def grpo_guard(
    n: int = 24, eta: float = 0.7, clip: float = 2e-6, share: float = 0.99, last: bool = True, eps: float = 1e-4
) -> Recipe:
    """Flow-GRPO with ratios that are centred and of one scale at all steps, so that the clip range holds on both sides."""
    base = flow_grpo(n, eta, clip, 0.0, share=share, eps=eps)
    rollout = Trajectories(n, FlowSDE(eta), everywhere if last else but_last, Share(share), keep_means=True)
    return replace(base, rollout=rollout, loss=Guarded(clip, clip))
