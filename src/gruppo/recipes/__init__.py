"""Every recipe by arXiv id, with its nickname as alias: nicknames collide in the literature, ids do not.

A second recipe of the same paper carries the paper's id with a word behind it: `2507.18071/token`.
"""

from __future__ import annotations

import difflib
import inspect
import pathlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from gruppo.recipe import Recipe
from gruppo.recipes.asymre import asymre
from gruppo.recipes.branch_grpo import branch_grpo, branch_grpo_mix
from gruppo.recipes.cispo import cispo
from gruppo.recipes.corrected import corrected, grpo_mis, grpo_tis
from gruppo.recipes.dance_grpo import dance_grpo
from gruppo.recipes.dapo import dapo
from gruppo.recipes.dr_grpo import dr_grpo
from gruppo.recipes.flow_fast import flow_cps, flow_grpo_fast, grpo_guard
from gruppo.recipes.flow_grpo import flow_grpo
from gruppo.recipes.g2rpo import g2rpo
from gruppo.recipes.gdpo import gdpo
from gruppo.recipes.grpo import grpo
from gruppo.recipes.gspo import gspo, gspo_token
from gruppo.recipes.mix_grpo import mix_grpo, mix_grpo_flash
from gruppo.recipes.multi_objective import multi_objective
from gruppo.recipes.opmd import kimi_opmd, opmd
from gruppo.recipes.pref_grpo import pref_grpo
from gruppo.recipes.rank_grpo import rank_grpo
from gruppo.recipes.rec import (
    rec_oneside,
    rec_oneside_is,
    rec_reinforce,
    rec_ring,
    rec_ring_is,
    rec_twoside,
    rec_twoside_is,
)
from gruppo.recipes.red import red_drop, red_weight
from gruppo.recipes.rloo import rloo
from gruppo.recipes.scalerl import scalerl
from gruppo.recipes.seed_grpo import seed_grpo
from gruppo.recipes.stratified_grpo import lengths, stratified_grpo
from gruppo.recipes.tempflow_grpo import tempflow_grpo
from gruppo.recipes.unlikeliness import unlikeliness
from gruppo.recipes.xrpo import side_by_side, xrpo
from gruppo.rollouts.segmented import Pieces
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
    rate: float | None = None  # learning rate of the recorded curve, where the family's does not suit
    laws: Mapping[str, str] = field(default_factory=dict)  # law it opts out of -> why
    sync: int = 1  # the golden run sends the weights to the sampler every so many iterations: from 2 on its paths are stale

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
SMALL = {"clip": 0.2}  # two latent elements move a ratio as a token does; 1e-4 is made for a mean over 1e5 of them
OFF_POLICY = "Group-Relative REINFORCE Is Secretly an Off-Policy Algorithm: Demystifying Some Myths About GRPO and Its Friends"

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
        Entry(
            "2510.06214",
            "stratified-grpo",
            "Stratified GRPO: Handling Structural Heterogeneity in Reinforcement Learning of LLM Search Agents",
            stratified_grpo,
            tiny={"n": 8, "stratum": lengths},
        ),
        Entry(
            "2505.12346",
            "seed-grpo",
            "SEED-GRPO: Semantic Entropy Enhanced GRPO for Uncertainty-Aware Policy Optimization",
            seed_grpo,
            base="dr-grpo",
            tiny={"n": 8, "length": 8},
            laws={"weight": "the weights sum to mean length / `length`, as Dr.GRPO's do"},
        ),
        Entry(
            "2506.02355",
            "unlikeliness",
            "Rewarding the Unlikely: Lifting GRPO Beyond Distribution Sharpening",
            unlikeliness,
            aliases=("unlikeliness-reward",),
            tiny={"n": 8, "beta": 0.02, "epochs": 3},
        ),
        Entry(
            "2510.06672",
            "xrpo",
            "XRPO: Pushing the limits of GRPO with Targeted Exploration and Exploitation",
            xrpo,
            tiny={"n": 8, "template": side_by_side},
        ),
        Entry(
            "2510.20150",
            "rank-grpo",
            "Rank-GRPO: Training LLM-based Conversational Recommender Systems with Reinforcement Learning",
            rank_grpo,
            aliases=("convrec-r1",),
            # Two letters are a rank, and each earns what its path earns. The end and the overflow have advantages that no reward
            # moves; with them on, equal rewards would train, which the laws forbid.
            tiny={
                "n": 8,
                "ranks": 3,
                "end": None,
                "early": None,
                "overflow": 0.0,
                "signal": "reward",
                "spans": Pieces(2),
            },
        ),
        Entry("2509.24203/reinforce", "rec-reinforce", OFF_POLICY, rec_reinforce, tiny=TINY, sync=2),
        Entry(
            "2509.24203",
            "rec-oneside",
            OFF_POLICY,
            rec_oneside,
            base="rec-reinforce",
            aliases=("rec", "rec-oneside-nois"),
            tiny=TINY,
            sync=2,
        ),
        Entry("2509.24203/oneside-is", "rec-oneside-is", OFF_POLICY, rec_oneside_is, base="rec-reinforce", tiny=TINY, sync=2),
        Entry(
            "2509.24203/twoside",
            "rec-twoside",
            OFF_POLICY,
            rec_twoside,
            base="rec-reinforce",
            aliases=("rec-twoside-nois",),
            tiny=TINY,
            sync=2,
        ),
        Entry("2509.24203/twoside-is", "rec-twoside-is", OFF_POLICY, rec_twoside_is, base="rec-reinforce", tiny=TINY, sync=2),
        Entry(
            "2509.24203/ring",
            "rec-ring",
            OFF_POLICY,
            rec_ring,
            base="rec-reinforce",
            aliases=("rec-ring-nois",),
            tiny=TINY,
            sync=2,
        ),
        Entry(
            "2509.24203/ring-is",
            "rec-ring-is",
            OFF_POLICY,
            rec_ring_is,
            base="rec-reinforce",
            tiny={"n": 8, "far_low": 0.4, "far_high": 0.6},  # near enough to be reached within the golden run
            sync=2,
        ),
        Entry("2509.24203/opmd", "opmd", OFF_POLICY, opmd, base="rec-reinforce", tiny={"n": 8, "tau": 0.25}, sync=2),
        Entry("2509.24203/kimi-opmd", "kimi-opmd", OFF_POLICY, kimi_opmd, base="rec-reinforce", tiny=TINY, sync=2),
        Entry(
            "2509.24203/asymre",
            "asymre",
            OFF_POLICY,
            asymre,
            base="rec-reinforce",
            tiny=TINY,
            sync=3,  # at 2 the rise falls 0.02 short of what the law `learn` asks for
            laws={"flat": "a group of equal rewards has the advantage +c throughout: it is imitated, which is the method"},
        ),
        Entry("2509.24203/red-drop", "red-drop", OFF_POLICY, red_drop, base="rec-reinforce", tiny={"n": 16}, sync=2),
        Entry("2509.24203/red-weight", "red-weight", OFF_POLICY, red_weight, base="rec-reinforce", tiny=TINY, sync=2),
        Entry(
            "2503.21819",
            "multi-objective-grpo",
            "Optimizing Safe and Aligned Language Generation: A Multi-Objective GRPO Approach",
            multi_objective,
            aliases=("multi-objective",),
            tiny=TINY,
        ),
        Entry(
            "2601.05242",
            "gdpo",
            "GDPO: Group reward-Decoupled Normalization Policy Optimization for Multi-reward RL Optimization",
            gdpo,
            base="multi-objective-grpo",
            tiny={"n": 8, "weights": {"reward": 1.0}},  # the run's own sum as the one objective
        ),
        Entry(
            "2505.05470",
            "flow-grpo",
            "Flow-GRPO: Training Flow Matching Models via Online RL",
            flow_grpo,
            base=None,
            family="image",
            tiny={"n": 8, **SMALL},
        ),
        Entry(
            "2505.05470/fast",
            "flow-grpo-fast",
            "Flow-GRPO: Training Flow Matching Models via Online RL",
            flow_grpo_fast,
            base="flow-grpo",
            family="image",
            tiny={"n": 8, "window": 2, **SMALL},
        ),
        Entry(
            "2509.05952",
            "flow-cps",
            "Coefficients-Preserving Sampling for Reinforcement Learning with Flow Matching",
            flow_cps,
            base="flow-grpo",
            family="image",
            tiny={"n": 8, **SMALL},
        ),
        Entry(
            "2510.22319",
            "grpo-guard",
            "GRPO-Guard: Mitigating Implicit Over-Optimization in Flow Matching via Regulated Clipping",
            grpo_guard,
            base="flow-grpo",
            family="image",
            tiny={"n": 8, **SMALL},
            rate=1.0,  # its loss is divided by the step size
        ),
        Entry(
            "2505.07818",
            "dance-grpo",
            "DanceGRPO: Unleashing GRPO on Visual Generation",
            dance_grpo,
            base="flow-grpo",
            family="image",
            tiny={"n": 8, "updates": 2, **SMALL},
            rate=1.0,  # two updates per batch, of steps with less noise
        ),
        Entry(
            "2507.21802",
            "mix-grpo",
            "MixGRPO: Unlocking Flow-based GRPO Efficiency with Mixed ODE-SDE",
            mix_grpo,
            base="flow-grpo",
            family="image",
            tiny={"n": 8, "window": 3, "tau": 5, "updates": 2, **SMALL},
            rate=1.0,
        ),
        Entry(
            "2507.21802/flash",
            "mix-grpo-flash",
            "MixGRPO: Unlocking Flow-based GRPO Efficiency with Mixed ODE-SDE",
            mix_grpo_flash,
            base="mix-grpo",
            family="image",
            aliases=("flash",),
            tiny={"n": 8, "window": 3, "tau": 5, "updates": 2, **SMALL},
            rate=1.0,
        ),
        Entry(
            "2508.04324",
            "tempflow-grpo",
            "TempFlow-GRPO: When Timing Matters for GRPO in Flow Models",
            tempflow_grpo,
            base="flow-grpo",
            family="image",
            aliases=("tempflow",),
            tiny={"n": 8, "seeds": 1, "eta": 1.0, **SMALL},
        ),
        Entry(
            "2510.01982",
            "g2rpo",
            "G2RPO: Granular GRPO for Precise Reward in Flow Models",
            g2rpo,
            base="flow-grpo",
            family="image",
            aliases=("granular-grpo",),
            tiny={"n": 8, "strides": [1, 2], "clip": 0.01},  # several optimizer steps at the full rate: held together
        ),
        Entry(
            "2509.06040",
            "branch-grpo",
            "BranchGRPO: Stable and Efficient GRPO with Structured Branching in Diffusion Models",
            branch_grpo,
            base="flow-grpo",
            family="image",
            tiny={"n": 8, "splits": [0, 1, 3], "eta": 1.0, **SMALL},
        ),
        Entry(
            "2509.06040/mix",
            "branch-grpo-mix",
            "BranchGRPO: Stable and Efficient GRPO with Structured Branching in Diffusion Models",
            branch_grpo_mix,
            base="branch-grpo",
            family="image",
            tiny={"n": 8, "splits": [0, 1, 3], "window": 3, "eta": 1.5, **SMALL},
        ),
        Entry(
            "2508.20751",
            "pref-grpo",
            "Pref-GRPO: Pairwise Preference Reward-based GRPO for Stable Text-to-Image Reinforcement Learning",
            pref_grpo,
            base="dance-grpo",
            family="image",
            tiny={"n": 8, "weights": {"reward": 1.0}, "ranked": ["reward"], **SMALL},  # win rates by the run's own sum
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
        elif one is Callable:
            if callable(value) or (isinstance(value, str) and ":" in value):
                return True
        elif one is Any or (isinstance(one, type) and isinstance(value, one)):
            return True
    return False


def told(value: Any, kind: Any) -> Any:
    """4 as 4.0 where a number with a point is meant, and what "module:name" names where a function is meant."""
    if isinstance(value, str) and Callable in choices(kind):
        return named(value)
    pointed = type(value) is int and float in choices(kind) and int not in choices(kind)
    return float(value) if pointed else value


def named(text: str) -> Any:
    """What "module:name" or "path/file.py:name" names, which is how a run file gives a function; of a class, an instance."""
    from gruppo.graders.sources import from_file, from_module

    where, _, name = text.rpartition(":")
    module = from_file(pathlib.Path(where)) if where.endswith(".py") else from_module(where)
    if not callable(getattr(module, name, None)):
        known = [k for k, v in vars(module).items() if callable(v) and not k.startswith("_")]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has: {', '.join(known) or 'none'}"
        raise GruppoError(f"{where} has no function {name!r}; {hint}")
    found = getattr(module, name)
    return found() if isinstance(found, type) else found


def wording(kind: Any) -> str:
    """A type as a person would say it."""
    said = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "nothing"}
    said[Callable] = "a function, or its name as module:name,"
    return " or ".join(said.get(one, getattr(one, "__name__", str(one))) for one in choices(kind))


__all__ = ["RECIPES", "Entry", "corrected", "find", "fits", "plain", "recipe", "wording"]
