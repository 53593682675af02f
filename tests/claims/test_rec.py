"""The bandits of the REC family: the exact one against known fixed points, the many against the claims."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from gruppo.claims.claim import Claim
from gruppo.claims.rec import METHODS, Bandits, K, claim, collapse, held, settled, sharpened, trained, weighted, wider
from gruppo.recipe import Recipe
from gruppo.recipes.asymre import asymre
from gruppo.recipes.opmd import kimi_opmd


def test_the_bandit_starts_at_its_data_and_pulls_the_wrong_arm_first() -> None:
    bandit = Bandits.one()
    assert bandit.value == pytest.approx(0.58)
    assert bandit.drift == pytest.approx(0.0, abs=1e-7)
    moved = settled(METHODS["none"], steps=1, rate=1.0)
    assert (moved.theta - bandit.theta)[0].tolist() == pytest.approx([-0.174, 0.132, 0.042], abs=1e-6)


def test_every_method_takes_a_step() -> None:
    for name in METHODS:
        bandits = trained(name, 0, steps=2, draws=2)
        assert bandits.drift > 0


@pytest.mark.claim
@pytest.mark.parametrize(
    ("recipe", "policy", "value"),
    [
        (METHODS["none"], (0.0, 1.0, 0.0), 0.80),
        (METHODS["nois"], (0.155, 0.725, 0.12), 0.700),
        (METHODS["is"], (0.155, 0.725, 0.12), 0.700),
        (METHODS["wide"], (0.003, 0.757, 0.24), 0.846),
        (kimi_opmd(K, c=0.25), (0.089, 0.742, 0.169), 0.763),
        (asymre(K, c=0.5), (0.0, 0.84, 0.16), 0.832),
        (METHODS["weight"], (0.0, 0.884, 0.116), 0.823),
        (METHODS["sharp"], (0.0, 0.298, 0.702), 0.940),
    ],
    ids=["reinforce", "oneside", "oneside-is", "wide", "kimi-opmd", "asymre", "red-weight", "red-weight-sharp"],
)
def test_where_the_one_bandit_settles(recipe: Recipe, policy: tuple[float, ...], value: float) -> None:
    """On stale data REINFORCE ends on the wrong arm; only red-weight with T 0.1 prefers the best one."""
    done = settled(recipe)
    assert done.policy[0].tolist() == pytest.approx(policy, abs=0.002)
    assert done.value == pytest.approx(value, abs=0.002)


@pytest.mark.claim
@pytest.mark.parametrize("measure", [claim, wider, held, sharpened])
def test_claims_that_hold(measure: Callable[[int], Claim]) -> None:
    found = measure(5)
    print(found.verdict)
    assert found.holds, found.verdict


@pytest.mark.claim
def test_no_clipping_does_not_collapse_at_toy_scale() -> None:
    """What the paper sees in language models shows here as drift, not as a loss of reward."""
    found = collapse(5)
    print(found.verdict)
    assert not found.holds, found.verdict


@pytest.mark.claim
def test_weights_of_temperature_one_gain_a_little() -> None:
    """Rewards here lie within 1 of each other, so exp(A) with T = 1 hardly weighs anything: eight seeds are needed to see it."""
    found = weighted(8)
    print(found.verdict)
    assert found.holds, found.verdict
    assert found.mean < 0.03, found.verdict
