"""The bandit and the amplified noise of Pref-GRPO's claims."""

from __future__ import annotations

import pytest
import torch

from gruppo.claims.pref_grpo import SIGNALS, claim, judged, model, noise, spread, train, utility


def test_the_best_path_has_no_flaw() -> None:
    q, h = torch.meshgrid(torch.linspace(-5, 8, 261), torch.linspace(-3, 3, 121), indexing="ij")
    worth = utility(torch.stack([q, h], -1))
    best = divmod(int(worth.argmax()), worth.shape[1])
    assert float(q[best]) == pytest.approx(10 / 3, abs=0.03)
    assert float(h[best]) == pytest.approx(0.0, abs=1e-6)
    assert float(worth.max()) == pytest.approx(5 / 3, abs=1e-3)


def test_the_pointwise_model_likes_the_flaw() -> None:
    flawed, plain = torch.tensor([0.0, 3.0]), torch.tensor([3.0, 0.0])
    assert model(flawed) > model(plain)
    assert utility(flawed) < utility(plain)


def test_the_judge_prefers_the_better_path_mostly() -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.tensor([[3.0, 0.0], [0.0, 0.0]])  # utilities 1.65 and 0: the first wins with probability .839
    wins = sum(float(judged(x, rng)[0]) for _ in range(400)) / 400
    assert wins == pytest.approx(0.839, abs=0.06)


def test_a_few_steps_go_apart() -> None:
    """After 30 steps the pointwise model has raised the flaw more than the quality; the judge has not."""
    hacked, good = (train(SIGNALS[name], 0, steps=30) for name in ("pointwise", "pairwise"))
    assert hacked[1] > hacked[0] > 0
    assert good[0] > 0.5
    assert abs(float(good[1])) < 0.5


def test_noise_keeps_its_size_and_loses_its_meaning() -> None:
    near, size_near, _ = spread(0.001, 0, groups=40)
    far, size_far, _ = spread(1.0, 0, groups=40)
    assert far - near > 0.5
    assert size_near == pytest.approx(size_far, rel=0.1)


@pytest.mark.claim
def test_pref_grpo() -> None:
    found = claim(3)
    assert found.holds, found.verdict
    mean = found.table()[-2]
    assert float(mean["derived"]) < -10  # a win rate by a hackable score is hacked too
    assert abs(float(mean["told"]) - float(mean["pairwise"])) < 0.1  # told the truth, scores do as well


@pytest.mark.claim
def test_amplified_noise() -> None:
    found = noise(3)
    assert found.holds, found.verdict
    assert abs(float(found.table()[-2]["ranked 0.001"]) - float(found.table()[-2]["corr 0.001"])) < 0.1
