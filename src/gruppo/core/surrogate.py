"""Per-step policy losses [B, T]. No normaliser here: `reduce` weighs the steps, once per optimizer step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gruppo.core.ratio import step_ratio
from gruppo.types import Batch, Scope, Steps

Ratio = Callable[[Batch, Tensor], Tensor]


@dataclass(frozen=True)
class PPOClip:
    """max(-rho A, -clip(rho, 1 - low, 1 + high) A), optionally bounded for large ratios.

    `cap` bounds rho in the unclipped branch (INTELLECT-2's delta, 2505.07291); `dual` bounds the loss of a negative
    advantage at dual * |A| (dual clip, 1912.09729).
    """

    low: float
    high: float
    ratio: Ratio = step_ratio
    cap: float | None = None
    dual: float | None = None
    scope: Scope = "path"
    reads_reference: ClassVar[bool] = False

    def __call__(self, batch: Batch, now: Steps, ref: Steps | None) -> tuple[Tensor, dict[str, Tensor]]:
        A = batch.advantage
        rho = self.ratio(batch, now.logp)
        free = rho if self.cap is None else rho.clamp(max=self.cap)
        held = rho.clamp(1 - self.low, 1 + self.high)
        loss = torch.maximum(-free * A, -held * A)
        if self.dual is not None:
            loss = torch.where(A < 0, torch.minimum(loss, -self.dual * A), loss)
        low = (rho < 1 - self.low) & (A < 0)
        high = (rho > 1 + self.high) & (A > 0)
        return loss, {"ratio": rho, "clip_low": low.float(), "clip_high": high.float(), **_entropy(now)}


@dataclass(frozen=True)
class WeightClip:
    """-sg[clip(rho, low, high)] A logp: the weight is clipped, every token keeps its gradient (CISPO, 2506.13585)."""

    low: float
    high: float
    ratio: Ratio = step_ratio
    scope: Scope = "path"
    reads_reference: ClassVar[bool] = False

    def __call__(self, batch: Batch, now: Steps, ref: Steps | None) -> tuple[Tensor, dict[str, Tensor]]:
        rho = self.ratio(batch, now.logp).detach()
        w = rho.clamp(self.low, self.high)
        loss = -w * batch.advantage * now.logp
        cut = {"clip_low": (rho < self.low).float(), "clip_high": (rho > self.high).float()}
        return loss, {"ratio": rho, "weight": w, **cut, **_entropy(now)}


def _entropy(now: Steps) -> dict[str, Tensor]:
    return {} if now.entropy is None else {"entropy": now.entropy}
