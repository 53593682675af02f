"""Stratified GRPO: worked numbers, strata of one and of one mind, and what the strata alone cannot learn."""

from __future__ import annotations

import json
import math

import pyarrow.parquet
import pytest
import torch
from tests.recipes.trained import trained
from tests.rollouts.scripted import Scripted

from gruppo.core.collate import collate
from gruppo.core.kl import WithKL
from gruppo.core.reduce import weigh
from gruppo.core.surrogate import PPOClip
from gruppo.recipe import difference
from gruppo.recipes.grpo import grpo
from gruppo.recipes.stratified_grpo import Stratified, calls, lengths, numbered, stratified_grpo
from gruppo.rollouts.conversation import Talk, columns, talked
from gruppo.tools import tool
from gruppo.types import Group, GruppoError, Path, Steps, Task

R = [1.0, 0, 1, 0, 0, 0, 1, 1]
K = [0, 0, 1, 1, 1, 2, 2, 2]
S2, HALF = 1.414211, 0.707105


def blend(reward, strata, alpha: float, *, ddof: int = 0, eps: float = 1e-6) -> list[float]:
    reward = torch.tensor(reward)
    return Stratified(alpha, calls, ddof, eps).blend(reward, torch.tensor(strata)).tolist()


def group(reward, strata, steps: int = 3) -> Group:
    paths = [
        Path(torch.tensor([2]), torch.arange(steps), torch.zeros(steps), torch.ones(steps, dtype=torch.bool)) for _ in reward
    ]
    signals = {"calls": torch.tensor(strata, dtype=torch.float32)}
    return Group(Task("q"), paths, signals, reward=torch.tensor(reward))


def test_within_strata_with_the_population_std() -> None:
    expected = [1, -1, S2, -HALF, -HALF, -S2, HALF, HALF]
    assert blend(R, K, 1.0) == pytest.approx(expected, abs=3e-6)


def test_within_strata_with_the_sample_std() -> None:
    expected = [0.707106, -0.707106, 1.154699, -0.577349, -0.577349, -1.154699, 0.577349, 0.577349]
    assert blend(R, K, 1.0, ddof=1) == pytest.approx(expected, abs=2e-6)


def test_alpha_zero_is_the_group() -> None:
    assert blend(R, K, 0.0) == pytest.approx([0.999998 if r else -0.999998 for r in R], abs=1e-6)
    assert blend(R, K, 0.0, ddof=1) == pytest.approx([0.935413 if r else -0.935413 for r in R], abs=1e-6)


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        (0.6, [0.999998, -0.999998, 1.248526, -0.824262, -0.824262, -1.248526, 0.824262, 0.824262]),
        (0.8, [0.999998, -0.999998, 1.331368, -0.765684, -0.765684, -1.331368, 0.765684, 0.765684]),
    ],
)
def test_the_blend(alpha: float, expected: list[float]) -> None:
    assert blend(R, K, alpha) == pytest.approx(expected, abs=3e-6)


def test_the_variance_that_the_strata_take_away_is_the_spread_of_their_means() -> None:
    reward, strata = torch.tensor(R, dtype=torch.float64), torch.tensor(K)
    means = torch.stack([reward[strata == k].mean() for k in range(3)])
    bias = means[strata] - reward.mean()
    assert bias.tolist() == pytest.approx([0, 0, *[-1 / 6] * 3, *[1 / 6] * 3])
    gap = (reward - reward.mean()).var(correction=0) - (reward - means[strata]).var(correction=0)
    assert float(gap) == pytest.approx(0.0208333, abs=1e-7)
    assert float(gap) == pytest.approx(float(bias.square().mean()))


def test_strata_that_decide_the_reward_leave_only_the_group_part() -> None:
    reward, strata = [0.0, 0, 1, 1], [0, 0, 1, 1]
    assert blend(reward, strata, 1.0) == [0.0] * 4
    assert blend(reward, strata, 0.6, eps=0.0) == pytest.approx([-0.4, -0.4, 0.4, 0.4])


def test_one_stratum_is_the_group_whatever_alpha() -> None:
    assert blend(R, [7] * 8, 0.3) == pytest.approx(blend(R, K, 0.0), abs=1e-6)


@pytest.mark.parametrize("ddof", [0, 1])
def test_a_stratum_of_one_is_zero_and_keeps_the_group_part_of_the_blend(ddof: int) -> None:
    reward, strata = [1.0, 0, 1, 0], [0, 1, 1, 1]
    assert blend(reward, strata, 1.0, ddof=ddof)[0] == 0.0
    of_group = blend(reward, strata, 0.0, ddof=ddof)[0]
    assert blend(reward, strata, 0.6, ddof=ddof)[0] == pytest.approx(0.4 * of_group)


def test_every_stratum_of_one_leaves_the_group_part_of_all() -> None:
    assert blend([1.0, 0.0, 1.0], [0, 1, 2], 1.0) == [0.0] * 3


def test_an_affine_map_of_the_rewards_changes_nothing() -> None:
    a = blend(R, K, 0.6, eps=0.0)
    assert blend([3 * r + 5 for r in R], K, 0.6, eps=0.0) == pytest.approx(a, abs=1e-6)


def test_advantages_within_strata_sum_to_zero_over_each() -> None:
    a = torch.tensor(blend(R, K, 1.0))
    assert all(abs(float(a[torch.tensor(K) == k].sum())) < 1e-6 for k in range(3))


def test_strata_alone_put_no_gradient_on_the_choice_of_stratum() -> None:
    choice = torch.tensor([0.0, -1.0, 0.5], requires_grad=True)
    for alpha, zero in ((1.0, True), (0.6, False)):
        choice.grad = None
        logp = choice.log_softmax(0)[torch.tensor(K)]
        (torch.tensor(blend(R, K, alpha)) * logp).sum().backward()
        assert choice.grad is not None
        assert (float(choice.grad.abs().max()) < 1e-5) == zero


def test_an_abstained_path_counts_in_no_baseline() -> None:
    a = blend([1.0, 0.0, math.nan, 1.0, 0.0, math.nan], [0, 0, 0, 1, 1, 2], 0.6)
    assert a[2] == a[5] == 0.0
    assert [a[0], a[1], a[3], a[4]] == pytest.approx(blend([1.0, 0, 1, 0], [0, 0, 1, 1], 0.6))


def test_the_recipe_reads_the_calls_and_spreads_over_the_steps() -> None:
    advantage = stratified_grpo(alpha=0.6).advantage(group(R, K))
    assert advantage.shape == (8, 3)
    assert advantage[:, 0].tolist() == pytest.approx(blend(R, K, 0.6))
    assert torch.equal(advantage[:, 0], advantage[:, 2])


def test_a_group_of_one_is_zero() -> None:
    assert stratified_grpo().advantage(group([1.0], [2])).tolist() == [[0.0] * 3]


def test_any_hashable_is_a_stratum() -> None:
    def outcome(some: Group) -> list[tuple[str, bool]]:
        return [("found", True), ("found", True), ("lost", False), ("lost", False)]

    g = group([1.0, 0.0, 1.0, 0.0], [0, 0, 0, 0])
    assert stratified_grpo(alpha=1.0, stratum=outcome).advantage(g)[:, 0].tolist() == pytest.approx([1, -1, 1, -1], abs=1e-5)
    assert numbered(["b", ("c", 1), "b", 3], 4).tolist() == [0, 1, 0, 2]
    assert lengths(g) == [3, 3, 3, 3]


def test_a_missing_stratum_is_refused() -> None:
    with pytest.raises(GruppoError, match="path 1 has no stratum: its label is nan"):
        stratified_grpo().advantage(group([1.0, 0.0], [0, math.nan]))
    with pytest.raises(GruppoError, match="path 0 has no stratum: its label is None"):
        numbered([None], 1)
    with pytest.raises(GruppoError, match="2 labels for 3 paths"):
        numbered([1, 2], 3)


def test_a_group_without_calls_is_refused() -> None:
    bare = group([1.0, 0.0], [0, 1]).with_(signals={})
    with pytest.raises(GruppoError, match="has no signal 'calls'"):
        stratified_grpo().advantage(bare)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan])
def test_alpha_is_a_blend(alpha: float) -> None:
    with pytest.raises(GruppoError, match="must lie between 0"):
        stratified_grpo(alpha=alpha)


def test_preset() -> None:
    made = stratified_grpo()
    assert made.advantage == Stratified(0.6, calls, ddof=0, eps=1e-6)
    assert made.loss == WithKL(PPOClip(0.2, 0.2), 0.001)
    assert [need.name for need in made.needs] == ["calls"]
    assert stratified_grpo(stratum=lengths).needs == ()
    assert set(difference(stratified_grpo(n=64, beta=0.04), grpo())) == {"advantage", "needs"}


# -- conversations


def shout(text: str) -> str:
    return text.upper()


def conversations(max_calls: int = 3) -> Group:
    """Four conversations of 0, 1, 1 and 3 calls, graded 1, 0, 1, 0."""
    script = {
        "a:": ["at once"],
        "b:": ["<shout>x</shout>", "no"],
        "c:": ["<shout>y</shout>", "yes"],
        "d:": ["<shout>p</shout>", "<shout>q</shout>", "<shout>r</shout>", "no"],
    }
    paths = Talk((tool(shout),), max_calls=max_calls).sample(Scripted(script, max_new=200), list(script), g=torch.Generator())
    reward = torch.tensor([1.0, 0.0, 1.0, 0.0])
    made = Group(Task("q"), paths, reward=reward)
    return made.with_(signals=columns(talked([made])[0]))


def test_the_calls_of_conversations_are_the_strata() -> None:
    made = conversations()
    assert calls(made) == [0, 1, 1, 3]
    expected = blend([1.0, 0.0, 1.0, 0.0], [0, 1, 1, 3], 0.6)
    assert expected == pytest.approx([0.4, -1.0, 1.0, -0.4], abs=1e-5)  # those alone keep the group's part only
    assert stratified_grpo().advantage(made)[:, 0].tolist() == pytest.approx(expected)


def test_what_a_tool_wrote_is_outside_of_the_loss() -> None:
    """No gradient on a tool's tokens and no share in any mean: other log-probs there change nothing at all."""
    recipe = stratified_grpo()
    made = conversations()
    batch = weigh(collate([made.with_(advantage=recipe.advantage(made))]), recipe.reduce)
    theirs = torch.stack([torch.nn.functional.pad(p.unit < 0, (0, batch.mask.shape[1] - len(p))) for p in made.paths])
    assert theirs.sum(1).tolist() == [0, 18, 18, 54]  # <result>X</result> once, once and three times
    assert not (theirs & batch.mask).any()
    losses = []
    for shift in (0.0, 3.0):
        logp = (torch.full(batch.mask.shape, -0.4) + shift * theirs).requires_grad_()
        ref = Steps(torch.full(batch.mask.shape, -0.6) - shift * theirs)
        loss, _ = recipe.loss(batch, Steps(logp), ref)
        total = (batch.weight * loss).sum()
        total.backward()
        assert logp.grad is not None
        assert not logp.grad[theirs].any()
        assert logp.grad[batch.mask].all()
        losses.append(float(total.detach()))
    assert losses[0] == losses[1]
    own = torch.stack([torch.nn.functional.pad(p.unit >= 0, (0, batch.mask.shape[1] - len(p))) for p in made.paths])
    assert batch.weight[own].sum() == pytest.approx(1.0)
    assert batch.weight.sum(1).tolist() == pytest.approx([0.25] * 4)  # each path's mean is over the model's tokens


def test_calls_beyond_the_maximum_are_not_counted_into_a_stratum_of_their_own() -> None:
    made = conversations(max_calls=2)
    assert calls(made) == [0, 1, 1, 2]
    assert [p.truncated for p in made.paths] == [False, False, False, True]


def test_a_run_on_the_search_world_stores_what_the_method_did(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    records = trained(monkeypatch, tmp_path, "stratified-grpo", "search", "fit.steps=2", "policy.max_new_tokens=64")
    assert all(math.isfinite(r["loss"]) and r["gap"] < 1e-4 for r in records)
    rows = pyarrow.parquet.read_table(tmp_path / "run" / "groups" / "step-000001.parquet").to_pylist()
    strata = {}
    for r in rows:
        turns = json.loads(r["messages"])
        assert r["stratum"] == str(sum(m["role"] == "tool" for m in turns))
        assert r["mask"] == [u >= 0 for u in r["unit"]]
        own = "".join(t for t, m in zip(r["token_text"], r["mask"]) if m).removesuffix("<|end|>")
        assert own == "".join(m["content"] for m in turns if m["role"] == "assistant")
        strata.setdefault((r["group"], r["stratum"]), []).append(r)
    assert len(strata) > 3
    group = [r for r in rows if r["group"] == rows[0]["group"]]
    expected = blend([r["reward"] for r in group], [int(r["stratum"]) for r in group], 0.6)
    assert [r["advantage"][0] for r in group] == pytest.approx(expected, abs=1e-5)
