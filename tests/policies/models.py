"""Small policies of six architectures, ragged prompts, and log-probabilities read the long way round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tests.tiny import tiny_model, tiny_tokenizer
from torch import Tensor
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from gruppo.core.collate import collate
from gruppo.core.reduce import sequence_mean, weigh
from gruppo.policies.token import TokenPolicy
from gruppo.types import Batch, Group, Path, Task

ENDS = [1, *range(60, 84)]  # a quarter of the vocabulary ends a completion, so paths end at many lengths


def gemma3(seed: int = 0, **changes: Any) -> Any:
    """Gemma 3 text: one sliding layer of window 6, one full layer, two rotary bases."""
    size = {
        "vocab_size": tiny_model("qwen3").config.vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "initializer_range": 0.25,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
        "query_pre_attn_scalar": 8,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Gemma3ForCausalLM(Gemma3TextConfig(**{**size, **changes})).eval()


FAMILIES: dict[str, Callable[..., Any]] = {
    "qwen3": lambda **k: tiny_model("qwen3", **k),
    "qwen2": lambda **k: tiny_model("qwen2", **k),
    "llama": lambda **k: tiny_model("llama", **k),
    "gemma": lambda **k: tiny_model("gemma", **k),
    # caps far below the size of the raw logits, so that a forgotten cap shows
    "gemma2": lambda **k: tiny_model(
        "gemma2", sliding_window=6, final_logit_softcapping=2.0, attn_logit_softcapping=3.0, query_pre_attn_scalar=8, **k
    ),
    "gemma3": gemma3,
}


def policy_of(family: str = "qwen3", *, ends: list[int] = ENDS, seed: int = 0, max_new: int = 12, **numbers: Any) -> TokenPolicy:
    model = FAMILIES[family](seed=seed)
    model.generation_config.eos_token_id = list(ends)
    return TokenPolicy(model, tiny_tokenizer(), max_new=max_new, **numbers)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ragged(lengths: tuple[int, ...] = (3, 11, 1, 7), seed: int = 5) -> list[Tensor]:
    g = rng(seed)
    return [torch.randint(5, 59, (n,), generator=g) for n in lengths]


def naive(model: Any, prompt: Tensor, steps: Tensor, temperature: float) -> Tensor:
    """log p of each step from one full forward of this path alone: no cache, no padding, no batch."""
    with torch.no_grad():
        logits = model(input_ids=torch.cat([prompt, steps])[None], use_cache=False).logits[0].float() / temperature
    return logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(-1, steps[:, None])[:, 0]


def groups_of(policy: TokenPolicy, prompts: list[Tensor] | None = None, n: int = 3, seed: int = 0) -> list[Group]:
    """n sampled paths per prompt with random advantages."""
    prompts = ragged() if prompts is None else prompts
    paths = policy.sample([p for p in prompts for _ in range(n)], g=rng(seed))
    out = []
    for i, p in enumerate(prompts):
        group = Group(Task(p), paths[i * n : (i + 1) * n])
        out.append(group.with_(advantage=torch.randn(n, group.width, generator=rng(seed + i)) * group.mask))
    return out


def batch_of(policy: TokenPolicy, prompts: list[Tensor] | None = None, n: int = 3, seed: int = 0) -> Batch:
    return weigh(collate(groups_of(policy, prompts, n, seed)), sequence_mean)


def gradient(policy: TokenPolicy, batch: Batch, budget: int = 10**6, scope: Any = "path") -> Tensor:
    """The flat gradient of sum(weight * advantage * exp(logp - logp_old)) over blocks of `budget` tokens."""
    for p in policy.model.parameters():
        p.grad = None
    for part in policy.split(batch, scope, budget):
        now = policy.evaluate(part)
        (part.weight * part.advantage * (now.logp - part.logp_old).exp()).sum().backward()
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in policy.parameters()])


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def gap(policy: TokenPolicy, paths: list[Path], temperature: float) -> float:
    """The largest |log p of the sampler - log p read the long way round|."""
    return max(float((p.logp - naive(policy.model, p.prompt, p.steps, temperature)).abs().max()) for p in paths)
