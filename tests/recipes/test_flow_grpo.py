"""Worked numbers of Flow-GRPO and its companions: advantages, clip, divergence, Guard's ratio, Fast's window, CPS."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gruppo.core.collate import collate
from gruppo.core.gaussian import WithGaussianKL, exact, gaussian_kl, without_dt
from gruppo.core.surrogate import PPOClip
from gruppo.policies.flow import Course
from gruppo.policies.kernels import CPS, FlowSDE, Kernel
from gruppo.recipe import Recipe
from gruppo.recipes import recipe
from gruppo.recipes.flow_fast import Guarded, flow_cps, flow_grpo_fast, grpo_guard
from gruppo.recipes.flow_grpo import BatchStd, Clamped, Compared, flow_grpo
from gruppo.rollouts.trajectories import Trajectories
from gruppo.types import Batch, Group, GruppoError, Path, Steps, Task

X = torch.tensor([0.5, -1.0])
V, OTHER, REFERENCE = (torch.tensor([v]) for v in ([0.2, 0.4], [0.21, 0.38], [0.3, 0.35]))
GRID = torch.tensor([0.8, 0.6], dtype=torch.float64)  # the one step that most worked numbers are about


def course(kernel: Kernel) -> Course:
    made = Course.of("a", torch.tensor([1.0, 0.8, 0.6, 0.0], dtype=torch.float64), kernel)
    return replace(made, sigmas=GRID, levels=made.levels[1:2])


def said(kernel: Kernel, v: Tensor, after: Tensor) -> Steps:
    """What a policy of velocity v says about one step."""
    c = course(kernel)
    a, b, level = (u.float() for u in (c.sigmas[:1], c.sigmas[1:], c.levels))
    mean, sd = kernel.mean(X[None], v, a, b, level), kernel.deviation(a, b, level)
    return Steps(kernel.logp(after[None], mean, sd)[None], mean=mean[None], std=sd[None, :, None])


def drawn(kernel: Kernel, advantage: float) -> Batch:
    """One path of one step, drawn from velocity V with noise (1, -.5)."""
    c = course(kernel)
    old = said(kernel, V, X)
    assert old.mean is not None
    assert old.std is not None
    after = old.mean[0, 0] + old.std[0, 0] * torch.tensor([1.0, -0.5])
    logp = said(kernel, V, after).logp[0]
    path = Path(c, torch.stack([X, after]), logp, torch.tensor([True]), mean=old.mean[0])
    return collate([Group(Task("a"), [path], {}, torch.zeros(1), torch.tensor([[advantage]]))])


def again(kernel: Kernel, batch: Batch, v: Tensor = OTHER) -> Steps:
    return said(kernel, v, batch.paths[0].steps[1])


def test_ratio_and_clip_of_one_step() -> None:
    for advantage, clip, expected in (
        (1.5, 1e-4, -1.4940167987),
        (1.5, 1e-2, -1.4940167987),
        (-1.5, 1e-4, 1.49985),
        (-1.5, 1e-2, 1.4940167987),
    ):
        batch = drawn(FlowSDE(0.7), advantage)
        loss, stats = PPOClip(clip, clip, scope="step")(batch, again(FlowSDE(0.7), batch), None)
        assert float(loss) == pytest.approx(expected, abs=2e-6)
        assert float(stats["ratio"]) == pytest.approx(0.9960111991, abs=1e-6)


def test_divergence_in_both_forms() -> None:
    batch = drawn(FlowSDE(0.7), 0.0)
    now, ref = again(FlowSDE(0.7), batch, V), again(FlowSDE(0.7), batch, REFERENCE)
    kl = gaussian_kl(now, ref)
    assert float(exact(batch, kl)) == pytest.approx(4.942681760e-4, rel=1e-4)
    assert float(without_dt(batch, kl)) == pytest.approx(9.885363520e-5, rel=1e-4)
    loss = WithGaussianKL(PPOClip(1e-4, 1e-4), beta=2.0)
    value, stats = loss(batch, now, ref)
    assert float(value) == pytest.approx(2 * 4.942681760e-4, rel=1e-4)
    assert float(stats["kl"]) == pytest.approx(4.942681760e-4, rel=1e-4)


def test_divergence_is_that_of_two_gaussians() -> None:
    batch = drawn(FlowSDE(0.7), 0.0)
    now, ref = again(FlowSDE(0.7), batch, V), again(FlowSDE(0.7), batch, REFERENCE)
    assert now.mean is not None
    assert ref.mean is not None
    assert now.std is not None
    p, q = (torch.distributions.Normal(m[0, 0], now.std[0, 0]) for m in (now.mean, ref.mean))
    assert float(gaussian_kl(now, ref)) == pytest.approx(float(torch.distributions.kl_divergence(p, q).mean()), rel=1e-5)


def test_the_divergence_pulls_the_policy_and_not_the_reference() -> None:
    """d KL / d v = (mu - mu_ref) (d mu / d v) / (sd^2 D), with d mu / d v = (1 + eta^2 / 2) dt and sd^2 = s^2 h."""
    batch = drawn(FlowSDE(0.7), 0.0)
    v, frozen = V.clone().requires_grad_(), REFERENCE.clone()
    now, ref = again(FlowSDE(0.7), batch, v), again(FlowSDE(0.7), batch, frozen)
    value, _ = WithGaussianKL(PPOClip(1e-4, 1e-4), beta=2.0)(batch, now, ref)
    value.sum().backward()
    expected = 2.0 * (V - REFERENCE) * ((1 + 0.7**2 / 2) * -0.2) ** 2 / (1.4**2 * 0.2 * 2)
    torch.testing.assert_close(v.grad, expected)


def groups_of(*rewards: list[float]) -> list[Group]:
    path = Path(course(FlowSDE()), torch.zeros(2, 2), torch.zeros(1), torch.tensor([True]))
    return [Group(Task("a"), [path] * len(r), {}, torch.tensor(r)) for r in rewards]


def test_advantages_by_prompt_and_by_batch() -> None:
    first, second = groups_of([0.2, 0.4, 0.9, 0.5], [0.1] * 4)
    own = Compared(ddof=0, eps=1e-4)
    torch.testing.assert_close(own(first)[:, 0], torch.tensor([-1.1762354533, -0.3920784844, 1.5683139378, 0.0]))
    assert not own(second).any()
    sample = Compared(ddof=1, eps=1e-8)(first)[:, 0]
    torch.testing.assert_close(sample, torch.tensor([-1.0190492961, -0.3396830987, 1.3587323948, 0.0]))
    for g, expected in zip(BatchStd(1e-4)([first, second]), ([-1.1137583896, -0.3712527965, 1.4850111861, 0.0], [0.0] * 4)):
        assert g.advantage is not None
        torch.testing.assert_close(g.advantage[:, 0], torch.tensor(expected))


def test_advantages_stay_within_5() -> None:
    (group,) = groups_of([0.0] * 99 + [1.0])
    assert float(Compared(0, 1e-4)(group).max()) > 9
    assert float(Clamped(Compared(0, 1e-4))(group).max()) == 5


@pytest.mark.parametrize("made", [flow_grpo(), flow_grpo_fast(), flow_cps(), grpo_guard()])
def test_every_recipe_of_the_family_compares_by_the_population_and_clamps(made: Recipe) -> None:
    first, rare = groups_of([0.2, 0.4, 0.9, 0.5], [0.0] * 99 + [1.0])
    torch.testing.assert_close(
        made.advantage(first)[:, 0], torch.tensor([-1.1762354533, -0.3920784844, 1.5683139378, 0.0]), atol=1e-6, rtol=0
    )
    assert float(made.advantage(rare).max()) == 5.0


def test_one_deviation_for_the_batch_is_clamped_too_and_hears_no_abstained_reward() -> None:
    (rare,) = flow_grpo(batch_std=True).across(groups_of([0.0] * 99 + [1.0]))
    assert rare.advantage is not None
    assert float(rare.advantage.max()) == 5.0
    nan = float("nan")
    heard, other = flow_grpo(batch_std=True).across(groups_of([0.2, 0.4, 0.9, 0.5, nan], [0.1] * 4))
    assert heard.advantage is not None
    assert other.advantage is not None
    expected = torch.tensor([-1.1137583896, -0.3712527965, 1.4850111861, 0.0, 0.0])
    torch.testing.assert_close(heard.advantage[:, 0], expected, atol=1e-6, rtol=0)
    assert not other.advantage.any()


def test_the_divergence_is_the_papers_and_the_reference_is_read_where_it_counts() -> None:
    loss = flow_grpo().loss
    assert isinstance(loss, WithGaussianKL)
    assert loss.form is exact
    assert loss.beta == 0.004
    for made in (flow_grpo_fast(), flow_cps(), grpo_guard()):
        assert made.reference is None
        assert not isinstance(made.loss, WithGaussianKL)


def test_trained_steps_of_ten() -> None:
    rollout = flow_grpo().rollout
    assert isinstance(rollout, Trajectories)
    g = torch.Generator()
    assert rollout.trained(rollout.noisy(10, g), 10, g) == list(range(9))


def test_without_a_divergence_there_is_no_reference() -> None:
    assert flow_grpo(beta=0.0).reference is None
    assert flow_grpo().reference is not None


# -- companions


def test_cps_ratio() -> None:
    batch = drawn(CPS(0.8), 1.0)
    _, stats = PPOClip(1e-5, 1e-5, scope="step")(batch, again(CPS(0.8), batch), None)
    assert float(stats["ratio"]) == pytest.approx(0.9967564096, abs=1e-6)


def test_guard_centres_the_ratio() -> None:
    """Under the sampler the plain log-ratio has mean -|dmu|^2 / (2 sd^2); Guard's has mean 0, and sd for a scale."""
    kernel, n = FlowSDE(0.7), 20_000
    old, new = said(kernel, V, X), said(kernel, OTHER * 4, X)
    assert old.mean is not None
    assert old.std is not None
    assert new.mean is not None
    sd = old.std[0, 0, 0]
    after = old.mean[0, 0] + sd * torch.randn(n, 2, generator=torch.Generator().manual_seed(0))
    plain = kernel.logp(after, new.mean[0, 0], sd) - kernel.logp(after, old.mean[0, 0], sd)
    bias = (new.mean - old.mean).square().mean() / (2 * sd**2)
    assert float(plain.mean()) == pytest.approx(-float(bias), abs=4 * float(plain.std()) / n**0.5)
    assert float(plain.mean()) < -5 * float(plain.std()) / n**0.5  # the bias is there to be seen
    path = drawn(kernel, 1.0).paths[0]
    paths = [replace(path, steps=torch.stack([X, x]), logp=kernel.logp(x[None], old.mean[0, 0], sd)) for x in after[:2000]]
    batch = collate([Group(Task("a"), paths, {}, torch.zeros(2000), torch.ones(2000, 1))])
    now = Steps(
        kernel.logp(after[:2000], new.mean[0, 0], sd)[:, None],
        mean=new.mean.expand(2000, 1, 2),
        std=old.std.expand(2000, 1, 1),
    )
    _, stats = Guarded(0.2, 0.2)(batch, now, None)
    logs = stats["ratio"].log()
    assert abs(float(logs.mean())) < 4 * float(logs.std()) / 2000**0.5
    torch.testing.assert_close(logs[:, 0], (plain[:2000] + bias) * sd, atol=1e-5, rtol=0)


def test_guard_divides_the_loss_by_the_step_size() -> None:
    batch = drawn(FlowSDE(0.7), 1.0)
    loss, stats = Guarded(0.2, 0.2)(batch, again(FlowSDE(0.7), batch), None)
    assert float(loss) == pytest.approx(-float(stats["ratio"]) / 0.2, rel=1e-5)


@pytest.mark.parametrize("v", [OTHER, torch.tensor([[0.19, 0.42]])])
def test_guard_clips_its_own_ratio_on_the_side_that_goes_too_far(v: Tensor) -> None:
    for A in (1.5, -1.5):
        batch = drawn(FlowSDE(0.7), A)
        now = again(FlowSDE(0.7), batch, v)
        rho = float(Guarded(9.0, 9.0)(batch, now, None)[1]["ratio"])
        assert abs(rho - 1) > 1e-3
        too_far = (rho > 1) == (A > 0)
        bound = 1 + 1e-4 if rho > 1 else 1 - 1e-4
        loss, stats = Guarded(1e-4, 1e-4)(batch, now, None)
        assert float(loss) == pytest.approx(-A * (bound if too_far else rho) / 0.2, rel=1e-5)
        assert float(stats["clip_high"]) == float(too_far and rho > 1)
        assert float(stats["clip_low"]) == float(too_far and rho < 1)


def test_guard_takes_the_bias_of_each_path() -> None:
    """Two paths whose means moved by different amounts: a number shared by the batch would mix them."""
    one, two = drawn(FlowSDE(0.7), 1.0), drawn(FlowSDE(0.7), 1.0)
    both = collate([Group(Task("a"), [*one.paths, *two.paths], {}, torch.zeros(2), torch.ones(2, 1))])
    near, far = again(FlowSDE(0.7), one, V), again(FlowSDE(0.7), two, OTHER * 3)
    now = Steps(
        *(torch.cat([getattr(near, k), getattr(far, k)]) for k in ("logp",)),
        mean=torch.cat([near.mean, far.mean]),
        std=torch.cat([near.std, far.std]),
    )  # type: ignore[list-item]
    _, stats = Guarded(9.0, 9.0)(both, now, None)
    alone = Guarded(9.0, 9.0)(one, near, None)[1]["ratio"]
    torch.testing.assert_close(stats["ratio"][:1], alone)
    assert float(alone) == pytest.approx(1.0, abs=1e-6)


def test_guard_needs_the_samplers_means() -> None:
    batch = drawn(FlowSDE(), 1.0)
    bare = batch.with_(paths=[replace(p, mean=None) for p in batch.paths])
    with pytest.raises(GruppoError, match="keep_means"):
        Guarded(0.1, 0.1)(bare, again(FlowSDE(), batch), None)
    rollout = grpo_guard().rollout
    assert isinstance(rollout, Trajectories)
    assert rollout.keep_means


def test_fast_trains_its_window_only() -> None:
    rollout = flow_grpo_fast(window=2).rollout
    assert isinstance(rollout, Trajectories)
    g = torch.Generator().manual_seed(0)
    assert {tuple(rollout.trained(w, 10, g)) for w in (rollout.noisy(10, g) for _ in range(60))} == {
        (0, 1),
        (1, 2),
        (2, 3),
        (3, 4),
    }


def test_cps_never_trains_the_step_to_the_picture() -> None:
    rollout = flow_cps(share=1.0).rollout
    assert isinstance(rollout, Trajectories)
    assert rollout.trained(rollout.noisy(6, torch.Generator()), 6, torch.Generator()) == [0, 1, 2, 3, 4]


def test_names() -> None:
    assert recipe("2505.05470/fast") == flow_grpo_fast()
    assert recipe("grpo-guard") == grpo_guard()
