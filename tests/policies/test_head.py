"""log p and entropy from hidden states: the numbers and gradients of the plain formula, and what is kept for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.tiny import tiny_policy
from torch import Tensor

from gruppo.policies import head


def plainly(hidden: Tensor, weight: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logp = (hidden @ weight.T / temperature).log_softmax(-1)
    return logp.gather(-1, target[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def example(dtype: torch.dtype = torch.float64, n: int = 23, width: int = 6, vocabulary: int = 11) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, width, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    return (
        hidden,
        weight,
        torch.randint(vocabulary, (n,), generator=g),
        torch.randn(n, generator=g, dtype=torch.float64).to(dtype),
    )


@pytest.mark.parametrize("elements", [10**6, 55, 1])  # kept for backward; formed again in pieces; a row at a time
@pytest.mark.parametrize("piece", [2**21, 33])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_numbers_and_gradients_are_those_of_the_formula(elements, piece, dtype, allowed, monkeypatch):
    monkeypatch.setattr(head, "PIECE", piece)
    hidden, weight, target, share = example(dtype)
    logp, entropy = head.read(hidden, weight, target, 0.7, elements, True)
    want, spread = plainly(hidden, weight, target, 0.7)
    assert entropy is not None
    assert not entropy.requires_grad
    torch.testing.assert_close(logp, want, atol=20 * allowed, rtol=0)
    torch.testing.assert_close(entropy, spread, atol=20 * allowed, rtol=0)
    # a loss whose gradient depends on log p itself, as every ratio does
    mine = torch.autograd.grad((share * logp.exp()).sum(), [hidden, weight])
    theirs = torch.autograd.grad((share * want.exp()).sum(), [hidden, weight])
    for a, b in zip(mine, theirs):
        assert float((a - b).norm() / b.norm()) < allowed


@pytest.mark.parametrize("elements", [10**6, 55])
def test_a_second_backward_through_the_same_forward_gives_the_same(elements):
    hidden, weight, target, share = example()
    logp, _ = head.read(hidden, weight, target, 1.0, elements, False)
    first, second = (torch.autograd.grad((share * logp).sum(), [hidden, weight], retain_graph=True) for _ in range(2))
    for a, b in zip(first, second):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_only_what_is_trained_gets_a_gradient():
    hidden, weight, target, share = example()
    logp, _ = head.read(hidden, weight.detach(), target, 1.0, 55, False)
    (share * logp).sum().backward()
    want = torch.autograd.grad((share * plainly(hidden, weight, target, 1.0)[0]).sum(), hidden)[0]
    torch.testing.assert_close(hidden.grad, want, atol=1e-12, rtol=0)
    assert weight.grad is None


def test_under_autocast_the_products_are_in_its_type():
    hidden, weight, target, share = example(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        logp, _ = head.read(hidden, weight, target, 0.7, 55, True)
    want = plainly(hidden.bfloat16().float(), weight.bfloat16().float(), target, 0.7)[0]
    assert logp.dtype == torch.float32
    torch.testing.assert_close(logp, want, atol=0.05, rtol=0)
    (share * logp).sum().backward()
    theirs = torch.autograd.grad((share * plainly(hidden, weight, target, 0.7)[0]).sum(), weight)[0]
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    assert float((weight.grad - theirs).norm() / theirs.norm()) < 0.02


@pytest.mark.parametrize("elements", [10**6, 55])
def test_no_array_of_logits_is_kept_but_the_one_that_may_be(elements):
    hidden, weight, target, _ = example()
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        logp, _ = head.read(hidden, weight, target, 0.7, elements, True)
    assert max(sizes) == hidden.numel()
    kept = logp.grad_fn.kept  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
    assert (kept is None) == (elements == 55)


def test_a_head_with_a_bias_an_adapter_or_a_hook_is_left_to_its_own_forward():
    assert head.plain(torch.nn.Linear(3, 4, bias=False))
    assert not head.plain(torch.nn.Linear(3, 4))
    assert not head.plain(torch.nn.Sequential(torch.nn.Linear(3, 4, bias=False)))
    assert not head.plain(type("Other", (torch.nn.Linear,), {})(3, 4, bias=False))
    hooks = (
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    )
    for hook in hooks:
        watched = torch.nn.Linear(3, 4, bias=False)
        getattr(watched, hook)(lambda *_: None)
        assert not head.plain(watched), hook


def test_a_frozen_weight_costs_no_product(monkeypatch):
    hidden, weight, target, share = example()
    logp, _ = head.read(hidden, weight.detach(), target, 1.0, 55, False)
    monkeypatch.setattr(Tensor, "addmm_", lambda *_: pytest.fail("its gradient was computed"))
    (share * logp).sum().backward()
    assert hidden.grad is not None


def test_pieces_are_small_and_nothing_is_kept_where_nothing_is_trained(monkeypatch):
    hidden, weight, target, _ = example()
    pieces: list[tuple[int, bool]] = []
    own = head._logits

    def watched(*args: Any) -> Tensor:
        pieces.append(((z := own(*args)).numel(), args[-1] is not None))
        return z

    monkeypatch.setattr(head, "_logits", watched)
    monkeypatch.setattr(head, "PIECE", 33)
    head.read(hidden, weight, target, 0.7, 10**6, True)
    assert len(pieces) == 8
    assert all(size <= 33 and kept for size, kept in pieces)
    pieces.clear()
    with torch.no_grad():
        head.read(hidden, weight, target, 0.7, 10**6, True)
    assert len(pieces) == 8
    assert not any(kept for _, kept in pieces)


def test_a_policy_reads_through_it(monkeypatch):
    policy = tiny_policy("qwen3")
    called: list[int] = []
    inner = head.read
    monkeypatch.setattr(head, "read", lambda *a: called.append(len(a[0])) or inner(*a))
    policy.score(policy.sample(["12+3="], g=torch.Generator().manual_seed(0)))
    assert called
