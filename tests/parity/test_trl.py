"""The same model and the same batch give the same loss and gradient here as in TRL's own trainers.

TRL does everything itself: its rollout hook returns the fixed completions, its `_generate_and_score_completions` computes
advantages, old and reference log-probs and counts under the weights that sampled; then its model gets the weights that learn
(so that ratios differ from 1 and clipping acts), and its `_compute_loss` gives the loss. gruppo runs the recipe's stages.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path as Folder

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl", reason="parity needs the extra: pip install 'gruppo[parity]'")

from datasets import Dataset
from tests.parity.tiny import (
    LENGTHS,
    LIMIT,
    PROMPTS,
    REWARDS,
    TEMPERATURE,
    Measured,
    Tiny,
    apart,
    build,
    gradient,
    load,
    ours,
    put,
)
from tests.tiny import tiny_tokenizer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from gruppo.core.advantage import leave_one_out, spread
from gruppo.core.collate import Passes
from gruppo.core.correct import Corrected, Masked, Truncated, path_gap
from gruppo.core.kl import WithKL, k3, with_kl
from gruppo.core.ratio import path_ratio, step_ratio, unit_ratio
from gruppo.core.reduce import Constant, sequence_mean, step_mean
from gruppo.core.surrogate import PPOClip, WeightClip
from gruppo.policies.reference import initial
from gruppo.policies.token import TokenPolicy
from gruppo.recipe import Recipe
from gruppo.recipes.grpo import GroupNorm, grpo
from gruppo.train import iterate
from gruppo.types import Batch, Group, Loss, Path, Scope, Steps, Task

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*rollout_func.*experimental:UserWarning"),
]

G = len(LENGTHS[0])
FLAT = [r for group in REWARDS for r in group]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return build(tmp_path_factory.mktemp("qwen3"))


def config(folder: Folder, **settings) -> GRPOConfig:
    """TRL's settings with everything that is not the method switched off."""
    quiet = {"use_cpu": True, "bf16": False, "report_to": "none", "activation_checkpointing": False, "disable_tqdm": True}
    size = {"per_device_train_batch_size": len(FLAT), "num_generations": G, "max_completion_length": LIMIT}
    # Two passes over each batch: only then does TRL read the old log-probs under the weights that sampled.
    size |= {"num_iterations": 2, "temperature": TEMPERATURE, "shuffle_dataset": False}
    return GRPOConfig(output_dir=str(folder / "trl"), **{**quiet, **size, "save_strategy": "no", **settings})


def rows() -> list[dict[str, str]]:
    return [{"prompt": p} for p in PROMPTS for _ in range(G)]


def fixed(tiny: Tiny, gap: list[list[float]] | None = None, mask: list[list[int]] | None = None):
    """TRL's rollout hook, returning the fixed completions; `gap` is how far its log-probs are from the trainer's."""
    tokens = [c for group in tiny.completions for c in group]

    def rollout(prompts: list[str], trainer: GRPOTrainer) -> dict:
        assert prompts == [r["prompt"] for r in rows()]
        ids = [trainer.processing_class(p)["input_ids"] for p in prompts]
        logps = [[0.0] * len(c) for c in tokens]
        if gap is not None:
            logps = [(a - torch.tensor(b)).tolist() for a, b in zip(sampled(tiny), gap)]
        return {"prompt_ids": ids, "completion_ids": tokens, "logprobs": logps, **({"env_mask": mask} if mask else {})}

    return rollout


def sampled(tiny: Tiny) -> list[Tensor]:
    """The log-probs of the fixed completions under the sampling weights: a third reading, row by row, nothing padded."""
    model = load(tiny)
    put(model, tiny.old)
    out, tok = [], tiny_tokenizer()
    for prompt, group in zip(PROMPTS, tiny.completions):
        head = tok(prompt)["input_ids"]
        for c in group:
            with torch.no_grad():
                logits = model(torch.tensor([head + c])).logits[0, len(head) - 1 : -1]
            out.append((logits / TEMPERATURE).log_softmax(-1).gather(1, torch.tensor(c)[:, None])[:, 0])
    return out


def theirs(tiny: Tiny, *, rewards=FLAT, gap=None, vllm: str | None = None, mask=None, parts: int = 1, **settings) -> Measured:
    """Loss and gradient by TRL, in `parts` gradient-accumulation steps."""
    args = config(tiny.folder, **settings)

    def reward(completions, **_):
        return list(rewards)

    data = Dataset.from_dict({"prompt": PROMPTS})
    trainer = GRPOTrainer(
        str(tiny.folder), reward, args, data, processing_class=tiny_tokenizer(), rollout_func=fixed(tiny, gap, mask)
    )
    trainer.current_gradient_accumulation_steps = parts
    trainer.model.train()
    put(trainer.model, tiny.old)
    if vllm is not None:  # the sampler is another program: TRL then compares its log-probs with the trainer's
        trainer.use_vllm, trainer.vllm_importance_sampling_mode = True, vllm
        trainer._last_loaded_step = trainer.state.global_step
    inputs = trainer._generate_and_score_completions(rows())
    put(trainer.model, tiny.now)
    total, size = 0.0, len(FLAT) // parts
    for at in range(0, len(FLAT), size):
        some = {k: v[at : at + size] if isinstance(v, Tensor) and v.dim() else v for k, v in inputs.items()}
        loss = trainer._compute_loss(trainer.model, some)
        loss.backward()
        total += loss.item()
    metrics = {k: v[-1] for k, v in trainer._metrics["train"].items()}
    return Measured(total, gradient(trainer.model), metrics)


def agree(a: Measured, b: Measured) -> None:
    loss, grad = apart(a, b)
    assert loss < TOLERANCE, f"the losses {a.loss} and {b.loss} differ by {loss:.1e}"
    assert grad < TOLERANCE, f"the gradients differ by {grad:.1e} of their norm"


@dataclass(frozen=True)
class Centred:
    """r - mean: TRL's scale_rewards="none"."""

    def __call__(self, group: Group) -> Tensor:
        assert group.reward is not None
        return spread(group.reward - group.reward.mean(), group)


def made(loss: Loss, reduce, advantage=None, beta: float = 0.0) -> Recipe:
    return replace(
        grpo(n=G, beta=beta),
        advantage=advantage or GroupNorm(ddof=1, eps=1e-4),
        loss=with_kl(loss, beta),
        reduce=reduce,
    )


PPO = PPOClip(0.2, 0.2)
CASES = {
    "grpo": (made(PPO, sequence_mean), {"loss_type": "grpo"}),
    "clip-higher": (made(PPOClip(0.2, 0.28), sequence_mean), {"loss_type": "grpo", "epsilon_high": 0.28}),
    "delta": (made(PPOClip(0.2, 0.2, cap=1.3), sequence_mean), {"loss_type": "grpo", "delta": 1.3}),
    "dr_grpo": (made(PPO, Constant(LIMIT), Centred()), {"loss_type": "dr_grpo", "scale_rewards": "none"}),
    "dapo": (made(PPOClip(0.2, 0.28), step_mean), {"loss_type": "dapo", "epsilon_high": 0.28}),
    "bnpo": (made(PPO, step_mean), {"loss_type": "bnpo"}),
    "gspo": (
        made(PPOClip(0.03, 0.04, ratio=unit_ratio), sequence_mean),
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.03, "epsilon_high": 0.04},
    ),
    "cispo": (made(WeightClip(0.0, 1.1), step_mean), {"loss_type": "cispo", "epsilon_high": 1.1}),
}


@pytest.mark.parametrize("name", CASES)
def test_same_loss_and_gradient_as_trl(tiny, name):
    recipe, settings = CASES[name]
    agree(ours(tiny, recipe), theirs(tiny, **settings))
