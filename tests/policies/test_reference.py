"""Reference policies: adapters switched off, frozen copies, moving averages."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.policies.models import FAMILIES, batch_of, gradient, policy_of, relative, rng

from gruppo.policies.reference import AdapterOff, Average, Ema, Frozen, Warming, initial, swapped
from gruppo.policies.token import TokenPolicy


def disturb(policy: TokenPolicy, size: float = 0.05, seed: int = 0) -> None:
    """What an optimizer step does to the trained parameters."""
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(torch.randn(p.shape, generator=rng(seed)), alpha=size)


def lora(family: str = "qwen3", **numbers) -> TokenPolicy:
    base = policy_of(family)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(base.model, config)
    return TokenPolicy(model, base.tokenizer, max_new=12, **numbers)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_adapter_parameters_train_and_the_base_never_moves(family):
    policy = lora(family)
    before = {n: p.clone() for n, p in policy.model.named_parameters() if "lora" not in n}
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.1)
    gradient(policy, batch_of(policy))
    optimizer.step()
    assert {n for n, p in policy.model.named_parameters() if p.requires_grad} == {
        n for n, _ in policy.model.named_parameters() if "lora" in n
    }
    assert all(torch.equal(before[n], p) for n, p in policy.model.named_parameters() if n in before)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_samples_and_reads_the_same_distribution(family):
    policy = lora(family, temperature=0.7)
    disturb(policy, 0.3)
    batch = batch_of(policy)
    assert float((policy.evaluate(batch).logp.detach() - batch.logp_sampler).abs().max()) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_the_adapter_switched_off_is_the_base_model(family):
    base = policy_of(family, temperature=0.7)
    batch = batch_of(base)
    expected = base.evaluate(batch).logp.detach()
    policy = lora(family, temperature=0.7)
    disturb(policy, 0.3)
    reference = initial(policy)
    assert isinstance(reference, AdapterOff)
    torch.testing.assert_close(reference.evaluate(batch).logp, expected, atol=5e-6, rtol=0)
    for p, logp in zip(batch.paths, reference.score(batch.paths)):
        torch.testing.assert_close(logp, p.logp, atol=1e-5, rtol=0)
    assert float((policy.evaluate(batch).logp.detach() - expected).abs().max()) > 0.01


def test_lora_with_gradient_checkpointing_has_the_same_gradient():
    plain, saving = lora(), lora(checkpointing=True)
    for p in (plain, saving):
        disturb(p, 0.3)
    batch = batch_of(plain)
    g = gradient(plain, batch)
    assert float(g.norm()) > 0
    assert relative(gradient(saving, batch), g) < 3e-6


def test_a_frozen_reference_keeps_saying_what_the_policy_said_at_first():
    policy = policy_of()
    batch = batch_of(policy)
    first = policy.evaluate(batch).logp.detach()
    reference = initial(policy)
    assert isinstance(reference, Frozen)
    disturb(policy)
    reference.update([])
    assert torch.equal(reference.evaluate(batch).logp, first)
    assert float((policy.evaluate(batch).logp.detach() - first).abs().max()) > 0.01
    torch.testing.assert_close(reference.score(batch.paths)[0], batch.paths[0].logp, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", [Frozen, lambda p: Ema(p, 0.5, 1)], ids=["frozen", "average"])
def test_a_reference_leaves_the_policys_weights_and_gradient_as_they_were(kind):
    policy = policy_of()
    reference = kind(policy)
    disturb(policy)
    batch = batch_of(policy)
    weights = [p.clone() for p in policy.parameters()]
    alone = gradient(policy, batch)
    for p in policy.parameters():
        p.grad = None
    (batch,) = policy.split(batch, "path", 10**6)
    now = policy.evaluate(batch)
    ref = reference.evaluate(batch)
    reference.update([])
    assert not ref.logp.requires_grad
    (batch.weight * batch.advantage * (now.logp - batch.logp_old).exp()).sum().backward()
    beside = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in policy.parameters()])
    assert torch.equal(alone, beside)
    assert all(torch.equal(a, b) for a, b in zip(weights, policy.parameters()))


def test_the_weights_come_back_when_the_reference_fails_inside():
    policy = policy_of()
    reference = Frozen(policy)
    disturb(policy)
    weights = [p.clone() for p in policy.parameters()]
    with pytest.raises(ZeroDivisionError), swapped(policy, reference.weights):
        raise ZeroDivisionError
    assert all(torch.equal(a, b) for a, b in zip(weights, policy.parameters()))


def test_the_average_follows_its_formula():
    policy = policy_of()
    reference = Average(decay=0.9)(policy)
    expected = [p.detach().clone().double() for p in policy.parameters()]
    for step in range(3):
        disturb(policy, seed=step)
        reference.update([])
        expected = [0.9 * e + 0.1 * p.detach().double() for e, p in zip(expected, policy.parameters())]
    for w, e in zip(reference.weights, expected):
        torch.testing.assert_close(w.double(), e, atol=1e-6, rtol=0)


def test_the_average_moves_only_every_so_many_iterations():
    policy = policy_of()
    reference = Average(decay=0.0, every=3)(policy)
    first = [w.clone() for w in reference.weights]
    disturb(policy)
    for _ in range(2):
        reference.update([])
    assert all(torch.equal(a, b) for a, b in zip(first, reference.weights))
    reference.update([])
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), reference.weights))


def test_a_warming_average_follows_its_formula():
    assert [round(Warming()(n), 4) for n in (0, 7, 15, 79, 80, 81, 10_000)] == [0.1, 0.4706, 0.64, 0.8989, 0.9, 0.9, 0.9]
    policy = policy_of()
    average = Ema(policy, Warming(most=0.6, slow=4.0), 2)
    expected = [p.detach().clone().double() for p in policy.parameters()]
    for step in range(6):  # n = 1, 3, 5 at the second, fourth, sixth update: 2/5, 4/7, 6/9 > .6
        disturb(policy, seed=step)
        average.update([])
        if step % 2:
            d = {1: 2 / 5, 3: 4 / 7, 5: 0.6}[step]
            expected = [d * e + (1 - d) * p.detach().double() for e, p in zip(expected, policy.parameters())]
    for w, e in zip(average.weights, expected):
        torch.testing.assert_close(w.double(), e, atol=1e-6, rtol=0)


def test_the_average_of_low_precision_weights_does_not_stand_still():
    policy = policy_of()
    policy.model.to(torch.bfloat16)
    reference = Average(decay=0.9999)(policy)
    start = [w.float().clone() for w in reference.weights]
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(1.0)
    for _ in range(20):
        reference.update([])
    moved = torch.cat([(w.float() - s).flatten() for w, s in zip(reference.weights, start)])
    assert float(moved.mean()) == pytest.approx(1 - 0.9999**20, rel=0.05)


def test_a_saved_average_goes_on_as_if_it_had_not_been_interrupted():
    policy = policy_of()
    one = Average(decay=0.9, every=2)(policy)
    disturb(policy)
    for _ in range(3):
        one.update([])
    saved = {"seen": one.state_dict()["seen"], "weights": [w.clone() for w in one.state_dict()["weights"]]}
    two = Average(decay=0.9, every=2)(policy)
    two.load_state_dict(saved)
    disturb(policy, seed=7)
    for reference in (one, two):
        reference.update([])
    assert all(torch.equal(a, b) for a, b in zip(one.weights, two.weights))
    batch = batch_of(policy)
    assert torch.equal(one.evaluate(batch).logp, two.evaluate(batch).logp)
