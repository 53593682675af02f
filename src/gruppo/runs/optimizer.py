"""The optimizer of a run: AdamW, its two moments in float32 or, where the run asks for it, as bitsandbytes keeps them."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from gruppo.runs.config import FitSection
from gruppo.types import GruppoError


def optimizer_of(parameters: Iterable[torch.nn.Parameter], fit: FitSection) -> torch.optim.Optimizer:
    """AdamW over these parameters; the loop sets the learning rate before every step."""
    trained, moments = list(parameters), fit.moments
    if moments is None:
        return torch.optim.AdamW(trained, lr=0.0, betas=fit.betas, weight_decay=fit.weight_decay)
    if moments.paged and all(p.device.type == "cpu" for p in trained):
        raise GruppoError(
            "fit.moments.paged moves the optimizer's moments between the device and the host, but this run is on the CPU, "
            "where they are already; remove it"
        )
    try:
        import bitsandbytes  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise GruppoError(
            f"fit.moments keeps AdamW's moments with bitsandbytes, which cannot be imported here ({error}): "
            "pip install 'gruppo[lowbit]', or remove fit.moments"
        ) from error
    return bitsandbytes.optim.AdamW(
        trained,
        lr=0.0,
        betas=fit.betas,
        weight_decay=fit.weight_decay,
        optim_bits=moments.bits,
        is_paged=moments.paged,
    )
