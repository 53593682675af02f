"""Engines: other programs that sample for a TokenPolicy, which goes on reading log-probabilities and training.

    policy = Sampler(TokenPolicy(...), engine)      # evaluate, score, split, save: the trainer's; sample: the engine's

Before every call of `sample` the trainer's weights are compared with those handed over last, number by number, and handed over
in memory where anything differs. Token ids cross the border, never text. An engine's log-probabilities are another program's:
a run with an engine reads every path again (`Reread`) and weighs its loss by exp(logp_trainer - logp_engine), truncated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from gruppo.types import GruppoError, Path

# nats between engine and trainer before step 0: two programs' kernels give up to 0.003 in float32, a wrong weight whole nats
MOST_GAP = {torch.float32: 0.1, torch.bfloat16: 1.0}
PIECE = 2**22  # numbers that a checksum looks at together


@dataclass(frozen=True)
class Ask:
    """What is to be sampled: one completion per prompt."""

    prompts: list[list[int]]
    seeds: list[int]  # one per prompt; equal seeds on equal prompts give equal completions
    max_new: int
    temperature: float  # 0 = greedy
    ends: list[int]  # tokens that end a completion and belong to it
    stop: tuple[str, ...] = ()  # a completion whose text ends with one of these is over
    held: Mapping[str, str] = field(default_factory=dict)  # checksums of the weights to sample with


@dataclass(frozen=True)
class Draw:
    """One completion as it was sampled: ids, log-probabilities after temperature, and whether it ended by itself."""

    ids: list[int]
    logp: list[float]
    ended: bool


@dataclass(frozen=True)
class Receipt:
    """What an engine says about weights it was handed: the checksum of what arrived, and how far it read its model again."""

    checksum: str
    read: int = 0  # weights of the model that were compared with what arrived, number by number
    sampled: int = 0  # weights stored in a packed form, compared in some of their columns
    unread: int = 0  # weights that could not be read back


@runtime_checkable
class Engine(Protocol):
    """A sampler with weights of its own."""

    def sample(self, ask: Ask) -> list[Draw]: ...
    def load(self, weights: Mapping[str, Tensor]) -> Receipt: ...
    def adapt(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Receipt: ...
    def close(self) -> None: ...


# -- checksums -----------------------------------------------------------------------------------------------------------------


@cache
def multipliers(device: torch.device) -> Tensor:
    """Odd numbers without a pattern, one for every place of a piece."""
    x = torch.arange(1, PIECE + 1, device=device) * 0x9E3779B1
    x = (x ^ (x >> 29)) * 0x2545F4914F6CDD1D  # 64-bit integers wrap around, as they should
    return (x ^ (x >> 32)) | 1


def fingerprint(tensor: Tensor) -> int:
    """64 bits of a tensor's bits in their order. Sums of integers: the same number on every device, in any order of adding."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    total = 0
    for piece in tensor.detach().reshape(-1).view(whole).split(PIECE):
        total = (total * 0x100000001B3 + int((piece.long() * multipliers(piece.device)[: len(piece)]).sum())) % 2**64
    return total


def checksum(weights: Mapping[str, Tensor]) -> str:
    """Of names, types, shapes and all numbers."""
    out = hashlib.sha256()
    for name in sorted(weights):
        w = weights[name]
        out.update(f"{name} {w.dtype} {tuple(w.shape)} {fingerprint(w)}\n".encode())
    return out.hexdigest()[:16]


# -- what is handed over -------------------------------------------------------------------------------------------------------


def adapted(model: Any) -> bool:
    """Whether the model is a frozen one with a peft adapter."""
    return hasattr(model, "peft_config")


def adapter_of(model: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The adapter's tensors by the names of peft's files, and its configuration."""
    from peft import get_peft_model_state_dict

    name = model.active_adapter
    config = model.peft_config[name]
    tensors = {k: v.detach() for k, v in get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False).items()}
    odd = [k for k in tensors if "lora_A" not in k and "lora_B" not in k]
    if odd or config.use_dora or str(config.peft_type).rpartition(".")[2] != "LORA":
        raise GruppoError(
            f"the adapter holds more than low-rank matrices ({(odd or [str(config.peft_type)])[0]}), which the engine cannot "
            "take apart from the model; set policy.engine.merge=true to hand over merged weights"
        )
    told = {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "use_rslora": config.use_rslora,
        "rank_pattern": dict(config.rank_pattern or {}),
        "alpha_pattern": dict(config.alpha_pattern or {}),
        "bias": "none",
        # what peft resolved "all-linear" to; a regular expression is not told apart from names by the engine
        "target_modules": sorted({k.split(".lora_")[0].rpartition(".")[2] for k in tensors}),
    }
    return tensors, told


def weights_of(model: Any, *, merge: bool = False) -> dict[str, Tensor]:
    """The model's weights by their transformers names, shared ones once; under an adapter the frozen ones, or merged ones."""
    if not adapted(model):
        return {name: p.detach() for name, p in model.named_parameters()}
    out, layers = {}, {}
    inner = model.get_base_model()
    for name, module in inner.named_modules():
        if hasattr(module, "get_delta_weight"):
            layers[f"{name}.base_layer.weight"] = module
    adapters = set(model.active_adapters)
    for name, p in inner.named_parameters():
        if any(f".{a}." in f"{name}." for a in adapters) and ("lora_" in name):
            continue
        value = p.detach()
        if merge and name in layers:
            with torch.no_grad():
                for a in model.active_adapters:
                    if a in getattr(layers[name], "lora_A", {}):
                        value = value + layers[name].get_delta_weight(a).to(value)
        out[name.replace(".base_layer.", ".")] = value
    return out


class Sampler:
    """A TokenPolicy whose completions another program samples. Everything but `sample` is the policy's own."""

    OWN = ("trainer", "engine", "dtype", "merge", "handed", "most_gap", "sample")

    def __init__(self, trainer: Any, engine: Engine, *, dtype: torch.dtype | None = None, merge: bool = False) -> None:
        own: dict[str, Any] = {"trainer": trainer, "engine": engine, "dtype": dtype, "merge": merge}
        own |= {"handed": {}, "most_gap": MOST_GAP[dtype or torch.float32]}
        for name, value in own.items():
            object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        if name in Sampler.OWN:  # not yet there while a copy is made
            raise AttributeError(name)
        return getattr(self.trainer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in Sampler.OWN:
            object.__setattr__(self, name, value)
        else:
            setattr(self.trainer, name, value)

    def sample(
        self,
        prompts: Sequence[Any],
        *,
        g: torch.Generator,
        max_new: int | None = None,
        temperature: float | None = None,
        stop: Sequence[str] = (),
    ) -> list[Path]:
        """One path per prompt, in order, sampled by the engine with the trainer's weights of this moment."""
        max_new = int(self.trainer.max_new) if max_new is None else max_new
        temperature = float(self.trainer.temperature) if temperature is None else temperature
        ids = self.trainer.encoded(prompts, max_new)
        if not ids:
            return []
        self.hand_over()
        seeds = torch.randint(2**31 - 1, (len(ids),), generator=g, device=g.device).tolist()
        ask = Ask([i.tolist() for i in ids], seeds, max_new, temperature, list(self.eos), tuple(stop), dict(self.handed))
        draws = self.engine.sample(ask)
        check(ask, draws, self.config.vocab_size)
        self.trainer.counts["sampled"] += sum(len(d.ids) for d in draws)
        return [self._path(prompt, draw, temperature) for prompt, draw in zip(ids, draws)]

    def _path(self, prompt: Tensor, draw: Draw, temperature: float) -> Path:
        steps, logp = torch.tensor(draw.ids, dtype=torch.long), torch.tensor(draw.logp)
        mask = torch.ones(len(steps), dtype=torch.bool)
        if temperature == 0:
            logp = torch.full(logp.shape, float("nan"))  # as the trainer's own sampler: greedy decoding cannot be trained on
        elif not logp.isfinite().all():
            mask = logp.isfinite()  # a step whose probability the engine does not know trains nothing
            logp = logp.masked_fill(~mask, 0.0)
            self.trainer.counts["not finite"] += int((~mask).sum())
        whole = steps[:-1] if int(steps[-1]) in self.eos else steps
        return Path(prompt, steps, logp, mask, self.trainer.decode(whole), truncated=not draw.ended)

    def hand_over(self) -> None:
        """Give the engine the trainer's weights where they differ from those it has."""
        model = self.trainer.model
        apart = adapted(model) and not self.merge
        if not (apart and "weights" in self.handed):  # under an adapter the model is frozen: once is enough
            self._give("weights", self._cast(weights_of(model, merge=self.merge)), self.engine.load)
        if apart:
            tensors, config = adapter_of(model)
            self._give("adapter", self._cast(tensors), lambda some: self.engine.adapt(some, config))

    def _cast(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return weights if self.dtype is None else {k: w.to(self.dtype) for k, w in weights.items()}

    def _give(self, kind: str, weights: dict[str, Tensor], give: Any) -> None:
        own = checksum(weights)
        if self.handed.get(kind) == own:
            return
        self.handed.pop(kind, None)  # if it fails half-way, the engine has neither the old nor the new
        receipt = give(weights)
        if receipt.checksum != own:
            raise GruppoError(
                f"the engine's {kind} are not the trainer's: checksum {own} of {len(weights)} tensors was handed over, "
                f"{receipt.checksum} arrived; nothing was sampled with them"
            )
        self.handed[kind] = own

    def close(self) -> None:
        """Let the engine go."""
        self.engine.close()


def check(ask: Ask, draws: Sequence[Draw], vocabulary: int) -> None:
    """A sentence when an engine's answer cannot be what was asked for."""
    if len(draws) != len(ask.prompts):
        raise GruppoError(f"the engine was asked for {len(ask.prompts)} completions and gave {len(draws)}")
    for i, draw in enumerate(draws):
        n = len(draw.ids)
        if not 1 <= n <= ask.max_new or len(draw.logp) != n:
            raise GruppoError(
                f"completion {i} of the engine has {n} tokens and {len(draw.logp)} log-probabilities; 1 to {ask.max_new} tokens "
                "with one each were asked for"
            )
        if not all(0 <= t < vocabulary for t in draw.ids):
            raise GruppoError(f"completion {i} of the engine holds the token {max(draw.ids)}, but there are only {vocabulary}")
        if any(x > 1e-4 for x in draw.logp):
            raise GruppoError(f"completion {i} of the engine has the log-probability {max(draw.logp):g}, which is above 0")
        if any(t in ask.ends for t in draw.ids[:-1]) or (draw.ids[-1] in ask.ends and not draw.ended):
            raise GruppoError(f"completion {i} of the engine goes on behind a token that ends it")
        if not draw.ended and n < ask.max_new:
            raise GruppoError(
                f"completion {i} of the engine was cut after {n} of {ask.max_new} tokens; give it a longer context or more memory"
            )


def stops(tokenizer: Any, ids: Sequence[int], stop: Sequence[str]) -> bool:
    """Whether the text of these tokens ends with one of the stop strings, by the rule of the trainer's own sampler."""
    if not stop:
        return False
    tail = list(ids[-2 * max(map(len, stop)) - 8 :])
    return tokenizer.decode(tail, skip_special_tokens=True, clean_up_tokenization_spaces=False).endswith(tuple(stop))
