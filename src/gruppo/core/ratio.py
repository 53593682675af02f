"""How much more likely the new policy finds what the old one did: one ratio per step, per unit or per path.

All take (batch, logp) and return [B, T]; off the mask the ratio is 1.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gruppo.types import Batch


def step_ratio(batch: Batch, logp: Tensor) -> Tensor:
    """exp(logp - logp_old), step by step."""
    return ((logp - batch.logp_old) * batch.mask).exp()


def unit_ratio(batch: Batch, logp: Tensor) -> Tensor:
    """The geometric mean of the step ratios of each unit; one unit per path is GSPO's s_i (2507.18071, Eq. 7)."""
    return unit_mean((logp - batch.logp_old), batch.unit, batch.mask).exp()


def unit_token_ratio(batch: Batch, logp: Tensor) -> Tensor:
    """GSPO-token (2507.18071, Eq. 14): the value of the unit's ratio, the gradient of the step's own log-prob."""
    return unit_ratio(batch, logp).detach() * (((logp - logp.detach()) * batch.mask).exp())


def path_ratio(batch: Batch, logp: Tensor) -> Tensor:
    """The likelihood ratio of the whole path: the product of its step ratios, not length-normalised."""
    total = ((logp - batch.logp_old) * batch.mask).sum(1, keepdim=True)
    return torch.where(batch.mask, total.exp(), torch.ones_like(logp))


def unit_mean(x: Float[Tensor, "B T"], unit: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Each step's x replaced by the mean of x over the trained steps of its unit; 0 off the units and off the mask."""
    inside = mask & (unit >= 0)
    index = torch.where(inside, unit + 1, torch.zeros_like(unit))  # column 0 gathers what belongs nowhere
    width = int(index.max()) + 1 if index.numel() else 1
    total = x.new_zeros(len(x), width).scatter_add(1, index, x * inside)
    count = x.new_zeros(len(x), width).scatter_add(1, index, inside.to(x.dtype))
    return (total / count.clamp(min=1)).gather(1, index) * inside
