"""The packed forward on models and forks that no other test names: random ones, in double precision, against a forward per path.

`make test-slow` runs more of the same.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from tests.policies.test_prefix import ALWAYS, PADDED
from tests.tiny import tiny_tokenizer
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from gruppo.core.collate import collate
from gruppo.policies.token import TokenPolicy
from gruppo.types import Batch, Group, GruppoError, Path, Task

Size = dict[str, Any]
WINDOW = (3, 7, 30)  # below most rows, below some, below few: rows shorter than the window are seen first
LAYERS = ["sliding_attention", "full_attention"]
HEADS = ((1, 1), (2, 1), (1, 3), (2, 2), (2, 3), (1, 7))  # of keys and values, and queries of each


def size(r: random.Random) -> Size:
    kv, each = r.choice(HEADS)
    return {
        "vocab_size": 97,
        "hidden_size": 8 * kv * each,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": kv * each,
        "num_key_value_heads": kv,
        "max_position_embeddings": 256,
        "initializer_range": 0.25,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "tie_word_embeddings": r.random() < 0.5,
    }


def slides(r: random.Random) -> Size:
    return {"use_sliding_window": True, "sliding_window": r.choice(WINDOW), "layer_types": LAYERS}


def turns(r: random.Random) -> Size:
    scaled = {"original_max_position_embeddings": 16, "factor": 4.0}
    kind = r.choice(
        [
            {"rope_type": "default"},
            {"rope_type": "linear", "factor": 3.0},
            {"rope_type": "yarn", **scaled},
            {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **scaled},
        ]
    )
    return {"rope_parameters": {"rope_theta": 100.0, **kind}}


EXPERTS: Size = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
SMALL: Size = {"vocab_size": 97, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "eos_token_id": 1}
VISION: Size = {"depth": 1, "embed_dim": 16, "num_heads": 2, "patch_size": 4}


def vision(r: random.Random) -> Any:
    text = {**size(r), "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
    return tf.Qwen2VLConfig(text_config=text, vision_config={**VISION, "hidden_size": text["hidden_size"]})


MODELS: dict[str, Callable[[random.Random], Any]] = {
    "llama": lambda r: tf.LlamaConfig(**size(r), **turns(r), attention_bias=True, attention_dropout=0.3),
    "qwen3": lambda r: tf.Qwen3Config(**size(r), **turns(r), head_dim=16, **slides(r)),
    "mistral": lambda r: tf.MistralConfig(**size(r), sliding_window=r.choice(WINDOW)),
    "gemma2": lambda r: tf.Gemma2Config(**size(r), head_dim=8, sliding_window=r.choice(WINDOW), attn_logit_softcapping=3.0),
    "gemma4": lambda r: tf.Gemma4TextConfig(
        **{**size(r), "num_hidden_layers": 4},
        head_dim=8,
        global_head_dim=16,
        sliding_window=5,
        vocab_size_per_layer_input=97,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=2,
        layer_types=LAYERS * 2,
    ),
    "phi3": lambda r: tf.Phi3Config(**size(r), resid_pdrop=0.2, attention_dropout=0.2, sliding_window=r.choice(WINDOW)),
    "olmo2": lambda r: tf.Olmo2Config(**size(r)),
    "granite": lambda r: tf.GraniteConfig(**size(r), embedding_multiplier=2.0, logits_scaling=3.0, attention_multiplier=0.3),
    "smollm3": lambda r: tf.SmolLM3Config(**size(r), no_rope_layer_interval=2),
    "cohere2": lambda r: tf.Cohere2Config(**size(r), sliding_window=4, logit_scale=0.3),
    "gpt_neox": lambda r: tf.GPTNeoXConfig(**{k: v for k, v in size(r).items() if k != "num_key_value_heads"}),
    "gpt2": lambda r: tf.GPT2Config(vocab_size=97, n_embd=16, n_layer=2, n_head=4, n_positions=256, initializer_range=0.25),
    "opt": lambda r: tf.OPTConfig(**SMALL, ffn_dim=24, init_std=0.25, word_embed_proj_dim=16, dropout=0.2, layerdrop=0.5),
    "modernbert_decoder": lambda r: tf.ModernBertDecoderConfig(
        **SMALL, intermediate_size=24, local_attention=8, pad_token_id=0, bos_token_id=2, cls_token_id=2, sep_token_id=2
    ),
    # the window is in the mask alone
    "qwen2_moe": lambda r: tf.Qwen2MoeConfig(**size(r), **EXPERTS, shared_expert_intermediate_size=8, **slides(r)),
    # routers draw noise in training mode
    "phimoe": lambda r: tf.PhimoeConfig(**size(r), num_local_experts=4, router_jitter_noise=0.3, sliding_window=r.choice(WINDOW)),
    "qwen2_vl": vision,
    # never shared: a window per chunk, a recurrent state, a bias per distance
    "llama4": lambda r: tf.Llama4TextConfig(
        **size(r),
        head_dim=8,
        intermediate_size_mlp=16,
        num_local_experts=2,
        attention_chunk_size=r.choice(WINDOW),
        floor_scale=20,
        no_rope_layers=[1, 0],
    ),
    "lfm2": lambda r: tf.Lfm2Config(**size(r), layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
    "mamba": lambda r: tf.MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=2, state_size=4, initializer_range=0.25),
    "mpt": lambda r: tf.MptConfig(vocab_size=97, d_model=16, n_layers=2, n_heads=4, max_seq_len=256, initializer_range=0.25),
}
NEVER = {"llama4", "lfm2", "mamba", "mpt"}


@contextmanager
def double() -> Iterator[None]:
    """transformers computes norms, rotary angles and softmax in float32 whatever the model's dtype: here it does not."""
    to, low, softmax = Tensor.to, Tensor.float, F.softmax

    def wide(x: Tensor, *args: Any, **names: Any) -> Tensor:
        if x.dtype == torch.float64:
            args = tuple(torch.float64 if v is torch.float32 else v for v in args)
            names = {k: torch.float64 if v is torch.float32 else v for k, v in names.items()}
        return to(x, *args, **names)

    def exact(x: Tensor, *args: Any, dtype: Any = None, **names: Any) -> Tensor:
        return softmax(x, *args, dtype=None if x.dtype == torch.float64 else dtype, **names)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "to", wide)
        patch.setattr(Tensor, "float", lambda x: x if x.dtype == torch.float64 else low(x))
        patch.setattr(F, "softmax", exact)
        yield


def model_of(family: str, r: random.Random, attention: str = "sdpa") -> Any:
    config = MODELS[family](r)
    config._experts_implementation = "eager"  # grouped products know no double
    make = tf.Qwen2VLForConditionalGeneration._from_config if family == "qwen2_vl" else AutoModelForCausalLM.from_config
    with torch.random.fork_rng():
        torch.manual_seed(r.randrange(10**6))
        model = make(config, attn_implementation="eager" if family in ("gemma2", "mpt", "mamba") else attention)
        if family not in NEVER and r.random() < 0.3:
            names = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
            some = sorted(names & {"q_proj", "v_proj", "down_proj", "qkv_proj", "query_key_value", "fc1"})
            if some:
                model = get_peft_model(model, LoraConfig(r=2, target_modules=some, lora_dropout=0.2, init_lora_weights=False))
    return model.double().eval()


# ---- forks


def tokens(r: random.Random, n: int) -> Tensor:
    kinds = r.choice([2, 84])  # of two tokens, completions begin alike without a word of it
    return torch.tensor([r.randrange(5, 5 + kinds) for _ in range(n)], dtype=torch.long)


def path(r: random.Random, prompt: Tensor, steps: Tensor, fork: tuple[int, int] | None = None) -> Path:
    mask = torch.ones(len(steps), dtype=torch.bool)
    kind = r.random()
    if kind < 0.3:  # a tool's output, or the end
        at = r.randint(0, len(steps))
        mask[at : at + r.choice([1, 4, 99])] = False
    elif kind < 0.35:
        mask[:] = False
    return Path(prompt, steps, torch.full((len(steps),), -1.0), mask, fork=fork)


def parallel(r: random.Random, prompt: Tensor, long: int) -> list[Path]:
    return [path(r, prompt, tokens(r, r.choice([0, 1, 2, r.randint(1, long)]))) for _ in range(r.randint(1, 9))]


def serial(r: random.Random, prompt: Tensor, long: int) -> list[Path]:
    thought = tokens(r, r.randint(2, long))
    cuts = sorted(r.randint(0, len(thought)) for _ in range(r.randint(1, 7)))
    return [path(r, prompt, thought)] + [
        path(r, prompt, torch.cat([thought[:t], tokens(r, r.randint(0, 4))]), (0, t)) for t in cuts
    ]


def tree(r: random.Random, prompt: Tensor, long: int) -> list[Path]:
    out = [path(r, prompt, tokens(r, r.randint(1, long)))]
    for _ in range(r.randint(1, 8)):
        row = r.randrange(len(out))
        t = r.randint(0, len(out[row]))
        out.append(path(r, prompt, torch.cat([out[row].steps[:t], tokens(r, r.randint(0, long))]), (row, t)))
    return out


def same(r: random.Random, prompt: Tensor, long: int) -> list[Path]:
    steps = tokens(r, long)
    return [path(r, prompt, steps.clone()) for _ in range(r.randint(2, 4))]


def unlike(r: random.Random, prompt: Tensor, long: int) -> list[Path]:
    """A fork that the tokens do not bear out."""
    return [path(r, prompt, tokens(r, long)), path(r, prompt, tokens(r, long), (0, r.randint(0, long)))]


def groups(r: random.Random, long: int) -> Batch:
    """One to three prompts of one row, some the beginning of others, each with paths of some shape."""
    prompts: list[Tensor] = []
    out = []
    for _ in range(r.choice([1, 2, 3])):
        prompt = tokens(r, r.choice([1, 2, r.randint(1, long)]))
        if prompts and r.random() < 0.4:
            prompt = torch.cat([prompts[0][: r.randint(1, len(prompts[0]))], tokens(r, r.randint(0, 3))])
        prompts.append(prompt)
        paths = r.choice([parallel, serial, tree, same, unlike])(r, prompt, long)
        out.append(Group(Task(prompt), paths))
        out[-1].advantage = torch.zeros(len(paths), out[-1].width)
    return collate(out)


# ---- equal


def alone(model: Any, p: Path, temperature: float) -> Tensor:
    logits = model(input_ids=torch.cat([p.prompt, p.steps])[None], use_cache=False).logits[0] / temperature
    return logits.log_softmax(-1)[len(p.prompt) - 1 : -1].gather(-1, p.steps[:, None])[:, 0]


def compare(family: str, seed: int) -> int:
    """How many forwards shared; raises where log-probabilities or gradients are not those of one forward per path."""
    r = random.Random(f"{family} {seed}")
    model = model_of(family, r)
    model.eval()
    trained = [p for p in model.parameters() if p.requires_grad]
    temperature = r.choice([1.0, 0.7])
    rates, saves, elements = r.choice([ALWAYS, PADDED]), r.random() < 0.4, r.choice([2**24, 5 * 97])
    batches = [b for b in (groups(r, long) for long in r.choice([(6, 16), (16,)])) if b.mask.any()]
    weights = [torch.randn(b.mask.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for b in batches]
    expected = []
    for b, weight in zip(batches, weights):
        logp = torch.zeros(b.mask.shape, dtype=torch.float64)
        model.zero_grad()
        for i, p in enumerate(b.paths):
            if len(p):
                said = alone(model, p, temperature)
                (said * weight[i, : len(p)] * p.mask).sum().backward()
                logp[i, : len(p)] = said.detach()
        expected.append((logp, [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trained]))
    model.zero_grad()
    policy = TokenPolicy(
        model, tiny_tokenizer(), temperature=temperature, sharing=rates, checkpointing=saves, head_elements=elements
    )
    shared = 0
    for b, weight, (logp, grads) in zip(batches, weights, expected):
        policy.model.zero_grad()
        place = {id(p): i for i, p in enumerate(b.paths)}
        for part in policy.split(b, r.choice(["path", "group"]), r.choice([1, 20, 60, 10**6])):
            rows, wide = [place[id(p)] for p in part.paths], part.mask.shape[1]
            now = policy.evaluate(part).logp
            torch.testing.assert_close(now.detach(), logp[rows][:, :wide] * part.mask, atol=1e-9, rtol=0)
            (now * weight[rows][:, :wide]).sum().backward()
            shared += policy._plan([p.prompt for p in part.paths], [p.steps for p in part.paths], part.mask) is not None
        norm = torch.stack([g.norm() for g in grads]).norm()
        for p, g in zip(trained, grads):
            assert float((g - (0.0 if p.grad is None else p.grad)).norm()) <= 1e-9 * float(norm)
        for i, said in enumerate(policy.score(b.paths)):
            torch.testing.assert_close(said.double(), logp[i, : len(said)], atol=1e-9, rtol=0)
    return shared


def check(family: str, seeds: range) -> None:
    with double(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # which form is not used, and why
        shared = sum(compare(family, seed) for seed in seeds)
    assert (shared == 0) == (family in NEVER)


@pytest.mark.parametrize("family", MODELS)
def test_random_forks_of_random_models_say_what_each_path_says_alone(family: str) -> None:
    check(family, range(2))


@pytest.mark.slow
@pytest.mark.parametrize("family", MODELS)
def test_many_random_forks_of_random_models(family: str) -> None:
    check(family, range(100, 160))


# ---- what would be seen too late, or not at all


def long_rows(n: int, prompt: int = 4) -> list[Path]:
    r = random.Random(n)
    start = tokens(r, prompt)
    return [Path(start, s, torch.zeros(n), torch.ones(n, dtype=torch.bool)) for s in (tokens(r, n) for _ in range(3))]


def test_a_window_that_only_the_mask_knows_is_seen_when_rows_outgrow_it() -> None:
    r = random.Random(0)
    model = AutoModelForCausalLM.from_config(tf.Qwen2MoeConfig(**size(r), **EXPERTS, **{**slides(r), "sliding_window": 12}))
    policy = TokenPolicy(model.eval(), tiny_tokenizer(), sharing=ALWAYS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy.score(long_rows(5))  # shorter than the window: shared, and rightly so
    with pytest.warns(UserWarning, match="log-probabilities differ by"):
        said = policy.score(long_rows(40))
    for p, logp in zip(long_rows(40), said):
        torch.testing.assert_close(logp, alone(model, p, 1.0).detach(), atol=1e-5, rtol=0)


def test_rows_that_part_nowhere_vouch_for_no_model() -> None:
    r = random.Random(0)
    policy = TokenPolicy(AutoModelForCausalLM.from_config(tf.LlamaConfig(**size(r))).eval(), tiny_tokenizer(), sharing=ALWAYS)
    one = long_rows(6)[0]
    policy.score([one, one])
    assert not policy._compared
    policy.score(long_rows(6))
    assert policy._compared


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_rotary_angles_that_depend_on_the_longest_row_are_refused_where_they_change(kind: str) -> None:
    r = random.Random(0)
    rope: Size = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "original_max_position_embeddings": 20}
    config = tf.LlamaConfig(**{**size(r), "max_position_embeddings": 20 if kind == "dynamic" else 256}, rope_parameters=rope)
    model = AutoModelForCausalLM.from_config(config).eval()
    policy = TokenPolicy(model, tiny_tokenizer(), sharing=ALWAYS, max_new=12)
    with pytest.raises(GruppoError, match=f"4 tokens plus 17 new ones needs 21 positions, but beyond 20.*{kind}"):
        policy.score(long_rows(17))
    g = torch.Generator().manual_seed(0)
    with pytest.raises(GruppoError, match="plus 12 new ones needs 21 positions"):
        policy.sample([tokens(r, 9)], g=g)
    near, far = long_rows(8), long_rows(8, prompt=22)
    if kind == "longrope":  # rows on either side each get their own angles
        with pytest.raises(GruppoError, match="prompts of 4 to 22 tokens share a forward"):
            policy.sample([near[0].prompt, far[0].prompt], g=g)
        for p, logp in zip([*near, *far], policy.score([*near, *far])):
            torch.testing.assert_close(logp, alone(model, p, 1.0).detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2", "phi3", "smollm3", "qwen2_vl", "gemma4"])
def test_the_sampler_says_what_training_reads(family: str) -> None:
    r = random.Random(f"sampler {family}")
    policy = TokenPolicy(model_of(family, r).float(), tiny_tokenizer(), sharing=ALWAYS, max_new=9, temperature=0.8)
    prompts = [tokens(r, n) for n in (1, 9, 4)]
    paths = policy.sample([p for p in prompts for _ in range(4)], g=torch.Generator().manual_seed(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for p, logp in zip(paths, policy.score(paths)):
            torch.testing.assert_close(logp, p.logp, atol=2e-5, rtol=0)
