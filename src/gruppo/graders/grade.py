"""From graders to the signals of a group: the one place where a grade may fail, and where failing is never a 0.

Three things can stand where a number is expected, and they are kept apart:

    wrong       0, or whatever the grader gives for it: the completion was read and is not right (no number in it, no such choice)
    None, NaN   the grader has nothing to say about this path
    Abstained   the grade could not be given (a time-out, a crash, gold that cannot be read): counted and shown with its reason
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gruppo.types import Grader, Group, GruppoError


@dataclass(frozen=True)
class Abstained:
    """Stands in a signal where a grade could not be given. `error` is set when code or data is at fault, not the completion."""

    reason: str
    error: Exception | None = field(default=None, compare=False)


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

    `weights` names the signals that enter the reward; the others are measured and shown only. A failed grade makes the path's
    reward NaN, and the loop drops the path. For a grader with `skips = True` (TRL functions) a plain None means "does not
    apply here": the rest of the sum stands unless nothing is left of it. A failure is never skipped.

    A grader that raises gives up its whole call: every path abstains, counted under its message. `strict` refuses instead; the
    run grades its first paths that way (`preflight`), because a grader that fails there would fail for hours.
    """

    graders: Sequence[Grader]
    weights: dict[str, float]
    strict: bool = False
    abstained: Counter = field(default_factory=Counter)  # signal -> paths since the start of the run
    failures: Counter = field(default_factory=Counter)  # "correct: time-out after 5 s" -> paths since the start of the run
    known: dict[int, tuple[str, ...]] = field(default_factory=dict, repr=False)  # what each grader gave when it last worked

    def __call__(self, groups: list[Group]) -> list[Group]:
        signals: list[dict[str, Any]] = [dict(g.signals) for g in groups]
        failed: list[dict[str, Tensor]] = [{} for _ in groups]
        optional: set[str] = set()
        givers: dict[str, str] = {}
        for i, grader in enumerate(self.graders):
            who, found = name_of(grader), self._ask(i, grader, groups)
            if len(found) != len(groups):
                raise GruppoError(f"the grader {who} was given {len(groups)} groups and returned {len(found)} results")
            for name in sorted({name for got in found for name in got}):
                if name == "reward":
                    raise GruppoError(f"{who} gives a signal called 'reward', the name of the weighted sum; call it differently")
                if name in givers:
                    raise GruppoError(f"both {givers[name]} and {who} give the signal {name!r}; rename one of them")
                givers[name] = who
                if getattr(grader, "skips", False):
                    optional.add(name)
            for into, lost, got, group in zip(signals, failed, found, groups):
                for name, values in got.items():
                    into[name] = kept = column(name, values, len(group), who)
                    lost[name] = self._failures(name, values, who)
                    if isinstance(kept, Tensor) and kept.dim() == 1:
                        self.abstained[name] += int(kept.isnan().sum())
        return [
            g.with_(signals={**s, "reward": self.total(s, len(g), optional, lost)}) for g, s, lost in zip(groups, signals, failed)
        ]

    def preflight(self, groups: list[Group]) -> list[Group]:
        """Grade once before the run with every failure of a grader's code or data refused; counts nothing."""
        graded = replace(self, strict=True, abstained=Counter(), failures=Counter())(groups)
        self.take_metrics()
        return graded

    def at(self, step: int, steps: int) -> None:
        """Tell the graders that ask (TRL's `trainer_state`) which step of how many this is."""
        for grader in self.graders:
            if hasattr(grader, "at"):
                grader.at(step, steps)  # type: ignore[attr-defined]

    def take_metrics(self) -> dict[str, float]:
        """The means of what graders logged beside their signals (TRL's `log_metric`) since this was last asked."""
        means: dict[str, float] = {}
        for grader in self.graders:
            logged: dict[str, list[float]] = getattr(grader, "metrics", {})
            means.update({name: sum(values) / len(values) for name, values in logged.items() if values})
            logged.clear()
        return means

    def total(
        self, signals: dict[str, Any], n: int, optional: Collection[str] = (), failed: dict[str, Tensor] | None = None
    ) -> Tensor:
        """The weighted sum of the named signals; NaN where a required one abstained or where all of them did."""
        missing = [name for name in self.weights if name not in signals]
        if missing:
            raise GruppoError(
                f"the reward weighs the signal {missing[0]!r}, but the graders of this run give only: {', '.join(signals)}"
            )
        total, heard = torch.zeros(n), torch.zeros(n, dtype=torch.bool)
        for name, weight in self.weights.items():
            value = signals[name]
            if not isinstance(value, Tensor) or value.dim() != 1:
                raise GruppoError(f"the reward weighs the signal {name!r}, which is not one number per path but: {_brief(value)}")
            value = value.float()
            skipped = value.isnan() if name in optional else torch.zeros(n, dtype=torch.bool)
            if failed and name in failed:
                skipped &= ~failed[name]
            total = total + torch.where(skipped, torch.zeros(n), weight * value)
            heard |= ~skipped
        return torch.where(heard, total, torch.full((n,), math.nan))

    def _ask(self, i: int, grader: Grader, groups: list[Group]) -> list[dict[str, Any]]:
        try:
            found = grader(groups)
        except GruppoError:  # a sentence of the library: the run must stop
            raise
        except Exception as error:  # the declared boundary: somebody's grader broke
            names = self.known.get(i) or tuple(getattr(grader, "signals", ()))
            if self.strict or not names:
                raise GruppoError(f"the grader {name_of(grader)} raised {described(error)}") from error
            lost = Abstained(f"raised {described(error)}", error)
            return [{name: [lost] * len(g) for name in names} for g in groups]
        self.known[i] = tuple(sorted({name for got in found for name in got}))
        return found

    def _failures(self, name: str, values: Any, who: str) -> Tensor:
        """[G] bool: where a grade could not be given; each reason is counted, or refused while strict."""
        lost = []
        for value in values:
            reason = value.reason if isinstance(value, Abstained) else None
            if isinstance(value, (float, Tensor)) and infinite(value):
                reason = "gave an infinite number"
            elif self.strict and isinstance(value, Abstained) and value.error is not None:
                raise GruppoError(f"{who} cannot give {name!r}: {reason}") from value.error
            if reason is not None:
                self.failures[f"{name}: {reason}"] += 1
            lost.append(reason is not None)
        return torch.tensor(lost, dtype=torch.bool)


def column(name: str, values: Any, n: int, who: str) -> Any:
    """A signal as the group keeps it: numbers become [G] floats with None, failures and infinities as NaN, else a list of G."""
    if isinstance(values, Tensor):
        values = values.tolist() if values.dim() == 1 else list(values)
    try:
        values = list(values)
    except TypeError:
        raise GruppoError(f"{who} returned a {type(values).__name__} as {name!r} where a list of {n} values belongs") from None
    if len(values) != n:
        raise GruppoError(f"{who} returned {len(values)} values of {name!r} for {n} paths; every path needs exactly one")
    values = [None if isinstance(v, Abstained) else v for v in values]
    values = [v.item() if isinstance(v, (Tensor, np.generic)) and v.ndim == 0 else v for v in values]
    if all(v is None or isinstance(v, (int, float)) for v in values):
        return torch.tensor([math.nan if v is None or infinite(v) else float(v) for v in values])
    if all(isinstance(v, Tensor) for v in values):
        return torch.stack(values)
    return values


def infinite(value: Any) -> bool:
    """Is this one number, and infinite?"""
    return (
        math.isinf(value)
        if isinstance(value, (int, float))
        else isinstance(value, Tensor) and value.ndim == 0 and bool(value.isinf())
    )


def name_of(grader: Any) -> str:
    """What to call a grader in a sentence."""
    return getattr(grader, "name", None) or getattr(grader, "__name__", None) or type(grader).__name__


def described(error: BaseException) -> str:
    """An exception in one line: its type and the first line of what it says."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0][:200]}" if said else type(error).__name__


def _brief(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a list like {list(value)[:2]!r}"
