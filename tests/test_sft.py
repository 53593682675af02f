"""Supervised fine-tuning: completion tokens only, packed rows that cannot see one another, the same run twice."""

from __future__ import annotations

import json

import pytest
import torch
from tests.tiny import FAMILIES, tiny_folder, tiny_policy
from transformers import AutoModelForCausalLM, AutoTokenizer

from gruppo.sft import (
    Example,
    count_steps,
    encode,
    example_of,
    fine_tune,
    pack,
    read_examples,
    refuse_leaks,
    sft,
    warm_cosine,
)
from gruppo.types import GruppoError, Path

EXAMPLES = [Example(f"{a}+{b}=", str(a + b)) for a in range(3, 9) for b in (1, 14, 150)]
CHAT = Example([{"role": "user", "content": "2+2"}], "4")


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def steps_of(policy, examples, **numbers):
    numbers = {"steps": 3, "step_tokens": 60, "row_tokens": 32, "rate": lambda step: 3e-3, "rng": rng(), **numbers}
    return list(sft(policy, examples, **numbers))


@pytest.mark.parametrize("family", [*FAMILIES, "gemma2"])
def test_packed_log_probs_equal_those_of_separate_rows(family):
    policy = tiny_policy(family)
    pairs = [encode(policy, e) for e in EXAMPLES]
    packed = policy.read_packed(pack(pairs, 40))
    order = [pair for some in pack(pairs, 40) for pair in some]
    for (prompt, steps), got in zip(order, packed):
        alone = policy.score([Path(prompt, steps, torch.zeros(len(steps)), torch.ones(len(steps), dtype=torch.bool))])[0]
        torch.testing.assert_close(got.detach(), alone, atol=2e-5, rtol=0)


def test_examples_that_leak_are_refused():
    policy = tiny_policy()
    pairs = [encode(policy, e) for e in EXAMPLES[:4]]
    refuse_leaks(policy, pairs)
    true = policy.head.hidden
    policy.head.hidden = lambda ids, place=None: true(ids)  # position ids are lost: everything sees everything before it
    with pytest.raises(GruppoError, match=r"packed examples see one another.*row_tokens=1"):
        refuse_leaks(policy, pairs)


def test_packing_keeps_every_pair_once_and_within_the_row():
    policy = tiny_policy()
    pairs = [encode(policy, e) for e in EXAMPLES]
    bins = pack(pairs, 30)
    assert sorted(id(s) for some in bins for _, s in some) == sorted(id(s) for _, s in pairs)
    sizes = [sum(len(p) + len(s) for p, s in some) for some in bins]
    assert max(sizes) <= 30
    assert sum(sizes) / (30 * len(sizes)) > 0.8


def test_a_pair_longer_than_the_row_has_a_row_of_its_own():
    pair = (torch.arange(20), torch.arange(20))
    assert pack([pair, pair], 8) == [[pair], [pair]]


def test_the_loss_is_the_mean_over_completion_tokens_and_eos():
    policy = tiny_policy()
    pairs = [encode(policy, e) for e in EXAMPLES[:4]]
    logp = torch.cat(policy.read_packed([[p] for p in pairs]))
    tokens = sum(len(p) + len(s) for p, s in pairs)
    first = steps_of(policy, lambda i: EXAMPLES[i], steps=1, step_tokens=tokens)[0]
    assert first.examples == 4
    assert first.tokens == sum(len(e.completion) + 1 for e in EXAMPLES[:4])
    assert first.loss == pytest.approx(float(-logp.detach().mean()), abs=1e-5)


def test_prompt_tokens_are_not_trained():
    policy = tiny_policy()
    chosen = []
    read = policy.head.read
    policy.head.read = lambda hidden, target, *rest: (chosen.append(target), read(hidden, target, *rest))[1]
    steps_of(policy, [Example("ab", "x"), Example("cd", "xy")], steps=2, step_tokens=20)
    trained = {int(i) for target in chosen for i in target}
    assert trained == {*policy.tokenizer("xy", add_special_tokens=False)["input_ids"], policy.tokenizer.eos_token_id}


def test_training_lowers_the_loss_of_the_completions_and_leaves_prompts_alone():
    policy = tiny_policy()
    pairs = [encode(policy, e) for e in EXAMPLES]
    prompts = [(p[:1], p[1:]) for p, _ in pairs]

    def loss(some):
        with torch.no_grad():
            return float(-torch.cat(policy.read_packed([[pair] for pair in some])).mean())

    before, prompt_before = loss(pairs), loss(prompts)
    done = steps_of(policy, EXAMPLES, steps=30, step_tokens=150)
    assert loss(pairs) < 0.6 * before
    assert done[-1].loss < 0.6 * done[0].loss
    assert loss(prompts) > 0.75 * prompt_before  # a trainer of all tokens brings both down alike


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    def weights(seed):
        policy = tiny_policy()
        steps_of(policy, EXAMPLES, rng=rng(seed))
        return torch.cat([p.detach().flatten() for p in policy.parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_block_size_does_not_change_the_update():
    def weights(block):
        policy = tiny_policy()
        steps_of(policy, EXAMPLES, steps=1, step_tokens=150, block_tokens=block)
        return torch.cat([p.detach().flatten() for p in policy.parameters()])

    torch.testing.assert_close(weights(32), weights(4096), atol=2e-4, rtol=0)


def test_one_pass_shows_every_example_once():
    policy = tiny_policy()
    seen = []
    true = policy.read_packed
    policy.read_packed = lambda bins, **rest: (seen.extend(s for b in bins for _, s in b), true(bins, **rest))[1]
    total = sum(len(p) + len(s) for p, s in (encode(policy, e) for e in EXAMPLES))
    steps_of(policy, EXAMPLES, steps=1, step_tokens=total, row_tokens=1)
    assert sorted(policy.decode(s) for s in seen) == sorted(e.completion for e in EXAMPLES)


def test_a_chat_example_ends_as_the_sampler_would_end_it():
    policy = tiny_policy()
    prompt, steps = encode(policy, CHAT)
    assert torch.equal(prompt, policy.encode(CHAT.prompt))
    assert steps.tolist() == [*policy.tokenizer("4", add_special_tokens=False)["input_ids"], policy.eos[0]]


def test_the_rate_warms_up_and_falls_to_a_tenth():
    rate = warm_cosine(1.0, 100, warmup=10)
    assert rate(1) == pytest.approx(0.1)
    assert rate(10) == 1.0
    assert rate(55) == pytest.approx(0.55)
    assert rate(100) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("row", "example"),
    [
        ({"prompt": "a", "completion": "b"}, Example("a", "b")),
        ({"prompt": CHAT.prompt, "completion": [{"role": "assistant", "content": "4"}]}, CHAT),
        ({"messages": [*CHAT.prompt, {"role": "assistant", "content": "4"}]}, CHAT),
    ],
)
def test_rows_of_data_become_examples(row, example):
    assert example_of(row) == example


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ('{"prompt": "a"}', "line 1 of .* has the columns prompt; it needs prompt and completion, or messages"),
        ('{"prompt": "a", "completion": "b"}\n{"x', "line 2 of .* is not JSON"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "end with 'user', but an assistant's turn is trained"),
        ("\n", "holds no example"),
        ("[1]", "line 1 of .* is a list, not an object"),
    ],
)
def test_bad_data_is_refused_with_a_sentence(tmp_path, lines, sentence):
    (tmp_path / "d.jsonl").write_text(lines)
    with pytest.raises(GruppoError, match=sentence):
        read_examples(tmp_path / "d.jsonl")


def test_an_example_longer_than_the_context_is_refused():
    policy = tiny_policy()
    with pytest.raises(GruppoError, match="2 prompt and 301 completion tokens, but this model has 256 positions"):
        encode(policy, Example("ab", "x" * 300))


def test_a_loss_that_is_not_finite_stops_before_the_update():
    policy = tiny_policy()
    with torch.no_grad():
        policy.model.model.norm.weight.fill_(float("nan"))
    before = policy.model.model.embed_tokens.weight.clone()
    with pytest.raises(GruppoError, match="at step 1 the loss is nan"):
        steps_of(policy, EXAMPLES[:1], steps=1, step_tokens=4)
    assert torch.equal(before, policy.model.model.embed_tokens.weight)


def test_fine_tune_writes_a_plain_folder_and_never_overwrites(tmp_path):
    model = tiny_folder(tmp_path / "model")
    rows = [{"prompt": e.prompt, "completion": e.completion} for e in EXAMPLES]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = list(
        fine_tune(model, tmp_path / "d.jsonl", tmp_path / "out", epochs=4.0, step_tokens=100, row_tokens=64, learning_rate=3e-3)
    )
    assert done[-1].loss < done[0].loss
    assert len(done) == count_steps(tiny_policy(), EXAMPLES, 4.0, 100)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    AutoTokenizer.from_pretrained(tmp_path / "out")
    with pytest.raises(GruppoError, match="exists and is not empty"):
        next(fine_tune(model, tmp_path / "d.jsonl", tmp_path / "out"))
