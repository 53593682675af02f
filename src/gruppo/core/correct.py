"""Correction for a sampler and a trainer that are two programs: weigh a loss by exp(logp_train - logp_sampler), bounded.

Wrap the surrogate and add the KL outside (`with_kl(Corrected(PPOClip(...), ...), beta)`): the weight belongs to the policy
term only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gruppo.types import Batch, Loss, Scope, Steps, reads_reference


def step_gap(batch: Batch) -> Tensor:
    """logp_old - logp_sampler, step by step."""
    return (batch.logp_old - batch.logp_sampler) * batch.mask


def path_gap(batch: Batch) -> Tensor:
    """The SUM of the step gaps of the path, at each of its steps."""
    return step_gap(batch).sum(1, keepdim=True) * batch.mask


@dataclass(frozen=True)
class Truncated:
    """min(w, high), and at least low."""

    high: float
    low: float = 0.0
    gap: Callable[[Batch], Tensor] = step_gap

    def __call__(self, batch: Batch) -> Tensor:
        return self.gap(batch).clamp(-20, 20).exp().clamp(self.low, self.high)


@dataclass(frozen=True)
class Masked:
    """w inside [low, high], 0 outside."""

    high: float
    low: float = 0.0
    gap: Callable[[Batch], Tensor] = step_gap

    def __call__(self, batch: Batch) -> Tensor:
        w = self.gap(batch).clamp(-20, 20).exp()
        return torch.where((w >= self.low) & (w <= self.high), w, torch.zeros_like(w))


@dataclass(frozen=True)
class Corrected:
    """loss * weight(batch), the weight carrying no gradient."""

    loss: Loss
    weight: Callable[[Batch], Tensor]

    @property
    def scope(self) -> Scope:
        return self.loss.scope

    @property
    def reads_reference(self) -> bool:
        return reads_reference(self.loss)

    def __call__(self, batch: Batch, now: Steps, ref: Steps | None) -> tuple[Tensor, dict[str, Tensor]]:
        loss, stats = self.loss(batch, now, ref)
        w = self.weight(batch).detach()
        return loss * w, {**stats, "sampler_weight": w}
