"""The same model and the same batch give the same loss and gradient here as in TRL's own trainers.

TRL does everything itself: its rollout hook returns the fixed completions, its `_generate_and_score_completions` computes
advantages, old and reference log-probs and counts under the weights that sampled; then its model gets the weights that learn
(so that ratios differ from 1 and clipping acts), and its `_compute_loss` gives the loss. gruppo runs the recipe's stages.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl", reason="parity needs the extra: pip install 'gruppo[parity]'")

from datasets import Dataset
from tests.parity.tiny import (
    EOS,
    LENGTHS,
    LIMIT,
    PROMPTS,
    REWARDS,
    TEMPERATURE,
    Measured,
    Replay,
    Tiny,
    apart,
    build,
    graded,
    gradient,
    load,
    ours,
    put,
)
from tests.tiny import tiny_tokenizer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.rewards import get_soft_overlong_punishment

from gruppo.core.advantage import standardize
from gruppo.core.collate import Passes
from gruppo.core.correct import Masked, Truncated, path_gap
from gruppo.core.kl import WithKL, k3, with_kl
from gruppo.core.ratio import step_ratio
from gruppo.core.reduce import step_mean
from gruppo.core.surrogate import PPOClip
from gruppo.policies.reference import initial
from gruppo.recipe import Recipe
from gruppo.recipes import corrected, recipe
from gruppo.train import iterate
from gruppo.types import Batch, Task

pytestmark = [
    pytest.mark.parity,
    # TRL 1.16 asks transformers 5 for an attribute by its old name, and calls its own hook experimental
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:You are using 'rollout_func':UserWarning"),
]

G = len(LENGTHS[0])
FLAT = [r for group in REWARDS for r in group]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return build(tmp_path_factory.mktemp("qwen3"))


def settings(tiny: Tiny, **changes: Any) -> dict[str, Any]:
    """TRL's arguments with everything switched off that is not the method."""
    quiet = {"use_cpu": True, "bf16": False, "report_to": "none", "activation_checkpointing": False, "disable_tqdm": True}
    size = {"per_device_train_batch_size": len(FLAT), "num_generations": G, "max_completion_length": LIMIT}
    # Two passes over each batch: only then does TRL read the old log-probs under the weights that sampled.
    size |= {"num_iterations": 2, "temperature": TEMPERATURE, "shuffle_dataset": False}
    return {"output_dir": str(tiny.folder / "trl"), "save_strategy": "no", **quiet, **size, **changes}


def rows() -> list[dict[str, Any]]:
    return [{"prompt": p} for p in PROMPTS for _ in range(G)]


def flat(tiny: Tiny) -> list[list[int]]:
    return [c for group in tiny.completions for c in group]


def hook(tiny: Tiny, gap: list[list[float]] | None = None, mask: list[list[int]] | None = None):
    """TRL's rollout hook, returning the fixed completions; `gap` is how far its log-probs are from the trainer's."""

    def rollout(prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
        assert prompts == [r["prompt"] for r in rows()]
        ids = [trainer.processing_class(p)["input_ids"] for p in prompts]
        logps = [[0.0] * len(c) for c in flat(tiny)]
        if gap is not None:
            logps = [(a - torch.tensor(b)).tolist() for a, b in zip(sampled(tiny), gap, strict=True)]
        given = {"prompt_ids": ids, "completion_ids": flat(tiny), "logprobs": logps}
        return {**given, "env_mask": mask} if mask else given

    return rollout


def sampled(tiny: Tiny) -> list[Tensor]:
    """The log-probs of the fixed completions under the sampling weights: a third reading, row by row, nothing padded."""
    model, tok, out = load(tiny), tiny_tokenizer(), []
    put(model, tiny.old)
    for prompt, group in zip(PROMPTS, tiny.completions):
        head = tok(prompt)["input_ids"]
        for c in group:
            with torch.no_grad():
                logits = model(torch.tensor([head + c])).logits[0, len(head) - 1 : -1]
            out.append((logits / TEMPERATURE).log_softmax(-1).gather(1, torch.tensor(c)[:, None])[:, 0])
    return out


def grpo_trainer(tiny: Tiny, rewards: list[Any], gap=None, mask=None, **changes: Any) -> GRPOTrainer:
    return GRPOTrainer(
        str(tiny.folder),
        rewards,
        GRPOConfig(**settings(tiny, **changes)),
        Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tiny_tokenizer(),
        rollout_func=hook(tiny, gap, mask),
    )


def give(values: list[float | None]):
    """A TRL reward function that gives these values."""

    def fixed(completions: list[str], **_: Any) -> list[float | None]:
        return list(values)

    return fixed


def theirs(tiny: Tiny, trainer: GRPOTrainer | RLOOTrainer, parts: int = 1) -> Measured:
    """TRL's loss and gradient, in `parts` steps of gradient accumulation."""
    trainer.current_gradient_accumulation_steps = parts
    trainer.model.train()
    put(trainer.model, tiny.old)
    inputs = trainer._generate_and_score_completions(rows())
    put(trainer.model, tiny.now)
    total, size = 0.0, len(FLAT) // parts
    for at in range(0, len(FLAT), size):
        some = {k: v[at : at + size] if isinstance(v, Tensor) and v.dim() else v for k, v in inputs.items()}
        loss = trainer._compute_loss(trainer.model, some)
        loss.backward()
        total += loss.item()
    return Measured(total, gradient(trainer.model), {k: v[-1] for k, v in trainer._metrics["train"].items()})


def trl(tiny: Tiny, rewards: list[Any] | None = None, gap=None, mask=None, parts: int = 1, **changes: Any) -> Measured:
    return theirs(tiny, grpo_trainer(tiny, [give(FLAT)] if rewards is None else rewards, gap, mask, **changes), parts)


def agree(a: Measured, b: Measured) -> None:
    loss, grad = apart(a, b)
    assert loss < TOLERANCE, f"the losses {a.loss} and {b.loss} differ by {loss:.1e}"
    assert grad < TOLERANCE, f"the gradients differ by {grad:.1e} of their norm"


DAPO = {"length": LIMIT, "cache": 4, "eps": 1e-4}
# name: (recipe, the same method in TRL's words)
METHODS: dict[str, tuple[Recipe, dict[str, Any]]] = {
    "grpo": (recipe("grpo", n=G, beta=0.0), {"loss_type": "grpo"}),
    "grpo, KL": (recipe("grpo", n=G, beta=0.5), {"loss_type": "grpo", "beta": 0.5, "use_bias_correction_kl": False}),
    "grpo, upper clip": (recipe("grpo", n=G, beta=0.0, high=0.28), {"loss_type": "grpo", "epsilon_high": 0.28}),
    "grpo, delta": (
        replace(recipe("grpo", n=G, beta=0.0), loss=PPOClip(0.2, 0.2, cap=1.3)),
        {"loss_type": "grpo", "delta": 1.3},
    ),
    "dr_grpo": (recipe("dr-grpo", n=G, length=LIMIT), {"loss_type": "dr_grpo", "scale_rewards": "none"}),
    "dr_grpo, KL": (
        recipe("dr-grpo", n=G, length=LIMIT, beta=0.5),
        {"loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.5, "use_bias_correction_kl": False},
    ),
    "dapo": (recipe("dapo", n=G, **DAPO), {"loss_type": "dapo", "epsilon_high": 0.28}),
    "dapo, KL": (
        replace(recipe("dapo", n=G, **DAPO), loss=with_kl(PPOClip(0.2, 0.28), 0.5), reference=initial),
        {"loss_type": "dapo", "epsilon_high": 0.28, "beta": 0.5, "use_bias_correction_kl": False},
    ),
    "bnpo": (replace(recipe("grpo", n=G, beta=0.0), reduce=step_mean), {"loss_type": "bnpo"}),
    "gspo": (
        recipe("gspo", n=G, low=0.03, high=0.04, parts=1),
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.03, "epsilon_high": 0.04},
    ),
    "gspo-token": (
        recipe("gspo-token", n=G, low=0.03, high=0.04, parts=1),
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.03, "epsilon_high": 0.04},
    ),
    # TRL's epsilon_high is the bound itself
    "cispo": (recipe("cispo", n=G, high=0.1, eps=1e-4), {"loss_type": "cispo", "epsilon_high": 1.1}),
    "cispo, batch scale": (
        replace(recipe("scalerl", n=G, bound=1.1), reduce=step_mean),
        {"loss_type": "cispo", "epsilon_high": 1.1, "scale_rewards": "batch"},
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_same_loss_and_gradient(tiny, name):
    method, words = METHODS[name]
    rewards = [give(FLAT)]
    if name.startswith("dapo"):  # the recipe's own length penalty is a reward function in TRL
        rewards.append(get_soft_overlong_punishment(LIMIT, 4))
    agree(ours(tiny, method), trl(tiny, rewards, **words))


@pytest.mark.parametrize("name", ["grpo, upper clip", "gspo", "cispo"])
def test_the_batch_is_partly_clipped(tiny, name):
    """Otherwise the comparison above says nothing about clipping."""
    stats = ours(tiny, METHODS[name][0]).stats
    assert 0.02 < stats["clip_low"] + stats["clip_high"] < 0.9


def test_same_clipped_share_entropy_and_kl(tiny):
    """Logged values, over tokens as TRL averages them."""
    method = replace(recipe("grpo", n=G, beta=0.5), reduce=step_mean)
    ours_, theirs_ = ours(tiny, method).stats, trl(tiny, **METHODS["grpo, KL"][1]).stats
    for mine, other in {
        "entropy": "entropy",
        "kl": "kl",
        "clip_low": "clip_ratio/low_mean",
        "clip_high": "clip_ratio/high_mean",
    }.items():
        assert ours_[mine] == pytest.approx(theirs_[other], rel=1e-5), mine


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_same_gradient_with_tokens_of_the_environment_masked(tiny, loss_type):
    """TRL's env_mask is a path's mask: the tokens are read, not trained, and not counted."""
    mask = [[int(t % 3 != 1 or row == 2) for t in range(len(c))] for row, c in enumerate(flat(tiny))]
    method = {"grpo": recipe("grpo", n=G, beta=0.0), "dapo": METHODS["bnpo"][0]}[loss_type]
    agree(ours(tiny, method, holes=lambda row, t: not mask[row][t]), trl(tiny, mask=mask, loss_type=loss_type))


@pytest.mark.parametrize("name", ["grpo, KL", "dr_grpo", "dapo", "gspo", "cispo"])
def test_micro_batches_here_equal_gradient_accumulation_there(tiny, name):
    """Two accumulation steps of 6 paths in TRL; here blocks of rows of similar length, whatever their number."""
    method, words = METHODS[name]
    rewards = [give(FLAT), *([get_soft_overlong_punishment(LIMIT, 4)] if name == "dapo" else [])]
    args = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2, "num_iterations": 4}
    agree(ours(tiny, method, budget=60), trl(tiny, rewards, parts=2, **args, **words))


def test_bnpo_depends_on_accumulation_there_and_not_here(tiny):
    """TRL's bnpo normalises each micro-batch by its own tokens; one token mean over the optimizer step is its dapo."""
    args = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2, "num_iterations": 4}
    split, whole = (trl(tiny, loss_type="bnpo", parts=n, **(args if n == 2 else {})) for n in (1, 2)[::-1])
    assert apart(split, whole)[1] > 1e-3
    agree(ours(tiny, METHODS["bnpo"][0]), trl(tiny, loss_type="dapo", parts=2, **args))


# -- differences of convention, each with its exact factor ----------------------------------------------------------------


def test_trl_multiplies_its_kl_by_the_ratio_unless_told_not_to(tiny):
    method = replace(recipe("grpo", n=G, beta=0.5), loss=WithKL(PPOClip(0.2, 0.2), 0.5, ratio=step_ratio))
    default = trl(tiny, loss_type="grpo", beta=0.5)
    agree(ours(tiny, method), default)
    assert apart(ours(tiny, METHODS["grpo, KL"][0]), default)[1] > 1e-2


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
def test_a_path_that_is_masked_whole_counts_in_trls_path_mean_only(tiny, loss_type):
    """mask_truncated_completions: TRL divides by all paths, here by the paths that train; token means agree."""
    words = METHODS[loss_type][1] | {"mask_truncated_completions": True, "epsilon_high": 0.2}
    method = METHODS["bnpo" if loss_type == "dapo" else loss_type][0]
    cut = {row for row, c in enumerate(flat(tiny)) if c[-1] != EOS}
    mine, other = ours(tiny, method, holes=lambda row, t: row in cut), trl(tiny, **words)
    factor = 1.0 if loss_type == "dapo" else (len(FLAT) - len(cut)) / len(FLAT)
    agree(Measured(mine.loss * factor, {k: g * factor for k, g in mine.grad.items()}, {}), other)


def test_an_unscorable_path_counts_in_trls_means_and_not_here(tiny):
    """None from every reward function: advantage 0 in both; TRL keeps its tokens in the denominator, here it is dropped."""
    values = [None if row == 6 else r for row, r in enumerate(FLAT)]
    held = [[float("nan") if n * G + i == 6 else r for i, r in enumerate(group)] for n, group in enumerate(REWARDS)]
    mine, other = ours(tiny, METHODS["grpo"][0], rewards=held), trl(tiny, [give(values)], loss_type="grpo")
    factor = (len(FLAT) - 1) / len(FLAT)
    agree(Measured(mine.loss * factor, {k: g * factor for k, g in mine.grad.items()}, {}), other)


# -- advantages -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["group", "none", "batch"])
def test_same_advantages_from_the_same_rewards(tiny, scale):
    """Sample std and eps 1e-4 over the group or over the batch; a constant group and an unscorable path give 0."""
    values = [[1.0, 0.0, 0.25, -1.0], [0.7] * 4, [0.1, float("nan"), 1.0, 3.0]]
    trainer = grpo_trainer(tiny, [give([None if r != r else r for v in values for r in v])], scale_rewards=scale)
    trainer.model.train()
    expected = trainer._generate_and_score_completions(rows())["advantages"]
    method = {"group": recipe("grpo", n=G), "none": recipe("dr-grpo", n=G), "batch": recipe("scalerl", n=G)}[scale]
    groups = method.rollout(sampler(tiny, method), [Task(p) for p in PROMPTS], graded(values), torch.Generator())
    groups = [g.with_(reward=method.reward(g)) for g in groups]
    groups = method.across([g.with_(advantage=method.advantage(g)) for g in groups])
    got = torch.cat([g.advantage[:, 0] for g in groups])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def sampler(tiny: Tiny, method: Recipe) -> Replay:
    policy = Replay(tiny, holes=lambda row, t: False, gap=None, temperature=TEMPERATURE)
    policy.reference = None if method.reference is None else method.reference(policy)
    return policy


# -- a sampler that is another program ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "weight"),
    [
        ("token_truncate", Truncated(1.1, 0.95)),
        ("token_mask", Masked(1.1, 0.95)),
        ("sequence_truncate", Truncated(1.1, 0.95, gap=path_gap)),
        ("sequence_mask", Masked(1.1, 0.95, gap=path_gap)),
    ],
)
def test_same_correction_of_the_samplers_log_probs(tiny, mode, weight):
    """With KL, which the weight does not touch."""
    g = torch.Generator().manual_seed(3)
    gap = [(0.1 * torch.randn(len(c), generator=g)).tolist() for c in flat(tiny)]
    words = {"beta": 0.5, "use_bias_correction_kl": False, "loss_type": "grpo", "vllm_importance_sampling_mode": mode}
    bounds = {"vllm_importance_sampling_clip_max": 1.1, "vllm_importance_sampling_clip_min": 0.95}
    trainer = grpo_trainer(tiny, [give(FLAT)], gap, **words, **bounds)
    trainer.use_vllm, trainer._last_loaded_step = True, trainer.state.global_step  # as if its log-probs came from vLLM
    method = corrected(recipe("grpo", n=G, beta=0.5), weight)
    mine = ours(tiny, method, gap=gap)
    assert not 0.999 < mine.stats["sampler_weight"] < 1.001
    agree(mine, theirs(tiny, trainer))


# -- RLOO -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_rloo_is_trls_rloo(tiny, beta):
    args = {k: v for k, v in settings(tiny, beta=beta, epsilon=0.1).items() if k != "loss_type"}
    data = Dataset.from_dict({"prompt": PROMPTS})
    trainer = RLOOTrainer(str(tiny.folder), give(FLAT), RLOOConfig(**args), data, processing_class=tiny_tokenizer())
    trainer._generate_single_turn = lambda prompt_ids, images, fields: flat(tiny)
    agree(ours(tiny, recipe("rloo", n=G, beta=beta, low=0.1, high=0.1)), theirs(tiny, trainer))


# -- the whole loop -------------------------------------------------------------------------------------------------------


def test_two_updates_of_trls_own_training_loop_move_the_weights_the_same_way(tiny):
    """`Trainer.train()` against `iterate()`: one rollout, two passes over it, clipped gradients, plain SGD."""
    trainer = grpo_trainer(
        tiny, [give(FLAT)], loss_type="grpo", max_steps=2, learning_rate=0.5, lr_scheduler_type="constant", optim="sgd"
    )
    put(trainer.model, tiny.old)
    trainer.train()
    method = replace(recipe("grpo", n=G, beta=0.0), cadence=Passes(epochs=2))
    policy = sampler(tiny, method)
    put(policy.model, tiny.old)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.5)
    done = iterate(policy, [Task(p) for p in PROMPTS], graded(REWARDS), method, optimizer, torch.Generator(), budget=60)
    assert done.updates == 2
    theirs_ = dict(trainer.model.named_parameters())
    for name, p in policy.model.named_parameters():
        moved = (theirs_[name] - tiny.old[name]).norm()
        assert moved > 0
        assert (p - theirs_[name]).norm() < 1e-4 * moved, name


# -- mutants: what the comparison must not let through --------------------------------------------------------------------


@dataclass(frozen=True)
class PopulationStd:
    def __call__(self, group):
        return standardize(group.reward, ddof=0, eps=1e-4)[:, None].expand(-1, group.width).clone()


def wrong_sign(logp: Tensor, logp_ref: Tensor) -> Tensor:
    return -k3(logp, logp_ref)


def counts_padding(batch: Batch) -> tuple[Tensor, Tensor]:
    return batch.mask.float(), torch.tensor(float(batch.mask.numel()))


GRPO_KL = METHODS["grpo, KL"][0]
MUTANTS: dict[str, tuple[Recipe, dict[str, Any]]] = {
    "the sign of the KL": (replace(GRPO_KL, loss=WithKL(PPOClip(0.2, 0.2), 0.5, wrong_sign)), {}),
    "the population std": (replace(GRPO_KL, advantage=PopulationStd()), {}),
    "the token mean": (replace(GRPO_KL, reduce=step_mean), {}),
    "padding counted": (replace(GRPO_KL, reduce=counts_padding), {}),
    "the temperature dropped": (GRPO_KL, {"temperature": 1.0}),
    "the end token masked": (GRPO_KL, {"holes": lambda row, t: t == LENGTHS[row // G][row % G] - 1 < LIMIT - 1}),
    "no upper clip": (replace(GRPO_KL, loss=WithKL(PPOClip(0.2, 9.0), 0.5)), {}),
}


@pytest.fixture(scope="module")
def standard(tiny) -> Measured:
    return trl(tiny, **METHODS["grpo, KL"][1])


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_bug_is_seen(tiny, standard, name):
    method, changes = MUTANTS[name]
    assert apart(ours(tiny, method, **changes), standard)[1] > 100 * TOLERANCE
