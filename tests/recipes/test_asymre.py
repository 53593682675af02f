"""AsymRE: the lowered baseline, its equality with a likelihood term, and what it does to equal rewards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.recipes.batches import advantages, batch, group
from tests.recipes.trained import trained

from gruppo.recipes.asymre import AboveShifted, asymre
from gruppo.recipes.rec import Reinforce, rec_reinforce
from gruppo.types import GruppoError, Steps


def test_advantage_by_hand() -> None:
    [a] = advantages(asymre(c=0.1), group([1.0, 0, 0, 1]))
    assert a == pytest.approx([0.6, -0.4, -0.4, 0.6], abs=1e-6)


def test_the_lower_baseline_is_reinforce_and_a_likelihood_term() -> None:
    reward, logp = [1.0, 0.0, 0.0, 1.0], torch.tensor([[-1.0], [-2.0], [-0.5], [-3.0]])
    [a] = advantages(asymre(c=0.1), group(reward))
    [plain] = advantages(rec_reinforce(), group(reward))
    ours, _ = asymre().loss(batch(a, [1] * 4), Steps(logp), None)
    theirs, _ = rec_reinforce().loss(batch(plain, [1] * 4), Steps(logp), None)
    assert torch.allclose(ours, theirs - 0.1 * logp, atol=1e-7)


def test_the_standalone_code_has_half_the_loss() -> None:
    b, now = batch([0.6, -0.4], [1, 1]), Steps(torch.tensor([[-1.0], [-2.0]]))
    assert torch.allclose(asymre(tau=1.0).loss(b, now, None)[0], asymre().loss(b, now, None)[0] / 2)


@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_equal_rewards_are_imitated(reward: float) -> None:
    assert advantages(asymre(c=0.1), group([reward] * 3))[0] == pytest.approx([0.1] * 3)


def test_a_path_without_siblings_gets_nothing() -> None:
    nan = float("nan")
    assert advantages(asymre(), group([1.0]), group([1.0, nan])) == [[0.0], [0.0, 0.0]]


def test_an_abstained_path_gets_nothing() -> None:
    assert advantages(asymre(), group([1.0, 0.0, float("nan")]))[0] == pytest.approx([0.6, -0.4, 0.0], abs=1e-6)


def test_refusals() -> None:
    with pytest.raises(GruppoError, match=r"c is -0\.1; AsymRE lowers the baseline"):
        asymre(c=-0.1)
    with pytest.raises(GruppoError, match=r"tau is -1\.0; the loss is divided by 1 \+ tau"):
        asymre(tau=-1.0)


def test_preset() -> None:
    assert asymre().advantage == AboveShifted(0.1)
    assert asymre().loss == Reinforce()


@pytest.mark.parametrize("name", ["asymre"])
def test_it_trains_from_the_command_line_on_stale_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    records = trained(monkeypatch, tmp_path, name, "arithmetic", "fit.sync_every=3", "fit.learning_rate=1e-3")
    assert [r["stale"] for r in records] == [0, 1, 2]
    assert [abs(r["ratio"] - 1) > 1e-3 for r in records] == [False, True, True]
