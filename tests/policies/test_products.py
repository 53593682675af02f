"""Products by oneDNN and attention made of them: the numbers of float64, and everything left as it was outside."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gruppo import bench
from gruppo.policies import prefix, products, tiles
from gruppo.policies.flow import FlowPolicy
from gruppo.policies.painters import load_painter
from gruppo.policies.token import TokenPolicy
from gruppo.types import GruppoError
from gruppo.worlds import WORLDS
from gruppo.worlds.tokenizer import tokenizer

pytestmark = pytest.mark.skipif(not products.usable(), reason="this build of torch has no oneDNN")


def close(a: Tensor, b: Tensor) -> None:
    gap = float((a.detach() - b.detach()).abs().max())
    assert gap <= 1e-5 + 1e-5 * float(b.detach().abs().max()), gap


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(3, 70), (200,)])
def test_a_linear_layer_and_its_gradients(shape: tuple[int, ...], biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "LEAST", 0)
    monkeypatch.setattr(products, "LEAST_READ", 0)
    torch.manual_seed(0)
    x, w, b, g = torch.randn(*shape, 48), torch.randn(96, 48), torch.randn(96), torch.randn(*shape, 96)
    leaves = [t.requires_grad_() for t in (x, w, *([b] if biased else []))]
    out = products.linear(x, w, b if biased else None)
    assert "_Linear" in type(out.grad_fn).__name__
    exact = [t.detach().double().requires_grad_() for t in leaves]
    truth = F.linear(*exact)
    close(out.detach(), truth.detach())
    for mine, theirs in zip(torch.autograd.grad(out, leaves, g), torch.autograd.grad(truth, exact, g.double())):
        close(mine, theirs)


def test_frozen_weights_get_no_gradient_and_pass_one_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "LEAST", 0)
    monkeypatch.setattr(products, "LEAST_READ", 0)
    x, w = torch.randn(20, 16, requires_grad=True), torch.randn(8, 16)
    products.linear(x, w).sum().backward()
    assert x.grad is not None
    close(x.grad, w.sum(0).expand(20, 16))
    assert w.grad is None


def test_weights_in_any_order_in_memory() -> None:
    x, w = torch.randn(64, 32), torch.randn(40, 70)
    for some in (w[:, :32], w.T[:32, :].T, w[::2, 5:37], torch.randn(32, 40).T):
        close(products.product(x, some), x @ some.T)


def test_small_products_other_precisions_and_autocast_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "product", lambda *_: pytest.fail("oneDNN was called"))
    big, w = torch.randn(4096, 64), torch.randn(64, 64)
    products.linear(big[:8], w)
    products.linear(big.double(), w.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert products.linear(big, w).dtype == torch.bfloat16
    with pytest.raises(pytest.fail.Exception):
        products.linear(big, w)


def test_layers_are_as_they_were_outside_and_others_hooks_stay() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    hooked = lambda x: x  # noqa: E731
    vars(model[2])["forward"] = hooked
    swap = products.Linears(model)
    with swap():
        assert "forward" in vars(model[0])
        with swap():
            pass
        assert "forward" in vars(model[0]), "the inner one took what the outer one had put there"
        twin = copy.deepcopy(model)
    assert "forward" not in vars(model[0])
    assert vars(model[2])["forward"] is hooked
    assert twin[0](torch.ones(1, 4)).shape == (1, 4)


def test_wanted_where_there_is_none_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "usable", lambda: False)
    with pytest.raises(GruppoError, match=r"policy\.onednn"):
        products.chosen(True)
    assert products.chosen(False) is False


def dense(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """The same by one softmax, [T, H, D] and [T, H]."""
    r = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(r, 1) for x in (k, v))
    score = torch.einsum("thd,shd->hts", q, k) * q.shape[-1] ** -0.5
    if causal:
        score = score.masked_fill(torch.ones(score.shape[1:], dtype=torch.bool).triu(1), float("-inf"))
    return torch.einsum("hts,shd->thd", score.softmax(-1), v), score.logsumexp(-1).T


@pytest.mark.parametrize(
    ("T", "S", "causal"), [(300, 300, True), (64, 64, True), (1, 1, True), (217, 300, False), (33, 128, False)]
)
@pytest.mark.parametrize(("H", "K"), [(4, 2), (2, 2), (8, 1)])
def test_a_region_in_tiles(T: int, S: int, causal: bool, H: int, K: int) -> None:
    torch.manual_seed(0)
    q, k, v, g = torch.randn(T, H, 16), torch.randn(S, K, 16), torch.randn(S, K, 16), torch.randn(T, H, 16)
    q *= 5  # a softmax that is not flat
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    truth, norm = dense(exact[0], exact[1], exact[2], causal)
    out, lse = tiles.forward(q, k, v, 16**-0.5, causal)
    close(out, truth.detach())
    close(lse, norm.detach())
    grads = torch.autograd.grad(truth, exact, g.double())
    for mine, theirs in zip(tiles.backward(g, q, k, v, out, lse, 16**-0.5, causal), grads):
        close(mine, theirs)


def test_queries_without_any_likely_key_stay_finite() -> None:
    q, k = torch.full((40, 2, 16), 40.0), torch.randn(200, 2, 16)
    k[:100] = -40.0  # scores down to -6400: far below what exp can hold
    out, lse = tiles.forward(q, k, k, 0.25, False)
    truth, norm = dense(q.double(), k.double(), k.double(), False)
    close(out, truth)
    close(lse, norm)


def test_the_merged_form_in_tiles_is_the_dense_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "LEAST", 0)
    torch.manual_seed(0)
    begin = torch.randint(0, 9, (70,))
    rows = [torch.cat([begin, torch.randint(0, 9, (n,))]) for n in (40, 3, 40, 17)]
    layout = prefix.lay(rows)
    q, k, v = (torch.randn(1, n, layout.total, 16, requires_grad=True) for n in (4, 2, 2))
    g, found = torch.randn(1, layout.total, 4, 16), []
    for form, tiled in (("mask", False), ("lse", True)):
        layout.form, layout.tiled = form, tiled  # pyright: ignore[reportAttributeAccessIssue]
        out, _ = prefix.attend(nn.Identity(), q, k, v, None, prefix_layout=layout)
        found.append((out, *torch.autograd.grad(out, (q, k, v), g)))
    for mine, theirs in zip(found[1], found[0]):
        close(mine, theirs)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_by_onednn_has_the_loss_and_gradient_of_training_without(checkpointing: bool) -> None:
    work = bench.Work(1, 200, 40, 70)
    sides = [bench.Here(work) for _ in range(2)]
    for side, onednn in zip(sides, (False, True)):
        side.policy = TokenPolicy(side.model, tokenizer(), onednn=onednn, checkpointing=checkpointing)
    old = sides[0].score()
    assert max(float((a - b).abs().max()) for a, b in zip(old, sides[1].score())) < 1e-5
    losses = [s.train(s.given(old)) for s in sides]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    mine, theirs = (torch.cat([g.flatten() for g in bench.gradient(s.model).values()]) for s in sides)
    assert float((mine - theirs).norm() / theirs.norm()) < 1e-5
    assert not torch.equal(mine, theirs), "both sides ran the same products"


def test_a_painter_by_onednn_predicts_what_it_predicts_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "LEAST", 0)
    monkeypatch.setattr(products, "LEAST_READ", 0)
    found = []
    for onednn in (False, True):
        policy = FlowPolicy(load_painter(WORLDS["glyphs"].base, dtype=torch.float32, device="cpu"), steps=2, onednn=onednn)
        x = policy.noise(2, torch.Generator().manual_seed(0))
        v = policy.velocity(x, torch.tensor([0.9, 0.5]), [WORLDS["glyphs"].task(0, 0).prompt] * 2, counted="sampled")
        found.append((v.detach(), *torch.autograd.grad(v.square().mean(), list(policy.parameters()))))
    for mine, theirs in zip(*found):
        close(mine, theirs)
    assert not torch.equal(found[0][0], found[1][0]), "both sides ran the same products"


def test_row_counts_are_filled_up_to_few_numbers() -> None:
    """oneDNN keeps memory for every shape that it has seen."""
    shapes = {products.rounded(n) for n in range(1, 8193)}
    assert len(shapes) <= 64
    assert all(n <= products.rounded(n) <= max(8 * -(-n // 8), n + n // 8) for n in range(1, 8193))


def test_products_of_all_lengths_start_few_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[tuple[int, ...]] = set()
    own = products.product

    def watched(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        seen.add((*x.shape, *w.shape))
        return own(x, w, bias)

    monkeypatch.setattr(products, "product", watched)
    w = torch.randn(256, 256, requires_grad=True)
    for n in range(257, 513, 5):
        products.linear(torch.randn(n, 256, requires_grad=True), w).sum().backward()
    assert 0 < len(seen) <= 3 * 8
