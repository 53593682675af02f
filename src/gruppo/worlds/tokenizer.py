"""The worlds' tokenizer: one token per byte, so any text is encodable and every text comes back unchanged.

`<think>`, `</think>`, `<answer>` and `</answer>` are one token each and not special: they survive decoding without special
tokens, because graders read them.
"""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

END, PAD = "<|end|>", "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
CONTEXT = 512

# A turn is its role, its text and the end token; the same end token closes a completion, so there is one EOS.
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def tokenizer(tags: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """256 bytes, 4 tags and 5 special tokens: 265 ids, the same ones each time, then one id for each of a world's own tags."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_tokens([AddedToken(t, normalized=False, special=False) for t in TAGS])
    raw.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in (PAD, END, *ROLES)])
    raw.add_tokens([AddedToken(t, normalized=False, special=False) for t in tags])
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=list(ROLES),
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    made.chat_template = TEMPLATE
    return made
