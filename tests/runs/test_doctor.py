"""The doctor finds nothing on healthy models and names each planted fault in a sentence."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.policies.models import FAMILIES, policy_of
from tests.tiny import tiny_folder, tiny_model, tiny_policy, tiny_tokenizer

from gruppo.policies.token import TokenPolicy
from gruppo.recipes.grpo import grpo
from gruppo.runs import doctor as surgery
from gruppo.runs.doctor import memory
from gruppo.runs.threads import Choice

PLAN = {
    "policy": {"max_new_tokens": 32, "sample_rows": 16},
    "fit": {"prompts_per_step": 4, "paths_per_prompt": 4, "token_budget": 512},
}


@pytest.fixture(autouse=True)
def _hurry(monkeypatch):
    """Half a second of timing threads is not what these tests are about."""
    monkeypatch.setattr(surgery, "choose", lambda *numbers: Choice(1, {1: 0.0}))


def doctor(policy, recipe=None, planned=None):
    """The examination on two short prompts of different length."""
    return surgery.doctor(policy, recipe, planned, prompts=["12+3=", "a longer one: 45+678="])


def failures(report) -> dict[str, str]:
    return {c.name: c.sentence for c in report.failed}


def fault(policy, change) -> TokenPolicy:
    """The policy with its model's hidden states passed through change(hidden)."""
    policy.model.model.register_forward_hook(lambda m, i, out: _with_hidden(out, change))
    return policy


def _with_hidden(out, change):
    out.last_hidden_state = change(out.last_hidden_state)
    return out


@pytest.mark.parametrize("family", FAMILIES)
def test_healthy_models_have_nothing_to_report(family):
    report = doctor(policy_of(family, ends=[1]), planned=PLAN)
    assert failures(report) == {}
    assert report["ratio"].value < 1e-4
    assert report["micro-batch"].value < 1e-5
    assert report["masked steps"].value == 0.0


def test_checkpointing_and_adapters_are_healthy_too():
    base = policy_of(ends=[1])
    model = get_peft_model(base.model, LoraConfig(r=2, target_modules=["q_proj"]))
    report = doctor(TokenPolicy(model, base.tokenizer, checkpointing=True), grpo(n=4), PLAN)
    assert failures(report) == {}
    assert report.memory["reference"] == 0.0


def test_bf16_models_are_held_to_limits_of_their_own():
    policy = policy_of(ends=[1])
    policy.model.to(torch.bfloat16)
    report = doctor(policy)
    assert failures(report) == {}
    assert report["ratio"].limit > 0.1


def test_a_tokenizer_without_template_is_examined_on_strings():
    report = surgery.doctor(TokenPolicy(tiny_model(), tiny_tokenizer(chat=False)))
    assert failures(report) == {}
    assert report["chat template"].verdict == "note"


def test_nothing_of_the_policy_is_changed():
    policy = tiny_policy(temperature=0.9)
    weights = [p.clone() for p in policy.parameters()]
    policy.model.lm_head.weight.grad = torch.ones_like(policy.model.lm_head.weight)
    doctor(policy, planned=PLAN)
    assert policy.temperature == 0.9
    assert all(torch.equal(a, b) for a, b in zip(weights, policy.parameters()))
    assert [p.grad is None for p in policy.parameters()].count(False) == 1
    assert float(policy.model.lm_head.weight.grad.min()) == 1.0


def test_a_model_that_looks_at_the_rest_of_the_batch_is_found():
    found = failures(doctor(fault(tiny_policy(), lambda h: h + 0.3 * h.mean(0, keepdim=True))))
    assert "rows are not independent in this model" in found["padding"]
    assert "changes by" in found["micro-batch"]
    assert "the ratio before the first update is off 1 by" in found["ratio"]


def test_noise_and_dropout_are_found():
    noise = failures(doctor(fault(tiny_policy(), lambda h: h + 0.1 * torch.randn_like(h))))
    assert "something in the model is random" in noise["repeatable"]
    dropout = failures(doctor(fault(tiny_policy(), lambda h: torch.nn.functional.dropout(h, 0.1, training=True))))
    assert "something in the model is random" in dropout["repeatable"]
    assert "ratio" in dropout


def test_a_forgotten_temperature_is_found(monkeypatch):
    policy = tiny_policy()
    read = policy.head.read
    monkeypatch.setattr(policy.head, "read", lambda h, y, temperature, *rest: read(h, y, 1.0, *rest))
    found = failures(doctor(policy))
    assert "the ratio before the first update is off 1" in found["ratio"]
    assert "at temperature 0.7" in found["ratio"]


def test_positions_off_by_one_are_found(monkeypatch):
    policy = tiny_policy("llama")
    hidden = policy.head.hidden
    monkeypatch.setattr(policy.head, "hidden", lambda ids, *rest: hidden(ids, *rest).roll(1, dims=1))
    assert "log-probabilities of the same tokens differ by up to" in failures(doctor(policy))["sampler and trainer"]


def test_a_loss_that_trains_masked_steps_is_found():
    class Leaky:
        scope = "path"

        def __call__(self, batch, now, ref):
            return -now.logp * (batch.advantage + batch.advantage.mean()), {}

    from dataclasses import replace

    report = doctor(tiny_policy(), replace(grpo(n=4, beta=0.0), loss=Leaky()))
    assert "masked steps are trained" in failures(report)["masked steps"]
    assert "changes by" in failures(report)["micro-batch"]


def test_an_end_id_that_is_never_honoured_is_found():
    policy = policy_of(ends=[1, 60])
    policy.eos = [1]
    assert "wrote the end id 60 (" in failures(doctor(policy))["end tokens"]


def test_an_end_id_outside_the_vocabulary_is_found():
    policy = policy_of(ends=[1, 5000])
    assert "the end id 5000 does not exist" in failures(doctor(policy))["end tokens"]


def test_padding_with_the_end_token_is_a_warning_and_not_a_failure():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    report = doctor(TokenPolicy(tiny_model(), tokenizer))
    assert report["padding token"].verdict == "warn"
    assert failures(report) == {}


def with_template(text: str) -> TokenPolicy:
    policy = tiny_policy()
    policy.tokenizer.bos_token = "<unk>"
    policy.tokenizer.chat_template = text
    return policy


BODY = "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}{% endfor %}"
OPEN = "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"


def test_a_template_that_doubles_bos_is_found():
    found = failures(doctor(with_template("{{ bos_token }}{{ bos_token }}" + BODY + OPEN)))
    assert "begins with the BOS token 2 twice" in found["chat template"]


def test_a_template_with_one_bos_is_fine():
    assert failures(doctor(with_template("{{ bos_token }}" + BODY + OPEN))) == {}


def test_a_template_without_generation_prompt_is_found():
    assert "does not append a generation prompt" in failures(doctor(with_template(BODY)))["chat template"]


def test_a_turn_closed_by_a_token_that_ends_nothing_is_a_warning():
    report = doctor(with_template(BODY + OPEN))
    assert report["end of turn"].verdict == "warn"
    assert "holds none of the end ids [1]" in report["end of turn"].sentence


def test_memory_counts_what_a_reader_can_count():
    policy = tiny_policy("llama")
    parts = memory(policy, PLAN, prompt=8, reference=True)
    numbers = sum(p.numel() for p in policy.parameters())
    assert parts["weights"] == pytest.approx(numbers * 4 / 2**20, abs=0.01)
    assert parts["optimizer"] == pytest.approx(2 * parts["weights"], abs=0.02)
    token = 2 * 2 * 2 * 8 * 4  # keys and values of a token: layers, heads, head size, bytes
    assert parts["cache"] == pytest.approx(token * (16 * 64 + 4 * 8) / 2**20, abs=0.01)  # columns come by 64, prompts once
    assert parts["sampling weights"] == parts["weights"]
    policy.lean = False
    parts = memory(policy, PLAN, prompt=8, reference=True)
    assert parts["cache"] == pytest.approx(token * 16 * (8 + 32) / 2**20, abs=0.01)
    assert parts["sampling weights"] == 0


def test_activations_are_those_that_autograd_keeps_for_the_largest_block():
    policy = tiny_policy("qwen3")
    parts = memory(policy, PLAN, prompt=8, reference=False)
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in policy.parameters()}

    def pack(x):
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        hidden = policy.head.hidden(torch.zeros(512 // 40, 40, dtype=torch.long))
    assert hidden.requires_grad
    assert parts["activations"] == pytest.approx(sum(kept.values()) / 2**20, rel=0.05)


def test_checkpointing_is_seen_to_keep_less():
    plain = memory(tiny_policy(), PLAN, prompt=8, reference=False)
    saving = memory(tiny_policy(checkpointing=True), PLAN, prompt=8, reference=False)
    assert saving["activations"] < 0.3 * plain["activations"]


def test_a_run_that_does_not_fit_is_warned_of(monkeypatch):
    monkeypatch.setattr(surgery, "_free", lambda device: 0.5)
    check = doctor(tiny_policy(), planned=PLAN)["memory"]
    assert check.verdict == "warn"
    assert "lower fit.token_budget or policy.sample_rows" in check.sentence


def test_the_command_prints_strict_json_and_exits_by_health(tmp_path, capsys, monkeypatch):
    folder = tiny_folder(tmp_path / "model")
    assert surgery.main(str(folder), True) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["healthy"] is True
    assert {"python", "torch", "transformers", "peft", "gruppo"} == set(report["versions"])
    monkeypatch.setattr(surgery, "_ends", lambda *_: False)
    assert surgery.main(str(folder), False) == 1
    assert "1 of" in capsys.readouterr().out.splitlines()[-1]
