"""One denoising step as a Gaussian: where its mean is, how wide it is, and how likely the latent is that was drawn.

    sigma      noise level of the latent, 1 = pure noise, 0 = picture; a step goes from sigma to sigma_next < sigma
    h          sigma - sigma_next > 0
    level      the strength s of the noise that a step injects; 0 makes the step deterministic, whatever the kernel
    x0_hat     the clean picture that the network expects:  x - sigma v          (rectified flow, v = x1 - x0)

Everything here is a pure function of tensors in float32. Noise is an argument, so that the same function samples and reads.
The log-density is the MEAN over the latent's elements, not the sum: clip ranges of 1e-4 mean nothing otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from gruppo.types import GruppoError

ONE = 1e-6  # a grid that starts at "1" may hold 1.0000000000000002, which must not come under a root as 1 - sigma < 0
HAIR = 0.1  # of its first step: a grid that begins nearer to 1 than this begins at pure noise


@runtime_checkable
class Kernel(Protocol):
    """The law of a stochastic step. Sigmas, levels and deviations are [B] or [T]; latents are [B, ...]."""

    def levels(self, sigmas: Tensor) -> Tensor:
        """[T] noise levels of the steps of a grid [T + 1]."""
        ...

    def clean(self, x: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
        """The picture that the network expects at the end."""
        ...

    def mean(self, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, level: Tensor) -> Tensor:
        """The mean of the next latent; at level 0, the next latent."""
        ...

    def deviation(self, sigma: Tensor, sigma_next: Tensor, level: Tensor) -> Tensor:
        """The standard deviation of the next latent around its mean, per step."""
        ...

    def logp(self, after: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """[B] log-density of the next latent, averaged over its elements."""
        ...


def over(value: Tensor, x: Tensor) -> Tensor:
    """[B] numbers shaped so that they multiply [B, ...] latents."""
    return value.to(x).reshape(-1, *[1] * (x.dim() - 1))


def mean_over_elements(x: Tensor) -> Tensor:
    """[B, ...] -> [B]"""
    return x.flatten(1).mean(1)


def gaussian_logp(after: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """mean_D [ -(after - mean)^2 / (2 sd^2) - log sd - log sqrt(2 pi) ]"""
    return -mean_over_elements((after - mean).square()) / (2 * std.square()) - std.log() - 0.5 * math.log(2 * math.pi)


def flow_clean(x: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    """x - sigma v"""
    return x - over(sigma, x) * v


def flow_ode(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """x + (sigma' - sigma) v"""
    return x + over(sigma_next - sigma, x) * v


def flow_sde_mean(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, level: Tensor) -> Tensor:
    """x (1 + s^2/(2 sigma) dt) + v (1 + s^2 (1 - sigma)/(2 sigma)) dt: the SDE whose marginals are the ODE's."""
    dt = sigma_next - sigma
    pull = level.square() / (2 * sigma)
    return x * over(1 + pull * dt, x) + v * over((1 + pull * (1 - sigma)) * dt, x)


@dataclass(frozen=True)
class FlowSDE:
    """Flow-GRPO (2505.05470): s = eta sqrt(sigma / (1 - sigma)); at sigma = 1 the grid's second value takes sigma's place.

    So it does where the grid begins a hair below 1, as UniPC's grids do (0.999999, in older releases 0.9997): s would be 700
    or 38 there, and one Euler step would multiply the latent by -4000 or -12.
    """

    eta: float = 0.7

    def __post_init__(self) -> None:
        _positive(type(self).__name__, self.eta)

    def levels(self, sigmas: Tensor) -> Tensor:
        sigma = sigmas[:-1].double()
        noise = sigma >= 1 - ONE
        noise[0] |= 1 - sigma[0] < HAIR * (sigma[0] - sigmas[1])
        below = torch.where(noise, sigmas[1].double(), sigma)
        return self.eta * (sigma.clamp(max=1.0) / (1 - below)).sqrt()

    def clean(self, x: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
        return flow_clean(x, v, sigma)

    def mean(self, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, level: Tensor) -> Tensor:
        return flow_sde_mean(x, v, sigma, sigma_next, level)

    def deviation(self, sigma: Tensor, sigma_next: Tensor, level: Tensor) -> Tensor:
        return level * (sigma - sigma_next).sqrt()

    def logp(self, after: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        return gaussian_logp(after, mean, std)


@dataclass(frozen=True)
class DanceSDE(FlowSDE):
    """DanceGRPO (2505.07818): the same step with a constant s = eta; finite at sigma = 1."""

    eta: float = 0.3

    def levels(self, sigmas: Tensor) -> Tensor:
        return torch.full((len(sigmas) - 1,), self.eta, dtype=torch.float64)


@dataclass(frozen=True)
class WanSDE(FlowSDE):
    """The Wan script of yifan123/flow_grpo: s = S_T + (S_1 - S_T) sigma; no eta and no special case at sigma = 1."""

    eta: float = 1.0  # not used by the script; scales s

    def levels(self, sigmas: Tensor) -> Tensor:
        S = sigmas.double()
        return self.eta * (S[-1] + (S[1] - S[-1]) * S[:-1])


@dataclass(frozen=True)
class CPS:
    """Flow-CPS (2509.05952): the mean keeps the coefficients of x0 and x1, sd = sigma' sin(eta pi / 2).

    Its log-probability is -mean (after - mean)^2, without variance and constants. It does not have the data's marginals in
    the limit of many steps. The last step (sigma' = 0) draws nothing and cannot be trained.
    """

    eta: float = 0.8

    def __post_init__(self) -> None:
        if not 0 < self.eta <= 1:
            raise GruppoError(f"eta of CPS is {self.eta}; it turns sigma' into noise by sin(eta pi / 2), so it lies in (0, 1]")

    def levels(self, sigmas: Tensor) -> Tensor:
        return sigmas[1:].double() * math.sin(self.eta * math.pi / 2)  # the deviation itself

    def clean(self, x: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
        return flow_clean(x, v, sigma)

    def mean(self, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, level: Tensor) -> Tensor:
        x0, x1 = flow_clean(x, v, sigma), x + over(1 - sigma, x) * v
        return over(1 - sigma_next, x) * x0 + over((sigma_next.square() - level.square()).clamp(min=0).sqrt(), x) * x1

    def deviation(self, sigma: Tensor, sigma_next: Tensor, level: Tensor) -> Tensor:
        return level.clone()

    def logp(self, after: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        return -mean_over_elements((after - mean).square())


@dataclass(frozen=True)
class DDIM:
    """DDIM with noise (2010.02502), for networks that predict epsilon. Here `sigma` is sqrt(1 - abar), so 0 is the picture.

    sd = eta sqrt( (1 - abar')/(1 - abar) (1 - abar/abar') ),  mean = sqrt(abar') x0_hat + sqrt(1 - abar' - sd^2) e
    """

    eta: float = 1.0

    def __post_init__(self) -> None:
        _positive(type(self).__name__, self.eta)

    def levels(self, sigmas: Tensor) -> Tensor:
        return torch.full((len(sigmas) - 1,), self.eta, dtype=torch.float64)

    def clean(self, x: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
        return (x - over(sigma, x) * v) / over((1 - sigma.double().square()).sqrt(), x)

    def mean(self, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, level: Tensor) -> Tensor:
        sd = self.deviation(sigma, sigma_next, level)
        keep = (1 - sigma_next.double().square()).sqrt()
        rest = (sigma_next.double().square() - sd.double().square()).clamp(min=0).sqrt()
        return over(keep, x) * self.clean(x, v, sigma) + over(rest, x) * v

    def deviation(self, sigma: Tensor, sigma_next: Tensor, level: Tensor) -> Tensor:
        before, after = sigma.double().square(), sigma_next.double().square()  # 1 - abar
        return level * (after / before * (1 - (1 - before) / (1 - after))).clamp(min=0).sqrt().to(level)

    def logp(self, after: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        return gaussian_logp(after, mean, std)


def _positive(name: str, eta: float) -> None:
    if not eta > 0:
        raise GruppoError(f"eta of {name} is {eta}: without noise there is no distribution and so no log-probability to train")


# -- solvers: deterministic steps that may remember what the network expected before ------------------------------------------

History = list[tuple[float, Tensor]]  # (sigma, x0_hat) of the steps so far, oldest first


@runtime_checkable
class Solver(Protocol):
    """A deterministic step with memory. The last entry of `history` belongs to the latent `x`."""

    def __call__(self, x: Tensor, history: History, sigma_next: float) -> Tensor: ...


@dataclass(frozen=True)
class DPMSolver2M:
    """DPM-Solver++ 2M (2211.01095) for rectified flow: alpha = 1 - sigma, lambda = log(alpha / sigma), midpoint form.

        x' = sigma'/sigma x - alpha' (e^-h - 1) m0 - alpha' (e^-h - 1) (m0 - m1) / (2 r0),   h = lambda' - lambda, r0 = h_prev / h

    First order where nothing came before, and on the step to sigma = 0, which lands on m0. `heun` swaps the last coefficient.
    """

    heun: bool = False

    def __call__(self, x: Tensor, history: History, sigma_next: float) -> Tensor:
        sigma, m0 = history[-1]
        if sigma_next <= 0:
            return m0
        alpha, h = 1 - sigma_next, _log_snr(sigma_next) - _log_snr(sigma)
        out = sigma_next / sigma * x - alpha * math.expm1(-h) * m0
        if len(history) < 2 or not math.isfinite(h):
            return out
        earlier, m1 = history[-2]
        h_prev = _log_snr(sigma) - _log_snr(earlier)
        if not math.isfinite(h_prev):  # the earlier latent was pure noise: it stands infinitely far away
            return out
        slope = (m0 - m1) * (h / h_prev)
        if self.heun:
            return out + alpha * (math.expm1(-h) / h + 1) * slope
        return out - 0.5 * alpha * math.expm1(-h) * slope


def _log_snr(sigma: float) -> float:
    return -math.inf if sigma >= 1 - ONE else math.log((1 - sigma) / sigma)
