"""RED: which paths are dropped, what the weights are, and that chance comes from the rollout."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tests.recipes.batches import EIGHT, advantages, group
from tests.recipes.trained import trained

from gruppo.core.collate import collate
from gruppo.core.reduce import weigh
from gruppo.recipes.golden import Draw, grading, tiny_policy
from gruppo.recipes.red import Exponential, WithLots, kept, red_drop, red_weight
from gruppo.types import Group, GruppoError

NAN = float("nan")


def lots(reward: list[float], lot: list[float] | None = None) -> Group:
    g = group(reward)
    return g.with_(signals={**g.signals, "lot": torch.tensor(lot or [i / len(reward) for i in range(len(reward))])})


def test_surplus_failures_with_the_lowest_lots_are_dropped() -> None:
    """Five failures, three successes: two failures go, and the mean of the six that stay is a half."""
    [a] = advantages(red_drop(), lots(EIGHT))
    assert a == pytest.approx([0.5, 0, 0, 0.5, 0.5, -0.5, -0.5, -0.5])
    [a] = advantages(red_drop(), lots(EIGHT, [0.0, 0.9, 0.3, 0.1, 0.2, 0.8, 0.7, 0.1]))
    assert a == pytest.approx([0.5, -0.5, 0, 0.5, 0.5, -0.5, -0.5, 0])


def test_one_success_keeps_one_failure() -> None:
    assert advantages(red_drop(), lots([1.0, 0, 0, 0]))[0] == pytest.approx([0.5, 0, 0, -0.5])


def test_nothing_is_dropped_when_successes_are_as_many() -> None:
    assert advantages(red_drop(), lots([1.0, 1, 0, 0]))[0] == pytest.approx([0.5, 0.5, -0.5, -0.5])
    assert kept(torch.tensor([1.0, 1, 1, 0]), torch.zeros(4)).all()


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1])
def test_equal_rewards_are_all_successes(value: float) -> None:
    """0.1 seven times has a mean that differs from 0.1 in its last bit; nothing may be dropped for that."""
    assert kept(torch.full((7,), value), torch.rand(7)).all()
    assert advantages(red_drop(), lots([value] * 7)) == [[0.0] * 7]


def test_an_abstained_path_is_neither() -> None:
    assert kept(torch.tensor([1.0, 0, NAN, 0, NAN]), torch.tensor([0.0, 0.5, 0.0, 0.4, 0.0])).tolist() == [1, 1, 0, 0, 0]
    assert advantages(red_drop(), lots([1.0]), lots([NAN, NAN])) == [[0.0], [0.0, 0.0]]


def test_dropped_paths_are_counted_in_the_mean() -> None:
    g = lots([1.0, 0, 0, 0])
    g = g.with_(reward=g.signals["reward"])
    b = weigh(collate([g.with_(advantage=red_drop().advantage(g))]), red_drop().reduce)
    assert b.advantage[:, 0].tolist() == pytest.approx([0.5, 0, 0, -0.5])
    assert b.weight[:, 0].tolist() == pytest.approx([0.25] * 4)


def test_lots_come_from_the_rollouts_generator() -> None:
    def drawn(seed: int) -> torch.Tensor:
        rollout = red_drop(n=4).rollout
        assert isinstance(rollout, WithLots)
        rng = torch.Generator().manual_seed(seed)
        return torch.stack([g.signals["lot"] for g in rollout(tiny_policy(), Draw(0, 0, [0]).more(3), grading(), rng)])

    assert drawn(0).shape == (3, 4)
    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))


def test_without_lots_it_is_a_sentence() -> None:
    with pytest.raises(GruppoError, match="drops paths by the lots that its rollout draws"):
        advantages(red_drop(), group(EIGHT))


def test_weights_by_hand() -> None:
    [a] = advantages(red_weight(), group([1.0, 0, 0, 0]))
    assert a == pytest.approx([1.58775, -0.1947, -0.1947, -0.1947], abs=1e-5)
    assert sum(a) == pytest.approx(1.003649, abs=1e-5)


def test_weights_are_pairwise_reinforce_and_imitation() -> None:
    reward = torch.tensor([1.0, 0, 0, 0])
    w = ((reward - reward.mean()) / 1.0).exp()
    m = (w * reward).sum() / w.sum()
    assert float(m) == pytest.approx(0.475367, abs=1e-6)
    pairwise = w * (reward - m)
    assert pairwise.tolist() == pytest.approx([1.110648, -0.370216, -0.370216, -0.370216], abs=1e-6)
    assert torch.allclose(Exponential(1.0).of(reward), pairwise + (m - reward.mean()) * w, atol=1e-6)


def test_a_low_temperature_weighs_the_best_more() -> None:
    a = Exponential(0.1).of(torch.tensor([1.0, 0.0]))
    assert a.tolist() == pytest.approx([0.5 * math.exp(5), -0.5 * math.exp(-5)], rel=1e-5)


def test_weight_edges() -> None:
    assert advantages(red_weight(), group([0.1] * 7), group([1.0])) == [[0.0] * 7, [0.0]]
    silent, absent = advantages(red_weight(), group([1.0, 0, NAN]), group([1.0, 0]))
    assert silent == pytest.approx([*absent, 0.0])


def test_refusals() -> None:
    with pytest.raises(GruppoError, match=r"0\.5 above its group's mean has the weight exp\(0\.5 / 0\.005\), which is too large"):
        advantages(red_weight(T=0.005), group([1.0, 0.0]))
    with pytest.raises(GruppoError, match=r"T is 0\.0; the temperature"):
        red_weight(T=0.0)


@pytest.mark.parametrize("name", ["red-drop", "red-weight"])
def test_it_trains_from_the_command_line_on_stale_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    records = trained(monkeypatch, tmp_path, name, "arithmetic", "fit.sync_every=3", "fit.learning_rate=1e-3")
    assert [r["stale"] for r in records] == [0, 1, 2]
    assert [abs(r["ratio"] - 1) > 1e-3 for r in records] == [False, True, True]
