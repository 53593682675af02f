"""Decoding in few operations, for the sampler on a CPU, where most of a small model's time goes into starting them.

Only for float32 models of Qwen2, Qwen3 and Llama whose parts have exactly transformers' classes: anything else, a hook, a
sliding window or a rotary basis that depends on the length takes the model's own forward (`decode.Rows`). Parts that are no
plain linear maps, such as those with a LoRA adapter, are called as they stand.

Every prompt's keys and values stand once, whatever the number of rows that decode it: a row's attention to its prompt and to
its own tokens are computed apart and merged by their log-sum-exp. Of a prompt's last layer only what is read is computed.

Large linear maps of the same input are copied side by side, in the layout of oneDNN's kernels. The copies live as long as the
keys and values of one call of the sampler, which hold for these weights alone as well.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention

from gruppo.policies.decode import Rows
from gruppo.policies.products import filled, rounded

KNOWN = {f"transformers.models.{name.lower()}.modeling_{name.lower()}": name for name in ("Qwen2", "Qwen3", "Llama")}
STATIC = {"default", "linear", "llama3", "yarn"}  # rotary bases that depend on the position alone

# from runs of oneDNN's product beside the one that `nn.Linear` starts, on one CPU thread with AVX-512
LARGE = 2**16  # numbers in a weight from which starting oneDNN's product costs less than it saves
TOKENS = 256  # tokens through the model from which copying its weights costs less than it saves
ROWS = 8  # rows that the layout is chosen for

ROOM = 64  # columns added for the rows' own tokens when they are used up
SPREAD = 4  # times as many places as rows, from which every row gets its prompt's keys for itself
ALLOWED = 1e-4  # largest difference of a log-probability from the ordinary forward's

_FLASH: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # sdpa that returns the log-sum-exp, too
_PACK: Any = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None) if torch.backends.mkldnn.is_available() else None
_MAP: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def rows(policy: Any, refills: bool, tokens: int) -> Rows | LeanRows:
    """The rows of one call of the sampler, in which about `tokens` tokens pass the model."""
    if policy.lean and known(policy):
        if policy.lean_agrees is None:
            policy.lean_agrees = _compare(policy)
        if policy.lean_agrees:
            return LeanRows(policy, refills, tokens >= TOKENS)
    return Rows(policy, refills)


def known(policy: Any) -> bool:
    """Whether every part of the model that is not called as it stands is known by its class."""
    model, root = policy.model, _root(policy.model)
    adapters = getattr(model, "peft_config", None) or {}
    if not isinstance(adapters, dict) or any(
        str(getattr(a.peft_type, "value", a.peft_type)) != "LORA" or getattr(a, "alora_invocation_tokens", None)
        for a in adapters.values()
    ):
        return False
    if model is not root and (not adapters or _touched(model) or _touched(model.base_model)):
        return False
    name, made = KNOWN.get(type(root).__module__), vars(sys.modules[type(root).__module__])
    if name is None or type(root) is not made[f"{name}ForCausalLM"]:
        return False
    decoder, config = root.model, root.config
    parts = [(root, "ForCausalLM"), (decoder, "Model"), (decoder.rotary_emb, "RotaryEmbedding"), (decoder.norm, "RMSNorm")]
    for layer in decoder.layers:
        parts += [(layer, "DecoderLayer")]
        if type(layer) is made[f"{name}DecoderLayer"]:
            parts += [(layer.self_attn, "Attention"), (layer.mlp, "MLP")]
            parts += [(layer.input_layernorm, "RMSNorm"), (layer.post_attention_layernorm, "RMSNorm")]
            if name == "Qwen3" and type(layer.self_attn) is made["Qwen3Attention"]:
                parts += [(layer.self_attn.q_norm, "RMSNorm"), (layer.self_attn.k_norm, "RMSNorm")]
    return (
        all(type(part) is made[f"{name}{kind}"] and not _touched(part) for part, kind in parts)
        and config._attn_implementation in ("sdpa", "eager")
        and all(kind == "full_attention" for kind in getattr(config, "layer_types", None) or ())
        and decoder.rotary_emb.rope_type in STATIC
        and policy.autocast is None
        and not torch.is_autocast_enabled("cpu")
        and all(type(p) is nn.Parameter and p.dtype == torch.float32 and p.device.type == "cpu" for p in model.parameters())
    )


def _root(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _touched(module: Any) -> bool:
    """Whether calling it does more or else than its class says."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _compare(policy: Any) -> bool | None:
    """Whether both kinds of rows give the same log-probabilities; None where the ordinary ones are not finite."""
    vocab = policy.config.vocab_size
    g = torch.Generator().manual_seed(0)
    size = min(19, policy.context - 4)
    long, short, new = (torch.randint(vocab, (n,), generator=g) for n in (size, max(1, size // 3), max(1, size - 3)))
    tokens = torch.randint(vocab, (4, 4), generator=g)
    none, two = torch.empty(0, dtype=torch.long), torch.tensor([0, 2])

    def run(kind: Rows | LeanRows) -> Tensor:
        out = [kind.enter(none, [long, short, long], hold=False), kind.step(tokens[0, :3]), kind.step(tokens[1, :3])]
        if kind.refills:
            out += [kind.enter(two, [new, short], hold=False), kind.step(tokens[2])]
        kind.keep(two)
        return torch.cat([*out, kind.step(tokens[3, :2])]).log_softmax(-1)

    counts = policy.counts.copy()
    try:
        own = run(Rows(policy, True))
        if not own.isfinite().all():
            return None
        gap = max(float((own - run(LeanRows(policy, True, copied))).abs().max()) for copied in (False, True))
        why = None if gap <= ALLOWED else f"its log-probabilities differ by {gap:.2g} (allowed {ALLOWED:g})"
    except (AttributeError, RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        why = f"it failed with {type(error).__name__}: {error}"
    finally:
        policy.counts.clear()
        policy.counts.update(counts)
    if why is not None:
        warnings.warn(
            f"sampling does not decode this model in few operations: {why}. It takes the model's own forward, which gives the "
            "same more slowly",
            stacklevel=2,
        )
    return why is None


class Maps:
    """Linear maps of the same input, their outputs side by side."""

    def __init__(self, maps: list[Any], copied: bool) -> None:
        self.maps, self.weight, self.bias = maps, None, None
        plain = all(type(m) is nn.Linear and not _touched(m) for m in maps)
        if copied and plain and _PACK is not None and _MAP is not None and sum(m.weight.numel() for m in maps) >= LARGE:
            self.weight = _PACK(torch.cat([m.weight.detach() for m in maps]), ROWS)
            if any(m.bias is not None for m in maps):
                self.bias = torch.cat([torch.zeros(m.out_features) if m.bias is None else m.bias.detach() for m in maps])

    def __call__(self, x: Tensor) -> Tensor:
        if self.weight is not None:
            # rows leave one by one, and oneDNN keeps what it prepares for every number of them
            return _MAP(filled(x, rounded(len(x))), self.weight, self.bias, "none", [], "")[: len(x)]
        out = [m(x) for m in self.maps]
        return out[0] if len(out) == 1 else torch.cat(out, -1)


class Layer:
    """One decoder layer."""

    def __init__(self, layer: Any, copied: bool) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        config, self.dim, self.scale = attention.config, attention.head_dim, attention.scaling
        self.q, self.k = config.num_attention_heads, config.num_key_value_heads
        self.qkv, self.out = (
            Maps([attention.q_proj, attention.k_proj, attention.v_proj], copied),
            Maps([attention.o_proj], copied),
        )
        self.up, self.down = Maps([mlp.gate_proj, mlp.up_proj], copied), Maps([mlp.down_proj], copied)
        self.activate = mlp.act_fn
        self.before, self.between = layer.input_layernorm, layer.post_attention_layernorm
        self.norm: Tensor | None = None  # of queries and keys, by head
        if hasattr(attention, "q_norm"):
            self.eps = attention.q_norm.variance_epsilon
            weights = attention.q_norm.weight.detach(), attention.k_norm.weight.detach()
            self.norm = torch.cat([w.expand(n, -1) for w, n in zip(weights, (self.q, self.k))])

    def heads(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [N, heads, D] of N tokens, turned to their places."""
        qkv = self.qkv(_rms(x, self.before)).view(-1, self.q + 2 * self.k, self.dim)
        qk, v = qkv.split((self.q + self.k, self.k), 1)
        if self.norm is not None:
            qk = rms_norm(qk, (self.dim,), None, self.eps) * self.norm
        cos, sin = turn
        qk = torch.addcmul(qk * cos, qk.roll(self.dim // 2, -1), sin)
        q, k = qk.split((self.q, self.k), 1)
        return q, k, v

    def feed(self, x: Tensor) -> Tensor:
        """What the second half of the layer adds."""
        gate, up = self.up(_rms(x, self.between)).chunk(2, -1)
        return self.down(self.activate(gate) * up)


def _rms(x: Tensor, norm: Any) -> Tensor:
    return rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)


class Lean:
    """The forward of a model with the weights it has now."""

    def __init__(self, model: Any, copied: bool) -> None:
        root = _root(model)
        self.embed, self.rotary, self.norm = root.model.embed_tokens, root.model.rotary_emb, root.model.norm
        self.layers = [Layer(layer, copied) for layer in root.model.layers[: root.config.num_hidden_layers]]
        self.head = Maps([root.lm_head], copied)
        self.table = torch.empty(0, 2, self.layers[0].dim)  # cosine and signed sine by place

    def __call__(
        self, ids: Tensor, place: Tensor, attend: Callable[[int, Tensor, Tensor, Tensor], Tensor], read: Tensor | None = None
    ) -> Tensor:
        """Logits of the tokens `ids` [N] or, of these, of those to `read`. `attend` takes the layer's number, queries, keys and
        values [N, heads, D] and gives [N, heads * D], for the last layer only where it is read."""
        turn, x = self._turn(place), self.embed(ids)
        for i, layer in enumerate(self.layers):
            out = attend(i, *layer.heads(x, turn))
            if read is not None and i + 1 == len(self.layers):
                x = x[read]
            x = x + layer.out(out)
            x = x + layer.feed(x)
        return self.head(_rms(x, self.norm))

    def _turn(self, place: Tensor) -> tuple[Tensor, Tensor]:
        """[N, 1, D]: what multiplies a vector, and what multiplies it with its halves exchanged, to turn it to its place."""
        most = int(place.max())
        if most >= len(self.table):
            cos, sin = self.rotary(torch.empty(0), torch.arange(max(2 * most, 64))[None])
            half = self.layers[0].dim // 2
            self.table = torch.stack([cos[0], torch.cat([-sin[0, :, :half], sin[0, :, half:]], -1)], 1)
        turn = self.table[place]
        return turn[:, :1], turn[:, 1:]


class LeanRows:
    """The rows that decode now, as `decode.Rows`, of a model that is `known`.

    A prompt's keys and values are aligned at its first token, those of the tokens that a row drew at the last one.
    """

    def __init__(self, policy: Any, refills: bool, copied: bool) -> None:
        self.policy, self.refills = policy, refills
        self.net = Lean(policy.model, copied)
        layer = self.net.layers[0]
        self.keys: list[tuple[int, ...]] = []  # the prompts
        self.said = torch.empty(0, policy.config.vocab_size)  # the logits after each
        self.length = torch.empty(0, dtype=torch.long)  # and their tokens
        nothing = torch.empty(0, layer.k, 0, layer.dim)
        self.given = [(nothing, nothing) for _ in self.net.layers]  # keys and values of each
        self.which = torch.empty(0, dtype=torch.long)  # the prompt of each row
        self.age = torch.empty(0, dtype=torch.long)  # how many tokens of its own are in the cache
        self.made = [(nothing, nothing) for _ in self.net.layers]  # their keys and values
        self.used = 0  # columns of these
        self.held: tuple[int, ...] | None = None  # a prompt of which further paths wait
        self._arrange()

    @property
    def size(self) -> Tensor:
        """Tokens of each row that are in the cache."""
        return self.length[self.which] + self.age

    def keep(self, rows: Tensor) -> None:
        """The others leave."""
        self._select(rows)
        self._arrange()

    def enter(self, rows: Tensor, prompts: list[Tensor], *, hold: bool) -> Tensor:
        """Only `rows` stay and the prompts come behind them; the logits after each prompt.

        `hold`: further paths of the last prompt wait, so that it stays even if all its rows leave.
        """
        keys = [tuple(p.tolist()) for p in prompts]
        self._select(rows, keys)
        new = [key for key in dict.fromkeys(keys) if key not in self.keys]
        if new:
            self._read(new)
        at = {key: i for i, key in enumerate(self.keys)}
        entered = torch.tensor([at[key] for key in keys])
        self.which = torch.cat([self.which, entered])
        self.age = torch.cat([self.age, torch.zeros_like(entered)])
        said = self.said[entered]
        self.held = keys[-1] if hold else None
        self._arrange()
        return said

    def step(self, token: Tensor) -> Tensor:
        """The logits [R, V] after one more token of each row."""
        if self.used == self.made[0][0].shape[2]:
            self._select(torch.arange(len(token)))
        self.used += 1
        self.age = self.age + 1
        self.unseen = None if self.even else _unseen(torch.arange(self.used) < (self.used - self.age)[:, None])
        out = self.net(token, self.size - 1, self._attend)
        self.policy.counts["decodes"] += 1
        self.policy.counts["decoded_rows"] += len(token)
        return out

    def _attend(self, i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n, heads, dim = k.shape
        scale, own = self.net.layers[i].scale, [space.narrow(2, 0, self.used) for space in self.made[i]]
        own[0].select(2, -1).copy_(k)
        own[1].select(2, -1).copy_(v)
        q = q.view(n, heads, -1, dim)  # the queries that share a key stand where a sequence would
        out, lse = _FLASH(q, *own, 0.0, False, attn_mask=self.unseen, scale=scale)
        asked = q if self.slots is None else q[self.slots]
        asked = asked.unflatten(0, (len(self.keys), -1)).transpose(1, 2)
        before, weight = _FLASH(asked.flatten(2, 3), *self.given[i], 0.0, False, attn_mask=self.unfilled, scale=scale)
        before = before.view(asked.shape).transpose(1, 2).flatten(0, 1)
        weight = weight.view(asked.shape[:-1]).transpose(1, 2).flatten(0, 1)
        if self.place is not None:
            before, weight = before[self.place], weight[self.place]
        return torch.lerp(out, before, (weight - lse).sigmoid_()[..., None]).reshape(n, -1)

    def _read(self, prompts: list[tuple[int, ...]]) -> None:
        """Add these prompts, padded on the right, so that causality alone keeps padding out."""
        width, count = max(map(len, prompts)), len(prompts)
        ids = torch.full((count, width), self.policy.pad)
        length = torch.tensor([len(p) for p in prompts])
        for row, p in enumerate(prompts):
            ids[row, : len(p)] = torch.tensor(p)
        mask = _unseen(torch.arange(width) >= length[:, None]) if int(length.min()) < width else None
        last = torch.arange(count) * width + length - 1
        found = []

        def attend(i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            layer = self.net.layers[i]
            keys, values = (x.view(count, width, layer.k, layer.dim).transpose(1, 2).contiguous() for x in (k, v))
            found.append((keys, values))
            if i + 1 == len(self.net.layers):
                q = q[last].view(count, layer.k, -1, layer.dim)
                return scaled_dot_product_attention(q, keys, values, mask, scale=layer.scale).reshape(count, -1)
            q = q.view(count, width, layer.q, layer.dim).transpose(1, 2)
            many = layer.q > layer.k
            out = scaled_dot_product_attention(q, keys, values, is_causal=True, scale=layer.scale, enable_gqa=many)
            return out.transpose(1, 2).reshape(count * width, -1)

        said = self.net(ids.flatten(), torch.arange(width).repeat(count), attend, last)
        self.keys = self.keys + prompts
        self.length, self.said = torch.cat([self.length, length]), torch.cat([self.said, said])
        self.given = [(_beside(old[0], new[0]), _beside(old[1], new[1])) for old, new in zip(self.given, found)]
        self.policy.counts["prefills"] += count
        self.policy.counts["prompt_tokens"] += sum(map(len, prompts))

    def _select(self, rows: Tensor, entering: list[tuple[int, ...]] | None = None) -> None:
        """Only these rows stay, with their prompts, the one held and those entering; there is room for what comes."""
        self.which, self.age = self.which[rows], self.age[rows]
        asked = {*(entering or ()), self.held}
        stay = sorted({*self.which.tolist(), *(self.keys.index(key) for key in asked if key in self.keys)})
        if len(stay) < len(self.keys):
            self._pick(torch.tensor(stay, dtype=torch.long))
            self.which = torch.searchsorted(torch.tensor(stay, dtype=torch.long), self.which)
        own = int(self.age.max()) if len(rows) else 0
        room = len(rows) + len(entering or ()), own + max(ROOM, own // 2)

        def moved(old: Tensor) -> Tensor:
            # a masked column still enters the product with weight 0, and 0 times what was left in memory may be NaN
            shape = room[0], old.shape[1], room[1], old.shape[3]
            new = old.new_zeros(shape) if entering else old.new_empty(shape)
            new[: len(rows), :, :own] = old[rows, :, self.used - own : self.used]
            return new

        self.made = [(moved(keys), moved(values)) for keys, values in self.made]
        self.used = own

    def _pick(self, prompts: Tensor) -> None:
        self.keys = [self.keys[i] for i in prompts.tolist()]
        self.length, self.said = self.length[prompts], self.said[prompts]
        width = int(self.length.max()) if len(prompts) else 0
        self.given = [(keys[prompts, :, :width], values[prompts, :, :width]) for keys, values in self.given]

    def _arrange(self) -> None:
        """How rows and prompts meet: the rows of each prompt side by side, as many for one as for all."""
        count = torch.bincount(self.which, minlength=len(self.keys))
        if len(self.keys) * int(max(count, default=0)) > SPREAD * len(self.which) > 0:  # each row gets its prompt for itself
            held = [self.keys.index(self.held)] if self.held is not None else []
            self._pick(torch.cat([self.which, torch.tensor(held, dtype=torch.long)]))
            self.which = torch.arange(len(self.which))
            count = torch.bincount(self.which, minlength=len(self.keys))
        most = int(count.max()) if len(count) else 0
        every = torch.arange(len(self.which))
        order = self.which.argsort(stable=True)
        slot = torch.empty_like(order)
        slot[order] = self.which[order] * most + every - (count.cumsum(0) - count)[self.which[order]]
        self.place = self.slots = None  # of each row; the row of each place
        if len(self.keys) * most > len(slot) or not torch.equal(slot, every):
            self.place, self.slots = slot, torch.zeros(len(self.keys) * most, dtype=torch.long)
            self.slots[slot] = every
        ragged = len(self.keys) > 0 and bool((self.length < self.length.max()).any())
        self.unfilled = _unseen(torch.arange(int(self.length.max())) >= self.length[:, None]) if ragged else None
        self.even = bool((self.age == self.used).all())


def _beside(a: Tensor, b: Tensor) -> Tensor:
    """The prompts of both, as wide as the wider."""
    if not len(a):
        return b
    out = a.new_zeros(len(a) + len(b), a.shape[1], max(a.shape[2], b.shape[2]), a.shape[3])
    out[: len(a), :, : a.shape[2]], out[len(a) :, :, : b.shape[2]] = a, b
    return out


def _unseen(mask: Tensor) -> Tensor:
    """[B, 1, 1, W]: what is added to scores, of masked columns minus infinity."""
    return torch.zeros(mask.shape).masked_fill_(mask, -torch.inf)[:, None, None]
