"""What a run is predicted to take, counted on small models and held against real runs."""

from __future__ import annotations

import pytest
import torch
from tests.tiny import tiny_policy

from gruppo.runs import memory as estimate
from gruppo.runs.memory import Live, largest, per_token

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
    some = {n: estimate.memory(policy, PLAN, prompt=8, reference=False, lengths=n) for n in ((4,), (32,))}
    assert some[4,]["cache"] < some[32,]["cache"]
    plan = {**PLAN, "fit": {**PLAN["fit"], "token_budget": 10**6}}
    whole = [estimate.memory(policy, plan, prompt=8, reference=False, lengths=n)["activations"] for n in ((4,), (32,))]
    assert whole[0] < 0.5 * whole[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["world=arithmetic", "fit.token_budget=4096"],
        ["world=countdown", "fit.prompts_per_step=8", "fit.token_budget=4096"],
        ["world=safety", "fit.token_budget=4096"],
        ["world=countdown", "fit.prompts_per_step=8", "fit.token_budget=4096", "policy.gradient_checkpointing=true"],
    ],
)
def test_a_run_takes_what_was_predicted_within_a_fifth(words):
    found = estimate.in_a_process(words)
    assert abs(found.off) < 0.2, found
