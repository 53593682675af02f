"""A policy that says what it is told to say: for conversations whose every token is known."""

from __future__ import annotations

from typing import Any

import torch
from tests.tiny import tiny_tokenizer
from torch import Tensor

from gruppo.types import Path


class Scripted:
    """Speaks line after line of the script of the conversation it is in; remembers every context it was given."""

    def __init__(self, script: dict[str, list[str]], *, context: int = 256, max_new: int = 64, ends: bool = True) -> None:
        self.script, self.context, self.max_new = script, context, max_new
        self.tokenizer, self.eos, self.ends = tiny_tokenizer(), [1], ends
        self.said: dict[str, int] = {}
        self.heard: list[list[str]] = []  # per call of sample: the texts of the contexts

    def encode(self, prompt: Any) -> Tensor:
        return prompt if isinstance(prompt, Tensor) else torch.tensor(self.tokenizer(prompt)["input_ids"])

    def decode(self, ids: Tensor) -> str:
        return self.tokenizer.decode(ids.tolist(), skip_special_tokens=True)

    def sample(self, prompts, *, g, max_new=None, temperature=None, stop=()) -> list[Path]:
        limit = self.max_new if max_new is None else max_new
        texts = [self.decode(p) for p in prompts]
        self.heard.append(texts)
        paths = []
        for prompt, text in zip(prompts, texts):
            name = next(k for k in self.script if text.startswith(k))
            turn = sum(text.count(end) for end in ("</result>", "</tool_response>|"))
            line = self.script[name][turn]
            ids = self.tokenizer(line)["input_ids"]
            stopped = line.endswith(tuple(stop))
            if not stopped:
                ids = [*ids, 1]
            truncated = len(ids) > limit
            ids = torch.tensor(ids[:limit])
            out = self.decode(ids)
            paths.append(
                Path(prompt, ids, torch.full((len(ids),), -0.5), torch.ones(len(ids), dtype=torch.bool), out, truncated=truncated)
            )
        return paths
