"""Who shares which decision: edges, their owners and the rewards below them, all read from `Path.fork`."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gruppo.types import Group


def edges(group: Group) -> Int[Tensor, "G T"]:
    """The same id at t means the same decision at t; -1 beyond each path's end."""
    G, T = len(group), group.width
    steps = torch.arange(T)
    ids = torch.full((G, T), -1, dtype=torch.long)
    for i, path in enumerate(group.paths):
        own = i * T + steps
        if path.fork is not None:
            row, t = path.fork
            own = torch.where(steps < t, ids[row], own)
        ids[i] = torch.where(steps < len(path), own, -1)
    return ids


def owners(edge: Int[Tensor, "G T"], mask: Bool[Tensor, "G T"]) -> Bool[Tensor, "G T"]:
    """Narrow `mask` so that each shared edge is trained by the first row that has it, and only by that one."""
    out = mask.clone() & (edge >= 0)
    seen: set[int] = set()
    for i in range(len(edge)):
        for t in out[i].nonzero()[:, 0].tolist():
            e = int(edge[i, t])
            if e in seen:
                out[i, t] = False
            seen.add(e)
    return out


def subtree_mean(edge: Int[Tensor, "G T"], reward: Float[Tensor, " G"]) -> Float[Tensor, "G T"]:
    """The mean reward of the rows that share each edge; abstained (NaN) rows do not count."""
    flat = (edge + 1).reshape(-1)
    value = reward[:, None].expand(edge.shape).reshape(-1)
    good = ~value.isnan()
    size = int(flat.max()) + 1 if flat.numel() else 1
    total = reward.new_zeros(size).scatter_add(0, flat, torch.nan_to_num(value))
    count = reward.new_zeros(size).scatter_add(0, flat, good.to(reward.dtype))
    mean = total / count.clamp(min=1)
    return torch.where(edge >= 0, mean[flat].reshape(edge.shape), reward.new_zeros(()))
