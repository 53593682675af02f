"""The flow policy: what it samples it reads back, however batches are cut, and it computes nothing twice."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gruppo.core.collate import collate
from gruppo.policies import flow
from gruppo.policies.flow import CFG, Course, FlowPolicy, key_of, shared
from gruppo.policies.kernels import CPS, DDIM, DanceSDE, DPMSolver2M, FlowSDE
from gruppo.policies.reference import Average
from gruppo.recipes.golden_flow import FlowDraw, Points, flow_grading, tiny_flow
from gruppo.rollouts import Trajectories
from gruppo.rollouts.trajectories import but_last
from gruppo.types import Batch, Group, GruppoError, Path, Task


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def groups_of(policy: FlowPolicy, prompts: int = 3, **numbers) -> list[Group]:
    found = Trajectories(4, **numbers)(policy, FlowDraw(0, 0, [0]).more(prompts), flow_grading(), rng())
    return [g.with_(advantage=torch.ones(len(g), g.width)) for g in found]


def batch_of(policy: FlowPolicy, **numbers) -> Batch:
    return collate(groups_of(policy, **numbers))


@pytest.mark.parametrize("kernel", [FlowSDE(), DanceSDE(), CPS()])
def test_the_trainer_reads_what_the_sampler_drew(kernel) -> None:
    policy = tiny_flow()
    batch = batch_of(policy, kernel=kernel)
    now = policy.evaluate(batch)
    assert batch.mask.any()
    torch.testing.assert_close(now.logp * batch.mask, batch.logp_sampler, atol=1e-5, rtol=0)
    for path, logp in zip(batch.paths, policy.score(batch.paths)):
        torch.testing.assert_close(logp, path.logp, atol=1e-5, rtol=0)


def test_the_log_probability_is_that_of_a_gaussian_around_the_reported_mean() -> None:
    policy = tiny_flow()
    batch = batch_of(policy)
    now = policy.evaluate(batch)
    assert now.mean is not None
    assert now.std is not None
    after = torch.stack([p.steps[1:] for p in batch.paths])
    by_hand = torch.distributions.Normal(now.mean, now.std.expand_as(now.mean)).log_prob(after).mean(2)
    torch.testing.assert_close(now.logp[batch.mask], by_hand[batch.mask], atol=1e-5, rtol=0)


def test_what_is_not_trained_is_not_computed() -> None:
    policy = tiny_flow()
    batch = batch_of(policy)
    mask = torch.zeros_like(batch.mask)
    mask[1, 2] = mask[5, 0] = True
    policy.counts.clear()
    now = policy.evaluate(batch.with_(mask=mask))
    assert policy.counts["forwards"] == policy.counts["trained"] == 2
    assert not now.logp[~mask].any()


def test_rows_at_one_latent_share_a_call_and_its_gradient() -> None:
    """All paths of a prompt begin at the same noise, so their first steps need one call per prompt."""
    policy = tiny_flow()
    batch = batch_of(policy, shared_noise=True)
    first = torch.zeros_like(batch.mask)
    first[:, 0] = True
    batch = batch.with_(mask=first)
    policy.counts.clear()
    policy.evaluate(batch).logp.sum().backward()
    together = [p.grad.clone() for p in policy.parameters() if p.grad is not None]
    assert policy.counts["forwards"] == 3
    assert policy.counts["trained"] == 12
    for p in policy.parameters():
        p.grad = None
    for i in range(len(batch)):
        policy.evaluate(batch.rows([i])).logp.sum().backward()
    for a, p in zip(together, policy.parameters()):
        assert p.grad is not None
        torch.testing.assert_close(a, p.grad, atol=1e-4, rtol=1e-4)


def test_equal_latents_under_other_prompts_or_noise_levels_share_nothing() -> None:
    policy = tiny_flow()
    path = groups_of(policy)[0].paths[0]
    other = replace(path, prompt=replace(path.prompt, prompt="d"))
    later = replace(path, prompt=replace(path.prompt, sigmas=path.prompt.sigmas * 0.9))
    assert shared([(path, 1), (other, 1), (later, 1), (path, 1)]) == ([0, 1, 2], [0, 1, 2, 0])


@pytest.mark.parametrize("scope", ["step", "path", "group"])
@pytest.mark.parametrize("size", [1, 3, 7, 10**6])
def test_split_covers_every_trained_step_once(scope, size) -> None:
    policy = tiny_flow()
    batch = batch_of(policy, shared_noise=True)
    seen = torch.zeros_like(batch.mask, dtype=torch.long)
    row = {id(p): i for i, p in enumerate(batch.paths)}
    for part in policy.split(batch, scope, size):
        for r, path in enumerate(part.paths):
            seen[row[id(path)], : part.mask.shape[1]] += part.mask[r]
        if scope == "group":
            whole = {i: int((batch.mask & (batch.group == i)[:, None]).sum()) for i in part.group.unique().tolist()}
            assert {i: int(part.mask[part.group == i].sum()) for i in whole} == whole
    assert torch.equal(seen, batch.mask.long())


def test_blocks_stay_within_their_budget_of_calls() -> None:
    policy = tiny_flow()
    batch = batch_of(policy)
    policy.counts.clear()
    for part in policy.split(batch, "step", 5):
        before = policy.counts["forwards"]
        policy.evaluate(part)
        assert policy.counts["forwards"] - before <= 5


def test_guidance_costs_two_rows_per_call_and_mixes_both_branches() -> None:
    plain, guided = tiny_flow(), tiny_flow(cfg=CFG(3.0, negative="d"))
    x, sigma = torch.randn(2, 2, generator=rng()), torch.tensor([0.9, 0.5])
    with torch.no_grad():
        c, u = (plain.velocity(x, sigma, [p] * 2, counted="sampled") for p in "ad")
        torch.testing.assert_close(guided.velocity(x, sigma, ["a"] * 2, counted="sampled"), u + 3 * (c - u))


def test_a_detached_branch_gives_another_gradient_but_the_same_value() -> None:
    x, sigma = torch.randn(2, 2, generator=rng()), torch.tensor([0.9, 0.5])
    values, gradients = [], []
    for detach in (False, True):
        policy = tiny_flow(cfg=CFG(3.0, detach, negative="d"))
        v = policy.velocity(x, sigma, ["a"] * 2, counted="forwards")
        v.sum().backward()
        values.append(v.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]))
    torch.testing.assert_close(*values)
    plain = tiny_flow()
    plain.velocity(x, sigma, ["a"] * 2, counted="forwards").sum().backward()
    conditional = torch.cat([p.grad.flatten() for p in plain.parameters() if p.grad is not None])
    torch.testing.assert_close(gradients[1], 3 * conditional)
    assert not torch.allclose(gradients[0], gradients[1])


def test_a_rescaled_guidance_has_the_conditional_norm() -> None:
    c, u = torch.randn(3, 4, generator=rng()), torch.randn(3, 4, generator=rng(1))
    torch.testing.assert_close(CFG(5.0, rescale=True)(c, u).norm(dim=-1), c.norm(dim=-1))


def test_prompts_are_encoded_once() -> None:
    policy = tiny_flow()
    groups_of(policy)
    groups_of(policy)
    assert policy.counts["encoded"] == 3


def test_prompts_that_are_no_strings_are_told_apart_by_what_they_hold() -> None:
    """Printed, large tensors are cut short, and pictures are addresses that the next picture may get."""
    big, other = torch.zeros(2000), torch.zeros(2000)
    other[1000] = 1.0
    red, blue = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue")
    prompts: list[Any] = [
        "a", "{'text': 'a'}", {"text": "a"}, {"text": "b"}, ["a"], ("a",), big, other, big.double(), red, blue,
        {"text": "a", "image": red}, {"text": "a", "image": blue}, np.zeros(2000), other.numpy(), 1, True, None,
    ]  # fmt: skip
    assert len({key_of(p) for p in prompts}) == len(prompts)
    assert key_of({"image": red, "text": "a"}) == key_of({"text": "a", "image": red.copy()})
    assert key_of(big) == key_of(big.clone())
    with pytest.raises(GruppoError, match="a prompt holds a set"):
        key_of({"words": {1, 2}})


class Pictured(Points):
    """Prompts are mappings with a tensor; what the network is told is its first number."""

    def encode(self, prompts: list[Any]) -> list[Any]:
        return [p["goal"][-4:] for p in prompts]


def test_prompts_with_tensors_are_encoded_once_and_share_no_calls() -> None:
    policy = FlowPolicy(Pictured(), steps=3)
    goals = [torch.zeros(2000), torch.zeros(2000)]
    goals[1][-1] = 1.0
    tasks = [Task({"goal": goal}) for goal in goals]
    groups = Trajectories(2, shared_noise=True)(policy, tasks, lambda groups: groups, rng())
    assert policy.counts["encoded"] == 2
    same = [replace(p, steps=groups[0].paths[0].steps) for g in groups for p in g.paths]
    assert shared([(p, 0) for p in same]) == ([0, 2], [0, 0, 1, 1])
    again = policy.conditions([{"goal": goals[1].clone()}])
    assert policy.counts["encoded"] == 2
    assert again[0].tolist() == [0, 0, 0, 1]


def test_an_endless_stream_of_prompts_is_forgotten_by_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow, "KEPT", 3 * 16)  # three conditions of four numbers
    policy = tiny_flow()
    for _ in range(2):
        policy.conditions(["a", "b", "c"])
    assert policy.counts["encoded"] == 3
    told = policy.conditions(["b", "d"])  # the fourth is one too many: what this call does not need goes
    assert [c.tolist() for c in told] == [[0, 1, 0, 0], [0, 0, 0, 1]]
    policy.conditions(["b", "d"])
    assert policy.counts["encoded"] == 4
    policy.conditions(["a"])
    assert policy.counts["encoded"] == 5


def test_a_moving_average_is_a_reference_of_a_flow() -> None:
    policy = tiny_flow()
    batch = batch_of(policy)
    average = Average(0.5)(policy)
    with torch.no_grad():
        before = policy.evaluate(batch).logp
        for p in policy.parameters():
            p.add_(0.1)
        after = policy.evaluate(batch).logp
    assert torch.equal(average.evaluate(batch).logp, before)
    average.update([])
    half = tiny_flow()
    with torch.no_grad():
        for p in half.parameters():
            p.add_(0.05)
        torch.testing.assert_close(average.evaluate(batch).logp, half.evaluate(batch).logp)
        assert torch.equal(policy.evaluate(batch).logp, after)


def test_a_deterministic_step_is_never_trained() -> None:
    policy = tiny_flow()
    groups = groups_of(policy, noisy=but_last)
    path = groups[0].paths[0]
    wrong = replace(path, mask=torch.ones_like(path.mask))
    with pytest.raises(GruppoError, match=r"step 5 of a path is to be trained, but it draws no noise"):
        policy.evaluate(collate([groups[0].with_(paths=[wrong, *groups[0].paths[1:]])]))


def test_two_kernels_in_one_batch_are_refused() -> None:
    policy = tiny_flow()
    both = [groups_of(policy, kernel=k)[0] for k in (FlowSDE(0.7), FlowSDE(0.8))]
    with pytest.raises(GruppoError, match="different kernels"):
        policy.evaluate(collate(both))


def test_a_noisy_walk_without_a_generator_is_refused() -> None:
    policy = tiny_flow()
    with pytest.raises(GruppoError, match="draws noise, but the walk got no generator"):
        policy.walk(policy.noise(1, rng()), [Course.of("a", policy.sigmas, FlowSDE())], 0, 1)


def test_the_solver_looks_back_over_the_legs_of_a_walk() -> None:
    """A walk cut in two goes on with the history of the first leg: the same as by hand, and other than without it."""
    policy, solver = tiny_flow(steps=5), DPMSolver2M()
    course = [Course.of("a", policy.sigmas, FlowSDE(), ())]
    x = start = policy.noise(2, rng())
    S, history = policy.sigmas.float(), []
    with torch.no_grad():
        for t in range(5):
            v = policy.velocity(x, S[t].expand(2), ["a", "a"], counted="sampled")
            history = [*history, (float(S[t]), x - S[t] * v)]
            x = solver(x, history, float(S[t + 1]))
    first = policy.walk(start, course, 0, 3, solver=solver)
    torch.testing.assert_close(policy.walk(first.last, course, 3, 5, solver=solver, history=first.history).last, x)
    assert not torch.allclose(policy.walk(first.last, course, 3, 5, solver=solver).last, x)


def test_a_solver_takes_no_step_for_latents_on_different_grids() -> None:
    policy = tiny_flow()
    course = Course.of("a", policy.sigmas, FlowSDE(), [0])
    for other in (replace(course, sigmas=course.sigmas * 0.9), Course.of("a", policy.sigmas, FlowSDE(), [1])):
        with pytest.raises(GruppoError, match="different grids or different noisy steps"):
            policy.walk(policy.noise(2, rng()), [course, other], 0, 6, g=rng(), solver=DPMSolver2M())
        apart = policy.walk(policy.noise(2, rng()), [course, other], 0, 6, noise=torch.ones(2, 6, 2))
        alone = policy.walk(policy.noise(2, rng())[1:], [other], 0, 6, noise=torch.ones(1, 6, 2))
        torch.testing.assert_close(apart.x[1:], alone.x)  # without one every latent walks along its own course
        torch.testing.assert_close(apart.logp[1:], alone.logp)


def test_latents_are_kept_where_they_are_asked_for() -> None:
    policy = tiny_flow()
    course, x = [Course.of("a", policy.sigmas, FlowSDE())], policy.noise(2, rng())
    whole = policy.walk(x, course, 0, 6, g=rng(), means=True)
    short = policy.walk(x, course, 0, 6, g=rng(), trail=False)
    assert whole.x.shape == (2, 7, 2)
    assert whole.mean is not None
    assert whole.mean.shape == (2, 6, 2)
    assert short.mean is None
    assert torch.equal(short.x, whole.x[:, -1:])
    assert torch.equal(short.last, whole.x[:, -1])
    assert [len(p.steps) for p in policy.sample(["a"], g=rng())] == [1]


def test_evaluation_paints_without_noise_and_trains_nothing() -> None:
    policy = FlowPolicy(Points(), steps=4, eval_steps=9)
    paths = policy.sample(["a", "b"], g=rng())
    assert [len(p) for p in paths] == [9, 9]
    assert not any(p.mask.any() for p in paths)
    assert policy.counts["evaluated"] == 18


def test_a_course_names_its_noisy_steps() -> None:
    S = tiny_flow().sigmas
    assert Course.of("a", S, FlowSDE(), [1, 2]).stochastic.tolist() == [False, True, True, False, False, False]
    assert Course.of("a", S, CPS()).stochastic.tolist() == [True] * 5 + [False]  # the step to the picture draws nothing
    with pytest.raises(GruppoError, match="step 6 is to be noisy"):
        Course.of("a", S, FlowSDE(), [6])


def test_latents_that_begin_alike_share_nothing() -> None:
    """Only equal latents share a call: the first numbers of two of them may agree."""
    S = torch.tensor([0.9, 0.5, 0.0], dtype=torch.float64)
    course = Course.of("a", S, FlowSDE())
    one = torch.zeros(3, 6)
    two = one.clone()
    two[:, 5] = 1.0
    paths = [Path(course, x, torch.zeros(2), torch.ones(2, dtype=torch.bool)) for x in (one, two, one.clone())]
    assert shared([(p, 0) for p in paths]) == ([0, 1], [0, 1, 0])


def test_a_step_with_a_level_that_lands_on_the_picture_draws_nothing() -> None:
    course = Course.of("a", torch.tensor([0.9, 0.5, 0.0], dtype=torch.float64), DDIM())
    assert course.levels.tolist() == [1.0, 1.0]
    assert course.stochastic.tolist() == [True, False]
