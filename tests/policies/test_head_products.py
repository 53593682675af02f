"""The output head's large products by oneDNN: the formula's numbers and gradients, and few shapes."""

from __future__ import annotations

import pytest
import torch
from tests.tiny import tiny_policy
from torch import Tensor

from gruppo.policies import head, products

pytestmark = pytest.mark.skipif(not products.usable(), reason="this build of torch has no oneDNN")


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Of all products that go through oneDNN, which are all but none."""
    monkeypatch.setattr(products, "LEAST", 0)
    seen, own = [], products.product

    def product(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        seen.append((*x.shape, len(w)))
        return own(x, w, bias)

    monkeypatch.setattr(products, "product", product)
    return seen


def example(n: int, width: int = 24, vocabulary: int = 40) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(n)
    hidden, weight = (torch.randn(k, width, generator=g).mul_(0.5).requires_grad_() for k in (n, vocabulary))
    return hidden, weight, torch.randint(vocabulary, (n,), generator=g), torch.randn(n, generator=g)


@pytest.mark.parametrize("elements", [10**6, 1000])  # kept for backward; formed again in pieces of 24 rows
@pytest.mark.parametrize("piece", [2**21, 700])  # 17 rows of this vocabulary, of which 16 are taken
def test_numbers_and_gradients_are_those_of_the_formula(elements, piece, shapes, monkeypatch):
    monkeypatch.setattr(head, "PIECE", piece)
    hidden, weight, target, share = example(61)
    logp, entropy = head.read(hidden, weight, target, 0.7, elements, True, True)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    every = (exact[0] @ exact[1].T / 0.7).log_softmax(-1)
    want = every.gather(-1, target[:, None])[:, 0]
    assert entropy is not None
    torch.testing.assert_close(logp.double(), want, atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy.double(), -(every.exp() * every).sum(-1), atol=1e-5, rtol=0)
    mine = torch.autograd.grad((share * logp.exp()).sum(), [hidden, weight])
    theirs = torch.autograd.grad((share * want.exp()).sum(), exact)
    for a, b in zip(mine, theirs):
        assert float((a - b).norm() / b.norm()) < 2e-6
    assert shapes
    assert all(n == products.rounded(n) for a, b, c in shapes for n in (a, b, c))
    assert max(a * c for a, _, c in shapes if c == 40) <= min(elements, piece, 64 * 40)


def test_a_weight_larger_than_logits_may_be_has_no_second_array_beside_its_gradient(shapes):
    hidden, weight, target, share = example(61)
    grads = []
    for elements in (10**6, 8 * 40):  # the weight has 960 numbers
        logp, _ = head.read(hidden, weight, target, 1.0, elements, False, True)
        shapes.clear()
        grads.append(torch.autograd.grad((share * logp).sum(), weight)[0])
        assert any(a == 40 and c == 24 for a, _, c in shapes) == (elements == 10**6)
    assert float((grads[0] - grads[1]).norm() / grads[0].norm()) < 2e-6


@pytest.mark.parametrize("n", range(8, 700, 7))
def test_a_round_number_below(n):
    found = products.floored(n)
    assert found == products.rounded(found)
    assert 0.8 * n < found <= n or n - found < 8


def test_it_is_the_policys_choice(shapes):
    from gruppo.policies.token import TokenPolicy

    base = tiny_policy()
    for onednn in (True, False):
        policy = TokenPolicy(base.model, base.tokenizer, onednn=onednn)
        h = torch.randn(64, 32)
        shapes.clear()
        policy.head.read(h, torch.zeros(64, dtype=torch.long), 1.0, 2**20, False)
        assert bool(shapes) == onednn


def test_other_types_are_torchs(shapes):
    hidden, weight, target, _ = example(61)
    head.read(hidden.double(), weight.double(), target, 1.0, 10**6, False, True)
    with torch.autocast("cpu", torch.bfloat16):
        head.read(hidden, weight, target, 1.0, 10**6, False, True)
    assert not shapes


def test_small_products_and_weights_with_products_of_their_own_are_torchs(shapes, monkeypatch):
    hidden, weight, target, _ = example(61)
    shard = weight.detach().as_subclass(type("Shard", (Tensor,), {}))
    head.read(hidden.detach(), shard, target, 1.0, 10**6, False, True)
    assert not shapes
    monkeypatch.setattr(products, "LEAST", 2 * 61 * weight.numel() + 1)
    head.read(hidden, weight, target, 1.0, 10**6, False, True)
    assert not shapes
    monkeypatch.setattr(products, "LEAST", 2 * 61 * weight.numel())
    head.read(hidden, weight, target, 1.0, 10**6, False, True)
    assert shapes
