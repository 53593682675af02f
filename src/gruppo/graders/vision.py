"""Vision-language models behind an OpenAI-compatible endpoint, as judges of pairs and as checkers of pictures."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from gruppo.graders.grade import Abstained, described
from gruppo.graders.http import Encode, Jpeg, Patience, Unanswered, post
from gruppo.graders.images import frames_of
from gruppo.graders.judge import Pair

INSTRUCTION = """You compare two generated images. They were made for this prompt:

{prompt}

Judge each image from 1 to 10 on three points: does it show what the prompt asks for; is it well composed and pleasant to look at;
is it authentic, without distortions and artefacts. Think it through inside <think></think>. Then give your decision in exactly
one of these forms:
<answer>Image 1 is better</answer>
<answer>Image 2 is better</answer>"""
SLOW = Patience(timeout=600.0, retries=10)
JPEG = Jpeg()


@dataclass(frozen=True)
class Chat:
    """A model at an endpoint (vLLM, SGLang, a provider); `url` ends where "/chat/completions" begins.

    Questions are asked `workers` at a time. One that is never answered abstains, and no other is lost with it.
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    patience: Patience = SLOW
    workers: int = 16
    max_tokens: int = 4096
    temperature: float = 0.0
    encode: Encode = JPEG

    def __call__(self, questions: Sequence[tuple[str, Sequence[Any]]]) -> list[str | Abstained]:
        """The reply to each (text, pictures)."""
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(lambda q: self.ask(*q), questions))

    def ask(self, text: str, images: Sequence[Any]) -> str | Abstained:
        """One reply; the pictures stand before the text."""
        content: list[dict[str, Any]] = []
        for image in images:
            kind, data = self.encode(image)
            content.append({"type": "image_url", "image_url": {"url": f"data:{kind};base64,{base64.b64encode(data).decode()}"}})
        content.append({"type": "text", "text": text})
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
        }
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        try:
            answer = post(self.url.rstrip("/") + "/chat/completions", body, self.patience, headers)
            reply = answer["choices"][0]["message"]["content"]
        except Unanswered as error:
            return Abstained(str(error), error)
        except (KeyError, IndexError, TypeError) as error:
            return Abstained(f"{self.url} sent no reply of a chat: {described(error)}", error)
        return reply if isinstance(reply, str) else ""  # a model that ran out of tokens while it thought says nothing


@dataclass(frozen=True)
class Decision:
    """Reads "Image 1 is better" in the last <answer> of a reply: 1, 0, or NaN for anything else.

    `ties` is a pattern that stands for .5, None where the instruction offers no tie (the published one does not).
    """

    tag: str = "answer"
    noun: str = "(?:image|video)"
    ties: str | None = None

    def __call__(self, reply: str) -> float:
        found = re.findall(rf"<{self.tag}>(.*?)</{self.tag}>", reply, re.DOTALL | re.IGNORECASE)
        said = found[-1].strip() if found else ""
        better = re.fullmatch(rf"{self.noun}\s*([12])\s+is\s+better\.?", said, re.IGNORECASE)
        if better:
            return float(better.group(1) == "1")
        return 0.5 if self.ties and re.fullmatch(self.ties, said, re.IGNORECASE) else math.nan


DECISION = Decision()


@dataclass(frozen=True)
class VisionJudge:
    """Asks a model which of two pictures is better.

    `parse` turns a reply into a preference, or into a `Verdict` for `FlexRate`. Of videos, `frames` pictures are shown.
    """

    chat: Chat
    instruction: str = INSTRUCTION
    parse: Callable[[str], Any] = DECISION
    frames: int = 8

    def __call__(self, pairs: Sequence[Pair]) -> list[Any]:
        replies = self.chat([self.question(pair) for pair in pairs])
        return [reply if isinstance(reply, Abstained) else self.parse(reply) for reply in replies]

    def question(self, pair: Pair) -> tuple[str, list[Any]]:
        """The text, and the pictures of the first before those of the second."""
        shown = [*frames_of(pair.first, self.frames), *frames_of(pair.second, self.frames)]
        return self.instruction.replace("{prompt}", str(pair.prompt)), shown
