"""A claim: a sentence of a paper, measured at toy scale once per seed, with an interval and a verdict."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from gruppo.core.student import student_quantile
from gruppo.types import GruppoError


@dataclass(frozen=True)
class Claim:
    """What a paper says, and what came out here: one row of numbers per seed, of which `figure` is judged.

    `expected` is the range that the figure must lie in; the claim holds when the whole interval does.
    """

    name: str  # the recipe's nickname and a word
    sentence: str  # what the paper says
    measured: str  # how it was measured here
    figure: str  # the column of `rows` that decides
    rows: tuple[Mapping[str, float], ...]  # per seed
    expected: tuple[float, float]  # the figure's range if the claim is true; may be infinite

    def __post_init__(self) -> None:
        if len(self.rows) < 2:
            raise GruppoError(f"the claim {self.name} was measured on {len(self.rows)} seeds; an interval needs at least 2")
        bad = [i for i, row in enumerate(self.rows) if not all(math.isfinite(v) for v in row.values())]
        if bad:
            raise GruppoError(f"seed {bad[0]} of the claim {self.name} gave {dict(self.rows[bad[0]])}, which are not all finite")

    @property
    def mean(self) -> float:
        """The figure's mean over the seeds."""
        return mean([row[self.figure] for row in self.rows])

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of that mean, by Student's t over seeds."""
        return interval([row[self.figure] for row in self.rows])

    @property
    def holds(self) -> bool:
        low, high = self.interval
        return self.expected[0] <= low and high <= self.expected[1]

    @property
    def verdict(self) -> str:
        """One sentence: the figure, its interval, what was expected."""
        low, high = self.interval
        said = "holds" if self.holds else "does not hold"
        return (
            f"{self.name} {said} at toy scale: {self.figure} is {self.mean:.3g} [{low:.3g}, {high:.3g}] over {len(self.rows)} "
            f"seeds, expected {wording(self.expected)}"
        )

    def table(self) -> list[dict[str, float | str]]:
        """One row per seed, then the mean and the half-width of the 95 % interval of every column."""
        columns = list(self.rows[0])
        out: list[dict[str, float | str]] = [{"seed": str(i), **row} for i, row in enumerate(self.rows)]
        out.append({"seed": "mean", **{c: mean([r[c] for r in self.rows]) for c in columns}})
        out.append({"seed": "+-", **{c: half_width([r[c] for r in self.rows]) for c in columns}})
        return out


Measure = Callable[[int], Claim]  # seeds -> Claim


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def half_width(values: Sequence[float]) -> float:
    """t * s / sqrt(n), half of the 95 % interval of the mean."""
    n, centre = len(values), mean(values)
    spread = math.sqrt(sum((v - centre) ** 2 for v in values) / (n - 1))
    return student_quantile(0.975, n - 1) * spread / math.sqrt(n)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean of independent values, by Student's t."""
    half = half_width(values)
    return mean(values) - half, mean(values) + half


def wording(expected: tuple[float, float]) -> str:
    """The range as a person would say it."""
    low, high = expected
    if math.isinf(high):
        return f"at least {low:g}"
    return f"at most {high:g}" if math.isinf(low) else f"between {low:g} and {high:g}"
