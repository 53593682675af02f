"""Reference policies: the initial weights, the weights without adapter, the moving average of the weights.

Each is made from the policy by a value that a recipe can hold (`initial`, `Average(decay=.99)`), and evaluates through the
policy itself with other numbers in its parameters, so that a reference can never differ from it in anything else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gruppo.types import Batch, Group, Path, Reference, Steps


def initial(policy: Any) -> Reference:
    """The policy as it was before training: adapter switched off where there is one, else a frozen copy."""
    return AdapterOff(policy) if hasattr(policy.model, "disable_adapter") else Frozen(policy)


@dataclass(frozen=True)
class Average:
    """An exponential moving average: every `every` iterations, ema = decay * ema + (1 - decay) * policy."""

    decay: float
    every: int = 1

    def __call__(self, policy: Any) -> Reference:
        return Ema(policy, self.decay, self.every)


@dataclass(frozen=True)
class Warming:
    """min((1 + n) / (slow + n), most) after n steps: short at first, when the weights are still far from where they will be."""

    most: float = 0.9
    slow: float = 10.0

    def __call__(self, n: int) -> float:
        return min((1 + n) / (self.slow + n), self.most)


def snapshot(policy: Any) -> list[Tensor]:
    """A copy of the trained parameters, in their order."""
    return [p.detach().clone() for p in policy.parameters()]


@contextmanager
def swapped(policy: Any, weights: Sequence[Tensor]) -> Iterator[None]:
    """The policy with other numbers in its trained parameters; may be nested, and gives its own numbers back."""
    own = [p.data for p in policy.parameters()]
    for p, w in zip(policy.parameters(), weights, strict=True):
        p.data = w.to(p)
    try:
        yield
    finally:
        for p, w in zip(policy.parameters(), own):
            p.data = w


class _Swapped:
    """Evaluates the policy with other numbers in its trained parameters."""

    def __init__(self, policy: Any) -> None:
        self.policy = policy
        self.weights = snapshot(policy)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Steps:
        with swapped(self.policy, self.weights):
            return self.policy.evaluate(batch)

    def score(self, paths: list[Path]) -> list[Tensor]:
        with swapped(self.policy, self.weights):
            return self.policy.score(paths)


class Frozen(_Swapped):
    """The weights at the time it was made. A resumed run makes it again from the run's initial model."""

    def update(self, groups: list[Group]) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class Ema(_Swapped):
    """The moving average of the trained parameters. `decay` may depend on the number of updates before."""

    def __init__(self, policy: Any, decay: float | Callable[[int], float], every: int) -> None:
        super().__init__(policy)
        self.weights = [w.float() for w in self.weights]  # in bfloat16 a step of 1 - decay would be rounded away
        self.decay, self.every, self.seen = decay, every, 0

    @torch.no_grad()
    def update(self, groups: list[Group]) -> None:
        before, self.seen = self.seen, self.seen + 1
        if self.seen % self.every == 0:
            decay = self.decay(before) if callable(self.decay) else self.decay
            for w, p in zip(self.weights, self.policy.parameters()):
                w.lerp_(p.detach().to(w), 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]
        for w, saved in zip(self.weights, state["weights"], strict=True):
            w.copy_(saved)


class AdapterOff:
    """The policy with its adapter switched off: no second copy of anything."""

    def __init__(self, policy: Any) -> None:
        self.policy = policy

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Steps:
        with self.policy.model.disable_adapter():
            return self.policy.evaluate(batch)

    def score(self, paths: list[Path]) -> list[Tensor]:
        with self.policy.model.disable_adapter():
            return self.policy.score(paths)

    def update(self, groups: list[Group]) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass
