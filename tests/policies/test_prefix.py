"""Shared prefixes: the packed forward says what the ordinary one says, log-probabilities and gradients, and does less work."""

from __future__ import annotations

import pathlib
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.policies.models import FAMILIES, gradient, naive, policy_of, relative, rng
from tests.tiny import tiny_model, tiny_tokenizer
from torch import Tensor
from transformers import Qwen2VLTextConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLTextModel

import gruppo.recipes
from gruppo.core.collate import collate
from gruppo.core.reduce import sequence_mean, weigh
from gruppo.policies import prefix
from gruppo.policies.reference import initial
from gruppo.policies.token import TokenPolicy
from gruppo.recipes import recipe
from gruppo.train import accumulate
from gruppo.types import Batch, Group, GruppoError, Path, Task

ALWAYS = prefix.Rates(pair=1.0, call=0.0, touch=0.0, small=0.0, margin=-1e9)  # fork wherever rows part, whatever it gains
# forks of three tokens or more, all lengths in one call
PADDED = prefix.Rates(pair=0.01, call=2e4, touch=0.0, small=0.0, margin=-1e9)
FORMS: tuple[prefix.Form, ...] = ("lse", "two", "mask")


# ---- paths of every shape


def tokens(n: int, seed: int) -> Tensor:
    return torch.randint(5, 59, (n,), generator=rng(seed))


def path(prompt: Tensor, steps: Tensor, fork: tuple[int, int] | None = None, mask: Tensor | None = None) -> Path:
    mask = torch.ones(len(steps), dtype=torch.bool) if mask is None else mask
    return Path(prompt, steps, -2.0 - torch.rand(len(steps), generator=rng(len(steps))), mask, fork=fork)


def parallel() -> list[Group]:
    """One prompt, five ragged completions."""
    p = tokens(9, 1)
    return [Group(Task(p), [path(p, tokens(n, 10 + n)) for n in (7, 3, 12, 1, 5)])]


def serial() -> list[Group]:
    """One thought, cut at four places (S-GRPO): each row keeps the thought up to its cut and ends in its own way."""
    p, thought = tokens(8, 2), tokens(15, 3)
    paths = [path(p, thought)]
    for t in (3, 6, 7, 11):
        paths.append(path(p, torch.cat([thought[:t], tokens(4, 20 + t)]), fork=(0, t)))
    return [Group(Task(p), paths)]


def tree() -> list[Group]:
    """Forks of forks of forks; the last row repeats an earlier one."""
    p = tokens(6, 4)
    steps, forks = [tokens(10, 5)], [None]
    for row, t in ((0, 4), (1, 7), (0, 8), (2, 9), (1, 5), (3, 10)):
        forks.append((row, t))
        steps.append(torch.cat([steps[row][:t], tokens(10 - t + row, 30 + t)]))
    return [Group(Task(p), [path(p, s, fork=f) for s, f in zip(steps, forks)])]


def several() -> list[Group]:
    """Four prompts, one of a single token, one the beginning of another, one with a single completion."""
    long = tokens(14, 6)
    prompts = [long, tokens(1, 7), long[:9], tokens(20, 8)]
    sizes = [(4, 9, 2), (5, 5, 5), (8, 3), (6,)]
    return [Group(Task(p), [path(p, tokens(n, 40 + n + i)) for n in some]) for i, (p, some) in enumerate(zip(prompts, sizes))]


def masked() -> list[Group]:
    """Untrained stretches, untrained ends, rows that train nothing, and a row that trains its last step only."""
    p = tokens(10, 9)
    every = torch.arange(12)
    masks = [every % 3 == 0, every < 4, every < 0, every == 11, every >= 6]
    return [Group(Task(p), [path(p, tokens(12, 50 + i), mask=m) for i, m in enumerate(masks)])]


SHAPES: dict[str, Callable[[], list[Group]]] = {
    "parallel": parallel,
    "serial": serial,
    "tree": tree,
    "several": several,
    "masked": masked,
}


def batch(shape: str) -> Batch:
    groups = SHAPES[shape]()
    for i, g in enumerate(groups):
        g.advantage = torch.randn(len(g), g.width, generator=rng(i)) * g.mask
    return weigh(collate(groups), sequence_mean)


def pair(family: str = "qwen3", rates: prefix.Rates = ALWAYS, **numbers: Any) -> tuple[TokenPolicy, TokenPolicy]:
    """The policy that computes every prompt once per completion, and the one that shares; the same weights."""
    return policy_of(family, sharing=None, **numbers), policy_of(family, sharing=rates, **numbers)


def only(monkeypatch: pytest.MonkeyPatch, *forms: prefix.Form) -> None:
    monkeypatch.setattr(prefix, "forms", lambda device: forms)


def layout_of(policy: TokenPolicy, some: Batch) -> prefix.Layout:
    plan = policy._plan([p.prompt for p in some.paths], [p.steps for p in some.paths], some.mask)
    assert plan is not None
    return plan.layout


def unique(some: Batch) -> int:
    """Different beginnings of prompt and steps, up to each row's last trained step: what has to be computed."""
    seen = set()
    for p, mask in zip(some.paths, some.mask):
        end = int(mask.nonzero().max()) if mask.any() else -len(p.prompt)
        ids = [*p.prompt.tolist(), *p.steps.tolist()][: len(p.prompt) + end]
        seen |= {tuple(ids[: n + 1]) for n in range(len(ids))}
    return len(seen)


class Count:
    """Forwards of the first layer and the tokens that pass it."""

    def __init__(self, policy: TokenPolicy) -> None:
        self.forwards, self.tokens = 0, 0
        decoder = policy.head._parts()[0]
        decoder.layers[0].mlp.register_forward_pre_hook(lambda m, args: self._see(args[0]))

    def _see(self, x: Tensor) -> None:
        self.forwards, self.tokens = self.forwards + 1, self.tokens + x.shape[0] * x.shape[1]

    def clear(self) -> None:
        self.forwards = self.tokens = 0


# ---- where every token stands


def test_the_layout_of_a_prompt_of_three_and_completions_of_two_and_one() -> None:
    a = prefix.lay([torch.tensor([9, 9, 9, 1, 2]), torch.tensor([9, 9, 9, 3])])
    assert a.depth.tolist() == [0, 1, 2, 3, 4, 3]
    rows = ["".join(map(str, row)) for row in prefix.visible(a).int().tolist()]
    assert rows == ["100000", "110000", "111000", "111100", "111110", "111001"]
    assert [s.tolist() for s in a.spots] == [[0, 1, 2, 3, 4], [0, 1, 2, 5]]


@pytest.mark.parametrize(("P", "C", "G", "tokens"), [(4096, 128, 8, 5120), (1024, 32, 8, 1280), (128, 64, 8, 640)])
def test_a_group_has_one_prompt_and_its_completions(P: int, C: int, G: int, tokens: int) -> None:
    rows = [torch.cat([torch.arange(P), torch.full((C,), P + i)]) for i in range(G)]
    a = prefix.lay(rows)
    assert a.total == tokens
    assert len(a.regions) == 1
    assert (a.regions[0].q1 - a.regions[0].q0, a.regions[0].k1) == ((G - 1) * C, P)


@pytest.mark.parametrize("seed", range(60))
def test_every_token_sees_its_own_path_and_nothing_else(seed: int) -> None:
    r = random.Random(seed)
    rows = [torch.tensor([r.randint(0, r.randint(1, 3)) for _ in range(r.randint(0, 9))]).long() for _ in range(r.randint(1, 9))]
    least = r.choice([1, 1, 2, 4])
    a = prefix.lay(rows, least)
    sees = prefix.visible(a)
    for i, row in enumerate(rows):
        spots = a.spots[i].tolist()
        assert [int(rows[a.owner[j]][a.depth[j]]) for j in spots] == row.tolist()
        for n, j in enumerate(spots):
            assert a.depth[j] == n
            assert sees[j].nonzero()[:, 0].tolist() == sorted(spots[: n + 1])
    covered = torch.zeros_like(sees, dtype=torch.int)
    for p in a.pieces:
        here = slice(p.start, p.start + p.length)
        covered[here, here] += torch.ones(p.length, p.length, dtype=torch.int).tril()
    for q in a.regions:
        covered[q.q0 : q.q1, q.k0 : q.k1] += 1
    assert torch.equal(covered, sees.int())  # the regions of form `lse`, each pair once
    if least == 1:
        assert a.total == len({tuple(row[: n + 1].tolist()) for row in rows for n in range(len(row))})


def test_a_serial_group_hangs_flat_from_one_thought() -> None:
    thought = torch.arange(100)
    cuts = range(10, 90, 10)
    a = prefix.lay([thought, *(torch.cat([thought[:t], torch.full((5,), 200 + t)]) for t in cuts)])
    owners = {len({int(a.owner[i]) for i in p.context}) for p in a.pieces}
    assert max(owners) <= 2  # one whole row and its branches, not a chain of eight cuts


def test_rows_under_different_images_share_nothing() -> None:
    rows = [torch.arange(8), torch.arange(8), torch.arange(8)]
    assert prefix.lay(rows).total == 8
    a = prefix.lay(rows, context=["cat", "dog", "cat"])
    assert a.total == 16
    assert not prefix.visible(a)[8:, :8].any()


def test_a_stretch_too_short_to_pay_is_laid_out_per_row() -> None:
    rows = [torch.tensor([1, 2, 3, 4, 5, 6, n, n]) for n in (7, 8)] + [torch.tensor([1, 2, 3, 4, 5, 9])]
    assert prefix.lay(rows, least=1).total == 8 + 2 + 1
    assert prefix.lay(rows, least=2).total == 8 + 3 + 1  # [6] is computed twice
    assert prefix.lay(rows, least=7).total == sum(map(len, rows))


def test_any_number_of_rotary_axes_is_laid_out_alike() -> None:
    rows = [torch.tensor([1, 2, 3]), torch.tensor([1, 2, 4, 5])]
    a = prefix.lay(rows)
    axes = [torch.stack([r, 10 * r, 100 * r]) for r in rows]
    ids = a.pick(rows)
    assert sorted(ids.tolist()) == [1, 2, 3, 4, 5]
    assert torch.equal(a.pick(axes), torch.stack([ids, 10 * ids, 100 * ids]))


# ---- exact


@pytest.mark.parametrize("rates", [ALWAYS, PADDED], ids=["always", "padded"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_says_what_the_ordinary_forward_says(family: str, shape: str, form: Any, rates: Any, monkeypatch: Any) -> None:
    only(monkeypatch, form)
    plain, sharing = pair(family, rates, temperature=0.8)
    some = batch(shape)
    with torch.no_grad():
        a, b = plain.evaluate(some), sharing.evaluate(some)
    layout = layout_of(sharing, some)
    assert (layout.form, layout.used) == (form, 2)
    torch.testing.assert_close(b.logp, a.logp, atol=1e-5, rtol=0)
    torch.testing.assert_close(b.entropy, a.entropy, atol=1e-5, rtol=0)
    for i, p in enumerate(some.paths):  # and what a forward of this path alone says
        exact = naive(plain.model, p.prompt, p.steps, 0.8) * some.mask[i, : len(p)]
        torch.testing.assert_close(b.logp[i, : len(p)], exact, atol=1e-5, rtol=0)
    assert relative(gradient(sharing, some), gradient(plain, some)) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_one_stored_batch_per_row_of_a_packed_forward_of_many_prompts(family: str) -> None:
    plain, sharing = pair(family, PADDED)
    paths = [p for shape in SHAPES for g in SHAPES[shape]() for p in g.paths]
    for a, b in zip(plain.score(paths), sharing.score(paths)):
        torch.testing.assert_close(b, a, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", ["parallel", "tree", "several"])
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gemma3"])
def test_a_window_that_cuts_the_prefix_off_is_kept(family: str, shape: str) -> None:
    def model(window: int) -> Any:
        if family == "gemma3":
            return FAMILIES[family](sliding_window=window)
        other = {"qwen3": {"use_sliding_window": True, "max_window_layers": 0}, "gemma2": {"query_pre_attn_scalar": 8}}
        return tiny_model(family, sliding_window=window, **other[family])

    own = TokenPolicy(model(4), tiny_tokenizer(), sharing=None)
    sharing = TokenPolicy(model(4), tiny_tokenizer(), sharing=ALWAYS)
    full = TokenPolicy(model(64), tiny_tokenizer(), sharing=None)
    some = batch(shape)
    with torch.no_grad():
        a, b, c = (policy.evaluate(some).logp for policy in (own, sharing, full))
    torch.testing.assert_close(b, a, atol=1e-5, rtol=0)
    assert float((c - a).abs().max()) > 0.01  # the window does matter here
    assert relative(gradient(sharing, some), gradient(own, some)) < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_with_an_adapter_and_with_it_switched_off(shape: str) -> None:
    def policy(rates: prefix.Rates | None) -> TokenPolicy:
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = get_peft_model(tiny_model("qwen3"), config)
        return TokenPolicy(model, tiny_tokenizer(), sharing=rates)

    plain, sharing = policy(None), policy(ALWAYS)
    some = batch(shape)
    assert relative(gradient(sharing, some), gradient(plain, some)) < 1e-5
    off, on = initial(sharing).evaluate(some).logp, sharing.evaluate(some).logp
    torch.testing.assert_close(off, initial(plain).evaluate(some).logp, atol=1e-5, rtol=0)
    assert layout_of(sharing, some).used == 4
    assert float((off - on.detach()).abs().max()) > 0.01


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_computes_the_packed_layers_again(family: str, form: Any, monkeypatch: Any) -> None:
    only(monkeypatch, form)
    plain, sharing = pair(family)
    saving = policy_of(family, sharing=ALWAYS, checkpointing=True)
    (some,) = saving.split(batch("tree"), "path", 10**6)
    gradient(saving, some)  # the comparison before the first use is over
    layout = layout_of(saving, some)
    before = layout.used
    assert relative(gradient(saving, some), gradient(plain, some)) < 1e-5
    assert layout.used - before == 4  # two layers, forward and again in backward
    assert saving.head.config._attn_implementation == sharing.head.config._attn_implementation != prefix.NAME


@pytest.mark.parametrize("form", FORMS)
def test_logits_in_pieces_give_the_same_gradient(form: Any, monkeypatch: Any) -> None:
    only(monkeypatch, form)
    plain, sharing = pair()
    some = batch("several")
    sharing.head_elements = 5 * sharing.config.vocab_size
    seen: list[int] = []
    sharing.model.get_output_embeddings().register_forward_hook(lambda m, i, out: seen.append(out.numel()))
    assert relative(gradient(sharing, some), gradient(plain, some)) < 1e-5
    assert max(seen) <= 5 * sharing.config.vocab_size


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_autocast_reads_near_and_trains_near(family: str, form: Any, monkeypatch: Any) -> None:
    only(monkeypatch, form)
    plain, _ = pair(family)
    half = policy_of(family, sharing=ALWAYS, autocast=torch.bfloat16)
    some = batch("tree")
    off = (half.evaluate(some).logp - plain.evaluate(some).logp).detach().abs()[some.mask]
    assert layout_of(half, some).form == form
    assert 0 < float(off.mean()) < 0.15
    assert float(torch.nn.functional.cosine_similarity(gradient(half, some), gradient(plain, some), dim=0)) > 0.9


@pytest.mark.parametrize("form", FORMS)
def test_double_precision_agrees_to_the_last_digits_that_rounding_leaves(form: Any) -> None:
    layout = prefix.lay([torch.cat([p.prompt, p.steps]) for g in tree() for p in g.paths])
    layout.form = form
    q, k, v = (torch.randn(1, h, layout.total, 8, dtype=torch.float64, generator=rng(h)) for h in (4, 2, 2))
    sees = prefix.visible(layout)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return prefix.attend(None, q, k, v, None, prefix_layout=layout)[0]

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        score = (q @ k.repeat_interleave(2, 1).transpose(-1, -2) / 8**0.5).masked_fill(~sees, -torch.inf)
        return (score.softmax(-1) @ v.repeat_interleave(2, 1)).transpose(1, 2)

    out = []
    for f in (attention, eager):
        some = [x.clone().requires_grad_() for x in (q, k, v)]
        y = f(*some)
        out.append([y.detach(), *torch.autograd.grad((y * torch.cos(torch.arange(y.numel()).view_as(y))).sum(), some)])
    for a, b in zip(*out):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_the_text_half_of_a_vision_language_model_takes_the_callers_positions() -> None:
    """Three rotary axes; an image of 2 x 3 patches stands in the shared prompt, so that positions do not count tokens."""
    config = Qwen2VLTextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
        initializer_range=0.25,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen2VLTextModel(config).eval()
    prompt, image = tokens(10, 1), [[0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2]]
    rows, axes = [], []
    for n in (5, 2, 7):
        rows.append(torch.cat([prompt, tokens(n, 60 + n)]))
        text = torch.arange(5, 5 + len(rows[-1]) - 8)
        axes.append(torch.cat([torch.arange(2).expand(3, 2), 2 + torch.tensor(image), text.expand(3, len(text))], 1))
    with torch.no_grad():
        alone = [
            model(input_ids=r[None], position_ids=a[:, None], use_cache=False).last_hidden_state[0] for r, a in zip(rows, axes)
        ]
        for form in FORMS:
            layout = prefix.lay(rows)
            layout.form = form
            place = layout.pick(axes)[:, None]
            with prefix.attending(model.config):
                out = model(
                    input_ids=layout.pick(rows)[None], position_ids=place, use_cache=False, prefix_layout=layout
                ).last_hidden_state[0]
            assert layout.used == 2
            for spots, one in zip(layout.spots, alone):
                torch.testing.assert_close(out[torch.from_numpy(spots)], one, atol=1e-5, rtol=0)


def test_the_block_mask_of_flex_attention_is_the_oracle() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    layout = prefix.lay([torch.cat([p.prompt, p.steps]) for g in tree() for p in g.paths])
    q, k, v = (torch.randn(1, 2, layout.total, 16, generator=rng(i)) for i in range(3))
    mask = prefix.block_mask(layout, torch.device("cpu"))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # uncompiled, which is all that a CPU test needs
        a = flex_attention(q, k, v, block_mask=mask)
    b = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=prefix.visible(layout))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["flex", "two"])
@pytest.mark.parametrize("shape", SHAPES)
def test_on_a_gpu(shape: str, form: Any, monkeypatch: Any) -> None:
    only(monkeypatch, form)
    plain, sharing = (TokenPolicy(tiny_model("qwen3").cuda(), tiny_tokenizer(), sharing=rates) for rates in (None, ALWAYS))
    some = batch(shape)
    assert relative(gradient(sharing, some), gradient(plain, some)) < 1e-4
    assert layout_of(sharing, some).form == form


# ---- refused, or seen to be wrong


def test_attention_dropout_is_refused() -> None:
    layout = prefix.lay([torch.arange(4)])
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(GruppoError, match=r"attention dropout is 0\.1"):
        prefix.attend(None, q, q, q, None, prefix_layout=layout, dropout=0.1)


@pytest.mark.parametrize("odd", [{"s_aux": torch.zeros(2)}, {"is_causal": False}, {"position_bias": torch.zeros(1)}])
def test_attention_of_another_kind_is_refused(odd: dict[str, Any]) -> None:
    layout = prefix.lay([torch.arange(4)])
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(GruppoError, match="shared prefixes do not reproduce"):
        prefix.attend(None, q, q, q, None, prefix_layout=layout, **odd)


def _blind(r: prefix.Layout) -> None:
    r.regions = []


def _shifted(plan: prefix.Plan) -> prefix.Plan:
    return replace(plan, position=torch.arange(plan.layout.total))


FAULTS: dict[str, Callable[[prefix.Plan], prefix.Plan]] = {
    "positions that do not restart": _shifted,
    "completions that do not see the prompt": lambda plan: _blind(plan.layout) or plan,
    "a first token predicted by the sibling before": lambda plan: replace(plan, at=(plan.at - 1).clamp(min=0)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_packed_forward_is_seen_before_it_is_used_and_the_ordinary_one_runs(fault: str, monkeypatch: Any) -> None:
    only(monkeypatch, "lse")
    plain, sharing = pair()
    some = batch("parallel")
    right = prefix.plan
    monkeypatch.setattr(prefix, "plan", lambda *a, **k: FAULTS[fault](right(*a, **k)))
    with pytest.warns(UserWarning, match="log-probabilities differ by"):
        now = sharing.evaluate(some).logp
    assert torch.equal(now, plain.evaluate(some).logp)
    assert "lse" in sharing.distrusted
    sharing.evaluate(some)  # said once


def test_a_wrong_gradient_behind_right_values_is_seen(monkeypatch: Any) -> None:
    only(monkeypatch, "lse", "two")
    plain, sharing = pair()
    some = batch("parallel")
    kernel = prefix._FLASH_BACKWARD

    def forgetful(*args: Any, **numbers: Any) -> tuple[Tensor, ...]:
        dq, dk, dv = kernel(*args, **numbers)
        return (dq, dk, dv) if args[7] else (dq, dk * 0, dv * 0)  # what completions say about the prompt is lost

    monkeypatch.setattr(prefix, "_FLASH_BACKWARD", forgetful)
    with pytest.warns(UserWarning, match="'lse'.*its gradient differs by"):
        sharing.evaluate(some)
    assert layout_of(sharing, some).form == "two"  # the next form is exact
    assert relative(gradient(sharing, some), gradient(plain, some)) < 1e-5


def test_a_model_with_attention_of_its_own_keeps_the_ordinary_forward() -> None:
    plain, sharing = pair("llama")
    for policy in (plain, sharing):
        for layer in policy.model.model.layers:
            own = layer.self_attn.forward

            def forward(*args: Any, own: Any = own, **kwargs: Any) -> Any:
                kwargs.pop("prefix_layout", None)
                return own(*args, **kwargs)

            layer.self_attn.forward = forward
    some = batch("parallel")
    with pytest.warns(UserWarning, match="did not hand the layout of shared prefixes on"):
        now = sharing.evaluate(some).logp
    assert torch.equal(now, plain.evaluate(some).logp)


def test_the_comparison_runs_once_and_reads_a_small_piece() -> None:
    policy = policy_of(sharing=ALWAYS)
    p = tokens(150, 1)
    groups = [Group(Task(p), [path(p, tokens(60, 10 + i)) for i in range(6)], advantage=torch.zeros(6, 60))]
    some = collate(groups)
    count = Count(policy)
    policy.evaluate(some)
    packed = unique(some)
    assert count.forwards == 3  # the piece both ways, then the batch
    assert count.tokens - packed <= 2 * 4 * (64 + 16)
    count.clear()
    policy.evaluate(some)
    assert (count.forwards, count.tokens) == (1, packed)


# ---- less work


@pytest.mark.parametrize("shape", SHAPES)
def test_every_token_that_rows_share_passes_the_model_once(shape: str) -> None:
    policy = policy_of(sharing=ALWAYS)
    some = batch(shape)
    policy.evaluate(some)
    count = Count(policy)
    policy.evaluate(some)
    assert (count.forwards, count.tokens) == (1, unique(some))


def test_a_group_of_eight_reads_its_prompt_once() -> None:
    p = tokens(40, 1)
    steps = [torch.cat([torch.tensor([5 + i]), tokens(9, i)]) for i in range(8)]  # no completion begins like another
    some = collate([Group(Task(p), [path(p, s) for s in steps], advantage=torch.zeros(8, 10))])
    plain, sharing = pair()
    sharing.evaluate(some)
    counts = Count(plain), Count(sharing)
    plain.evaluate(some), sharing.evaluate(some)
    assert [c.tokens for c in counts] == [8 * (40 + 9), 40 + 8 * 9]  # the last token of a row predicts nothing


def test_one_decision_of_several_rows_is_read_once() -> None:
    policy = policy_of(sharing=ALWAYS)
    some = batch("serial")
    plan = policy._plan([p.prompt for p in some.paths], [p.steps for p in some.paths], some.mask)
    assert plan is not None
    assert len(plan.at) == 15 + 4 * 4
    assert len(plan.row) == int(some.mask.sum())


@pytest.mark.parametrize("scope", ["path", "group"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rates", [ALWAYS, PADDED], ids=["always", "padded"])
def test_any_budget_gives_the_same_gradient(shape: str, scope: Any, rates: prefix.Rates) -> None:
    plain, sharing = pair(rates=rates)
    some = batch(shape)
    whole = gradient(plain, some)
    for budget in (1, 25, 40, 70, 10**6):
        assert relative(gradient(sharing, some, budget, scope), whole) < 1e-5


@pytest.mark.parametrize("budget", [1, 20, 33, 50, 64, 10**6])
@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_count_every_shared_token_once(shape: str, budget: int) -> None:
    policy = policy_of(sharing=ALWAYS)
    some = batch(shape)
    policy.evaluate(some)
    count = Count(policy)
    rows = []
    for part in policy.split(some, "path", budget):
        count.clear()
        policy.evaluate(part)
        assert len(part) == 1 or count.tokens <= budget
        rows += [id(p) for p in part.paths]
    assert sorted(rows) == sorted(id(p) for p, m in zip(some.paths, some.mask) if m.any())


def test_stretches_too_short_to_share_count_against_the_budget_and_no_path_is_lost() -> None:
    policy = policy_of(sharing=PADDED)
    assert policy.cost is not None
    assert policy.cost.least == 3
    p = tokens(10, 1)
    ends = [[5, 6, n, 8, 9] for n in range(10, 16)] + [[7, 5, 6, 8, 9]]  # six begin alike for two tokens, computed six times
    some = collate([Group(Task(p), [path(p, torch.tensor(e)) for e in ends], advantage=torch.zeros(7, 5))])
    policy.evaluate(some)  # the comparison before the first use is over
    count = Count(policy)
    policy.evaluate(some)
    assert count.tokens == 10 + 7 * 4
    found = []
    for part in policy.split(some, "path", 35):  # so many different tokens, but 38 that are computed
        count.clear()
        policy.evaluate(part)
        assert count.tokens <= 35
        found += [id(p) for p in part.paths]
    assert sorted(found) == sorted(id(p) for p in some.paths)


def test_a_group_fits_where_its_rows_in_full_would_not() -> None:
    plain, sharing = pair()
    p = tokens(60, 1)
    some = collate([Group(Task(p), [path(p, tokens(8, 10 + i)) for i in range(6)], advantage=torch.zeros(6, 8))])
    assert [len(part) for part in plain.split(some, "path", 140)] == [2, 2, 2]
    assert [len(part) for part in sharing.split(some, "path", 140)] == [6]


def test_rows_of_one_prompt_stay_together() -> None:
    policy = policy_of(sharing=ALWAYS)
    prompts = [tokens(30, i) for i in range(3)]
    paths = [path(prompts[i % 3], tokens(6, 100 + i)) for i in range(12)]  # the prompts alternate
    some = collate([Group(Task(p.prompt), [p], advantage=torch.zeros(1, 6)) for p in paths])
    parts = list(policy.split(some, "path", 30 + 4 * 6))
    assert [len(part) for part in parts] == [4, 4, 4]
    assert all(len({tuple(p.prompt.tolist()) for p in part.paths}) == 1 for part in parts)


@pytest.mark.parametrize("name", ["grpo", "gspo", "opmd"])
@pytest.mark.parametrize("shape", ["several", "tree"])
def test_a_recipes_gradient_is_the_same_with_and_without(name: str, shape: str) -> None:
    """The loop's own backward, with a reference, at several budgets: recipes know nothing of this."""
    method = recipe(name)
    some = weigh(replace(batch(shape), weight=torch.zeros(batch(shape).mask.shape)), method.reduce)
    grads = []
    for policy in pair():
        ref = initial(policy)
        with torch.no_grad():
            for w in policy.parameters():
                w.add_(torch.randn(w.shape, generator=rng(3)), alpha=0.02)
        for budget in (1, 60, 10**6):
            policy.model.zero_grad()
            accumulate(policy, some, method, ref=ref, budget=budget)
            grads.append(torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]))
    assert float(grads[0].norm()) > 0
    for other in grads[1:]:
        assert relative(other, grads[0]) < 1e-5


def test_no_recipe_knows() -> None:
    folder = pathlib.Path(gruppo.recipes.__file__).parent
    assert not [f.name for f in folder.glob("*.py") if "policies.prefix" in f.read_text() or "gruppo_prefix" in f.read_text()]


# ---- chosen by token counts

SIZE = prefix.Cost(weights=3_000_000, width=256, layers=4, special=0, window=0, capped=False, rates=prefix.MEASURED)


def cost_of(P: int, sizes: Sequence[int], cost: prefix.Cost = SIZE) -> tuple[float, prefix.Layout]:
    """The ordinary forward's cost, and the layout, of one group."""
    rows = [torch.cat([torch.arange(P), torch.full((n,), P + i)]) for i, n in enumerate(sizes)]
    layout = prefix.lay(rows, cost.least)
    layout.cost = cost
    return cost.ordinary(len(rows), max(map(len, rows))), layout


def test_the_cost_of_the_ordinary_forward_in_plain_numbers() -> None:
    rates = prefix.Rates(pair=2.0, call=10.0, touch=0.0)
    cost = prefix.Cost(weights=100, width=8, layers=3, special=0, window=0, capped=False, rates=rates)
    # 4 rows of 5 tokens: 2 x 100 x 20 for the weights; 4 x 8 x (4 x 25 / 2) pairs x 3 layers x 2, and 3 calls
    assert cost.ordinary(4, 5) == 4000 + 4 * 8 * 50 * 3 * 2 + 30


def test_the_cost_of_the_packed_forward_in_plain_numbers() -> None:
    rates = prefix.Rates(pair=1.0, call=0.0, touch=0.0)
    cost = prefix.Cost(weights=100, width=8, layers=1, special=0, window=0, capped=False, rates=rates)
    _, layout = cost_of(6, (2, 2, 2), cost)
    # 12 tokens; causal 8 x 8 / 2 and twice 2 x 2 / 2; two branches of 2 queries against 6 keys
    assert cost.packed(layout, "lse") == 2400 + 4 * 8 * (32 + 2 + 2 + 4 * 6)
    assert cost.packed(layout, "two") == 2400 + 4 * 8 * (64 + 2 * 2 * 8)
    assert cost.packed(layout, "mask") == 2400 + 4 * 8 * 144


def test_long_prompts_share_and_short_ones_of_long_completions_gain_little() -> None:
    gains = {}
    for P, C in ((1024, 32), (128, 64), (16, 256)):
        ordinary, layout = cost_of(P, [C] * 8)
        gains[P, C] = ordinary / SIZE.packed(layout, "lse")
    assert gains[1024, 32] > 5
    assert 1.5 < gains[128, 64] < 2.6
    assert 0.9 < gains[16, 256] < 1.2


def test_a_model_too_small_to_win_back_its_calls_keeps_the_ordinary_forward() -> None:
    policy = policy_of()  # the default rates
    some = batch("several")
    assert policy._plan([p.prompt for p in some.paths], [p.steps for p in some.paths], some.mask) is None


def test_what_does_not_gain_the_margin_is_not_shared() -> None:
    some = batch("parallel")
    prompts, steps = [p.prompt for p in some.paths], [p.steps for p in some.paths]
    free = prefix.Rates(pair=1.0, call=0.0, touch=0.0, small=0.0, margin=0.0)
    policy = policy_of(sharing=free)
    plan = policy._plan(prompts, steps, some.mask)
    assert plan is not None
    assert policy.cost is not None
    gain = 1 - policy.cost.packed(plan.layout, plan.layout.form) / policy.cost.ordinary(5, 20)
    for margin, shared in ((gain - 0.01, True), (gain + 0.01, False)):
        plan = policy_of(sharing=replace(free, margin=margin))._plan(prompts, steps, some.mask)
        assert (plan is not None) == shared


def test_the_cheaper_form_runs() -> None:
    policy = policy_of(sharing=replace(ALWAYS, call=1.0))
    some = batch("tree")
    assert policy.cost is not None
    layout = layout_of(policy, some)
    costs = {form: policy.cost.packed(layout, form) for form in ("lse", "two")}
    assert layout.form == min(costs, key=lambda form: costs[form])


def test_weights_are_counted_without_embedding_and_head() -> None:
    model = tiny_model("llama")
    cost = prefix.Cost.of(model, prefix.MEASURED)
    per_layer = 32 * (32 + 16 + 16) + 32 * 32 + 3 * 32 * 64
    assert (cost.weights, cost.width, cost.layers) == (2 * per_layer, 32, 2)


def test_a_namespace_model_without_the_interface_is_named() -> None:
    with pytest.raises(GruppoError, match="SimpleNamespace did not hand the layout"):
        prefix.attend(SimpleNamespace(), *(torch.zeros(1, 1, 1, 8) for _ in range(3)), None)
