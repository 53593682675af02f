"""MixGRPO and Flash: what is noisy, what is trained, and what it costs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from gruppo.core.surrogate import PPOClip
from gruppo.policies.kernels import CPS, DPMSolver2M, FlowSDE
from gruppo.policies.schedules import linear
from gruppo.recipe import Recipe
from gruppo.recipes.golden_flow import FlowDraw, flow_grading, tiny_flow
from gruppo.recipes.mix_grpo import mix_grpo, mix_grpo_flash
from gruppo.rollouts.trajectories import Trajectories
from gruppo.rollouts.window import CompressedTail, Constant, LinearDecay, RandomWindow, Window
from gruppo.train import iterate
from gruppo.types import Group, Path, Task


def spent(made: Recipe, steps: int, prompts: int = 2) -> dict[str, int]:
    """What one iteration computes."""
    policy = tiny_flow(steps=steps)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.01)
    iterate(policy, FlowDraw(0, 0, [0]).more(prompts), flow_grading(), made, optimizer, torch.Generator().manual_seed(0))
    return dict(policy.counts)


def test_four_of_25_steps_are_trained() -> None:
    found = spent(mix_grpo(n=12, shared_noise=False), 25)
    assert found["sampled"] == 2 * 12 * 25
    assert found["trained"] == found["forwards"] == 2 * 12 * 4


def test_flash_needs_11_calls_instead_of_25() -> None:
    found = spent(mix_grpo_flash(n=12, shared_noise=False), 25)
    assert found["sampled"] == 2 * 12 * 11
    assert found["trained"] == 2 * 12 * 4
    assert spent(mix_grpo_flash(n=12, ratio=0.2, stride=0), 25)["sampled"] == 2 * 12 * 7


def test_one_noise_per_prompt_saves_training_calls() -> None:
    """The first step of the first window is the same latent in every path of a prompt, in each of four updates."""
    found = spent(mix_grpo(n=12), 25)
    assert found["trained"] == 2 * 12 * 4
    assert found["forwards"] == 2 * 12 * 3 + 2 * 4


@pytest.mark.parametrize("make", [mix_grpo, mix_grpo_flash])
def test_each_reward_is_compared_by_its_sample_deviation_and_added(make: Callable[..., Recipe]) -> None:
    path = Path(None, torch.zeros(2, 2), torch.zeros(1), torch.tensor([True]))
    plain = Group(Task("a"), [path] * 4, {}, torch.tensor([0.2, 0.4, 0.9, 0.5]))
    torch.testing.assert_close(make().advantage(plain)[:, 0], torch.tensor([-1.0190492961, -0.3396830987, 1.3587323948, 0.0]))
    signals = {"first": torch.tensor([0.30, 0.28, 0.35, 0.27]), "second": torch.tensor([2.0, 4.0, 1.0, 3.0])}
    made = make(weights={"first": 1, "second": 1})
    several = Group(Task("a"), [path] * 4, signals)
    several = several.with_(reward=made.reward(several))
    expected = torch.tensor([-0.3872983316, 0.5999436658, 0.2429833278, -0.4556286620])
    torch.testing.assert_close(made.advantage(several)[:, 0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("make", [mix_grpo, mix_grpo_flash])
def test_an_iteration_takes_four_optimizer_steps(make: Callable[..., Recipe]) -> None:
    for updates, made in ((4, make(n=4)), (1, make(n=4, updates=1))):
        policy = tiny_flow(steps=6)
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.01)
        rng = torch.Generator().manual_seed(0)
        done = iterate(policy, FlowDraw(0, 0, [0]).more(2), flow_grading(), made, optimizer, rng)
        assert done.updates == updates


def test_flash_solves_behind_the_window_and_its_random_kin_keeps_no_place() -> None:
    rollout = mix_grpo_flash().rollout
    assert isinstance(rollout, Trajectories)
    assert rollout.solver == DPMSolver2M()
    assert rollout.grid == CompressedTail(0.4)
    assert mix_grpo_flash().state == (rollout.noisy,)


def test_steps_outside_the_window_follow_the_ode() -> None:
    made = mix_grpo(n=4, window=2, tau=1)
    policy = tiny_flow()
    rng = torch.Generator().manual_seed(0)
    for start in (0, 1, 2, 3, 4, 4):
        groups = made.rollout(policy, FlowDraw(0, 0, [0]).more(2), flow_grading(), rng)
        for path in (p for g in groups for p in g.paths):
            assert path.mask.nonzero()[:, 0].tolist() == [start, start + 1]
            assert torch.equal(path.mask, path.prompt.stochastic)
            S = path.prompt.sigmas.float()
            for t in (~path.mask).nonzero()[:, 0].tolist():
                v = policy.velocity(path.steps[t][None], S[t : t + 1], [path.prompt.prompt], counted="sampled")
                torch.testing.assert_close(path.steps[t + 1], (path.steps[t] + (S[t + 1] - S[t]) * v[0]).detach())
        for memory in made.state:
            memory.update(groups)


def test_the_window_moves_with_the_iterations_of_a_run() -> None:
    made = mix_grpo(n=4, window=2, tau=2, updates=1)
    policy = tiny_flow()
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.01)
    seen = []
    for _ in range(5):
        done = iterate(policy, FlowDraw(0, 0, [0]).more(2), flow_grading(), made, optimizer, torch.Generator().manual_seed(0))
        seen.append(int(done.groups[0].paths[0].mask.nonzero()[0]))
    assert seen == [0, 0, 1, 1, 2]


def test_two_recipes_do_not_share_a_window() -> None:
    one, other = mix_grpo(tau=1), mix_grpo(tau=1)
    assert isinstance(one.state[0], Window)
    one.rollout.noisy(10, torch.Generator())  # type: ignore[attr-defined]
    one.state[0].update([])
    assert other.rollout.noisy(10, torch.Generator())[0] == 0  # type: ignore[attr-defined]
    assert one.rollout.noisy(10, torch.Generator())[0] == 1  # type: ignore[attr-defined]


def test_variants() -> None:
    drawn = mix_grpo(random=True)
    assert isinstance(drawn.rollout, Trajectories)
    assert isinstance(drawn.rollout.noisy, RandomWindow)
    assert drawn.state == ()
    slower = mix_grpo(hold=LinearDecay(10, 1), cps=True).rollout
    assert isinstance(slower, Trajectories)
    assert isinstance(slower.noisy, Window)
    assert slower.noisy.hold == LinearDecay(10, 1)
    assert isinstance(slower.kernel, CPS)


def test_every_number_of_the_window_reaches_it() -> None:
    made = mix_grpo(window=3, tau=7, stride=2, spare=1, shrinks=True, roll_back=True)
    assert made.state == (Window(3, Constant(7), 2, spare=1, shrinks=True, roll_back=True),)
    drawn = mix_grpo(window=3, random=True, spare=2).rollout
    assert drawn.noisy == RandomWindow(3, spare=2)  # type: ignore[attr-defined]
    flash = mix_grpo_flash(window=3, tau=7, stride=2, ratio=0.3, heun=True, roll_back=True)
    assert flash.state == (Window(3, Constant(7), 2, roll_back=True),)
    assert flash.rollout.grid == CompressedTail(0.3)  # type: ignore[attr-defined]
    assert flash.rollout.solver == DPMSolver2M(heun=True)  # type: ignore[attr-defined]
    for made in (mix_grpo(eta=0.9, clip=0.3), mix_grpo_flash(eta=0.9, clip=0.3)):
        assert made.rollout.kernel == FlowSDE(0.9)  # type: ignore[attr-defined]
        assert made.loss == PPOClip(0.3, 0.3, scope="step")


@pytest.mark.parametrize(("ratio", "faster", "calls"), [(0.4, 2.016, 11), (0.2, 3.049, 7)])
def test_speed_up_of_the_paper(ratio: float, faster: float, calls: int) -> None:
    """T / (w + (T - w) r) counts a share of a node; the grid that is walked has whole ones and is no slower."""
    T, window = 25, list(range(4))
    assert T / (len(window) + (T - len(window)) * ratio) == pytest.approx(faster, abs=1e-3)
    walked = len(CompressedTail(ratio)(linear(T, 3.0), window)) - 1
    assert walked == calls
    assert T / walked >= faster
