"""Branches at one step and trees: what they cost, that a path is the walk it says it is, and that each trains its own step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tests.rollouts.painting import Written, grown, steady, written

from gruppo.core.collate import collate
from gruppo.core.reduce import step_mean, weigh
from gruppo.core.tree import owners
from gruppo.policies.flow import Course, FlowPolicy
from gruppo.policies.kernels import CPS, DDIM, DanceSDE, FlowSDE
from gruppo.policies.schedules import linear
from gruppo.recipes.golden_flow import QUADRANTS, flow_grading, task, tiny_flow
from gruppo.rollouts.branching import Branches, by_prompt, first_half, visits
from gruppo.rollouts.trajectories import everywhere
from gruppo.rollouts.tree import AtSplits, Correlated, Scaled, Tree
from gruppo.types import Group, GruppoError, Task


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def forwards(policy: FlowPolicy, groups: list[Group]) -> int:
    """Network calls with gradient that one optimizer step on these groups needs."""
    groups = [g.with_(advantage=torch.ones(len(g), g.width)) for g in groups]
    policy.counts.clear()
    for part in policy.split(weigh(collate(groups), step_mean), "step", 10**9):
        policy.evaluate(part)
    return policy.counts["forwards"]


# ---- where endings go


@pytest.mark.parametrize(
    ("k", "stride", "nodes"),
    [
        (0, 1, [*range(1, 17)]),
        (0, 2, [1, 2, 4, 6, 8, 10, 12, 14, 16]),
        (1, 2, [2, 3, 5, 7, 9, 11, 13, 16]),  # point 15 is given up: the picture is x0_hat of point 13
        (0, 3, [1, 2, 5, 8, 11, 16]),
        (6, 2, [7, 8, 10, 12, 14, 16]),
        (7, 3, [8, 9, 12, 16]),
        (13, 3, [14, 16]),  # so coarse that only the jump is left
        (14, 3, [15, 16]),
        (15, 2, [16]),
    ],
)
def test_points_of_an_ending(k: int, stride: int, nodes: list[int]) -> None:
    assert visits(k, 16, stride) == nodes


def test_a_missed_picture_is_what_the_network_expects() -> None:
    """v = x - 1 at x = 2 on S[13] = .4090909: the picture is 2 - .4090909, not the step to S[15], which would be 1.7575758."""
    S = linear(16, 3.0)
    assert float(S[13]) == pytest.approx(0.4090909)
    found = Branches(2).still(torch.tensor([[2.0]]), torch.tensor([[1.0]]), S[13].float(), S[visits(1, 16, 2)[-1]].float())
    assert float(found) == pytest.approx(1.5909091)
    assert float(2 + (S[15] - S[13])) == pytest.approx(1.7575758)
    groups = Branches(3, branched=lambda T, g: [1], strides=(2,))(
        written(lambda x: x - 1, S.tolist()), [Task("a")], lambda groups: groups, rng()
    )
    for path in groups[0].paths:
        assert path.prompt.sigmas.tolist() == S[[0, 1, 2, 3, 5, 7, 9, 11, 13, 16]].tolist()
        at_13 = path.steps[-2]
        assert torch.allclose(path.steps[-1], at_13 - float(S[13]) * (at_13 - 1), atol=1e-6)
        assert path.output == tuple(path.steps[-1].tolist())


# ---- what it costs


def test_branches_of_ten_steps_cost_279_calls_per_seed() -> None:
    policy, groups = grown(Branches(6), 10)
    assert policy.counts["sampled"] == 9 + 6 * sum(range(1, 10)) == 279
    assert policy.counts["decoded"] == 54
    assert [int(g.mask[0].nonzero()) for g in groups] == [*range(9)]
    assert forwards(policy, groups) == 9  # 54 trained steps, one call per anchor
    policy, groups = grown(Branches(6, seeds=4), 10)
    assert policy.counts["sampled"] == 1116
    assert len(groups) == 36
    assert forwards(policy, groups) == 36


@pytest.mark.parametrize(("strides", "alone", "here"), [((1,), 1120, 1112), ((1, 2), 1696, 1496), ((1, 2, 3), 2092, 1700)])
def test_endings_of_several_granularities(strides: tuple[int, ...], alone: int, here: int) -> None:
    """`alone` is the cost when the anchor is painted to its end and every ending walks by itself, as the reference code does."""
    endings = sum(len(visits(k, 16, s)) - 1 for k in range(8) for s in strides)
    assert 16 + 12 * endings == alone
    policy, groups = grown(Branches(12, branched=first_half, strides=strides), 16)
    # 8 calls of the anchor are nobody's; points k + 1 and k + 2 belong to every granularity
    assert policy.counts["sampled"] == alone - 8 - 12 * 8 * 2 * (len(strides) - 1) == here
    assert policy.counts["decoded"] == 12 * 8 * len(strides)
    assert forwards(policy, groups) == 8


def test_everything_at_one_point_of_the_grid_walks_together() -> None:
    policy = written(steady, linear(16, 3.0).tolist(), FlowPolicy)
    policy.rows = 10**6
    Branches(4, branched=first_half, seeds=2, strides=(1, 2, 3))(policy, [Task("a"), Task("b")], lambda groups: groups, rng())
    assert isinstance(policy.painter, Written)
    assert policy.painter.calls == 16
    policy.painter.calls = 0
    Tree((0, 3, 6, 9))(policy, [Task("a"), Task("b")], lambda groups: groups, rng())
    assert policy.painter.calls == 16


# ---- what a path is


@pytest.mark.parametrize("strides", [(1,), (2, 1), (3,)])
def test_paths_are_the_walks_they_say_they_are(strides: tuple[int, ...]) -> None:
    """Re-walked along its own course, a path gives its own latents; the noisy step's log-probability is the policy's."""
    policy, groups = grown(Branches(3, branched=first_half, seeds=2, strides=strides), 9, prompts=2)
    assert len(groups) == 2 * 2 * 4
    for group, (i, k) in zip(groups, [(i, k) for i in range(2) for _ in range(2) for k in range(4)]):
        assert group.task.prompt == task(i).prompt
        for path in group.paths:
            course: Course = path.prompt
            assert course.prompt == group.task.prompt
            assert path.mask.nonzero()[:, 0].tolist() == [k] == course.stochastic.nonzero()[:, 0].tolist()
            still = Course(course.prompt, course.kernel, course.sigmas, torch.zeros_like(course.levels))
            assert torch.allclose(policy.walk(path.steps[:1], [still], 0, k).last[0], path.steps[k], atol=1e-5)
            end = policy.walk(path.steps[k + 1 : k + 2], [still], k + 1, len(path)).x[0]
            assert torch.allclose(end, path.steps[k + 1 :], atol=1e-5)
            assert torch.allclose(policy.score([path])[0], path.logp, atol=1e-5)
            assert path.output == pytest.approx(tuple(path.steps[-1].tolist()))
        children = torch.stack([p.steps[k + 1] for p in group.paths])
        assert len(children.unique(dim=0)) == 3
        assert len(torch.stack([p.steps[k] for p in group.paths]).unique(dim=0)) == 1


def test_a_reward_belongs_to_the_step_that_branched() -> None:
    """What the grader says of a group is said of the pictures that this group's step led to."""
    _, groups = grown(Branches(4, seeds=2), 6, prompts=2)
    for group in groups:
        goal = torch.tensor(QUADRANTS[group.task.prompt])
        ends = torch.stack([p.steps[-1] for p in group.paths])
        assert torch.allclose(group.signals["near"], -(ends - goal).square().sum(1), atol=1e-5)


def test_views_are_judged_by_themselves_in_one_call() -> None:
    calls: list[int] = []
    grade = flow_grading()

    def counted(groups: list[Group]) -> list[Group]:
        calls.append(len(groups))
        return grade(groups)

    policy = tiny_flow(steps=8)
    groups = Branches(3, branched=first_half, strides=(1, 2, 3))(policy, [task(0)], counted, rng())
    assert calls == [3 * 4]
    S, goal = policy.sigmas, torch.tensor(QUADRANTS["a"])
    for k, group in enumerate(groups):
        for stride in (1, 2, 3):
            nodes = [*range(k + 1), *visits(k, 8, stride)]
            course = Course.of("a", S[nodes], FlowSDE(), ())
            ends = policy.walk(torch.stack([p.steps[k + 1] for p in group.paths]), [course], k + 1, len(course)).last
            name = "near" if stride == 1 else f"near@{stride}"
            assert torch.allclose(group.signals[name], -(ends - goal).square().sum(1), atol=1e-4)
        assert not torch.allclose(group.signals["near"], group.signals["near@3"], atol=1e-3)


def test_groups_of_a_seed_and_of_a_prompt() -> None:
    _, alone = grown(Branches(3, seeds=2), 4)
    _, pooled = grown(Branches(3, seeds=2, compared=by_prompt), 4)
    assert [len(g) for g in alone] == [3] * 6
    assert [len(g) for g in pooled] == [6] * 3
    assert all([p.fork for p in g.paths] == [None, (0, k), (0, k)] for g, k in zip(alone, (0, 1, 2, 0, 1, 2)))
    for k, g in enumerate(pooled):
        assert [p.fork for p in g.paths] == [None, (0, k), (0, k), None, (3, k), (3, k)]
        assert torch.equal(g.paths[0].steps, alone[k].paths[0].steps)
        assert torch.equal(g.paths[3].steps, alone[3 + k].paths[0].steps)
        assert not torch.equal(g.paths[0].steps[0], g.paths[3].steps[0])
    assert [len(g) for g in grown(Branches(1, seeds=3, compared=by_prompt), 4)[1]] == [3] * 3


def test_children_of_one_latent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four children of x = [.5, -1] from .9 to .8 at eta .7."""
    eps = torch.tensor([[1, -0.5], [-1, 0.25], [0, 0], [0.5, 1.5]])
    monkeypatch.setattr(torch, "randn", lambda *shape, generator: eps)
    policy = written(steady, [0.9, 0.8, 0.0])
    (group,) = Branches(4)(policy, [Task("a")], lambda groups: groups, rng())
    assert float(group.paths[0].prompt.deviations[0]) == pytest.approx(0.6640783086)
    found = torch.stack([p.steps[1] for p in group.paths])
    expected = [[1.01667831, -1.13683915], [-0.31147831, -0.63878042], [0.3526, -0.8048], [0.68463915, 0.19131746]]
    assert torch.allclose(found, torch.tensor(expected), atol=1e-6)
    logp = torch.tensor([-0.8220833314, -0.7752083314, -0.5095833314, -1.1345833314])
    assert torch.allclose(group.logp[:, 0], logp, atol=1e-6)


@pytest.mark.parametrize(
    ("made", "sentence"),
    [
        (lambda: Branches(1), "the group of a step would hold 1"),
        (lambda: Branches(4, seeds=0), "0 trunks per prompt"),
        (lambda: Branches(4, strides=(1, 1)), r"the strides are \(1, 1\)"),
        (lambda: Branches(4, strides=()), r"the strides are \(\)"),
        (lambda: grown(Branches(4, CPS(), everywhere), 4), r"of the grid's 4 steps only \[0, 1, 2\] draw noise"),
        (lambda: grown(Branches(4, DDIM()), 4), "the kernel is DDIM, but this network predicts velocity"),
        (lambda: grown(Branches(4, branched=lambda T, g: []), 4), r"the steps \[\] are to branch"),
        (lambda: Tree(()), "at least one step"),
        (lambda: Tree((3, 0)), "in ascending order"),
        (lambda: Tree((0, 1), fan=1), "splits into 1"),
        (lambda: grown(Tree((0, 4)), 4), r"splits at step 4, but of the grid's 4 steps only \[0, 1, 2\] draw noise"),
        (lambda: grown(Tree((0, 3)), 4), "splits at step 3"),  # the last step draws nothing
        (lambda: grown(Tree((0, 1), noisy=lambda T, g: [0]), 4), "splits at step 1"),
        (lambda: Correlated(0.0), "the noise of a split has the strength 0.0"),
        (lambda: Scaled(-1.0), "the noise of a split has the strength -1.0"),
    ],
)
def test_refusals(made: Any, sentence: str) -> None:
    with pytest.raises(GruppoError, match=sentence):
        made()


# ---- trees


@pytest.mark.parametrize(
    ("splits", "calls"), [((0, 3, 6, 9), 203), ((0, 1, 2, 3), 271), ((3, 6, 9, 12), 158), ((10, 11, 12, 13), 121)]
)
def test_a_tree_computes_what_is_shared_once(splits: tuple[int, ...], calls: int) -> None:
    policy, (group,) = grown(Tree(splits, noisy=everywhere), 20)
    assert policy.counts["sampled"] == calls < 16 * 20
    edges = group.edges()
    assert int(group.mask.sum()) == len(edges.unique()) == calls - 1 + 16  # every node but the root has one transition into it
    assert forwards(policy, [group]) == calls


def test_nodes_per_depth() -> None:
    _, (group,) = grown(Tree((0, 3, 6, 9), noisy=everywhere), 20)
    nodes = [len(torch.stack([p.steps[d] for p in group.paths]).unique(dim=0)) for d in range(21)]
    assert nodes == [1, 2, 2, 2, 4, 4, 4, 8, 8, 8, *[16] * 11]
    assert sum(nodes) == 219
    assert int(group.mask.sum()) == 218
    _, (quiet,) = grown(Tree((0, 3, 6, 9)), 20)  # the last step draws nothing and is not trained
    assert int(quiet.mask.sum()) == 202
    assert not bool(quiet.mask[:, 19].any())


def test_forks_say_what_is_shared() -> None:
    policy, groups = grown(Tree((0, 2, 3), fan=3), 6, prompts=2)
    for i, group in enumerate(groups):
        assert group.task.prompt == task(i).prompt
        edges = group.edges()
        assert torch.equal(group.mask, owners(edges, torch.stack([p.prompt.stochastic for p in group.paths])))
        for a in range(27):
            for b in range(a):
                for t in range(6):
                    same = torch.equal(group.paths[a].steps[: t + 2], group.paths[b].steps[: t + 2])
                    assert bool(edges[a, t] == edges[b, t]) == same
        for path, logp in zip(group.paths, policy.score(group.paths)):
            assert torch.allclose(path.logp, logp, atol=1e-4)
            assert path.output == pytest.approx(tuple(path.steps[-1].tolist()))
        ends = torch.stack([p.steps[-1] for p in group.paths])
        near = -(ends - torch.tensor(QUADRANTS[group.task.prompt])).square().sum(1)
        assert torch.allclose(group.signals["near"], near, atol=1e-5)


def test_the_last_picture_has_no_noise_on_it() -> None:
    policy, (group,) = grown(Tree((0, 1)), 4)
    course: Course = group.paths[0].prompt
    for path in group.paths:
        v = policy.velocity(path.steps[3:4], course.sigmas[3:4].float(), [course.prompt], counted="sampled")
        assert torch.allclose(path.steps[4], course.kernel.clean(path.steps[3:4], v, course.sigmas[3:4].float())[0], atol=1e-5)


@pytest.mark.parametrize(("rollout", "starts"), [(Tree((0, 1)), 3), (Branches(3, seeds=2), 6)])
def test_every_tree_and_every_trunk_begins_at_a_noise_of_its_own(rollout: Any, starts: int) -> None:
    _, groups = grown(rollout, 4, prompts=3)
    assert len(torch.stack([p.steps[0] for g in groups for p in g.paths]).unique(dim=0)) == starts


def test_nothing_else_is_shared() -> None:
    """Prompts, trunks, nodes and rows draw noise of their own: only siblings have a part in common."""
    policy = written(steady, [0.9, 0.8, 0.7, 0.0])
    groups = Tree((0, 1))(policy, [Task("a"), Task("b")], lambda groups: groups, rng())
    for t in (0, 1):
        drawn = torch.stack([p.steps[t + 1] - p.steps[t] for g in groups for p in g.paths])
        assert len(drawn.unique(dim=0)) == (4, 8)[t]
    groups = Branches(3, seeds=2)(policy, [Task("a"), Task("b")], lambda groups: groups, rng())
    for k in (0, 1):
        drawn = torch.stack([p.steps[k + 1] - p.steps[k] for g in groups for p in g.paths if bool(p.mask[k])])
        assert len(drawn.unique(dim=0)) == 12
    (group,) = Tree((0,))(policy, [Task("a")], lambda groups: groups, rng())
    later = torch.stack([p.steps[2] - p.steps[1] for p in group.paths])  # a step without a split
    assert (later[0] - later[1]).abs().min() > 1e-2
    twins = Correlated(0.1)(50, 2, (3,), rng())
    assert (twins[:, 0] - twins[:, 1]).abs().mean() < 0.2  # nearly all in common
    assert twins[:, 0].std(0).min() > 0.5  # but not from node to node
    far = Correlated(100.0)(50, 2, (3,), rng())
    assert far[:, 0].std(0).min() > 0.5


def test_split_noise() -> None:
    noise = Correlated(4.0)
    both = noise.blend(torch.tensor(0.5), torch.tensor([1.0, -1.0]))
    assert both.tolist() == pytest.approx([1.0914103127, -0.8488746876])
    drawn = noise(20000, 2, (3,), rng())
    assert float(drawn.std()) == pytest.approx(1.0, abs=0.01)
    flat = drawn.transpose(0, 1).flatten(1)
    assert float(torch.corrcoef(flat)[0, 1]) == pytest.approx(1 / 17, abs=0.01)
    twins = Correlated(0.5)(20000, 2, (3,), rng()).transpose(0, 1).flatten(1)
    assert float(torch.corrcoef(twins)[0, 1]) == pytest.approx(0.8, abs=0.01)
    assert float(Scaled(4.0)(20000, 2, (3,), rng()).std()) == pytest.approx(4.0, abs=0.03)


@dataclass(frozen=True)
class Given:
    """The same noise for every child."""

    eps: tuple[float, float]

    def __call__(self, nodes: int, children: int, shape: Any, g: torch.Generator) -> torch.Tensor:
        return torch.tensor(self.eps).expand(nodes, children, 2)


@pytest.mark.parametrize(
    ("eps", "after", "logp"),
    [((1.0, -0.5), [0.5880890786, -1.1367320393], 0.7772532273), ((4.0, -2.0), [0.990581, -1.337978], -3.9102467727)],
)
def test_a_split_step_of_dance(eps: tuple[float, float], after: list[float], logp: float) -> None:
    """From .8 to .6 at eta .3; noise scaled fourfold is 4.6875 less likely under the step's Gaussian."""
    policy = written(steady, [0.8, 0.6, 0.0])
    (group,) = Tree((0,), kernel=DanceSDE(0.3), noise=Given(eps))(policy, [Task("a")], lambda groups: groups, rng())
    for path in group.paths:
        assert path.steps[1].tolist() == pytest.approx(after, abs=1e-6)
        assert float(path.logp[0]) == pytest.approx(logp, abs=1e-5)


def test_log_probabilities_of_split_noise() -> None:
    """Unit-variance noise has the entropy of its Gaussian; scaled noise lies (16 - 1) / 2 below it, per element, on average."""
    policy = written(steady, [0.8, 0.6, 0.0])
    mean: dict[Any, float] = {}
    for noise in (Correlated(4.0), Scaled(4.0)):
        groups = Tree((0,), noise=noise)(policy, [Task("a")] * 800, lambda groups: groups, rng())
        mean[noise] = float(torch.cat([g.logp[:, 0] for g in groups]).mean())
    sd = 0.3 * math.sqrt(0.2)
    entropy = -0.5 - math.log(sd) - 0.5 * math.log(2 * math.pi)
    assert mean[Correlated(4.0)] == pytest.approx(entropy, abs=0.06)
    assert mean[Scaled(4.0)] - entropy == pytest.approx(-7.5, abs=0.8)


def test_noise_at_splits_and_in_a_window() -> None:
    splits = (0, 3, 6, 9)
    assert AtSplits(splits)(20, rng()) == [0, 1, 2, 3, 6, 9]
    policy, (group,) = grown(Tree(splits, noisy=AtSplits(splits)), 20)
    assert int(group.mask.sum()) == 2 + 2 + 2 + 4 + 8 + 16 == 34
    assert group.mask.any(0).nonzero()[:, 0].tolist() == [0, 1, 2, 3, 6, 9]
    assert policy.counts["sampled"] == 203
    assert forwards(policy, [group]) == 1 + 2 + 2 + 2 + 4 + 8
    assert not bool(group.logp[:, [4, 5, 7, 8, *range(10, 20)]].any())
