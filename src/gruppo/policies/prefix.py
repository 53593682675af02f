"""Shared prefixes are computed once: the packed forward of Prefix Grouper (arXiv 2506.05433), generalised to any tree.

Rows that begin with the same tokens have the same hidden states there, so a batch is laid out as one row in which every
shared token stands once:

    [prompt | row 0's steps | row 1's steps | ...]           position ids restart where a row leaves another

Everything but attention works token by token and needs no change. Attention is split into regions: each piece of the layout
attends to itself causally, and to the part of its ancestors that it shares. Log-probabilities and gradients are those of the
ordinary forward (the paper's section 3.3; the gradient of a shared token is the sum over the rows that share it).

Where the rows part is read off their tokens. That covers parallel groups (one prompt), serial cuts and trees
(`Path.fork`), and several prompts in one row; a wrong or missing `fork` cannot give wrong numbers. Unlike eq. 12 of the
paper, the last prompt token does get a gradient of its own: it predicts the first token of every completion.

Three forms of the same attention:

    lse    each region on its own, merged by log-sum-exp; nothing is copied per row              CPU
    two    own keys behind the expanded keys of the ancestors (the paper's); sliding windows     any device
    flex   FlexAttention with a block mask                                                      CUDA only
    mask   one dense mask over the whole layout: the oracle of the tests

Which one runs, and whether any does, is decided from token counts by `Cost`. Before a form is used for the first time it is
compared with the ordinary forward on a piece of the batch, log-probabilities and gradients (`TokenPolicy`).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gruppo.policies import tiles
from gruppo.types import GruppoError

NAME = "gruppo_prefix"  # under which transformers' attention interface knows `attend`

Form = Literal["lse", "two", "flex", "mask"]

# ---- where every token stands ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of the layout that one row added: `length` tokens from `start`, the first at `depth` of its path."""

    start: int
    length: int
    depth: int
    context: np.ndarray  # [depth] layout indices of the tokens before it


@dataclass(frozen=True)
class Region:
    """A rectangle of attention: every query in [q0, q1) sees every key in [k0, k1)."""

    q0: int
    q1: int
    k0: int
    k1: int


@dataclass
class Layout:
    """One packed row: T tokens of a forest of paths, in depth-first order."""

    total: int
    owner: np.ndarray  # [T] the row a token was taken from
    depth: np.ndarray  # [T] its index in that row; the same in every row that shares it
    last: np.ndarray  # [T] tokens in [own index, last) see this token, no others do
    spots: list[np.ndarray]  # per row: where each of its tokens stands
    pieces: list[Piece]
    regions: list[Region]
    form: Form = "lse"
    cost: Cost | None = None  # says which pieces may share a padded call; None: those of equal length
    tiled: bool = False  # large regions by `tiles`
    used: int = 0  # attention calls that really ran on this layout
    _blocks: dict[Any, Any] = field(default_factory=dict)

    def pick(self, values: Sequence[Tensor]) -> Tensor:
        """[..., T] from one [..., L] tensor per row: token ids, rotary positions of any number of axes."""
        offsets = np.cumsum([0, *(v.shape[-1] for v in values)])[:-1]
        at = torch.from_numpy(offsets[self.owner] + self.depth)
        return torch.cat(list(values), -1)[..., at.to(values[0].device)]

    @property
    def deepest(self) -> int:
        """The length of the longest path."""
        return int(self.depth.max()) + 1


def lay(rows: Sequence[Tensor], least: int = 1, context: Sequence[Hashable] | None = None) -> Layout:
    """Lay rows [L_i] of token ids out so that a shared beginning of at least `least` tokens stands once.

    Rows whose `context` differs (other images behind the same tokens) share nothing. A further common stretch of fewer than
    `least` tokens is laid out per row: each fork costs attention calls.
    """
    keys = [0] * len(rows) if context is None else list(context)
    rank = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    ids = [r.numpy() for r in rows]
    size = np.array([len(r) for r in ids], dtype=np.int64)
    kind = np.array([rank[key] for key in keys], dtype=np.int64)
    order = sorted((i for i in range(len(ids)) if size[i]), key=lambda i: (kind[i], ids[i].astype(">i8").tobytes()))
    common = np.zeros(len(order) + 1, dtype=np.int64)  # [i] how many tokens row order[i] shares with the one before
    for i in range(1, len(order)):
        a, b = order[i - 1], order[i]
        if kind[a] == kind[b]:
            n = min(size[a], size[b])
            differs = ids[a][:n] != ids[b][:n]
            common[i] = differs.argmax() if differs.any() else n
    owner = np.empty(int(size.sum()), dtype=np.int64)
    depth, last = np.empty_like(owner), np.empty_like(owner)
    spots: list[np.ndarray] = [np.empty(0, dtype=np.int64)] * len(ids)
    pieces: list[Piece] = []
    regions: list[Region] = []

    def parts(lo: int, hi: int, at: int) -> list[tuple[int, int]]:
        """Runs of rows that share `least` tokens or more beyond `at`."""
        cuts = [lo, *(i for i in range(lo + 1, hi) if common[i] < at + least), hi]
        return list(pairwise(cuts))

    def grow(lo: int, hi: int, before: np.ndarray, cursor: int) -> int:
        """Lay out rows lo to hi, which share `before` and more: one of them whole, the others hanging from it."""
        start, at, hanging = cursor, len(before), []
        while hi - lo > 1:
            at = int(common[lo + 1 : hi].min())
            some = parts(lo, hi, at)
            heavy = max(some, key=lambda p: (p[1] - p[0], max(size[i] for i in order[p[0] : p[1]])))  # keeps the tree flat
            hanging.append((at, [p for p in some if p is not heavy]))
            lo, hi = heavy
        row = order[lo]
        n = int(size[row]) - len(before)
        path = np.concatenate([before, np.arange(start, start + n)])
        spots[row] = path
        if n:
            own = slice(start, start + n)
            owner[own], depth[own], last[own] = row, np.arange(len(before), size[row]), start + n
            pieces.append(Piece(start, n, len(before), before))
        cursor = start + n
        for at, some in reversed(hanging):  # deepest fork first, so that who sees a token stays one interval
            first = cursor
            for a, b in some:
                cursor = grow(a, b, path[:at], cursor)
            shared = start + at - len(before)
            if cursor > first:
                last[start:shared] = cursor
                regions.append(Region(first, cursor, start, shared))
        return cursor

    cursor = 0
    for lo, hi in parts(0, len(order), 0) if order else []:
        cursor = grow(lo, hi, np.empty(0, dtype=np.int64), cursor)
    return Layout(cursor, owner[:cursor], depth[:cursor], last[:cursor], spots, pieces, regions)


# ---- what it costs --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """What things cost in floating-point operations of a large matrix product: plain numbers, measured once, see `bench`."""

    pair: float = 1.0  # an operation of attention
    call: float = 3e6  # an attention call of one layer: dispatch, in forward and backward
    touch: float = 80.0  # a number that is gathered or merged
    small: float = 2e8  # an ordinary forward below this is done before a layout is made
    margin: float = 0.05  # the gain below which the ordinary forward is kept


MEASURED = Rates()


@dataclass(frozen=True)
class Cost:
    """The cost of a forward and backward of one model, in operations of its forward."""

    weights: int  # that every token passes through
    width: int  # heads x head size
    layers: int
    special: int  # layers whose attention has a window or a cap: form `two` only
    window: int  # 0 = none
    capped: bool
    rates: Rates
    onednn: bool = False  # linear layers and large regions of attention multiply by oneDNN

    @staticmethod
    def of(model: Any, rates: Rates, onednn: bool = False) -> Cost:
        config = model.config.get_text_config()
        heads = number(config, "num_attention_heads") or 1
        size = number(config, "head_dim") or config.hidden_size // heads
        embedded = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
        head = model.get_output_embeddings()
        embedded.add(id(getattr(head, "weight", None)))  # runs on trained steps alone, in either forward
        weights = sum(p.numel() for p in model.parameters() if p.dim() > 1 and id(p) not in embedded)
        kinds = getattr(config, "layer_types", None) or []
        window = number(config, "sliding_window") or 0
        capped = bool(getattr(config, "attn_logit_softcapping", None))
        sliding = sum(k == "sliding_attention" for k in kinds) if kinds else config.num_hidden_layers
        special = config.num_hidden_layers if capped else sliding * bool(window)
        return Cost(weights, heads * size, config.num_hidden_layers, special, window, capped, rates, onednn)

    @property
    def least(self) -> int:
        """The shared tokens from which a fork pays: two calls a layer against the weights those tokens would pass again."""
        return max(1, math.ceil(2 * self.rates.call * self.layers / (2 * self.weights)))

    def worth(self, ordinary: float) -> bool:
        """Whether an ordinary forward of this cost is long enough that sharing could win back layout and calls."""
        return ordinary > max(self.rates.small, 4 * self.layers * self.rates.call)

    def ordinary(self, count: int, width: int) -> float:
        """Every row in full, `count` rows padded to `width` tokens."""
        full = self.special if self.capped or 0 < self.window < width else 0
        pairs = count * width**2 * (self.layers + full) / 2
        return 2 * self.weights * count * width + self._attention(pairs, self.layers, 0)

    def packed(self, layout: Layout, form: Form) -> float:
        """One packed row, its plain layers in the given form."""
        special = self.special if self.capped or 0 < self.window < layout.deepest else 0
        plain = self.layers - special
        pairs, calls, touched = 0.0, 0, 0
        if special or form == "two":
            some = expanded(layout)
            n = special + (plain if form == "two" else 0)
            pairs += n * sum(len(b) * b[0].length * (b[0].depth + b[0].length) for b in some)
            calls += n * len(some)
            touched += n * sum(len(b) * (4 * b[0].length + 2 * b[0].depth) for b in some)
        if plain and form == "lse":
            some = alike(layout.pieces, layout.cost)
            pairs += plain * (sum(len(b) * b[0].length ** 2 for b in some) / 2)
            pairs += plain * sum((r.q1 - r.q0) * (r.k1 - r.k0) for r in layout.regions)
            calls += plain * (len(some) + len(layout.regions))
            touched += plain * sum(len(b) * b[0].length * 4 for b in some if len(b) > 1)
            touched += plain * sum(3 * (r.q1 - r.q0) for r in layout.regions)
        if plain and form in ("mask", "flex"):
            pairs += plain * layout.total**2 / (1 if form == "mask" else 2)
            calls += plain
        return 2 * self.weights * layout.total + self._attention(pairs, calls, touched)

    def _attention(self, pairs: float | int, calls: int, touched: int) -> float:
        rates = self.rates
        return 4 * self.width * float(pairs) * rates.pair + calls * rates.call + touched * self.width * rates.touch


def number(config: Any, name: str) -> int | None:
    """A number of a model's configuration; the largest where layers differ in it (transformers then refuses to name one)."""
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return max((getattr(layer, name, None) or 0 for layer in config.per_layer_config), default=0) or None


def beyond(config: Any) -> str | None:
    """What keeps a model from the packed forward that a comparison of a short piece may not show."""
    kinds = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"it has layers of the kind {', '.join(sorted(kinds))}"
    if getattr(config, "attn_temperature_tuning", False):  # Llama 4 counts tokens of the row, not positions
        return "its attention scales a query by the number of tokens before it in the row"
    return None


@dataclass(frozen=True)
class Plan:
    """What one forward reads: the layout, its inputs, and which position predicts which trained step."""

    layout: Layout
    ids: Tensor  # [T]
    position: Tensor  # [T]
    row: Tensor  # [N] the trained steps
    step: Tensor  # [N]
    at: Tensor  # [M] positions to read; one that predicts the same token in several rows is read once
    target: Tensor  # [M]
    which: Tensor  # [N] into the M readings


def plan(prompts: Sequence[Tensor], steps: Sequence[Tensor], where: Tensor, cost: Cost, least: int | None = None) -> Plan:
    """Lay out what the trained steps `where` [B, T] need: nothing behind a row's last trained step is computed."""
    row, step = where.nonzero(as_tuple=True)
    end = (where * torch.arange(where.shape[1])).amax(1)
    trains = where.any(1)
    whole = [torch.cat([p, s]) for p, s in zip(prompts, steps)]
    before = torch.tensor([len(p) for p in prompts])
    kept = (before + end) * trains
    rows = [ids[:n] for ids, n in zip(whole, kept.tolist())]
    layout = lay(rows, cost.least if least is None else least)
    layout.cost, layout.tiled = cost, cost.onednn
    begin = kept.cumsum(0) - kept
    spot = torch.from_numpy(np.concatenate(layout.spots))[begin[row] + before[row] + step - 1]
    long = torch.tensor([len(ids) for ids in whole])
    target = torch.cat(whole)[(long.cumsum(0) - long)[row] + before[row] + step]
    wide = int(target.max()) + 1
    once, which = (spot * wide + target).unique(return_inverse=True)  # a position may predict other tokens in other rows
    position = torch.from_numpy(layout.depth)
    return Plan(layout, layout.pick(rows), position, row, step, once // wide, once % wide, which)


@dataclass(frozen=True)
class Unit:
    """Rows that must share one forward: their tokens with everything shared counted once, alone and behind the unit before."""

    rows: list[int]
    alone: int
    more: int


def neighbours(units: list[list[int]], prompts: Sequence[Tensor], steps: Sequence[Tensor], least: int) -> list[Unit]:
    """The units in an order that puts rows with common beginnings (of `least` tokens or more) side by side."""
    whole = {r: torch.cat([prompts[r], steps[r]]).numpy() for unit in units for r in unit}
    name = {r: ids.astype(">i8").tobytes() for r, ids in whole.items()}

    def common(a: np.ndarray, b: np.ndarray) -> int:
        n = min(len(a), len(b))
        differs = a[:n] != b[:n]
        n = int(differs.argmax()) if differs.any() else n
        return n if n >= least else 0

    out: list[Unit] = []
    for unit in sorted(units, key=lambda unit: min(name[r] for r in unit)):
        order = sorted(unit, key=lambda r: name[r])
        alone = sum(len(whole[r]) for r in order) - sum(common(whole[a], whole[b]) for a, b in pairwise(order))
        shared = common(whole[out[-1].rows[-1]], whole[order[0]]) if out else 0
        out.append(Unit(order, alone, alone - shared))
    return out


def forms(device: torch.device) -> tuple[Form, ...]:
    """The forms that run on a device, the best first where they cost the same."""
    known: dict[str, tuple[Form, ...]] = {"cpu": ("lse", "two"), "cuda": ("flex", "two")}
    return known.get(device.type, ("two",))


def sample(some: Plan, prompts: Sequence[Tensor], window: int) -> tuple[list[int], int, int]:
    """A small piece of a batch that forks as it does: rows, tokens to leave out at their beginning, tokens to keep."""
    layout = some.layout
    nested = max(layout.pieces, key=lambda p: len(set(layout.owner[p.context].tolist()) | {int(layout.owner[p.start])}))
    beside = [int(layout.owner[r.q0]) for r in layout.regions] + [int(layout.owner[p.start]) for p in layout.pieces]
    rows = list(dict.fromkeys([*layout.owner[nested.context].tolist(), int(layout.owner[nested.start])]))[:3]
    windowed = 0 < window < layout.deepest
    deepest = [int(layout.owner[layout.depth.argmax()])] if windowed else []
    rows = list(dict.fromkeys([*rows, *deepest, *beside]))[:4]
    fork = max([p.depth for p in layout.pieces if int(layout.owner[p.start]) in rows], default=0)
    room = window + 32 if windowed else 64
    shortest = min(len(prompts[i]) for i in rows)
    skip = max(0, min(shortest, fork) - room)
    return rows, skip, max(fork, shortest, skip + room if windowed else 0) + 16


def alike(pieces: Sequence[Piece], cost: Cost | None = None) -> list[list[Piece]]:
    """Pieces that attend to themselves in one call, longest first in each; padding may cost no more than a call of their own."""
    limit = 0.0 if cost is None else cost.rates.call / (4 * cost.width * cost.rates.pair)
    out: list[list[Piece]] = []
    for piece in sorted(pieces, key=lambda p: (-p.length, p.start)):
        if out and (out[-1][0].length ** 2 - piece.length**2) / 2 <= limit:
            out[-1].append(piece)
        else:
            out.append([piece])
    return out


def expanded(layout: Layout) -> list[list[Piece]]:
    """Pieces of equal context length, longest first: one call of form `two` each, whose mask is then one for all."""
    by: dict[int, list[Piece]] = {}
    for piece in sorted(layout.pieces, key=lambda p: -p.length):
        by.setdefault(piece.depth, []).append(piece)
    return list(by.values())


# ---- attention ------------------------------------------------------------------------------------------------------


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    prefix_layout: Layout | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What a model's attention layer calls: query [1, H, T, D], key and value [1, K, T, D] to [1, T, H, D]."""
    if prefix_layout is None:
        raise GruppoError(f"{type(module).__name__} did not hand the layout of shared prefixes on to its attention")
    layout = prefix_layout
    if dropout:
        raise GruppoError(f"attention dropout is {dropout}: rows that share a token would share its dropout; set it to 0")
    odd = [n for n in ("s_aux", "position_bias") if others.get(n) is not None]
    if odd or is_causal is False or attention_mask is not None or query.shape[0] != 1 or query.shape[2] != layout.total:
        raise GruppoError(
            f"{type(module).__name__} attends in a way that shared prefixes do not reproduce ({', '.join(odd) or 'not causal'})"
        )
    if torch.is_autocast_enabled(query.device.type):  # rotary embeddings leave queries and keys in float32
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    layout.used += 1
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = sliding_window if sliding_window and sliding_window < layout.deepest else None
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, H, D]
    if layout.form == "mask":
        out = _masked(q, k, v, layout, scale, window, softcap)
    elif window or softcap or layout.form == "two":
        out = _two(q, k, v, layout, scale, window, softcap)
    elif layout.form == "flex":
        out = _flex(q, k, v, layout, scale)
    else:
        out = _Merged.apply(q, k, v, layout, scale)
    return out[None], None


ALL_ATTENTION_FUNCTIONS.register(NAME, attend)


@contextmanager
def attending(config: Any, name: str = NAME) -> Iterator[None]:
    """The layers that read this configuration attend by the named implementation meanwhile."""
    own = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = own


def visible(layout: Layout, window: int | None = None) -> Tensor:
    """[T, T] bool: which query sees which key."""
    at = torch.arange(layout.total)
    last, depth = torch.from_numpy(layout.last), torch.from_numpy(layout.depth)
    keep = (at <= at[:, None]) & (at[:, None] < last)
    return keep if window is None else keep & (depth[:, None] - depth < window)


def _masked(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, window: int | None, cap: float | None) -> Tensor:
    keep = visible(layout, window).to(q.device)
    return _core(_heads(q), _heads(k), _heads(v), keep, scale, cap)[0].transpose(0, 1)


def _core(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, scale: float, cap: float | None) -> Tensor:
    """[B, H, L, D]; `keep` None is causal."""
    if q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    if cap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keep, is_causal=keep is None, scale=scale)
    if keep is None:
        keep = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    score = torch.tanh(q @ k.transpose(-1, -2) * scale / cap) * cap
    score = score.masked_fill(~keep, torch.finfo(score.dtype).min)
    return score.softmax(-1, dtype=torch.promote_types(score.dtype, torch.float32)).to(q.dtype) @ v


def _two(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, window: int | None, cap: float | None) -> Tensor:
    """Own keys behind the expanded keys of the ancestors, one call for the pieces of equal context."""
    out = []
    for own, seen, keep in _expanded_on(layout, q.device, window):
        n, wide = own.shape
        here, there = (n, wide, *q.shape[1:]), (n, seen.shape[1], *k.shape[1:])
        a = q[own.flatten()].view(here).transpose(1, 2)
        b, c = (x[seen.flatten()].view(*there[:-1], x.shape[-1]).transpose(1, 2) for x in (k, v))
        out.append(_core(a, b, c, keep, scale, cap).transpose(1, 2).flatten(0, 1))
    return torch.cat(out)[_back(layout, q.device)]


def _expanded_on(layout: Layout, device: torch.device, window: int | None) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    if (known := layout._blocks.get(("two", device, window))) is not None:
        return known
    out = []
    for some in expanded(layout):
        wide, before = some[0].length, some[0].depth
        own = np.stack([_spread(p, wide) for p in some])
        cut = 0 if window is None else max(0, before - window + 1)  # keys that no query of these pieces sees
        seen = np.concatenate([np.stack([p.context[cut:] for p in some]), own], 1)
        keep = None
        if before > cut or window is not None:
            at, to = torch.arange(before, before + wide)[:, None], torch.arange(cut, before + wide)
            keep = to <= at  # padding stands behind a piece's own tokens and is seen by padding alone
            if window is not None:
                keep &= at - to < window
            keep = keep.to(device)
        out.append((torch.from_numpy(own).to(device), torch.from_numpy(seen).to(device), keep))
    layout._blocks["two", device, window] = out
    return out


def _back(layout: Layout, device: torch.device) -> Tensor:
    """Where each token's row stands in the concatenated, padded answers of `expanded`."""
    if (known := layout._blocks.get(("back", device))) is None:
        known, at = np.empty(layout.total, dtype=np.int64), 0
        for some in expanded(layout):
            for p in some:
                known[p.start : p.start + p.length] = np.arange(at, at + p.length)
                at += some[0].length
        known = layout._blocks["back", device] = torch.from_numpy(known).to(device)
    return known


def _spread(piece: Piece, wide: int) -> np.ndarray:
    """Its tokens' indices, then its last token's again as padding."""
    return np.minimum(np.arange(piece.start, piece.start + wide), piece.start + piece.length - 1)


@cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)  # without `dynamic` every new length is compiled again


def block_mask(layout: Layout, device: torch.device) -> Any:
    """FlexAttention's block mask of this layout."""
    from torch.nn.attention.flex_attention import create_block_mask

    if (known := layout._blocks.get(("flex", device))) is None:
        last = torch.from_numpy(layout.last).to(device)
        size = layout.total
        known = create_block_mask(lambda b, h, q, k: (k <= q) & (q < last[k]), None, None, size, size, device=device)
        layout._blocks["flex", device] = known
    return known


def _flex(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> Tensor:
    q, k, v = _heads(q), _heads(k), _heads(v)
    out = _compiled_flex()(q, k, v, block_mask=block_mask(layout, q.device), scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)


class _Block:
    """Pieces that attend to themselves in one call: a slice where they are one or stand evenly side by side, else gathered."""

    def __init__(self, some: list[Piece]) -> None:
        self.n, self.wide, self.pieces = len(some), some[0].length, some
        starts = [p.start for p in some]
        even = all(p.length == self.wide for p in some) and starts == list(
            range(starts[0], starts[0] + self.n * self.wide, self.wide)
        )
        self.slice = slice(starts[0], starts[0] + self.n * self.wide) if even else None
        self.index = torch.from_numpy(np.concatenate([_spread(p, self.wide) for p in some]))
        real = [np.arange(i * self.wide, i * self.wide + p.length) for i, p in enumerate(some)]
        self.real = torch.from_numpy(np.concatenate(real))
        self.to = self.index[self.real]

    @property
    def own(self) -> Iterator[slice]:
        """Where each piece stands."""
        return (slice(p.start, p.start + p.length) for p in self.pieces)

    def take(self, x: Tensor) -> Tensor:
        """[n, H, wide, D] of [T, H, D]."""
        x = x[self.slice] if self.slice is not None else x.index_select(0, self.index)
        return x.unflatten(0, (self.n, self.wide)).transpose(1, 2)

    def put(self, x: Tensor, value: Tensor) -> None:
        """Write [n, H, wide, D] into [T, H, D]."""
        value = value.transpose(1, 2)
        if self.slice is not None:
            x[self.slice].unflatten(0, (self.n, self.wide)).copy_(value)
        else:
            x.index_copy_(0, self.to, value.flatten(0, 1).index_select(0, self.real).to(x.dtype))


def _self_blocks(layout: Layout) -> list[_Block]:
    if (known := layout._blocks.get("lse")) is None:
        known = layout._blocks["lse"] = [_Block(some) for some in alike(layout.pieces, layout.cost)]
    return known


class _Merged(torch.autograd.Function):
    """Each region by the flash kernel; softmax over all of them by log-sum-exp.

    With lse = log sum_r exp(lse_r), the answer is sum_r exp(lse_r - lse) out_r. A region's probabilities under the whole
    softmax are exp(score - lse), so its backward is the kernel's own, given the merged answer and the merged lse.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> Tensor:
        exact = q.dtype if q.dtype == torch.float64 else torch.float32
        out = torch.empty(*q.shape[:-1], v.shape[-1], dtype=exact)
        lse = torch.empty(q.shape[:2], dtype=exact)
        for block in _self_blocks(layout):
            if layout.tiled and tiles.pays(q[: block.wide], k[: block.wide]):
                for at in block.own:
                    out[at], lse[at] = tiles.forward(q[at], k[at], v[at], scale, True)
                continue
            o, s = _FLASH(block.take(q), block.take(k), block.take(v), 0.0, True, scale=scale)
            block.put(out, o)
            block.put(lse[..., None], s[..., None])
        for r in layout.regions:
            here, there = slice(r.q0, r.q1), slice(r.k0, r.k1)
            if layout.tiled and tiles.pays(q[here], k[there]):
                o, s = tiles.forward(q[here], k[there], v[there], scale, False)
            else:
                o, s = _FLASH(_heads(q[here]), _heads(k[there]), _heads(v[there]), 0.0, False, scale=scale)
                o, s = o[0].transpose(0, 1), s[0].transpose(0, 1)
            both = torch.logaddexp(lse[here], s)
            out[here].mul_((lse[here] - both).exp_()[..., None]).addcmul_(o.to(exact), (s - both).exp_()[..., None])
            lse[here] = both
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, out, lse = ctx.saved_tensors
        exact = lse.dtype
        dq, dk, dv = (torch.empty(x.shape, dtype=exact) for x in (q, k, v))
        layout = ctx.layout
        for b in _self_blocks(layout):
            if layout.tiled and tiles.pays(q[: b.wide], k[: b.wide]):
                for at in b.own:
                    dq[at], dk[at], dv[at] = tiles.backward(grad[at], q[at], k[at], v[at], out[at], lse[at], ctx.scale, True)
                continue
            g, s = b.take(grad), b.take(lse[..., None])[..., 0]
            if b.slice is None:  # a padded query repeats a real one: its gradient must not count again
                g = g.transpose(1, 2).flatten(0, 1)
                g = torch.zeros_like(g).index_copy_(0, b.real, g.index_select(0, b.real))
                g = g.unflatten(0, (b.n, b.wide)).transpose(1, 2)
            some = _FLASH_BACKWARD(g, b.take(q), b.take(k), b.take(v), b.take(out), s, 0.0, True, scale=ctx.scale)
            for x, part in zip((dq, dk, dv), some):
                b.put(x, part)
        for r in layout.regions:
            here, there = slice(r.q0, r.q1), slice(r.k0, r.k1)
            if layout.tiled and tiles.pays(q[here], k[there]):
                some = tiles.backward(grad[here], q[here], k[there], v[there], out[here], lse[here], ctx.scale, False)
            else:
                a, b, c, o, g = (_heads(x) for x in (q[here], k[there], v[there], out[here], grad[here]))
                some = _FLASH_BACKWARD(g, a, b, c, o, lse[here].transpose(0, 1)[None], 0.0, False, scale=ctx.scale)
                some = (part[0].transpose(0, 1) for part in some)
            for x, part in zip((dq[here], dk[there], dv[there]), some):
                x.add_(part)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


def _heads(x: Tensor) -> Tensor:
    """[1, H, L, D] of [L, H, D]."""
    return x.transpose(0, 1)[None]


_FLASH: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
