"""A claim's interval and verdict, by hand; and the claims themselves, which take minutes."""

from __future__ import annotations

import math

import pytest

from gruppo.claims.claim import Claim, half_width, interval
from gruppo.claims.stratified_grpo import Bandit, claim, train
from gruppo.types import GruppoError


def made(values, expected=(0.0, math.inf)) -> Claim:
    rows = tuple({"gain": v, "other": 2 * v} for v in values)
    return Claim("x", "a sentence", "a measure", "gain", rows, expected)


def test_the_interval_is_students() -> None:
    # s = 1, n = 3: 4.30265 / sqrt(3) = 2.48414
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 2.48414, 2 + 2.48414), abs=1e-4)
    assert interval([5.0, 5.0]) == (5.0, 5.0)


def test_a_claim_holds_when_the_whole_interval_is_where_it_should_be() -> None:
    assert not made([1.0, 2.0, 3.0]).holds
    assert made([1.9, 2.0, 2.1]).holds
    assert not made([1.9, 2.0, 2.1], (0.0, 2.0)).holds


def test_the_verdict_is_a_sentence() -> None:
    assert made([1.9, 2.0, 2.1]).verdict == "x holds at toy scale: gain is 2 [1.75, 2.25] over 3 seeds, expected at least 0"
    assert "does not hold" in made([-1.0, 1.0]).verdict


def test_the_table_ends_with_mean_and_half_width() -> None:
    table = made([1.0, 2.0, 3.0]).table()
    assert [row["seed"] for row in table] == ["0", "1", "2", "mean", "+-"]
    assert table[3]["other"] == 4.0
    assert table[4]["other"] == pytest.approx(2 * 2.48414, abs=1e-3)


def test_the_half_width_is_students_for_any_number_of_seeds() -> None:
    for n, t in ((2, 12.7062), (5, 2.77645), (41, 2.02108), (121, 1.97993)):
        values = [float(i % 2) for i in range(n)]
        s = (sum((v - sum(values) / n) ** 2 for v in values) / (n - 1)) ** 0.5
        assert half_width(values) == pytest.approx(t * s / n**0.5, rel=1e-5)


def test_one_seed_is_no_measurement() -> None:
    with pytest.raises(GruppoError, match="measured on 1 seeds"):
        made([1.0])
    with pytest.raises(GruppoError, match="seed 1 of the claim x gave"):
        made([1.0, math.nan])


def test_the_bandit_starts_as_described() -> None:
    bandit = Bandit.fresh()
    assert bandit.hard == pytest.approx(0.2689, abs=1e-4)
    assert bandit.right == pytest.approx(1 / 16)
    assert bandit.reward == pytest.approx(0.7311 * 0.3 + 0.2689 / 16, abs=1e-4)


def test_strata_alone_leave_the_choice_of_stratum_where_it_was() -> None:
    bandit = train(1.0, seed=0, steps=60)
    assert bandit.hard == pytest.approx(Bandit.fresh().hard, abs=1e-4)
    assert bandit.right > 2 / 16


@pytest.mark.claim
def test_stratified_grpo() -> None:
    found = claim(10)
    assert not found.holds, found.verdict  # the expected gain of 0.2 lies within the interval
    assert found.interval[0] > 0
    mean = found.table()[-2]
    assert abs(float(mean["reward 0.6"]) - float(mean["reward group"])) < 0.02  # the paper's own alpha stays in the trap
    assert float(mean["P(hard) strata"]) == pytest.approx(0.2689, abs=0.01)
    assert float(mean["P(hard) group"]) < 0.05
