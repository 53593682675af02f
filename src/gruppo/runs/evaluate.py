"""What a policy can do on held-out tasks: pass@k, mean@n, majority@n, greedy accuracy, each with an interval.

A path whose grade abstained is left out and counted; it is never a wrong answer. Intervals are over tasks, because the paths
of one task are not independent of one another: Wilson's for scores to which every task contributes a single 0 or 1, a seeded
bootstrap for means over several paths of a task. That is a matter of the score and not of how well it stands, so that the
intervals of one curve are of one kind; where a bootstrapped score is the same for all tasks, it has no interval.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from gruppo.graders.grade import text_of
from gruppo.runs.measure import pictures
from gruppo.types import Grade, Group, GruppoError, Task

Metric = Callable[[list[Group]], dict[str, float]]

WILSON_Z = 1.959963984540054  # two-sided 95 %
RESAMPLES = 2000


@dataclass(frozen=True)
class Score:
    """A mean over `n` tasks and its 95 % interval; NaN bounds where n tasks say nothing about the spread."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        if math.isnan(self.low):
            return f"{self.value:.3f}"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Evaluation:
    """The scores of one evaluation, the same by column value, and the graded paths behind them."""

    scores: dict[str, Score]
    by: dict[str, dict[str, Score]] = field(default_factory=dict)  # "difficulty=2" -> scores of those tasks
    counts: dict[str, int] = field(default_factory=dict)  # tasks, paths, abstained, greedy_abstained
    groups: list[Group] = field(default_factory=list, repr=False)
    greedy_groups: list[Group] = field(default_factory=list, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for JSON: NaN becomes None."""
        return {
            "scores": {name: _plain(s) for name, s in self.scores.items()},
            "by": {part: {name: _plain(s) for name, s in scores.items()} for part, scores in self.by.items()},
            "counts": dict(self.counts),
        }

    def to_json(self) -> str:
        """`as_dict` as one line of strict JSON."""
        return json.dumps(self.as_dict(), allow_nan=False)

    def rows(self) -> list[dict[str, Any]]:
        """One row per score and part for a table: part ("all", "difficulty=2"), metric, value, low, high, n."""
        parts = {"all": self.scores, **self.by}
        return [{"part": part, "metric": name, **_plain(s)} for part, scores in parts.items() for name, s in scores.items()]


def evaluate(
    policy: Any,
    tasks: Sequence[Task],
    grade: Grade,
    rng: torch.Generator,
    *,
    samples: int = 4,
    greedy: bool = True,
    by: Sequence[str] = ("difficulty",),
    metrics: Sequence[Metric] = (),
) -> Evaluation:
    """Sample `samples` paths per task at the policy's temperature and one greedily, grade them, and score them."""
    tasks = list(tasks)
    if not tasks:
        raise GruppoError("there are no tasks to evaluate on")
    if samples < 0 or (samples == 0 and not greedy):
        raise GruppoError(
            f"samples is {samples} and greedy is {greedy}, so there is nothing to evaluate; ask for at least one path"
        )
    groups: list[Group] = []
    if samples:
        paths = policy.sample([t.prompt for t in tasks for _ in range(samples)], g=rng)
        groups = grade([Group(t, paths[i * samples : (i + 1) * samples]) for i, t in enumerate(tasks)])
    best: list[Group] = []
    if greedy:
        best = grade([Group(t, [p]) for t, p in zip(tasks, policy.sample([t.prompt for t in tasks], g=rng, temperature=0.0))])
    return score(groups, best, by=by, metrics=metrics)


def score(
    groups: list[Group], greedy_groups: list[Group], *, by: Sequence[str] = ("difficulty",), metrics: Sequence[Metric] = ()
) -> Evaluation:
    """Score graded groups, sampled and greedy, of the same tasks in the same order; either list may be empty."""
    scores = _scores(groups, greedy_groups)
    for metric in metrics:
        for name, value in metric(groups or greedy_groups).items():
            if name in scores:
                raise GruppoError(f"the metric {_name(metric)} returns {name!r}, which is already the name of another score")
            scores[name] = Score(float(value), math.nan, math.nan, len(groups or greedy_groups))
    parts: dict[str, dict[str, Score]] = {}
    for column in by:
        found = [g.task.columns().get(column) for g in groups or greedy_groups]
        labels = {str(v): v for v in found if v is not None}
        for label in sorted(labels, key=lambda name: _order(labels[name])):
            rows = [i for i, v in enumerate(found) if v is not None and str(v) == label]
            parts[f"{column}={label}"] = _scores(*([g[i] for i in rows] if g else [] for g in (groups, greedy_groups)))
    counts = {
        "tasks": len(groups or greedy_groups),
        "paths": sum(map(len, groups)),
        "abstained": sum(int(_correct(g).isnan().sum()) for g in groups if "correct" in g.signals),
        "greedy_abstained": sum(int(_correct(g).isnan().sum()) for g in greedy_groups if "correct" in g.signals),
    }
    return Evaluation(scores, parts, counts, groups, greedy_groups)


def _scores(groups: list[Group], greedy_groups: list[Group]) -> dict[str, Score]:
    out: dict[str, Score] = {}
    if any("correct" in g.signals for g in greedy_groups):
        out["greedy"] = over_tasks([float(_correct(g)[0]) for g in greedy_groups], single=True)
    if any("correct" in g.signals for g in groups):
        graded = [(c := _correct(g))[~c.isnan()] for g in groups]
        samples = max(map(len, groups))
        k = 1
        while k <= samples:  # a task with fewer than k grades says nothing about pass@k and is left out of it
            chances = [pass_at(k, len(c), int(c.sum())) if len(c) >= k else math.nan for c in graded]
            out[f"pass@{k}"] = over_tasks(chances, single=k == samples)
            k *= 2
        out[f"mean@{samples}"] = over_tasks(
            [float(c.double().mean()) if len(c) else math.nan for c in graded], single=samples == 1
        )
        if samples > 1 and any(votes(g) is not None for g in groups):
            out[f"majority@{samples}"] = over_tasks([majority(votes(g), _correct(g).tolist()) for g in groups])
    shown, prefix = (groups, "") if groups else (greedy_groups, "greedy_")
    for name in dict.fromkeys(n for g in shown for n in g.signals):
        values = [g.signals.get(name) for g in shown]
        if name != "correct" and any(isinstance(v, Tensor) and v.dim() == 1 for v in values):
            out[prefix + name] = over_tasks([_mean(v) for v in values], single=max(map(len, shown)) == 1)
    painted = any(pictures(p.output) for g in shown for p in g.paths)  # every picture has the grid's length
    for name, of in {} if painted else {"length": len, "truncated": lambda p: float(p.truncated)}.items():
        if groups:
            single = name == "truncated" and max(map(len, groups)) == 1
            out[name] = over_tasks([sum(map(of, g.paths)) / len(g) for g in groups], single=single)
        if greedy_groups:
            out[f"greedy_{name}"] = over_tasks([float(of(g.paths[0])) for g in greedy_groups], single=name == "truncated")
    return out


def headline(found: Evaluation) -> tuple[str, float]:
    """The score by which checkpoints are compared: sampled accuracy, else greedy accuracy, else the mean reward."""
    for name in (*(n for n in found.scores if n.startswith("mean@")), "greedy", "reward", "greedy_reward"):
        if name in found.scores:
            return name, found.scores[name].value
    return "none", math.nan


def pass_at(k: int, n: int, correct: int) -> float:
    """1 - C(n - c, k) / C(n, k): the chance that k of the n paths, drawn without replacement, hold a correct one."""
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def majority(answers: Sequence[Any] | None, correct: Sequence[float | int]) -> float:
    """Is the most frequent answer correct? A tie is broken by a fair coin, so it counts the mean over the tied answers.

    A path without an answer (None) has no vote, an answer whose grades all abstained is left out; NaN when nothing is left.
    """
    if answers is None:
        return math.nan
    grades: dict[str, list[float | int]] = {}
    tally: Counter[str] = Counter()
    for answer, grade in zip(answers, correct, strict=True):
        if answer is not None and not math.isnan(grade):
            tally[str(answer)] += 1
            grades.setdefault(str(answer), []).append(grade)
    if not tally:  # nobody voted: the paths' own grades stand (no answer at all is wrong where the grader says so)
        heard = [float(c) for c in correct if not math.isnan(c)]
        return sum(heard) / len(heard) if heard else math.nan
    top = max(tally.values())
    tied = [sum(grades[a]) / len(grades[a]) for a, n in tally.items() if n == top]
    return sum(tied) / len(tied)


def votes(group: Group) -> list[Any] | None:
    """Each path's answer: the signal `answers` where a grader extracted them, else what stands in its `<answer>` tag."""
    if "answers" in group.signals:
        return [None if a == "" or a != a else a for a in group.signals["answers"]]  # "" and NaN: nothing was extracted
    if any(not isinstance(p.output, (str, list)) or pictures(p.output) for p in group.paths):
        return None  # nothing was written
    found = []
    for path in group.paths:
        text = text_of(path.output)
        inside = text.rpartition("<answer>")[2].partition("</answer>")[0].strip() if "<answer>" in text else None
        found.append(inside or None)
    return found if any(a is not None for a in found) else None


def over_tasks(values: Sequence[float], *, single: bool = False) -> Score:
    """The mean over tasks with its interval; NaN tasks are left out.

    Wilson's interval where each task has a `single` path and the values are 0 and 1, else a bootstrap.
    """
    kept = [v for v in values if not math.isnan(v)]
    n = len(kept)
    if n == 0:
        return Score(math.nan, math.nan, math.nan, 0)
    mean = sum(kept) / n
    if single and all(v in (0.0, 1.0) for v in kept):
        return Score(mean, *wilson(sum(kept), n), n)
    return Score(mean, *bootstrap(kept), n)


def wilson(successes: float | int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share; inside [0, 1] and of positive width also at 0 and at n successes."""
    p, z2 = successes / n, WILSON_Z**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = WILSON_Z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(values: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES) -> tuple[float, float]:
    """The 2.5 and 97.5 % quantiles of the mean under resampling of the values; NaN where they are all the same."""
    if len(set(values)) < 2:  # resampling the same number again and again says nothing about its spread
        return math.nan, math.nan
    x = torch.tensor(values, dtype=torch.float64)
    g = torch.Generator().manual_seed(seed)
    means = torch.cat(  # in pieces: a thousand tasks times two thousand resamples would be 16 MB at once
        [x[torch.randint(len(x), (100, len(x)), generator=g)].mean(1) for _ in range(math.ceil(resamples / 100))]
    )
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def _correct(group: Group) -> Tensor:
    value = group.signals.get("correct")
    if value is None:
        return torch.full((len(group),), math.nan)
    wrong = ~(value.isnan() | (value == 0) | (value == 1))
    if wrong.any():
        raise GruppoError(
            f"the signal 'correct' holds {float(value[wrong][0])}; it must be 0, 1, or NaN where the grader abstained "
            "(give graded quality another name)"
        )
    return value


def _mean(value: Any) -> float:
    if not isinstance(value, Tensor) or value.dim() != 1:
        return math.nan
    heard = value[~value.isnan()].double()
    return float(heard.mean()) if len(heard) else math.nan


def _plain(score: Score) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(score).items()}


def _order(value: Any) -> tuple[int, float, str]:
    return (0, float(value), "") if isinstance(value, (int, float)) else (1, 0.0, str(value))


def _name(metric: Any) -> str:
    return getattr(metric, "__name__", None) or type(metric).__name__
