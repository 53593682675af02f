"""A reward model's signals equal a direct forward of each text by itself."""

from __future__ import annotations

import pytest
import torch
from tests.graders.made import group
from tests.tiny import tiny_config, tiny_folder, tiny_tokenizer
from transformers import AutoModelForSequenceClassification, BertConfig

from gruppo.graders import Grading, RewardModel, build
from gruppo.types import GruppoError

CHAT = [{"role": "user", "content": "hi"}]


def scorer(family: str, heads: int = 1):
    """A tiny random classifier; BERT's layout for an encoder."""
    if family == "bert":
        config = BertConfig(
            vocab_size=tiny_config().vocab_size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=256,
            initializer_range=0.25,
            pad_token_id=0,
        )
    else:
        config = tiny_config(family)
    config.num_labels = heads
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()


@torch.no_grad()
def direct(model, text: str) -> list[float]:
    return model(input_ids=torch.tensor([tiny_tokenizer()(text)["input_ids"]])).logits[0].tolist()


@pytest.mark.parametrize("family", ["qwen3", "llama", "bert"])
@pytest.mark.parametrize("budget", [16384, 8])
def test_scores_equal_a_direct_forward_of_prompt_and_completion(family, budget) -> None:
    model, outputs = scorer(family), ["yes", "a much longer answer than that", "", "no."]
    graded = RewardModel(model, tiny_tokenizer(), budget=budget)([group(outputs, prompt="Q:"), group(["x"], prompt="Why?")])
    expected = [direct(model, "Q:" + o)[0] for o in outputs]
    assert graded[0]["reward_model"] == pytest.approx(expected, abs=1e-5)
    assert graded[1]["reward_model"] == pytest.approx(direct(model, "Why?x"), abs=1e-5)
    assert max(expected) - min(expected) > 1e-2  # the texts do differ


def test_chat_goes_through_the_template() -> None:
    model = scorer("qwen3")
    graded = RewardModel(model, tiny_tokenizer())([group(["yes"], prompt=CHAT)])
    assert graded[0]["reward_model"] == pytest.approx(direct(model, "<user>hi<assistant>yes<eos>"), abs=1e-5)


def test_heads_are_signals() -> None:
    model = scorer("qwen3", heads=2)
    expected = direct(model, "Q:a")
    assert RewardModel(model, tiny_tokenizer())([group(["a"], prompt="Q:")]) == [
        {"reward_model_0": pytest.approx(expected[:1], abs=1e-5), "reward_model_1": pytest.approx(expected[1:], abs=1e-5)}
    ]
    named = RewardModel(model, tiny_tokenizer(), names=("helpful", "harmless"))
    assert build([named], {"helpful": 1.0, "harmless": -1.0})([group(["a"], prompt="Q:")])[0].signals["reward"].tolist() == [
        pytest.approx(expected[0] - expected[1], abs=1e-5)
    ]
    with pytest.raises(GruppoError, match="has 2 heads, but 1 names were given"):
        RewardModel(model, tiny_tokenizer(), names=("helpful",))


def test_a_folder_is_a_reward(tmp_path) -> None:
    folder = tmp_path / "judge"
    model = scorer("qwen3")
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    grading = build(str(folder))
    assert list(grading.weights) == ["judge"]
    assert grading([group(["a"], prompt="Q:")])[0].signals["judge"].tolist() == pytest.approx(direct(model, "Q:a"), abs=1e-5)


def test_a_model_without_a_trained_head_is_refused(tmp_path) -> None:
    with pytest.raises(GruppoError, match=r"is no reward model: 1 weights are not in it and would be random \(score.weight\)"):
        RewardModel(str(tiny_folder(tmp_path / "causal")))


def test_a_folder_without_a_model_is_a_sentence(tmp_path) -> None:
    with pytest.raises(GruppoError, match="no sequence classification model can be read from"):
        RewardModel(str(tmp_path))


def test_text_that_is_too_long_abstains_and_is_not_cut() -> None:
    grading = Grading([RewardModel(scorer("qwen3"), tiny_tokenizer())], {"reward_model": 1.0})
    signals = grading([group(["a" * 300, "b"])])[0].signals
    assert signals["reward_model"].isnan().tolist() == [True, False]
    assert grading.failures == {"reward_model: 301 tokens, but the reward model reads 256": 1}


def test_no_gradient_is_kept() -> None:
    model = scorer("qwen3")
    RewardModel(model, tiny_tokenizer())([group(["a"])])
    assert all(p.grad is None for p in model.parameters())


def test_chat_without_a_template_is_a_sentence() -> None:
    with pytest.raises(GruppoError, match="the reward model's tokenizer has no chat template"):
        RewardModel(scorer("qwen3"), tiny_tokenizer(chat=False))([group(["a"], prompt=CHAT)])
