"""Stratified GRPO's claim at toy scale: one baseline for unlike rollouts keeps the policy away from the harder, better way.

A bandit with two strata. The easy one has 2 arms that pay 0.4 and 0.2 on average (a coin decides, 1 or 0), the hard one has 16
arms of which a single one pays 1. A softmax policy chooses the stratum, then the arm; it starts with the hard stratum in 27 % of
its paths. Early on the hard way pays 1/16, so the group's baseline turns the policy away from it before it has found the arm
that pays. Judged within its stratum, that arm is found wherever the hard way is taken at all. But advantages within strata sum
to zero over each stratum, so they alone never change how often it is taken: the blend is needed, and alpha decides. The paper's
own alpha of 0.6 does not leave the trap here; 0.8 leaves it for some seeds.

The gain that was expected beforehand is 0.2. Over 10 seeds it is 0.221 [0.0393, 0.402]: above 0, but not surely above 0.2, so
the claim does not hold. Half of the seeds stay in the trap.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gruppo.claims.claim import Claim
from gruppo.recipes.stratified_grpo import Stratified, calls

EASY, HARD = (0.4, 0.2), 16  # what the easy arms pay; how many hard arms there are, the last of which pays 1
START = -1.0  # logit of the hard stratum: 27 %


@dataclass
class Bandit:
    """A softmax policy over two strata and over the arms of each."""

    stratum: Tensor
    arms: tuple[Tensor, Tensor]

    @staticmethod
    def fresh() -> Bandit:
        return Bandit(torch.tensor([0.0, START]), (torch.zeros(len(EASY)), torch.zeros(HARD)))

    @property
    def hard(self) -> float:
        """The probability of the hard stratum."""
        return float(self.stratum.softmax(0)[1])

    @property
    def right(self) -> float:
        """The probability of the arm that pays, given the hard stratum."""
        return float(self.arms[1].softmax(0)[-1])

    @property
    def reward(self) -> float:
        """What the policy earns on average."""
        easy = float(self.arms[0].softmax(0) @ torch.tensor(EASY))
        return (1 - self.hard) * easy + self.hard * self.right

    def sample(self, n: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Stratum [n], arm [n] and reward [n] of n paths."""
        stratum = torch.multinomial(self.stratum.softmax(0), n, replacement=True, generator=rng)
        arm = torch.stack([torch.multinomial(a.softmax(0), n, replacement=True, generator=rng) for a in self.arms])
        arm = arm.gather(0, stratum[None])[0]
        pays = torch.where(stratum == 0, torch.tensor(EASY)[arm.clamp(max=1)], (arm == HARD - 1).float())
        return stratum, arm, torch.bernoulli(pays, generator=rng)

    def step(self, stratum: Tensor, arm: Tensor, advantage: Tensor, rate: float) -> None:
        """One step of the exact gradient of mean(A log pi)."""
        n = len(advantage)
        moves = [(self.stratum, stratum, advantage)]
        for k, logits in enumerate(self.arms):
            moves.append((logits, arm[stratum == k], advantage[stratum == k]))
        for logits, chosen, a in moves:
            gradient = torch.zeros_like(logits).index_add(0, chosen, a) - a.sum() * logits.softmax(0)
            logits += rate * gradient / n


def train(alpha: float, seed: int, *, steps: int = 600, groups: int = 4, n: int = 16, rate: float = 0.5) -> Bandit:
    """A bandit after `steps` updates of `groups` groups of n paths with the recipe's own advantage."""
    rng = torch.Generator().manual_seed(seed)
    blend = Stratified(alpha, calls, ddof=0, eps=1e-6).blend
    bandit = Bandit.fresh()
    for _ in range(steps):
        stratum, arm, reward = bandit.sample(groups * n, rng)
        advantage = torch.cat([blend(r, s) for r, s in zip(reward.split(n), stratum.split(n))])
        bandit.step(stratum, arm, advantage, rate)
    return bandit


def claim(seeds: int = 10) -> Claim:
    """Blended advantages earn more than the group's, and strata alone leave the choice of stratum where it was."""
    rows = []
    for seed in range(seeds):
        done = {name: train(alpha, seed) for name, alpha in {"group": 0.0, "0.6": 0.6, "0.8": 0.8, "strata": 1.0}.items()}
        row = {f"reward {name}": bandit.reward for name, bandit in done.items()}
        row |= {f"P(hard) {name}": bandit.hard for name, bandit in done.items()}
        rows.append({**row, "gain": row["reward 0.8"] - row["reward group"]})
    return Claim(
        name="stratified-grpo",
        sentence="advantages within strata, blended with the group's, earn more than one baseline for all rollouts",
        measured="reward of alpha 0.8 minus reward of alpha 0 after 600 steps, two-strata bandit",
        figure="gain",
        rows=tuple(rows),
        expected=(0.2, float("inf")),
    )
