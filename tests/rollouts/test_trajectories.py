"""Trajectories, windows and compressed tails, with the published window sequences."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from gruppo.policies.kernels import DPMSolver2M
from gruppo.recipes.golden_flow import FlowDraw, flow_grading, tiny_flow
from gruppo.rollouts import Trajectories
from gruppo.rollouts.trajectories import First, RandomShare, Share, but_last, everywhere
from gruppo.rollouts.window import CompressedTail, Constant, ExponentialDecay, LinearDecay, RandomWindow, Window
from gruppo.types import GruppoError


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def groups_of(policy, prompts: int = 2, n: int = 4, **numbers):
    return Trajectories(n, **numbers)(policy, FlowDraw(0, 0, [0]).more(prompts), flow_grading(), rng())


def shifted(T: int, shift: float = 3.0) -> torch.Tensor:
    t = torch.linspace(1, 0, T + 1, dtype=torch.float64)
    return shift * t / (1 + (shift - 1) * t)


# -- trajectories


def test_paths_begin_at_one_noise_or_at_their_own() -> None:
    for shared_noise in (True, False):
        for group in groups_of(tiny_flow(), shared_noise=shared_noise):
            starts = torch.stack([p.steps[0] for p in group.paths])
            assert bool((starts == starts[0]).all()) == shared_noise
            assert [p.fork for p in group.paths] == ([None, *[(0, 0)] * 3] if shared_noise else [None] * 4)


def test_prompts_do_not_share_their_noise() -> None:
    a, b = groups_of(tiny_flow(), shared_noise=True)
    assert not torch.equal(a.paths[0].steps[0], b.paths[0].steps[0])


def test_the_last_step_without_noise_is_what_the_network_expects() -> None:
    """x0_hat of the last call: the picture that DanceGRPO decodes."""
    policy = tiny_flow()
    path = groups_of(policy, noisy=but_last)[0].paths[0]
    with torch.no_grad():
        sigma = policy.sigmas[-2:-1].float()
        v = policy.velocity(path.steps[-2][None], sigma, ["a"], counted="sampled")
    torch.testing.assert_close(path.steps[-1], (path.steps[-2] - sigma * v)[0])


def test_calls_and_trained_steps_are_counted() -> None:
    policy = tiny_flow()
    groups = groups_of(policy, noisy=First(2))
    assert policy.counts["sampled"] == 2 * 4 * 6
    assert sum(int(p.mask.sum()) for g in groups for p in g.paths) == 2 * 4 * 2


def test_shares_of_the_trained_steps() -> None:
    assert list(Share(0.99)(everywhere(10, rng()), 10, rng())) == list(range(9))
    for T, share, down, up in ((16, 0.6, 9, 10), (25, 0.6, 14, 15), (50, 0.6, 29, 30), (20, 0.6, 11, 12)):
        noisy = but_last(T, rng())
        assert len(RandomShare(share)(noisy, T, rng())) == down
        assert len(RandomShare(share, up=True)(noisy, T, rng())) == up


def test_a_share_of_all_steps_is_at_most_all_noisy_ones() -> None:
    assert RandomShare(1.0, up=True)(but_last(5, rng()), 5, rng()) == [0, 1, 2, 3]
    assert len(RandomShare(0.55, up=True)(everywhere(20, rng()), 20, rng())) == 11  # .55 * 20 is 11.000000000000002


def test_the_samplers_means_are_kept_where_a_method_reads_them() -> None:
    policy = tiny_flow()
    assert all(p.mean is None for g in groups_of(policy) for p in g.paths)
    for group in groups_of(policy, keep_means=True, noisy=but_last):
        for path in group.paths:
            assert path.mean is not None
            assert path.mean.shape == (6, 2)
            drawn = (path.steps[1:] - path.mean) / path.prompt.deviations[:, None].float()
            assert torch.equal(path.mean[-1], path.steps[-1])
            again = -drawn.square().mean(1) / 2 - path.prompt.deviations.float().log() - 0.9189385
            torch.testing.assert_close(again[:-1], path.logp[:-1], atol=1e-4, rtol=0)


def test_every_path_draws_its_own_trained_steps() -> None:
    policy = tiny_flow(steps=12)
    masks = {tuple(p.mask.tolist()) for g in groups_of(policy, n=8, noisy=but_last, trained=RandomShare(0.5)) for p in g.paths}
    assert len(masks) > 4
    assert {sum(m) for m in masks} == {5}
    assert not any(m[-1] for m in masks)


def test_a_group_of_one_is_refused() -> None:
    with pytest.raises(GruppoError, match="paths_per_prompt is 1"):
        Trajectories(1)


# -- windows


def starts(window: Window, T: int, iterations: int) -> list[list[int]]:
    found = []
    for _ in range(iterations):
        found.append(window(T, rng()))
        window.update([])
    return found


def test_the_window_of_the_paper_stays_at_the_end() -> None:
    found = starts(Window(4, Constant(25)), 25, 700)
    assert found[0] == found[24] == [0, 1, 2, 3]
    assert found[25] == [1, 2, 3, 4]
    assert found[500] == [20, 21, 22, 23]
    assert found[525] == found[699] == [21, 22, 23, 24]


def test_the_window_of_the_reference_shrinks_but_never_empties() -> None:
    found = starts(Window(4, Constant(25), spare=2, shrinks=True), 25, 700)
    assert [found[i] for i in (0, 25, 50, 475, 500, 525, 550)] == [
        [0, 1, 2, 3],
        [1, 2, 3, 4],
        [2, 3, 4, 5],
        [19, 20, 21, 22],
        [20, 21, 22],
        [21, 22],
        [22],
    ]
    assert found[575] == found[699] == [22]
    back = starts(Window(4, Constant(25), spare=2, shrinks=True, roll_back=True), 25, 600)
    assert back[575] == [0, 1, 2, 3]


def test_in_300_iterations_the_window_reaches_12_places() -> None:
    found = starts(Window(4, Constant(25), spare=2, shrinks=True), 25, 300)
    assert sorted({w[0] for w in found}) == list(range(12))


def test_a_frozen_window_stands_still() -> None:
    assert {tuple(w) for w in starts(Window(4, Constant(5), stride=0), 25, 40)} == {(0, 1, 2, 3)}


def held(hold, places: int) -> list[int]:
    found = Counter(w[0] for w in starts(Window(4, hold, spare=2, shrinks=True), 25, 700))
    return [found[i] for i in range(places)]


def test_exponential_decay() -> None:
    assert held(ExponentialDecay(25), 22) == [25] * 14 + [23, 21, 19, 17, 16, 14, 13, 12]
    assert sum(held(ExponentialDecay(25), 19)) == 446


def test_linear_decay() -> None:
    ends = torch.tensor(held(LinearDecay(10, 1), 22)).cumsum(0).tolist()
    assert ends == [10, 19, 28, 36, 44, 52, 59, 66, 72, 78, 84, 89, 94, 98, 102, 106, 109, 112, 114, 116, 118, 119]
    assert torch.tensor(held(LinearDecay(25, 6), 7)).cumsum(0).tolist() == [25, 49, 72, 94, 115, 135, 155]


def test_a_random_window_covers_the_grid_as_published() -> None:
    g, seen = rng(), Counter()
    for _ in range(4000):
        seen.update(RandomWindow(4, spare=2)(25, g))
    expected = [0.05, 0.10, 0.15, *[0.20] * 17, 0.15, 0.10, 0.05, 0, 0]
    assert all(abs(seen[t] / 4000 - p) < 0.03 for t, p in enumerate(expected))


def test_starts_of_the_fast_window() -> None:
    g = rng()
    assert {RandomWindow(3, 0, 5)(10, g)[0] for _ in range(100)} == {0, 1, 2}
    assert {RandomWindow(2, 0, 5)(10, g)[0] for _ in range(100)} == {0, 1, 2, 3}


def test_a_window_wider_than_the_grid_is_refused() -> None:
    with pytest.raises(GruppoError, match="the window has 4 steps, but of the grid's 5 only 3"):
        Window(4, spare=2)(5, rng())
    with pytest.raises(GruppoError, match="does not fit into a grid of 4"):
        RandomWindow(3, 0, 5)(4, rng())


def test_a_window_goes_on_where_it_was_saved() -> None:
    window, other = Window(2, Constant(3)), Window(2, Constant(3))
    starts(window, 8, 7)
    other.load_state_dict(window.state_dict())
    assert starts(window, 8, 6) == starts(other, 8, 6)


# -- compressed tails


@pytest.mark.parametrize(
    ("first", "ratio", "calls", "tail"),
    [
        (0, 0.4, 11, [0.94029851, 0.88524590, 0.81818182, 0.73469388, 0.62790698, 0.48648649, 0.29032258, 0]),
        (0, 0.2, 7, [0.94029851, 0.79245283, 0.53846154, 0]),
        (10, 0.4, 17, [0.70212766, 0.55462185, 0.34020619, 0]),
    ],
)
def test_compressed_tails(first: int, ratio: float, calls: int, tail: list[float]) -> None:
    grid = CompressedTail(ratio)(shifted(25), list(range(first, first + 4)))
    assert len(grid) - 1 == calls
    torch.testing.assert_close(grid[-len(tail) :], torch.tensor(tail, dtype=torch.float64), atol=1e-8, rtol=0)
    torch.testing.assert_close(grid[: first + 4], shifted(25)[: first + 4])


def test_the_tail_always_reaches_the_picture() -> None:
    for first in range(22):
        for ratio in (0.2, 0.4, 1.0):
            grid = CompressedTail(ratio)(shifted(25), list(range(first, first + 4)))
            assert float(grid[-1]) == 0
            assert bool((grid[:-1] > grid[1:]).all())


def test_a_grid_of_another_form_is_continued_by_straight_lines() -> None:
    S = torch.tensor([1.0, 0.7, 0.6, 0.2, 0.0], dtype=torch.float64)
    torch.testing.assert_close(CompressedTail(1.0)(S, [0]), S)
    # three nodes from t = .75: .75, .375 (halfway between .6 and .2 in the grid's own time) and 0
    torch.testing.assert_close(CompressedTail(0.75)(S, [0]), torch.tensor([1.0, 0.7, 0.4, 0.0], dtype=torch.float64))


def test_the_solver_waits_for_the_last_noisy_step_and_remembers_it() -> None:
    """Between two noisy steps the ODE goes on; the first step behind the last of them is of second order already."""
    policy, solver = tiny_flow(steps=8), DPMSolver2M()
    path = groups_of(policy, n=2, noisy=lambda T, g: [1, 3], solver=solver)[0].paths[0]
    S = path.prompt.sigmas.float()
    expected = []
    with torch.no_grad():
        for t in range(8):
            v = policy.velocity(path.steps[t][None], S[t : t + 1], [path.prompt.prompt], counted="sampled")[0]
            expected.append((float(S[t]), path.steps[t] - S[t] * v))
            if t in (0, 2):
                torch.testing.assert_close(path.steps[t + 1], path.steps[t] + (S[t + 1] - S[t]) * v)
            elif t > 3:
                torch.testing.assert_close(path.steps[t + 1], solver(path.steps[t], expected[-2:], float(S[t + 1])))
                assert t == 7 or not torch.allclose(path.steps[t + 1], path.steps[t] + (S[t + 1] - S[t]) * v, atol=1e-5)


def test_the_solver_takes_over_behind_the_window() -> None:
    policy = tiny_flow(steps=10)
    groups = groups_of(policy, noisy=First(2), grid=CompressedTail(0.5), solver=DPMSolver2M())
    path = groups[0].paths[0]
    assert len(path) == 2 + 3  # int((10 - 1) .5) = 4 nodes
    assert path.mask.tolist() == [True, True, False, False, False]
    assert policy.counts["sampled"] == 2 * 4 * 5
