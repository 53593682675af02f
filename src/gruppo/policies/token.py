"""TokenPolicy: a transformers causal language model that samples tokens and reads their log-probabilities.

One distribution everywhere: softmax(logits / temperature), from the sampler to the gradient. Completions are token ids from
the moment they are sampled; text exists only for graders and eyes.
"""

from __future__ import annotations

import warnings
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gruppo.core.collate import blocks
from gruppo.policies import graphs as fixed
from gruppo.policies import head as heads
from gruppo.policies import prefix, products
from gruppo.policies.decode import refilling_pays
from gruppo.policies.load import restore, save
from gruppo.types import Batch, GruppoError, Path, Reference, Scope, Steps


class TokenPolicy:
    """A causal language model, its tokenizer and its temperature.

    `counts` says what the sampler computed: `prefills` (prompts read into a cache) and their `prompt_tokens`, `decodes`
    (forwards of one token per row) and their `decoded_rows`, and the tokens `sampled`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        temperature: float = 1.0,
        max_new: int = 256,
        autocast: torch.dtype | None = None,
        checkpointing: bool = False,
        entropy: bool = True,
        sample_rows: int = 256,  # rows that decode together; bounds the key-value cache
        sample_tokens: int | None = None,  # bounds it in tokens, too: rows times what the longest of them may reach
        head_elements: int = 2**24,  # logits formed at once: positions x vocabulary
        sharing: prefix.Rates | None = prefix.MEASURED,  # when computing shared prefixes once pays; None: never
        lean: bool = True,  # decode in few operations where that is known to be exact; False: always the model's own forward
        onednn: bool | None = None,  # large float32 products by oneDNN; None: where it is known to be the faster one
        graphs: bool | None = None,  # decode with fixed shapes, on CUDA by graphs; None: on CUDA; True: on a CPU, too
    ) -> None:
        if not temperature > 0:
            raise GruppoError(
                f"temperature is {temperature}; training needs a temperature above 0 (greedy decoding has no log-probability)"
            )
        self.model, self.tokenizer = model, tokenizer
        self.temperature, self.max_new = temperature, max_new
        self.autocast, self.checkpointing, self.entropy = autocast, checkpointing, entropy
        self.sample_rows, self.sample_tokens, self.head_elements = sample_rows, sample_tokens, head_elements
        self.lean = lean
        self.lean_agrees: bool | None = None  # with the model's own forward; None: not compared yet
        self.graphs = graphs
        self.graphs_agree: bool | None = None
        self.counts: Counter[str] = Counter()
        self.config = model.config.get_text_config()
        self.eos = eos_ids(model, tokenizer)
        self.pad = next(i for i in (tokenizer.pad_token_id, self.eos[0]) if i is not None)
        self.context = getattr(self.config, "max_position_embeddings", None) or 2**31
        silence_dropout(model)
        if checkpointing:
            again = {"use_reentrant": False, "context_fn": self._recompute}
            if hasattr(model, "activation_checkpointing_enable"):  # the name since transformers 5.20
                model.activation_checkpointing_enable(again)
            else:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=again)
            if hasattr(model, "enable_input_require_grads"):
                model.enable_input_require_grads()
        model.eval()
        self.head = Head.of(model)
        quick = products.chosen(onednn) and self.device.type == "cpu"
        self.linears = products.Linears(model) if quick else None
        self.head.onednn = quick
        self.cost = None if sharing is None else prefix.Cost.of(model, sharing, quick)
        self.distrusted: dict[prefix.Form, str] = {}  # forms of the packed forward that this model may not use, and why
        self._compared: set[prefix.Form] = set()
        self._windowed: set[prefix.Form] = set()  # those also compared where a window cuts keys off
        self.bend = rotary_bend(self.config)
        self._plans: OrderedDict[Any, tuple[prefix.Plan, bool]] = OrderedDict()
        self.reference: Reference | None = None  # set by the run when the recipe names one

    # -- text and tokens ----------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def encode(self, prompt: Any) -> Tensor:
        """Token ids [P] of a string, chat messages, or ids already encoded."""
        if isinstance(prompt, Tensor):
            return prompt
        if isinstance(prompt, str):
            ids = self.tokenizer(prompt)["input_ids"]
        else:
            shown = sorted({part["type"] for part in _parts(prompt)} - {"text"})
            if shown:
                raise GruppoError(
                    f"a message of the prompt holds a part of the type {', '.join(shown)}, but this policy reads text alone; its "
                    "template would put a mark in the prompt and leave what it stands for unseen"
                )
            if not getattr(self.tokenizer, "chat_template", None):
                raise GruppoError("the prompt is a list of chat messages, but this tokenizer has no chat template")
            text = self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise GruppoError(f"the prompt {prompt!r} encodes to no token at all; sampling needs at least one")
        return torch.tensor(ids, dtype=torch.long)

    def encoded(self, prompts: Sequence[Any], max_new: int) -> list[Tensor]:
        """The token ids of every prompt, an object that comes again encoded once; refused where an answer would not fit."""
        known: dict[int, Tensor] = {}
        for p in prompts:
            if id(p) not in known:
                known[id(p)] = self.encode(p)
        ids = [known[id(p)] for p in prompts]
        longest = max(map(len, ids), default=0)
        if longest + max_new > self.context:
            raise GruppoError(
                f"a prompt of {longest} tokens plus {max_new} new ones needs {longest + max_new} positions, "
                f"but this model has {self.context}; shorten the prompt or lower max_new_tokens"
            )
        return ids

    def decode(self, ids: Tensor) -> str:
        """The text of a completion: without special tokens, white space untouched."""
        return self.tokenizer.decode(ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    # -- sampling -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Any],
        *,
        g: torch.Generator,
        max_new: int | None = None,
        temperature: float | None = None,
        stop: Sequence[str] = (),
    ) -> list[Path]:
        """One path per prompt, in order. Equal prompts share one prefill; temperature 0 is greedy and cannot be trained on.

        Prompts beyond `sample_rows` and `sample_tokens` wait; they take the room of finished paths, or, where that would cost
        more, enter when all others are done. The rows that decode together draw from `g` together, so a path's draws depend on
        its company; the same call with the same seed gives the same paths.
        """
        max_new = self.max_new if max_new is None else max_new
        temperature = self.temperature if temperature is None else temperature
        ids = self.encoded(prompts, max_new)
        self._one_side([len(p) for p in ids], [max_new] * len(ids))
        return self._decode_rows(ids, max_new, temperature, tuple(stop), g) if ids else []

    def _decode_rows(
        self, prompts: list[Tensor], max_new: int, temperature: float, stop: tuple[str, ...], g: torch.Generator
    ) -> list[Path]:
        device, n = self.device, len(prompts)
        tokens = torch.full((n, max_new), self.pad, device=device)
        logps = torch.zeros(n, max_new, device=device)
        count = torch.zeros(n, dtype=torch.long, device=device)
        ended = torch.zeros(n, dtype=torch.bool, device=device)
        eos = torch.tensor(self.eos, device=device)

        def say(rows: Tensor, logits: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
            """The next token of these paths, written down for those alive, and which of them go on after it."""
            token, logp = self._choose(logits, temperature, g)
            at, said = rows[alive], (logp if temperature > 0 else logits.amax(-1))[alive]
            if not said.isfinite().all():
                raise GruppoError(
                    f"the model's log-probability is not finite at step {int(count[at][~said.isfinite()][0])} of sampling: its "
                    "weights or activations hold NaN or infinity"
                )
            tokens[at, count[at]], logps[at, count[at]] = token[alive], logp[alive]
            count[at] += 1
            done = torch.isin(token, eos)
            if stop:
                texts = zip(rows.tolist(), count[rows].tolist())
                done |= torch.tensor([self._stops(tokens[i, :c], stop) for i, c in texts], device=device)
            ended[rows[done & alive]] = True
            return token, alive & ~done & (count[rows] < max_new)

        order = list(range(n))
        most = self._enterable([], [len(p) + max_new for p in prompts])
        if most < n:  # siblings enter one after another
            unique: dict[tuple[int, ...], int] = {}
            which = [unique.setdefault(tuple(p.tolist()), len(unique)) for p in prompts]
            order.sort(key=which.__getitem__)
        waiting = deque(order)
        through = sum({tuple(p.tolist()): len(p) for p in prompts}.values()) + n * max_new
        refills = most < n and refilling_pays(self, most, n, max_new)
        rows = fixed.rows(self, refills, through, max(map(len, prompts)) + max_new)
        here = torch.empty(0, dtype=torch.long, device=device)  # which path each row of the cache is
        token, alive = here, here.bool()  # its last token, and whether it still decodes
        left, asked = 0, -1  # rows alive, and how many were when room was last looked for
        while waiting or left:
            new: list[int] = []
            if waiting and (left == 0 or (rows.refills and left != asked)):
                asked = left
                free = self._enterable(
                    [len(prompts[i]) + max_new for i in here[alive].tolist()], [len(prompts[i]) + max_new for i in waiting]
                )
                if free == len(waiting) or free >= 0.15 * (left + free):  # one by one would copy the cache for each
                    new = [waiting.popleft() for _ in range(free)]
            if new:
                keep = alive.nonzero()[:, 0]
                hold = bool(waiting) and torch.equal(prompts[waiting[0]], prompts[new[-1]])
                logits = rows.enter(keep, [prompts[i] for i in new], hold=hold)
                entered = torch.tensor(new, device=device)
                first, going = say(entered, logits, torch.ones_like(entered, dtype=torch.bool))
                here, token, alive = (torch.cat(x) for x in ((here[keep], entered), (token[keep], first), (alive[keep], going)))
                asked = -1
            else:
                if left <= 0.85 * len(here):  # finished rows leave the cache; copying it for every single one costs more
                    keep = alive.nonzero()[:, 0]
                    rows.keep(keep)
                    here, token, alive = here[keep], token[keep], alive[keep]
                token, alive = say(here, rows.step(token), alive)
            left = int(alive.sum())
        tokens, logps = tokens.cpu(), logps.cpu()
        paths = []
        for i, length in enumerate(count.tolist()):
            steps = tokens[i, :length].clone()
            text = self.decode(steps[:-1] if int(steps[-1]) in self.eos else steps)
            mask = torch.ones(length, dtype=torch.bool)
            paths.append(Path(prompts[i], steps, logps[i, :length].clone(), mask, text, truncated=not bool(ended[i])))
        self.counts["sampled"] += sum(map(len, paths))
        return paths

    def _enterable(self, live: list[int], waiting: list[int]) -> int:
        """How many of those waiting, in their order, may decode beside those alive; each number is the most a row may reach."""
        widest = max(live, default=0)
        for n, reach in enumerate(waiting):
            widest = max(widest, reach)
            beside = len(live) + n + 1
            if beside > self.sample_rows or (self.sample_tokens is not None and beside * widest > self.sample_tokens):
                return n if live else max(n, 1)
        return len(waiting)

    def _choose(self, logits: Tensor, temperature: float, g: torch.Generator) -> tuple[Tensor, Tensor]:
        if temperature == 0:
            return logits.argmax(-1), torch.full(logits.shape[:1], float("nan"), device=logits.device)
        logp = (logits / temperature).log_softmax(-1)
        race = torch.empty(logp.shape, device=g.device).exponential_(generator=g).to(logp.device)
        token = (logp.exp() / race).argmax(-1)  # the exponential race: argmax p_i / e_i is a draw from p
        return token, logp.gather(-1, token[:, None])[:, 0]

    def _stops(self, ids: Tensor, stop: tuple[str, ...]) -> bool:
        tail = self.decode(ids[-2 * max(map(len, stop)) - 8 :])
        return tail.endswith(stop)

    # -- reading log-probabilities ------------------------------------------------------------------------------------

    def evaluate(self, batch: Batch) -> Steps:
        """Log-probabilities and entropies now, at the trained steps; 0 elsewhere."""
        where = batch.mask.to(self.device)
        logp, entropy = self._read([p.prompt for p in batch.paths], [p.steps for p in batch.paths], where)
        return Steps(logp=logp, entropy=entropy)

    @torch.no_grad()
    def score(self, paths: Sequence[Path], budget: int = 8192) -> list[Tensor]:
        """The log-probability [T] of every step of each path under its `prompt`, masked or not."""
        out: list[Tensor] = [torch.empty(0)] * len(paths)
        prompts, steps = [p.prompt for p in paths], [p.steps for p in paths]
        width = max(map(len, paths), default=0)
        every = torch.arange(width) < torch.tensor([len(p) for p in paths])[:, None] if paths else torch.empty(0, 0)
        for rows in self._cut([[i] for i in range(len(paths))], prompts, steps, every, budget):
            where = every[rows][:, : max(len(paths[i]) for i in rows)]
            logp, _ = self._read([prompts[i] for i in rows], [steps[i] for i in rows], where.to(self.device))
            for i, row in zip(rows, logp.cpu()):
                out[i] = row[: len(paths[i])].clone()
        return out

    def _read(self, prompts: list[Tensor], steps: list[Tensor], where: Tensor) -> tuple[Tensor, Tensor | None]:
        """log p and entropy at `where` [B, T]: what rows share is computed once where that pays."""
        far = torch.tensor(self._far([len(p) for p in prompts], [len(s) for s in steps]))
        if far.any() and not far.all():
            near, order = (~far).nonzero()[:, 0], torch.argsort(far.long(), stable=True)
            parts = [
                self._read([prompts[i] for i in some], [steps[i] for i in some], where[some])
                for some in (near.tolist(), far.nonzero()[:, 0].tolist())
            ]
            back = order.argsort().to(where.device)
            logp, entropy = torch.cat([p[0] for p in parts])[back], [p[1] for p in parts if p[1] is not None]
            return logp, torch.cat(entropy)[back] if entropy else None
        plan = self._plan(prompts, steps, where)
        return self._read_rows(prompts, steps, where) if plan is None else self._read_shared(plan, where)

    def _far(self, before: list[int], after: list[int]) -> list[bool]:
        """Which rows lie beyond the length at which rotary angles change; rows that cross it are refused."""
        if self.bend is None:
            return [False] * len(before)
        kind, limit = self.bend
        for p, s in zip(before, after):
            if p + s > limit and (p <= limit or kind == "dynamic"):
                raise GruppoError(
                    f"a prompt of {p} tokens plus {s} new ones needs {p + s} positions, but beyond {limit} the rotary angles of "
                    f"this model ({kind} scaling) depend on the longest row of a forward: what the sampler says while a row "
                    "grows would not be what training reads; shorten the prompt or lower max_new_tokens"
                )
        return [p > limit for p in before]

    def _one_side(self, before: list[int], after: list[int]) -> None:
        if len(set(self._far(before, after))) > 1:
            kind, limit = self.bend or ("", 0)
            raise GruppoError(
                f"prompts of {min(before)} to {max(before)} tokens share a forward, but at {limit} the rotary angles of this "
                f"model ({kind} scaling) change for every row of it; keep the prompts of more than {limit} tokens apart"
            )

    def _read_rows(self, prompts: list[Tensor], steps: list[Tensor], where: Tensor) -> tuple[Tensor, Tensor | None]:
        """Every row in full. Rows are padded on the right, so causality alone keeps padding out."""
        device = self.device
        width = max(2, *(len(p) + len(s) for p, s in zip(prompts, steps)))  # one column at least is read
        ids = torch.full((len(prompts), width), self.pad)
        for i, (p, s) in enumerate(zip(prompts, steps)):
            ids[i, : len(p) + len(s)] = torch.cat([p, s])
        ids = ids.to(device)
        before = torch.tensor([len(p) - 1 for p in prompts], device=device)
        row, t = where.nonzero(as_tuple=True)
        with self._cast(), self._training():
            hidden = self.head.hidden(ids[:, :-1])[row, before[row] + t]
            value, entropy = self.head.read(
                hidden, ids[row, before[row] + t + 1], self.temperature, self.head_elements, self.entropy
            )
        logp = value.new_zeros(where.shape).index_put((row, t), value)
        if entropy is None:
            return logp, None
        return logp, entropy.new_zeros(where.shape).index_put((row, t), entropy)

    def _read_shared(self, plan: prefix.Plan, where: Tensor) -> tuple[Tensor, Tensor | None]:
        """One packed row in which every shared token stands once."""
        device = self.device
        at, target, which = plan.at.to(device), plan.target.to(device), plan.which.to(device)
        with self._cast(), self._training():
            hidden = self.head.hidden(plan.ids[None].to(device), plan.position[None].to(device), plan.layout)[0, at]
            value, entropy = self.head.read(hidden, target, self.temperature, self.head_elements, self.entropy)
        place = plan.row.to(device), plan.step.to(device)
        logp = value.new_zeros(where.shape).index_put(place, value[which])
        if entropy is None:
            return logp, None
        return logp, entropy.new_zeros(where.shape).index_put(place, entropy[which])

    def _plan(self, prompts: list[Tensor], steps: list[Tensor], where: Tensor) -> prefix.Plan | None:
        """The packed forward of these rows, or None where the ordinary one costs no more."""
        found = self._laid(prompts, steps, where)
        return found[0] if found is not None and found[1] else None

    def _laid(self, prompts: list[Tensor], steps: list[Tensor], where: Tensor) -> tuple[prefix.Plan, bool] | None:
        """The packed forward of these rows and whether it pays; None where it cannot."""
        cost = self.cost
        if cost is None or len(prompts) < 2:
            return None
        ordinary = cost.ordinary(len(prompts), max(len(p) + len(s) for p, s in zip(prompts, steps)) - 1)
        trained = where.cpu()
        if not cost.worth(ordinary) or not trained.any():
            return None
        rows = [torch.cat([p, s]) for p, s in zip(prompts, steps)]
        key = tuple(map(len, prompts)), *(r.numpy().tobytes() for r in rows), trained.nonzero().numpy().tobytes()
        if (known := self._plans.get(key)) is not None:  # split, evaluate and the reference ask for the same block
            return known
        plan = prefix.plan(prompts, steps, trained, cost)
        pays = False
        usable: list[prefix.Form] = [form for form in prefix.forms(self.device) if form not in self.distrusted]
        for form in sorted(usable, key=lambda form: cost.packed(plan.layout, form)):
            if cost.packed(plan.layout, form) > (1 - cost.rates.margin) * ordinary:
                break
            if self._trusted(form, plan, prompts, steps):
                plan.layout.form, pays = form, True
                break
        self._plans[key] = plan, pays
        while len(self._plans) > 4:
            self._plans.popitem(last=False)
        return plan, pays

    def _trusted(self, form: prefix.Form, plan: prefix.Plan, prompts: list[Tensor], steps: list[Tensor]) -> bool:
        """Whether the form gives the ordinary forward's numbers, seen on a piece of the batch it is first wanted for."""
        cost = self.cost
        assert cost is not None
        seen = self._windowed if 0 < cost.window < plan.layout.deepest else self._compared
        if form in seen:
            return True
        rows, skip, keep = prefix.sample(plan, prompts, cost.window)
        some = [prompts[i][skip:] for i in rows]
        short = [steps[i][: max(1, keep - len(prompts[i]))] for i in rows]
        where = torch.arange(max(map(len, short))) < torch.tensor([len(s) for s in short])[:, None]
        small = prefix.plan(some, short, where, cost, least=1)
        small.layout.form = form
        why = prefix.beyond(self.config)
        try:
            half = torch.finfo(next(self.model.parameters()).dtype).bits < 32
            for cast in {None, self.autocast}:
                why = why or self._differ(small, some, short, where.to(self.device), cast, 0.25 if half or cast else 1e-4)
        except (GruppoError, RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError) as error:
            why = f"it failed with {type(error).__name__}: {error}"
        if why is None:
            if any(piece.depth for piece in small.layout.pieces):  # rows that part nowhere would vouch for any model
                seen.add(form)
            return True
        self.distrusted[form] = why
        warnings.warn(
            f"shared prefixes are not computed in the form {form!r} for this model: {why}. Training goes on with the next "
            "form, at last with the ordinary forward, which computes every prompt once per completion",
            stacklevel=2,
        )
        return False

    def _differ(
        self, plan: prefix.Plan, prompts: list[Tensor], steps: list[Tensor], where: Tensor, cast: Any, allowed: float
    ) -> str | None:
        """A sentence with the numbers when the packed forward and the ordinary one disagree."""
        trained = sorted(self.parameters(), key=torch.Tensor.numel)  # a gradient of all weights may not fit twice
        size = torch.tensor([p.numel() for p in trained]).cumsum(0)
        trained = [p for p, n in zip(trained, size.tolist()) if n <= 2**26] or trained[:1]
        own, self.autocast = self.autocast, cast
        try:
            with torch.enable_grad():
                found = []
                for read in (lambda: self._read_rows(prompts, steps, where), lambda: self._read_shared(plan, where)):
                    logp = read()[0]
                    sign = torch.cos(torch.arange(logp.numel(), device=logp.device)).view_as(logp)  # no two steps weigh the same
                    total = (logp * sign).sum()
                    grads = torch.autograd.grad(total, trained, allow_unused=True) if total.requires_grad else ()
                    found.append((logp.detach(), torch.cat([g.flatten().float() for g in grads if g is not None] or [logp[:0]])))
        finally:
            self.autocast = own
        (logp, grad), (packed, other) = found
        gap = float((logp - packed).abs().max())
        if not plan.layout.used:
            return "its attention layers do not use transformers' attention interface"
        if not gap <= allowed:
            return f"its log-probabilities differ by {gap:.2g} from those of the ordinary forward (allowed {allowed:g})"
        if grad.shape != other.shape:
            return "its gradient reaches other weights than that of the ordinary forward"
        off = float((grad - other).norm() / grad.norm().clamp(min=1e-12)) if grad.numel() else 0.0
        if not off <= 10 * allowed:
            return f"its gradient differs by {off:.2g} of its length from that of the ordinary forward (allowed {10 * allowed:g})"
        return None

    def read_packed(self, bins: Sequence[Sequence[tuple[Tensor, Tensor]]], *, temperature: float | None = None) -> list[Tensor]:
        """log p [T] of the steps of every (prompt, steps) pair, several pairs laid end to end in each row; differentiable.

        Position ids restart at every pair, from which transformers builds the mask that keeps pairs apart.
        """
        width = max(sum(len(p) + len(s) for p, s in some) for some in bins)
        ids = torch.full((len(bins), width), self.pad)
        place = torch.zeros(len(bins), width, dtype=torch.long)  # each padding token is a pair of its own
        row, column, target, lengths = [], [], [], []
        for i, some in enumerate(bins):
            at = 0
            for p, s in some:
                end = at + len(p) + len(s)
                ids[i, at:end] = torch.cat([p, s])
                place[i, at:end] = torch.arange(end - at)
                row.append(torch.full((len(s),), i))
                column.append(torch.arange(at + len(p) - 1, end - 1))
                target.append(s)
                lengths.append(len(s))
                at = end
        device = self.device
        self._one_side(*([len(pair[i]) for some in bins for pair in some] for i in (0, 1)))
        with self._cast(), self._training():
            hidden = self.head.hidden(ids.to(device), place.to(device))[torch.cat(row).to(device), torch.cat(column).to(device)]
            T = self.temperature if temperature is None else temperature
            value, _ = self.head.read(hidden, torch.cat(target).to(device), T, self.head_elements, False)
        return list(value.split(lengths))

    def split(self, batch: Batch, scope: Scope, size: int) -> Iterator[Batch]:
        """Blocks of at most `size` tokens each (one row or group at the least): rows that share a prompt stay together where
        computing it once pays, and count it once; the others are padded to rows of similar length and count the padding."""
        batch = batch.to(self.device)
        if scope == "group":
            units = [(batch.group == i).nonzero()[:, 0].tolist() for i in batch.group.unique()]
        else:
            units = [[r] for r in batch.mask.any(1).nonzero()[:, 0].tolist()]
        prompts, steps = [p.prompt for p in batch.paths], [p.steps for p in batch.paths]
        for rows in self._cut(units, prompts, steps, batch.mask.cpu(), size):
            yield batch.rows(rows)

    def _cut(
        self, units: list[list[int]], prompts: list[Tensor], steps: list[Tensor], where: Tensor, size: int
    ) -> Iterator[list[int]]:
        """Rows of one forward each, no unit torn apart, in blocks of at most `size` tokens that are really computed."""
        rest = []
        longest = max((len(prompts[r]) + len(steps[r]) for unit in units for r in unit), default=0)
        cost = self.cost
        if cost is not None and not cost.worth(cost.ordinary(sum(map(len, units)), longest)):
            cost = None  # nor is any part of them; looking for common beginnings would cost a tiny model more than it saves
        queue = deque(prefix.neighbours(units, prompts, steps, cost.least) if cost is not None else [])
        while queue:
            some, count = [queue.popleft()], 0
            count = some[0].alone
            while queue and count + queue[0].more <= size:
                count += queue[0].more
                some.append(queue.popleft())
            while True:
                rows = [r for unit in some for r in unit.rows]
                found = self._laid([prompts[r] for r in rows], [steps[r] for r in rows], where[rows])
                if found is None or not found[1] or found[0].layout.total <= size or len(some) == 1:
                    break
                queue.appendleft(some.pop())
            if found is not None and found[1]:
                yield rows
            else:
                rest += [unit.rows for unit in some]
        if cost is None:
            rest = units
        for block in blocks([max(len(prompts[r]) + len(steps[r]) for r in unit) * len(unit) for unit in rest], size):
            yield [r for i in block for r in rest[i]]

    def parameters(self) -> Iterable[torch.nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def save(self, folder: FilePath, *, merge: bool = False) -> None:
        """A plain transformers folder, or peft's adapter folder."""
        save(self.model, self.tokenizer, folder, merge=merge)

    def restore(self, folder: FilePath) -> None:
        """The weights of a folder that `save` wrote."""
        restore(self.model, folder)

    def _recompute(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        # a checkpointed layer runs again in backward, when the forward's choice of attention is long undone
        config = self.head.config
        return nullcontext(), self._as_in_forward(config._attn_implementation)

    @contextmanager
    def _as_in_forward(self, attention: str) -> Iterator[None]:
        with prefix.attending(self.head.config, attention), self._cast():
            yield

    def _cast(self):
        if self.autocast:
            return torch.autocast(self.device.type, self.autocast)
        return nullcontext() if self.linears is None else self.linears()

    def _training(self):
        # transformers checkpoints activations only in training mode; dropout is off in either mode
        return _Mode(self.model) if self.checkpointing and torch.is_grad_enabled() else nullcontext()


class _Mode:
    """The layers that checkpoint their activations are in training mode, as transformers asks; what they hold is not, since
    routers draw noise there."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __enter__(self) -> None:
        for module in self.model.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.training = True

    def __exit__(self, *_: object) -> None:
        self.model.eval()


class Head:
    """The decoder and output projection of a causal model, so that logits exist only where a step is trained.

    Some models scale or cap their logits after the projection. Which form applies is measured once against the model's own
    logits; a model that no form reproduces keeps its own full logits.
    """

    def __init__(self, model: Any, finish: Any) -> None:
        self.model, self.finish = model, finish
        self.onednn = False  # for large products; whether a policy takes it is said by `products`

    @staticmethod
    @torch.no_grad()
    def of(model: Any) -> Head:
        cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        forms = [_same]
        if cap:
            forms.insert(0, lambda logits: cap * torch.tanh(logits / cap))
        ids = torch.arange(4, device=next(model.parameters()).device)[None] % model.config.get_text_config().vocab_size
        own = model(input_ids=ids, use_cache=False).logits.float()
        for finish in forms:
            head = Head(model, finish)
            if head._parts() is not None and torch.allclose(
                finish(head._project(head.hidden(ids))).float(), own, atol=1e-4, rtol=1e-4, equal_nan=True
            ):
                return head
        return Head(model, None)

    def _parts(self) -> tuple[Any, Any] | None:
        inner = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        decoder = inner.get_decoder() if hasattr(inner, "get_decoder") else None
        project = inner.get_output_embeddings()
        if decoder is None or decoder is inner or project is None or isinstance(decoder, torch.nn.Linear):
            return None  # ModernBERT's decoder calls its output projection `decoder`
        return decoder, project

    def _project(self, hidden: Tensor) -> Tensor:
        parts = self._parts()
        assert parts is not None
        return parts[1](hidden)

    @property
    def config(self) -> Any:
        """The configuration that the attention layers read."""
        parts = self._parts()
        return self.model.config.get_text_config() if parts is None else parts[0].config.get_text_config()

    def hidden(self, ids: Tensor, position_ids: Tensor | None = None, layout: prefix.Layout | None = None) -> Tensor:
        """[B, L, D], or the logits [B, L, V] themselves for a model whose head cannot be taken apart."""
        parts = self._parts()
        run = self.model if self.finish is None or parts is None else parts[0]
        if layout is None:
            out = run(input_ids=ids, position_ids=position_ids, use_cache=False)
        else:
            with prefix.attending(self.config):
                out = run(input_ids=ids, position_ids=position_ids, use_cache=False, prefix_layout=layout)
        return out.logits if run is self.model else out.last_hidden_state

    def read(
        self, hidden: Tensor, target: Tensor, temperature: float, elements: int, entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        """log p(target) and the entropy at N positions, at most `elements` logits at a time."""
        parts = self._parts()
        if self.finish is _same and parts is not None and heads.plain(parts[1]):
            return heads.read(hidden, parts[1].weight, target, temperature, elements, entropy, self.onednn)

        def piece(h: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            logits = h if self.finish is None else self.finish(self._project(h))
            logits = (logits if logits.dtype == torch.float64 else logits.float()) / temperature
            norm = logits.logsumexp(-1)
            logp = logits.gather(-1, y[:, None])[:, 0] - norm
            with torch.no_grad():
                H = norm - (logits.softmax(-1) * logits).sum(-1) if entropy else logp
            return logp, H

        vocab = self.model.config.get_text_config().vocab_size
        rows = max(1, elements // vocab)
        if len(hidden) <= rows:
            logp, H = piece(hidden, target)
        else:  # keep no logits for backward: each piece is computed again there
            parts = [
                checkpoint(piece, h, y, use_reentrant=False) if torch.is_grad_enabled() else piece(h, y)
                for h, y in zip(hidden.split(rows), target.split(rows))
            ]
            logp, H = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
        return logp, (H.detach() if entropy else None)


def _parts(messages: Any) -> list[dict[str, Any]]:
    """The parts of messages whose content is a list of parts."""
    contents = [m.get("content") for m in messages if isinstance(m, dict)]
    return [part for c in contents if isinstance(c, list) for part in c if isinstance(part, dict) and "type" in part]


def _same(logits: Tensor) -> Tensor:
    return logits


def eos_ids(model: Any, tokenizer: Any) -> list[int]:
    """Every id that ends a completion: all of `generation_config` and the tokenizer's own."""
    found: list[int] = []
    config = getattr(model, "generation_config", None)
    for source in (getattr(config, "eos_token_id", None), tokenizer.eos_token_id):
        for i in source if isinstance(source, (list, tuple)) else [source]:
            if i is not None and i not in found:
                found.append(int(i))
    if not found:
        raise GruppoError(
            "neither the tokenizer nor the model's generation_config names an end-of-sequence token, so a completion could "
            "never end; set tokenizer.eos_token"
        )
    return found


def silence_dropout(model: Any) -> None:
    """Dropout and skipped layers would make the ratio differ from 1 before the first update."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():  # OPT and Seed-OSS call the function; OPT drops layers
            if isinstance(value, float) and ("dropout" in name or "layerdrop" in name):
                setattr(module, name, 0.0)


def rotary_bend(config: Any) -> tuple[str, int] | None:
    """The rotary scaling whose angles depend on the longest row of a forward, and the length from which they do."""
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for some in [found, *found.values()]:
        kind = some.get("rope_type", "") if isinstance(some, dict) else ""
        if kind == "longrope":
            return kind, some.get("original_max_position_embeddings") or config.original_max_position_embeddings
        if "dynamic" in kind:
            return "dynamic", config.max_position_embeddings
    return None
