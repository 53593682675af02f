"""What a run is predicted to take, counted on small models and held against real runs."""

from __future__ import annotations

import pytest
import torch
from tests.tiny import tiny_policy

from gruppo.policies import lean, prefix
from gruppo.runs import memory as estimate
from gruppo.runs.memory import Live, largest, lean_columns, per_token

# of the runs in docs/memory.md that were measured after the constants were chosen
HELD = [
    ["world=countdown", "fit.token_budget=2048"],
    ["world=safety", "fit.token_budget=2048"],
    ["world=search", "fit.token_budget=4096"],
    ["world=catalog", "fit.token_budget=4096"],
    ["world=safety", "fit.token_budget=4096", "fit.paths_per_prompt=16"],
]

PLAN = {
    "policy": {"max_new_tokens": 32, "sample_rows": 16},
    "fit": {"prompts_per_step": 4, "paths_per_prompt": 4, "token_budget": 512},
}


def test_living_bytes_are_counted_and_the_most_of_them():
    given = torch.ones(100)
    with Live() as live:
        a = given + 1
        b = a * 2
        assert live.now == 800
        del a
        assert live.now == 400
        c = b.view(10, 10)
        del b
        assert live.now == 400
        del c
    assert (live.now, live.most) == (0, 800)


def test_what_a_token_costs_is_what_a_block_of_many_takes():
    policy = tiny_policy("qwen3")
    block = largest(policy, 8, [32], 4, 4, 512)
    assert block.tokens <= 512
    cost = per_token(policy, block)
    ids = torch.zeros(len(block.prompts), 39, dtype=torch.long)
    policy.head.hidden(ids).sum().backward()
    with Live() as live:
        policy.head.hidden(ids).sum().backward()
    assert (cost.kept + cost.backward) * block.tokens == pytest.approx(live.most, rel=0.1)


def test_eight_bit_moments_are_counted_from_4096_numbers_on():
    policy = tiny_policy("qwen3")
    policy.model.lm_head.weight = torch.nn.Parameter(torch.zeros(200, 32))
    plain = estimate._moments(policy, {})
    assert plain - estimate._moments(policy, {"moments": {"bits": 8}}) == 2 * 200 * 32 * 3
    assert plain == estimate._moments(policy, {"moments": {"bits": 32}})


def test_short_completions_take_less_than_full_ones():
    policy = tiny_policy("qwen3")
    policy.lean = False  # its columns are added 64 at a time
    some = {n: estimate.memory(policy, PLAN, prompt=8, reference=False, lengths=n) for n in ((4,), (32,))}
    assert some[4,]["cache"] < some[32,]["cache"]
    plan = {**PLAN, "fit": {**PLAN["fit"], "token_budget": 10**6}}
    whole = [estimate.memory(policy, plan, prompt=8, reference=False, lengths=n)["activations"] for n in ((4,), (32,))]
    assert whole[0] < 0.5 * whole[1]


def test_rows_that_leave_or_use_up_their_columns_stand_twice_for_a_moment():
    assert lean_columns([10] * 8) == 8 * 64  # nothing is copied
    assert lean_columns([10] * 4 + [60] * 4) == 8 * 64 + 4 * (10 + 64)
    assert lean_columns([100] * 8) == 8 * 64 + 8 * 128


@torch.no_grad()
def test_columns_are_those_that_the_sampler_holds():
    policy = tiny_policy("qwen3")
    rows = lean.LeanRows(policy, False, False)
    prompt = torch.arange(3, 9)
    cell = estimate.cache_row(policy.config, 1) * 4
    with Live() as live:
        rows.enter(torch.empty(0, dtype=torch.long), [prompt] * 64, hold=False)
        live.most = live.now
        for step in range(80):
            if step == 20:
                rows.keep(torch.arange(40))
            rows.step(torch.full((len(rows.which),), 5))
    predicted = cell * (lean_columns([20] * 24 + [81] * 40) + len(prompt))
    assert live.most == pytest.approx(predicted, rel=0.15)


def test_what_siblings_have_in_common_is_counted_once():
    policy = tiny_policy("qwen3")
    policy.cost = prefix.Cost.of(policy.model, prefix.Rates(call=1.0, small=0.0, margin=0.0))
    g = torch.Generator().manual_seed(0)
    alike = [torch.cat([torch.arange(28), torch.randint(60, (4,), generator=g)]) for _ in range(4)]
    other = [torch.randint(60, (32,), generator=g) for _ in range(4)]
    shared, apart = (largest(policy, 8, [32], 4, 4, 512, answers=[some]).tokens for some in (alike, other))
    assert shared <= 4 * (8 + 28 + 4 * 4)
    assert apart > 4 * 100


@pytest.mark.slow
@pytest.mark.parametrize("words", HELD, ids=" ".join)
def test_a_run_takes_what_was_predicted_within_a_fifth(words):
    found = estimate.in_a_process([*words, "fit.seed=2"])
    assert abs(found.off) < 0.2, found


def test_the_c_library_keeps_more_where_blocks_are_many():
    policy = tiny_policy("qwen3")
    lengths = [32] * 16

    def kept(budget):
        parts = estimate.memory(
            policy, {**PLAN, "fit": {**PLAN["fit"], "token_budget": budget}}, prompt=8, reference=False, lengths=lengths
        )
        training = parts["activations"] + max(parts["head"], parts["backward"])
        sampling = parts["cache"] + parts["sampling logits"] + parts["sampling weights"]
        return (parts["allocator"] - min(sampling, training)) / training

    assert kept(10_000) == pytest.approx(0.1, abs=0.03)
    assert 0.35 < kept(160) < 0.7
