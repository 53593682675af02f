"""The loop: tasks to groups to rewards to advantages to one weighted sum. It does not know which method it runs.

`iterate` is one iteration, `accumulate` one optimizer step's backward, `fit` many iterations as a generator: whoever drives
it saves, evaluates, shows and stops between two of them, so there are no callbacks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from gruppo.core.collate import NotFinite, collate, drop_abstained
from gruppo.core.reduce import weigh
from gruppo.recipe import Recipe
from gruppo.types import Batch, Grade, Group, GruppoError, Policy, Reference, reads_reference


@dataclass
class Iteration:
    """What one iteration did: the groups it sampled and the weighted means of the loss's statistics."""

    groups: list[Group]  # with reward and advantage, after `across`
    stats: dict[str, float]
    updates: int  # optimizer steps taken, skipped ones left out; 0 when there was nothing to learn from


def iterate(
    policy: Policy,
    tasks,
    grade: Grade,
    recipe: Recipe,
    optimizer: torch.optim.Optimizer,
    rng: torch.Generator,
    *,
    ref: Reference | None = None,
    budget: int = 8192,
    max_grad_norm: float = 1.0,
    skip_grad_norm: float | None = None,
) -> Iteration:
    """Sample, reward, compare, and step the optimizer where the recipe's cadence says.

    A gradient whose norm, before it is clipped, reaches `skip_grad_norm` changes nothing: that step is left out.
    """
    groups = recipe.rollout(policy, tasks, grade, rng)
    groups = [g.with_(reward=recipe.reward(g)) for g in groups]
    groups = [drop_abstained(g) for g in groups]
    groups = [g.with_(advantage=recipe.advantage(g)) for g in groups]
    groups = recipe.across(groups)
    if all(not p.mask.any() for g in groups for p in g.paths):
        raise GruppoError(
            f"no step of the {sum(map(len, groups))} paths of this iteration can be trained: every reward abstained, "
            "or every path is masked (all truncated?)"
        )
    totals: list[dict[str, float]] = []
    for batch in recipe.cadence(collate(groups)):
        optimizer.zero_grad(set_to_none=True)
        stats = accumulate(policy, weigh(batch, recipe.reduce), recipe, ref=ref, budget=budget)
        norm = float(torch.nn.utils.clip_grad_norm_(policy.parameters(), max_grad_norm))
        if not (math.isfinite(norm) and math.isfinite(stats["loss"])):
            raise NotFinite(f"the loss is {stats['loss']} and its gradient norm {norm}; no optimizer step was taken", groups)
        if skip_grad_norm is None:
            optimizer.step()
        else:
            stats["skipped"] = float(norm >= skip_grad_norm)
            if not stats["skipped"]:
                optimizer.step()
        totals.append({**stats, "grad_norm": norm})
    for memory in (*recipe.state, *(() if ref is None else (ref,))):
        memory.update(groups)
    mean = {name: sum(t[name] for t in totals) / len(totals) for name in totals[0]} if totals else {}
    if totals:  # before the first update the policy is the sampler: what differs then is numerics or a mistake
        mean["gap"] = totals[0]["gap"]
    return Iteration(groups, mean, updates=sum(not t.get("skipped") for t in totals))


def accumulate(policy: Policy, batch: Batch, recipe: Recipe, *, ref: Reference | None, budget: int) -> dict[str, float]:
    """Backward through the batch in blocks; any block size gives the same gradient."""
    total = {"loss": 0.0, "gap": 0.0}
    share = batch.weight.sum().clamp(min=1e-12)  # statistics are means whatever constant the weights sum to
    for part in policy.split(batch, recipe.loss.scope, budget):
        now = policy.evaluate(part)
        with torch.no_grad():
            fixed = None if ref is None or not reads_reference(recipe.loss) else ref.evaluate(part)
        loss, stats = recipe.loss(part, now, fixed)
        objective = (part.weight * loss).sum()
        objective.backward()
        total["loss"] += float(objective.detach())
        own = part.mask & ~part.off_policy[:, None]
        total["gap"] = max(total["gap"], float(((now.logp.detach() - part.logp_sampler).abs() * own).max()))
        for name, value in stats.items():
            total[name] = total.get(name, 0.0) + float((part.weight * value.detach()).sum() / share)
    return total


def fit(
    policy: Policy,
    draw: Callable[[], object],
    grade: Grade,
    recipe: Recipe,
    optimizer: torch.optim.Optimizer,
    rng: torch.Generator,
    *,
    start: int = 0,
    steps: int,
    rate: Callable[[int], float],
    ref: Reference | None = None,
    budget: int = 8192,
    max_grad_norm: float = 1.0,
    skip_grad_norm: float | None = None,
) -> Iterator[tuple[int, Iteration]]:
    """Iterations start+1 .. steps, one at a time. `draw` gives the next tasks, `rate(step)` the learning rate."""
    for step in range(start + 1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        done = iterate(
            policy,
            draw(),
            grade,
            recipe,
            optimizer,
            rng,
            ref=ref,
            budget=budget,
            max_grad_norm=max_grad_norm,
            skip_grad_norm=skip_grad_norm,
        )
        yield step, done
