"""Every recipe by arXiv id, with its nickname as alias: nicknames collide in the literature, ids do not.

A second recipe of the same paper carries the paper's id with a word behind it: `2507.18071/token`.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from gruppo.recipe import Recipe
from gruppo.recipes.cispo import cispo
from gruppo.recipes.corrected import corrected, grpo_mis, grpo_tis
from gruppo.recipes.dapo import dapo
from gruppo.recipes.dr_grpo import dr_grpo
from gruppo.recipes.grpo import grpo
from gruppo.recipes.gspo import gspo, gspo_token
from gruppo.recipes.rloo import rloo
from gruppo.recipes.scalerl import scalerl
from gruppo.types import GruppoError


@dataclass(frozen=True)
class Entry:
    """One line of the library's table of contents."""

    arxiv: str
    nickname: str
    title: str
    factory: Callable[..., Recipe]
    base: str | None = "grpo"  # the nickname whose recipe the computed difference is taken against
    family: Literal["text", "vision", "image"] = "text"
    aliases: tuple[str, ...] = ()
    tiny: Mapping[str, Any] = field(default_factory=dict)  # numbers with which the laws and the golden run train it
    laws: Mapping[str, str] = field(default_factory=dict)  # law it opts out of -> why

    @property
    def id(self) -> str:
        """The arXiv id without the word behind it."""
        return self.arxiv.split("/")[0]

    @property
    def sentence(self) -> str:
        """What it does, in one sentence: the first line of the factory's docstring."""
        return (self.factory.__doc__ or "").strip().split("\n")[0]

    @property
    def numbers(self) -> dict[str, Any]:
        """The factory's parameters with their defaults."""
        return {p.name: p.default for p in inspect.signature(self.factory).parameters.values()}


TINY = {"n": 8}

RECIPES: dict[str, Entry] = {
    e.arxiv: e
    for e in (
        Entry(
            "2402.03300",
            "grpo",
            "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
            grpo,
            base=None,
            tiny=TINY,
        ),
        Entry(
            "2402.03300/tis",
            "grpo-tis",
            "GRPO with truncated importance correction of the sampler's log-probs",
            grpo_tis,
            aliases=("tis",),
            tiny=TINY,
        ),
        Entry(
            "2402.03300/mis",
            "grpo-mis",
            "GRPO with masked importance correction of the sampler's log-probs",
            grpo_mis,
            aliases=("mis",),
            tiny=TINY,
        ),
        Entry(
            "2503.20783",
            "dr-grpo",
            "Understanding R1-Zero-Like Training: A Critical Perspective",
            dr_grpo,
            tiny={"n": 8, "length": 8},
            laws={"weight": "the weights sum to mean length / `length`: a constant denominator is the method"},
        ),
        Entry(
            "2503.14476",
            "dapo",
            "DAPO: An Open-Source LLM Reinforcement Learning System at Scale",
            dapo,
            tiny={"n": 8, "length": 8, "cache": 2, "parts": 2},
        ),
        Entry("2507.18071", "gspo", "Group Sequence Policy Optimization", gspo, tiny=TINY),
        Entry(
            "2507.18071/token",
            "gspo-token",
            "Group Sequence Policy Optimization, the token form",
            gspo_token,
            base="gspo",
            tiny=TINY,
        ),
        Entry(
            "2506.13585",
            "cispo",
            "MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention",
            cispo,
            aliases=("minimax-m1",),
            tiny={"n": 8, "parts": 2},
        ),
        Entry(
            "2510.13786",
            "scalerl",
            "The Art of Scaling Reinforcement Learning Compute for LLMs",
            scalerl,
            base="cispo",
            tiny={"n": 8, "parts": 2},
        ),
        Entry(
            "2402.14740",
            "rloo",
            "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs",
            rloo,
            tiny=TINY,
        ),
    )
}


def plain(name: str) -> str:
    """A name without case, punctuation, `arXiv:` and version: `arXiv:2402.03300v2` and `Dr.GRPO` as people write them."""
    name = re.sub(r"^arxiv:|(?<=\d{5})v\d+$", "", name.strip().lower())
    return re.sub(r"[^a-z0-9/]", "", name)


def find(name: str, entries: Mapping[str, Entry] = RECIPES) -> Entry:
    """The entry of an arXiv id, nickname or alias; a sentence for an unknown or an ambiguous one."""
    for e in entries.values():
        if plain(e.arxiv) == plain(name):
            return e
    named = [e for e in entries.values() if plain(name) in {plain(n) for n in (e.nickname, *e.aliases)}]
    if len(named) == 1:
        return named[0]
    if named:
        which = "; ".join(f"{e.arxiv} ({e.title})" for e in named)
        raise GruppoError(f"{name!r} is the name of {len(named)} methods: {which}. Ask by arXiv id")
    known = {plain(n): n for e in entries.values() for n in (e.arxiv, e.nickname, *e.aliases)}
    near = difflib.get_close_matches(plain(name), known, n=1, cutoff=0.5)
    hint = f"did you mean {known[near[0]]!r}?" if near else f"known are: {', '.join(e.nickname for e in entries.values())}"
    raise GruppoError(f"there is no recipe {name!r}; {hint}")


def recipe(name: str, /, **numbers: Any) -> Recipe:
    """The recipe of an arXiv id or nickname, with some of its numbers changed."""
    entry = find(name)
    expected = get_type_hints(entry.factory)
    for number, value in numbers.items():
        if number not in entry.numbers:
            near = difflib.get_close_matches(number, entry.numbers, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            known = ", ".join(f"{k} = {v}" for k, v in entry.numbers.items())
            raise GruppoError(f"{entry.nickname} has no number {number!r}; {hint}It has: {known}")
        if not fits(value, expected[number]):
            raise GruppoError(
                f"{number} of {entry.nickname} is {value!r}, a {type(value).__name__}, but {wording(expected[number])} belongs "
                f"there (default {entry.numbers[number]})"
            )
    return entry.factory(**{k: told(v, expected[k]) for k, v in numbers.items()})


def choices(kind: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the type itself."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def fits(value: Any, kind: Any) -> bool:
    """Whether a value may stand for a parameter of that type; True is not 1, and 4 may stand for 4.0."""
    for one in choices(kind):
        one = get_origin(one) or one
        if one in (int, float):
            if isinstance(value, (int, one)) and not isinstance(value, bool):
                return True
        elif one is Any or (isinstance(one, type) and isinstance(value, one)) or (one is Callable and callable(value)):
            return True
    return False


def told(value: Any, kind: Any) -> Any:
    """4 as 4.0 where a number with a point is meant, so that both spellings make the same recipe."""
    pointed = type(value) is int and float in choices(kind) and int not in choices(kind)
    return float(value) if pointed else value


def wording(kind: Any) -> str:
    """A type as a person would say it."""
    said = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "nothing"}
    return " or ".join(said.get(one, getattr(one, "__name__", str(one))) for one in choices(kind))


__all__ = ["RECIPES", "Entry", "corrected", "find", "fits", "plain", "recipe", "wording"]
