"""RLOO: leave-one-out baseline, the whole path's ratio, k1 inside the reward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.recipes.batches import EIGHT, advantages, batch, group, losses
from torch import Tensor

from gruppo.core.correct import Corrected, step_gap
from gruppo.core.kl import MinusKL, WithKL
from gruppo.core.reduce import sequence_mean, weigh
from gruppo.core.surrogate import PPOClip
from gruppo.recipes import recipe
from gruppo.recipes.golden import Trial
from gruppo.recipes.grpo import total
from gruppo.recipes.opmd import Held
from gruppo.recipes.rloo import rloo
from gruppo.rollouts import Parallel, WithReference
from gruppo.types import Batch, Group, GruppoError, Path, Reference, Steps, reads_reference

BARE = rloo(beta=0.0)


def test_advantage_is_against_the_mean_of_the_others() -> None:
    [a] = advantages(BARE, group(EIGHT))
    assert a == pytest.approx([0.714286 if r else -0.428571 for r in EIGHT], abs=1e-6)


def test_the_ratio_is_the_product_of_the_steps() -> None:
    assert losses(BARE, [1.0], [[1.05, 1.1]])[0].tolist() == pytest.approx([-1.155, -1.155], abs=1e-6)
    assert losses(BARE, [1.0], [[1.2, 1.1]])[0].tolist() == pytest.approx([-1.2, -1.2], abs=1e-6)
    assert losses(BARE, [-1.0], [[0.9, 0.8]])[0].tolist() == pytest.approx([0.8, 0.8], abs=1e-6)


def test_on_policy_the_gradient_is_reinforce() -> None:
    b = weigh(batch([0.5, -0.5], [3, 1]), sequence_mean)
    logp = torch.zeros(2, 3, requires_grad=True)
    loss, _ = BARE.loss(b, Steps(logp), None)
    (b.weight * loss).sum().backward()
    assert logp.grad is not None
    assert torch.allclose(logp.grad, torch.tensor([[-0.25, -0.25, -0.25], [0.25, 0.0, 0.0]]))


def with_reference(logp: list[float], ref: list[float]) -> Group:
    g = group([1.0, 1.0], [2, 2])
    g.paths[0].logp[:] = torch.tensor(logp)
    return g.with_(signals={**g.signals, "logp_ref": [torch.tensor(ref), torch.zeros(2)]})


def test_k1_is_summed_over_the_path_and_may_be_negative() -> None:
    r = rloo(beta=0.5)
    assert r.reward(with_reference([-1.0, -1.0], [-2.0, -1.5])).tolist() == pytest.approx([1.0 - 0.5 * 1.5, 1.0])
    assert r.reward(with_reference([-2.0, -1.5], [-1.0, -1.0])).tolist() == pytest.approx([1.0 + 0.5 * 1.5, 1.0])


def test_k1_reads_the_trainers_log_probs_where_there_are_any() -> None:
    g = with_reference([-9.0, -9.0], [-1.0, -1.0])
    g.paths[0].logp_train = torch.tensor([-1.0, -1.0])
    assert rloo(beta=0.5).reward(g).tolist() == pytest.approx([1.0, 1.0])


def test_a_reward_without_reference_log_probs_is_a_sentence() -> None:
    with pytest.raises(GruppoError, match=r"subtracts 0\.03 \* KL, but no reference log-probs came with the group"):
        rloo().reward(group([1.0, 0.0]))


def test_preset() -> None:
    r = rloo()
    assert r == rloo(n=4, beta=0.03)
    assert r.reward == MinusKL(total, 0.03)
    assert r.rollout == WithReference(Parallel(4))
    assert r.reduce is sequence_mean


class Counted:
    """A reference that counts how often it is read."""

    def __init__(self, inner: Reference) -> None:
        self.inner, self.scored, self.evaluated = inner, 0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def score(self, paths: list[Path]) -> list[Tensor]:
        self.scored += 1
        return self.inner.score(paths)  # type: ignore[attr-defined]

    def evaluate(self, batch: Batch) -> Steps:
        self.evaluated += 1
        return self.inner.evaluate(batch)


@pytest.mark.parametrize(("name", "scored", "in_the_loss"), [("rloo", 1, False), ("grpo", 0, True)])
def test_the_reference_is_read_where_the_recipe_reads_it_and_not_twice(name: str, scored: int, in_the_loss: bool) -> None:
    trial = Trial.of(recipe(name, n=4, beta=0.05))
    assert trial.reference is not None
    trial.reference = trial.policy.reference = Counted(trial.reference)
    trial.advance()
    assert trial.reference.scored == scored
    assert (trial.reference.evaluated > 0) is in_the_loss


def test_a_wrapper_reads_what_its_loss_reads_and_an_unknown_loss_is_given_the_reference() -> None:
    bare, held = PPOClip(0.2, 0.2), WithKL(PPOClip(0.2, 0.2), 0.1)
    assert [reads_reference(loss) for loss in (bare, held, Corrected(bare, step_gap), Held(bare, 0.1))] == [
        False,
        True,
        False,
        False,
    ]
    assert [reads_reference(loss) for loss in (Corrected(held, step_gap), Held(held, 0.1))] == [True, True]
