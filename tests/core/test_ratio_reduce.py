"""Ratios per step, unit and path; reductions as weights on the worked losses [1,1], [.5,.5,.5,.5], [2,2,2]."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.recipes.batches import THREE, batch

from gruppo.core.ratio import path_ratio, step_ratio, unit_mean, unit_ratio, unit_token_ratio
from gruppo.core.reduce import Constant, sequence_mean, sequence_sum, step_mean, weigh
from gruppo.types import Batch


def value(reduce: Callable, rows: list[int] | None = None) -> float:
    b = weigh(batch([0.0] * 3, [2, 4, 3]), reduce)
    losses = torch.zeros(b.mask.shape)
    for i, row in enumerate(THREE):
        losses[i, : len(row)] = torch.tensor(row)
    return float((b.weight * losses).sum())


@pytest.mark.parametrize(
    ("reduce", "expected"),
    [(sequence_mean, 1.166667), (step_mean, 1.111111), (Constant(8), 0.416667), (sequence_sum, 3.333333)],
)
def test_aggregations(reduce: Callable, expected: float) -> None:
    assert value(reduce) == pytest.approx(expected, abs=1e-6)


def test_the_local_token_mean_is_what_weights_are_there_to_avoid() -> None:
    """Each micro-batch divided by its own count, {1, 2} and {3}: 1.333333 where the mean over all steps is 1.111111."""
    local = ((1 + 1 + 0.5 * 4) / 6 + (2 * 3) / 3) / 2
    assert local == pytest.approx(1.333333, abs=1e-6)
    assert value(step_mean) != pytest.approx(local, abs=0.1)


@pytest.mark.parametrize("reduce", [sequence_mean, step_mean, sequence_sum, Constant(8)])
def test_a_row_without_trained_steps_counts_nowhere(reduce: Callable) -> None:
    whole = batch([0.0] * 3, [2, 4, 3])
    mask = whole.mask.clone()
    mask[2] = False
    dropped = weigh(whole.with_(mask=mask), reduce)
    alone = weigh(batch([0.0] * 2, [2, 4]), reduce)
    assert torch.allclose(dropped.weight[:2], alone.weight)
    assert not dropped.weight[2].any()


def test_nothing_to_train_gives_zero_weights() -> None:
    b = batch([0.0], [2])
    assert not weigh(b.with_(mask=torch.zeros_like(b.mask)), step_mean).weight.any()


def test_the_count_is_summed_over_ranks() -> None:
    b = weigh(batch([0.0], [2]), step_mean, all_sum=lambda count: count * 4)
    assert float(b.weight.sum()) == pytest.approx(0.25)


def moved(unit: list[int] | None = None) -> tuple[Batch, torch.Tensor]:
    b = batch([1.0], [4])
    if unit is not None:
        b = b.with_(unit=torch.tensor([unit]))
    return b, torch.tensor([[1.1, 1.2, 0.9, 1.0]]).log()


def test_ratios() -> None:
    b, logp = moved()
    assert step_ratio(b, logp)[0].tolist() == pytest.approx([1.1, 1.2, 0.9, 1.0])
    assert path_ratio(b, logp)[0].tolist() == pytest.approx([1.188] * 4)
    assert unit_ratio(b, logp)[0].tolist() == pytest.approx([1.188**0.25] * 4)


def test_one_ratio_per_unit_and_one_off_the_units() -> None:
    b, logp = moved([0, 0, -1, 1])
    assert unit_ratio(b, logp)[0].tolist() == pytest.approx([(1.1 * 1.2) ** 0.5] * 2 + [1.0, 1.0])


def test_masked_steps_enter_no_mean() -> None:
    b, logp = moved()
    b = b.with_(mask=torch.tensor([[True, False, True, False]]))
    assert unit_ratio(b, logp)[0, [0, 2]].tolist() == pytest.approx([(1.1 * 0.9) ** 0.5] * 2)
    assert path_ratio(b, logp)[0].tolist() == pytest.approx([0.99, 1.0, 0.99, 1.0])
    assert unit_mean(logp, b.unit, b.mask)[0, 1] == 0


def test_the_token_form_has_the_units_value_and_the_steps_gradient() -> None:
    b, logp = moved()
    logp.requires_grad_()
    rho = unit_token_ratio(b, logp)
    rho[0, 1].backward()
    assert rho.detach()[0].tolist() == pytest.approx([1.188**0.25] * 4)
    assert logp.grad is not None
    assert logp.grad[0].tolist() == pytest.approx([0.0, 1.188**0.25, 0.0, 0.0])
