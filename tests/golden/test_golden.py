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


@pytest.mark.parametrize("name", [e.nickname for e in RECIPES.values()])
def test_learn(name: str) -> None:
    """Law `learn`: the share of right answers rises by 0.3 or more from the first five recorded steps to the last five."""
    correct = [row["correct"] for row in json.loads((HERE / f"{name}.json").read_text())["steps"]]
    assert sum(correct[-5:]) / 5 - sum(correct[:5]) / 5 > 0.3
