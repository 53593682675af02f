"""SEED-GRPO's claim at toy scale: prompts on which the policy has no idea move it less, those it can learn from as much as ever.

Eight prompts with eight arms each, one softmax policy per prompt. On four *clean* prompts arm 0 is right and favoured from the
start; on four *noise* prompts the policy is uniform and a coin decides what is right, so every move is a random walk. Measured
are the divergence of the noise prompts from where they began, and the probability of the right arm on the clean ones. At the
published alpha the factor stays above 0.96 and nothing can be told apart here: that column is shown, not judged.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gruppo.claims.claim import Claim
from gruppo.core.advantage import centred
from gruppo.recipes.seed_grpo import Seed

CLEAN, NOISE, ARMS, HEAD_START = 4, 4, 8, 2.0


def fresh() -> Tensor:
    """Logits [prompts, arms]: the clean prompts first."""
    logits = torch.zeros(CLEAN + NOISE, ARMS)
    logits[:CLEAN, 0] = HEAD_START
    return logits


def train(alpha: float, seed: int, *, steps: int = 200, n: int = 16, rate: float = 0.3) -> Tensor:
    """The logits after `steps` exact policy-gradient steps with the recipe's own factor on Dr.GRPO's advantage."""
    rng = torch.Generator().manual_seed(seed)
    weigh = Seed(alpha)
    logits = fresh()
    for _ in range(steps):
        logp = logits.log_softmax(1)
        arms = torch.multinomial(logp.exp(), n, replacement=True, generator=rng)
        coins = torch.randint(2, arms.shape, generator=rng)
        reward = torch.where(torch.arange(CLEAN + NOISE)[:, None] < CLEAN, arms == 0, coins == 1).float()
        for i, (arm, r) in enumerate(zip(arms, reward)):
            A = centred(r) * weigh.of(arm, logp[i, arm])
            gradient = torch.zeros(ARMS).index_add(0, arm, A) - A.sum() * logp[i].exp()
            logits[i] += rate * gradient / n
    return logits


def drift(logits: Tensor) -> float:
    """Mean KL of the noise prompts' policies from the uniform one they began with."""
    logp = logits[CLEAN:].log_softmax(1)
    return float((logp.exp() * (logp - fresh()[CLEAN:].log_softmax(1))).sum(1).mean())


def right(logits: Tensor) -> float:
    """Mean probability of the right arm on the clean prompts."""
    return float(logits[:CLEAN].softmax(1)[:, 0].mean())


def claim(seeds: int = 5) -> Claim:
    """The drift on noise prompts at alpha 1, as a share of Dr.GRPO's with the same draws."""
    rows = []
    for seed in range(seeds):
        done = {name: train(float(name), seed) for name in ("0", "0.0417", "1", "4")}
        row = {f"drift {name}": drift(logits) for name, logits in done.items()}
        row |= {f"P(right) {name}": right(logits) for name, logits in done.items()}
        rows.append({**row, "drift ratio": row["drift 1"] / row["drift 0"]})
    return Claim(
        name="seed-grpo",
        sentence="an update scaled down by semantic entropy moves the policy less where it is unsure",
        measured="KL from the start on prompts with random rewards after 200 steps, alpha 1 over alpha 0",
        figure="drift ratio",
        rows=tuple(rows),
        expected=(0.0, 0.5),
    )
