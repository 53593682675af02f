"""The synthetic image task of the recorded curves: a "picture" is a point in the plane, and each prompt names a quadrant.

A random two-layer network of width 32 predicts the velocity. Untrained, it leaves points near where their noise began, so a
quarter of them lie right by chance; twenty steps of plain gradient descent teach the rest.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gruppo.graders.grade import Grading
from gruppo.policies.flow import CFG, FlowPolicy
from gruppo.types import Group, Task

QUADRANTS = {"a": (1.0, 1.0), "b": (-1.0, 1.0), "c": (1.0, -1.0), "d": (-1.0, -1.0)}
STEPS, SHIFT = 6, 3.0


class Points:
    """A painter whose pictures are points [2]; its conditioning is one of four directions."""

    shape, tokens = (2,), 1

    def __init__(self, seed: int = 0) -> None:
        with torch.random.fork_rng(devices=[]):
            self.model: torch.nn.Module = torch.nn.Sequential(
                torch.nn.Linear(2 + 1 + 4, 32), torch.nn.Tanh(), torch.nn.Linear(32, 2)
            )
        g = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.model.parameters():
                p.normal_(0.0, 0.3, generator=g)

    def encode(self, prompts: list[Any]) -> list[Any]:
        return [torch.eye(len(QUADRANTS))[list(QUADRANTS).index(p)] for p in prompts]

    def predict(self, x: Tensor, sigma: Tensor, conditions: list[Any]) -> Tensor:
        return self.model(torch.cat([x, sigma[:, None], torch.stack(conditions)], 1))

    def decode(self, x: Tensor) -> list[Any]:
        return [tuple(point) for point in x.tolist()]

    def sigmas(self, steps: int) -> Tensor:
        t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        return SHIFT * t / (1 + (SHIFT - 1) * t)

    def save(self, folder: pathlib.Path) -> None:
        torch.save(self.model.state_dict(), folder / "points.pt")

    def restore(self, folder: pathlib.Path) -> None:
        self.model.load_state_dict(torch.load(folder / "points.pt"))


def tiny_flow(seed: int = 0, temperature: float = 1.0, *, cfg: CFG | None = None, steps: int = STEPS) -> FlowPolicy:
    """The tiny painter as a policy of a few steps. A flow has no temperature; the argument stands for the text policy's."""
    return FlowPolicy(Points(seed), steps=steps, cfg=cfg)


class Quadrant:
    """Grades `correct`, whether the point lies in the quadrant asked for, and `near`, how close it is to that corner."""

    def __call__(self, groups: list[Group]) -> list[dict[str, Any]]:
        return [self.one(g) for g in groups]

    def one(self, group: Group) -> dict[str, Any]:
        goal = torch.tensor(QUADRANTS[group.task.prompt])
        at = torch.tensor([p.output for p in group.paths])
        return {"correct": (at * goal > 0).all(1).float(), "near": -(at - goal).square().sum(1)}


@dataclass
class FlowDraw:
    """The next prompts of the endless stream a, b, c, d, a, ..."""

    at: int
    count: int
    stream: list[int] = field(default_factory=list)

    def __iter__(self) -> Iterator[Task]:
        return (task(self.at + i) for i in range(self.count))

    def __len__(self) -> int:
        return self.count

    def more(self, n: int) -> FlowDraw:
        """The n prompts after all that were drawn so far."""
        at = self.stream[0] if self.stream else self.at + self.count
        self.stream[:] = [at + n]
        return FlowDraw(at, n, self.stream)


def task(index: int) -> Task:
    """A prompt and the corner it asks for."""
    name = list(QUADRANTS)[index % len(QUADRANTS)]
    return Task(name, answer=QUADRANTS[name])


def flow_grading() -> Grading:
    """The task's grader; the reward is closeness."""
    return Grading([Quadrant()], {"near": 1.0})
