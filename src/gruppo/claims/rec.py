"""The claims of 2509.24203 on bandits whose data never changes: every path comes from one behaviour policy mu, however far the
policy has moved away from it.

Many bandits: 16 problems of 12 arms with rewards between 0 and 1, and 16 stored draws of 8 arms per problem from mu, where the
policy starts. The value of a policy is its mean reward, its drift the mean KL(pi || mu).

One bandit: three arms that pay 0, 0.8 and 1, and mu = (0.3, 0.6, 0.1). The slope mu (r - mean r) is (-0.174, 0.132, 0.042), so
REINFORCE on such data raises the second arm most, and the more it does the less it notices: it settles on the wrong one.

Losses and advantages are the recipes' own; nothing here repeats a formula of theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gruppo.claims.claim import Claim
from gruppo.core.collate import collate
from gruppo.core.reduce import weigh
from gruppo.recipe import Recipe
from gruppo.recipes.asymre import asymre
from gruppo.recipes.grpo import GroupNorm
from gruppo.recipes.opmd import kimi_opmd
from gruppo.recipes.rec import rec_oneside, rec_oneside_is, rec_reinforce
from gruppo.recipes.red import red_weight
from gruppo.types import Batch, Group, Path, Steps, Task

PROBLEMS, ARMS, K = 16, 12, 8
PAYS, MU = (0.0, 0.8, 1.0), (0.3, 0.6, 0.1)

METHODS: Mapping[str, Recipe] = {
    "none": rec_reinforce(K),
    "grpo": replace(rec_oneside_is(K), advantage=GroupNorm(ddof=0, eps=1e-6)),
    "is": rec_oneside_is(K),
    "nois": rec_oneside(K),
    "wide": rec_oneside(K, low=0.6, high=2.0),
    "opmd": kimi_opmd(K, c=0.1),
    "asymre": asymre(K, c=0.1),
    "weight": red_weight(K),
    "sharp": red_weight(K, T=0.1),
}


@dataclass
class Bandits:
    """Softmax policies over the arms of several problems, and what never changes: rewards and behaviour."""

    pays: Tensor  # [problems, arms]
    mu: Tensor  # log-probabilities [problems, arms]
    theta: Tensor  # logits [problems, arms]

    @staticmethod
    def many(rng: torch.Generator) -> Bandits:
        pays = torch.rand(PROBLEMS, ARMS, generator=rng)
        mu = torch.randn(PROBLEMS, ARMS, generator=rng).log_softmax(1)
        return Bandits(pays, mu, mu.clone())

    @staticmethod
    def one() -> Bandits:
        mu = torch.tensor([MU]).log()
        return Bandits(torch.tensor([PAYS]), mu, mu.clone())

    @property
    def policy(self) -> Tensor:
        return self.theta.softmax(1)

    @property
    def value(self) -> float:
        return float((self.policy * self.pays).sum(1).mean())

    @property
    def drift(self) -> float:
        return float((self.policy * (self.theta.log_softmax(1) - self.mu)).sum(1).mean())

    def stored(self, recipe: Recipe, arms: Tensor) -> Batch:
        """These arms [problems, n] as mu drew them, with the recipe's own advantages and weights: they never change again."""
        old, rewards = self.mu.gather(1, arms), self.pays.gather(1, arms)
        groups = []
        for k in range(len(arms)):
            paths = [Path(NOTHING, arm, logp, YES) for arm, logp in zip(arms[k, :, None], old[k, :, None])]
            group = Group(ASKED, paths, {"reward": rewards[k]})
            group = group.with_(reward=recipe.reward(group))
            groups.append(group.with_(advantage=recipe.advantage(group)))
        return weigh(collate(groups), recipe.reduce)

    def train(self, recipe: Recipe, buffer: Sequence[Tensor], steps: int, rate: float) -> Bandits:
        """Plain gradient descent on the stored draws in rotation, by the recipe's own loss."""
        batches = [self.stored(recipe, arms) for arms in buffer]
        for step in range(steps):
            arms, batch = buffer[step % len(buffer)], batches[step % len(buffer)]
            theta = self.theta.clone().requires_grad_()
            logp = theta.log_softmax(1).gather(1, arms).reshape(-1, 1)
            loss, _ = recipe.loss(batch, Steps(logp), None)
            # the mean over all paths becomes a mean per problem, so that the rate does not depend on how many there are
            [slope] = torch.autograd.grad((batch.weight * loss).sum() * len(arms), theta)
            self.theta = self.theta - rate * slope
        return self


NOTHING, YES, ASKED = torch.zeros(1, dtype=torch.long), torch.ones(1, dtype=torch.bool), Task("")


def trained(name: str, seed: int, *, steps: int = 400, rate: float = 0.5, draws: int = 16) -> Bandits:
    """The many bandits after `steps` steps on `draws` stored draws of K arms per problem, the same for every method."""
    rng = torch.Generator().manual_seed(seed)
    bandits = Bandits.many(rng)
    buffer = [torch.multinomial(bandits.mu.exp(), K, replacement=True, generator=rng) for _ in range(draws)]
    return bandits.train(METHODS[name], buffer, steps, rate)


def settled(recipe: Recipe, steps: int = 3000, rate: float = 0.5) -> Bandits:
    """The one bandit after `steps` steps on its data in exact proportion: three, six and one path of its arms."""
    return Bandits.one().train(recipe, [torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 2]])], steps, rate)


def measured(seeds: int, names: Sequence[str], figure: Callable[[Mapping[str, Bandits]], float]) -> tuple[dict[str, float], ...]:
    """One row per seed: value and drift of every method, and the figure."""
    rows = []
    for seed in range(seeds):
        done = {name: trained(name, seed) for name in names}
        row = {f"value {name}": bandits.value for name, bandits in done.items()}
        row |= {f"drift {name}": bandits.drift for name, bandits in done.items()}
        rows.append({**row, "figure": figure(done)})
    return tuple(rows)


def claim(seeds: int = 5) -> Claim:
    """With the mask, the importance weight changes nothing that matters."""
    return Claim(
        name="rec",
        sentence="GRPO's importance weight is not what makes it work on stale data: without it, the clipped loss does the same",
        measured="value of rec-oneside-is minus value of rec-oneside after 400 steps on stored draws, 16 bandits of 12 arms",
        figure="figure",
        rows=measured(seeds, ("is", "nois", "grpo"), lambda d: d["is"].value - d["nois"].value),
        expected=(-0.03, 0.03),
    )


def wider(seeds: int = 5) -> Claim:
    """A wider clip learns more from the same data."""
    return Claim(
        name="rec-wider",
        sentence="bounds of (0.6, 2.0) instead of (0.2, 0.2) make learning faster",
        measured="value of rec-oneside with (0.6, 2.0) minus value with (0.2, 0.2) after 400 steps on stored draws",
        figure="figure",
        rows=measured(seeds, ("nois", "wide"), lambda d: d["wide"].value - d["nois"].value),
        expected=(0.0, float("inf")),
    )


def held(seeds: int = 5) -> Claim:
    """The clip, and the pulls of OPMD and AsymRE, keep the policy near the data; without any of them it drifts furthest."""
    kept = ("nois", "opmd", "asymre")
    return Claim(
        name="rec-held",
        sentence="clipping is a regulariser, as are the terms of OPMD and AsymRE",
        measured="drift of rec-reinforce minus the largest of rec-oneside, kimi-opmd and asymre after 400 steps on stored draws",
        figure="figure",
        rows=measured(seeds, ("none", *kept), lambda d: d["none"].drift - max(d[name].drift for name in kept)),
        expected=(0.0, float("inf")),
    )


def collapse(seeds: int = 5) -> Claim:
    """Without the clip, what is earned collapses."""
    return Claim(
        name="rec-collapse",
        sentence="REINFORCE without clipping collapses on stale data, below the clipped one",
        measured="value of rec-reinforce minus value of rec-oneside after 400 steps on stored draws",
        figure="figure",
        rows=measured(seeds, ("none", "nois"), lambda d: d["none"].value - d["nois"].value),
        expected=(float("-inf"), 0.0),
    )


def weighted(seeds: int = 5) -> Claim:
    """Weighing better answers more earns more than REINFORCE."""
    return Claim(
        name="red-weight",
        sentence="RED-Weight earns more than REINFORCE on the same stale data",
        measured="value of red-weight (T 1) minus value of rec-reinforce after 400 steps on stored draws",
        figure="figure",
        rows=measured(seeds, ("none", "weight"), lambda d: d["weight"].value - d["none"].value),
        expected=(0.0, float("inf")),
    )


def sharpened(seeds: int = 5) -> Claim:
    """With a temperature below the spread of the rewards, weighing better answers more earns more than REINFORCE."""
    return Claim(
        name="red-weight-sharp",
        sentence="RED-Weight earns more than REINFORCE on the same stale data",
        measured="value of red-weight (T 0.1) minus value of rec-reinforce after 400 steps on stored draws",
        figure="figure",
        rows=measured(seeds, ("none", "sharp"), lambda d: d["sharp"].value - d["none"].value),
        expected=(0.0, float("inf")),
    )
