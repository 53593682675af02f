"""Matrix products in float32 by oneDNN, where torch's own run at half the speed.

torch multiplies by MKL, which uses AVX-512 on Intel's processors alone; on others that have it, oneDNN, which every build of
torch for x86 holds, is about twice as fast. The numbers are those of another order of summation. A shape that oneDNN has not
seen costs it time, and memory that it keeps, so small products stay with torch, and rows are filled up with zeros to round
numbers: with paths of all lengths a run's memory would otherwise grow from step to step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gruppo.types import GruppoError

LEAST = 2**24  # operations from which a product of training pays although its shape is seen in one forward only
LEAST_READ = 2**22  # the same where nothing is differentiated: decoding repeats its shapes


@cache
def usable() -> bool:
    """Whether this build of torch has oneDNN's product."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@cache
def faster() -> bool:
    """Whether this processor is one on which oneDNN is the faster one: AVX-512, and not Intel's.

    A rule and not a measurement: which product is taken changes the last bits, and a run repeated must give the same ones.
    """
    if not usable() or not torch.backends.mkl.is_available() or not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return False
    try:
        known = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "vendor_id" in known and "GenuineIntel" not in known


def chosen(wanted: bool | None) -> bool:
    """Whether oneDNN is to be taken; a sentence where it is wanted and cannot be."""
    if wanted and not usable():
        raise GruppoError("matrix products by oneDNN are asked for (policy.onednn), but this build of torch has none")
    return faster() if wanted is None else wanted


def rounded(n: int) -> int:
    """n or the next number of four binary digits and zeros behind them; at least a multiple of 8."""
    return -(-n // _step(n)) * _step(n)


def floored(n: int) -> int:
    """The largest round number up to n >= 8."""
    return n // _step(n) * _step(n)


def _step(n: int) -> int:
    return max(8, 2 ** (n.bit_length() - 4))


def filled(x: Tensor, rows: int) -> Tensor:
    """x [n, K] with zeros below it up to so many rows; x itself where it has them."""
    if len(x) == rows:
        return x
    out = x.new_empty(rows, x.shape[1])
    out[: len(x)], out[len(x) :] = x, 0
    return out


def product(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] times w [N, K] transposed, by oneDNN. A `w` that is neither contiguous nor the transpose of a contiguous one
    would run hundreds of times slower, so it is copied."""
    if not (w.is_contiguous() or w.T.is_contiguous()):
        w = w.contiguous()
    return torch.ops.mkldnn._linear_pointwise(x, w, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, w)
        return _read(x, w, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, w = ctx.saved_tensors
        here, there, also = ctx.needs_input_grad
        n = x.numel() // x.shape[-1]
        g = filled(grad.reshape(n, -1), rounded(n))
        dx = product(g, w.T)[:n].view(x.shape) if here else None
        dw = product(g.T, filled(x.reshape(n, -1), len(g)).contiguous().T) if there else None
        return dx, dw, g.sum(0) if also else None


def _read(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    n = x.numel() // x.shape[-1]
    return product(filled(x.reshape(n, -1), rounded(n)), w, bias)[:n].view(*x.shape[:-1], -1)


def linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, by oneDNN where that is exact and pays."""
    work = 2 * x.numel() * w.shape[0]
    if work < LEAST_READ:
        return F.linear(x, w, bias)
    kept = torch.is_grad_enabled() and (x.requires_grad or w.requires_grad or (bias is not None and bias.requires_grad))
    if (
        (kept and work < LEAST)
        or not (x.dtype == w.dtype == torch.float32)
        or not (x.device.type == w.device.type == "cpu")
        or type(x) is not Tensor
        or type(w) not in (Tensor, torch.nn.Parameter)  # a shard or a quantised weight has products of its own
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
    ):
        return F.linear(x, w, bias)
    return _Linear.apply(x, w, bias) if kept else _read(x, w, bias)  # pyright: ignore[reportReturnType]


def _forward(module: Any, x: Tensor) -> Tensor:
    return linear(x, module.weight, module.bias)


class Linears:
    """The plain linear layers of a model, which multiply by `linear` within `with`; outside they are as they were."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.layers = [(vars(m), partial(_forward, m)) for m in model.modules() if type(m) is torch.nn.Linear]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        mine = [(own, forward) for own, forward in self.layers if "forward" not in own]  # the others have a hook of someone's
        for own, forward in mine:
            own["forward"] = forward
        try:
            yield
        finally:
            for own, _ in mine:
                own.pop("forward", None)
