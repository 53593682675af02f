"""What `doctor` measures on a model that paints: the grid, the law of its noisy steps, and what sampler and trainer say of them.

The steps' law is measured without the network: for data N(1, .5^2) the right prediction is known and every kernel's step is
linear in the latent, so mean and deviation at the picture follow exactly from the grid and the kernel's numbers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from gruppo.core.collate import collate
from gruppo.policies.flow import Course, FlowPolicy
from gruppo.policies.kernels import Kernel
from gruppo.recipe import Recipe
from gruppo.recipes.flow_grpo import flow_grpo
from gruppo.runs import doctor as text
from gruppo.runs.doctor import Check, Report, limited
from gruppo.runs.measure import pictures
from gruppo.types import Batch, Group, Path, Task

PROMPTS = ("a red cube on a wooden table", "two dogs in the snow, seen from above")
PER_PROMPT = 2  # paths; they begin at one noise, so that their first steps share a call
AT_THE_END = 0.05  # the lowest level at which a network that predicts epsilon may end (DDIM's is .03)
WIDER = 1.5  # times the data's deviation, or the ODE's where that is larger: noise whose drift is missing gives twice
MEAN, SPREAD = 1.0, 0.5  # of the data whose law is followed


def doctor_flow(
    policy: FlowPolicy,
    recipe: Recipe | None = None,
    planned: Mapping[str, Any] | None = None,
    *,
    prompts: Sequence[Any] | None = None,
    rng: torch.Generator | None = None,
) -> Report:
    """Measure every invariant of an image model; weights, gradients and counts are left as they were found.

    `recipe` lends its kernel, loss and reduction (Flow-GRPO without KL by default), `planned["fit"]` its token budget.
    """
    rng = torch.Generator().manual_seed(0) if rng is None else rng
    recipe = flow_grpo(beta=0.0) if recipe is None else recipe
    budget = int((planned or {}).get("fit", {}).get("token_budget", 10**9))
    kernel = policy.fitting(getattr(recipe.rollout, "kernel", None) or policy.kernel)
    prompts = list(prompts or PROMPTS)[:2]
    checks = [schedule(policy), law(policy, kernel)]
    if any(c.verdict == "fail" for c in checks):  # latents of such a walk are no measure of anything
        return Report(checks, {}, versions())
    with _untouched(policy):
        began = time.perf_counter()
        paths = drawn(policy, kernel, prompts, rng)
        sampling = len(paths) * policy.steps / (time.perf_counter() - began)
        checks += [guidance(policy), decoded(paths)]
        if checks[-1].verdict == "fail":
            return Report(checks, {}, versions())
        batch = _batch(paths, rng)
        checks += [
            repeatable(policy, paths),
            agreement(policy, paths),
            company(policy, paths),
            ratio(policy, batch, recipe, budget),
            blocks(policy, batch, recipe, budget),
            text.masked(policy, batch, recipe, rng, budget=budget),
            together(policy, batch, recipe),
        ]
        began = time.perf_counter()
        text.gradient(policy, batch, recipe, budget)
        training = int(batch.mask.sum()) / (time.perf_counter() - began)
    says = f"about {sampling:.1f} denoising steps/s sampled and {training:.1f} trained, {len(paths)} paths together"
    checks.append(Check("speed", "note", f"{says}; memory is not estimated for image models", training))
    return Report(checks, {}, versions())


# -- the checks -------------------------------------------------------------------------------------------------------


def schedule(policy: FlowPolicy) -> Check:
    """The grids of training and evaluation fall from noise to picture."""
    least = AT_THE_END if policy.epsilon else 0.0
    for steps in dict.fromkeys((policy.steps, policy.eval_steps)):
        S = policy.painter.sigmas(steps)
        broken = None
        if len(S) != steps + 1 or not bool(S.isfinite().all()):
            broken = f"has {len(S)} levels, {int((~S.isfinite()).sum())} of them not finite, instead of {steps + 1}"
        elif not bool((S[1:] < S[:-1]).all()):
            t = int((S[1:] >= S[:-1]).nonzero()[0])
            broken = f"does not fall at step {t}, from {float(S[t]):.6g} to {float(S[t + 1]):.6g}"
        elif not float(S[0]) <= 1 + 1e-6:
            broken = f"begins at {float(S[0]):.6g}, above pure noise (1)"
        elif not 0 <= float(S[-1]) <= least:
            broken = f"ends at {float(S[-1]):.6g}, so noise would be left on every picture"
        if broken is not None:
            return Check("schedule", "fail", f"the grid of {steps} steps {broken}", float(S[-1]) if len(S) else None, least)
    S = policy.sigmas
    sentence = f"the grid falls from {float(S[0]):.6g} to {float(S[-1]):.4g} in {policy.steps} steps"
    more = "" if policy.eval_steps == policy.steps else f", and in {policy.eval_steps} when evaluated"
    return Check("schedule", "ok", f"{sentence}{more}; the last step goes from {float(S[-2]):.4g}", float(S[-1]), least)


def law(policy: FlowPolicy, kernel: Kernel) -> Check:
    """Noise on every step leaves pictures of about the spread that the steps without noise leave."""
    name, S = type(kernel).__name__, policy.sigmas.double()
    course = Course.of(None, S, kernel)
    sd = course.deviations
    if not bool(sd.isfinite().all()) or not bool((sd[:-1] > 0).all()):
        t = int((~(sd.isfinite() & (sd > 0))).nonzero()[0])
        return Check(
            "noise", "fail", f"{name} gives step {t} the deviation {float(sd[t])}: it has no log-probability", float(sd[t])
        )
    spread = [ending(kernel, S, level, policy.epsilon) for level in (course.levels, torch.zeros_like(course.levels))]
    limit = WIDER * max(SPREAD, spread[1])
    told = f"data of deviation {SPREAD} come out with {spread[0]:.3g} under {name} and {spread[1]:.3g} without noise"
    broken = f"{told}: the noise of the steps (largest deviation {float(sd.max()):.3g}) is not taken back on this grid"
    return limited(
        "noise", spread[0], limit, f"{told}; deviations {float(sd.max()):.3g} to {float(sd[sd > 0].min()):.3g}", broken
    )


def ending(kernel: Kernel, S: Tensor, levels: Tensor, epsilon: bool) -> float:
    """The deviation of data N(1, .5^2) at the end of the grid, under the exact prediction."""
    variance = torch.ones(())
    for t in range(len(S) - 1):
        a, b, level = S[t : t + 1], S[t + 1 : t + 2], levels[t : t + 1]
        x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        both = [u.expand(2) for u in (a, b, level)]
        mean = kernel.mean(x, exact(x, float(a), epsilon), *both)
        slope = float(mean[1] - mean[0])
        variance = slope**2 * variance + float(kernel.deviation(a, b, level)) ** 2
    return math.sqrt(float(variance))


def exact(x: Tensor, sigma: float, epsilon: bool) -> Tensor:
    """What a network that knows N(1, .5^2) predicts: E[noise - picture | x], or E[noise | x]."""
    keep = math.sqrt(max(0.0, 1 - sigma**2)) if epsilon else 1 - sigma
    variance = keep**2 * SPREAD**2 + sigma**2
    noise = sigma / variance * (x - keep * MEAN)
    return noise if epsilon else noise - (MEAN + keep * SPREAD**2 / variance * (x - keep * MEAN))


def guidance(policy: FlowPolicy) -> Check:
    """Which prediction is sampled and trained."""
    if policy.cfg is None or policy.cfg.scale == 1:
        return Check("guidance", "note", "one call of the network per step, without classifier-free guidance")
    way = "into the conditional branch only" if policy.cfg.detach else "through both branches"
    return Check(
        "guidance", "note", f"classifier-free, scale {policy.cfg.scale:g}, gradient {way}: two calls per step", policy.cfg.scale
    )


def decoded(paths: list[Path]) -> Check:
    """Latents stay finite up to the picture, and every latent gives one."""
    bad = sum(int((~p.steps.isfinite()).sum()) for p in paths)
    if bad:
        t = min(int((~p.steps.isfinite()).flatten(1).any(1).nonzero()[0]) for p in paths if not p.steps.isfinite().all())
        return Check("latents", "fail", f"{bad} numbers of the latents are not finite, first behind step {t - 1}", bad)
    largest = max(float(p.steps[-1].abs().max()) for p in paths)
    shown = sum(bool(pictures(p.output)) for p in paths)
    return Check("latents", "ok", f"finite at all steps, at most {largest:.3g} at the end; {shown} of {len(paths)} gave pictures")


def repeatable(policy: FlowPolicy, paths: list[Path]) -> Check:
    """Reading the same steps twice gives the same numbers: no dropout, no noise."""
    one, two = policy.score(paths), policy.score(paths)
    worst = max(text.largest((a - b).abs()) for a, b in zip(one, two))
    limit = 1e-2 if text.low_precision(policy) else 1e-5
    return limited(
        "repeatable",
        worst,
        limit,
        f"reading the same steps twice differs by {worst:.1e}",
        f"reading the same steps twice gives log-probabilities that differ by up to {worst:.3g}: something in the network is "
        "random (dropout or noise), so ratios and gradients are noise too",
    )


def agreement(policy: FlowPolicy, paths: list[Path]) -> Check:
    """The sampler, all rows at once, and the trainer, path by path, give a step the same log-probability."""
    limit = 0.05 if text.low_precision(policy) else 1e-3
    worst = max(text.largest((p.logp - read).abs()) for p, read in zip(paths, policy.score(paths)))
    n = sum(int(p.prompt.stochastic.sum()) for p in paths)
    return limited(
        "sampler and trainer",
        worst,
        limit,
        f"log-probabilities agree within {worst:.1e} nats per latent element over {n} denoising steps",
        f"the sampler's and the trainer's log-probabilities of the same {n} steps differ by up to {worst:.3g} nats per latent "
        f"element (at most {limit} is rounding): prompt, noise level or guidance are not the same in both",
    )


def company(policy: FlowPolicy, paths: list[Path]) -> Check:
    """The network predicts the same for a latent alone as among others."""
    limit = 0.05 if text.low_precision(policy) else 1e-3
    t = len(paths[0]) // 2
    x = torch.stack([p.steps[t] for p in paths]).to(policy.device)
    sigma = paths[0].prompt.sigmas[t].float().expand(len(x)).to(policy.device)
    prompts, own = [p.prompt.prompt for p in paths], policy.rows
    found = []
    try:
        for policy.rows in (len(x), 1):
            with torch.no_grad():
                found.append(policy.velocity(x, sigma, prompts, counted="probed"))
    finally:
        policy.rows = own
    worst = float((found[0] - found[1]).norm() / found[1].norm().clamp(min=1e-12))
    worst = worst if math.isfinite(worst) else math.inf
    return limited(
        "company",
        worst,
        limit,
        f"a latent's prediction is the same alone and among {len(x)}, within {worst:.1e} of its length",
        f"a latent's prediction changes by {worst:.3g} of its length with the company it keeps in the batch (at most {limit} is "
        "rounding): rows are not independent in this network",
    )


def ratio(policy: FlowPolicy, batch: Batch, recipe: Recipe, budget: int) -> Check:
    """exp(logp - logp_old) is 1 as long as no update has happened, and nearer to 1 than the recipe clips."""
    limit = 0.05 if text.low_precision(policy) else 1e-3
    worst = 0.0
    for part in policy.split(batch, "path", budget):  # with gradient, as training reads
        worst = max(worst, text.largest(((policy.evaluate(part).logp.detach() - part.logp_old).exp() - 1).abs()[part.mask]))
    found = limited(
        "ratio",
        worst,
        limit,
        f"the ratio before the first update is 1 within {worst:.1e}",
        f"the ratio before the first update is off 1 by {worst:.3g} (at most {limit} is rounding): the trainer reads other "
        "probabilities than the sampler drew from",
    )
    loss = getattr(recipe.loss, "loss", recipe.loss)
    low = getattr(loss, "low", None)
    if found.verdict == "ok" and low is not None and worst > low / 2:
        return Check(
            "ratio",
            "warn",
            f"the ratio before the first update is off 1 by {worst:.1e}, which is rounding, but the recipe clips at {low:g}: "
            "much of what it clips would be noise; widen the range (recipe_args.clip) or use policy.dtype=float32",
            worst,
            low / 2,
        )
    return found


def blocks(policy: FlowPolicy, batch: Batch, recipe: Recipe, budget: int) -> Check:
    """The gradient of large blocks equals the sum over blocks of single calls."""
    limit = 0.1 if text.low_precision(policy) else 1e-3
    worst = text.difference(text.gradient(policy, batch, recipe, budget), text.gradient(policy, batch, recipe, 1))
    return limited(
        "micro-batch",
        worst,
        limit,
        f"the gradient is the same for any block size, within {worst:.1e} of its length",
        f"the gradient changes by {worst:.3g} of its length with the size of the micro-batch (at most {limit} is rounding): the "
        "loss or the network mixes rows",
    )


def together(policy: FlowPolicy, batch: Batch, recipe: Recipe) -> Check:
    """One call for steps that stand at the same latent gives the gradient of a call for each."""
    first = torch.zeros_like(batch.mask)
    first[:, 0] = True
    batch = batch.with_(mask=first & batch.mask)
    policy.counts.clear()
    shared = text.gradient(policy, batch, recipe, 10**9)
    calls, steps = policy.counts["forwards"], policy.counts["trained"]
    alone: list[Tensor] | None = None
    for i in range(len(batch)):
        # each row with the weight that it has in the whole, so that the parts add up
        share = text.gradient(policy, batch.rows([i]), replace(recipe, reduce=_Fixed(len(batch))), 10**9)
        alone = share if alone is None else [a + b for a, b in zip(alone, share)]
    limit = 0.1 if text.low_precision(policy) else 1e-3
    worst = text.difference(shared, alone or shared)
    return limited(
        "shared calls",
        worst,
        limit,
        f"{steps} steps at {calls} different latents took {calls} calls; the gradient is that of {steps} within {worst:.1e}",
        f"{steps} steps at {calls} different latents have another gradient when each gets a call of its own, by {worst:.3g} of "
        f"its length (at most {limit} is rounding): the network does not answer equal questions equally",
    )


# -- how they measure -------------------------------------------------------------------------------------------------


class _Fixed:
    """The mean over this many paths of one trained step each."""

    def __init__(self, paths: int) -> None:
        self.paths = paths

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return batch.mask.float(), torch.tensor(float(self.paths), device=batch.mask.device)


def drawn(policy: FlowPolicy, kernel: Kernel, prompts: Sequence[Any], rng: torch.Generator) -> list[Path]:
    """Paths with noise on every step; those of a prompt begin at one noise."""
    courses = [Course.of(p, policy.sigmas, kernel) for p in prompts for _ in range(PER_PROMPT)]
    x = policy.noise(len(prompts), rng).repeat_interleave(PER_PROMPT, 0)
    done = policy.walk(x, courses, 0, policy.steps, g=rng, means=True, counted="probed")
    assert done.mean is not None
    logp = done.logp.cpu()
    images = policy.decode(done.last) if bool(done.last.isfinite().all()) else [None] * len(x)
    return [Path(c, done.x[i], logp[i], c.stochastic, images[i], mean=done.mean[i]) for i, c in enumerate(courses)]


def _batch(paths: list[Path], rng: torch.Generator) -> Batch:
    """Trained at the first, a middle and the last noisy step, with random advantages."""
    few = []
    for path in paths:
        noisy = path.mask.nonzero()[:, 0].tolist()
        mask = torch.zeros_like(path.mask)
        mask[[noisy[0], noisy[len(noisy) // 2], noisy[-1]]] = True
        few.append(replace(path, mask=mask))
    groups = [Group(Task(None), few[i : i + PER_PROMPT]) for i in range(0, len(few), PER_PROMPT)]
    return collate([g.with_(advantage=torch.randn(len(g), g.width, generator=rng)) for g in groups])


@contextmanager
def _untouched(policy: FlowPolicy) -> Iterator[None]:
    """Gradients and counts come back as they were."""
    counts, grads = policy.counts.copy(), [p.grad for p in policy.parameters()]
    try:
        yield
    finally:
        policy.counts.clear()
        policy.counts.update(counts)
        for p, grad in zip(policy.parameters(), grads):
            p.grad = grad


def versions() -> dict[str, str]:
    """As for text models, and diffusers."""
    try:
        found = metadata.version("diffusers")
    except metadata.PackageNotFoundError:
        found = "not installed"
    return {**text.versions(), "diffusers": found}
