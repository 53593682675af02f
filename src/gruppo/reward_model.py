"""Fits a reward model with K heads to labels: one forward gives one number per objective.

    loss = 1/N sum over the N labels of the step of (head_k(prompt, completion) - label_k)^2

The backbone is any transformers encoder or causal model; the head is linear, on what AutoModelForSequenceClassification reads
(the first token of an encoder, the last of a causal model). A missing label is no label: it enters neither sum nor count. What
is saved is a plain folder with `id2label` naming the heads, which `graders.RewardModel` and `--reward FOLDER` load, and
`heads.json` with the scores on held-out prompts.

Texts are encoded exactly as the grader encodes them, and dropout is off, so the same seed gives the same weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path as File
from typing import Any

import torch
from torch import Tensor

from gruppo.core.collate import blocks
from gruppo.graders.reward_model import RewardModel
from gruppo.runs.config import nearest
from gruppo.runs.data import split
from gruppo.sft import example_of, warm_cosine
from gruppo.types import GruppoError, Task

SCORES_FILE = "heads.json"


@dataclass(frozen=True)
class Labelled:
    """A prompt, a completion and one label per head; NaN = nobody labelled it."""

    prompt: Any
    completion: str
    labels: tuple[float, ...]


@dataclass(frozen=True)
class Step:
    """What one optimizer step did."""

    step: int
    steps: int
    loss: float  # before the update
    labels: int
    lr: float
    grad_norm: float


@dataclass(frozen=True)
class HeadScore:
    """How well one head says the held-out labels. None where it is not defined: no label, or all labels equal."""

    head: str
    labels: int
    mse: float | None
    mse_of_mean: float | None  # of always saying the mean of the training labels
    pearson: float | None
    spearman: float | None


# ---- data


def read_labelled(file: str | File, heads: Sequence[str]) -> list[Labelled]:
    """Rows of a JSONL file with `prompt` and `completion` (or `messages`) and a column per head; null or absent = no label."""
    try:
        lines = File(file).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise GruppoError(f"cannot read {file}: {error.strerror}") from None
    rows, columns = [], {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"line {number} of {file}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise GruppoError(f"{where} is not JSON: {error}") from None
        example = example_of(row, where)
        columns |= row
        labels = tuple(label_of(row.get(head), head, where) for head in heads)
        rows.append(Labelled(example.prompt, example.completion, labels))
    if not rows:
        raise GruppoError(
            f"{file} holds no row; it needs one JSON object per line, with prompt, completion and the heads' labels"
        )
    for k, head in enumerate(heads):
        if head not in columns:
            known = [c for c in columns if c not in ("prompt", "completion", "messages")]
            raise GruppoError(f"no row of {file} has the column {head!r}; {nearest(head, known)}")
        if all(math.isnan(row.labels[k]) for row in rows):
            raise GruppoError(f"the column {head!r} of {file} is null in all {len(rows)} rows; a head needs labels")
    return rows


def label_of(value: Any, head: str, where: str) -> float:
    """A label as a number; NaN for none, which only null or an absent column can say."""
    if value is None:
        return math.nan
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise GruppoError(f"the label {head!r} in {where} is {value!r}; a label is a finite number, and null where there is none")
    return float(value)


def apart(rows: Sequence[Labelled], share: float) -> tuple[list[Labelled], list[Labelled]]:
    """(training, held-out): a share of the distinct prompts, chosen by their hash."""
    train, held = split([Task(row.prompt, extra={"row": row}) for row in rows], share, len(rows))
    if share > 0 and not held:
        raise GruppoError(
            "all rows have the same prompt, so none can be held out; give several prompts, or hold out a share of 0"
        )
    return [t.extra["row"] for t in train], [t.extra["row"] for t in held]


# ---- model


def begin(model: str | File, heads: Sequence[str], seed: int = 0, device: str | None = None) -> RewardModel:
    """The backbone in a folder under a new linear head whose weights depend on the seed alone."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    if not heads or len(set(heads)) != len(heads):
        raise GruppoError(f"the heads are {list(heads)}; give at least one, and every name once")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            made, info = AutoModelForSequenceClassification.from_pretrained(
                str(model),
                num_labels=len(heads),
                id2label=dict(enumerate(heads)),
                label2id={head: k for k, head in enumerate(heads)},
                problem_type="regression",
                dtype=torch.float32,
                ignore_mismatched_sizes=True,  # a head of another size is replaced
                output_loading_info=True,
            )
        except (OSError, ValueError) as error:
            raise GruppoError(f"no model that can carry a regression head can be read from {str(model)!r}: {error}") from error
    inside = made.base_model_prefix + "."
    lost = sorted(k for k in info["missing_keys"] if k.startswith(inside) and "pooler" not in k)
    if lost:
        raise GruppoError(
            f"{len(lost)} weights of the backbone are not in {str(model)!r} and would be random ({', '.join(lost[:3])})"
        )
    return RewardModel(made, AutoTokenizer.from_pretrained(str(model)), names=tuple(heads), device=device)


def squared(said: Tensor, labels: Tensor) -> Tensor:
    """The sum of squared errors over the labels that exist, of predictions [B, K] and labels [B, K] with NaN = none."""
    return torch.where(labels.isnan(), torch.zeros_like(said), said - labels.nan_to_num()).square().sum()


def fit(
    judge: RewardModel,
    rows: Sequence[Labelled],
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    warmup: int,
    rng: torch.Generator,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
) -> Iterator[Step]:
    """`steps` AdamW steps on `batch` rows each, shuffled anew for every pass by `rng`.

    The judge's token budget bounds what one forward holds and changes nothing else.
    """
    ids = [encoded(judge, row) for row in rows]
    labels = torch.tensor([row.labels for row in rows])
    optimizer = torch.optim.AdamW(judge.model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    rate = warm_cosine(learning_rate, steps, warmup=min(warmup, steps // 2))
    order: list[int] = []
    for step in range(1, steps + 1):
        while len(order) < min(batch, len(rows)):
            order += torch.randperm(len(rows), generator=rng).tolist()
        chosen, order = order[:batch], order[batch:]
        count = int((~labels[chosen].isnan()).sum())
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for some in blocks([len(ids[i]) for i in chosen], judge.budget):
            at = [chosen[i] for i in some]
            said = judge.logits([ids[i] for i in at])
            loss = squared(said, labels[at].to(said.device)) / max(1, count)
            loss.backward()
            total += float(loss.detach())
        norm = float(torch.nn.utils.clip_grad_norm_(judge.model.parameters(), max_grad_norm))
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise GruppoError(f"at step {step} the loss is {total} and its gradient norm {norm}; no update was made from it")
        optimizer.step()
        yield Step(step, steps, total, count, rate(step), norm)


def encoded(judge: RewardModel, row: Labelled) -> list[int]:
    """A row's tokens; a sentence when the model cannot read them all, because nothing is cut."""
    ids = judge.encode(row.prompt, row.completion)
    if len(ids) > judge.longest:
        raise GruppoError(
            f"a row has {len(ids)} tokens, but this model reads {judge.longest}; shorten or remove it (its completion begins "
            f"{row.completion[:40]!r})"
        )
    return ids


# ---- scores


@torch.no_grad()
def predicted(judge: RewardModel, rows: Sequence[Labelled]) -> Tensor:
    """[rows, heads]: what the model says."""
    ids = [encoded(judge, row) for row in rows]
    out = torch.zeros(len(rows), len(judge.signals))
    for some in blocks([len(i) for i in ids], judge.budget):
        out[some] = judge.logits([ids[i] for i in some]).float().cpu()
    return out


def scores(judge: RewardModel, train: Sequence[Labelled], held: Sequence[Labelled]) -> list[HeadScore]:
    """One line per head, on the held-out rows."""
    said = predicted(judge, held)
    out = []
    for k, head in enumerate(judge.signals):
        right = torch.tensor([row.labels[k] for row in held], dtype=torch.float64)
        kept = ~right.isnan()
        right, guess = right[kept], said[kept, k].double()
        seen = torch.tensor([row.labels[k] for row in train], dtype=torch.float64).nanmean()
        there = len(right) > 0
        out.append(
            HeadScore(
                head,
                len(right),
                float((guess - right).square().mean()) if there else None,
                float((seen - right).square().mean()) if there else None,
                pearson(guess, right),
                pearson(ranks(guess), ranks(right)),
            )
        )
    return out


def pearson(a: Tensor, b: Tensor) -> float | None:
    """The correlation of two vectors; None where one of them does not vary."""
    if len(a) < 2 or bool((a == a[0]).all()) or bool((b == b[0]).all()):
        return None
    a, b = a - a.mean(), b - b.mean()
    return float((a @ b) / (a.norm() * b.norm()))


def ranks(x: Tensor) -> Tensor:
    """The rank of each entry from 1; equal entries share the mean of their ranks."""
    _, inverse, counts = x.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[inverse]


# ---- from folder to folder


def fit_folder(
    model: str | File,
    data: str | File,
    output: str | File,
    heads: Sequence[str],
    *,
    epochs: float = 1.0,
    steps: int | None = None,
    batch: int = 32,
    learning_rate: float = 1e-5,
    warmup: int = 10,
    held_out: float = 0.1,
    seed: int = 0,
    device: str | None = None,
) -> Iterator[Step]:
    """Fit the heads to a JSONL file and save a plain folder; the generator is `gruppo reward-model fit`.

    `steps` overrides `epochs`. The folder appears after the last step, with the held-out scores in heads.json.
    """
    out = File(output)
    if out.exists() and any(out.iterdir()):
        raise GruppoError(f"{out} exists and is not empty; nothing was overwritten, choose another folder")
    train, held = apart(read_labelled(data, heads), held_out)
    for k, head in enumerate(heads):
        if all(math.isnan(row.labels[k]) for row in train):
            raise GruppoError(f"all labels of the head {head!r} are on held-out prompts; hold out less than {held_out:g}")
    train = [row for row in train if not all(map(math.isnan, row.labels))]
    judge = begin(model, heads, seed, device)
    total = steps if steps is not None else max(1, math.ceil(epochs * len(train) / batch))
    rng = torch.Generator().manual_seed(seed)
    for row in held:
        encoded(judge, row)  # what cannot be scored in the end is refused now
    yield from fit(judge, train, steps=total, batch=batch, learning_rate=learning_rate, warmup=warmup, rng=rng)
    judge.model.save_pretrained(out)
    judge.tokenizer.save_pretrained(out)
    told = {"training_rows": len(train), "held_out_rows": len(held), "heads": [asdict(s) for s in scores(judge, train, held)]}
    (out / SCORES_FILE).write_text(json.dumps(told, indent=1) + "\n")


def saved_scores(folder: str | File) -> list[HeadScore]:
    """What `heads.json` says."""
    return [HeadScore(**row) for row in json.loads((File(folder) / SCORES_FILE).read_text())["heads"]]
