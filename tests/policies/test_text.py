"""Text in, tokens out, and the sentences for tokenizers and settings that cannot work."""

from __future__ import annotations

import pytest
import torch
from tests.policies.models import policy_of, rng
from tests.tiny import tiny_model, tiny_policy, tiny_tokenizer

from gruppo.policies.token import TokenPolicy
from gruppo.types import GruppoError

MESSAGES = [{"role": "user", "content": "1+2="}]


def test_a_string_is_tokenised_as_it_stands():
    policy = tiny_policy()
    assert policy.encode("1+2=").tolist() == policy.tokenizer("1+2=")["input_ids"]


def test_messages_go_through_the_template_and_open_the_assistants_turn():
    policy = tiny_policy()
    ids = policy.encode(MESSAGES).tolist()
    assert policy.tokenizer.decode(ids) == "<user>1+2=<assistant>"


def test_special_tokens_are_not_added_a_second_time_to_the_templates_text():
    policy = tiny_policy()
    tokenizer = policy.tokenizer
    tokenizer.bos_token = "<unk>"
    tokenizer.add_bos_token = True
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    ids = policy.encode(MESSAGES).tolist()
    assert ids.count(tokenizer.bos_token_id) == 1


def test_encoded_prompts_pass_through_untouched():
    ids = torch.tensor([5, 6, 7])
    assert tiny_policy().encode(ids) is ids


def test_messages_without_a_chat_template_are_refused():
    policy = TokenPolicy(tiny_model(), tiny_tokenizer(chat=False))
    with pytest.raises(GruppoError, match="a list of chat messages, but this tokenizer has no chat template"):
        policy.encode(MESSAGES)


def test_a_picture_in_a_message_is_refused_instead_of_left_unseen():
    seen = [{"role": "user", "content": [{"type": "image", "image": "cat.png"}, {"type": "text", "text": "what is it?"}]}]
    with pytest.raises(GruppoError, match="a part of the type image, but this policy reads text alone"):
        tiny_policy().encode(seen)


def test_an_empty_prompt_is_refused():
    with pytest.raises(GruppoError, match="encodes to no token at all"):
        tiny_policy().sample([""], g=rng())


def test_a_tokenizer_without_an_end_token_is_refused():
    with pytest.raises(GruppoError, match="names an end-of-sequence token, so a completion could never end"):
        TokenPolicy(tiny_model(eos=False), tiny_tokenizer(eos=False))


def test_a_model_that_names_an_end_token_is_enough():
    policy = TokenPolicy(tiny_model(), tiny_tokenizer(eos=False))
    assert policy.eos == [1]


def test_a_tokenizer_without_padding_pads_with_an_end_token_and_still_ends_its_paths():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    model = tiny_model()
    model.generation_config.eos_token_id = [1, *range(60, 84)]
    policy = TokenPolicy(model, tokenizer, max_new=20)
    assert policy.pad == 1
    paths = policy.sample([p for p in ("1+2=", "a longer one: 3+4=") for _ in range(8)], g=rng())
    assert all(int(p.steps[-1]) in policy.eos for p in paths if not p.truncated)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_cannot_be_trained_at_is_refused(temperature):
    with pytest.raises(GruppoError, match="training needs a temperature above 0"):
        policy_of(temperature=temperature)


def test_decoding_keeps_white_space_and_drops_special_tokens():
    policy = tiny_policy()
    ids = torch.tensor(policy.tokenizer("1 , 2 .\n a")["input_ids"] + [policy.eos[0]])
    assert policy.decode(ids) == "1 , 2 .\n a"
