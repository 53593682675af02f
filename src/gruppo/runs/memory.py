"""How much memory a planned run takes, from what this model keeps per token, and what a run really takes: both as a command.

    python -m gruppo.runs.memory world=countdown fit.token_budget=4096        predicted, and measured in a process of its own

The parts, in bytes:

    weights, gradients, optimizer, reference    by counting numbers
    cache, sampling logits                      rows that decode together x their columns x keys and values of a token
    sampling weights                            the copy that `policies.lean` decodes with
    activations, backward, reading              measured: what a small block keeps for backward, what its backward and a read
                                                without gradient add, per token, times the tokens of the largest block
    head                                        measured: logits of as many positions as are formed at once
    runtime                                     code that torch loads, and kernels that oneDNN keeps for every shape
    allocator                                   what the C library keeps of memory that was freed, in pieces that do not fit

The blocks are those that the policy itself would cut from a batch of these lengths, shared prefixes and all.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path as Folder
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gruppo.core.collate import collate
from gruppo.policies import lean, prefix
from gruppo.types import Group, GruppoError, Path, Task

MB = 2**20
# both fitted to half of the runs in docs/memory.md, which are of small models on one CPU
RUNTIME = 25 * MB
SLACK = 0.1  # of the training phase, for what a block's own tensors leave between them
HOLES = 0.6  # of it, with many blocks: each has other lengths and does not fit into the holes of the one before


class Live(TorchDispatchMode):
    """Counts the bytes of tensors made inside that are still alive, and the most there were. On CUDA torch counts itself."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._add(x.untyped_storage(), given)
        return out

    def _add(self, storage: Any, given: set[int]) -> None:
        key = id(storage)
        if key in self._known or key in given:
            return
        size = storage.nbytes()

        def gone(_: Any) -> None:
            self.now -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.most = max(self.most, self.now)


@dataclass(frozen=True)
class PerToken:
    """Bytes that one token of a block costs: kept until backward, added by backward, and by a read without gradient."""

    kept: float
    backward: float
    reading: float


@dataclass(frozen=True)
class Block:
    """Rows of one forward: token ids, and the tokens and positions that are computed."""

    prompts: list[Tensor]
    steps: list[Tensor]
    tokens: int
    positions: int
    packed: bool


def memory(
    policy: Any,
    planned: Mapping[str, Any],
    *,
    prompt: int,
    reference: bool,
    answers: Sequence[Sequence[Tensor]] | None = None,
    lengths: Sequence[int] | None = None,
    scope: Any = "path",
) -> dict[str, float]:
    """MB that the planned run holds, part by part, and its `peak`.

    Completions are taken to be such answers (of siblings, in turn: what they share is computed once), or to have the given
    lengths (in turn), or all to reach max_new_tokens.
    """
    settings, fit = planned.get("policy", {}), planned.get("fit", {})
    new = settings.get("max_new_tokens") or policy.max_new
    if answers is not None:
        lengths = [len(a) for some in answers for a in some]
    lengths = [new] if lengths is None else list(lengths)
    groups, each = fit.get("prompts_per_step", 16), fit.get("paths_per_prompt", 8)
    together = min(groups * each, settings.get("sample_rows") or policy.sample_rows)
    number = 2 if low_precision(policy) else 4
    every = sum(p.numel() * p.element_size() for p in policy.model.parameters())
    trained = sum(p.numel() * p.element_size() for p in policy.parameters())
    adapter = hasattr(policy.model, "disable_adapter")
    copied = 0
    if policy.lean and lean.known(policy):
        wave = sorted((lengths * -(-groups * each // len(lengths)))[: groups * each])[-together:]
        cell = cache_row(policy.config, 1) * number
        cache, copied = cell * (lean_columns(wave) + min(groups, together) * prompt), every
    else:
        cache = together * cache_row(policy.config, prompt + max(lengths)) * number
    block = largest(policy, prompt, lengths, groups, each, fit.get("token_budget", 8192), scope, answers)
    cost = per_token(policy, block)
    head, kept = head_bytes(policy, block.positions)
    parts: dict[str, float] = {
        "weights": every,
        "gradients": trained,
        "optimizer": _moments(policy, fit),
        "reference": trained if reference and not adapter else 0,
        "cache": cache,
        "sampling logits": together * policy.config.vocab_size * 4 * 5,
        "sampling weights": copied,
        "activations": cost.kept * block.tokens,
        "backward": cost.backward * block.tokens,
        "reading": (cost.reading * block.tokens + kept) if reference else 0,
        "head": head,
    }
    # the reference reads while the policy's logits are kept; in backward the head's go before the layers begin
    sampling = parts["cache"] + parts["sampling logits"] + parts["sampling weights"]
    training = parts["activations"] + max(parts["head"], parts["backward"], parts["reading"])
    constant = sum(parts[k] for k in ("weights", "gradients", "optimizer", "reference"))
    if policy.device.type == "cpu":
        parts["runtime"] = RUNTIME
        # training finds what sampling freed in pieces too small for it, so the C library holds both
        blocks = max(1.0, groups * each / len(block.prompts))
        parts["allocator"] = min(sampling, training) + (SLACK + HOLES * (1 - 1 / blocks)) * training
    parts["peak"] = constant + max(sampling, training) + parts.get("runtime", 0) + parts.get("allocator", 0)
    return {name: round(value / MB, 2) for name, value in parts.items()}


def _moments(policy: Any, fit: Mapping[str, Any]) -> float:
    """AdamW's two moments of every trained number; in 8 bits for tensors of 4096 numbers and more, where the run asks so."""
    bits = (fit.get("moments") or {}).get("bits", 32)
    return float(sum(2 * p.numel() * (1 if bits == 8 and p.numel() >= 4096 else p.element_size()) for p in policy.parameters()))


def cache_row(config: Any, length: int) -> int:
    """Numbers in the keys and values of one row."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    window = getattr(config, "sliding_window", None) or length
    return sum(2 * heads * width * (min(length, window) if kind == "sliding_attention" else length) for kind in kinds)


def lean_columns(lengths: Sequence[int]) -> int:
    """Columns of all rows that stand at once while `LeanRows` decodes completions of these lengths: where rows leave or
    columns are used up, the old ones stand beside the new."""
    lengths = sorted(lengths)
    rows, room = len(lengths), lean.ROOM
    most = rows * room
    for used in range(1, lengths[-1]):
        alive = len(lengths) - bisect_right(lengths, used)
        leave = alive <= 0.85 * rows
        if leave or used == room:
            left, wider = alive if leave else rows, used + max(lean.ROOM, used // 2)
            most = max(most, rows * room + left * wider)
            rows, room = left, wider
    return most


# -- the largest block ------------------------------------------------------------------------------------------------


def largest(
    policy: Any,
    prompt: int,
    lengths: Sequence[int],
    groups: int,
    each: int,
    budget: int,
    scope: Any = "path",
    answers: Sequence[Sequence[Tensor]] | None = None,
) -> Block:
    """The block of most tokens that the policy cuts from a batch of prompts and answers; of the batch no more than must be seen.
    Prompts are random tokens, and so are answers of the lengths that are given where there are none."""
    g = torch.Generator().manual_seed(0)
    mean = sum(lengths) / len(lengths)
    groups = max(1, min(groups, int(2 * budget / (each * mean + prompt)) + 2))
    longest = sorted(lengths, reverse=True)
    made = []
    heavy = sorted(answers or (), key=lambda some: -sum(map(len, some)))
    for n in range(groups):
        own = torch.randint(policy.config.vocab_size, (prompt,), generator=g)
        sizes = [longest[(n + i * groups) * len(longest) // (groups * each) % len(longest)] for i in range(each)]
        if heavy:
            some = heavy[n % len(heavy)]
            sizes = [len(some[i % len(some)]) for i in range(each)]
        steps = [torch.randint(policy.config.vocab_size, (size,), generator=g) for size in sizes]
        if heavy:  # more siblings than there are answers stay random: a repeated answer would cost nothing
            steps = [*some[:each], *steps[len(some) :]]
        paths = [Path(own, s, torch.zeros(len(s)), torch.ones(len(s), dtype=torch.bool)) for s in steps]
        made.append(Group(Task(own), paths, advantage=torch.zeros(each, max(sizes))))
    found: Block | None = None
    for part in policy.split(collate(made), scope, budget):
        prompts, steps = [p.prompt for p in part.paths], [p.steps for p in part.paths]
        plan = policy._plan(prompts, steps, part.mask)
        wide = max(len(p) + len(s) for p, s in zip(prompts, steps)) - 1
        tokens = len(prompts) * wide if plan is None else plan.layout.total
        positions = int(part.mask.sum()) if plan is None else len(plan.at)
        if found is None or tokens > found.tokens:
            found = Block(prompts, steps, tokens, positions, plan is not None)
    assert found is not None
    return found


# -- what a token costs -----------------------------------------------------------------------------------------------


def per_token(policy: Any, block: Block, least: int = 192) -> PerToken:
    """Measured on two small pieces of the block, forward and backward; what both have in common is no matter of tokens."""
    mean = block.tokens / len(block.prompts)
    few = min(len(block.prompts), max(1, round(least / mean)))
    found = [_spent(policy, block, n) for n in (few, 2 * few)]
    (n, *small), (m, *large) = found
    return PerToken(*(max(0.0, (b - a) / (m - n)) for a, b in zip(small, large)))


def _spent(policy: Any, block: Block, rows: int) -> tuple[int, float, float, float]:
    """Tokens, and bytes kept after the forward of the layers, added by its backward, and by a read without gradient."""
    prompts, steps = ((xs * 2)[:rows] for xs in (block.prompts, block.steps))
    if rows > len(block.prompts):
        steps = [s.flip(0) if i >= len(block.prompts) else s for i, s in enumerate(steps)]
    device = policy.device
    where = torch.arange(max(map(len, steps))) < torch.tensor([len(s) for s in steps])[:, None]
    if block.packed:
        plan = prefix.plan(prompts, steps, where, policy.cost, least=1)
        plan.layout.form = next(f for f in prefix.forms(device) if f not in policy.distrusted)
        given: tuple[Any, ...] = (plan.ids[None].to(device), plan.position[None].to(device), plan.layout)
    else:
        wide = max(len(p) + len(s) for p, s in zip(prompts, steps)) - 1
        given = (torch.zeros(rows, wide, dtype=torch.long, device=device),)

    def once(live: Live | None) -> tuple[float, float]:
        with policy._cast(), policy._training():
            hidden = policy.head.hidden(*given)
        kept = 0.0 if live is None else float(live.now)
        if live is not None:
            live.most = live.now
        hidden.sum().backward()
        return kept, 0.0 if live is None else float(live.most - kept)

    with _own_gradients(policy):
        once(None)  # buffers that a first call sets up are not the block's; gradients exist from here on
        with Live() as live:
            kept, backward = once(live)
        with torch.no_grad(), Live() as live, policy._cast():
            policy.head.hidden(*given)
    return given[0].numel(), kept, backward, float(live.most)


def head_bytes(policy: Any, positions: int) -> tuple[float, float]:
    """Bytes at the peak of reading log-probabilities at so many positions, and what is kept of it until backward."""
    vocabulary = policy.config.vocab_size
    n = max(1, min(positions, 3 * policy.head_elements // (2 * vocabulary)))
    parts = policy.head._parts()
    width = vocabulary if parts is None or policy.head.finish is None else policy.config.hidden_size
    dtype = next(policy.model.parameters()).dtype
    hidden = torch.zeros(n, width, device=policy.device, dtype=dtype, requires_grad=True)
    target = torch.zeros(n, dtype=torch.long, device=policy.device)
    with _own_gradients(policy), Live() as live, policy._cast():
        logp, _ = policy.head.read(hidden, target, policy.temperature, policy.head_elements, policy.entropy)
        kept = min(n * vocabulary, policy.head_elements) * 4.0 if n * vocabulary <= policy.head_elements else 0.0
        logp.sum().backward()
        top = float(live.most)
    return top, kept


@contextmanager
def _own_gradients(policy: Any) -> Iterator[None]:
    kept = [p.grad for p in policy.parameters()]
    for p in policy.parameters():
        p.grad = None
    try:
        with torch.enable_grad():
            yield
    finally:
        for p, grad in zip(policy.parameters(), kept):
            p.grad = grad


def low_precision(policy: Any) -> bool:
    return policy.autocast is not None or next(policy.model.parameters()).dtype in (torch.bfloat16, torch.float16)


# -- what a run takes -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """MB that a run adds to its process behind the loaded model, as predicted and as it was, and the parts predicted."""

    predicted: float
    measured: float
    parts: dict[str, float]

    @property
    def off(self) -> float:
        return self.predicted / self.measured - 1


def in_a_process(words: Sequence[str], *, iterations: int = 3, full: bool = False) -> Measured:
    """`here` in a process of its own: what other work left in this one would hide the run's."""
    call = f"from gruppo.runs import memory; memory.tell(memory.here({list(words)!r}, {iterations}, {full}))"
    done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, check=False)
    if done.returncode:
        raise GruppoError(f"measuring the memory of {' '.join(words)} failed: {done.stderr.strip().splitlines()[-1:]}")
    return Measured(**json.loads(done.stdout.strip().splitlines()[-1]))


def tell(found: Measured) -> None:
    print(json.dumps({"predicted": found.predicted, "measured": found.measured, "parts": found.parts}))


def here(words: Sequence[str], iterations: int = 3, full: bool = False) -> Measured:
    """Train so many iterations and compare (Linux). `full`: no token ends a completion, so that all reach max_new_tokens.

    The answers of the prediction are those of the iteration that wrote most.
    """
    from gruppo.runs.config import assemble, overrides
    from gruppo.runs.given import Given
    from gruppo.runs.session import Session
    from gruppo.train import fit

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        least = ["eval.tasks=0", "policy.threads=1", "policy.device=cpu", f"folder={folder}"]
        config = assemble(overrides([*words, *least]))
        session = Session.new(config, Given(), say=lambda _: None)
        policy, stage = session.policy, session.stages[0]
        if full:
            policy.eos = [-1]
        own, longest = config.fit, 0
        seen: list[list[Tensor]] = []
        Folder("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = status("VmRSS")
        numbers = count(1)

        def draw() -> object:
            stage.grade.at(next(numbers), iterations)
            return session.stream.take(own.prompts_per_step)

        given = (policy, draw, stage.grade, stage.recipe, session.optimizer, session.rng)
        for _, done in fit(*given, steps=iterations, rate=stage.rate, ref=session.reference, budget=own.token_budget):
            paths = [p for g in done.groups for p in g.paths]
            longest = max(longest, *(len(p.prompt) for p in paths))
            now = [[p.steps for p in g.paths] for g in done.groups]
            seen = max(seen, now, key=lambda answers: sum(len(a) for some in answers for a in some))
        measured = status("VmHWM") - before
        reference = stage.recipe.reference is not None
        parts = memory(policy, config.model_dump(), prompt=longest, reference=reference, answers=seen)
    return Measured(parts["peak"] - parts["weights"] - parts["reference"], measured, parts)


def status(name: str) -> float:
    """MB of one line of /proc/self/status."""
    lines = Folder("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def main(words: Sequence[str], run: Callable[..., Measured] = in_a_process) -> str:
    """A line for completions as the model writes them now, and one for completions that all reach max_new_tokens."""
    out = []
    for full in (False, True):
        found = run(words, full=full)
        parts = ", ".join(f"{k} {v:.0f}" for k, v in found.parts.items() if k != "peak" and v >= 0.5)
        out.append(
            f"{'full' if full else 'own'} lengths: predicted {found.predicted:.0f} MB, measured {found.measured:.0f} MB "
            f"({found.off:+.0%}): {parts}"
        )
    return "\n".join(out)


if __name__ == "__main__":
    print(main(sys.argv[1:]))
