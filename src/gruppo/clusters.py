"""Which paths of a group say the same: an answer per path, and a judgement which answers mean the same.

    labels(group, tagged, exact)        [0, 0, 1, 2]      the first two paths agree; the last has no answer, or one of its own

An *answer* is a function of a path that returns its answer as text, or None where there is none. A *same* is a function
(texts, task) -> one label per text; it sees every different text once. Those that ask a model take the model as an argument, so
that any encoder or judge will do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from gruppo.graders.grade import text_of
from gruppo.graders.text import inside, number, said_number
from gruppo.types import Group, GruppoError, Path, Task

Answer = Callable[[Path], str | None]
Same = Callable[[Sequence[str], Task], Sequence[int]]
Encode = Callable[[Sequence[str]], Any]  # n texts -> n vectors
Judge = Callable[[Sequence[tuple[str, str]]], Sequence[bool]]  # does the first text of each pair entail the second?


# ---- the answer of a path


def tagged(path: Path) -> str | None:
    """What stands between the last `<answer>` tags, else the last number written; None where there is neither."""
    text = text_of(path.output)
    between = inside(text, "answer")
    return (said_number(text) if between is None else between.strip()) or None


def answers(group: Group, answer: Answer) -> list[str | None]:
    """Each path's answer: the signal `answers` where a grader extracted them, else `answer(path)`; "" and NaN are none."""
    found = group.signals.get("answers")
    if found is None:
        found = [answer(p) for p in group.paths]
    elif isinstance(found, Tensor):
        found = found.tolist()
    return [None if a is None or a != a else str(a).strip() or None for a in found]


def labels(group: Group, answer: Answer, same: Same) -> list[int]:
    """A number per path, equal where the answers mean the same; a path without an answer agrees with nobody."""
    said = answers(group, answer)
    texts = list(dict.fromkeys(a for a in said if a is not None))
    found = [int(label) for label in same(texts, group.task)] if texts else []
    if len(found) != len(texts):
        raise GruppoError(f"the answers' equivalence returned {len(found)} labels for {len(texts)} different answers")
    known = dict(zip(texts, found))
    fresh = max(found, default=-1) + 1
    out = []
    for a in said:
        if a is None:
            fresh += 1
        out.append(fresh - 1 if a is None else known[a])
    return out


# ---- which answers mean the same


def exact(texts: Sequence[str], task: Task) -> list[int]:
    """Letter for letter, white space around them aside."""
    known: dict[Any, int] = {}
    return [known.setdefault(t.strip(), len(known)) for t in texts]


def numeric(texts: Sequence[str], task: Task) -> list[int]:
    """Equal values as exact fractions: 0.5, 1/2 and 50% are one answer. What is no number is compared letter for letter."""
    known: dict[Any, int] = {}
    values = [number(t) for t in texts]
    return [known.setdefault(t.strip() if v is None else (v,), len(known)) for t, v in zip(texts, values)]


@dataclass(frozen=True)
class SentenceEncoder:
    """A sentence-transformers model as an encoder, loaded when it is first asked; `name` may be a folder.

    A text that the model would have to cut has no vector (NaN): by their beginnings alone, different long answers look the same.
    """

    name: str = "sentence-transformers/all-MiniLM-L6-v2"

    def __call__(self, texts: Sequence[str]) -> Any:
        model = _pretrained("SentenceTransformer", self.name)
        vectors = torch.as_tensor(model.encode(list(texts), show_progress_bar=False))
        longest = model.max_seq_length
        ids = model.tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]
        cut = torch.tensor([longest is not None and len(i) > longest for i in ids], device=vectors.device)
        return vectors.masked_fill(cut[:, None], torch.nan)


@dataclass(frozen=True)
class Embedded:
    """Answers whose embeddings have a cosine of at least `threshold` are the same, and so are those linked by a chain of such.

    An answer whose vector is NaN throughout could not be read and agrees with nobody. How close two answers are is the encoder's
    opinion: small ones hold names apart well and numbers badly (`numeric` is for those), so look at some before choosing.
    """

    encode: Encode = field(default_factory=SentenceEncoder)
    threshold: float = 0.9

    def __post_init__(self) -> None:
        if not -1 < self.threshold <= 1:
            raise GruppoError(f"the threshold of the answers' cosine is {self.threshold}; it must lie above -1 and not above 1")

    def __call__(self, texts: Sequence[str], task: Task) -> list[int]:
        vectors = torch.as_tensor(self.encode(texts)).double().cpu()
        if vectors.dim() != 2 or len(vectors) != len(texts):
            raise GruppoError(f"the encoder gave numbers of shape {tuple(vectors.shape)} for {len(texts)} answers")
        unread = vectors.isnan().all(1)
        bad = ~unread & (~vectors.isfinite().all(1) | (vectors.norm(dim=1) == 0))
        if bad.any():
            raise GruppoError(f"the encoder's vector of the answer {texts[int(bad.nonzero()[0])]!r} is zero or not finite")
        unit = vectors / vectors.norm(dim=1, keepdim=True)
        return linked(unit @ unit.T >= self.threshold - 1e-9)  # no comparison with NaN is true


@dataclass(frozen=True)
class EntailmentModel:
    """A CrossEncoder for natural-language inference as a judge: true where `entailment` is its likeliest label."""

    name: str = "cross-encoder/nli-deberta-v3-small"

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        model = _pretrained("CrossEncoder", self.name)
        names = {int(i): str(label).lower() for i, label in model.model.config.id2label.items()}
        if "entailment" not in names.values():
            raise GruppoError(f"{self.name} has the labels {', '.join(names.values())}; a judge of entailment needs 'entailment'")
        scores = torch.as_tensor(model.predict(list(pairs), show_progress_bar=False))
        return [names[int(i)] == "entailment" for i in scores.argmax(-1)]


@dataclass(frozen=True)
class Entailed:
    """Answers that entail each other, both ways, each read behind the question, are the same; so are chains of such.

    Bidirectional entailment as in semantic entropy (2302.09664), which compares with the first answer of each cluster and so
    depends on the order of the paths; chains do not.
    """

    judge: Judge = field(default_factory=EntailmentModel)

    def __call__(self, texts: Sequence[str], task: Task) -> list[int]:
        n = len(texts)
        said = [f"{asked(task.prompt)} {t}".strip() for t in texts]
        where = [(i, j) for i in range(n) for j in range(n) if i != j]
        if not where:
            return [0] * n
        verdicts = [bool(v) for v in self.judge([(said[i], said[j]) for i, j in where])]
        if len(verdicts) != len(where):
            raise GruppoError(f"the judge of entailment gave {len(verdicts)} verdicts on {len(where)} pairs")
        entails = torch.eye(n, dtype=torch.bool)
        for (i, j), yes in zip(where, verdicts):
            entails[i, j] = yes
        return linked(entails & entails.T)


def linked(near: Tensor) -> list[int]:
    """Labels of the connected parts of a symmetric relation [n, n], numbered in order of appearance."""
    out = [-1] * len(near)
    for start in range(len(near)):
        if out[start] >= 0:
            continue
        label, open_ = max(out) + 1, [start]
        while open_:
            i = open_.pop()
            if out[i] < 0:
                out[i] = label
                open_ += [j for j in near[i].nonzero()[:, 0].tolist() if out[j] < 0]
    return out


def asked(prompt: Any) -> str:
    """The question as text: the prompt itself, or the last message of the user."""
    if isinstance(prompt, str):
        return prompt
    messages = list(prompt) if isinstance(prompt, (list, tuple)) else []
    for message in reversed(messages):
        if isinstance(message, dict) and message.get("role") == "user":
            content = message.get("content")
            if isinstance(content, list):  # parts: text among images
                content = " ".join(str(p.get("text", "")) for p in content if isinstance(p, dict))
            return str(content)
    return ""


@lru_cache(maxsize=4)
def _pretrained(kind: str, name: str) -> Any:
    try:
        import sentence_transformers  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        if error.name != "sentence_transformers":
            raise
        raise GruppoError(
            f"comparing answers with {name} needs the package sentence-transformers: pip install 'gruppo[embed]', or compare "
            "them with clusters.exact or clusters.numeric"
        ) from None
    try:
        return getattr(sentence_transformers, kind)(name)
    except (OSError, ValueError) as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise GruppoError(f"the model {name!r} for comparing answers cannot be loaded: {said[0][:200]}") from error
