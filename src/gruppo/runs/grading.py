"""A run's grading: its graders, what each signal weighs, what evaluations report beside, and what went wrong so far."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gruppo.graders import build
from gruppo.graders.grade import Grading
from gruppo.runs.build import world_of
from gruppo.runs.config import RunConfig
from gruppo.runs.evaluate import Metric
from gruppo.runs.given import Given
from gruppo.types import GruppoError


def grading_of(config: RunConfig, given: Given) -> Any:
    """The graders of the run: the world's, the file's, or Python functions; weights where they are named."""
    world = world_of(config)
    rewards = list(given.rewards) if given.rewards is not None else list(config.rewards)
    weights = config.weights or None
    if world is None and config.offline and not rewards:
        return Grading([], by_signal(config) or {})
    if world is None:
        return build(rewards, weights)
    if not rewards:
        return Grading(world.graders(), by_signal(config) or dict(world.weights))
    # weights by name may weigh the world's signals as well; without any, the reward is what the person brought
    own = build(rewards, weights if isinstance(weights, list) else None)
    named = weights if isinstance(weights, dict) else own.weights
    return Grading([*world.graders(), *own.graders], named)


def by_signal(config: RunConfig) -> dict[str, float] | None:
    """The weights by the name of their signal; a list fits only rewards given in the same order."""
    if isinstance(config.weights, dict):
        return config.weights or None
    if config.weights:
        raise GruppoError(
            f"the weights are a list of {len(config.weights)}, but here they weigh signals, which have names; write them as "
            "name: number"
        )
    return None


def metrics_of(config: RunConfig, given: Sequence[Metric] = ()) -> tuple[Metric, ...]:
    """What the run's evaluations report beside the signals: the world's own metrics, then those that were given."""
    world = world_of(config)
    own = () if world is None else world.metrics
    return (*own, *(m for m in given if m not in own))


def counters(grade: Any) -> dict[str, dict[str, int]]:
    """The grading's counts since the start of the run, as plain dictionaries."""
    return {"abstained": dict(grade.abstained), "failures": dict(grade.failures)}


def set_counters(grade: Any, counted: dict[str, dict[str, int]]) -> None:
    for name, counts in counted.items():
        counter = getattr(grade, name)
        counter.clear()
        counter.update(counts)
