"""Supervised fine-tuning on completions, with the policy that the recipes train.

    loss = - 1/N sum over the N completion tokens of the step of log p(token)      at temperature 1

Prompt tokens are context and are never trained. Short examples are laid end to end in rows of `row_tokens` and cannot see
one another: before the first update the packed log-probabilities are compared with the separate ones, and a model that lets
examples leak is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor

from gruppo.policies.token import TokenPolicy
from gruppo.types import GruppoError


@dataclass(frozen=True)
class Example:
    """A prompt (string or chat messages) and the completion that should follow it."""

    prompt: Any
    completion: str


Stream = Callable[[int], Example]  # an endless course: the index-th example


@dataclass(frozen=True)
class Progress:
    """What one optimizer step of fine-tuning did."""

    step: int
    loss: float  # nats per completion token, before the update
    tokens: int  # completion tokens trained
    examples: int
    filled: float  # share of the computed positions that hold a real token
    lr: float
    grad_norm: float


def sft(
    policy: TokenPolicy,
    examples: Sequence[Example] | Stream,
    *,
    steps: int,
    step_tokens: int = 8192,
    row_tokens: int = 512,
    block_tokens: int = 8192,
    rate: Callable[[int], float],
    rng: torch.Generator,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.95),
    max_grad_norm: float = 1.0,
) -> Iterator[Progress]:
    """`steps` AdamW steps of about `step_tokens` tokens each, one at a time.

    A list of examples is shuffled anew for every pass by `rng`; a function is an endless stream, asked for 0, 1, 2, ...
    `block_tokens` bounds what one forward holds and changes nothing else.
    """
    pairs = _pairs(policy, examples, rng)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=rate(1), betas=betas, weight_decay=weight_decay)
    for step in range(1, steps + 1):
        held, tokens = [], 0
        while tokens < step_tokens:
            held.append(next(pairs))
            tokens += len(held[-1][0]) + len(held[-1][1])
        bins = pack(held, row_tokens)
        if step == 1:
            refuse_leaks(policy, bins[0])
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.zero_grad(set_to_none=True)
        count = sum(len(s) for some in bins for _, s in some)
        total, computed = 0.0, 0
        for block in _blocks(bins, max(1, block_tokens // row_tokens)):
            loss = -torch.cat(policy.read_packed(block, temperature=1.0)).sum() / count
            loss.backward()
            total += float(loss.detach())
            computed += len(block) * max(_length(some) for some in block)
        norm = float(torch.nn.utils.clip_grad_norm_(policy.parameters(), max_grad_norm))
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise GruppoError(f"at step {step} the loss is {total} and its gradient norm {norm}; no update was made from it")
        optimizer.step()
        real = sum(map(_length, bins))
        yield Progress(step, total, count, sum(map(len, bins)), real / computed, rate(step), norm)


def warm_cosine(peak: float, steps: int, *, warmup: int = 0, final: float = 0.1) -> Callable[[int], float]:
    """Linear over the first `warmup` steps, then half a cosine down to final * peak at the last of `steps`."""

    def rate(step: int) -> float:
        if step <= warmup:
            return peak * step / warmup
        done = (step - warmup) / max(1, steps - warmup)
        return peak * (final + (1 - final) * (1 + math.cos(math.pi * min(1.0, done))) / 2)

    return rate


def pack(pairs: Sequence[tuple[Tensor, Tensor]], row_tokens: int) -> list[list[tuple[Tensor, Tensor]]]:
    """Rows of at most `row_tokens` tokens, every pair once and whole: longest first, each into the fullest row with room."""
    bins: list[list[tuple[Tensor, Tensor]]] = []
    room: list[int] = []
    for i in sorted(range(len(pairs)), key=lambda i: (-len(pairs[i][0]) - len(pairs[i][1]), i)):
        need = len(pairs[i][0]) + len(pairs[i][1])
        fits = [b for b in range(len(bins)) if room[b] >= need]
        if fits:
            best = min(fits, key=lambda b: (room[b], b))
            bins[best].append(pairs[i])
            room[best] -= need
        else:
            bins.append([pairs[i]])
            room.append(row_tokens - need)
    return bins


@torch.no_grad()
def refuse_leaks(policy: TokenPolicy, some: Sequence[tuple[Tensor, Tensor]]) -> None:
    """A sentence when this model's log-probabilities of packed examples differ from those of the same examples alone."""
    if len(some) < 2:
        return
    packed = policy.read_packed([some], temperature=1.0)
    alone = [policy.read_packed([[pair]], temperature=1.0)[0] for pair in some]
    gap = max(float((a - b).abs().max()) for a, b in zip(packed, alone))
    exact = policy.autocast is None and next(policy.model.parameters()).dtype == torch.float32
    allowed = 1e-3 if exact else 0.25
    if not gap <= allowed:
        raise GruppoError(
            f"packed examples see one another in this model: log-probabilities differ by {gap:.2g} from those of separate "
            f"examples (allowed {allowed}); set row_tokens=1 to train one example per row"
        )


def encode(policy: TokenPolicy, example: Example) -> tuple[Tensor, Tensor]:
    """Prompt ids, and the completion's ids as the sampler would have produced them: ending in the end-of-sequence token."""
    prompt = policy.encode(example.prompt)
    ids = policy.tokenizer(example.completion, add_special_tokens=False)["input_ids"]
    end = policy.tokenizer.eos_token_id
    steps = torch.tensor([*ids, policy.eos[0] if end is None else end], dtype=torch.long)
    if len(prompt) + len(steps) > policy.context:
        raise GruppoError(
            f"an example has {len(prompt)} prompt and {len(steps)} completion tokens, but this model has {policy.context} "
            f"positions; remove or shorten it (it begins {str(example.completion)[:40]!r})"
        )
    return prompt, steps


def read_examples(file: str | File) -> list[Example]:
    """Examples of a JSONL file with `prompt` and `completion`, or `messages` that end with the assistant's."""
    out = []
    for number, line in enumerate(File(file).read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise GruppoError(f"line {number} of {file} is not JSON: {error}") from None
            out.append(example_of(row, f"line {number} of {file}"))
    if not out:
        raise GruppoError(f"{file} holds no example; it needs one JSON object per line, with prompt and completion or messages")
    return out


def example_of(row: Any, where: str = "this example") -> Example:
    """One row of data as an example; a sentence when it has neither form."""
    if not isinstance(row, Mapping):
        raise GruppoError(f"{where} is a {type(row).__name__}, not an object with columns")
    messages = row.get("messages")
    if messages:
        if messages[-1].get("role") != "assistant":
            raise GruppoError(
                f"the messages of {where} end with {messages[-1].get('role')!r}, but an assistant's turn is trained"
            )
        return Example(list(messages[:-1]), messages[-1]["content"])
    if row.get("prompt") is None or row.get("completion") is None:
        raise GruppoError(f"{where} has the columns {', '.join(row)}; it needs prompt and completion, or messages")
    completion = row["completion"]
    if isinstance(completion, list):  # the conversational form that TRL's trainers use
        completion = completion[-1]["content"]
    return Example(row["prompt"], completion)


def fine_tune(
    model: str | File,
    data: str | File,
    output: str | File,
    *,
    epochs: float = 1.0,
    steps: int | None = None,
    step_tokens: int = 8192,
    row_tokens: int = 512,
    learning_rate: float = 1e-5,
    warmup: int = 10,
    seed: int = 0,
    autocast: torch.dtype | None = None,
    checkpointing: bool = False,
) -> Iterator[Progress]:
    """Fine-tune a model folder on a JSONL file and save a plain transformers folder; the generator is `gruppo sft`.

    `steps` overrides `epochs`. The first item of progress comes after the first update, the folder after the last.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = File(output)
    if out.exists() and any(out.iterdir()):
        raise GruppoError(f"{out} exists and is not empty; nothing was overwritten, choose another folder")
    examples = read_examples(data)
    policy = TokenPolicy(
        AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32),
        AutoTokenizer.from_pretrained(str(model)),
        autocast=autocast,
        checkpointing=checkpointing,
        entropy=False,
    )
    total = steps if steps is not None else count_steps(policy, examples, epochs, step_tokens)
    rng = torch.Generator().manual_seed(seed)
    yield from sft(
        policy,
        examples,
        steps=total,
        step_tokens=step_tokens,
        row_tokens=row_tokens,
        rate=warm_cosine(learning_rate, total, warmup=min(warmup, total // 2)),
        rng=rng,
    )
    policy.model.save_pretrained(out)
    policy.tokenizer.save_pretrained(out)


def count_steps(policy: TokenPolicy, examples: Sequence[Example], epochs: float, step_tokens: int) -> int:
    """Optimizer steps that `epochs` passes over the examples take."""
    tokens = sum(len(p) + len(s) for p, s in (encode(policy, e) for e in examples))
    return max(1, math.ceil(epochs * tokens / step_tokens))


def _pairs(policy: TokenPolicy, examples: Sequence[Example] | Stream, rng: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    if not isinstance(examples, Sequence):
        index = 0
        while True:
            yield encode(policy, examples(index))
            index += 1
    if not len(examples):
        raise GruppoError("there is no example to train on")
    known = [encode(policy, e) for e in examples]
    while True:
        for i in torch.randperm(len(known), generator=rng).tolist():
            yield known[i]


def _length(some: Sequence[tuple[Tensor, Tensor]]) -> int:
    return sum(len(p) + len(s) for p, s in some)


def _blocks(bins: list, size: int) -> Iterator[list]:
    for at in range(0, len(bins), size):
        yield bins[at : at + size]
