"""Grading: weights, what a failure does to the reward, and the sentences for graders that break their contract."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tests.graders.made import group

from gruppo.graders import Abstained, Grading
from gruppo.types import GruppoError


@dataclass
class Fixed:
    """Gives the same values for every group."""

    given: dict[str, Any]
    skips: bool = False

    def __call__(self, groups):
        return [self.given for _ in groups]


def rewards(grading: Grading, n: int) -> list[float | None]:
    graded = grading([group(["x"] * n)])[0].signals["reward"].tolist()
    return [None if math.isnan(r) else r for r in graded]


def test_the_reward_is_the_weighted_sum_and_other_signals_are_kept() -> None:
    grading = Grading([Fixed({"a": [1, 2], "b": [3.0, 4.0], "said": ["x", "y"]})], {"a": 2.0, "b": -0.5})
    signals = grading([group(["x", "y"])])[0].signals
    assert signals["reward"].tolist() == [0.5, 2.0]
    assert signals["said"] == ["x", "y"]


@pytest.mark.parametrize("nothing", [None, math.nan, Abstained("late")])
def test_a_missing_grade_makes_the_reward_missing(nothing) -> None:
    assert rewards(Grading([Fixed({"a": [1.0, 1.0]}), Fixed({"b": [nothing, 1.0]})], {"a": 1.0, "b": 1.0}), 2) == [None, 2.0]


def test_a_grader_that_skips_leaves_the_rest_of_the_sum() -> None:
    grading = Grading([Fixed({"a": [1.0, None]}), Fixed({"b": [None, None]}, skips=True)], {"a": 1.0, "b": 1.0})
    assert rewards(grading, 2) == [1.0, None]
    assert rewards(Grading([Fixed({"b": [None, 2.0]}, skips=True)], {"b": 1.0}), 2) == [None, 2.0]


def test_a_failure_is_never_skipped() -> None:
    grading = Grading([Fixed({"a": [1.0, 1.0]}), Fixed({"b": [Abstained("late"), None]}, skips=True)], {"a": 1.0, "b": 1.0})
    assert rewards(grading, 2) == [None, 1.0]
    assert grading.failures == {"b: late": 1}
    assert grading.abstained == {"a": 0, "b": 2}


@pytest.mark.parametrize("bad", [math.inf, -math.inf])
def test_an_infinite_grade_is_a_failure(bad) -> None:
    grading = Grading([Fixed({"a": [bad, 1.0]})], {"a": 1.0})
    assert rewards(grading, 2) == [None, 1.0]
    assert grading.failures == {"a: gave an infinite number": 1}
    assert rewards(Grading([Fixed({"a": torch.tensor([bad, 1.0])})], {"a": 1.0}), 2) == [None, 1.0]


def test_a_grader_that_raises_abstains_for_its_call_and_is_counted() -> None:
    calls = []

    def moody(groups):
        calls.append(len(groups))
        if len(calls) == 2:
            raise KeyError("solution")
        return [{"a": [1.0] * len(g)} for g in groups]

    grading = Grading([moody], {"a": 1.0})
    assert rewards(grading, 2) == [1.0, 1.0]
    assert rewards(grading, 2) == [None, None]
    assert grading.failures == {"a: raised KeyError: 'solution'": 2}
    assert rewards(grading, 2) == [1.0, 1.0]


def test_a_grader_that_raises_at_once_stops_the_run() -> None:
    def broken(groups):
        raise KeyError("solution")

    with pytest.raises(GruppoError, match="the grader broken raised KeyError: 'solution'"):
        Grading([broken], {"a": 1.0})([group(["x"])])


def test_the_preflight_refuses_what_a_run_would_count_and_counts_nothing() -> None:
    fault = Abstained("no gold", ValueError("no gold"))
    grading = Grading([Fixed({"a": [fault, 1.0]})], {"a": 1.0})
    with pytest.raises(GruppoError, match="Fixed cannot give 'a': no gold"):
        grading.preflight([group(["x", "y"])])
    late = Grading([Fixed({"a": [Abstained("time-out after 5 s"), 1.0]})], {"a": 1.0})
    late.preflight([group(["x", "y"])])  # a slow answer is the model's doing
    assert (late.failures, late.abstained) == ({}, {})


@pytest.mark.parametrize(
    ("graders", "weights", "sentence"),
    [
        ([Fixed({"a": [1.0]})], {"a": 1.0}, r"Fixed returned 1 values of 'a' for 2 paths; every path needs exactly one"),
        ([Fixed({"a": 1.0})], {"a": 1.0}, r"Fixed returned a float as 'a' where a list of 2 values belongs"),
        ([Fixed({"a": [1.0, 1.0]})], {"b": 1.0}, r"weighs the signal 'b', but the graders of this run give only: a"),
        ([Fixed({"a": ["x", "y"]})], {"a": 1.0}, r"not one number per path but: a list like \['x', 'y'\]"),
        ([Fixed({"a": torch.zeros(2, 3)})], {"a": 1.0}, r"not one number per path but: a tensor of shape \(2, 3\)"),
        ([Fixed({"a": [1, 1]}), Fixed({"a": [1, 1]})], {"a": 1.0}, "both Fixed and Fixed give the signal 'a'"),
        ([Fixed({"reward": [1, 1]})], {"reward": 1.0}, "gives a signal called 'reward'"),
        ([lambda groups: []], {"a": 1.0}, "was given 1 groups and returned 0 results"),
    ],
)
def test_a_broken_contract_is_a_sentence(graders, weights, sentence) -> None:
    with pytest.raises(GruppoError, match=sentence):
        Grading(graders, weights)([group(["x", "y"])])
