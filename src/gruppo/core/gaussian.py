"""Divergences of Gaussian steps in closed form: the reference has the same deviation, so only the means differ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gruppo.types import Batch, GruppoError, Loss, Scope, Steps

Form = Callable[[Batch, Tensor], Tensor]  # [B, T] exact divergence -> the one that is penalised


def exact(batch: Batch, kl: Tensor) -> Tensor:
    """mean_D (mu - mu_ref)^2 / (2 sd^2): the divergence of the two Gaussians, per latent element."""
    return kl


def without_dt(batch: Batch, kl: Tensor) -> Tensor:
    """The same divided by 2 s^2 instead of 2 s^2 h, as yifan123/flow_grpo has it for SD3: the exact form times the step size."""
    h = torch.zeros_like(kl)
    for i, path in enumerate(batch.paths):
        sigmas = path.prompt.sigmas
        h[i, : len(path)] = (sigmas[:-1] - sigmas[1:]).to(h)
    return kl * h


def gaussian_kl(now: Steps, ref: Steps) -> Tensor:
    """[B, T]: mean_D (mu - mu_ref)^2 / (2 sd^2)"""
    if now.mean is None or now.std is None or ref.mean is None:
        raise GruppoError("the closed-form divergence compares means of Gaussian steps, which this policy does not report")
    return (now.mean - ref.mean).square().flatten(2).mean(2) / (2 * now.std.flatten(2)[:, :, 0].square())


@dataclass(frozen=True)
class WithGaussianKL:
    """loss + beta * closed-form divergence of every step from the reference's step."""

    loss: Loss
    beta: float
    form: Form = exact

    def __post_init__(self) -> None:
        if not self.beta >= 0:
            raise GruppoError(f"beta is {self.beta}; a negative KL coefficient drives the policy away from the reference")

    @property
    def scope(self) -> Scope:
        return self.loss.scope

    def __call__(self, batch: Batch, now: Steps, ref: Steps | None) -> tuple[Tensor, dict[str, Tensor]]:
        if ref is None:
            raise GruppoError(f"this loss adds {self.beta} * KL to the reference, but the run has no reference policy")
        loss, stats = self.loss(batch, now, ref)
        kl = torch.where(batch.mask, self.form(batch, gaussian_kl(now, ref)), torch.zeros_like(loss))
        return loss + self.beta * kl, {**stats, "kl": kl}


def with_gaussian_kl(loss: Loss, beta: float, form: Form = exact) -> Loss:
    """`WithGaussianKL`, or the bare loss when beta is 0."""
    return loss if beta == 0 else WithGaussianKL(loss, beta, form)
