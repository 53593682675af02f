"""Rank-GRPO on lists of eight independent ranks, and on ranks that share their items."""

from __future__ import annotations

import pytest
import torch

from gruppo.claims.rank_grpo import claim, duplicates, found


def test_hits_of_the_toy() -> None:
    drawn = torch.tensor([[0, 1, 0, 0, 2, 0, 0, 0]])
    assert found(drawn, shared=False)[0].tolist() == [1, 0, 1, 1, 0, 1, 1, 1]
    assert found(drawn, shared=True)[0].tolist() == [1, 1, 0, 0, 1, 0, 0, 0]


@pytest.mark.claim
def test_ranks_by_themselves_learn_the_tail() -> None:
    found = claim(10)
    assert found.holds, found.verdict  # ten seeds: 0.697 [0.619, 0.775]


@pytest.mark.claim
@pytest.mark.timeout(1200)  # type checks during tests make the ten seconds of the command line minutes
def test_shared_items_make_exp_inf_no_winner() -> None:
    """What the paper's tables do not show: a reward that ignores later ranks ends below one reward per list."""
    found = duplicates(5)
    assert not found.holds, found.verdict  # five seeds: -0.058 [-0.142, 0.026]; every seed is below 0
    assert all(row["gain"] < 0 for row in found.rows)
    mean = found.table()[-2]
    assert float(mean["early exp_inf"]) > float(mean["early sequence"])  # it is ahead while there is much to find
