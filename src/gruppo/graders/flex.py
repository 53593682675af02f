"""UnifiedReward-Flex: a judge that names, beside the better image, the better one in categories of its own choice.

dim_i    = sum_c w_c rate_c(i) / sum_c w_c             over the categories in which path i was compared
reward_i = (w_o rate(i) + w_d dim_i) / (w_o + w_d)     w_o, w_d = .3, .7;  w_c = 1, .7, .7 (CodeGoat24/Pref-GRPO)
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gruppo.graders.grade import Abstained
from gruppo.graders.judge import Pair, group_pairs, pairs_of, preference, shares, win_rates
from gruppo.types import Group, GruppoError

INSTRUCTION = """You compare two generated images. They were made for this prompt:

{prompt}

Choose up to three categories that matter most for this prompt, the most important first. Say for each which image is better, and
then which is better overall. Reply with JSON only:
{"categories": [{"name": "...", "cat_winner": "Image 1"}, ...], "winner": "Image 2"}"""


@dataclass(frozen=True)
class Verdict:
    """An overall preference and one for each category that the judge chose to look at."""

    overall: float = math.nan
    categories: tuple[tuple[str, float], ...] = ()


def flex_rewards(
    overall: Sequence[float],
    categories: Sequence[Sequence[float]],
    weights: tuple[float, float] = (0.3, 0.7),
    category_weights: Sequence[float] = (1.0, 0.7, 0.7),
    digits: int | None = None,
) -> list[float]:
    """(w_o overall + w_d dim) / (w_o + w_d), dim = sum_c w_c rate_c / sum_c w_c, from win rates [G] and [C][G].

    A NaN rate (the path took part in no comparison of that category) leaves its weight out; a path without any category has
    its overall rate as reward. Categories beyond `category_weights` weigh 1. `digits` rounds dim, 3 in the reference code.
    """
    each = [*category_weights, *[1.0] * (len(categories) - len(category_weights))]
    out = []
    for i, rate in enumerate(overall):
        heard = [(w, c[i]) for w, c in zip(each, categories) if not math.isnan(c[i])]
        total = sum(w for w, _ in heard)
        if not total or not weights[1]:
            out.append(rate)
            continue
        dim = sum(w * c for w, c in heard) / total
        out.append((weights[0] * rate + weights[1] * (dim if digits is None else round(dim, digits))) / sum(weights))
    return out


@dataclass
class FlexRate:
    """The reward of UnifiedReward-Flex: `flex` mixes the overall win rate with those of the judge's own categories.

    The judge returns `Verdict`s. Categories are counted per group by their names, in the order in which they first came up.
    """

    judge: Callable[[Sequence[Pair]], Sequence[Any]]
    weights: tuple[float, float] = (0.3, 0.7)  # overall, categories
    category_weights: tuple[float, ...] = (1.0, 0.7, 0.7)
    digits: int | None = 3
    signals = ("flex",)
    name = "flex"

    def __call__(self, groups: list[Group]) -> list[dict[str, Any]]:
        asked = group_pairs(groups)
        pairs = [pair for mine in asked for pair in mine]
        verdicts = list(self.judge(pairs)) if pairs else []
        if len(verdicts) != len(pairs):
            raise GruppoError(f"a judge was given {len(pairs)} pairs and gave {len(verdicts)} verdicts")
        found = iter([verdict(v) for v in verdicts])
        return [self.rates([next(found) for _ in mine], len(g)) for g, mine in zip(groups, asked)]

    def rates(self, verdicts: Sequence[Any], n: int) -> dict[str, Any]:
        """The signals of one group of n paths."""
        lost = [v for v in verdicts if isinstance(v, Abstained)]
        read = [Verdict() if isinstance(v, Abstained) else v for v in verdicts]
        overall = win_rates([v.overall for v in read], n, digits=self.digits)
        names = list(dict.fromkeys(name for v in read for name, _ in v.categories))
        rewards = flex_rewards(
            overall, [category_rates(read, n, name) for name in names], self.weights, self.category_weights, self.digits
        )
        silent = shares(verdicts, n, lambda v: isinstance(v, Abstained))
        return {
            "flex": [None if n < 2 else lost[0] if s == 1 else r for r, s in zip(rewards, silent)],
            "flex_overall": [None if n < 2 or s == 1 else w for w, s in zip(overall, silent)],
            "flex_unparseable": shares(verdicts, n, lambda v: isinstance(v, Verdict) and v.overall != v.overall),
            "flex_unanswered": silent,
        }


def verdict(value: Any) -> Verdict | Abstained:
    """One answer of a judge, checked; None is one that could not be read.

    A preference instead of a verdict would count as unreadable, and with nothing but ties the run would learn nothing.
    """
    if value is None:
        return Verdict()
    if isinstance(value, Verdict):
        for p in (value.overall, *(p for _, p in value.categories)):
            preference(p)
    elif not isinstance(value, Abstained):
        raise GruppoError(f"FlexRate needs verdicts, but its judge gave {value!r}; `parse=FlexReply()` reads them from replies")
    return value


def category_rates(verdicts: Sequence[Verdict], n: int, name: str) -> list[float]:
    """[n] win rates over the pairs in which the judge looked at this category; NaN for a path that was in none of them."""
    won, met = [0.0] * n, [0] * n
    for (i, j), verdict in zip(pairs_of(n), verdicts):
        for found, p in verdict.categories:
            if found == name:
                p = 0.5 if math.isnan(p) else p
                won[i], won[j] = won[i] + p, won[j] + 1 - p
                met[i], met[j] = met[i] + 1, met[j] + 1
    return [w / m if m else math.nan for w, m in zip(won, met)]


@dataclass(frozen=True)
class FlexReply:
    """Reads {"winner": "Image 1", "categories": [{"name": ..., "cat_winner": "Image 2"}, ...]} anywhere in a reply."""

    most: int = 3  # categories that count

    def __call__(self, reply: str) -> Verdict:
        found = re.search(r"\{.*\}", reply, re.DOTALL)
        try:
            said = json.loads(found.group(0)) if found else None
        except json.JSONDecodeError:
            said = None
        if not isinstance(said, dict):
            return Verdict()
        listed = said.get("categories")
        named = [c for c in listed if isinstance(c, dict)][: self.most] if isinstance(listed, list) else []
        categories = tuple((str(c.get("name", "")).strip() or "category", winner(c.get("cat_winner"))) for c in named)
        return Verdict(winner(said.get("winner")), categories)


def winner(said: Any) -> float:
    """1 for "Image 1", 0 for "Image 2", NaN for both or neither."""
    numbers = set(re.findall(r"\b(?:image|video)\s*([12])\b", str(said).lower()))
    return float(numbers == {"1"}) if len(numbers) == 1 else math.nan
