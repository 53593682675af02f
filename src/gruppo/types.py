"""The nouns: what is asked (Task), what was done (Path), what is compared (Group), what is trained (Batch).

Shape letters, used everywhere in gruppo:
    G  paths of one group          B  rows of a batch (paths of many groups)
    T  steps of the longest path   U  units of a path (a list rank, a turn; one unit = the whole path)
    C  reward columns              V  vocabulary          D  latent elements

A *step* is one decision with a log-probability: a sampled token, or one denoising transition. Groups have any size;
nothing in the library reshapes by G.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

Scope = Literal["step", "path", "group"]


class GruppoError(Exception):
    """A sentence for the person at the keyboard: what is wrong, with the numbers in it, and what to do."""


@dataclass(frozen=True)
class Task:
    """One prompt and whatever graders may read about it.

    `prompt` is a string, chat messages, messages with images, or a conditioning: only the policy looks inside.
    `extra` holds the other columns of the data set: hints, difficulty, catalogue, reference image.
    """

    prompt: Any
    answer: Any = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def column(self, name: str) -> Any:
        """A column of the data set by name; a sentence when the task has none."""
        if name == "prompt":
            return self.prompt
        if name == "answer" and self.answer is not None:
            return self.answer
        if name in self.extra:
            return self.extra[name]
        raise GruppoError(
            f"a grader or recipe reads the column {name!r}, but this task has only: {', '.join(self.columns()) or 'prompt'}"
        )

    def columns(self) -> dict[str, Any]:
        """Every column but the prompt."""
        named = dict(self.extra)
        if self.answer is not None:
            named.setdefault("answer", self.answer)
        return named


@dataclass
class Path:
    """One sampled sequence of decisions.

    Example, three prompt tokens, a thought of two tokens, a tool's output of two, an answer of one:
        steps = [t0, t1, o0, o1, a0]      mask = [True, True, False, False, True]
    """

    prompt: Any  # the context it is TRAINED under, encoded by the policy
    steps: Tensor  # tokens [T] or latents [T+1, ...]
    logp: Tensor  # [T] when sampled (or re-read under `prompt`, see off_policy)
    mask: Tensor  # [T] bool: this row trains the step
    output: Any = None  # what a grader looks at
    fork: tuple[int, int] | None = None  # (row, t): before t, these are that row's steps
    unit: Tensor | None = None  # [T] int, -1 = belongs to no unit; None = the path is one unit
    off_policy: bool = False  # sampled under another context than `prompt`
    truncated: bool = False  # stopped by the length limit, not by itself
    logp_train: Tensor | None = None  # [T] the trainer's own reading of logp, where sampler and trainer are two programs
    mean: Tensor | None = None  # [T, ...] where the sampler's Gaussians were centred, kept where a loss reads it
    version: int = 0  # iterations of the run that the sampling weights had seen, where a rollout keeps count

    def __len__(self) -> int:
        return len(self.mask)


@dataclass
class Group:
    """Paths that are compared with one another. `signals` are raw grades, written once; NaN = the grader abstained."""

    task: Task
    paths: list[Path]
    signals: dict[str, Any] = field(default_factory=dict)
    reward: Tensor | None = None  # [G] or [G, C]; what columns mean is the recipe's business
    advantage: Tensor | None = None  # [G, T]

    def __post_init__(self) -> None:
        for i, path in enumerate(self.paths):
            if path.fork is not None and not 0 <= path.fork[0] < i:
                raise GruppoError(
                    f"path {i} forks from row {path.fork[0]}, but a parent must stand before its child (rows 0 to {i - 1})"
                )

    def __len__(self) -> int:
        return len(self.paths)

    def with_(self, **changes: Any) -> Group:
        """A copy with these fields replaced."""
        return replace(self, **changes)

    @property
    def width(self) -> int:
        """T: the steps of the longest path."""
        return max((len(p) for p in self.paths), default=0)

    @property
    def mask(self) -> Tensor:
        """[G, T] bool, False beyond each path's end."""
        return pad([p.mask for p in self.paths], self.width, False)

    @property
    def unit(self) -> Tensor:
        """[G, T] int, -1 outside units and beyond each path's end."""
        return pad([units(p) for p in self.paths], self.width, -1)

    @property
    def logp(self) -> Tensor:
        """[G, T] behaviour log-probabilities, 0 beyond each path's end."""
        return pad([p.logp for p in self.paths], self.width, 0.0)

    def edges(self) -> Tensor:
        """[G, T] int: the same id at t means the same decision at t (read from `fork`); -1 beyond each path's end."""
        from gruppo.core.tree import edges

        return edges(self)


def units(path: Path) -> Tensor:
    """The path's unit ids; one unit 0 for the whole path when it names none."""
    return torch.zeros(len(path), dtype=torch.long) if path.unit is None else path.unit


def pad(rows: Sequence[Tensor], width: int, value: float | int | bool) -> Tensor:
    """Stack [T_i] rows into [len(rows), width], filled on the right."""
    if not rows:
        return torch.empty(0, width)
    out = rows[0].new_full((len(rows), width), value)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row[:width]
    return out


@dataclass
class Steps:
    """What a policy says about a batch now."""

    logp: Tensor  # [B, T], 0 where the mask is False
    entropy: Tensor | None = None  # [B, T], carries no gradient
    mean: Tensor | None = None  # Gaussian steps: [B, T, ...]
    std: Tensor | None = None  # Gaussian steps: broadcasts against mean


@dataclass
class Batch:
    """Rows ready for one optimizer step; tensors are [B, T] unless noted."""

    paths: list[Path]
    logp_old: Tensor  # the ratio's denominator: the trainer's reading where there is one, else the sampler's
    logp_sampler: Tensor  # what the program that sampled said
    advantage: Tensor
    mask: Tensor
    weight: Tensor
    unit: Tensor
    group: Tensor  # [B] which group a row belongs to
    off_policy: Tensor  # [B] bool

    def __len__(self) -> int:
        return len(self.paths)

    def with_(self, **changes: Any) -> Batch:
        """A copy with these fields replaced."""
        return replace(self, **changes)

    def rows(self, index: Iterable[int]) -> Batch:
        """These rows only, cut to the longest of them."""
        keep = [int(i) for i in index]
        paths = [self.paths[i] for i in keep]
        width = max((len(p) for p in paths), default=0)
        at = torch.tensor(keep, dtype=torch.long, device=self.mask.device)
        changes: dict[str, Any] = {"paths": paths}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                changes[f.name] = value[at] if value.dim() == 1 else value[at, :width]
        return replace(self, **changes)

    def to(self, device: torch.device | str) -> Batch:
        """The same rows with every tensor field on `device`."""
        moved = {f.name: v.to(device) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        return replace(self, **moved)


@runtime_checkable
class Tasks(Protocol):
    """This step's tasks, and more of the same stream when a rollout asks (dynamic sampling)."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Task]: ...
    def more(self, n: int) -> Tasks: ...


Grade = Callable[[list[Group]], list[Group]]  # fills `signals`; batched over groups so that slow judges are called once


@runtime_checkable
class Grader(Protocol):
    """Measures groups and knows nothing of algorithms: one dictionary of raw signals per group, [G] floats or lists.

    NaN (or None) in a signal means *abstained*. A grader sees whole groups, so votes and pairwise judges are ordinary.
    """

    def __call__(self, groups: list[Group]) -> list[dict[str, Any]]: ...


@runtime_checkable
class Loss(Protocol):
    """Per-step losses without any normaliser. `scope` is the smallest block that must share one forward."""

    @property
    def scope(self) -> Scope: ...
    def __call__(self, batch: Batch, now: Steps, ref: Steps | None) -> tuple[Tensor, dict[str, Tensor]]: ...


def reads_reference(loss: Loss) -> bool:
    """Whether the loss looks at `ref`; a loss that does not say is asked to be given it."""
    return bool(getattr(loss, "reads_reference", True))


@runtime_checkable
class Policy(Protocol):
    """All that the loop needs. Sampling is deliberately not here: a rollout is written for a family of policies."""

    def evaluate(self, batch: Batch) -> Steps: ...
    def split(self, batch: Batch, scope: Scope, size: int) -> Iterator[Batch]: ...
    def parameters(self) -> Iterable[Tensor]: ...


@runtime_checkable
class Reference(Protocol):
    """A second opinion on a batch: the initial weights, the weights without adapter, or their moving average."""

    def evaluate(self, batch: Batch) -> Steps: ...
    def update(self, groups: list[Group]) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@runtime_checkable
class Stateful(Protocol):
    """Memory of a method: told about each iteration's groups, saved with the run."""

    def update(self, groups: list[Group]) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@runtime_checkable
class Rollout(Protocol):
    """Tasks in, graded groups out; may look at grades before it samples more."""

    def __call__(self, policy: Any, tasks: Any, grade: Grade, rng: torch.Generator) -> list[Group]: ...
