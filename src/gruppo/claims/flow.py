"""Claims of Flow-GRPO, DanceGRPO and MixGRPO at toy scale, on numbers from a flow of known velocity (`gruppo.claims.mixture`)."""

from __future__ import annotations

from gruppo.claims.claim import Claim
from gruppo.claims.mixture import gradients, trained
from gruppo.recipe import Recipe
from gruppo.recipes.dance_grpo import dance_grpo
from gruppo.recipes.flow_grpo import flow_grpo
from gruppo.recipes.mix_grpo import mix_grpo

PROMPTS, STEPS = 100, 10
UP = float("inf")


def noise(seeds: int = 5) -> Claim:
    """Reward after training one shared bias with noise of strength .7, minus the same with .1."""
    rows = []
    for seed in range(seeds):
        row = {
            f"eta {eta}": trained(flow_grpo(8, eta, beta=0.0), seed, steps=STEPS, iterations=30, prompts=4, rate=0.02)
            for eta in (0.1, 0.3, 0.7)
        }
        rows.append({**row, "gain": row["eta 0.7"] - row["eta 0.1"]})
    return Claim(
        name="flow-grpo",
        sentence="noise of strength .7 explores enough to learn, noise of .1 hardly",
        measured="reward after 30 iterations of Adam on one bias shared by all steps, eta .7 minus eta .1, n 8",
        figure="gain",
        rows=tuple(rows),
        expected=(0.0, UP),
    )


def one_noise(seeds: int = 5) -> Claim:
    """Signal-to-noise of the steps' gradients, one first noise per prompt over a noise of its own for every path."""

    def made(shared: bool) -> Recipe:
        return dance_grpo(12, tau=1.0, updates=1, shared_noise=shared)

    rows = []
    for seed in range(seeds):
        own, one = (gradients(made(s), seed, prompts=PROMPTS, steps=16).ratio().mean() for s in (False, True))
        rows.append({"own noise": float(own), "one noise": float(one), "ratio": float(one / own)})
    return Claim(
        name="dance-grpo",
        sentence="paths that begin at one noise differ only by what was done on the way, so their comparison says more",
        measured=f"|mean| / std over {PROMPTS} prompts of each step's gradient, mean over 15 steps, eta .3, n 12",
        figure="ratio",
        rows=tuple(rows),
        expected=(1.5, UP),
    )


def window(seeds: int = 5) -> Claim:
    """Signal-to-noise of the first four steps' gradients, noise only there over noise at all but the last step."""
    rows = []
    for seed in range(seeds):
        every = gradients(flow_grpo(24, beta=0.0), seed, prompts=PROMPTS, steps=STEPS).ratio()[:4]
        few = gradients(mix_grpo(24, window=4, updates=1, shared_noise=False), seed, prompts=PROMPTS, steps=STEPS).ratio()
        rows.append(
            {"everywhere": float(every.mean()), "window": float(few.mean()), "smallest ratio": float((few / every).min())}
        )
    return Claim(
        name="mix-grpo",
        sentence="noise outside the window only blurs what the window's steps are told",
        measured=f"|mean| / std over {PROMPTS} prompts of the gradients of steps 0 to 3, n 24, equal network calls",
        figure="smallest ratio",
        rows=tuple(rows),
        expected=(1.25, UP),
    )


def third(seeds: int = 5) -> Claim:
    """Reward after training with a window of 3 of 9 steps, minus Flow-GRPO's, which trains three times as many."""
    rows = []
    for seed in range(seeds):
        mix = mix_grpo(8, window=3, tau=6, updates=1, shared_noise=False, spare=1)
        row = {
            name: trained(made, seed, steps=STEPS, iterations=36, prompts=4, rate=0.02)
            for name, made in (("flow", flow_grpo(8, beta=0.0)), ("mix", mix))
        }
        rows.append({**row, "gain": row["mix"] - row["flow"]})
    return Claim(
        name="mix-grpo/third",
        sentence="a moving window of a third of the steps learns as much as all of them",
        measured="reward after 36 iterations of Adam on one bias shared by all steps, window of 3 moving every 6, n 8",
        figure="gain",
        rows=tuple(rows),
        expected=(-0.15, UP),
    )
