"""Baselines and scales over a group. NaN marks an abstained path: it counts nowhere and comes back as 0."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gruppo.types import Group


def mean(x: Float[Tensor, "G *C"]) -> Float[Tensor, "*C"]:
    """Mean over G of the finite entries; 0 where there are none."""
    return torch.nan_to_num(x.nanmean(0), nan=0.0)


def std(x: Float[Tensor, "G *C"], *, ddof: int) -> Float[Tensor, "*C"]:
    """Standard deviation over G of the finite entries; 0 where fewer than ddof + 1 remain."""
    n = (~x.isnan()).sum(0)
    spread = torch.nan_to_num(x - mean(x), nan=0.0)
    variance = spread.square().sum(0) / (n - ddof).clamp(min=1)
    return torch.where(n > ddof, variance.sqrt(), torch.zeros_like(variance))


def centred(x: Float[Tensor, "G *C"]) -> Float[Tensor, "G *C"]:
    """x - mean; a group of one becomes 0, an abstained entry becomes 0."""
    # An all-equal column is exactly 0: the mean of n equal floats may differ from them in the last bit, and dividing
    # that by a tiny std would train on rounding noise.
    same = torch.nan_to_num(x, nan=-torch.inf).amax(0) == torch.nan_to_num(x, nan=torch.inf).amin(0)
    return torch.nan_to_num(x - mean(x), nan=0.0).masked_fill(same, 0.0)


def standardize(x: Float[Tensor, "G *C"], *, ddof: int, eps: float) -> Float[Tensor, "G *C"]:
    """(x - mean) / (std + eps) over G; zero variance, and a group of one, give 0."""
    return centred(x) / (std(x, ddof=ddof) + eps).clamp(min=torch.finfo(x.dtype).tiny)


def leave_one_out(x: Float[Tensor, "G *C"]) -> Float[Tensor, "G *C"]:
    """x_i minus the mean of the others; a group of one becomes 0."""
    n = (~x.isnan()).sum(0).clamp(min=1)
    return centred(x) * (n / (n - 1).clamp(min=1))


def within(x: Float[Tensor, " G"], labels: Int[Tensor, " G"], *, ddof: int, eps: float) -> Float[Tensor, " G"]:
    """`standardize` among the entries that carry the same label."""
    out = torch.zeros_like(x)
    for label in labels.unique():
        here = labels == label
        out[here] = standardize(x[here], ddof=ddof, eps=eps)
    return out


def spread(value: Float[Tensor, "G *U"], group: Group) -> Float[Tensor, "G T"]:
    """Give every step its path's value [G], or its unit's value [G, U]; 0 off the units and beyond each path's end."""
    unit = group.unit.to(value.device)
    if value.dim() == 1:
        return torch.where(unit >= 0, value[:, None], value.new_zeros(()))
    inside = (unit >= 0) & (unit < value.shape[1])
    return torch.where(inside, value.gather(1, unit.clamp(0, value.shape[1] - 1)), value.new_zeros(()))
