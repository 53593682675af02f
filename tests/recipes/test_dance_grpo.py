"""Worked numbers of DanceGRPO."""

from __future__ import annotations

import pytest
import torch

from gruppo.core.collate import collate, drop_abstained
from gruppo.core.reduce import weigh
from gruppo.policies.flow import Course
from gruppo.policies.kernels import DDIM, DanceSDE
from gruppo.policies.schedules import linear
from gruppo.recipes.dance_grpo import Best, Parts, dance_grpo
from gruppo.recipes.flow_grpo import Compared
from gruppo.recipes.golden_flow import FlowDraw, flow_grading, tiny_flow
from gruppo.recipes.mix_grpo import mix_grpo
from gruppo.rollouts.trajectories import Trajectories
from gruppo.train import iterate
from gruppo.types import Group, GruppoError, Path, Task

GRID = torch.tensor([0.9, 0.6, 0.3, 0.0], dtype=torch.float64)


def group(reward: list[float], **signals: list[float]) -> Group:
    path = Path(Course.of("a", GRID, DanceSDE()), torch.zeros(4, 2), torch.zeros(3), torch.tensor([True, True, False]))
    return Group(Task("a"), [path] * len(reward), {k: torch.tensor(v) for k, v in signals.items()}, torch.tensor(reward))


def test_two_rewards_are_normalised_before_they_are_added() -> None:
    made = dance_grpo(weights={"first": 1.0, "second": 1.0})
    one = group([0.0] * 4, first=[0.30, 0.28, 0.35, 0.27], second=[2.0, 4.0, 1.0, 3.0])
    one = one.with_(reward=made.reward(one))
    torch.testing.assert_close(
        made.advantage(one)[:, 0], torch.tensor([-0.3872983316, 0.5999436658, 0.2429833278, -0.4556286620]), atol=1e-5, rtol=0
    )
    lost = Compared(1, 1e-8)(group([2.30, 4.28, 1.35, 3.27]))[:, 0]  # their sum hears the second reward alone
    torch.testing.assert_close(lost, torch.tensor([-0.3967837414, 1.1744798745, -1.1506728501, 0.3729767169]), atol=1e-5, rtol=0)


def test_a_binary_reward() -> None:
    found = dance_grpo().advantage(group([0.0, 1.0, 1.0, 0.0]))[:, 0]
    torch.testing.assert_close(found, torch.tensor([-0.8660253888, 0.8660253888, 0.8660253888, -0.8660253888]), atol=1e-6, rtol=0)
    assert not dance_grpo().advantage(group([1.0] * 4)).any()


@pytest.mark.parametrize(("keep", "kept"), [(4, [0, 1, 4, 5]), (3, [0, 4, 5]), (2, [0, 5]), (9, [0, 1, 2, 3, 4, 5])])
def test_best_of_n_keeps_both_ends(keep: int, kept: list[int]) -> None:
    one = group([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    one = one.with_(advantage=Compared(1, 1e-8)(one))
    (narrow,) = Best(keep)([one])
    assert [i for i, p in enumerate(narrow.paths) if p.mask.any()] == kept
    assert narrow.advantage is not None
    assert torch.equal(narrow.advantage, one.advantage)  # from all six


def test_the_recipe_compares_all_paths_before_it_drops_the_middle() -> None:
    one = group([0.1, 0.2, 0.5, 0.4, 0.9])
    made, every = dance_grpo(best=2), dance_grpo()
    one = one.with_(advantage=made.advantage(one))
    torch.testing.assert_close(one.advantage, every.advantage(one), atol=0, rtol=0)
    (narrow,) = made.across([one])
    assert [p.mask.any().item() for p in narrow.paths] == [True, False, False, False, True]
    assert narrow.advantage is one.advantage


def test_dropped_paths_weigh_nothing() -> None:
    one = group([0.1, 0.2, 0.3, 0.4])
    one = one.with_(advantage=Compared(1, 1e-8)(one))
    batch = collate(Best(2)([one]))
    raw, count = dance_grpo().reduce(batch)
    assert float(count) == 2
    assert (raw.sum(1) > 0).tolist() == [True, False, False, True]


def test_an_abstained_path_is_never_among_the_best() -> None:
    one = group([0.1, float("nan"), 0.3, 0.4])
    (narrow,) = Best(2)([one.with_(advantage=torch.zeros(4, 3))])
    assert [p.mask.any().item() for p in narrow.paths] == [True, False, False, True]


def test_the_last_transition_is_not_trained_and_draws_nothing() -> None:
    made = dance_grpo(n=4, tau=1.0)
    groups = made.rollout(tiny_flow(), FlowDraw(0, 0, [0]).more(2), flow_grading(), torch.Generator().manual_seed(0))
    for path in (p for g in groups for p in g.paths):
        assert path.mask.tolist() == [True] * 5 + [False]
        assert not path.prompt.stochastic[-1]


def test_updates_cut_every_prompt_into_equal_parts() -> None:
    groups = [g.with_(advantage=torch.ones(4, 3)) for g in (group([1.0, 2.0, 3.0, 4.0]), group([1.0, 2.0, 3.0, 4.0]))]
    parts = list(Parts(2)(collate(groups)))
    assert [p.group.tolist() for p in parts] == [[0, 0, 1, 1]] * 2
    with pytest.raises(GruppoError, match="8 paths cannot be cut into 9"):
        list(Parts(9)(collate(groups)))


def test_an_iteration_takes_four_optimizer_steps() -> None:
    for updates, made in ((4, dance_grpo(n=4)), (1, dance_grpo(n=4, updates=1))):
        policy = tiny_flow()
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.01)
        done = iterate(policy, FlowDraw(0, 0, [0]).more(2), flow_grading(), made, optimizer, torch.Generator().manual_seed(0))
        assert done.updates == updates


def test_where_most_rewards_abstained_there_are_fewer_optimizer_steps() -> None:
    """One bad hour of a judge must not end a run, and no optimizer step is left without a path."""
    nan = float("nan")
    groups = [drop_abstained(g) for g in (group([1.0, nan, nan, nan]), group([nan, 2.0, nan, nan]))]
    batch = collate([g.with_(advantage=torch.ones(4, 3)) for g in groups])
    assert [p.mask.any(1).tolist() for p in Parts(4)(batch)] == [[True], [True]]
    assert [p.group.tolist() for p in Parts(4)(batch)] == [[0], [1]]


def test_parts_hold_the_steps_that_each_path_trains() -> None:
    """Every path trains steps of its own; the parts together train each of them once, and each weighs its own by itself."""
    made = dance_grpo(n=4, tau=0.5, updates=2)
    groups = made.rollout(tiny_flow(), FlowDraw(0, 0, [0]).more(2), flow_grading(), torch.Generator().manual_seed(0))
    batch = collate([g.with_(advantage=torch.ones(4, 6)) for g in groups])
    parts = list(made.cadence(batch))
    assert [id(p) for part in parts for p in part.paths] == [id(batch.paths[i]) for i in (0, 2, 4, 6, 1, 3, 5, 7)]
    assert sum(int(part.mask.sum()) for part in parts) == int(batch.mask.sum()) == 8 * 2
    for part in parts:
        assert float(weigh(part, made.reduce).weight.sum()) == pytest.approx(1.0)


def test_best_of_n_ranks_several_rewards_by_their_weighted_sum() -> None:
    made = dance_grpo(weights={"first": 1.0, "second": 10.0}, best=2)
    one = group([0.0] * 4, first=[1.0, 2.0, 3.0, 9.0], second=[0.0, 0.1, 0.9, 0.2])  # 1, 3, 12, 11
    one = one.with_(reward=made.reward(one))
    one = one.with_(advantage=made.advantage(one))
    (narrow,) = made.across([one])
    assert [p.mask.any().item() for p in narrow.paths] == [True, False, True, False]
    assert narrow.advantage is one.advantage


def test_advantages_are_clamped_and_taken_by_the_sample_deviation() -> None:
    for made in (dance_grpo(), mix_grpo(), dance_grpo(weights={"x": 1.0}), mix_grpo(weights={"x": 1.0})):
        one = group([0.0] * 99 + [1.0], x=[0.0] * 99 + [1.0])
        one = one.with_(reward=made.reward(one.with_(signals={**one.signals, "reward": one.signals["x"]})))
        assert float(made.advantage(one).max()) == 5.0


def test_timesteps_of_the_flux_script() -> None:
    told = (1000 * linear(16, 3.0)[:-1]).int().tolist()
    assert told == [1000, 978, 954, 928, 900, 868, 833, 794, 750, 700, 642, 576, 500, 409, 300, 166]


def test_networks_that_predict_epsilon_step_by_ddim() -> None:
    rollout = dance_grpo(ddim=1.0).rollout
    assert isinstance(rollout, Trajectories)
    assert rollout.kernel == DDIM(1.0)
    assert rollout.shared_noise
