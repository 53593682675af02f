"""A sequence classification model as grader: prompt and completion in, one number per head out."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path as File
from typing import Any

import torch

from gruppo.core.collate import blocks
from gruppo.graders.grade import Abstained
from gruppo.types import Group, GruppoError


class RewardModel:
    """Scores prompt + completion with any `AutoModelForSequenceClassification`, a folder or a loaded model.

    Chat prompts go through the tokenizer's chat template with the completion as the assistant's message; plain strings are
    joined. Several heads are several signals, called `names`, or after the model's labels. Text that is longer than the model
    can read abstains instead of being cut.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        names: tuple[str, ...] | None = None,
        budget: int = 16384,  # tokens of one forward, padding included
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        autocast: torch.dtype | None = None,
        special_tokens: bool = True,  # around plain strings; a chat template writes its own
    ) -> None:
        from transformers import AutoTokenizer

        source = model if isinstance(model, (str, File)) else getattr(model, "name_or_path", "")
        if isinstance(model, (str, File)):
            model = load(model, dtype)
            device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if tokenizer is None:
            if not source:
                raise GruppoError("this reward model was built in memory and names no folder; pass its tokenizer beside it")
            tokenizer = AutoTokenizer.from_pretrained(source)
        self.model = (model if device is None else model.to(device)).eval()
        self.tokenizer, self.budget, self.autocast, self.special_tokens = tokenizer, budget, autocast, special_tokens
        config = model.config.get_text_config()
        if tokenizer.pad_token_id is None:
            if tokenizer.eos_token_id is None:
                raise GruppoError("the reward model's tokenizer has neither a padding nor an end token; set tokenizer.pad_token")
            tokenizer.pad_token = tokenizer.eos_token
        if config.pad_token_id is None:  # a decoder's head reads the last token that is not padding
            config.pad_token_id = tokenizer.pad_token_id
        self.longest = getattr(config, "max_position_embeddings", None) or 2**31
        heads = int(model.config.num_labels)
        self.signals: tuple[str, ...] = names or self._names(heads, str(source))
        if len(self.signals) != heads:
            raise GruppoError(f"the reward model has {heads} heads, but {len(self.signals)} names were given: {self.signals}")

    @property
    def name(self) -> str:
        return f"reward model ({', '.join(self.signals)})"

    def __call__(self, groups: list[Group]) -> list[dict[str, Any]]:
        rows = [self.encode(g.task.prompt, p.output) for g in groups for p in g.paths]
        scores: list[list[float | Abstained]] = [
            [Abstained(f"{len(ids)} tokens, but the reward model reads {self.longest}")] * len(self.signals) for ids in rows
        ]
        fitting = [i for i, ids in enumerate(rows) if len(ids) <= self.longest]
        for some in blocks([len(rows[i]) for i in fitting], self.budget):
            chosen = [fitting[i] for i in some]
            for i, values in zip(chosen, self.score([rows[i] for i in chosen])):
                scores[i] = [v if v == v else Abstained("the reward model said NaN") for v in values]
        out, at = [], 0
        for group in groups:
            mine = scores[at : at + len(group)]
            out.append({name: [row[h] for row in mine] for h, name in enumerate(self.signals)})
            at += len(group)
        return out

    def encode(self, prompt: Any, output: Any) -> list[int]:
        """The token ids of one prompt and completion."""
        if isinstance(prompt, str):
            if not isinstance(output, str):
                raise GruppoError(
                    f"the prompt is text, but the path's output is a {type(output).__name__}; a reward model reads text"
                )
            return list(self.tokenizer(prompt + output, add_special_tokens=self.special_tokens)["input_ids"])
        if not getattr(self.tokenizer, "chat_template", None):
            raise GruppoError("the prompt is a list of chat messages, but the reward model's tokenizer has no chat template")
        messages = [*prompt, *(output if isinstance(output, list) else [{"role": "assistant", "content": output}])]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @torch.inference_mode()
    def score(self, rows: list[list[int]]) -> list[list[float]]:
        """One forward: [rows][heads]."""
        return self.logits(rows).float().cpu().tolist()

    def logits(self, rows: list[list[int]]) -> torch.Tensor:
        """One forward, padded on the right: [rows, heads], differentiable."""
        width = max(1, *map(len, rows))
        ids = torch.full((len(rows), width), self.tokenizer.pad_token_id)
        real = torch.zeros(len(rows), width, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            real[i, : len(row)] = 1
        device = next(self.model.parameters()).device
        with torch.autocast(device.type, self.autocast) if self.autocast else nullcontext():
            return self.model(input_ids=ids.to(device), attention_mask=real.to(device)).logits

    def _names(self, heads: int, source: str) -> tuple[str, ...]:
        labels = self.model.config.id2label or {}
        if heads == 1 and labels.get(0, "LABEL_0") == "LABEL_0":
            return (File(source).name if source else "reward_model",)
        named = [str(labels.get(i, f"LABEL_{i}")) for i in range(heads)]
        return tuple(name.replace("LABEL_", "reward_model_") for name in named)


def load(folder: str | File, dtype: torch.dtype | None) -> Any:
    """The classification model in a folder (or of a hub id); a sentence when its scoring head was never trained."""
    from transformers import AutoModelForSequenceClassification

    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise GruppoError(f"no sequence classification model can be read from {str(folder)!r}: {error}") from error
    fresh = sorted(info["missing_keys"])
    if fresh:
        raise GruppoError(
            f"the model in {str(folder)!r} is no reward model: {len(fresh)} weights are not in it and would be random "
            f"({', '.join(fresh[:3])})"
        )
    return model
