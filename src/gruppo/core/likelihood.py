"""How likely a whole path was under the policy that sampled it. Only trained steps count; NaN where a path has none.

Padding, prompts, tool outputs and forced phrases are not the policy's doing: with them a short path would look different from
a long one whose every step was equally likely.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from gruppo.types import Group, Path


def mean_logp(group: Group) -> Float[Tensor, " G"]:
    """The mean log-prob of each path's trained steps."""
    return torch.stack([_own(p).mean() for p in group.paths])


def sum_logp(group: Group) -> Float[Tensor, " G"]:
    """The sum of the log-probs of each path's trained steps: the likelihood of the path as a whole."""
    return torch.stack([_own(p).sum() if p.mask.any() else torch.tensor(torch.nan) for p in group.paths])


def _own(path: Path) -> Tensor:
    logp = path.logp if path.logp_train is None else path.logp_train
    return logp[path.mask].float().cpu()
