"""Every recipe repeats its recorded curve: 20 steps on the tiny task, one thread.

What the tolerance means. Noise of 1e-6 in every initial weight, more than two CPUs differ by, moves no sampled token in 20
steps of any recipe, the losses by 5e-6 and the gradient norms by 2e-4. So the first EXACT steps must agree to 1e-3 of each
value: a changed epsilon, clip bound, normaliser or sign moves them further than that. Should another machine flip a token
later on, the curve must still stay within BAND of the recorded one.
"""

from __future__ import annotations

import json
import pathlib

import pytest
import torch

from gruppo.recipes import RECIPES
from gruppo.recipes.golden import STEPS, record

EXACT, BAND = 8, 0.3
HERE = pathlib.Path(__file__).parent


@pytest.mark.parametrize("name", [e.nickname for e in RECIPES.values()])
def test_curve(name: str) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        now = record(name)
    finally:
        torch.set_num_threads(threads)
    then = json.loads((HERE / f"{name}.json").read_text())
    assert {k: v for k, v in now.items() if k != "steps"} == {k: v for k, v in then.items() if k != "steps"}
    assert len(now["steps"]) == len(then["steps"]) == STEPS
    for step, (a, b) in enumerate(zip(now["steps"], then["steps"]), 1):
        assert a.keys() == b.keys()
        if step <= EXACT:
            for key in a:
                assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-4), f"{key} at step {step}"
        else:
            assert a["correct"] == pytest.approx(b["correct"], abs=BAND), f"step {step}"


def test_every_curve_belongs_to_a_recipe() -> None:
    assert {p.stem for p in HERE.glob("*.json")} == {e.nickname for e in RECIPES.values()}


def test_the_off_policy_family_is_recorded_on_stale_paths_where_its_masks_bite() -> None:
    """On fresh paths all of REC's masks are 1 and its weights too: the curves of seven recipes would be one."""
    names = [e.nickname for e in RECIPES.values() if e.id == "2509.24203"]
    curves = {name: json.loads((HERE / f"{name}.json").read_text()) for name in names}
    assert all(curve["numbers"]["sync_every"] > 1 for curve in curves.values())
    seen = {name: tuple(row["grad_norm"] for row in curve["steps"][:EXACT]) for name, curve in curves.items()}
    assert len(set(seen.values())) == len(names) == 12
    for name in ("rec-oneside", "rec-oneside-is", "rec-twoside", "rec-twoside-is", "rec-ring", "rec-ring-is"):
        assert max(row["clip_low"] + row["clip_high"] for row in curves[name]["steps"][:EXACT]) > 0.05


@pytest.mark.parametrize("name", [e.nickname for e in RECIPES.values()])
def test_learn(name: str) -> None:
    """Law `learn`: the share of right answers rises by 0.3 or more from the first five recorded steps to the last five."""
    correct = [row["correct"] for row in json.loads((HERE / f"{name}.json").read_text())["steps"]]
    assert sum(correct[-5:]) / 5 - sum(correct[:5]) / 5 > 0.3
