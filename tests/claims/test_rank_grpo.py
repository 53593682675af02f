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
    assert claim(5).holds


@pytest.mark.claim
def test_shared_items_make_exp_inf_no_winner() -> None:
    """What the paper's tables do not show: a reward that ignores later ranks ends below one reward per list."""
    mean = duplicates(3).table()[-2]
    assert float(mean["late exp_inf"]) < float(mean["late sequence"])
