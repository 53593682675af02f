"""Divergence from the reference: estimators from two log-probs, and the wrapper that adds one to a loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from gruppo.types import Batch, Group, GruppoError, Loss, Scope, Steps


def k1(logp: Float[Tensor, "*S"], logp_ref: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """logp - logp_ref: unbiased, may be negative."""
    return logp - logp_ref


def k3(logp: Float[Tensor, "*S"], logp_ref: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """exp(d) - d - 1 with d = logp_ref - logp: unbiased, never negative."""
    d = logp_ref - logp
    return d.exp() - d - 1


@dataclass(frozen=True)
class WithKL:
    """loss + beta * divergence(logp, logp_ref), per step; times `ratio`, gradient included, where there is one.

    With `core.ratio.step_ratio` and k3 the gradient is that of the KL itself whoever sampled (DeepSeek-V3.2), which is what
    TRL's `use_bias_correction_kl` does; without, it is GRPO's.
    """

    loss: Loss
    beta: float
    divergence: Callable[[Tensor, Tensor], Tensor] = k3
    ratio: Callable[[Batch, Tensor], Tensor] | None = None

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
        kl = self.divergence(now.logp, ref.logp)
        kl = kl if self.ratio is None else kl * self.ratio(batch, now.logp)
        kl = torch.where(batch.mask, kl, torch.zeros_like(loss))
        return loss + self.beta * kl, {**stats, "kl": kl}


def with_kl(loss: Loss, beta: float, divergence: Callable[[Tensor, Tensor], Tensor] = k3) -> Loss:
    """`WithKL`, or the bare loss when beta is 0."""
    return loss if beta == 0 else WithKL(loss, beta, divergence)


@dataclass(frozen=True)
class MinusKL:
    """reward - beta * sum_t (logp - logp_ref) over the trained steps: the penalty inside the reward."""

    reward: Callable[[Group], Tensor]
    beta: float

    def __post_init__(self) -> None:
        if not self.beta >= 0:
            raise GruppoError(f"beta is {self.beta}; a negative KL coefficient drives the policy away from the reference")

    def __call__(self, group: Group) -> Tensor:
        raw = self.reward(group)
        try:
            ref = group.signals["logp_ref"]
        except KeyError:
            raise GruppoError(
                f"this reward subtracts {self.beta} * KL, but no reference log-probs came with the group; "
                "wrap the rollout in rollouts.WithReference"
            ) from None
        old = [p.logp if p.logp_train is None else p.logp_train for p in group.paths]  # read by the program that reads `ref`
        kl = torch.stack([((o - r) * p.mask).sum() for p, o, r in zip(group.paths, old, ref)])
        return raw - self.beta * kl.to(raw)
