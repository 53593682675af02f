"""The rows that a language model decodes together: one key-value cache in which every row ends at the last column.

A row may leave at any step and a new prompt may take its room. Keys carry their own positions, so a row can stand anywhere in
the cache: what lies before its first token is masked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from gruppo.policies.prefix import number


class Roomy(DynamicLayer):
    """Keys and values with room to grow: a new token is written in place where `DynamicLayer` would copy all earlier ones."""

    ROOM = 64  # tokens added whenever the room is used up

    def _store(self, keys: Tensor, values: Tensor, room: int) -> None:
        self.used = keys.shape[-2]
        full = (*keys.shape[:2], self.used + room)
        self.rooms = keys.new_empty(*full, keys.shape[-1]), values.new_empty(*full, values.shape[-1])
        for space, x in zip(self.rooms, (keys, values)):
            space[:, :, : self.used] = x

    def _filled(self) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (space[:, :, : self.used] for space in self.rooms)
        return self.keys, self.values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._store(key_states, value_states, 0)
            return self._filled()
        end = self.used + key_states.shape[-2]
        if end > self.rooms[0].shape[-2]:
            self._store(*self._filled(), end - self.used + self.ROOM)
        for space, x in zip(self.rooms, (key_states, value_states)):
            space[:, :, self.used : end] = x
        self.used = end
        return self._filled()

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        keys, values = self._filled()
        self._store(keys[indices], values[indices], self.ROOM)
        self._filled()

    def join(self, sources: list[tuple[Roomy, Tensor]], width: int) -> None:
        """Hold these rows of these layers, each aligned at its last token, in `width` columns."""
        full = sum(len(index) for _, index in sources)
        first = sources[0][0]
        if not self.is_initialized:
            self.lazy_initialization(first.rooms[0], first.rooms[1])
        # zeros, since a masked column still enters the product with weight 0, and 0 times what was left in memory may be NaN
        rooms = tuple(x.new_zeros(full, x.shape[1], width + self.ROOM, x.shape[-1]) for x in first.rooms)
        at = 0
        for layer, index in sources:
            columns = min(width, layer.used)
            for space, x in zip(rooms, layer.rooms):
                space[at : at + len(index), :, width - columns : width] = x[index, :, layer.used - columns : layer.used]
            at += len(index)
        self.rooms, self.used = (rooms[0], rooms[1]), width
        self._filled()


def roomy_cache(config: Any) -> DynamicCache:
    """The cache that transformers makes for this model, its growing full-attention layers replaced by `Roomy`."""
    cache = DynamicCache(config=config)
    cache.layers = [Roomy() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


# numbers of the cache that are read in the time that starting one layer takes: from runs of a model of 4 layers and 3.4 M
# parameters on one CPU thread; an accelerator reads far more in that time, so that refilling pays even earlier there
LAUNCH = 1.3e6


def refilling_pays(policy: Any, rows: int, paths: int, max_new: int) -> bool:
    """Whether entering while others decode costs less than waiting until all have left, counted for lengths even in 1..max_new.

    Waiting runs (paths / rows - 1) max_new / 2 more forwards, each of which starts every layer and reads all weights. Entering
    keeps the cache as wide as its longest row, so each of the paths max_new / 2 rows decoded attends to about 2/3 max_new more
    columns. Measured in numbers read.
    """
    config = policy.config
    all_heads = number(config, "num_attention_heads") or 1
    heads = number(config, "num_key_value_heads") or all_heads
    size = number(config, "head_dim") or config.hidden_size // all_heads
    layers = config.num_hidden_layers
    forward = sum(p.numel() for p in policy.model.parameters()) + layers * LAUNCH
    column = 2 * layers * heads * size
    return (paths / rows - 1) * forward > paths * max_new * column * 2 / 3


@dataclass(frozen=True)
class _Held:
    """A prompt that was read and of which further paths wait."""

    key: tuple[int, ...]
    cache: DynamicCache
    logits: Tensor  # [1, V]


class Rows:
    """The rows that decode now. `refills`: whether prompts may enter while others decode.

    Layers with a sliding window or a recurrent state keep no column per token; with those, prompts enter when all rows left.
    """

    def __init__(self, policy: Any, refills: bool) -> None:
        self.policy = policy
        self.cache = roomy_cache(policy.config)
        self.refills = refills and bool(self.cache.layers) and all(type(layer) is Roomy for layer in self.cache.layers)
        self.size = torch.empty(0, dtype=torch.long, device=policy.device)  # tokens of each row that are in the cache
        self.width, self.padded = 0, False
        self.held: _Held | None = None

    def keep(self, rows: Tensor) -> None:
        """The others leave."""
        self.cache.batch_select_indices(rows)
        self.size = self.size[rows]

    def enter(self, rows: Tensor, prompts: list[Tensor], *, hold: bool) -> Tensor:
        """Only `rows` stay and the prompts come behind them; the logits after each prompt.

        `hold`: further paths of the last prompt wait. They come first the next time, and it is not read again.
        """
        keys = [tuple(p.tolist()) for p in prompts]
        found, logits, held = self.read(keys, self.held, hold=hold and self.refills)
        self.size = torch.cat([self.size[rows], torch.tensor([len(k) for k in keys], device=self.policy.device)])
        self.width = int(self.size.max())
        self.padded = bool((self.size < self.width).any())
        if self.refills:
            _join(self.cache, [(self.cache, rows), *found] if len(rows) else found, self.width)
            self.held = held
        else:
            [(self.cache, index)] = found
            self.cache.batch_select_indices(index)
        return logits

    def read(
        self, keys: list[tuple[int, ...]], held: _Held | None, *, hold: bool
    ) -> tuple[list[tuple[Any, Tensor]], Tensor, _Held | None]:
        """Caches with rows of them for these prompts in their order, the logits after each, and what is held from here on.

        Those that are `held` come first and are not read again; with `hold` the last one is held.
        """
        device = self.policy.device
        found: list[tuple[Any, Tensor]] = []
        logits: list[Tensor] = []
        known = 0 if held is None else sum(k == held.key for k in keys)
        if held is not None and known:
            found.append((held.cache, torch.zeros(known, dtype=torch.long, device=device)))
            logits.append(held.logits.expand(known, -1))
        held = held if hold else None
        place = {k: i for i, k in enumerate(dict.fromkeys(keys[known:]))}
        if place:
            filled, said = self._prefill(list(place))
            index = torch.tensor([place[k] for k in keys[known:]], device=device)
            found.append((filled, index))
            logits.append(said[index])
            if hold:
                last = torch.tensor([place[keys[-1]]], device=device)
                held = _Held(keys[-1], roomy_cache(self.policy.config), said[last])
                _join(held.cache, [(filled, last)], len(keys[-1]))
        return found, torch.cat(logits), held

    def step(self, token: Tensor) -> Tensor:
        """The logits [R, V] after one more token of each row."""
        policy = self.policy
        mask = None
        if self.padded:
            mask = (torch.arange(self.width + 1, device=token.device) >= (self.width - self.size)[:, None]).long()
        with policy._cast():
            out = policy.model(
                input_ids=token[:, None],
                attention_mask=mask,
                # a finished row that still stands in the cache may run beyond the last position
                position_ids=self.size.clamp(max=policy.context - 1)[:, None],
                past_key_values=self.cache,
                use_cache=True,
            )
        self.size = self.size + 1
        self.width += 1
        policy.counts["decodes"] += 1
        policy.counts["decoded_rows"] += len(token)
        return out.logits[:, -1].float()

    def _prefill(self, prompts: list[tuple[int, ...]]) -> tuple[DynamicCache, Tensor]:
        """A cache of these prompts, padded on the left, and the logits [P, V] after each."""
        policy, width = self.policy, max(map(len, prompts))
        ids = torch.full((len(prompts), width), policy.pad)
        real = torch.zeros(len(prompts), width, dtype=torch.long)
        for row, p in enumerate(prompts):
            ids[row, width - len(p) :] = torch.tensor(p)
            real[row, width - len(p) :] = 1
        cache = roomy_cache(policy.config)
        ids, real = ids.to(policy.device), real.to(policy.device)
        with policy._cast():
            out = policy.model(
                input_ids=ids,
                attention_mask=None if min(map(len, prompts)) == width else real,
                position_ids=(real.cumsum(1) - 1).clamp(min=0),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        policy.counts["prefills"] += len(prompts)
        policy.counts["prompt_tokens"] += sum(map(len, prompts))
        return cache, out.logits[:, -1].float()


def _join(cache: DynamicCache, sources: list[tuple[DynamicCache, Tensor]], width: int) -> None:
    for i, layer in enumerate(cache.layers):
        parts: Any = [(other.layers[i], index) for other, index in sources]
        if parts[0][0].is_initialized and isinstance(layer, Roomy):  # a layer that reads another's keys has none
            layer.join(parts, width)
