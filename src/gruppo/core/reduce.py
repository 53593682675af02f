"""A reduction is a weight: each returns (raw weight [B, T], count). The objective is sum(raw / count * loss).

The count is summed over all ranks, so micro-batches and data parallelism are exact. A row without trained steps (dropped,
abstained) counts nowhere unless a reduction says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gruppo.types import Batch


def sequence_mean(batch: Batch) -> tuple[Tensor, Tensor]:
    """The mean over paths of each path's mean over its trained steps (GRPO's 1/G sum 1/|o_i| sum)."""
    steps = batch.mask.sum(1, keepdim=True)
    return batch.mask / steps.clamp(min=1), (steps > 0).sum().float()


def step_mean(batch: Batch) -> tuple[Tensor, Tensor]:
    """The mean over all trained steps of the optimizer step (DAPO's token mean)."""
    return batch.mask.float(), batch.mask.sum().float()


def sequence_sum(batch: Batch) -> tuple[Tensor, Tensor]:
    """The mean over paths of each path's sum over its trained steps."""
    return batch.mask.float(), batch.mask.any(1).sum().float()


@dataclass(frozen=True)
class Constant:
    """sum / (paths * length): every step weighs the same whatever the paths' lengths (Dr.GRPO). Does not sum to 1."""

    length: int

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return batch.mask.float(), batch.mask.any(1).sum().float() * self.length


def weigh(batch: Batch, reduce, all_sum=lambda count: count) -> Batch:
    """Fill `batch.weight`. `all_sum` adds a scalar over the ranks of a distributed run."""
    raw, count = reduce(batch)
    count = all_sum(count)
    return batch.with_(weight=torch.where(batch.mask, raw / count.clamp(min=1e-12), torch.zeros_like(raw)))
