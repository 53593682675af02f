"""Tiny random-weight models of real architectures and a character tokenizer, built offline in milliseconds.

model, tokenizer = tiny_model("qwen3"), tiny_tokenizer()
policy = tiny_policy("qwen2", temperature=0.7, max_new=8)
folder = tiny_folder(tmp_path / "model", "llama")        # a plain transformers folder with tokenizer
"""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

FAMILIES = ("qwen3", "qwen2", "llama", "gemma")
SPECIAL = ["<pad>", "<eos>", "<unk>", "<user>", "<assistant>"]
CHARACTERS = sorted(set(string.ascii_letters + string.digits + " \n+-*/=()<>.,:;?!'\"_{}[]#%&|"))
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '<eos>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def tiny_tokenizer(*, eos: bool = True, chat: bool = True) -> PreTrainedTokenizerFast:
    """One token per character; `<user>` and `<assistant>` open a turn, `<eos>` ends an answer."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *CHARACTERS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")  # pyright: ignore[reportAttributeAccessIssue]
    inner.decoder = decoders.Fuse()  # pyright: ignore[reportAttributeAccessIssue]
    named: dict[str, Any] = {"pad_token": "<pad>", "unk_token": "<unk>"}
    if eos:
        named["eos_token"] = "<eos>"
    out = PreTrainedTokenizerFast(
        tokenizer_object=inner, extra_special_tokens=["<user>", "<assistant>"], padding_side="left", **named
    )
    if chat:
        out.chat_template = CHAT_TEMPLATE
    return out


def tiny_config(family: str = "qwen3", *, eos: bool = True, context: int = 256, **changes: Any) -> Any:
    """Two layers of width 32 in the named architecture (qwen3, qwen2, llama, gemma, gemma2)."""
    size: dict[str, Any] = {
        "vocab_size": len(SPECIAL) + len(CHARACTERS),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": context,
        "tie_word_embeddings": True,
        "initializer_range": 0.25,  # the usual 0.02 gives almost uniform logits: no entropy or gradient would differ
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1 if eos else None,
    }
    kind = {"qwen3": Qwen3Config, "qwen2": Qwen2Config, "llama": LlamaConfig, "gemma": GemmaConfig, "gemma2": Gemma2Config}
    return kind[family](**{**size, **changes})


def tiny_model(family: str = "qwen3", *, seed: int = 0, eos: bool = True, context: int = 256, **changes: Any) -> Any:
    """A float32 causal model with random weights that depend on the seed alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(family, eos=eos, context=context, **changes), dtype=torch.float32)
    return model.eval()


def tiny_folder(folder: Path, family: str = "qwen3", *, seed: int = 0, eos: bool = True, context: int = 256) -> Path:
    """A saved model and tokenizer, as a person would have them on disk."""
    tiny_model(family, seed=seed, eos=eos, context=context).save_pretrained(folder)
    tiny_tokenizer(eos=eos).save_pretrained(folder)
    return folder


def tiny_policy(family: str = "qwen3", *, seed: int = 0, temperature: float = 1.0, max_new: int = 12, **numbers: Any) -> Any:
    """A TokenPolicy around `tiny_model` and `tiny_tokenizer`."""
    from gruppo.policies.token import TokenPolicy

    return TokenPolicy(tiny_model(family, seed=seed), tiny_tokenizer(), temperature=temperature, max_new=max_new, **numbers)
