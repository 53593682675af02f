"""Grids of noise levels from noise (first) to picture (last), as float64 tensors [steps + 1].

    rectified flow   sigma itself, 1 = noise; shifting by s >= 1 keeps the ends and spends more steps near the noise
    DDIM             sigma = sqrt(1 - abar), as the kernel `DDIM` counts

These are formulas and need no pipeline. A painter of a diffusers pipeline reads its pipeline's own scheduler, and takes one of
these instead where a method asks for it: `painter.grid = partial(linear, shift=3.0)`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gruppo.types import GruppoError


def shifted(t: Tensor, shift: float) -> Tensor:
    """shift t / (1 + (shift - 1) t)"""
    return shift * t / (1 + (shift - 1) * t)


def exponentially_shifted(t: Tensor, mu: float) -> Tensor:
    """e^mu / (e^mu + 1/t - 1): the same curve as `shifted` by e^mu, and 0 at t = 0."""
    return shifted(t, math.exp(mu))


def linear(steps: int, shift: float = 1.0) -> Tensor:
    """Equal steps from 1 to 0, then shifted: DanceGRPO, MixGRPO, BranchGRPO."""
    return shifted(_even(1.0, 0.0, _counted(steps) + 1), shift)


def twice_shifted(steps: int, shift: float, train_steps: int = 1000) -> Tensor:
    """Stable Diffusion 3 in diffusers: equal steps between the shifted ends of the training grid, shifted again, and 0."""
    least = float(shifted(torch.tensor(1 / train_steps, dtype=torch.float64), shift))
    return _and_zero(shifted(_even(1.0, least, _counted(steps)), shift))


def resolution_shift(tokens: int, low: tuple[int, float] = (256, 0.5), high: tuple[int, float] = (4096, 1.15)) -> float:
    """mu of a picture of this many tokens: the line through (tokens, mu) `low` and `high`. FLUX's numbers are the defaults."""
    (a, mu_a), (b, mu_b) = low, high
    return mu_a + (tokens - a) * (mu_b - mu_a) / (b - a)


def resolution_shifted(steps: int, mu: float, terminal: float | None = None) -> Tensor:
    """FLUX and Qwen-Image: 1, (N-1)/N .. 1/N shifted by e^mu, and 0.

    With `terminal` (Qwen-Image: 0.02) the grid is stretched so that the last level before 0 is that one.
    """
    sigmas = exponentially_shifted(_even(1.0, 1 / _counted(steps), steps), mu)
    if terminal is not None:
        if steps < 2:
            raise GruppoError(f"a grid of {steps} step cannot be stretched to end at {terminal}: its only level is the noise")
        sigmas = 1 - (1 - sigmas) * ((1 - terminal) / (1 - sigmas[-1]))
    return _and_zero(sigmas)


def unipc(steps: int, shift: float, train_steps: int = 1000) -> Tensor:
    """Wan under UniPC with flow sigmas: equal steps from 1 towards 1/train_steps, shifted; the first level is 1 - 1e-6."""
    sigmas = shifted(_even(1.0, 1 / train_steps, _counted(steps) + 1)[:-1], shift)
    sigmas[0] = min(float(sigmas[0]), 1 - 1e-6)
    return _and_zero(sigmas)


def unipc_below_one(steps: int, shift: float, train_steps: int = 1000) -> Tensor:
    """The same in diffusers 0.36 and before: the equal steps begin at 1 - 1/train_steps and go towards 0."""
    return _and_zero(shifted(_even(1 - 1 / train_steps, 0.0, _counted(steps) + 1)[:-1], shift))


def scaled_linear_abar(train_steps: int = 1000, first: float = 0.00085, last: float = 0.012) -> Tensor:
    """abar [train_steps] of Stable Diffusion 1: betas whose square roots grow in equal steps."""
    betas = _even(first**0.5, last**0.5, train_steps).square()
    return (1 - betas).cumprod(0)


def ddim_timesteps(steps: int, train_steps: int = 1000, offset: int = 1) -> list[int]:
    """The timesteps at which DDIM asks the network ("leading"): for 50 steps 981, 961, .. 1."""
    stride = train_steps // _counted(steps)
    if stride < 1:
        raise GruppoError(f"DDIM is to take {steps} steps, but the network was trained on {train_steps} timesteps")
    return [min(i * stride + offset, train_steps - 1) for i in reversed(range(steps))]


def ddim(abar: Tensor, steps: int, offset: int = 1, to_one: bool = False) -> Tensor:
    """sqrt(1 - abar) at these timesteps, and the level where the walk ends: that of abar[0], or 0 with `to_one`."""
    abar = abar.double()
    path = abar[ddim_timesteps(steps, len(abar), offset)]
    return (1 - torch.cat([path, torch.ones_like(abar[:1]) if to_one else abar[:1]])).sqrt()


def _even(begin: float, end: float, n: int) -> Tensor:
    return torch.linspace(begin, end, n, dtype=torch.float64)


def _and_zero(sigmas: Tensor) -> Tensor:
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def _counted(steps: int) -> int:
    if steps < 1:
        raise GruppoError(f"a grid of {steps} steps was asked for; it needs at least 1")
    return steps
