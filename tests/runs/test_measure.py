from __future__ import annotations

import math

import pytest
import torch

from gruppo.runs.measure import measure
from gruppo.train import Iteration
from gruppo.types import Group, Path, Task

NAN = math.nan


def group(rewards: list[float], lengths: list[int], advantage: list[float], correct: list[float]) -> Group:
    paths = [
        Path(
            torch.tensor([1]), torch.ones(n, dtype=torch.long), torch.zeros(n), torch.ones(n, dtype=torch.bool), truncated=n == 4
        )
        for n in lengths
    ]
    width = max(lengths)
    spread = torch.tensor(advantage)[:, None].expand(-1, width)
    return Group(
        Task("p"), paths, {"correct": torch.tensor(correct), "reward": torch.tensor(rewards)}, torch.tensor(rewards), spread
    )


def record(*groups: Group) -> dict:
    return measure(Iteration(list(groups), {"loss": 0.5, "kl": NAN}, 2), step=3, now=7.0, seconds=2.0, lr=0.1)


def test_one_line_says_what_happened() -> None:
    found = record(
        group([1.0, 0.0], [2, 4], [0.7, -0.7], [1.0, 0.0]),
        group([1.0, 1.0], [1, 1], [0.0, 0.0], [1.0, 1.0]),
    )
    expected = {
        "step": 3,
        "reward": 0.75,
        "reward_std": math.sqrt(0.5) / 2,
        "live": 0.5,
        "zero_variance": 0.5,
        "length": 2.0,
        "truncated": 0.25,
        "abstained": 0,
        "length_correct": 4 / 3,
        "length_wrong": 4.0,
        "tokens": 8,
        "tokens_per_s": 4.0,
        "updates": 2,
        "loss": 0.5,
    }
    assert {k: found[k] for k in expected} == pytest.approx(expected)
    assert found["signals"] == {"correct": 0.75}
    assert found["kl"] is None


def test_abstained_paths_count_nowhere_but_in_their_own_number() -> None:
    found = record(group([1.0, NAN, 0.0], [1, 1, 1], [0.5, 0.0, -0.5], [1.0, NAN, 0.0]))
    assert (found["reward"], found["abstained"], found["signals"]["correct"]) == (0.5, 1, 0.5)
    assert found["signals_std"]["correct"] == pytest.approx(math.sqrt(0.5))


def test_reward_columns_are_summed() -> None:
    g = group([1.0, 0.0], [1, 1], [0.5, -0.5], [1.0, 0.0]).with_(reward=torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
    assert record(g)["reward"] == 2.0


def test_the_gap_is_there_only_where_it_was_measured() -> None:
    g = group([1.0, 0.0], [2, 1], [0.5, -0.5], [1.0, 0.0])
    assert "gap" not in record(g)
    g.paths[0].logp_train = torch.tensor([0.25, -0.5])
    assert record(g)["gap"] == 0.5


def test_a_masked_advantage_is_not_a_live_group() -> None:
    g = group([1.0, 0.0], [1, 1], [0.5, -0.5], [1.0, 0.0])
    for path in g.paths:
        path.mask = torch.zeros(1, dtype=torch.bool)
    assert record(g)["live"] == 0.0
