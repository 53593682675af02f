"""Attention of one region in float32, tile by tile, from large matrix products: no more memory than a tile of scores.

torch's flash kernel for CPUs multiplies by MKL; where oneDNN multiplies twice as fast (`products`), a region of some size costs
little more than half. Powers of two instead of e, since torch takes them four times as fast:

    S = Q K^T scale log2(e),    P = 2^(S - lse),    O = P V
    dV = P^T dO,    dS = P (dO V^T - rowsum(dO O)),    dQ = scale dS K,    dK = scale dS^T Q

Query heads that share keys are rows of one product. Lengths are padded to round numbers, since oneDNN prepares itself for every
new shape: a padded query has no gradient, and no query sees a padded key.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from gruppo.policies.products import product

LOG2E = 1.4426950408889634
LEAST = 2**25  # operations of all scores of a region below which the flash kernel is faster
QUERIES, KEYS = 32, 128  # lengths are padded to multiples of these
SCORES = 2**18  # of a tile, which should stay in the cache of the core


def pays(q: Tensor, k: Tensor) -> bool:
    """Whether the region of these queries [T, H, D] and keys [S, K, D] is large enough."""
    return q.dtype == torch.float32 and 2 * q.numel() * k.shape[0] >= LEAST


def _up(n: int, to: int) -> int:
    return -(-n // to) * to


def _grouped(x: Tensor, groups: int, length: int) -> Tensor:
    """[groups, length x H/groups, D] of [T, H, D], zeros behind T."""
    T, H, D = x.shape
    out = x.new_empty(groups, length, H // groups, D)
    out[:, :T] = x.unflatten(1, (groups, H // groups)).transpose(0, 1)
    out[:, T:] = 0
    return out.flatten(1, 2)


def _ungrouped(x: Tensor, r: int, T: int) -> Tensor:
    """The reverse: [T, H, D] of [groups, length x r, D]."""
    return x.unflatten(1, (-1, r))[:, :T].transpose(0, 1).flatten(1, 2)


@cache
def _later(n: int, wide: int, r: int) -> Tensor:
    """[n r, wide] which keys stand behind their query; both begin at one token."""
    return torch.ones(n, wide, dtype=torch.bool).triu(1).repeat_interleave(r, 0)


def _tiles(tokens: int, keys: int, r: int, causal: bool) -> Iterator[tuple[int, int, int]]:
    """Queries from a to b see keys to e."""
    rows = 256 if causal else min(1024, max(128, SCORES // keys))
    step = max(QUERIES, _up(rows // r, QUERIES))
    for a in range(0, tokens, step):
        b = min(a + step, tokens)
        yield a, b, min(_up(b, KEYS), keys) if causal else keys


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """The answers [T, H, D] and the log of the sum of exponentials [T, H]."""
    (T, H, _), (S, K, D) = q.shape, v.shape
    r, tokens, keys = H // K, _up(T, QUERIES), _up(S, KEYS)
    qs, ks, vs = _grouped(q, K, tokens).mul_(scale * LOG2E), _grouped(k, K, keys), _grouped(v, K, keys)
    out, lse = q.new_empty(K, tokens * r, D), q.new_empty(K, tokens * r, 1)
    for a, b, e in _tiles(tokens, keys, r, causal):
        rows = slice(a * r, b * r)
        for j in range(K):
            s = product(qs[j, rows], ks[j, :e])
            if causal:
                s[:, a:].masked_fill_(_later(b - a, e - a, r), float("-inf"))
            elif e > S:
                s[:, S:].fill_(float("-inf"))
            top = s.amax(-1, keepdim=True)
            total = s.sub_(top).exp2_().sum(-1, keepdim=True)
            torch.div(product(s, vs[j, :e].T), total, out=out[j, rows])
            torch.add(top, total.log2_(), out=lse[j, rows])
    return _ungrouped(out, r, T), _ungrouped(lse, r, T)[..., 0].div_(LOG2E)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, given the answers and the log-sum-exp of the whole softmax, of which this is a region."""
    (T, H, _), (S, K, D) = q.shape, v.shape
    r, tokens, keys = H // K, _up(T, QUERIES), _up(S, KEYS)
    qs, ks, vs = _grouped(q, K, tokens).mul_(scale * LOG2E), _grouped(k, K, keys), _grouped(v, K, keys)
    gs, total = _grouped(grad, K, tokens), _grouped((lse * LOG2E)[..., None], K, tokens)
    along = _grouped((grad * out).sum(-1, keepdim=True), K, tokens)
    dq, dk, dv = torch.empty_like(qs), ks.new_zeros(K, ks.shape[-1], keys), vs.new_zeros(K, D, keys)
    for a, b, e in _tiles(tokens, keys, r, causal):
        rows = slice(a * r, b * r)
        for j in range(K):
            p = product(qs[j, rows], ks[j, :e]).sub_(total[j, rows]).exp2_()
            if causal:
                p[:, a:].masked_fill_(_later(b - a, e - a, r), 0)
            dv[j, :, :e] += product(gs[j, rows].T, p.T)
            p.mul_(product(gs[j, rows], vs[j, :e]).sub_(along[j, rows]))
            dq[j, rows] = product(p, ks[j, :e].T)
            dk[j, :, :e] += product(qs[j, rows].T, p.T)
    dk, dv = (x[:, :, :S].permute(2, 0, 1) for x in (dk, dv))
    return _ungrouped(dq, r, T).mul_(scale), dk / LOG2E, dv
