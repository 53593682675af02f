"""Decoding in few operations gives what the model's own forward gives, and stands aside where it is not known to."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.policies.models import gap, policy_of, ragged, rng
from tests.tiny import tiny_model, tiny_tokenizer
from torch import Tensor

from gruppo.policies import lean
from gruppo.policies.decode import Rows
from gruppo.policies.lean import LeanRows, known
from gruppo.policies.load import lora_config, with_adapter
from gruppo.policies.reference import swapped
from gruppo.policies.token import TokenPolicy
from gruppo.types import GruppoError

NOISE = 5e-5  # float32 rounding of 80 tokens through random weights: eager attention differs from sdpa by 2e-5 as well
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 1e4,
}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
MODELS: dict[str, Callable[[], Any]] = {
    "qwen3": lambda: tiny_model("qwen3"),
    "qwen3, head of its own": lambda: tiny_model("qwen3", tie_word_embeddings=False),
    "qwen3, biases": lambda: tiny_model("qwen3", attention_bias=True),
    "qwen3, one key head": lambda: tiny_model("qwen3", num_key_value_heads=1),
    "qwen3, norms with a large epsilon": lambda: tiny_model("qwen3", rms_norm_eps=0.1),
    "qwen3, yarn": lambda: tiny_model("qwen3", rope_parameters=YARN),
    "qwen2": lambda: tiny_model("qwen2"),
    "qwen2, a key head each": lambda: tiny_model("qwen2", num_key_value_heads=4),
    "qwen2, linear": lambda: tiny_model("qwen2", rope_parameters=LINEAR),
    "llama": lambda: tiny_model("llama"),
    "llama, biases": lambda: tiny_model("llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=False),
    "llama, llama3": lambda: tiny_model("llama", rope_parameters=LLAMA3),
    "llama, wide heads, eager": lambda: tiny_model("llama", head_dim=24, attn_implementation="eager"),
}


@pytest.fixture(params=[False, True], ids=["called", "copied"])
def copied(request, monkeypatch) -> bool:
    """Whether weights are copied for oneDNN: of models as small as these none would be."""
    monkeypatch.setattr(lean, "LARGE", 1)
    monkeypatch.setattr(lean, "TOKENS", 1 if request.param else 10**9)
    return request.param


def shaken(model: Any, size: float = 0.3) -> Any:
    """No norm of exactly 1, no bias of exactly 0."""
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(size * torch.randn(p.shape, generator=rng(3)))
    return model


def policy_with(model: Any, **numbers: Any) -> TokenPolicy:
    model.generation_config.eos_token_id = [1, *range(60, 84)]
    return TokenPolicy(model, tiny_tokenizer(), **{"max_new": 20, **numbers})


def tokens(policy: TokenPolicy, prompts: list[Tensor], **numbers: Any) -> list[list[int]]:
    return [p.steps.tolist() for p in policy.sample(prompts, g=rng(), **numbers)]


def used(policy: TokenPolicy, monkeypatch) -> list[type]:
    """The kind of rows of every call of the sampler from now on."""
    seen: list[type] = []
    make = lean.rows
    monkeypatch.setattr(lean, "rows", lambda *args: seen.append(type(out := make(*args))) or out)
    return seen


def course(rows: Rows | LeanRows) -> Tensor:
    """Log-probabilities while rows of ragged prompts enter, decode, leave and are followed by others."""
    a, b, c, d = ragged()
    none, some = torch.empty(0, dtype=torch.long), torch.tensor([0, 2, 3, 6])
    out = [rows.enter(none, [a, b, a, b, b, c, d], hold=True)]
    draw = rng(7)

    def go(n: int, times: int) -> None:
        out.extend(rows.step(torch.randint(5, 59, (n,), generator=draw)) for _ in range(times))

    go(7, 3)
    rows.keep(some)
    go(4, 2)
    out.append(rows.enter(torch.tensor([1, 2]), [d, d, c, b], hold=False))  # d was held
    go(6, 70)  # more than the room for new columns
    rows.keep(torch.tensor([0, 5]))
    go(2, 1)
    return torch.cat(out).log_softmax(-1)


@pytest.mark.parametrize("name", MODELS)
def test_every_log_probability_is_that_of_the_models_own_forward(name, copied):
    policy = policy_with(shaken(MODELS[name]()))
    assert known(policy)
    with torch.no_grad():
        own = course(Rows(policy, True))
        other = course(LeanRows(policy, True, copied))
    assert float((own - other).abs().max()) < NOISE
    assert float(own.std()) > 0.5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", MODELS)
def test_the_same_tokens_are_drawn_and_their_log_probs_are_those_of_a_full_forward(name, temperature, copied, monkeypatch):
    model = shaken(MODELS[name]())
    prompts = [p for p in ragged() for _ in range(3)]
    policy = policy_with(model)
    kinds = used(policy, monkeypatch)
    paths = policy.sample(prompts, g=rng(), temperature=temperature)
    assert kinds == [LeanRows]
    assert [p.steps.tolist() for p in paths] == tokens(policy_with(model, lean=False), prompts, temperature=temperature)
    assert kinds == [LeanRows, Rows]
    if temperature:
        assert gap(policy, paths, 1.0) < 1e-5


def test_waiting_prompts_take_the_room_of_others_in_the_same_order():
    model = tiny_model("qwen3")
    prompts = [p for p in ragged() for _ in range(8)]
    one, two = (tokens(policy_with(model, lean=on, sample_rows=5, max_new=40), prompts) for on in (True, False))
    assert one == two


def test_every_prompts_keys_stand_once():
    policy = policy_with(tiny_model("qwen3"))
    rows = LeanRows(policy, True, False)
    a, b, _, _ = ragged()
    with torch.no_grad():
        rows.enter(torch.empty(0, dtype=torch.long), [a, a, a, b, b], hold=False)
        assert [tuple(x.shape) for x in rows.given[0]] == [(2, 2, 11, 8)] * 2
        rows.keep(torch.tensor([0, 1]))  # of b none is left
    assert [tuple(x.shape) for x in rows.given[0]] == [(1, 2, 3, 8)] * 2


def test_a_held_prompt_is_read_once_though_all_its_rows_left():
    policy = policy_with(tiny_model("qwen3"))
    a, b, _, _ = ragged()
    none, draw, found = torch.empty(0, dtype=torch.long), torch.randint(5, 59, (3, 3), generator=rng(2)), []
    with torch.no_grad():
        for kind in (Rows, LeanRows):
            policy.counts.clear()
            rows = kind(policy, True) if kind is Rows else LeanRows(policy, True, False)
            out = [rows.enter(none, [a, a, b], hold=True), rows.step(draw[0])]
            rows.keep(torch.tensor([1]))  # of b none is left
            out += [rows.step(draw[1, :1]), rows.enter(torch.tensor([0]), [b, b], hold=False), rows.step(draw[2])]
            found.append(torch.cat(out).log_softmax(-1))
            assert policy.counts["prefills"] == 2
            assert policy.counts["prompt_tokens"] == len(a) + len(b)
    assert float((found[0] - found[1]).abs().max()) < NOISE


def test_prompts_of_equally_many_rows_in_turn(copied):
    policy = policy_with(tiny_model("qwen3"))
    a, b, c, _ = ragged()
    draw, found = torch.randint(5, 59, (3, 6), generator=rng(2)), []
    with torch.no_grad():
        for rows in (Rows(policy, True), LeanRows(policy, True, copied)):
            out = [rows.enter(torch.empty(0, dtype=torch.long), [a, b, c, c, b, a], hold=False)]
            found.append(torch.cat(out + [rows.step(token) for token in draw]).log_softmax(-1))
    assert float((found[0] - found[1]).abs().max()) < NOISE


def test_one_large_group_beside_many_small_ones_does_not_make_places_for_all(monkeypatch):
    policy = policy_with(tiny_model("qwen3"))
    prompts = [*ragged(tuple(range(2, 12))), *ragged((5,), seed=9) * 30]
    draw = torch.randint(5, 59, (3, 40), generator=rng(2))
    found = []
    with torch.no_grad():
        for spread in (4, 10**9):
            monkeypatch.setattr(lean, "SPREAD", spread)
            rows = LeanRows(policy, True, False)
            out = [rows.enter(torch.empty(0, dtype=torch.long), prompts, hold=True)]
            out += [rows.step(t) for t in draw]
            found.append((torch.cat(out), len(rows.keys)))
    (one, keys), (two, fewer) = found
    assert (keys, fewer) == (41, 11)  # one for each row, and the one held
    assert float((one - two).abs().max()) < 1e-4


def test_a_lora_adapters_numbers_are_used_and_left_out_where_it_is_off(copied, monkeypatch):
    model = with_adapter(tiny_model("qwen3"), lora_config(4, 16.0, "all-linear"), 0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.add_(0.3 * torch.randn(p.shape, generator=rng(4)))
    policy = policy_with(model)
    kinds = used(policy, monkeypatch)
    with torch.no_grad():
        assert float((course(Rows(policy, True)) - course(LeanRows(policy, True, copied))).abs().max()) < NOISE
    prompts = [p for p in ragged() for _ in range(4)]
    with_it = tokens(policy, prompts)
    assert kinds == [LeanRows]
    with model.disable_adapter():
        without = tokens(policy, prompts)
    assert without == tokens(policy_with(tiny_model("qwen3"), lean=False), prompts) != with_it


def test_each_call_samples_from_the_weights_of_its_time(copied):
    policy = policy_with(tiny_model("qwen3"))
    prompts = [p for p in ragged() for _ in range(4)]
    before = tokens(policy, prompts)
    other = [p + 0.1 * torch.randn(p.shape, generator=rng(1)) for p in policy.parameters()]
    with swapped(policy, other):
        inside = tokens(policy, prompts)
    assert tokens(policy, prompts) == before
    with torch.no_grad():
        for p, w in zip(policy.parameters(), other):
            p.copy_(w)  # in place, as an optimizer does
    after = policy.sample(prompts, g=rng())
    assert [p.steps.tolist() for p in after] == inside != before
    assert gap(policy, after, 1.0) < 1e-5


def spoiled(kind: str) -> TokenPolicy:
    """A policy whose model is not known to be what its class says."""
    if kind == "bfloat16":
        return policy_with(tiny_model("qwen3").to(torch.bfloat16))
    if kind == "autocast":
        return policy_with(tiny_model("qwen3"), autocast=torch.bfloat16)
    if kind == "another family":
        return policy_of("gemma")
    if kind == "window":
        return policy_with(
            tiny_model("qwen2", use_sliding_window=True, sliding_window=6, layer_types=["sliding_attention", "full_attention"])
        )
    if kind == "angles by length":
        return policy_with(tiny_model("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}))
    if kind == "ia3":
        from peft import IA3Config

        return policy_with(with_adapter(tiny_model("qwen3"), IA3Config(task_type="CAUSAL_LM"), 0))
    if kind == "adapter behind a token":
        config = lora_config(4, 16.0, "all-linear")
        config.alora_invocation_tokens = [7]
        return policy_with(with_adapter(tiny_model("qwen3"), config, 0))
    if kind in ("hook around an adapter", "hook around its model"):
        model = with_adapter(tiny_model("qwen3"), lora_config(4, 16.0, "all-linear"), 0)
        (model if kind == "hook around an adapter" else model.base_model).register_forward_hook(lambda *_: None)
        return policy_with(model)
    policy = policy_with(tiny_model("qwen3"))
    layer = policy.model.model.layers[1]
    if kind == "hook":
        layer.mlp.register_forward_hook(lambda module, args, out: out * 0.5)
    elif kind == "subclass":
        layer.__class__ = type("Other", (type(layer),), {})
    elif kind == "own forward":
        own = layer.self_attn.forward
        layer.self_attn.forward = lambda *args, **kwargs: own(*args, **kwargs)
    elif kind == "attention":
        policy.model.config._attn_implementation = "flex_attention"
    elif kind == "one wide layer":
        layer.mlp.double()
    return policy


SPOILED = ["bfloat16", "autocast", "another family", "window", "angles by length", "ia3", "hook", "subclass", "own forward"]


@pytest.mark.parametrize("kind", SPOILED)
def test_what_is_not_known_takes_the_models_own_forward(kind, monkeypatch):
    policy = spoiled(kind)
    kinds = used(policy, monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        paths = tokens(policy, ragged())
    assert kinds == [Rows]
    policy.lean = False
    assert tokens(policy, ragged()) == paths


NOT_KNOWN = [
    "attention",
    "one wide layer",
    "adapter behind a token",
    "hook around an adapter",
    "hook around its model",
]


@pytest.mark.parametrize("kind", NOT_KNOWN)
def test_other_attention_and_other_numbers_are_not_known(kind):
    assert not known(spoiled(kind))


def test_a_hooked_linear_map_is_called(copied):
    policy = policy_with(tiny_model("qwen3"))
    policy.model.model.layers[0].mlp.down_proj.register_forward_hook(lambda module, args, out: out * 0.5)
    with torch.no_grad():
        assert float((course(Rows(policy, True)) - course(LeanRows(policy, True, copied))).abs().max()) < NOISE


def test_a_model_that_decodes_differently_is_warned_of_and_takes_its_own_forward(monkeypatch):
    feed = lean.Layer.feed
    monkeypatch.setattr(lean.Layer, "feed", lambda self, x: 1.001 * feed(self, x))
    policy = policy_with(tiny_model("qwen3"))
    kinds = used(policy, monkeypatch)
    with pytest.warns(UserWarning, match=r"few operations: its log-probabilities differ by .* \(allowed 0.0001\)"):
        found = tokens(policy, ragged())
    assert found == tokens(policy_with(tiny_model("qwen3"), lean=False), ragged())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokens(policy, ragged())  # once is enough
    assert kinds == [Rows] * 3
    assert policy.lean_agrees is False


def test_a_model_that_cannot_be_decoded_so_is_warned_of(monkeypatch):
    monkeypatch.delattr(lean.Layer, "feed")
    policy = policy_with(tiny_model("qwen3"))
    with pytest.warns(UserWarning, match="few operations: it failed with AttributeError"):
        found = tokens(policy, ragged())
    assert found == tokens(policy_with(tiny_model("qwen3"), lean=False), ragged())


def test_weights_with_nan_are_not_held_against_it():
    policy = policy_with(tiny_model("qwen3"))
    first = next(iter(policy.parameters()))
    with torch.no_grad():
        kept = first.clone()
        first.fill_(float("nan"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(GruppoError, match="not finite"):
            tokens(policy, ragged())
        assert policy.lean_agrees is None
        with torch.no_grad():
            first.copy_(kept)
        tokens(policy, ragged())
    assert policy.lean_agrees is True


def test_the_comparison_is_not_counted():
    policy, other = (policy_with(tiny_model("qwen3"), lean=on) for on in (True, False))
    for p in (policy, other):
        tokens(p, [p for p in ragged() for _ in range(2)])
    assert policy.lean_agrees
    assert policy.counts == other.counts


def test_a_context_too_short_for_the_comparison_is_none_for_sampling():
    policy = policy_with(tiny_model("qwen3", context=6))
    assert len(policy.sample(ragged((2,)), g=rng(), max_new=4)[0]) <= 4
    assert policy.lean_agrees
