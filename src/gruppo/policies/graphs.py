"""Decoding with fixed shapes, for the sampler on CUDA, where starting the kernels of one token takes longer than running them.

The rows, rounded up to a power of two, and the columns of their cache stand in buffers that keep their addresses: a row's token
of place j is column j, what lies behind its last one is masked, and a row that left stays as a dead one until half of the rows
are dead. One step is then the same kernels at the same addresses whatever is decoded. It is recorded as a CUDA graph once per
number of rows and columns and replayed.

Only for models whose cache keeps a column per token in every layer, with transformers' `sdpa` or `eager` attention, plain
weights on one device, no autocast and no rotary basis that depends on the length. What nothing but numbers can show is compared
at first use with the model's own rows (`decode.Rows`), which every other model takes.

Buffers and graphs live as long as one call of the sampler: nothing is kept while the weights train.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from gruppo.policies import lean
from gruppo.policies.decode import Roomy, Rows, _Held, roomy_cache
from gruppo.types import GruppoError

COLUMNS = 64  # the least; doubled whenever they are used up
WARM = 3  # steps of one shape that are called before it is recorded, as a shape may pass quickly; a guess, not measured
EXACT = 1e-4  # largest difference of a log-probability from the ordinary rows', float32
ROUGH = 0.25  # in half precision, of its mean under the distribution: in the tail, rounding alone exceeds any bound

Step = Callable[[], Tensor]


@runtime_checkable
class Recorder(Protocol):
    """Runs a step beside what it is to be recorded on, and records it: what comes back repeats it on the same addresses."""

    def warm(self, step: Step) -> Tensor: ...

    def record(self, step: Step) -> Step: ...


class CudaRecorder:
    """CUDA graphs that share their working memory."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, _stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def warm(self, step: Step) -> Tensor:
        here = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            out = step()
        here.wait_stream(self.stream)
        out.record_stream(here)
        return out

    def record(self, step: Step) -> Step:
        graph = torch.cuda.CUDAGraph()
        # what other threads do on the device meanwhile is no part of the step and no error
        with (
            torch.cuda.device(self.device),
            torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"),
        ):
            out = step()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


@lru_cache
def _stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)  # always the same one: torch keeps working memory for each that multiplies


def recorder(policy: Any) -> Recorder | None:
    """What records the steps of this policy; None where they are called one by one."""
    return CudaRecorder(policy.device) if policy.device.type == "cuda" else None


def rows(policy: Any, refills: bool, tokens: int, columns: int) -> Rows | lean.LeanRows | GraphRows:
    """The rows of one call of the sampler: about `tokens` tokens pass the model, and no row alive is longer than `columns`."""
    wanted = policy.device.type == "cuda" if policy.graphs is None else policy.graphs
    if wanted and supported(policy):
        if policy.graphs_agree is None:
            policy.graphs_agree = _compare(policy)
        if policy.graphs_agree:
            return GraphRows(policy, refills, columns, recorder(policy))
    return lean.rows(policy, refills, tokens)


def supported(policy: Any) -> bool:
    """Whether nothing that is plain to see keeps one step from being the same kernels each time."""
    weights = list(policy.model.parameters())
    layers = roomy_cache(policy.config).layers
    return (
        bool(layers)
        and all(type(layer) is Roomy for layer in layers)
        and policy.config._attn_implementation in ("sdpa", "eager")
        and policy.bend is None
        and policy.autocast is None
        and not torch.is_autocast_enabled(policy.device.type)
        and all(type(p) is nn.Parameter and p.device == policy.device for p in weights)
    )


def _compare(policy: Any) -> bool | None:
    """Whether these rows give the ordinary ones' log-probabilities; None where those are not finite."""
    vocab, device = policy.config.vocab_size, policy.device
    g = torch.Generator().manual_seed(0)
    size = min(COLUMNS - 3, policy.context - 12)
    if size < 1:
        return False
    long, short, new = (torch.randint(vocab, (n,), generator=g) for n in (size, max(1, size // 3), max(1, size // 2)))
    tokens = torch.randint(vocab, (12, 4), generator=g).to(device)
    none, two = torch.empty(0, dtype=torch.long, device=device), torch.tensor([0, 2], device=device)

    def run(kind: Rows | GraphRows) -> Tensor:
        out = [kind.enter(none, [long, short, long], hold=True)]
        out += [kind.step(token[:3]) for token in tokens[:6]]  # more than fit into the first columns
        out.append(kind.enter(two, [long, new], hold=False))
        out += [kind.step(token) for token in tokens[6:9]]
        kind.keep(two)
        out += [kind.step(token[:2]) for token in tokens[9:]]
        return torch.cat(out)

    counts = policy.counts.copy()
    try:
        own = run(Rows(policy, True)).log_softmax(-1)
        if not own.isfinite().all():
            return None
        found = GraphRows(policy, True, size + 12, recorder(policy), warm=1)
        gap = (own - run(found).log_softmax(-1)).abs()
        if torch.finfo(next(policy.model.parameters()).dtype).bits < 32:
            figure, allowed = float((own.exp() * gap).sum(-1).max()), ROUGH
        else:
            figure, allowed = float(gap.max()), EXACT
        why = found.failed or (
            None if figure <= allowed else f"its log-probabilities differ by {figure:.2g} (allowed {allowed:g})"
        )
    except (AttributeError, GruppoError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        why = f"it failed with {type(error).__name__}: {error}"
    finally:
        policy.counts.clear()
        policy.counts.update(counts)
    if why is not None:
        _warn(why)
    return why is None


def _warn(why: str) -> None:
    warnings.warn(
        f"sampling does not decode this model with fixed shapes and CUDA graphs: {why}. It takes the model's own forward, which "
        "gives the same more slowly",
        stacklevel=3,
    )


class Fixed(CacheLayerMixin):
    """Keys and values of one layer in a view of the buffers; each row's token is written at the row's own column."""

    def __init__(self, keys: Tensor, values: Tensor, column: Tensor) -> None:
        super().__init__()
        self.rooms, self.column, self.is_initialized = (keys, values), column, True
        self.keys, self.values = self.rooms

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise GruppoError("the buffers of a fixed layer are made before the first step")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        for space, x in zip(self.rooms, (key_states, value_states)):
            space.scatter_(2, self.column[:, None, None, None].expand(x.shape), x)
        return self.rooms

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_max_length(), 0

    def get_seq_length(self) -> int:
        return self.get_max_length() - 1  # that of a row differs from the next one's

    def get_max_length(self) -> int:
        return self.rooms[0].shape[2]


class GraphRows:
    """The rows that decode now, as `decode.Rows`, of a model that is `supported`."""

    def __init__(self, policy: Any, refills: bool, most: int, recorder: Recorder | None, *, warm: int = WARM) -> None:
        self.policy, self.refills, self.recorder, self.warm = policy, refills, recorder, warm
        self.most = most  # columns that a row alive may need; one that ended may run on and overwrites its last
        self.reader = Rows(policy, False)
        self.held: _Held | None = None
        nothing = torch.empty(0, dtype=torch.long, device=policy.device)
        self.at = nothing  # where each row stands
        self.rows = self.columns = 0  # of a step
        self.longest = 0  # columns that the longest row fills
        self.rooms: list[tuple[Tensor, Tensor]] = []  # keys and values of each layer: at least `rows`, and `columns`
        self.token, self.column = nothing[:, None], nothing  # of every place, dead or alive
        self.place, self.cache = nothing, Cache(layers=[])
        self.weights = [*policy.model.parameters(), *policy.model.buffers()]
        self.addresses: list[int] = []
        self.graphs: dict[tuple[int, int], Step] = {}
        self.called: dict[tuple[int, int], int] = {}  # steps of each shape that were called and not replayed
        self.failed: str | None = None

    @property
    def size(self) -> Tensor:
        """Tokens of each row that are in the cache."""
        return self.column[self.at]

    def keep(self, rows: Tensor) -> None:
        """The others leave."""
        self._settle(self.at[rows], len(rows), 0)

    def enter(self, rows: Tensor, prompts: list[Tensor], *, hold: bool) -> Tensor:
        """Only `rows` stay and the prompts come behind them; the logits after each prompt.

        `hold`: further paths of the last prompt wait. They come first the next time, and it is not read again.
        """
        device = self.policy.device
        keys = [tuple(p.tolist()) for p in prompts]
        sources, logits, held = self.reader.read(keys, self.held, hold=hold)
        if any(not layer.is_initialized for cache, _ in sources for layer in cache.layers):
            raise GruppoError("a layer keeps no keys of its own")
        self.held = held
        length = torch.tensor([len(k) for k in keys], device=device)
        if not self.rooms:
            self.rooms = [(k[:0, :, :0], v[:0, :, :0]) for k, v in (layer.rooms for layer in sources[0][0].layers)]
        self._settle(self.at[rows], len(rows) + len(keys), max(map(len, keys)))
        free = torch.ones(self.rows, dtype=torch.bool, device=device)
        free[self.at] = False
        slots = free.nonzero()[: len(keys), 0]
        parts, start = slots.split([len(index) for _, index in sources]), 0
        for (cache, index), to in zip(sources, parts):
            self._write(cache, index, length[start : start + len(index)], to)
            start += len(index)
        self.column[slots] = length
        self.at = torch.cat([self.at, slots])
        return logits

    def step(self, token: Tensor) -> Tensor:
        """The logits [R, V] after one more token of each row."""
        if min(self.longest + 1, self.most) > self.columns:
            self._settle(self.at, len(self.at), self.longest)
        self.column.clamp_(max=self.columns - 1)  # of rows that ended or are dead
        self.token.index_copy_(0, self.at, token[:, None])
        out = self._run()[self.at].float()
        self.column.add_(1)
        self.longest += 1
        self.policy.counts["decodes"] += 1
        self.policy.counts["decoded_rows"] += len(token)
        return out

    def _run(self) -> Tensor:
        """The logits of every row, dead or alive: by the graph of this shape, which is recorded when it has been called often."""
        shape, step = (self.rows, self.columns), self._step()
        if self.recorder is None:
            return step()
        now = [w.data_ptr() for w in self.weights]
        if now != self.addresses:  # a graph reads where the weights were
            self._forget()
            self.addresses = now
        if shape not in self.graphs:
            self.called[shape] = self.called.get(shape, 0) + 1
            if self.called[shape] <= self.warm:
                return self.recorder.warm(step)
            try:
                self.graphs[shape] = self.recorder.record(step)
            except RuntimeError as error:
                self.failed = f"recording failed with {type(error).__name__}: {error}"
                self._forget()
                self.recorder = None
                if self.policy.graphs_agree:  # else the comparison says so
                    _warn(self.failed)
                    self.policy.graphs_agree = False
                return step()
        return self.graphs[shape]()

    def _step(self) -> Step:
        """One forward as a function of the buffers alone; done twice it writes the same."""
        policy, n, cache = self.policy, self.rows, self.cache
        token, column, place = self.token[:n], self.column[:n], self.place
        dtype = self.rooms[0][0].dtype

        def step() -> Tensor:
            unseen = place > column[:, None]
            mask = torch.zeros(unseen.shape, dtype=dtype, device=unseen.device).masked_fill(unseen, -torch.inf)
            with policy._cast():
                out = policy.model(
                    input_ids=token,
                    attention_mask=mask[:, None, None],
                    position_ids=column.clamp(max=policy.context - 1)[:, None],  # a row that ended may run on
                    past_key_values=cache,
                    use_cache=True,
                )
            return out.logits[:, -1]

        return step

    def _forget(self) -> None:
        self.graphs.clear()
        self.called.clear()

    def _settle(self, stay: Tensor, count: int, reach: int) -> None:
        """Only the rows that stand in `stay` remain; there is place for `count` rows, and for one token more than `reach`."""
        filled = self.column[stay]
        self.longest = max(int(filled.max()) if len(stay) else 0, reach)
        n, columns = self._rows(count), max(self.columns, self._columns(self.longest + 1))
        self.at = stay
        if n > len(self.column) or columns > self.columns:
            self._forget()
            self._move(stay, n, columns)
            self.at = torch.arange(len(stay), device=stay.device)
        elif n < self.rows:
            for room in (room for layer in self.rooms for room in layer):
                room[: len(stay)] = room[stay]
            self.at = torch.arange(len(stay), device=stay.device)
        self.column.zero_()
        self.column[self.at] = filled
        self.rows, self.columns = n, columns
        self.cache = Cache(layers=[Fixed(keys[:n], values[:n], self.column[:n]) for keys, values in self.rooms])

    def _rows(self, count: int) -> int:
        """The next power of two, as far as the policy's bounds allow."""
        policy = self.policy
        bounds = [policy.sample_rows] + ([policy.sample_tokens // self.most] if policy.sample_tokens is not None else [])
        return min(1 << (max(count, 1) - 1).bit_length(), max(count, min(bounds)))

    def _columns(self, need: int) -> int:
        return min(COLUMNS << (-(-need // COLUMNS) - 1).bit_length(), -(-self.most // 8) * 8)  # kernels load masks in pieces of 8

    def _move(self, stay: Tensor, n: int, columns: int) -> None:
        """The rows that stand in `stay` come first in new buffers."""
        device, old = self.policy.device, self.columns
        self.cache = Cache(layers=[])
        for i, layer in enumerate(self.rooms):
            # zeros, since a masked column still enters the product with weight 0, and 0 times what was left in memory may be NaN
            new = tuple(x.new_zeros(n, x.shape[1], columns, x.shape[3]) for x in layer)
            for space, x in zip(new, layer):
                space[: len(stay), :, :old] = x[stay]
            self.rooms[i] = new[0], new[1]
        self.token = torch.zeros(n, 1, dtype=torch.long, device=device)
        self.column = torch.zeros(n, dtype=torch.long, device=device)
        self.place = torch.arange(columns, device=device)

    def _write(self, cache: Any, index: Tensor, length: Tensor, slots: Tensor) -> None:
        """These rows of a cache whose rows end at the last column, each from column 0 on."""
        width = int(length.max())
        used = cache.layers[0].used
        column = (used - length[:, None] + torch.arange(width, device=length.device)).clamp(max=used - 1)
        for layer, spaces in zip(cache.layers, self.rooms):
            for space, x in zip(spaces, layer.rooms):
                space.index_fill_(0, slots, 0.0)  # whoever stood here before may have left NaN
                space[slots, :, :width] = x[index[:, None], :, column].transpose(1, 2)
