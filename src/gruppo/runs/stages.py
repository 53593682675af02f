"""A run's stages: each has a recipe with the run's numbers in it, a grading, a stream of tasks and a learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from gruppo.core.collate import Passes
from gruppo.core.correct import Truncated
from gruppo.recipe import Recipe, whole
from gruppo.recipes import recipe
from gruppo.recipes.corrected import corrected
from gruppo.rollouts import Reread
from gruppo.rollouts.stale import stale
from gruppo.rollouts.stored import Stored, offline
from gruppo.runs.build import world_of
from gruppo.runs.config import RunConfig, arguments
from gruppo.runs.data import only_at, shuffled
from gruppo.runs.given import RECIPE_FILE, Given
from gruppo.runs.grading import by_signal, grading_of
from gruppo.runs.tasks import Tasks
from gruppo.types import Group, GruppoError, Task


@dataclass
class Stage:
    """A part of the run that has one recipe, one stream and one grading; it covers the steps begin+1 .. end."""

    config: RunConfig
    recipe: Recipe
    grade: Any
    at: Callable[[int], Task]
    begin: int
    end: int
    rate: Callable[[int], float]


def stages_of(config: RunConfig, given: Given, tasks: Tasks) -> list[Stage]:
    """The stages in their order; a recipe that goes on from one to the next keeps what it remembers."""
    out: list[Stage] = []
    begin = 0
    for n, end in enumerate(config.ends):
        own = config.at(n)
        grade = grading_of(own, given)
        before = out[-1] if out else None
        made = before.recipe if before is not None and goes_on(before, own, grade) else planned(own, given, grade, tasks, begin)
        rows, seed = tasks.training[n], own.fit.seed + n
        at = _world_stream(own, seed) if rows is None else shuffled(rows, seed)
        out.append(Stage(own, made, grade, at, begin, end, rate_of(own, begin)))
        begin = end
    return out


def goes_on(before: Stage, config: RunConfig, grade: Any) -> bool:
    """Whether a stage has the very recipe of the one before it."""
    then = before.config
    same = (config.recipe, config.recipe_args) == (then.recipe, then.recipe_args) and sampling(config) == sampling(then)
    return same and weight_of_correct(config, grade) == weight_of_correct(then, before.grade)


def planned(config: RunConfig, given: Given, grade: Any, tasks: Tasks, begin: int) -> Recipe:
    """The recipe as a stage runs it: with paths from an engine or a file, and sampled by older weights where that is asked."""
    made = recipe_of(config, given, weight_of_correct(config, grade))
    made = offline(made, stored_paths(config, tasks.stored)) if tasks.stored else for_engine(made, config)
    return stale(made, config.fit.sync_every, config.fit.sync_lag, begin)


def stored_paths(config: RunConfig, groups: list[Group]) -> Stored:
    """Stored groups as a rollout: their stored rewards, other weights of their stored signals, or new grades."""
    world = world_of(config)
    regrade = bool(config.rewards)
    weights = None if regrade else by_signal(config) or (None if world is None else dict(world.weights))
    stored = Stored(", ".join(config.offline), groups, weights, regrade)
    stored.check()
    return stored


def sampling(config: RunConfig) -> tuple[int, int, int]:
    """What a stage may change about sampling under the same recipe."""
    return config.fit.paths_per_prompt, config.fit.sync_every, config.fit.sync_lag


def recipe_of(config: RunConfig, given: Given, weight: float | None = None) -> Recipe:
    """The recipe with the run's numbers in it."""
    if given.recipe is not None:
        made = given.recipe
    else:
        numbers = dict(config.recipe_args)
        if "n" in arguments(config.recipe):
            numbers["n"] = config.fit.paths_per_prompt
        if weight is not None:
            numbers["weight"] = weight
        made = recipe(config.recipe, **numbers)
    if config.fit.epochs is None and config.fit.updates_per_epoch is None:
        return made
    if made.cadence is not whole and not isinstance(made.cadence, Passes):
        raise GruppoError(
            f"fit.epochs and fit.updates_per_epoch place the optimizer steps, but the recipe {config.recipe} does so itself "
            f"({made.cadence!r}); remove them"
        )
    passes = made.cadence if isinstance(made.cadence, Passes) else Passes()
    return replace(made, cadence=Passes(config.fit.epochs or passes.epochs, config.fit.updates_per_epoch or passes.parts))


def weight_of_correct(config: RunConfig, grade: Any) -> float | None:
    """What `correct` counts for in the run's reward, for a recipe that asks by a number `weight`; None where nothing says so."""
    if config.recipe == RECIPE_FILE or "weight" in config.recipe_args or "weight" not in arguments(config.recipe):
        return None
    return float(grade.weights.get("correct", 0.0)) if grade.weights else None


def for_engine(recipe: Recipe, config: RunConfig) -> Recipe:
    """The recipe as it must be where another program samples: every path read again by the trainer, the loss weighed."""
    engine = config.policy.engine
    if engine is None or isinstance(recipe.rollout, Reread):  # a recipe that reads again has its own correction
        return recipe
    if engine.correction is None:
        return replace(recipe, rollout=Reread(recipe.rollout))
    return corrected(recipe, Truncated(engine.correction))


def rate_of(config: RunConfig, begin: int) -> Callable[[int], float]:
    """Linear warm-up, then constant, or a cosine down to `decay_to` of the learning rate at the stage's last step."""
    own = config.fit

    def rate(step: int) -> float:
        k = step - begin
        if k <= own.warmup_steps:
            return own.learning_rate * k / own.warmup_steps
        if own.decay_to is None:
            return own.learning_rate
        past = (k - own.warmup_steps) / max(1, own.steps - own.warmup_steps)
        return own.learning_rate * (own.decay_to + (1 - own.decay_to) * 0.5 * (1 + math.cos(math.pi * min(1.0, past))))

    return rate


def _world_stream(config: RunConfig, seed: int) -> Callable[[int], Task]:
    world = world_of(config)
    return only_at(lambda i: world.task(seed, i), config.only)
