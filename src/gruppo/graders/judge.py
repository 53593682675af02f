"""Pairwise judges, and the share of its pairs that a picture (or a text) wins in its group.

A *judge* is a callable on pairs: for each, 1 where the first is better, 0 where the second is, .5 for a tie; NaN (or None) where
its answer could not be read; `Abstained` where no answer came. `WinRate(judge)` asks about all G(G-1)/2 pairs of every group,
each in one order, or with `swap` in both.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from gruppo.graders.grade import Abstained
from gruppo.graders.images import Scorer, frames_of, scored
from gruppo.types import Group, GruppoError


@dataclass(frozen=True, eq=False)
class Pair:
    """Two outputs for one prompt."""

    first: Any
    second: Any
    prompt: Any

    def swapped(self) -> Pair:
        """The same question the other way round."""
        return Pair(self.second, self.first, self.prompt)


@runtime_checkable
class Judge(Protocol):
    """Preferences for the first of each pair."""

    def __call__(self, pairs: Sequence[Pair]) -> Sequence[Any] | Tensor: ...


def pairs_of(n: int) -> list[tuple[int, int]]:
    """All i < j of n, in the order in which they are asked."""
    return list(itertools.combinations(range(n), 2))


def win_rates(preferences: Sequence[float], n: int, tie: float = 0.5, digits: int | None = 3) -> list[float]:
    """w_i = (wins + tie * (ties and pairs without a readable answer)) / (n - 1), for preferences in the order of `pairs_of`.

    Rounded to `digits` as in the reference code, which moves the sum of the rates off n / 2 by up to n * 5e-4.
    """
    pairs = pairs_of(n)
    if len(preferences) != len(pairs):
        raise GruppoError(f"{n} paths make {len(pairs)} pairs, but {len(preferences)} preferences came")
    won = [0.0] * n
    for (i, j), p in zip(pairs, preferences):
        tied = math.isnan(p) or p == 0.5
        won[i] += tie if tied else p
        won[j] += tie if tied else 1 - p
    rates = [w / max(n - 1, 1) for w in won]
    return rates if digits is None else [round(w, digits) for w in rates]


def preference(value: Any) -> float | Abstained:
    """One answer of a judge: a number in [0, 1], NaN, or a failure."""
    if isinstance(value, Abstained):
        return value
    number = math.nan if value is None else float(value)
    if not (math.isnan(number) or 0 <= number <= 1):
        raise GruppoError(f"a judge preferred the first by {number}; 1 (first), 0 (second), .5 (tie) or NaN belong there")
    return number


def both(one: float | Abstained, other: float | Abstained) -> float | Abstained:
    """The mean of an answer and the answer to the swapped question; where one is missing nothing tells taste from position."""
    for value in (one, other):
        if isinstance(value, Abstained):
            return value
    assert isinstance(one, float)
    assert isinstance(other, float)
    return (one + 1 - other) / 2


@dataclass
class WinRate:
    """`win_rate` of every path within its group, and the shares of its pairs that the judge did not decide.

    `win_rate_unparseable`: the answer could not be read; `win_rate_unanswered`: none came, however often it was asked. Both
    count as ties. A path of whose pairs none was answered abstains, and so does the only path of a group.
    """

    judge: Judge
    swap: bool = False
    tie: float = 0.5
    digits: int | None = 3
    signal: str = "win_rate"
    metrics: dict[str, list[float]] = field(default_factory=dict, repr=False)

    @property
    def signals(self) -> tuple[str, ...]:
        return (self.signal,)

    @property
    def name(self) -> str:
        return f"{self.signal} ({getattr(self.judge, '__name__', None) or type(self.judge).__name__})"

    def __call__(self, groups: list[Group]) -> list[dict[str, Any]]:
        asked = group_pairs(groups)
        pairs = [pair for mine in asked for pair in mine]
        answers = judged(self.judge, pairs)
        if self.swap:
            answers = [both(a, b) for a, b in zip(answers, judged(self.judge, [p.swapped() for p in pairs]))]
        self.metrics.setdefault("judged", []).append(float(len(pairs) * (2 if self.swap else 1)))
        found = iter(answers)
        return [self.rates([next(found) for _ in mine], len(g)) for g, mine in zip(groups, asked)]

    def rates(self, answers: list[float | Abstained], n: int) -> dict[str, Any]:
        """The signals of one group of n paths."""
        rates = win_rates([math.nan if isinstance(a, Abstained) else a for a in answers], n, self.tie, self.digits)
        silent, unread = shares(answers, n, lambda a: isinstance(a, Abstained)), shares(answers, n, lambda a: a != a)
        lost = next((a for a in answers if isinstance(a, Abstained)), None)
        return {
            self.signal: [None if n < 2 else lost if s == 1 else w for w, s in zip(rates, silent)],
            f"{self.signal}_unparseable": unread,
            f"{self.signal}_unanswered": silent,
        }


def group_pairs(groups: Sequence[Group]) -> list[list[Pair]]:
    """The pairs of every group: outputs are compared within their own prompt only."""
    return [[Pair(g.paths[i].output, g.paths[j].output, g.task.prompt) for i, j in pairs_of(len(g))] for g in groups]


def judged(judge: Judge, pairs: Sequence[Pair]) -> list[float | Abstained]:
    """The judge's preferences, checked."""
    if not pairs:
        return []
    found = judge(pairs)
    values = found.tolist() if isinstance(found, Tensor) else list(found)
    if len(values) != len(pairs):
        raise GruppoError(f"a judge was given {len(pairs)} pairs and gave {len(values)} preferences")
    return [preference(v) for v in values]


def shares(answers: Sequence[Any], n: int, which: Callable[[Any], bool]) -> list[float]:
    """For each of n paths, the share of its pairs whose answer is such."""
    counts = [0] * n
    for (i, j), answer in zip(pairs_of(n), answers):
        hit = which(answer)
        counts[i] += hit
        counts[j] += hit
    return [c / max(n - 1, 1) for c in counts]


# -- judges --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Margin:
    """Prefers what a scorer scores higher; a tie within `margin`. Every picture is scored once, not once per pair."""

    scorer: Scorer
    margin: float = 0.0
    batch: int = 32

    def __call__(self, pairs: Sequence[Pair]) -> list[float | Abstained]:
        ids = [(id(o), str(p.prompt)) for p in pairs for o in (p.first, p.second)]
        outputs = dict(zip(ids, ((o, p.prompt) for p in pairs for o in (p.first, p.second))))
        images = [frames_of(o, 1)[0] for o, _ in outputs.values()]
        score = dict(zip(outputs, scored(self.scorer, images, [prompt for _, prompt in outputs.values()], self.batch)))
        return [self.compare(score[a], score[b]) for a, b in zip(ids[::2], ids[1::2])]

    def compare(self, first: Any, second: Any) -> float | Abstained:
        """The preference of two scores."""
        for value in (first, second):
            if isinstance(value, Abstained):
                return value
        if first is None or second is None:
            return math.nan
        return 0.5 if abs(first - second) <= self.margin else float(first > second)
