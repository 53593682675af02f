"""Baselines and scales: abstention, zero variance, singletons, and the shapes that `spread` fills."""

from __future__ import annotations

import pytest
import torch

from gruppo.core.advantage import centred, leave_one_out, mean, spread, standardize, std, within
from gruppo.types import Group, Path, Task

NAN = float("nan")


def paths(*lengths: int, unit: list[int] | None = None) -> list[Path]:
    made = []
    for n in lengths:
        ids = None if unit is None else torch.tensor(unit[:n])
        made.append(Path(None, torch.zeros(n), torch.zeros(n), torch.ones(n, dtype=torch.bool), unit=ids))
    return made


def test_nan_counts_nowhere_and_comes_back_as_zero() -> None:
    x = torch.tensor([1.0, NAN, 3.0])
    assert float(mean(x)) == 2.0
    assert float(std(x, ddof=1)) == pytest.approx(2**0.5)
    assert standardize(x, ddof=0, eps=0.0).tolist() == [-1.0, 0.0, 1.0]
    assert leave_one_out(x).tolist() == [-2.0, 0.0, 2.0]


def test_all_nan_gives_zeros() -> None:
    assert standardize(torch.full((3,), NAN), ddof=1, eps=1e-4).tolist() == [0.0] * 3


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e6, -7.7])
@pytest.mark.parametrize("eps", [0.0, 1e-8, 1e-4])
def test_equal_rewards_are_exactly_zero_whatever_the_rounding(value: float, eps: float) -> None:
    assert not standardize(torch.full((7,), value), ddof=1, eps=eps).any()
    assert not leave_one_out(torch.full((7,), value)).any()


@pytest.mark.parametrize("ddof", [0, 1])
def test_one_value_is_zero(ddof: int) -> None:
    assert standardize(torch.tensor([5.0]), ddof=ddof, eps=1e-8).tolist() == [0.0]
    assert leave_one_out(torch.tensor([5.0])).tolist() == [0.0]


def test_shift_and_scale_of_the_reward_do_not_matter_after_standardizing() -> None:
    x = torch.tensor([0.0, 1.0, 4.0, 2.0])
    assert torch.allclose(standardize(3 * x + 7, ddof=1, eps=0.0), standardize(x, ddof=1, eps=0.0), atol=1e-6)


def test_columns_are_standardized_one_by_one() -> None:
    x = torch.tensor([[0.0, 5.0], [2.0, 5.0]])
    assert standardize(x, ddof=0, eps=0.0).tolist() == [[-1.0, 0.0], [1.0, 0.0]]
    assert centred(x).tolist() == [[-1.0, 0.0], [1.0, 0.0]]


def test_within_compares_only_equal_labels() -> None:
    got = within(torch.tensor([0.0, 2.0, 7.0, NAN]), torch.tensor([1, 1, 4, 1]), ddof=0, eps=0.0)
    assert got.tolist() == [-1.0, 1.0, 0.0, 0.0]


def test_spread_over_paths_and_units() -> None:
    plain = Group(Task("q"), paths(1, 3))
    assert spread(torch.tensor([2.0, 5.0]), plain).tolist() == [[2.0, 0.0, 0.0], [5.0, 5.0, 5.0]]
    ranks = Group(Task("q"), paths(3, unit=[0, 1, -1]))
    assert spread(torch.tensor([[2.0, 5.0]]), ranks).tolist() == [[2.0, 5.0, 0.0]]
    overflow = Group(Task("q"), paths(3, unit=[0, 1, 2]))
    assert spread(torch.tensor([[2.0, 5.0]]), overflow).tolist() == [[2.0, 5.0, 0.0]]
