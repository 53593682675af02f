"""Which unit of a path each token belongs to, from the characters a grader scored. Tokens stay the ones that were sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gruppo.types import Grade, Group, GruppoError, Path, Rollout

Span = tuple[int, int]
Spans = Callable[[Group], Sequence[Sequence[Span]]]


def scored(group: Group) -> Sequence[Sequence[Span]]:
    """The characters each rank was read from, as the grader reports them in the signal `spans`."""
    if "spans" not in group.signals:
        raise GruppoError(
            "the ranks of a path are the spans its grader scored, but the graders of this run give no signal 'spans', only: "
            f"{', '.join(group.signals) or 'nothing'}. Add graders.ranking.Ranking, or name another `spans`"
        )
    return [[(int(a), int(b)) for a, b in spans] for spans in group.signals["spans"]]


@dataclass(frozen=True)
class Pieces:
    """Every `size` characters are one rank: for text that is a list without separators."""

    size: int

    def __call__(self, group: Group) -> list[list[Span]]:
        cuts = [range(0, max(1, len(str(p.output))), self.size) for p in group.paths]
        return [[(a, a + self.size) for a in starts] for starts in cuts]


@dataclass(frozen=True)
class Segmented:
    """Writes `Path.unit`: the rank of each token, `ranks` for all beyond the last one, -1 for text that belongs to no rank."""

    inner: Rollout
    ranks: int
    spans: Spans = scored

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise GruppoError(f"ranks is {self.ranks}; a list has at least 1")

    def __call__(self, policy: Any, tasks: Any, grade: Grade, rng: torch.Generator) -> list[Group]:
        return [self.cut(g, policy.decode) for g in self.inner(policy, tasks, grade, rng)]

    def cut(self, group: Group, decode: Callable[[Tensor], str]) -> Group:
        """The group with the unit of every token."""
        spans = self.spans(group)
        if len(spans) != len(group):
            raise GruppoError(f"there are spans for {len(spans)} paths, but the group has {len(group)}")
        paths = [replace(p, unit=ranked(starts(p, decode), s, len(p.output), self.ranks)) for p, s in zip(group.paths, spans)]
        return group.with_(paths=paths)


def starts(path: Path, decode: Callable[[Tensor], str]) -> list[int]:
    """For each token the position in the path's text where its characters begin; the text's length for the end token."""
    text = path.output
    if not isinstance(text, str):
        raise GruppoError(f"tokens are placed in a path's text, but this path's output is a {type(text).__name__}")
    begins = _lengths([decode(path.steps[t : t + 1]) for t in range(len(path.steps))], text)
    # Bytes of one character and words that lose a space when they stand alone do not add up: then read longer and longer.
    if begins is None:
        begins, end = [], 0
        for t in range(len(path.steps)):
            begins.append(end)
            so_far = decode(path.steps[: t + 1])
            if not text.startswith(so_far):
                so_far = so_far.rstrip("\ufffd")  # a character that is not complete yet
            end = max(end, len(so_far)) if text.startswith(so_far) else len(text)
        whole = decode(path.steps)
        if not whole.startswith(text):
            raise GruppoError(
                f"a path's text does not read as its tokens do ({text[:40]!r} against {whole[:40]!r}), so its ranks cannot be "
                "placed on tokens; grade the text as it was decoded"
            )
    return begins


def _lengths(pieces: list[str], text: str) -> list[int] | None:
    """Where each piece begins, while the pieces add up to the text."""
    begins, at = [], 0
    for piece in pieces:
        begins.append(min(at, len(text)))
        at += len(piece)
    return begins if "".join(pieces)[: len(text)] == text else None


def ranked(begins: Sequence[int], spans: Sequence[Span], length: int, ranks: int) -> Tensor:
    """[T] the rank in whose span each token begins; the end token goes with what stands before it.

    A token that reaches over a border belongs to the rank it ends. Everything behind the last of `ranks` spans is beyond the
    list and gets the number `ranks`, whether it reads as an item or not.
    """
    unit, last = [], 0
    for at in begins:
        here = -1
        if at >= length:
            here = last
        elif len(spans) >= ranks and at >= spans[ranks - 1][1]:
            here = ranks
        else:
            here = next((k for k, (a, b) in enumerate(spans) if a <= at < b), -1)
        last = here if here >= 0 else last
        unit.append(here)
    return torch.tensor(unit, dtype=torch.long)
