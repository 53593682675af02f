"""Which few steps of the grid draw noise in this iteration, and how that window moves (MixGRPO, 2507.21802)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gruppo.types import Group, GruppoError

Hold = Callable[[int, int], int]  # start of the window, bound of the grid -> iterations for which it stays there


@dataclass(frozen=True)
class Constant:
    """tau iterations at every start."""

    tau: int = 25

    def __post_init__(self) -> None:
        if self.tau < 1:
            raise GruppoError(f"the window is to stay {self.tau} iterations at every start; it stays at least 1")

    def __call__(self, start: int, bound: int) -> int:
        return self.tau


@dataclass(frozen=True)
class LinearDecay:
    """From `most` iterations at the first start down to `least` at the bound."""

    most: int = 25
    least: int = 6

    def __call__(self, start: int, bound: int) -> int:
        p = start / bound
        return max(self.least, int(self.most * (1 - p) + self.least * p))


@dataclass(frozen=True)
class ExponentialDecay:
    """ceil(tau0 exp(-k relu(start - threshold)))"""

    tau: int = 25
    k: float = 0.1
    threshold: int = 13

    def __call__(self, start: int, bound: int) -> int:
        return math.ceil(self.tau * math.exp(-self.k * max(0, start - self.threshold)))


@dataclass
class Place:
    """Where the window stands: its start, for how many iterations it has stood there, and the grid's length."""

    start: int = 0
    held: int = 0
    steps: int = 0


@dataclass(frozen=True)
class Window:
    """`width` consecutive steps that begin at 0 and move by `stride` whenever `hold` iterations are over.

    At the end of the grid the window stays at its last place, or goes back to 0 with `roll_back`. The last `spare` steps of
    the grid never belong to it. With `shrinks` its start may go on to the last step that is not spared, and what would reach
    beyond is cut off, as in Tencent-Hunyuan/MixGRPO; where the window would be empty there, it stays at its last step here.
    """

    width: int = 4
    hold: Hold = field(default_factory=Constant)
    stride: int = 1
    spare: int = 0
    shrinks: bool = False
    roll_back: bool = False
    place: Place = field(default_factory=Place, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.width < 1 or self.stride < 0 or self.spare < 0:
            raise GruppoError(
                f"a window of {self.width} steps that moves by {self.stride} and spares {self.spare}: it needs at least one "
                "step, and cannot move or spare less than nothing"
            )

    def __call__(self, T: int, g: torch.Generator) -> list[int]:
        bound = T - self.spare
        if self.width > bound:
            raise GruppoError(
                f"the window has {self.width} steps, but of the grid's {T} only {bound} may be in it; narrow the window or "
                "paint in more steps"
            )
        self.place.steps = T
        start = min(self.place.start, self.top(bound))
        return list(range(start, min(start + self.width, bound)))

    def top(self, bound: int) -> int:
        """The last start that there is."""
        return bound - 1 if self.shrinks else bound - self.width

    def update(self, groups: list[Group]) -> None:
        """One iteration is over."""
        at = self.place
        bound = at.steps - self.spare
        at.held += 1
        if at.held < self.hold(at.start, bound):
            return
        at.held = 0
        at.start += self.stride
        if at.start > self.top(bound):
            at.start = 0 if self.roll_back else self.top(bound)

    def state_dict(self) -> dict[str, Any]:
        return {"start": self.place.start, "held": self.place.held, "steps": self.place.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place.start, self.place.held, self.place.steps = state["start"], state["held"], state["steps"]


@dataclass(frozen=True)
class RandomWindow:
    """`width` consecutive steps within [begin, end), every start equally likely, drawn anew in every iteration.

    The run's own generator draws, so all ranks have the same window. `end` None is the grid's end, less `spare`.
    """

    width: int = 4
    begin: int = 0
    end: int | None = None
    spare: int = 0

    def __call__(self, T: int, g: torch.Generator) -> list[int]:
        end = T - self.spare if self.end is None else self.end
        places = end - self.begin - self.width + 1
        if self.width < 1 or places < 1 or end > T:
            raise GruppoError(
                f"a window of {self.width} steps within the steps {self.begin} to {end - 1} does not fit into a grid of {T}"
            )
        start = self.begin + int(torch.randint(places, (), generator=g))
        return list(range(start, start + self.width))


@dataclass(frozen=True)
class CompressedTail:
    """The grid with fewer steps behind the window: int((T - last) ratio) nodes from there to 0, `last` the window's last step.

    The nodes are equally spaced before the grid's own shift, which is read off the grid. The tail always ends at sigma 0: the
    reference's single-node tail stops before it.
    """

    ratio: float

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise GruppoError(f"the tail is compressed to {self.ratio} of its steps; the ratio lies in (0, 1]")

    def __call__(self, sigmas: Tensor, noisy: Sequence[int]) -> Tensor:
        T, last = len(sigmas) - 1, noisy[-1]
        if last + 1 >= T:
            return sigmas
        nodes = max(2, int((T - last) * self.ratio))
        t = torch.linspace(1 - (last + 1) / T, 0.0, nodes, dtype=torch.float64)
        return torch.cat([sigmas[: last + 1].double(), reshifted(sigmas, t)])


def reshifted(sigmas: Tensor, t: Tensor) -> Tensor:
    """The grid's own curve sigma(t) at other times, t falling from 1 to 0 along the grid.

    A grid of the form s t / (1 + (s - 1) t) is continued by that formula; any other one by straight lines between its nodes.
    """
    S, T = sigmas.double(), len(sigmas) - 1
    grid = torch.linspace(1, 0, T + 1, dtype=torch.float64)
    inner = slice(1, T)
    if T > 1:
        shift = S[inner] * (1 - grid[inner]) / (grid[inner] * (1 - S[inner]))
        if torch.allclose(shift, shift[:1].expand_as(shift), rtol=1e-6):
            s = shift[0]
            return s * t / (1 + (s - 1) * t)
    at = (1 - t) * T
    low = at.floor().clamp(max=T - 1).long()
    return S[low] + (at - low) * (S[low + 1] - S[low])
