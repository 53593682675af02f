"""Groups of made-up completions, for graders that never look at a policy."""

from __future__ import annotations

from typing import Any

import torch

from gruppo.types import Group, Path, Task


def path(output: Any, length: int = 1) -> Path:
    """A path whose output is given and whose tokens are 0, 1, 2, ..."""
    steps = torch.arange(length)
    return Path(torch.tensor([0]), steps, torch.zeros(length), torch.ones(length, dtype=torch.bool), output)


def group(outputs: list[Any], answer: Any = None, prompt: Any = "p", **extra: Any) -> Group:
    """One group of such paths."""
    return Group(Task(prompt, answer, extra), [path(o) for o in outputs])
