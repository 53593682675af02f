"""A paper is a value: a Recipe says what happens at each time of an iteration.

Slots hold plain functions where the piece has no numbers and frozen dataclasses with `__call__` where it has, so a recipe
prints, compares, pickles, and "what does this paper change?" is a field-by-field comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from torch import Tensor

from gruppo.types import Batch, Group, GruppoError, Loss, Reference, Rollout, Stateful, Task


@dataclass(frozen=True)
class Signal:
    """A raw grade that the recipe reads; the run stops before step 0 when no grader gives it."""

    name: str
    why: str = ""


@dataclass(frozen=True)
class Column:
    """A column of the data that the recipe reads; the run stops before step 0 when the tasks lack it."""

    name: str
    why: str = ""


def unchanged(groups: list[Group]) -> list[Group]:
    """No batch-level step."""
    return groups


def whole(batch: Batch) -> Iterable[Batch]:
    """One optimizer step on everything."""
    yield batch


@dataclass(frozen=True)
class Recipe:
    """What one method does, in the order in which it happens."""

    rollout: Rollout
    reward: Callable[[Group], Tensor]  # [G] or [G, C]
    advantage: Callable[[Group], Tensor]  # [G, T]
    loss: Loss
    reduce: Callable[[Batch], tuple[Tensor, Tensor]]  # raw weight [B, T] and the count that divides it (summed over ranks)
    across: Callable[[list[Group]], list[Group]] = unchanged  # batch-level scale, selection, filtering
    cadence: Callable[[Batch], Iterable[Batch]] = whole  # where the optimizer steps fall
    state: tuple[Stateful, ...] = ()
    needs: tuple[Signal | Column, ...] = ()
    reference: Callable[[Any], Reference] | None = None  # how to make the reference policy, if the loss or reward reads one

    def __post_init__(self) -> None:
        if self.loss.scope == "group" and getattr(self.cadence, "splits_groups", False):
            raise GruppoError(
                f"the loss {type(self.loss).__name__} compares the paths of a group, but the cadence {self.cadence!r} "
                "may put them into different optimizer steps; use a cadence that keeps groups whole"
            )


def check_needs(recipe: Recipe, tasks: Iterable[Task], groups: Iterable[Group] = ()) -> None:
    """A sentence, before anything is trained, when a task lacks a column or a graded group a signal that the recipe reads."""
    tasks, groups = list(tasks), list(groups)
    for need in recipe.needs:
        why = f" ({need.why})" if need.why else ""
        if isinstance(need, Column):
            bare = [i for i, t in enumerate(tasks) if need.name != "prompt" and need.name not in t.columns()]
            if bare:
                raise GruppoError(
                    f"this recipe reads the column {need.name!r}{why}, but {len(bare)} of {len(tasks)} tasks lack it, first "
                    f"task {bare[0]}; its columns are: {', '.join(['prompt', *tasks[bare[0]].columns()])}"
                )
        else:
            bare = [i for i, g in enumerate(groups) if need.name not in g.signals]
            if bare:
                raise GruppoError(
                    f"this recipe reads the signal {need.name!r}{why}, but the graders of this run give only: "
                    f"{', '.join(groups[bare[0]].signals) or 'nothing'}. Add a grader that returns {{{need.name!r}: values}}"
                )


def difference(recipe: Recipe, base: Recipe) -> dict[str, tuple[Any, Any]]:
    """The slots in which two recipes differ, as {slot: (base's, recipe's)}."""
    changed = {}
    for f in fields(Recipe):
        ours, theirs = getattr(recipe, f.name), getattr(base, f.name)
        if ours != theirs:
            changed[f.name] = (theirs, ours)
    return changed


def describe(piece: Any) -> str:
    """One slot's value as a reader would write it: functions by name, dataclasses with their numbers."""
    if is_dataclass(piece) and not isinstance(piece, type):
        inner = ", ".join(f"{f.name}={describe(getattr(piece, f.name))}" for f in fields(piece) if f.repr)
        return f"{type(piece).__name__}({inner})"
    if isinstance(piece, tuple):
        return "(" + ", ".join(describe(p) for p in piece) + ("," if len(piece) == 1 else "") + ")"
    if callable(piece) and hasattr(piece, "__name__"):
        return piece.__name__
    return repr(piece)
