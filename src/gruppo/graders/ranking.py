"""Graders and metrics of ranked lists: one title and year per line, best first, judged against the titles a person liked.

One parse of the text gives both the hits and the characters that each rank was read from (`spans`), so whatever trains ranks
trains what was scored.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gruppo.graders.grade import Abstained, text_of
from gruppo.types import Group, GruppoError

Span = tuple[int, int]  # characters [start, end) of a path's text

LINE = re.compile(  # bullet, number, emphasis or quotes around a title, then its year in brackets
    r"""\s*(?:[*_\#-]+\s*)*(?:\d{1,3}\s*[.)]\s+)?["'*_]*(?P<title>\S.*?)["'*_]*\s+\((?P<year>\d{4})\)"""
)
ASIDE = re.compile(r"\s*\([^()]*\)")


@dataclass(frozen=True)
class Item:
    """One rank: what it names, and the characters it was read from, its line end and blank lines behind it included."""

    title: str
    year: int
    span: Span


def parse(text: str) -> list[Item]:
    """The lines that read "title (year)", in order; other lines are no item and take no rank."""
    lines = [(m.start(), m.group()) for m in re.finditer(r"[^\n]*\n|[^\n]+", text)]
    filled = [(at, line) for at, line in lines if line.strip()]
    ends = [at for at, _ in filled[1:]] + [len(text)]
    out = []
    for (start, line), end in zip(filled, ends):
        match = LINE.match(line)
        if match and (title := " ".join(ASIDE.sub("", match["title"]).split())):
            out.append(Item(title, int(match["year"]), (start, end)))
    return out


def normal(title: str) -> str:
    """A title without case and surplus white space."""
    return " ".join(str(title).split()).casefold()


def as_year(year: Any) -> int | None:
    """1979 of 1979, "1979" and " 1979 "; None of what is no year."""
    try:
        return int(str(year))
    except ValueError:
        return None


def known(catalog: Container[tuple[str, Any]], title: str, year: int) -> bool:
    """Whether the catalogue holds this title and year, whichever way it writes years."""
    return (title, year) in catalog or (title, str(year)) in catalog


def hits(
    items: Sequence[Item],
    truths: Iterable[tuple[str, Any]],
    *,
    catalog: Container[tuple[str, Any]],
    seen: Iterable[str] = (),
    ranks: int,
    tolerance: int = 2,
) -> list[float]:
    """1 at each of the first `ranks` items that finds a truth nobody before it found, else 0; [ranks].

    An item counts when its title was not mentioned before, the catalogue holds it as written, and a truth of the same
    normalised title is at most `tolerance` years away: its own year first, then 1 later, 1 earlier, 2 later, 2 earlier.
    """
    left = [(normal(title), as_year(year)) for title, year in truths]
    mentioned = {normal(t) for t in seen}
    out = [0.0] * ranks
    for k, item in enumerate(items[:ranks]):
        title = normal(item.title)
        if title in mentioned or not known(catalog, item.title, item.year):
            continue
        for year in (item.year, *(item.year + s * d for d in range(1, tolerance + 1) for s in (1, -1))):
            if (title, year) in left:
                left.remove((title, year))
                out[k] = 1.0
                break
    return out


@dataclass(frozen=True)
class Ranking:
    """`hits` [ranks] per path, the `spans` they were read from, `recall` and `ndcg` of the list, and its share `in_catalog`.

    The column `truth` holds (title, year) pairs, `seen` titles that count no more because the conversation named them. Text
    without any item is one unread rank: 0 everywhere, and its one span is all of it.
    """

    catalog: Container[tuple[str, Any]]
    ranks: int = 20
    truth: str = "answer"
    seen: str = "seen"
    tolerance: int = 2
    read: Callable[[str], list[Item]] = parse
    signals = ("hits", "spans", "recall", "ndcg", "in_catalog")

    def __post_init__(self) -> None:
        if self.ranks < 1 or self.tolerance < 0:
            raise GruppoError(
                f"a ranking has at least 1 rank and a year tolerance of at least 0, not {self.ranks}, {self.tolerance}"
            )

    def __call__(self, groups: list[Group]) -> list[dict[str, Any]]:
        return [self.one(group) for group in groups]

    def one(self, group: Group) -> dict[str, Any]:
        """The signals of one group."""
        truths = pairs(group.task.column(self.truth), self.truth)
        seen = group.task.columns().get(self.seen, ())
        texts = [text_of(p.output) for p in group.paths]
        lists = [self.read(text) for text in texts]
        out: dict[str, Any] = {
            "spans": [[item.span for item in items] or [(0, len(text))] for items, text in zip(lists, texts)],
            "in_catalog": [self.share(items) for items in lists],
        }
        dateless = [title for title, year in truths if as_year(year) is None]
        if dateless:
            reason = f"the year of {dateless[0]!r} in the column {self.truth!r} is no number, so no item could find it"
            lost = Abstained(reason, ValueError(reason))
            none = [torch.full((self.ranks,), math.nan)] * len(group)
            return {**out, "hits": none, "recall": [lost] * len(group), "ndcg": [lost] * len(group)}
        found = [
            hits(items, truths, catalog=self.catalog, seen=seen, ranks=self.ranks, tolerance=self.tolerance) for items in lists
        ]
        return {
            **out,
            "hits": [torch.tensor(h) for h in found],
            "recall": [sum(h) / len(truths) if truths else None for h in found],
            "ndcg": [ndcg_at(torch.tensor(h), len(truths), self.ranks) if truths else None for h in found],
        }

    def share(self, items: Sequence[Item]) -> float:
        """How many of the list's items the catalogue holds; 0 for no list."""
        items = items[: self.ranks]
        return sum(known(self.catalog, i.title, i.year) for i in items) / max(1, len(items))


def pairs(truths: Any, column: str) -> list[tuple[str, Any]]:
    """The column as (title, year) pairs; a sentence where it holds something else."""
    try:
        return [(str(title), year) for title, year in truths]
    except (TypeError, ValueError):
        raise GruppoError(f"the column {column!r} must hold (title, year) pairs, but holds {str(truths)[:80]!r}") from None


def recall_at(found: Tensor, truths: int, k: int) -> float:
    """The share of the truths among the first k ranks."""
    return float(found[:k].sum()) / truths


def ndcg_at(found: Tensor, truths: int, k: int) -> float:
    """DCG of the first k ranks over that of a list with all truths on top."""
    discount = 1 / torch.log2(torch.arange(min(k, len(found)), dtype=torch.float64) + 2)
    return float((found[:k].double() * discount).sum() / discount[:truths].sum())


@dataclass(frozen=True)
class RecallAt:
    """`recall@k`: the mean over tasks of the mean over their graded paths, for `runs.evaluate`'s metrics."""

    k: int
    truth: str = "answer"

    def __call__(self, groups: list[Group]) -> dict[str, float]:
        return {f"recall@{self.k}": over_lists(groups, self.truth, self.k, recall_at)}


@dataclass(frozen=True)
class NDCGAt:
    """`ndcg@k`: the mean over tasks of the mean over their graded paths, for `runs.evaluate`'s metrics."""

    k: int
    truth: str = "answer"

    def __call__(self, groups: list[Group]) -> dict[str, float]:
        return {f"ndcg@{self.k}": over_lists(groups, self.truth, self.k, ndcg_at)}


def catalog_share(groups: list[Group]) -> dict[str, float]:
    """The mean share of a list that is in the catalogue, for `runs.evaluate`'s metrics: it falls when a policy drifts."""
    return {"catalog_share": mean([float(torch.as_tensor(g.signals["in_catalog"]).nanmean()) for g in groups])}


def over_lists(groups: list[Group], column: str, k: int, of: Callable[[Tensor, int, int], float]) -> float:
    """Mean over tasks of the mean over paths; abstained paths and tasks without a truth are left out."""
    tasks = []
    for group in groups:
        n = len(group.task.column(column))
        rows = [row for h in group.signals["hits"] if not (row := torch.as_tensor(h)).isnan().any()]
        if n and rows:
            tasks.append(mean([of(row, n, k) for row in rows]))
    return mean(tasks)


def mean(values: Sequence[float]) -> float:
    """The mean; NaN of nothing."""
    return sum(values) / len(values) if values else math.nan
