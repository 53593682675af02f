"""From graders to the signals of a group: the one place where a grade may fail, and where failing is never a 0."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gruppo.types import Grader, Group, GruppoError


def text_of(output: Any) -> str:
    """The text a grader reads: the output itself, or the assistant's last message."""
    if isinstance(output, str):
        return output
    if isinstance(output, list) and output and isinstance(output[-1], dict) and "content" in output[-1]:
        return str(output[-1]["content"])
    raise GruppoError(f"this grader reads text, but a path's output is a {type(output).__name__}")


@dataclass
class Grading:
    """Runs graders on groups and writes their raw signals, once, plus `signals["reward"]`: the weighted sum.

    `weights` names the signals that enter the reward; the others are measured and shown only. A failed grade (NaN) makes the
    path's reward NaN, and the loop drops the path, except for a grader with `skips = True` (TRL functions): there None means
    "does not apply here", and the rest of the sum stands unless nothing is left of it.
    """

    graders: Sequence[Grader]
    weights: dict[str, float]
    abstained: Counter = field(default_factory=Counter)  # signal -> paths since the start of the run
    failures: Counter = field(default_factory=Counter)  # what a crashing grader said -> how often

    def __call__(self, groups: list[Group]) -> list[Group]:
        signals: list[dict[str, Any]] = [dict(g.signals) for g in groups]
        optional: set[str] = set()
        for grader in self.graders:
            found = grader(groups)
            if len(found) != len(groups):
                raise GruppoError(f"the grader {name_of(grader)} was given {len(groups)} groups and returned {len(found)} results")
            for group, into, got in zip(groups, signals, found):
                for name, values in got.items():
                    into[name] = column(name, values, len(group), name_of(grader))
                    if isinstance(into[name], Tensor):
                        self.abstained[name] += int(into[name].isnan().sum())
                    if getattr(grader, "skips", False):
                        optional.add(name)
        return [g.with_(signals={**s, "reward": self.total(s, len(g), optional)}) for g, s in zip(groups, signals)]

    def total(self, signals: dict[str, Any], n: int, optional: Iterable[str]) -> Tensor:
        """The weighted sum of the named signals; NaN where a required one abstained or where all of them did."""
        missing = [name for name in self.weights if name not in signals]
        if missing:
            raise GruppoError(
                f"the reward weighs the signal {missing[0]!r}, but the graders of this run give only: {', '.join(signals)}"
            )
        total, heard = torch.zeros(n), torch.zeros(n, dtype=torch.bool)
        for name, weight in self.weights.items():
            value = signals[name].float()
            skipped = value.isnan() if name in optional else torch.zeros(n, dtype=torch.bool)
            total = total + torch.where(skipped, torch.zeros(n), weight * value)
            heard |= ~skipped
        return torch.where(heard, total, torch.full((n,), math.nan))


def column(name: str, values: Any, n: int, who: str) -> Any:
    """A signal as the group keeps it: numbers become [G] floats with None as NaN, anything else stays a list of G."""
    if isinstance(values, Tensor):
        values = values.tolist() if values.dim() == 1 else list(values)
    try:
        values = list(values)
    except TypeError:
        raise GruppoError(f"{who} returned a {type(values).__name__} as {name!r} where a list of {n} values belongs") from None
    if len(values) != n:
        raise GruppoError(f"{who} returned {len(values)} values of {name!r} for {n} paths; every path needs exactly one")
    if all(v is None or isinstance(v, (int, float)) for v in values):
        return torch.tensor([math.nan if v is None else float(v) for v in values])
    if all(isinstance(v, Tensor) for v in values):
        return torch.stack(values)
    return values


def name_of(grader: Any) -> str:
    """What to call a grader in a sentence."""
    return getattr(grader, "name", None) or getattr(grader, "__name__", None) or type(grader).__name__
