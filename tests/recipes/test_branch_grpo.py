"""BranchGRPO: what a node is worth, against whom, who trains a shared transition, and what pruning leaves out."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Sequence

import pytest
import torch
from tests.rollouts.painting import grown
from torch import Tensor

from gruppo.core.collate import collate, drop_abstained
from gruppo.core.reduce import weigh
from gruppo.core.tree import edges, owners
from gruppo.policies.flow import Course
from gruppo.policies.kernels import DanceSDE
from gruppo.policies.schedules import linear
from gruppo.recipe import Recipe, difference
from gruppo.recipes import recipe
from gruppo.recipes.branch_grpo import (
    ByPath,
    DepthWindow,
    Depthwise,
    Pruned,
    branch_grpo,
    branch_grpo_mix,
    by_edges,
    extremes,
    first_half,
    handed_over,
    last_split,
    parent_top1,
    uniform,
)
from gruppo.recipes.golden_flow import QUADRANTS, flow_grading, task, tiny_flow
from gruppo.rollouts.trajectories import everywhere
from gruppo.rollouts.tree import Correlated, EveryThird, Scaled, Tree
from gruppo.train import iterate
from gruppo.types import Group, GruppoError, Path, Task

LEAVES = [0.30, 0.32, 0.28, 0.34, 0.36, 0.31, 0.29, 0.40]


def tree(reward: Sequence[float], splits: Sequence[int], T: int, logp: Tensor | None = None) -> Group:
    """A binary tree whose leaves, from left to right, have these rewards; every transition is trained by its first row."""
    G = len(reward)
    course = Course.of("a", linear(T, 3.0), DanceSDE())
    paths: list[Path] = []
    for i in range(G):
        fork = None
        if i:  # leaves i and j part at the split of the highest bit in which they differ
            low = i & -i
            fork = (i - low, splits[len(splits) - 1 - int(math.log2(low))])
        own = torch.zeros(T) if logp is None else logp[i]
        paths.append(Path(course, torch.zeros(T + 1, 2), own, torch.ones(T, dtype=torch.bool), QUADRANTS["a"], fork))
    group = Group(Task("a"), paths, {"reward": torch.tensor(reward)}, torch.tensor(reward))
    mask = owners(edges(group), group.mask)
    return group.with_(paths=[Path(p.prompt, p.steps, p.logp, m, p.output, p.fork) for p, m in zip(paths, mask)])


def at_nodes(group: Group, value: Tensor, t: int) -> list[float]:
    """The values of the nodes that step t leads to, from left to right."""
    e = edges(group)[:, t]
    return [float(value[int((e == node).nonzero()[0]), t]) for node in e.unique(sorted=True)]


# ---- worth and advantage


@pytest.mark.parametrize(
    ("ddof", "two", "four"),
    [
        (1, [-0.70710678, 0.70710678], [-0.842927, -0.842927, 0.561951, 1.123902]),
        (0, [-1.0, 1.0], [-0.973328, -0.973328, 0.648885, 1.297771]),
    ],
)
def test_every_depth_is_judged_among_itself(ddof: int, two: list[float], four: list[float]) -> None:
    group = tree(LEAVES, [0, 1, 2], 3)
    value = uniform(edges(group), group.logp, torch.tensor(LEAVES))
    assert at_nodes(group, value, 0) == pytest.approx([0.31, 0.34])
    assert at_nodes(group, value, 1) == pytest.approx([0.31, 0.31, 0.335, 0.345])
    found = Depthwise(ddof=ddof)(group)
    assert at_nodes(group, found, 0) == pytest.approx(two, abs=1e-5)
    assert at_nodes(group, found, 1) == pytest.approx(four, abs=1e-5)
    if ddof == 1:
        eight = [-0.625, -0.125, -1.125, 0.375, 0.875, -0.375, -0.875, 1.875]
        assert at_nodes(group, found, 2) == pytest.approx(eight, abs=1e-5)
        assert torch.allclose(branch_grpo(8).advantage(group), found)


@pytest.mark.parametrize(
    ("fuse", "root", "children"),
    [
        (uniform, 4.0, [1.5, 6.5]),
        (by_edges, 2.67578975, [1.26894142, 6.5]),
        (ByPath(1.0), 2.55572975, [1.26894142, 6.5]),
        (ByPath(0.5), 3.27438763, [1.37754067, 6.5]),
        (ByPath(0.0), 4.0, [1.5, 6.5]),
    ],
)
def test_what_a_node_is_worth(fuse: Callable, root: float, children: list[float]) -> None:
    """Leaves 1, 2, 4, 9 below edges of log-probability -.5, -1.5, -1, -1, these below edges of -1, -2, and a root edge."""
    logp = torch.tensor([[-7.0, -1, -0.5], [-7, -1, -1.5], [-7, -2, -1], [-7, -2, -1]])
    group = tree([1.0, 2, 4, 9], [1, 2], 3, logp)
    value = fuse(edges(group), group.logp, group.reward)
    assert at_nodes(group, value, 0) == pytest.approx([root], abs=1e-6)
    assert at_nodes(group, value, 1) == pytest.approx(children, abs=1e-6)
    assert at_nodes(group, value, 2) == pytest.approx([1.0, 2, 4, 9], abs=1e-6)


def test_the_steps_of_a_chain_add_up_in_a_paths_probability_only() -> None:
    """Behind the split one leaf's chain is less likely: whole paths see it, the split's own edges do not."""
    logp = torch.tensor([[-1.0, -1.0, -1.0], [-1.0, -1.0, -3.0]])
    group = tree([1.0, 0.0], [1], 3, logp)
    assert float(by_edges(edges(group), group.logp, group.reward)[0, 0]) == pytest.approx(0.5)
    assert float(ByPath()(edges(group), group.logp, group.reward)[0, 0]) == pytest.approx(1 / (1 + math.exp(-2)))


@pytest.mark.parametrize("fuse", [uniform, by_edges, ByPath()])
def test_equal_rewards_and_single_nodes_teach_nothing(fuse: Callable) -> None:
    logp = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Depthwise(fuse)(tree([0.3] * 4, [1, 3], 5, logp)), torch.zeros(4, 5))
    found = Depthwise(fuse)(tree([0.3, 0.9, 0.1, 0.4], [1, 3], 5, logp))
    assert torch.equal(found[:, 0], torch.zeros(4))  # one node
    assert found[:, 1:].abs().min() > 0.05
    assert torch.equal(found[:, 1], found[:, 2])  # no split in between: the same nodes' worth


def test_two_nodes_tell_only_a_sign() -> None:
    for reward in ([0.0, 1e-4], [0.0, 100.0]):
        found = Depthwise()(tree(reward, [0], 2))
        assert found[:, 0].tolist() == pytest.approx([-0.70710678, 0.70710678], abs=1e-3)
    tiny = Depthwise()(tree([0.0, 1e-7], [0], 2))  # a std below 1e-6 is rounding
    assert torch.equal(tiny, torch.zeros(2, 2))


def test_nodes_count_once_however_many_leaves_hang_below_them() -> None:
    """Three leaves below the left node, one below the right one: the depth still has two nodes."""
    group = tree([1.0, 2.0, 3.0, 10.0], [0, 1], 2)
    three = Group(group.task, [group.paths[0], group.paths[1], group.paths[2]], reward=torch.tensor([1.0, 3.0, 10.0]))
    found = Depthwise()(three)
    assert found[:, 0].tolist() == pytest.approx([-0.7071, -0.7071, 0.7071], abs=1e-4)


# ---- abstained leaves


@pytest.mark.parametrize("fuse", [uniform, by_edges, ByPath()])
def test_a_leaf_without_a_reward_is_as_if_it_had_not_grown(fuse: Callable) -> None:
    """Its worth enters nowhere, and the transitions it would have trained go to the next leaf that shares them."""
    logp = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    logp[:2, :2], logp[2:, :2], logp[:, 0] = logp[0, :2], logp[2, :2], logp[0, 0]
    made = branch_grpo(4, splits=[1, 2], fuse=fuse)
    group = drop_abstained(tree([math.nan, 0.9, 0.1, 0.4], [1, 2], 3, logp))
    group = group.with_(advantage=made.advantage(group))
    assert group.advantage is not None
    assert bool(group.advantage.isfinite().all())
    assert group.advantage[1, 1:].tolist() == pytest.approx([0.70710678, 1.0722], abs=1e-3)
    (kept,) = made.across([group])
    assert kept.mask.tolist() == [[False] * 3, [True] * 3, [False, True, True], [False, False, True]]
    alone = Depthwise(fuse)(
        Group(
            group.task,
            [Path(p.prompt, p.steps, p.logp, p.mask, p.output, f) for p, f in zip(group.paths[1:], (None, (0, 1), (1, 2)))],
            reward=torch.tensor([0.9, 0.1, 0.4]),
        )
    )
    assert torch.allclose(group.advantage[1:], alone, atol=1e-6)


def test_a_branch_without_any_reward_has_no_worth() -> None:
    group = drop_abstained(tree([math.nan, math.nan, 0.1, 0.4], [0, 1], 2))
    found = Depthwise()(group)
    assert torch.equal(found[:, 0], torch.zeros(4))  # one node of this depth was heard
    assert found[2:, 1].tolist() == pytest.approx([-0.70710678, 0.70710678], abs=1e-5)
    (kept,) = handed_over([group])
    assert kept.mask.tolist() == [[False, False], [False, False], [True, True], [False, True]]


# ---- who is trained, and how much


def test_every_transition_weighs_the_same() -> None:
    """Row 0 owns 20 of the 218 transitions, the last leaves 11 each: a mean over rows would not be the mean over transitions."""
    _, (group,) = grown(Tree((0, 3, 6, 9), noisy=everywhere), 20)
    batch = collate([group.with_(advantage=torch.zeros(16, 20))])
    assert sorted(batch.mask.sum(1).tolist()) == [*[11] * 8, *[14] * 4, 17, 17, 20, 20]
    weight = weigh(batch, branch_grpo().reduce).weight
    assert weight[batch.mask].tolist() == pytest.approx([1 / 218] * 218)


def test_an_iteration_on_a_tree() -> None:
    policy, made = tiny_flow(steps=10), branch_grpo(8, clip=0.2)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    done = iterate(policy, [task(0), task(1)], flow_grading(), made, optimizer, torch.Generator().manual_seed(0))
    assert policy.counts["sampled"] == 2 * (1 + 2 + 2 + 2 + 4 + 4 + 4 + 8 + 8 + 8)
    assert policy.counts["trained"] == 2 * (2 + 2 + 2 + 4 + 4 + 4 + 8 + 8 + 8)
    assert policy.counts["forwards"] == 2 * (1 + 2 + 2 + 2 + 4 + 4 + 4 + 8 + 8)
    assert done.stats["ratio"] == pytest.approx(1.0, abs=1e-3)
    assert done.stats["gap"] < 1e-4


# ---- pruning


def big(reward: Sequence[float] | None = None) -> Group:
    """The tree of 16 leaves and 218 transitions."""
    reward = torch.rand(16, generator=torch.Generator().manual_seed(5)).tolist() if reward is None else reward
    return tree(reward, [0, 3, 6, 9], 20)


def pruned(group: Group, made: Pruned) -> Tensor:
    """[G, T] what is left to train."""
    return made([group])[0].mask


def test_width_modes() -> None:
    group = big()
    assert last_split(group) == 9
    assert group.reward is not None
    assert int(group.mask.sum()) == 218
    assert int(group.mask[:, 10:].sum()) == 160
    for keep in (first_half, extremes, parent_top1):
        left = pruned(group, Pruned(keep))
        assert int(left.sum()) == 138
        assert torch.equal(left[:, :10], group.mask[:, :10])
    # whatever the rewards are, the first half of every chain: it drops depths 16 to 20
    left = pruned(group, Pruned(first_half))
    assert left.any(0).nonzero()[:, 0].tolist() == [*range(15)]
    assert torch.equal(left, pruned(big([*range(16)]), Pruned(first_half)))
    # the whole chains of the four best and the four worst leaves
    left = pruned(group, Pruned(extremes))
    order = group.reward.argsort(descending=True)
    assert sorted(left[:, 19].nonzero()[:, 0].tolist()) == sorted([*order[:4].tolist(), *order[-4:].tolist()])
    assert left[:, 19].sum() * 10 == left[:, 10:].sum()
    # of each pair of leaves the better one
    left = pruned(group, Pruned(parent_top1))
    best = [i + int(group.reward[i + 1] > group.reward[i]) for i in range(0, 16, 2)]
    assert left[:, 19].nonzero()[:, 0].tolist() == best


def test_width_with_silent_leaves() -> None:
    reward = torch.arange(16.0)
    reward[[0, 15]] = torch.nan
    group = drop_abstained(big(reward.tolist()))
    assert pruned(group, Pruned(extremes))[:, 19].nonzero()[:, 0].tolist() == [1, 2, 3, 4, 11, 12, 13, 14]
    assert pruned(group, Pruned(parent_top1))[:, 19].nonzero()[:, 0].tolist() == [1, 3, 5, 7, 9, 11, 13, 14]


def test_pruning_a_tree_as_it_grows() -> None:
    """A grown tree has another row order than the one written here: its second row leaves the first one at the root."""
    _, (group,) = grown(Tree((0, 3, 6, 9), noisy=everywhere), 20)
    assert group.paths[1].fork == (0, 0)
    assert last_split(group) == 9
    reward = torch.rand(16, generator=torch.Generator().manual_seed(3))
    group = group.with_(reward=reward)
    left = pruned(group, Pruned(extremes))
    assert int(left.sum()) == 138
    order = reward.argsort(descending=True)
    assert sorted(left[:, 19].nonzero()[:, 0].tolist()) == sorted([*order[:4].tolist(), *order[-4:].tolist()])
    left = pruned(group, Pruned(parent_top1))
    assert int(left.sum()) == 138
    assert left[:, 19].nonzero()[:, 0].tolist() == sorted(i + 8 * int(reward[i + 8] > reward[i]) for i in range(8))
    assert pruned(group, Pruned(first_half)).any(0).nonzero()[:, 0].tolist() == [*range(15)]
    assert int(pruned(group, Pruned(depth=DepthWindow(4, 30))).sum()) == 218 - 64


def test_pruning_hands_over_what_a_silent_leaf_would_have_trained() -> None:
    reward = torch.rand(16, generator=torch.Generator().manual_seed(5))
    reward[0] = torch.nan
    (group,) = [drop_abstained(big(reward.tolist()))]
    left = pruned(group, Pruned(depth=DepthWindow(4, 30)))
    assert not bool(left[0].any())
    assert left[1].tolist() == [True] * 16 + [False] * 4
    assert int(left.sum()) == 218 - 11 - 4 * 15  # its own chain of 11, then four depths of the other 15


def test_pruning_comes_after_normalising() -> None:
    """Advantages are those of the whole tree; what is left out neither trains nor counts in the mean."""
    made = branch_grpo(width=extremes)
    group = big()
    whole = made.advantage(group)
    (left,) = made.across([group.with_(advantage=whole)])
    assert left.advantage is not None
    assert torch.equal(left.advantage, whole)
    weight = weigh(collate([left]), made.reduce).weight
    assert float(weight.sum()) == pytest.approx(1.0, abs=1e-5)
    assert weight[left.mask].tolist() == pytest.approx([1 / 138] * 138)


def test_the_depth_window_moves_up_and_stops_at_the_last_split() -> None:
    window = DepthWindow(4, every=30)
    seen = {}
    for i in range(400):
        seen.setdefault(tuple(window.steps(20, stop=9)), i)
        window.update([])
    assert seen[16, 17, 18, 19] == 0
    assert seen[15, 16, 17, 18] == 30
    assert list(seen.values()) == [30 * i for i in range(9)]
    assert max(seen, key=lambda steps: seen[steps]) == (8, 9, 10, 11)  # depths 9 to 12
    assert len(seen) == 9


def test_the_window_is_one_memory_of_the_recipe() -> None:
    made = branch_grpo(depth=4, every=2)
    (window,) = made.state
    assert isinstance(made.across, Pruned)
    assert made.across.depth is window
    group = big()
    group = group.with_(advantage=made.advantage(group))
    assert int(made.across([group])[0].mask.sum()) == 218 - 4 * 16
    for _ in range(6):
        window.update([group])
    left = made.across([group])[0].mask
    assert left.any(0).nonzero()[:, 0].tolist() == [*range(13), 17, 18, 19]
    saved = window.state_dict()
    other: Recipe = branch_grpo(depth=4, every=2)
    other.state[0].load_state_dict(saved)
    assert torch.equal(other.across([group])[0].mask, left)
    copy = pickle.loads(pickle.dumps(made))
    assert copy == made
    assert copy.across.depth is copy.state[0]


def test_depth_and_width_together() -> None:
    made = branch_grpo(width=first_half, depth=4)
    (left,) = made.across([big().with_(advantage=torch.zeros(16, 20))])
    assert left.mask.any(0).nonzero()[:, 0].tolist() == [*range(15)]  # the window lies in what is left out anyway


# ---- the recipe


def test_mix_trains_34_of_218_transitions() -> None:
    policy = tiny_flow(steps=20)
    (group,) = branch_grpo_mix().rollout(policy, [task(0)], flow_grading(), torch.Generator().manual_seed(0))
    assert int(group.mask.sum()) == 34
    assert policy.counts["sampled"] == 203
    (later,) = branch_grpo_mix(begin=12).rollout(policy, [task(0)], flow_grading(), torch.Generator().manual_seed(0))
    assert later.mask.any(0).nonzero()[:, 0].tolist() == [0, 3, 6, 9, 12, 13, 14, 15]
    wide = branch_grpo_mix(begin=12, window=2, eta=0.9, clip=1e-5)
    (wide_group,) = wide.rollout(policy, [task(0)], flow_grading(), torch.Generator().manual_seed(0))
    assert wide_group.mask.any(0).nonzero()[:, 0].tolist() == [0, 3, 6, 9, 12, 13]
    assert wide_group.paths[0].prompt.kernel == DanceSDE(0.9)
    assert set(difference(wide, branch_grpo_mix())) == {"rollout", "loss"}


def test_the_window_of_mix_moves_where_that_is_asked() -> None:
    """As MixGRPO's: by `stride` every `tau` iterations, up to the last steps that may be noisy; the splits stay noisy."""
    made = branch_grpo_mix(8, splits=[0, 1, 2], begin=2, window=2, tau=2, stride=3)
    policy = tiny_flow(steps=10)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.01)
    rng, seen = torch.Generator().manual_seed(0), []
    for _ in range(8):
        (group,) = iterate(policy, [task(0)], flow_grading(), made, optimizer, rng).groups
        seen.append(group.mask.any(0).nonzero()[:, 0].tolist())
    assert seen[0::2] == seen[1::2] == [[0, 1, 2, 3], [0, 1, 2, 5, 6], [0, 1, 2, 7, 8], [0, 1, 2, 7, 8]]  # 9 draws nothing
    still = branch_grpo_mix(8, splits=[0, 1, 2], begin=2, window=2)
    assert still.state == ()
    assert still.rollout.noisy(10, rng) == [0, 1, 2, 3]  # type: ignore[attr-defined]
    copy = pickle.loads(pickle.dumps(made))
    assert copy.rollout.noisy.moving is copy.state[0]
    assert copy.rollout.noisy(10, rng) == [0, 1, 2, 7, 8]


def test_what_it_changes() -> None:
    made = recipe("branch-grpo")
    assert set(difference(made, recipe("flow-grpo", clip=1e-3, beta=0.0))) == {"rollout", "advantage", "reduce", "across"}
    assert isinstance(made.rollout, Tree)
    assert made.rollout.splits == EveryThird(4)
    assert EveryThird(4)(20) == EveryThird(4)(11) == (0, 3, 6, 9)
    assert EveryThird(4)(10) == EveryThird(4)(8) == (0, 2, 4, 6)
    assert EveryThird(4)(5) == (0, 1, 2, 3)
    assert made.rollout.n == 16
    assert made.rollout.noise == Correlated(4.0)
    assert set(difference(recipe("branch-grpo-mix"), made)) == {"rollout"}
    biased = recipe("branch-grpo", noise="gruppo.rollouts.tree:Scaled", fuse="gruppo.recipes.branch_grpo:by_edges")
    assert isinstance(biased.rollout, Tree)
    assert biased.rollout.noise == Scaled(4.0)


def test_leaves_and_splits_must_fit() -> None:
    assert branch_grpo(8).rollout.n == 8  # type: ignore[attr-defined]
    assert branch_grpo(9, fan=3).rollout.splits == EveryThird(2)  # type: ignore[attr-defined]
    with pytest.raises(GruppoError, match="paths_per_prompt is 12, but its splits into 2 make 16 leaves"):
        branch_grpo(12)
    with pytest.raises(GruppoError, match="paths_per_prompt is 16, but its splits into 2 make 4 leaves"):
        branch_grpo(splits=[0, 1])
    with pytest.raises(GruppoError, match="every split has 1 children"):
        branch_grpo(fan=1)
    with pytest.raises(GruppoError, match="the depth window is 0 wide"):
        branch_grpo(depth=0)
    with pytest.raises(GruppoError, match="leaves out 20 depths, but a tree of 20 steps has only 20"):
        pruned(big(), Pruned(depth=DepthWindow(20, 1)))
    for begin, window in ((-1, 4), (0, 0)):
        with pytest.raises(GruppoError, match=f"begins at {begin} and has {window} steps"):
            branch_grpo_mix(begin=begin, window=window)
    with pytest.raises(GruppoError, match="is to move by 2 steps, but nothing says when"):
        branch_grpo_mix(stride=2)
    with pytest.raises(GruppoError, match="is to stay 0 iterations at every start"):
        branch_grpo_mix(tau=0)
    with pytest.raises(GruppoError, match="begins at 12, but the grid has only the steps 0 to 9"):
        grown(branch_grpo_mix(begin=12, tau=3).rollout, 10)  # type: ignore[arg-type]
    with pytest.raises(GruppoError, match="begins at 12, but the grid has only the steps 0 to 9"):
        grown(branch_grpo_mix(begin=12).rollout, 10)  # type: ignore[arg-type]
    with pytest.raises(GruppoError, match="is to split 4 times, but a grid of 4 steps has room for 3"):
        grown(branch_grpo().rollout, 4)  # type: ignore[arg-type]
