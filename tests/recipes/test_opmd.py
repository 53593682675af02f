"""OPMD: the squared pull per step and per answer, the two baselines, the factor 1 / (1 + tau)."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.recipes.batches import EIGHT, advantages, batch, group
from tests.recipes.trained import trained

from gruppo.core.reduce import sequence_sum, weigh
from gruppo.recipe import Recipe
from gruppo.recipes.opmd import AboveSoft, Held, kimi_opmd, opmd, path_square
from gruppo.recipes.rec import Reinforce, rec_reinforce
from gruppo.types import Batch, GruppoError, Steps

NEW, OLD = torch.tensor([-1.2, -2.0, -0.5, -3.0]), torch.tensor([-1.0, -2.0, -1.0, -3.0])


def four() -> Batch:
    """Four answers of one step with rewards 1, 0, 0, 0 and the sampler's log-probs OLD."""
    [A] = advantages(kimi_opmd(), group([1.0, 0, 0, 0]))
    return batch(A, [1] * 4).with_(logp_old=OLD[:, None], logp_sampler=OLD[:, None])


def total(r: Recipe, b: Batch, logp: torch.Tensor) -> torch.Tensor:
    return (weigh(b, r.reduce).weight * r.loss(b, Steps(logp), None)[0]).sum()


@pytest.mark.parametrize("whole", [False, True])
def test_kimi_opmd_by_hand(whole: bool) -> None:
    """tau 0.5, so c 0.25: the loss -0.100625 and its slope; on answers of one step both squares are one."""
    logp = NEW[:, None].clone().requires_grad_()
    value = total(kimi_opmd(c=0.25, whole=whole), four(), logp)
    value.backward()
    assert float(value.detach()) == pytest.approx(-0.100625, abs=1e-7)
    assert logp.grad is not None
    assert logp.grad[:, 0].tolist() == pytest.approx([-0.2125, 0.0625, 0.125, 0.0625], abs=1e-7)


def test_the_gradient_is_that_of_the_squared_surrogate() -> None:
    tau, reward = 0.5, torch.tensor([1.0, 0, 0, 0])
    logp = NEW.clone().requires_grad_()
    (reward - reward.mean() - tau * (logp - OLD)).square().mean().div(2 * tau).backward()
    other = NEW[:, None].clone().requires_grad_()
    total(kimi_opmd(c=tau / 2), four(), other).backward()
    assert logp.grad is not None
    assert other.grad is not None
    assert torch.allclose(other.grad[:, 0], logp.grad, atol=1e-7)


def test_the_code_squares_steps_and_the_paper_squares_the_answer() -> None:
    b = batch([0.0], [3])
    now = Steps(torch.tensor([[0.1, -0.2, 0.3]]))
    steps, whole = (kimi_opmd(c=1.0, whole=w).loss(b, now, None)[0].sum() for w in (False, True))
    assert float(steps) == pytest.approx(0.14, abs=1e-7)
    assert float(whole) == pytest.approx(0.04, abs=1e-7)


def test_the_whole_answers_pull_is_the_same_at_each_step() -> None:
    """d/dlogp_t of c D^2 is 2 c D at every step, padding aside."""
    b = batch([0.0, 0.0], [3, 1])
    logp = torch.tensor([[0.1, -0.2, 0.3], [0.5, 9.0, 9.0]], requires_grad=True)
    path_square(b, logp).sum().backward()
    assert logp.grad is not None
    assert logp.grad[0].tolist() == pytest.approx([0.4, 0.4, 0.4], abs=1e-6)
    assert logp.grad[1].tolist() == pytest.approx([1.0, 0.0, 0.0], abs=1e-6)


@pytest.mark.parametrize("off", [0.3, -0.3])
def test_equal_rewards_only_pull_back_to_the_sampler(off: float) -> None:
    [A] = advantages(kimi_opmd(), group([1.0, 1.0]))
    assert A == [0.0, 0.0]
    logp = torch.full((2, 1), off, requires_grad=True)
    total(kimi_opmd(), batch(A, [1, 1]), logp).backward()
    assert logp.grad is not None
    assert (logp.grad * off > 0).all()


def test_without_the_pull_it_is_reinforce() -> None:
    logp, other = (NEW[:, None].clone().requires_grad_() for _ in range(2))
    total(kimi_opmd(c=0.0), four(), logp).backward()
    total(rec_reinforce(), four(), other).backward()
    assert logp.grad is not None
    assert other.grad is not None
    assert torch.equal(logp.grad, other.grad)


def test_opmd_divides_by_one_plus_tau_and_reads_no_old_log_probs() -> None:
    b = four()
    one = opmd(tau=4.0).loss(b, Steps(NEW[:, None]), None)[0]
    assert torch.allclose(one, -b.advantage * NEW[:, None] / 5)
    assert torch.equal(one, opmd(tau=4.0).loss(b.with_(logp_old=b.logp_old - 3), Steps(NEW[:, None]), None)[0])


def test_the_soft_baseline() -> None:
    """b = tau log mean exp(r / tau): log((e + 3) / 4) for r = 1, 0, 0, 0 and tau 1; near the mean for a large tau."""
    b = math.log((math.e + 3) / 4)
    [a] = advantages(opmd(soft=True), group([1.0, 0, 0, 0]))
    assert a == pytest.approx([1 - b, -b, -b, -b], abs=1e-6)
    assert AboveSoft(1e3).of(torch.tensor(EIGHT))[0] == pytest.approx(0.625, abs=1e-3)
    assert AboveSoft(1e-3).of(torch.tensor(EIGHT))[0] == pytest.approx(0.001, abs=1e-3)  # tau log(8 / 3) below the maximum


@pytest.mark.parametrize("soft", [False, True])
def test_edges(soft: bool) -> None:
    r = opmd(soft=soft)
    assert advantages(r, group([0.1] * 7), group([1.0]), group([float("nan")])) == [[0.0] * 7, [0.0], [0.0]]
    silent, absent = advantages(r, group([1.0, 0.0, float("nan")]), group([1.0, 0.0]))
    assert silent == [*absent, 0.0]


def test_refusals() -> None:
    with pytest.raises(GruppoError, match=r"c is -0\.1; a negative coefficient"):
        kimi_opmd(c=-0.1)
    with pytest.raises(GruppoError, match=r"tau is 0\.0; the temperature of the mirror step"):
        opmd(tau=0.0)


def test_presets() -> None:
    assert kimi_opmd() == replace(rec_reinforce(8), loss=Held(Reinforce(), 0.1))
    assert kimi_opmd(whole=True).reduce is sequence_sum
    assert opmd().loss == Reinforce(scale=0.5)


@pytest.mark.parametrize("name", ["opmd", "kimi-opmd"])
def test_it_trains_from_the_command_line_on_stale_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    records = trained(monkeypatch, tmp_path, name, "arithmetic", "fit.sync_every=3", "fit.learning_rate=1e-3")
    assert [r["stale"] for r in records] == [0, 1, 2]
    assert [abs(r["ratio"] - 1) > 1e-3 for r in records] == [False, True, True]
