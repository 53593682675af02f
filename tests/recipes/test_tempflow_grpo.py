"""TempFlow-GRPO: the weight of a step is its noise over the mean of the grid in use, and a reward judges one step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.rollouts.painting import grown
from torch import Tensor

from gruppo.core.collate import collate
from gruppo.core.gaussian import WithGaussianKL, exact
from gruppo.core.reduce import step_mean, weigh
from gruppo.policies.flow import Course
from gruppo.policies.kernels import FlowSDE
from gruppo.policies.schedules import linear, resolution_shifted, twice_shifted
from gruppo.recipe import difference
from gruppo.recipes import recipe
from gruppo.recipes.flow_grpo import flow_grpo
from gruppo.recipes.golden_flow import QUADRANTS
from gruppo.recipes.tempflow_grpo import NoiseAware, tempflow_grpo
from gruppo.rollouts.branching import Branches, by_prompt
from gruppo.rollouts.trajectories import Trajectories
from gruppo.types import Batch, Group, GruppoError, Path, Steps, Task

SD3 = twice_shifted(10, 3.0)
SD = [0.7, 0.7429641, 0.53615205, 0.44589713, 0.3917943, 0.35279711, 0.31907012, 0.28200677, 0.22536048, 0.00627809]


def branched(sigmas: Tensor, eta: float, k: int, advantage: float = 1.0) -> Group:
    """One path that draws noise at step k and trains it."""
    T = len(sigmas) - 1
    only = torch.arange(T) == k
    course = Course.of("a", sigmas, FlowSDE(eta), [k])
    path = Path(course, torch.zeros(T + 1, 2), torch.zeros(T), only, QUADRANTS["a"])
    return Group(Task("a"), [path], advantage=torch.full((1, T), advantage))


def batch_of(sigmas: Tensor, eta: float = 0.7, steps: int | None = None) -> Batch:
    """One path per branched step: all but the last."""
    n = len(sigmas) - 2 if steps is None else steps
    return collate([branched(sigmas, eta, k) for k in range(n)])


def weights(batch: Batch, reduce: NoiseAware) -> Tensor:
    """[K] weights of the paths' one step, times their number: the factor on each step's loss."""
    return weigh(batch, reduce).weight.sum(1) * len(batch)


def test_deviations_of_stable_diffusion_3() -> None:
    found = Course.of("a", SD3, FlowSDE(0.7)).deviations
    assert found.tolist() == pytest.approx(SD, abs=2e-7)
    assert float(found[:9].mean()) == pytest.approx(0.4440046737, abs=1e-7)


@pytest.mark.parametrize(
    ("sigmas", "eta", "steps", "constant"),
    [
        (SD3, 0.7, 9, 2.2522285),
        (SD3, 0.7, 10, 2.4985507),
        (resolution_shifted(10, 1.15), 0.9, 9, 1.7259898),
        (resolution_shifted(10, 0.63), 0.9, 9, 1.9290849),
    ],
)
def test_the_normaliser_is_that_of_the_grid_in_use(sigmas: Tensor, eta: float, steps: int, constant: float) -> None:
    """The weights' mean is 1 on every grid; the constants 2.25 and 1.73 fit one grid each, and not FLUX at 512 x 512."""
    batch = batch_of(sigmas, eta, steps)
    deviations = Course.of("a", sigmas, FlowSDE(eta)).deviations[:steps].float()
    found = weights(batch, NoiseAware())
    assert torch.allclose(found, constant * deviations, atol=1e-6)
    assert float(found.mean()) == pytest.approx(1.0, abs=1e-6)
    for fixed in (2.25, 1.73):
        other = weights(batch, NoiseAware(fixed))
        assert torch.allclose(other, fixed * deviations, atol=1e-6)
        assert float(other.mean()) == pytest.approx(fixed / constant, rel=1e-5)


def test_weights() -> None:
    exact = [1.57656, 1.67332495, 1.20753694, 1.00426225, 0.88241031, 0.79457973, 0.71861883, 0.63514369, 0.50756331]
    code = [1.575, 1.6716692, 1.2063421, 1.0032686, 0.8815372, 0.7937935, 0.7179078, 0.6345152, 0.5070611]
    assert weights(batch_of(SD3), NoiseAware()).tolist() == pytest.approx(exact, abs=1e-6)
    assert weights(batch_of(SD3), NoiseAware(2.25)).tolist() == pytest.approx(code, abs=1e-6)


def test_the_weight_makes_gradients_proportional_to_h() -> None:
    """|d mu / d v| / sd grows along the way; times sd it is (1 + eta^2 / 2) h, and h itself at sigma = 1."""
    kernel, S = FlowSDE(0.7), SD3.float()
    course = Course.of("a", SD3, kernel)
    v = torch.zeros(10, 1, requires_grad=True)
    kernel.mean(torch.zeros(10, 1), v, S[:-1], S[1:], course.levels.float()).sum().backward()
    assert v.grad is not None
    slope, sd, h = v.grad[:9, 0].abs(), course.deviations[:9].float(), (S[:-1] - S[1:])[:9]
    bare = [0.0570, 0.0784, 0.1292, 0.1880, 0.2640, 0.3710, 0.5356, 0.8248, 1.4867]
    assert (slope / sd).tolist() == pytest.approx(bare, abs=6e-5)
    weighed = [0.0399, 0.0582, 0.0693, 0.0838, 0.1034, 0.1309, 0.1709, 0.2326, 0.3351]
    assert slope.tolist() == pytest.approx(weighed, abs=6e-5)
    assert torch.allclose(slope[1:], 1.245 * h[1:], atol=1e-6)
    assert float(slope[0]) == pytest.approx(float(h[0]), abs=1e-6)


def group_of(reward: list[float], n: int | None = None) -> Group:
    paths = [branched(SD3, 0.7, 0).paths[0] for _ in reward]
    return Group(Task("a"), paths, {"reward": torch.tensor(reward)}, torch.tensor(reward))


def advantage(reward: list[float]) -> Tensor:
    """[G] what the recipe makes of one step's rewards."""
    return tempflow_grpo().advantage(group_of(reward))[:, 0]


def test_advantages_of_each_step_by_itself() -> None:
    assert advantage([0.2, 0.4, 0.9, 0.5]).tolist() == pytest.approx([-1.17623545, -0.39207848, 1.56831394, 0], abs=1e-6)
    assert torch.equal(advantage([0.5] * 4), torch.zeros(4))


def test_the_luck_of_the_noise_is_nobodys_merit() -> None:
    """Of two noises whose children score 1 to 6 and 11 to 16, the group of a prompt praises the second noise."""
    first, second = [1.0, 2, 3, 4, 5, 6], [11.0, 12, 13, 14, 15, 16]
    alone = [-1.4637644, -0.87825864, -0.29275288, 0.29275288, 0.87825864, 1.4637644]
    assert advantage(first).tolist() == pytest.approx(alone, abs=1e-6)
    assert advantage(second).tolist() == pytest.approx(alone, abs=1e-6)
    pooled = advantage(first + second)
    assert pooled[[0, 5, 6, 11]].tolist() == pytest.approx([-1.41945381, -0.47315127, 0.47315127, 1.41945381], abs=1e-6)
    _, groups = grown(tempflow_grpo(6, seeds=2).rollout, 4)
    assert [len(g) for g in groups] == [6] * 6
    _, groups = grown(tempflow_grpo(6, seeds=2, compared=by_prompt).rollout, 4)
    assert [len(g) for g in groups] == [12] * 3


@pytest.mark.parametrize(("k", "loss"), [(0, -1.5751575), (8, -0.5071117942)])
def test_a_weighted_clipped_loss(k: int, loss: float) -> None:
    """A = 1, ratio 1.002, clip 1e-4, constant 2.25."""
    made = tempflow_grpo(beta=0.0, constant=2.25)
    batch = weigh(collate([branched(SD3, 0.7, k)]), made.reduce)
    now = torch.full(batch.mask.shape, 1.002).log() * batch.mask
    found, _ = made.loss(batch, Steps(now), None)
    assert float((batch.weight * found).sum()) == pytest.approx(loss, abs=1e-6)


def test_late_children_that_hardly_differ_still_get_full_advantages() -> None:
    """Judge's noise of 1e-2 is stretched to advantages of size 1: that is why late steps must weigh little."""
    assert float(advantage([0.50, 0.51, 0.50, 0.51]).abs().min()) > 0.97
    assert float(weights(batch_of(SD3), NoiseAware())[8]) < 0.51


def test_the_gradient_is_that_of_the_weighted_mean() -> None:
    """Children of two steps through policy, loss and weight: the gradient is sum_k w_k times each step's own gradient."""
    made = replace(tempflow_grpo(4, seeds=1, beta=0.0, clip=0.2), reference=None)
    policy, groups = grown(made.rollout, 4)
    groups = [g.with_(reward=made.reward(g)) for g in groups]
    groups = [g.with_(advantage=made.advantage(g)) for g in groups]

    def gradient(batch: Batch) -> Tensor:
        for p in policy.parameters():
            p.grad = None
        loss, _ = made.loss(batch, policy.evaluate(batch), None)
        (batch.weight * loss).sum().backward()
        return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])

    sd = (
        groups[0]
        .paths[0]
        .prompt.kernel.deviation(policy.sigmas[:-1], policy.sigmas[1:], Course.of("a", policy.sigmas, FlowSDE(0.7)).levels)[:3]
    )
    apart = sum(float(w) / 3 * gradient(weigh(collate([g]), step_mean)) for w, g in zip(sd / sd.mean(), groups))
    together = gradient(weigh(collate(groups), made.reduce))
    assert torch.allclose(together, apart, atol=1e-6)
    assert not torch.allclose(gradient(weigh(collate(groups), step_mean)), apart, atol=1e-4)


def test_weights_fit_whole_trajectories_too() -> None:
    """On Flow-GRPO's paths, whose every step is noisy, the weight is the same per step."""
    made = replace(flow_grpo(4), reduce=NoiseAware())
    _, groups = grown(made.rollout, 10)  # type: ignore[arg-type]
    batch = weigh(collate([g.with_(advantage=torch.zeros(len(g), 10)) for g in groups]), made.reduce)
    sd = Course.of("a", linear(10, 3.0), FlowSDE(0.7)).deviations[:9].float()
    assert torch.allclose(batch.weight[0, :9] * 36, sd / sd.mean(), atol=1e-5)
    assert float(batch.weight.sum()) == pytest.approx(1.0, abs=1e-5)


def test_the_normaliser_moves_with_a_window() -> None:
    """Of a window's steps the mean weight is 1 wherever it stands: constants of the whole grid would not do that."""
    for begin in (0, 5):
        rollout = Trajectories(3, FlowSDE(0.9), lambda T, g, begin=begin: range(begin, begin + 3))
        _, groups = grown(rollout, 10)  # type: ignore[arg-type]
        batch = weigh(collate([g.with_(advantage=torch.zeros(len(g), 10)) for g in groups]), NoiseAware())
        sd = Course.of("a", linear(10, 3.0), FlowSDE(0.9)).deviations[begin : begin + 3].float()
        assert torch.allclose(batch.weight[0, begin : begin + 3] * 9, sd / sd.mean(), atol=1e-5)
        assert float(batch.weight.sum()) == pytest.approx(1.0, abs=1e-5)


def test_an_abstained_child_leaves_the_weights_of_the_others() -> None:
    batch = batch_of(SD3)
    batch.mask[3] = False
    found = weigh(batch, NoiseAware()).weight.sum(1)
    kept = [0, 1, 2, 4, 5, 6, 7, 8]
    assert float(found.sum()) == pytest.approx(1.0, abs=1e-6)
    assert torch.allclose(found[kept] / found[0], torch.tensor(SD)[kept] / SD[0], atol=1e-5)


def test_what_it_changes() -> None:
    made = recipe("tempflow-grpo", n=24, seeds=1)
    assert set(difference(made, recipe("flow-grpo"))) == {"rollout", "reduce"}
    assert isinstance(made.rollout, Branches)
    assert isinstance(made.loss, WithGaussianKL)
    assert (made.loss.beta, made.loss.form) == (0.004, exact)  # the divergence with dt
    assert made.reference is not None
    assert tempflow_grpo(weighted=False).reduce is step_mean
    assert tempflow_grpo().rollout.seeds * tempflow_grpo().rollout.n == 24
    flux = tempflow_grpo(eta=0.9, eps=1e-3, clip=1e-5)
    assert isinstance(flux.rollout, Branches)
    assert flux.rollout.kernel == FlowSDE(0.9)
    assert set(difference(flux, tempflow_grpo())) == {"rollout", "advantage", "loss"}


def test_refusals() -> None:
    with pytest.raises(GruppoError, match=r"constant is 2\.25, but the steps are not weighted"):
        tempflow_grpo(weighted=False, constant=2.25)
    with pytest.raises(GruppoError, match=r"the noise-aware weight is -1\.0 \* sd"):
        NoiseAware(-1.0)
    with pytest.raises(GruppoError, match="paths_per_prompt is 1"):
        tempflow_grpo(n=1)
