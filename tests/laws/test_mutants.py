"""Planted faults: each breaks the law that is there to catch it. A law that no fault breaks proves nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from tests.laws import laws
from torch import Tensor

from gruppo.core.advantage import spread
from gruppo.core.kl import WithKL
from gruppo.policies.token import TokenPolicy
from gruppo.recipe import Recipe
from gruppo.recipes import recipe
from gruppo.recipes.golden import Alphabet, tiny_model, tiny_policy
from gruppo.types import Batch, Grade, Group, Path, Rollout, Scope, Steps

GRPO = recipe("grpo", n=8)
Make = Callable[..., TokenPolicy]


def policy_of(kind: type[TokenPolicy]) -> Make:
    """`tiny_policy` with another class."""

    def make(seed: int = 0, temperature: float = 1.0, **numbers: Any) -> TokenPolicy:
        return kind(tiny_model(seed), Alphabet(), temperature=temperature, max_new=8, **numbers)

    return make


# ---- faults in the policy


class DroppedTemperature(TokenPolicy):
    """Reads log-probabilities of the untempered distribution."""

    def evaluate(self, batch: Batch) -> Steps:
        kept, self.temperature = self.temperature, 1.0
        try:
            return super().evaluate(batch)
        finally:
            self.temperature = kept


class WithoutEnd(TokenPolicy):
    """Leaves the end token out of the mask."""

    def sample(self, *args: Any, **kw: Any) -> list[Path]:
        paths = super().sample(*args, **kw)
        for path in paths:
            if not path.truncated:
                path.mask[-1] = False
        return paths


class WithPrompt(TokenPolicy):
    """Trains the prompt's last token as if it had been sampled."""

    def sample(self, *args: Any, **kw: Any) -> list[Path]:
        def longer(p: Path) -> Path:
            steps = torch.cat([p.prompt[-1:], p.steps])
            logp = torch.cat([torch.zeros(1), p.logp])
            return replace(p, prompt=p.prompt[:-1], steps=steps, logp=logp, mask=torch.ones(len(steps), dtype=torch.bool))

        return [longer(p) for p in super().sample(*args, **kw)]


class SeesPadding(TokenPolicy):
    """Pads on the left without a mask, so that every row attends to the padding of its neighbours."""

    def _read(self, prompts: list[Tensor], steps: list[Tensor], where: Tensor) -> tuple[Tensor, Tensor | None]:
        width = max(len(p) + len(s) for p, s in zip(prompts, steps))
        filled = [torch.cat([torch.zeros(width - len(p) - len(s), dtype=torch.long), p]) for p, s in zip(prompts, steps)]
        return super()._read(filled, steps, where)


# ---- faults in the recipe


def backwards(logp: Tensor, logp_ref: Tensor) -> Tensor:
    d = logp_ref - logp
    return -(d.exp() - d - 1)


def praised(group: Group) -> Tensor:
    """The KL of the path added to its reward instead of taken from it."""
    ref = group.signals["logp_ref"]
    return group.signals["reward"] + torch.stack([0.03 * (p.logp - r).sum() for p, r in zip(group.paths, ref)])


@dataclass(frozen=True)
class PerBlock:
    """Divides by the steps of whatever block it is given."""

    loss: Any
    scope: Scope = "path"

    def __call__(self, batch: Batch, now: Steps, ref: Steps | None) -> tuple[Tensor, dict[str, Tensor]]:
        loss, stats = self.loss(batch, now, ref)
        return loss / batch.mask.sum(), stats


@dataclass(frozen=True)
class OffByOne:
    """Cuts the sampled paths into groups one path too late."""

    inner: Rollout

    def __call__(self, policy: Any, tasks: Any, grade: Grade, rng: torch.Generator) -> list[Group]:
        groups = self.inner(policy, tasks, grade, rng)
        sizes = [len(g) for g in groups]
        paths = [p for g in groups for p in g.paths]
        paths = paths[1:] + paths[:1]
        return grade([Group(g.task, [paths.pop(0) for _ in range(n)]) for g, n in zip(groups, sizes)])


def over_steps(group: Group) -> Tensor:
    """Standardised along the steps of each path, where every step has the same reward."""
    value = spread(group.reward, group)
    return (value - value.mean(1, keepdim=True)) / (value.std(1, keepdim=True) + 1e-4)


def population(group: Group) -> Tensor:
    """The population std where the sample std belongs."""
    r = group.reward
    return spread((r - r.mean()) / (r.std(correction=0) + 1e-4), group)


def raw(group: Group) -> Tensor:
    """No baseline."""
    return spread(group.reward.nan_to_num(), group)


def against_first(group: Group) -> Tensor:
    """The first path as baseline, whoever it is."""
    return spread((group.reward - group.reward[0]).nan_to_num(), group)


def bare_std(group: Group) -> Tensor:
    """A sample std without a rule for one value: 0 / 0."""
    r = group.reward
    std = ((r - r.mean()).square().sum() / (len(r) - 1)).sqrt()
    return spread((r - r.mean()) / (std + 1e-4), group)


def zero_for_silence(group: Group) -> Tensor:
    """An abstained grade counted as a wrong answer."""
    return group.signals["reward"].nan_to_num(nan=0.0)


def local_sum(batch: Batch) -> tuple[Tensor, Tensor]:
    """Weights that sum to the number of paths."""
    return batch.mask / batch.mask.sum(1, keepdim=True).clamp(min=1), torch.ones(())


def unmasked_mean(batch: Batch, logp: Tensor) -> Tensor:
    """A path's ratio over all of its row, masked steps and padding included."""
    return (logp - batch.logp_old).mean(1, keepdim=True).exp().expand_as(logp)


def padded_mean(batch: Batch) -> tuple[Tensor, Tensor]:
    """A mean over the batch's width instead of over the trained steps."""
    return batch.mask.float(), torch.tensor(float(batch.mask.numel()))


@dataclass(frozen=True)
class SharedPrefix:
    """Lets every path fork after the first one's first step, and trains that step in all of them."""

    inner: Rollout

    def __call__(self, policy: Any, tasks: Any, grade: Grade, rng: torch.Generator) -> list[Group]:
        def forked(g: Group) -> Group:
            return g.with_(paths=[replace(p, fork=(0, 1)) if i else p for i, p in enumerate(g.paths)])

        return [forked(g) for g in self.inner(policy, tasks, grade, rng)]


@dataclass(eq=False)
class Counter:
    """A memory that changes the reward and is not saved."""

    seen: int = 0

    def update(self, groups: list[Group]) -> None:
        self.seen += 1

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = 0

    def __call__(self, group: Group) -> Tensor:
        return group.signals["reward"] * torch.arange(len(group)) ** self.seen


@dataclass(frozen=True)
class Mutant:
    law: str
    recipe: Recipe = GRPO
    make: Make = tiny_policy
    numbers: dict[str, Any] = field(default_factory=dict)


def forgetful() -> Recipe:
    memory = Counter()
    return replace(GRPO, reward=memory, state=(memory,))


inner = GRPO.loss.loss if isinstance(GRPO.loss, WithKL) else GRPO.loss
MUTANTS = {
    "dropped temperature": Mutant("agree", make=policy_of(DroppedTemperature)),
    "KL sign": Mutant("pull", replace(GRPO, loss=WithKL(inner, 0.04, backwards))),
    "KL sign in the reward": Mutant("pull", replace(recipe("rloo", n=8), reward=praised)),
    "per-micro-batch normaliser": Mutant("micro", replace(GRPO, loss=PerBlock(GRPO.loss))),
    "group index off by one": Mutant("own", replace(GRPO, rollout=OffByOne(GRPO.rollout))),
    "std over the wrong axis": Mutant("paper", replace(GRPO, advantage=over_steps), numbers={"name": "grpo"}),
    "population std": Mutant("paper", replace(GRPO, advantage=population), numbers={"name": "grpo"}),
    "EOS excluded": Mutant("end", make=policy_of(WithoutEnd)),
    "prompt tokens in the loss": Mutant("agree", make=policy_of(WithPrompt)),
    "padding leaks into log-probs": Mutant("pad", make=policy_of(SeesPadding)),
    "mean over the padded width": Mutant("pad", replace(GRPO, reduce=padded_mean)),
    "weights sum to the number of paths": Mutant("weight", replace(GRPO, reduce=local_sum)),
    "no baseline": Mutant("flat", replace(GRPO, advantage=raw)),
    "ratio over masked steps": Mutant("masked", replace(GRPO, loss=replace(recipe("gspo").loss, ratio=unmasked_mean))),
    "the first path is the baseline": Mutant("order", replace(GRPO, advantage=against_first)),
    "std of one value": Mutant("singleton", replace(GRPO, advantage=bare_std)),
    "abstained = 0": Mutant("abstain", replace(GRPO, reward=zero_for_silence)),
    "a shared step trained twice": Mutant("once", replace(GRPO, rollout=SharedPrefix(GRPO.rollout))),
    "memory that is not saved": Mutant("resume", forgetful()),
}


@pytest.mark.parametrize("name", list(MUTANTS))
def test_fault_breaks_its_law(name: str) -> None:
    mutant = MUTANTS[name]
    with pytest.raises(AssertionError):
        laws.LAWS[mutant.law](mutant.recipe, mutant.make, **mutant.numbers)


@pytest.mark.parametrize("law", sorted({m.law for m in MUTANTS.values()}))
def test_the_sound_recipe_keeps_that_law(law: str) -> None:
    laws.LAWS[law](GRPO, policy_of(TokenPolicy), **({"name": "grpo"} if law == "paper" else {}))


def test_every_law_has_a_fault() -> None:
    assert {m.law for m in MUTANTS.values()} == set(laws.LAWS)
