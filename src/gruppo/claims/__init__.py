"""The claims of the papers that are measured here, by the nickname of the recipe that makes them.

A further claim of the same recipe carries the nickname with a word behind it: `rec-oneside/wider`.
"""

from __future__ import annotations

import difflib

from gruppo.claims import (
    branch_grpo,
    flow,
    g2rpo,
    gdpo,
    multi_objective,
    pref_grpo,
    rank_grpo,
    rec,
    seed_grpo,
    stratified_grpo,
    tempflow_grpo,
    unlikeliness,
    xrpo,
)
from gruppo.claims.claim import Claim, Measure
from gruppo.recipes import find
from gruppo.types import GruppoError

CLAIMS: dict[str, Measure] = {
    "stratified-grpo": stratified_grpo.claim,
    "seed-grpo": seed_grpo.claim,
    "unlikeliness": unlikeliness.claim,
    "xrpo": xrpo.claim,
    "rank-grpo": rank_grpo.claim,
    "rank-grpo/duplicates": rank_grpo.duplicates,
    "rec-oneside": rec.claim,
    "rec-oneside/wider": rec.wider,
    "rec-oneside/held": rec.held,
    "rec-reinforce/collapse": rec.collapse,
    "red-weight": rec.weighted,
    "red-weight/sharp": rec.sharpened,
    "multi-objective-grpo": multi_objective.claim,
    "gdpo": gdpo.claim,
    "flow-grpo": flow.noise,
    "dance-grpo": flow.one_noise,
    "mix-grpo": flow.window,
    "mix-grpo/third": flow.third,
    "pref-grpo": pref_grpo.claim,
    "pref-grpo/noise": pref_grpo.noise,
    "tempflow-grpo": tempflow_grpo.claim,
    "tempflow-grpo/weight": tempflow_grpo.weight,
    "tempflow-grpo/alone": tempflow_grpo.alone,
    "g2rpo": g2rpo.claim,
    "g2rpo/exact": g2rpo.exact,
    "branch-grpo": branch_grpo.claim,
}


def measured(name: str, seeds: int = 5) -> Claim:
    """A recipe's claim, measured anew on this many seeds; found by nickname, alias or arXiv id."""
    key = name if name in CLAIMS else find(name).nickname
    if key not in CLAIMS:
        near = difflib.get_close_matches(key, CLAIMS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise GruppoError(f"no claim of {key} is measured here; {hint}There are: {', '.join(CLAIMS)}")
    if seeds < 2:
        raise GruppoError(f"seeds is {seeds}; an interval over seeds needs at least 2")
    return CLAIMS[key](seeds)


def about(name: str) -> str:
    """What is measured: the first line of the claim's docstring."""
    return (CLAIMS[name].__doc__ or "").strip().split("\n")[0]
