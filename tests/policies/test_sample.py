"""What the sampler draws and what it says about it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.policies.models import ENDS, FAMILIES, gap, naive, policy_of, ragged, rng
from tests.tiny import tiny_policy

from gruppo.policies.decode import Rows, refilling_pays
from gruppo.policies.lean import LeanRows
from gruppo.types import GruppoError


def repeated(n: int = 6):
    return [p for p in ragged() for _ in range(n)]


def forwards(policy, run) -> list[tuple[int, int]]:
    """The shape of `input_ids` at every forward of the model during run()."""
    seen: list[tuple[int, int]] = []
    hook = policy.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(tuple((args[0] if args else kwargs["input_ids"]).shape)), with_kwargs=True
    )
    run()
    hook.remove()
    return seen


@pytest.mark.parametrize("temperature", [0.7, 1.3])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_samplers_log_probs_are_those_of_one_full_forward_of_each_path_alone(family, temperature):
    policy = policy_of(family, temperature=temperature, max_new=20)
    paths = policy.sample(repeated(), g=rng())
    assert len({len(p) for p in paths}) > 4
    assert gap(policy, paths, temperature) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_among_longer_ones_gets_the_same_greedy_tokens_as_alone(family):
    policy = policy_of(family, max_new=20, ends=[1])
    together = policy.sample(ragged(), g=rng(), temperature=0.0)
    alone = [policy.sample([p], g=rng(), temperature=0.0)[0] for p in ragged()]
    assert [p.steps.tolist() for p in together] == [p.steps.tolist() for p in alone]


def test_greedy_is_the_argmax_of_every_prefix():
    policy = policy_of("qwen3", max_new=8, ends=[1])
    (path,) = policy.sample(ragged((4,)), g=rng(), temperature=0.0)
    for t in range(len(path)):
        logits = policy.model(input_ids=torch.cat([path.prompt, path.steps[:t]])[None]).logits[0, -1]
        assert int(logits.argmax()) == int(path.steps[t])


def test_greedy_paths_have_no_log_probability_to_train_on():
    assert policy_of().sample(ragged(), g=rng(), temperature=0.0)[0].logp.isnan().all()


def test_first_tokens_are_drawn_from_the_tempered_softmax():
    policy = policy_of("qwen3", temperature=1.4, max_new=1, sample_rows=6_000)
    (prompt,) = ragged((5,))
    n = 6_000
    drawn = torch.stack([p.steps[0] for p in policy.sample([prompt] * n, g=rng(1))])
    with torch.no_grad():
        p = (policy.model(input_ids=prompt[None]).logits[0, -1].double() / 1.4).softmax(-1)
    seen = torch.bincount(drawn, minlength=len(p)).double()
    likely = p * n > 5
    chi = ((seen - n * p)[likely] ** 2 / (n * p)[likely]).sum()
    freedom = int(likely.sum()) - 1
    assert freedom > 20
    assert float(chi) < freedom + 4 * (2 * freedom) ** 0.5  # four standard deviations of the chi-square


def test_the_generator_alone_decides_what_is_drawn():
    policy = policy_of()
    one, two, three = (policy.sample(repeated(), g=rng(s)) for s in (0, 0, 1))
    torch.manual_seed(99)
    assert [p.steps.tolist() for p in one] == [p.steps.tolist() for p in two]
    assert [p.steps.tolist() for p in one] != [p.steps.tolist() for p in three]


def test_siblings_draw_their_own_noise():
    paths = policy_of(ends=[1], max_new=10).sample(ragged((5,)) * 32, g=rng())
    assert len({tuple(p.steps.tolist()) for p in paths}) == 32


def test_each_distinct_prompt_is_processed_once():
    policy = policy_of(max_new=6, ends=[1])
    shapes = forwards(policy, lambda: policy.sample(repeated(), g=rng()))
    assert shapes[0] == (4, 11)
    assert all(length == 1 for _, length in shapes[1:])


def test_equal_prompts_are_encoded_once(monkeypatch):
    policy = tiny_policy(max_new=2)
    asked: list[str] = []
    encode = policy.encode
    monkeypatch.setattr(policy, "encode", lambda prompt: asked.append(prompt) or encode(prompt))
    policy.sample(["1+1="] * 8 + ["2+2="] * 8, g=rng())
    assert asked == ["1+1=", "2+2="]


def test_finished_rows_leave_the_batch():
    policy = policy_of(max_new=40)
    paths: list = []
    shapes = forwards(policy, lambda: paths.extend(policy.sample(repeated(16), g=rng())))
    decoded = sum(rows for rows, length in shapes[1:])
    needed = sum(len(p) - 1 for p in paths)  # the first token comes from the prefill
    assert needed <= decoded <= 1.25 * needed + 40


def test_every_end_token_ends_its_path_is_trained_and_comes_last():
    policy = policy_of(max_new=40)
    paths = policy.sample(repeated(16), g=rng())
    finished = [p for p in paths if not p.truncated]
    assert len({int(p.steps[-1]) for p in finished}) > 10
    for p in finished:
        assert int(p.steps[-1]) in ENDS
        assert not any(int(t) in ENDS for t in p.steps[:-1])
        assert p.mask.all()


def test_the_tokenizers_own_end_token_counts_even_when_the_generation_config_names_another():
    assert policy_of(ends=[60]).eos == [60, 1]


def test_truncated_means_no_end_token_within_the_limit():
    paths = policy_of(max_new=3).sample(repeated(16), g=rng())
    for p in paths:
        assert p.truncated == (int(p.steps[-1]) not in ENDS)
        assert len(p) == 3 or not p.truncated
    assert {p.truncated for p in paths} == {True, False}


def test_rows_beyond_sample_rows_decode_in_further_passes_and_keep_their_order():
    policy = policy_of(sample_rows=5)
    paths = policy.sample(repeated(), g=rng())
    assert [p.prompt.tolist() for p in paths] == [p.tolist() for p in repeated()]
    assert gap(policy, paths, 1.0) < 1e-5


def test_a_stop_string_ends_the_path_and_is_kept():
    policy = policy_of(ends=[1], max_new=60)
    free = policy.sample(ragged((4,)) * 8, g=rng())
    word = free[0].output[7:9]
    stopped = policy.sample(ragged((4,)) * 8, g=rng(), stop=(word,))
    first = next(p for p in stopped if p.steps[:9].tolist() == free[0].steps[:9].tolist())
    assert first.output == free[0].output[: free[0].output.index(word) + 2]
    assert not first.truncated
    assert gap(policy, stopped, 1.0) < 1e-5


def test_the_output_is_the_text_without_the_end_token():
    policy = policy_of(ends=[1, 60])
    for p in policy.sample(repeated(), g=rng()):
        body = p.steps if p.truncated else p.steps[:-1]
        assert p.output == policy.tokenizer.decode(body, skip_special_tokens=True)


def test_a_prompt_that_does_not_fit_is_refused_with_the_numbers():
    policy = policy_of(max_new=200)
    with pytest.raises(GruppoError, match="a prompt of 60 tokens plus 200 new ones needs 260 positions, but this model has 256"):
        policy.sample(ragged((60, 3)), g=rng())


def test_a_prompt_that_just_fits_is_read_to_the_last_position():
    policy = policy_of(max_new=200, ends=[1])
    paths = policy.sample(ragged((56,)), g=rng())
    assert gap(policy, paths, 1.0) < 1e-5


def test_no_prompts_are_no_paths():
    assert policy_of().sample([], g=rng()) == []


def test_weights_with_nan_stop_the_sampling_with_a_sentence():
    policy = policy_of()
    with torch.no_grad():
        next(iter(policy.parameters()))[7] = float("nan")
    with pytest.raises(GruppoError, match="not finite at step 0 of sampling"):
        policy.sample([torch.tensor([7, 8])], g=rng())


def test_weights_with_nan_stop_greedy_decoding_too():
    policy = policy_of()
    with torch.no_grad():
        next(iter(policy.parameters()))[7] = float("nan")
    with pytest.raises(GruppoError, match="not finite at step 0 of sampling"):
        policy.sample([torch.tensor([7, 8])], g=rng(), temperature=0.0)


def test_sampling_leaves_no_gradient_and_no_training_mode_behind():
    policy = policy_of(checkpointing=True)
    paths = policy.sample(ragged(), g=rng())
    assert not policy.model.training
    assert not paths[0].logp.requires_grad
    assert all(p.grad is None for p in policy.parameters())


def test_the_long_way_round_sees_a_wrong_temperature():
    policy = policy_of(temperature=0.7)
    (path,) = policy.sample(ragged((4,)), g=rng())
    assert float((replace(path).logp - naive(policy.model, path.prompt, path.steps, 1.0)).abs().max()) > 0.01


# -- prompts that wait for room -----------------------------------------------------------------------------------------

FULL_ATTENTION = ["qwen3", "qwen2", "llama", "gemma"]


@pytest.mark.parametrize("family", FAMILIES)
def test_paths_that_took_the_room_of_others_have_the_log_probs_of_a_full_forward(family):
    policy = policy_of(family, sample_rows=5, max_new=30)
    paths = policy.sample(repeated(8), g=rng())
    assert len({len(p) for p in paths}) > 4
    assert gap(policy, paths, 1.0) < 1e-5
    assert [p.prompt.tolist() for p in paths] == [p.tolist() for p in repeated(8)]


@pytest.mark.parametrize("room", [{"sample_rows": 1}, {"sample_rows": 3}, {"sample_rows": 7}, {"sample_tokens": 200}])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_paths_do_not_depend_on_the_room(family, room):
    prompts = ragged((3, 11, 1, 7, 2, 19, 5, 4, 3), seed=8)
    found = []
    for numbers in ({}, room):
        policy = policy_of(family, max_new=30, ends=[1], **numbers)
        policy._stops = lambda ids, stop: len(ids) >= 3 + int(ids[0]) % 20  # greedy paths of random weights rarely end
        paths = policy.sample(prompts, g=rng(), temperature=0.0, stop=("end",))
        found.append([p.steps.tolist() for p in paths])
    assert len({len(p) for p in found[0]}) > 3
    assert found[0] == found[1]


def test_the_same_seed_gives_the_same_paths_when_prompts_wait():
    policy = policy_of(sample_rows=5, max_new=30)
    one, two, three = ([p.steps.tolist() for p in policy.sample(repeated(8), g=rng(s))] for s in (0, 0, 1))
    assert one == two != three


@pytest.mark.parametrize("family", FULL_ATTENTION)
def test_room_is_filled_again_before_all_rows_are_done(family):
    policy = policy_of(family, sample_rows=8, max_new=60)
    paths = policy.sample(repeated(16), g=rng())
    blocks = [paths[i : i + 8] for i in range(0, 64, 8)]
    waiting = sum(max(map(len, block)) - 1 for block in blocks)  # forwards of one token, were every block decoded alone
    assert policy.counts["decodes"] < 0.75 * waiting
    assert policy.counts["prefills"] == 4
    assert policy.counts["prompt_tokens"] == 3 + 11 + 1 + 7


def test_prompts_given_in_turns_are_still_read_once():
    policy = policy_of(sample_rows=5, max_new=30)
    prompts = ragged() * 6
    paths = policy.sample(prompts, g=rng())
    assert [p.prompt.tolist() for p in paths] == [p.tolist() for p in prompts]
    assert policy.counts["prefills"] == 4
    assert gap(policy, paths, 1.0) < 1e-5


def test_a_sliding_window_waits_until_all_rows_are_done():
    policy = policy_of("gemma3", sample_rows=6, max_new=30)
    paths = policy.sample(repeated(6), g=rng())
    blocks = [paths[i : i + 6] for i in range(0, 24, 6)]
    assert policy.counts["decodes"] == sum(max(map(len, block)) - 1 for block in blocks)


def sizes(policy, run) -> list[tuple[int, int]]:
    """Rows and columns of the cache at every forward of one token, the new one included."""
    seen = []
    policy.sample(ragged((2,)), g=rng(), max_new=1)  # the first call compares both kinds of rows
    kinds: list[Any] = [Rows, LeanRows]
    own = [kind.step for kind in kinds]

    def watched(step):
        def inner(self, token):
            seen.append((len(token), int(self.size.max()) + 1 if isinstance(self, LeanRows) else self.width + 1))
            return step(self, token)

        return inner

    for kind, step in zip(kinds, own):
        kind.step = watched(step)
    try:
        run()
    finally:
        for kind, step in zip(kinds, own):
            kind.step = step
    return seen


@pytest.mark.parametrize("budget", [60, 150, 400])
def test_rows_times_columns_stay_below_the_budget_of_tokens(budget):
    policy = policy_of(sample_tokens=budget, max_new=30)
    paths: list = []
    seen = sizes(policy, lambda: paths.extend(policy.sample(repeated(8), g=rng())))
    assert max(rows * columns for rows, columns in seen) <= budget
    assert max(rows for rows, _ in seen) > 1 or budget < 2 * 41
    assert gap(policy, paths, 1.0) < 1e-5


def test_a_row_that_alone_exceeds_the_budget_decodes_alone():
    policy = policy_of(sample_tokens=5, max_new=10)
    seen = sizes(policy, lambda: policy.sample(repeated(2), g=rng()))
    assert {rows for rows, _ in seen} == {1}


def test_entering_is_counted_against_waiting():
    policy = policy_of("qwen3")  # 2 layers, 2 x 8 keys and values a column each
    column, forward = 2 * 2 * 2 * 8, sum(p.numel() for p in policy.parameters()) + 2 * 1.3e6
    assert refilling_pays(policy, 4, 8, 100)
    # 1/4 more forwards of all weights against 2/3 of max_new more columns for each path
    even = (5 / 4 - 1) * forward / (5 * column * 2 / 3)
    assert refilling_pays(policy, 4, 5, int(even) - 1)
    assert not refilling_pays(policy, 4, 5, int(even) + 2)
    assert not refilling_pays(policy, 5, 5, 1)


def test_the_sampler_counts_what_it_computes():
    policy = policy_of(max_new=6, ends=[1])
    paths = policy.sample(repeated(), g=rng())
    assert policy.counts == {
        "prefills": 4,
        "prompt_tokens": 22,
        "decodes": 5,
        "decoded_rows": 120,
        "sampled": sum(map(len, paths)),
    }
    policy.sample(ragged((4,)), g=rng())
    assert policy.counts["prefills"] == 5
    assert policy.counts["decoded_rows"] == 125
