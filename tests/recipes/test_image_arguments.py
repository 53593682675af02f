"""Every argument of every image recipe arrives somewhere: another value makes another recipe."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from gruppo.core.gaussian import without_dt
from gruppo.recipe import Recipe, difference
from gruppo.recipes.branch_grpo import branch_grpo, branch_grpo_mix, by_edges, extremes
from gruppo.recipes.dance_grpo import dance_grpo
from gruppo.recipes.flow_fast import flow_cps, flow_grpo_fast, grpo_guard
from gruppo.recipes.flow_grpo import flow_grpo
from gruppo.recipes.g2rpo import g2rpo
from gruppo.recipes.mix_grpo import mix_grpo, mix_grpo_flash
from gruppo.recipes.pref_grpo import pref_grpo
from gruppo.recipes.tempflow_grpo import tempflow_grpo
from gruppo.rollouts.branching import by_prompt
from gruppo.rollouts.trajectories import but_last, everywhere
from gruppo.rollouts.tree import Scaled
from gruppo.rollouts.window import LinearDecay

OTHER: dict[str, Any] = {  # where the default says nothing about what else there may be
    "form": without_dt,
    "weights": {"clip": 0.5, "win_rate": 1},
    "hold": LinearDecay(),
    "best": 4,
    "ddim": 1.0,
    "compared": by_prompt,
    "constant": 2.0,
    "strides": (1, 2),
    "branched": but_last,
    "splits": (0, 1, 2, 3),
    "noise": Scaled(),
    "fuse": by_edges,
    "width": extremes,
    "depth": 4,
    "noisy": everywhere,
    "tau": 2,
    "ranked": ("win_rate",),
    "digits": None,
}
BESIDE: dict[tuple[Callable[..., Recipe], str], dict[str, Any]] = {  # without which the argument means nothing
    (branch_grpo, "n"): {"splits": (0, 1, 2)},
    (branch_grpo_mix, "n"): {"splits": (0, 1, 2)},
    (branch_grpo, "fan"): {"n": 81},
    (branch_grpo, "every"): {"depth": 4},
    (branch_grpo_mix, "stride"): {"tau": 2},
    (pref_grpo, "form"): {"beta": 0.1},
}
MADE = [flow_grpo, flow_grpo_fast, flow_cps, grpo_guard, dance_grpo, mix_grpo, mix_grpo_flash]
MADE += [tempflow_grpo, g2rpo, branch_grpo, branch_grpo_mix, pref_grpo]


def another(name: str, default: Any) -> Any:
    """A value that is not the default."""
    if isinstance(default, bool):
        return not default
    if isinstance(default, float):
        return default / 2 if default else 0.5
    return default + 1 if isinstance(default, int) else OTHER[name]


@pytest.mark.parametrize("make", MADE)
def test_every_argument_changes_the_recipe(make: Callable[..., Recipe]) -> None:
    for name, parameter in inspect.signature(make).parameters.items():
        beside = BESIDE.get((make, name), {})
        value = 8 if name == "n" and "splits" in beside else another(name, parameter.default)
        base = make(**{k: v for k, v in beside.items() if k not in ("n", "splits")})
        assert difference(make(**beside, **{name: value}), base), f"{make.__name__}({name}={value!r}) is the recipe without it"


def test_the_spared_steps_of_a_random_window() -> None:
    assert difference(mix_grpo(random=True, spare=2), mix_grpo(random=True))


@pytest.mark.parametrize("make", MADE)
def test_ratios_are_clipped_by_the_same_on_both_sides_and_steps_may_part(make: Callable[..., Recipe]) -> None:
    loss: Any = make(clip=0.3).loss
    inner = getattr(loss, "loss", loss)  # below a divergence
    assert (inner.low, inner.high) == (0.3, 0.3)
    assert loss.scope == "step"


@pytest.mark.parametrize("make", [dance_grpo, mix_grpo, mix_grpo_flash, g2rpo, pref_grpo])
def test_weighed_objectives_are_asked_for_before_step_0(make: Callable[..., Recipe]) -> None:
    assert [need.name for need in make(weights={"aesthetic": 1, "clip": 0.5}).needs] == ["aesthetic", "clip"]
