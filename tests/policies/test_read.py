"""Reading log-probabilities and their gradient: any cut, any padding, any precision says the same."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from tests.policies.models import FAMILIES, batch_of, gap, gradient, groups_of, naive, policy_of, ragged, relative, rng
from tests.tiny import tiny_config, tiny_model

from gruppo.core.collate import collate
from gruppo.policies.token import Head
from gruppo.types import Path


def exact(policy, batch) -> torch.Tensor:
    """[B, T] read path by path without batch, cache or padding; 0 off the mask."""
    out = torch.zeros(batch.mask.shape)
    for i, p in enumerate(batch.paths):
        out[i, : len(p)] = naive(policy.model, p.prompt, p.steps, policy.temperature)
    return out * batch.mask


@pytest.mark.parametrize("temperature", [0.7, 1.3])
@pytest.mark.parametrize("family", FAMILIES)
def test_evaluate_reproduces_the_sampler_and_the_long_way_round(family, temperature):
    policy = policy_of(family, temperature=temperature, max_new=16)
    batch = batch_of(policy)
    with torch.no_grad():
        logp = policy.evaluate(batch).logp
    assert float((logp - batch.logp_sampler).abs().max()) < 1e-5
    assert float((logp - exact(policy, batch)).abs().max()) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_entropy_is_that_of_the_tempered_distribution_and_has_no_gradient(family):
    policy = policy_of(family, temperature=0.7)
    batch = batch_of(policy, ragged((4,)), n=1)
    now = policy.evaluate(batch)
    ids = torch.cat([batch.paths[0].prompt, batch.paths[0].steps])
    with torch.no_grad():
        p = (policy.model(input_ids=ids[None]).logits[0, 3:-1] / 0.7).softmax(-1)
    assert now.entropy is not None
    assert not now.entropy.requires_grad
    torch.testing.assert_close(now.entropy[0], -(p * p.log()).sum(-1), atol=1e-5, rtol=1e-5)


def test_without_entropy_there_is_none():
    policy = policy_of(entropy=False)
    assert policy.evaluate(batch_of(policy)).entropy is None


def test_masked_steps_read_as_zero_and_still_are_context():
    policy = policy_of()
    groups = groups_of(policy)
    whole = policy.evaluate(collate(groups)).logp
    for g in groups:
        g.paths[:] = [replace(p, mask=torch.arange(len(p)) % 2 == 1) for p in g.paths]
    batch = collate(groups)
    half = policy.evaluate(batch).logp
    assert bool((half[~batch.mask] == 0).all())
    torch.testing.assert_close(half[batch.mask], whole[batch.mask], atol=5e-6, rtol=0)


def test_score_reads_every_step_whatever_the_mask_and_the_budget():
    policy = policy_of("llama", temperature=0.8)
    paths = [replace(p, mask=torch.zeros_like(p.mask)) for g in groups_of(policy) for p in g.paths]
    for budget in (1, 60, 10**6):
        for p, logp in zip(paths, policy.score(paths, budget=budget)):
            torch.testing.assert_close(logp, p.logp, atol=1e-5, rtol=0)


def test_score_reads_under_the_prompt_that_the_path_carries():
    policy = policy_of()
    (path,) = groups_of(policy, ragged((4,)), n=1)[0].paths
    moved = replace(path, prompt=ragged((9,))[0])
    torch.testing.assert_close(policy.score([moved])[0], naive(policy.model, moved.prompt, moved.steps, 1.0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_fills_the_padding_changes_nothing(family):
    policy = policy_of(family)
    batch = batch_of(policy)
    grads = []
    for filler in (0, 17):
        policy.pad = filler
        grads.append(gradient(policy, batch))
        paths = policy.sample(ragged(), g=rng(3))
        assert gap(policy, paths, 1.0) < 1e-5
    assert relative(grads[0], grads[1]) < 3e-6


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scope", ["path", "group"])
def test_split_never_changes_the_gradient(family, scope):
    policy = policy_of(family, temperature=0.7)
    batch = batch_of(policy)
    with torch.no_grad():  # off the point where every ratio is 1
        for p in policy.parameters():
            p.add_(torch.randn(p.shape, generator=rng(1)), alpha=0.02)
    whole = gradient(policy, batch)
    assert float(whole.norm()) > 0
    for budget in (1, 40, 100):
        # summed up in another order: 2.1e-6 was seen on a processor without AVX-512
        assert relative(gradient(policy, batch, budget, scope), whole) < 5e-6


@pytest.mark.parametrize("budget", [1, 30, 64, 200, 10**6])
def test_split_covers_every_trained_row_once_within_the_budget(budget):
    policy = policy_of(max_new=30)
    batch = batch_of(policy)
    parts = list(policy.split(batch, "path", budget))
    assert sorted(id(p) for part in parts for p in part.paths) == sorted(id(p) for p in batch.paths)
    for part in parts:
        assert len(part) == 1 or max(len(p.prompt) + len(p) for p in part.paths) * len(part) <= budget


def test_split_skips_rows_that_train_nothing_but_a_group_keeps_them():
    policy = policy_of()
    groups = groups_of(policy)
    groups[1].paths[0] = replace(groups[1].paths[0], mask=torch.zeros_like(groups[1].paths[0].mask))
    batch = collate(groups)
    assert sum(map(len, policy.split(batch, "path", 64))) == len(batch) - 1
    assert sum(map(len, policy.split(batch, "group", 64))) == len(batch)


def test_group_scope_never_tears_a_group_apart():
    policy = policy_of(max_new=30)
    batch = batch_of(policy, n=4)
    parts = list(policy.split(batch, "group", 1))
    assert [part.group.unique().numel() for part in parts] == [1] * 4
    assert [len(part) for part in parts] == [4] * 4


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_in_pieces_give_the_same_numbers_and_gradient(family):
    policy = policy_of(family, temperature=0.7)
    batch = batch_of(policy)
    whole, grad = policy.evaluate(batch), gradient(policy, batch)
    policy.head_elements = 7 * policy.config.vocab_size
    pieces = policy.evaluate(batch)
    # a few units in the last place of a logit near 10: how matrices of another height are added up differs between processors
    torch.testing.assert_close(pieces.logp, whole.logp, atol=5e-6, rtol=0)
    torch.testing.assert_close(pieces.entropy, whole.entropy, atol=1e-5, rtol=0)
    assert relative(gradient(policy, batch), grad) < 2e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_no_more_logits_are_formed_than_the_budget_allows(family):
    policy = policy_of(family)
    batch = batch_of(policy)
    policy.head_elements = 5 * policy.config.vocab_size
    seen: list[int] = []
    hook = policy.model.get_output_embeddings().register_forward_hook(lambda m, i, out: seen.append(out.numel()))
    gradient(policy, batch)
    hook.remove()
    assert max(seen) == 5 * policy.config.vocab_size


def test_a_model_whose_head_cannot_be_taken_apart_keeps_its_own_logits():
    policy = policy_of("llama", temperature=0.7)
    inner, own = policy.model.forward, gradient(policy, batch := batch_of(policy))
    policy.model.forward = lambda *a, **k: _scaled(inner(*a, **k))
    policy.head = Head.of(policy.model)
    assert policy.head.finish is None
    again = batch_of(policy)
    logp = policy.evaluate(again).logp.detach()
    assert float((logp - again.logp_sampler).abs().max()) < 1e-5
    assert float((logp - exact(policy, again)).abs().max()) < 1e-5
    assert relative(gradient(policy, batch), own) > 0.01


def _scaled(out):
    out.logits = out.logits / 3
    return out


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_gives_the_same_gradient(family):
    plain, saving = policy_of(family), policy_of(family, checkpointing=True)
    batch = batch_of(plain)
    assert relative(gradient(saving, batch), gradient(plain, batch)) < 3e-6
    assert not saving.model.training


def test_gradient_checkpointing_computes_the_layers_again_in_backward():
    policy = policy_of(checkpointing=True)
    batch = batch_of(policy)
    calls: list[int] = []
    policy.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    gradient(policy, batch)
    assert len(calls) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_autocast_reads_near_and_trains_near(family):
    plain, half = policy_of(family), policy_of(family, autocast=torch.bfloat16)
    batch = batch_of(plain)
    difference = (half.evaluate(batch).logp - plain.evaluate(batch).logp).detach().abs()[batch.mask]
    assert 0 < float(difference.mean()) < 0.15
    assert half.evaluate(batch).logp.dtype == torch.float32
    g, h = gradient(plain, batch), gradient(half, batch)
    assert float(torch.nn.functional.cosine_similarity(g, h, dim=0)) > 0.9


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama", "gemma", "gemma2"])
def test_a_model_configured_with_dropout_has_ratio_one_and_a_repeatable_gradient(family):
    policy = policy_of(family)
    noisy = type(policy)(_with_dropout(family), policy.tokenizer, max_new=12)
    batch = batch_of(noisy)
    assert float(((noisy.evaluate(batch).logp.detach() - batch.logp_old).exp() - 1).abs().max()) < 1e-5
    assert relative(gradient(noisy, batch), gradient(noisy, batch)) == 0


def test_dropout_stays_silent_in_the_training_mode_that_checkpointing_needs():
    noisy = type(policy_of())(_with_dropout("llama"), policy_of().tokenizer, max_new=12, checkpointing=True)
    batch = batch_of(noisy)
    assert float(((noisy.evaluate(batch).logp.detach() - batch.logp_old).exp() - 1).abs().max()) < 1e-5


def _with_dropout(family: str):
    model = type(tiny_model(family))(tiny_config(family, attention_dropout=0.3)).eval()
    for layer in model.model.layers:
        layer.mlp = torch.nn.Sequential(layer.mlp, torch.nn.Dropout(0.3))
    return model


def test_reading_a_batch_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy = policy_of(checkpointing=True)
        gradient(policy, batch_of(policy))


def test_prompts_of_one_token_without_an_answer_read_as_nothing():
    nothing = [Path(torch.tensor([5]), torch.tensor([], dtype=torch.long), torch.zeros(0), torch.zeros(0, dtype=torch.bool))] * 2
    assert [len(p) for p in policy_of("qwen3").score(nothing)] == [0, 0]
