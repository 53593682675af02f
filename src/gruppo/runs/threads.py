"""How many torch threads? On shared machines spinning threads can be ten times slower than one, so it is measured."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Choice:
    """The number chosen and the milliseconds that each candidate took for the same work."""

    threads: int
    milliseconds: dict[int, float]

    def __str__(self) -> str:
        if len(self.milliseconds) < 2:
            return f"{self.threads} (only one core to use)"
        return f"{self.threads} (" + ", ".join(f"{n}: {ms:.2f} ms" for n, ms in self.milliseconds.items()) + ")"


def cores() -> int:
    """Cores this process may use, and never more than OMP_NUM_THREADS allows."""
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(mine, int(asked) if asked.isdigit() and int(asked) > 0 else mine))


def choose(width: int = 128, vocabulary: int = 256, *, seconds: float = 0.6, available: int | None = None) -> Choice:
    """Time one small layer and head at 1, half and all cores; more threads must win by a tenth to be taken.

    The number of threads is left as it was found.
    """
    n = cores() if available is None else available
    candidates = sorted({1, max(1, n // 2), n})
    if len(candidates) == 1:
        return Choice(1, {1: 0.0})
    before = torch.get_num_threads()
    x = torch.ones(256, width)
    up, head = torch.ones(width, 4 * width), torch.ones(width, min(vocabulary, 32768))
    best = dict.fromkeys(candidates, float("inf"))
    try:
        for _ in range(3):  # in turns: another process may be busy for a moment
            for threads in candidates:
                torch.set_num_threads(threads)
                _work(x, up, head)  # the pool starts here, untimed
                end = time.perf_counter() + seconds / (3 * len(candidates))
                while time.perf_counter() < end:
                    began = time.perf_counter()
                    _work(x, up, head)
                    best[threads] = min(best[threads], time.perf_counter() - began)
    finally:
        torch.set_num_threads(before)
    fastest = min(candidates, key=best.__getitem__)
    chosen = 1 if best[1] <= 1.1 * best[fastest] else fastest
    return Choice(chosen, {k: 1000 * v for k, v in best.items()})


def _work(x: torch.Tensor, up: torch.Tensor, head: torch.Tensor) -> None:
    hidden = torch.nn.functional.silu(x @ up) @ up.T
    (hidden @ head).log_softmax(-1)
