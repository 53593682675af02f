"""Edges, owners and subtree means of a small tree; groups into batches, and what is refused on the way."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gruppo.core.collate import NotFinite, Passes, blocks, collate, drop_abstained
from gruppo.core.tree import edges, owners, subtree_mean
from gruppo.types import Group, GruppoError, Path, Task

NAN = float("nan")


def path(n: int, fork: tuple[int, int] | None = None) -> Path:
    return Path(None, torch.zeros(n), torch.zeros(n), torch.ones(n, dtype=torch.bool), fork=fork)


TREE = Group(Task("q"), [path(4), path(4, (0, 2)), path(3, (1, 3)), path(4)])


def test_edges_follow_the_forks() -> None:
    e = edges(TREE)
    assert e[1, :2].tolist() == e[0, :2].tolist()
    assert e[2, :3].tolist() == [*e[0, :2].tolist(), int(e[1, 2])]
    assert int(e[2, 3]) == -1
    assert len(set(e[e >= 0].tolist())) == 4 + 2 + 0 + 4


def test_each_edge_has_one_owner_the_first_row() -> None:
    own = owners(edges(TREE), TREE.mask)
    assert own.sum(1).tolist() == [4, 2, 0, 4]


def test_a_masked_first_row_leaves_the_edge_to_the_next() -> None:
    mask = TREE.mask.clone()
    mask[0] = False
    assert owners(edges(TREE), mask).sum(1).tolist() == [0, 4, 0, 4]


def test_an_edge_is_worth_the_mean_below_it_without_abstained_rows() -> None:
    value = subtree_mean(edges(TREE), torch.tensor([1.0, 0.0, NAN, 5.0]))
    assert value[0].tolist() == [0.5, 0.5, 1.0, 1.0]
    assert value[1].tolist() == [0.5, 0.5, 0.0, 0.0]
    assert value[2].tolist() == [0.5, 0.5, 0.0, 0.0]
    assert value[3].tolist() == [5.0] * 4


@pytest.mark.parametrize("fork", [(1, 1), (2, 1), (-1, 0)])
def test_a_parent_stands_before_its_child(fork: tuple[int, int]) -> None:
    with pytest.raises(GruppoError, match="a parent must stand before its child"):
        Group(Task("q"), [path(2), path(2, fork)])


# ---- collate


def ready(*lengths: int) -> Group:
    g = Group(Task("q"), [path(n) for n in lengths])
    return g.with_(advantage=torch.ones(len(lengths), g.width))


def test_groups_of_any_size_become_rows() -> None:
    b = collate([ready(2, 3), ready(1), ready(4, 1, 1)])
    assert b.mask.sum(1).tolist() == [2, 3, 1, 4, 1, 1]
    assert b.group.tolist() == [0, 0, 1, 2, 2, 2]
    assert b.mask.shape == (6, 4)


def test_rows_are_cut_to_the_longest_of_them() -> None:
    b = collate([ready(2, 3), ready(4, 1)]).rows([0, 3])
    assert b.mask.shape == (2, 2)
    assert b.group.tolist() == [0, 1]


def test_an_advantage_of_the_wrong_shape_is_a_sentence() -> None:
    with pytest.raises(GruppoError, match=r"group 0 has 2 paths of up to 3 steps, but its advantage has shape \(2, 2\)"):
        collate([ready(2, 3).with_(advantage=torch.ones(2, 2))])


@pytest.mark.parametrize("name", ["advantage", "behaviour log-prob"])
def test_a_trained_step_without_a_finite_number_is_refused_with_its_place(name: str) -> None:
    g = ready(2, 3)
    if name == "advantage":
        g = g.with_(advantage=torch.tensor([[1.0, 1, 1], [1, NAN, 1]]))
    else:
        g = g.with_(paths=[g.paths[0], replace(g.paths[1], logp=torch.tensor([0.0, -torch.inf, 0.0]))])
    with pytest.raises(NotFinite, match=rf"the {name} is (nan|-inf) at step 1 of path 1 \(1 of 5 trained") as caught:
        collate([g])
    assert caught.value.groups == [g]


def test_nothing_at_all_is_a_sentence() -> None:
    with pytest.raises(GruppoError, match="there is nothing to train on"):
        collate([])


def test_an_abstained_path_trains_nothing_and_stays_as_context() -> None:
    g = drop_abstained(ready(2, 2).with_(reward=torch.tensor([1.0, NAN])))
    assert g.mask.any(1).tolist() == [True, False]
    assert len(g) == 2
    columns = drop_abstained(ready(2, 2).with_(reward=torch.tensor([[1.0, NAN], [NAN, NAN]])))
    assert columns.mask.any(1).tolist() == [True, False]


def test_passes_keep_groups_whole_and_repeat() -> None:
    b = collate([ready(1, 1), ready(2), ready(1)])
    assert [p.group.tolist() for p in Passes(2, 2)(b)] == [[0, 0, 1], [2]] * 2


def test_blocks_stay_within_the_budget_and_hold_everything_once() -> None:
    costs = [5, 1, 9, 2, 2, 30]
    runs = list(blocks(costs, 10))
    assert sorted(i for run in runs for i in run) == list(range(6))
    assert all(len(run) == 1 or max(costs[i] for i in run) * len(run) <= 10 for run in runs)
