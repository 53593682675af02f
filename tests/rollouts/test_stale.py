"""Stale sampling: whose weights, since when, kept how long, and what the ratios say."""

from __future__ import annotations

from pathlib import Path as File
from typing import Any

import pytest
import torch
from tests.runs.small import Quiet, config, session, silent
from tests.runs.test_resume import Killed, assert_same, kill_at

from gruppo.policies.reference import snapshot
from gruppo.recipes import recipe
from gruppo.recipes.golden import Draw, Trial, grading, tiny_policy
from gruppo.rollouts import Parallel, Reread, Stale, WithReference
from gruppo.rollouts.stale import Snapshots, stale
from gruppo.runs.session import Session
from gruppo.types import Group, GruppoError


class Recorder:
    """A rollout that only notes the policy's first weight."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def __call__(self, policy: Any, tasks: Any, grade: Any, rng: Any) -> list[Group]:
        self.seen.append(float(next(iter(policy.parameters())).detach().flatten()[0]))
        return []


def versions(every: int, lag: int, steps: int, begin: int = 0) -> tuple[list[int], int]:
    """Which iteration's weights each iteration samples with, and the most snapshots ever kept."""
    policy, inner = tiny_policy(), Recorder()
    rollout = Stale(inner, every, lag, Snapshots(begin))
    most = 0
    for k in range(begin, begin + steps):
        with torch.no_grad():
            for p in policy.parameters():
                p.fill_(float(k))
        rollout(policy, [], list, torch.Generator())
        assert float(next(iter(policy.parameters())).detach().flatten()[0]) == k  # its own weights are back
        most = max(most, len(rollout.past.weights))
        rollout.past.update([])
    return [int(v) for v in inner.seen], most


@pytest.mark.parametrize(
    ("every", "lag", "expected", "most"),
    [
        (1, 0, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], 1),
        (4, 0, [0, 0, 0, 0, 4, 4, 4, 4, 8, 8], 1),
        (1, 2, [0, 0, 0, 1, 2, 3, 4, 5, 6, 7], 3),
        (4, 2, [0, 0, 0, 0, 2, 2, 2, 2, 6, 6], 2),
        (2, 3, [0, 0, 0, 0, 1, 1, 3, 3, 5, 5], 3),
    ],
)
def test_schedule(every: int, lag: int, expected: list[int], most: int) -> None:
    assert versions(every, lag, 10) == (expected, most)


def test_a_later_stage_begins_with_its_own_first_weights() -> None:
    assert versions(4, 0, 6, begin=6)[0] == [6, 6, 8, 8, 8, 8]


def sampled(every: int, steps: int, **numbers: Any) -> tuple[Trial, list[Any]]:
    trial = Trial.of(stale(recipe("rec-oneside", n=8, **numbers), every))
    return trial, [trial.advance() for _ in range(steps)]


def test_the_ratio_leaves_one_only_where_the_weights_are_old() -> None:
    for every in (1, 4):
        _, done = sampled(every, 5)
        for k, one in enumerate(done):
            worst = abs(one.stats["ratio"] - 1)
            assert (worst < 1e-5) == (k % every == 0), f"every {every}, iteration {k}: {worst}"


def test_the_kept_log_probs_are_those_of_the_weights_that_sampled() -> None:
    policy, old = tiny_policy(), tiny_policy()
    rollout = Stale(Parallel(4), 2)
    draw = Draw(0, 0, [0])
    rollout(policy, draw.more(2), grading(), torch.Generator().manual_seed(0))
    rollout.past.update([])
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    paths = [p for g in rollout(policy, draw.more(2), grading(), torch.Generator().manual_seed(0)) for p in g.paths]
    assert {p.version for p in paths} == {0}
    then, now = old.score(paths), policy.score(paths)
    assert max(float((p.logp - s).abs().max()) for p, s in zip(paths, then)) < 1e-4
    assert max(float((p.logp - s).abs().max()) for p, s in zip(paths, now)) > 1e-2


def test_the_trainers_reading_inside_is_of_the_old_weights_too() -> None:
    """Reread inside Stale corrects two programs that hold the same weights; the ratio still sees the age."""
    policy = tiny_policy()
    rollout = Stale(Reread(Parallel(4)), 2)
    for k in range(2):
        [g] = rollout(policy, Draw(0, 0, [0]).more(1), grading(), torch.Generator().manual_seed(k))
        for p in g.paths:
            assert p.logp_train is not None
            assert torch.allclose(p.logp, p.logp_train, atol=1e-4)
        rollout.past.update([])
        with torch.no_grad():
            for p in policy.parameters():
                p.add_(0.05)


def test_a_reference_inside_reads_its_own_weights() -> None:
    policy = tiny_policy()
    policy.reference = recipe("rloo", n=4).reference(policy)  # type: ignore[misc]
    rollout = Stale(WithReference(Parallel(4)), 3)
    with torch.no_grad():
        for p in policy.parameters():
            p.mul_(1.3)
    [g] = rollout(policy, Draw(0, 0, [0]).more(1), grading(), torch.Generator().manual_seed(0))
    first = tiny_policy().score(g.paths)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(g.signals["logp_ref"], first))


def test_a_failing_rollout_gives_the_weights_back() -> None:
    policy = tiny_policy()
    rollout = Stale(Recorder(), 2)
    rollout(policy, [], list, torch.Generator())
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(1.0)
    before = snapshot(policy)
    with pytest.raises(ZeroDivisionError):
        Stale(lambda *_: 1 // 0, 2, 0, rollout.past)(policy, [], list, torch.Generator())
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters()))


def test_fresh_weights_need_no_wrapper() -> None:
    base = recipe("rec-oneside", n=8)
    assert stale(base, 1) is base
    wrapped = stale(base, 4, 2)
    assert wrapped == stale(base, 4, 2) != base
    assert repr(wrapped.rollout) == "Stale(inner=Parallel(n=8), every=4, lag=2)"


def test_impossible_numbers_are_a_sentence() -> None:
    with pytest.raises(GruppoError, match="cannot be sent every 0 iterations, 0 iterations old"):
        Stale(Parallel(2), 0)


# ---- as a property of a run


@pytest.mark.parametrize("fit", [{"sync_every": 4}, {"sync_every": 2, "sync_lag": 3}], ids=str)
def test_a_stale_run_resumes_bit_for_bit(tmp_path: File, fit: dict[str, int]) -> None:
    changes = {"recipe": "rec-oneside", "fit": {"steps": 10, **fit}, "track": {"save_every": 5}, "eval": {"tasks": 0}}
    whole = session(tmp_path, name="whole", **changes)
    whole.run(Quiet())
    with pytest.raises(Killed):
        session(tmp_path, name="broken", **changes).run(kill_at(7))
    resumed = Session.resume(tmp_path / "runs" / "broken", say=silent)
    assert resumed.step == 5
    resumed.run(Quiet())
    assert_same(whole, resumed)


def test_an_adapter_is_stale_too_and_the_record_says_how_old(tmp_path: File) -> None:
    changes = {"policy": {"lora": {"rank": 2, "alpha": 4}}, "recipe": "rec-oneside", "eval": {"tasks": 0}}
    run = session(tmp_path, fit={"steps": 5, "sync_every": 3, "learning_rate": 1e-2}, **changes)
    run.run(Quiet())
    records = run.folder.records(run.folder.metrics)
    assert [r["stale"] for r in records] == [0, 1, 2, 0, 1]
    assert [abs(r["ratio"] - 1) < 1e-5 for r in records] == [True, False, False, True, False]


def test_stages_may_differ_in_age(tmp_path: File) -> None:
    stages = [
        {"fit": {"steps": 2, "sync_every": 2}},
        {"fit": {"steps": 3, "sync_every": 3}},
        {"fit": {"steps": 1, "sync_every": 1}},
    ]
    run = session(tmp_path, recipe="rec-oneside", eval={"tasks": 0}, stages=stages)
    run.run(Quiet())
    assert [r.get("stale", 0) for r in run.folder.records(run.folder.metrics)] == [0, 1, 0, 0, 1, 0]


@pytest.mark.parametrize("fit", [{"sync_every": 0}, {"sync_lag": -1}], ids=str)
def test_settings_are_checked(tmp_path: File, fit: dict[str, int]) -> None:
    [(name, value)] = fit.items()
    with pytest.raises(GruppoError, match=f"fit.{name} is {value}; "):
        config(tmp_path, fit=fit)
