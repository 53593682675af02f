"""One tiny model, three sets of weights and one fixed batch, built the same way for both libraries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path as Folder
from typing import Any

import torch
from tests.tiny import tiny_folder, tiny_model, tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

from gruppo.core.collate import collate, drop_abstained
from gruppo.core.reduce import weigh
from gruppo.policies.token import TokenPolicy
from gruppo.recipe import Recipe
from gruppo.train import accumulate
from gruppo.types import Group, Path, Task

EOS = 1
TEMPERATURE = 0.7
LIMIT = 9  # max_completion_length
PROMPTS = ["1+2=", "a", "what is b+c?"]  # of different lengths, so that left padding acts in TRL and right padding here
LENGTHS = [[3, 9, 1, 5], [2, 9, 4, 4], [7, 1, 6, 9]]  # 9 = cut by the limit, without an end token
REWARDS = [[1.0, 0.0, 0.25, -1.0], [0.5, 0.5, 2.0, 0.0], [0.0, 1.0, 1.0, 3.0]]
Holes = Callable[[int, int], bool]  # (row, step) -> not trained


@dataclass(frozen=True)
class Tiny:
    """A folder with the initial (reference) weights, and the weights that sampled and the weights that learn."""

    folder: Folder
    old: dict[str, Tensor]
    now: dict[str, Tensor]
    completions: list[list[list[int]]]  # [prompt][path] token ids


def build(folder: Folder) -> Tiny:
    """A random Qwen3 of 2 layers whose three sets of weights differ enough for ratios to leave the clip range."""
    tiny_folder(folder)
    model, g = tiny_model(), torch.Generator().manual_seed(7)

    def moved(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: v + 0.02 * torch.randn(v.shape, generator=g) for k, v in weights.items()}

    old = moved({k: p.detach() for k, p in model.named_parameters()})
    now = moved(old)
    completions = []
    for lengths in LENGTHS:
        rows = [torch.randint(5, model.config.vocab_size, (n,), generator=g).tolist() for n in lengths]
        completions.append([r if len(r) == LIMIT else [*r[:-1], EOS] for r in rows])
    return Tiny(folder, old, now, completions)


def load(tiny: Tiny) -> Any:
    """The initial model, in float32."""
    return AutoModelForCausalLM.from_pretrained(tiny.folder, dtype=torch.float32)


def put(model: torch.nn.Module, weights: dict[str, Tensor]) -> None:
    """Overwrite every parameter by name."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weights[name])


@dataclass(frozen=True)
class Measured:
    """The loss and the gradient by parameter name."""

    loss: float
    grad: dict[str, Tensor]
    stats: dict[str, float]


def gradient(model: torch.nn.Module) -> dict[str, Tensor]:
    """Copies of the gradients, without wrappers' name prefixes."""
    return {k: p.grad.detach().clone() for k, p in model.named_parameters() if p.grad is not None}


class Replay(TokenPolicy):
    """A policy whose sampler always returns the fixed completions, read under the weights of the moment."""

    def __init__(self, tiny: Tiny, *, holes: Holes, gap: list[list[float]] | None, temperature: float) -> None:
        super().__init__(load(tiny), tiny_tokenizer(), temperature=temperature, max_new=LIMIT)
        self.tiny, self.holes, self.gap = tiny, holes, gap

    def sample(self, prompts: Any, **_: Any) -> list[Path]:
        paths = []
        for row, (prompt, tokens) in enumerate(zip(prompts, [c for group in self.tiny.completions for c in group])):
            mask = torch.tensor([not self.holes(row, t) for t in range(len(tokens))])
            steps, cut = torch.tensor(tokens), tokens[-1] != EOS
            path = Path(self.encode(prompt), steps, torch.zeros(len(tokens)), mask, self.decode(steps), truncated=cut)
            logp = self.score([path])[0]
            paths.append(replace(path, logp=logp if self.gap is None else logp - torch.tensor(self.gap[row])))
        return paths


def graded(rewards: list[list[float]]) -> Callable[[list[Group]], list[Group]]:
    """Writes the fixed rewards as the graders would, and `correct` for the recipes that read it."""

    def grade(groups: list[Group]) -> list[Group]:
        signals = [{"reward": torch.tensor(r), "correct": (torch.tensor(r) > 0.3).float()} for r in rewards]
        return [g.with_(signals={**g.signals, **s}) for g, s in zip(groups, signals, strict=True)]

    return grade


def ours(
    tiny: Tiny,
    recipe: Recipe,
    *,
    rewards: list[list[float]] = REWARDS,
    holes: Holes = lambda row, t: False,
    gap: list[list[float]] | None = None,
    temperature: float = TEMPERATURE,
    budget: int = 30,
) -> Measured:
    """The recipe's own stages on the fixed batch: rollout, reward, advantage, across, reduce, loss, backward in small blocks."""
    policy = Replay(tiny, holes=holes, gap=gap, temperature=temperature)
    policy.reference = None if recipe.reference is None else recipe.reference(policy)
    put(policy.model, tiny.old)
    groups = recipe.rollout(policy, [Task(p) for p in PROMPTS], graded(rewards), torch.Generator())
    groups = [g.with_(reward=recipe.reward(g)) for g in groups]
    groups = [drop_abstained(g) for g in groups]
    groups = recipe.across([g.with_(advantage=recipe.advantage(g)) for g in groups])
    (batch,) = recipe.cadence(collate(groups))
    put(policy.model, tiny.now)
    stats = accumulate(policy, weigh(batch, recipe.reduce), recipe, ref=policy.reference, budget=budget)
    return Measured(stats["loss"], gradient(policy.model), stats)


def apart(a: Measured, b: Measured) -> tuple[float, float]:
    """The relative difference of the losses, and of the gradients taken as one vector."""
    assert a.grad.keys() == b.grad.keys()
    ga, gb = (torch.cat([m.grad[k].flatten() for k in sorted(m.grad)]).double() for m in (a, b))
    assert float(gb.norm()) > 1e-4, "a vanishing gradient would make any comparison pass"
    # terms near 1 cancel in a loss: a ten-millionth is their last place, whatever is left of them
    return abs(a.loss - b.loss) / max(abs(b.loss), 1e-2), float((ga - gb).norm() / gb.norm())
