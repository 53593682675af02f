"""log p of chosen tokens and the entropy from hidden states, without keeping what autograd would keep of the logits.

With z = h W^T / T, lse = log sum_v exp z_v and p = exp(z - lse):

    log p_y = z_y - lse          H = lse - sum_v p_v z_v          d log p_y / dz = onehot(y) - p

The gradient with respect to log p is known only after the loss, so forward keeps one number per position (lse) beside the
hidden states, and backward turns the logits into the gradient in place: two products, no other array of that size. Logits of
up to `elements` numbers are kept for that; more are formed in pieces, and formed again in backward.

Large products in float32 go through oneDNN where the policy takes it (`products`). Every piece but the last has a round number
of rows, and the last is filled up to one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear

from gruppo.policies import products

PIECE = 2**21  # logits formed at once where they are not kept; larger pieces leave the caches of a CPU


def plain(project: Any) -> bool:
    """Whether the projection is h W^T and nothing else: no bias, no adapter, nothing that hooks into its call."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return type(project) is Linear and project.bias is None and not any(getattr(project, name) for name in hooks)


def read(
    hidden: Tensor, weight: Tensor, target: Tensor, temperature: float, elements: int, entropy: bool, onednn: bool = False
) -> tuple[Tensor, Tensor | None]:
    """log p [N], differentiable once, and the entropy [N], a constant, of the targets [N] after hidden states [N, D]."""
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    own = type(weight) in (Tensor, torch.nn.Parameter)  # a shard or a quantised weight has products of its own
    quick = onednn and own and kind == "cpu" and dtype == torch.float32
    trains = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)  # in `forward` grad mode is off
    logp, H = _Read.apply(hidden, weight, target, temperature, elements, entropy, dtype, quick, trains)  # pyright: ignore[reportGeneralTypeIssues]
    return logp, H if entropy else None


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        temperature: float,
        elements: int,
        entropy: bool,
        dtype: Any,
        quick: bool,
        trains: bool,
    ) -> tuple[Tensor, Tensor]:
        h, w = hidden.to(dtype), weight.to(dtype)
        rows = max(1, min(elements, PIECE if h.device.type == "cpu" else elements) // len(w))
        quick = quick and rows >= 8 and 2 * min(rows, len(h)) * w.numel() >= products.LEAST
        if quick:
            rows = products.floored(rows)
        keeps = trains and len(h) * len(w) <= elements
        kept = torch.empty(len(h), len(w), dtype=_exact(dtype), device=h.device) if keeps else None
        lse, logp, H = (torch.empty(len(h), dtype=_exact(dtype), device=h.device) for _ in range(3))
        for at in range(0, len(h), rows):
            here = slice(at, at + rows)
            z = _logits(h[here], w, temperature, quick, None if kept is None else kept[here])
            norm = lse[here] = z.logsumexp(-1)
            logp[here] = z.gather(-1, target[here, None])[:, 0] - norm
            if entropy:
                H[here] = norm - torch.linalg.vecdot((z - norm[:, None]).exp_(), z)
        ctx.save_for_backward(hidden, weight, target, lse)
        ctx.kept, ctx.rows, ctx.temperature, ctx.dtype = kept, rows, temperature, dtype
        ctx.quick, ctx.elements = quick, elements
        ctx.mark_non_differentiable(H)
        return logp, H

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, weight, target, lse = ctx.saved_tensors
        h, w = hidden.to(ctx.dtype), weight.to(ctx.dtype)
        kept, ctx.kept = ctx.kept, None  # overwritten below; a second backward forms the logits again
        to_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        to_weight = None
        share = grad / ctx.temperature
        for at in range(0, len(h), ctx.rows):
            here = slice(at, at + ctx.rows)
            z = _logits(h[here], w, ctx.temperature, ctx.quick) if kept is None else kept[here]
            z.sub_(lse[here, None]).exp_().mul_(-share[here, None])
            z.scatter_add_(-1, target[here, None], share[here, None])
            z = z.to(ctx.dtype)
            n, own = len(z), h[here]
            if ctx.quick:
                z, own = (products.filled(x, products.rounded(n)) for x in (z, own))
            if to_hidden is not None:
                to_hidden[here] = products.product(z, w.T)[:n] if ctx.quick else z @ w
            if ctx.needs_input_grad[1]:
                if to_weight is None:
                    to_weight = torch.zeros_like(w, dtype=weight.dtype)
                if ctx.quick and w.numel() <= ctx.elements:  # the product stands beside the sum: no larger than logits
                    to_weight += products.product(z.T, own.T)
                elif w.dtype == to_weight.dtype:
                    to_weight.addmm_(z.T, own)
                else:
                    to_weight += z.T @ own
        return to_hidden, to_weight, None, None, None, None, None, None, None


def _logits(h: Tensor, w: Tensor, temperature: float, quick: bool, out: Tensor | None = None) -> Tensor:
    if quick:
        z = products.product(products.filled(h, products.rounded(len(h))), w)[: len(h)]
        z = z if out is None else out.copy_(z)
    elif out is not None and out.dtype == h.dtype:
        z = torch.mm(h, w.T, out=out)
    else:
        z = (h @ w.T).to(_exact(h.dtype))
        z = z if out is None else out.copy_(z)
    return z if temperature == 1 else z.div_(temperature)


def _exact(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32
