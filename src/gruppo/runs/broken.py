"""A step that failed: what it was working on, kept for a look, and the sentence that says where."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from gruppo.core.collate import NotFinite
from gruppo.runs.folder import RunFolder
from gruppo.types import GruppoError, Task


def broken(error: GruppoError, step: int, policy: Any, folder: RunFolder, drawn: Sequence[Task]) -> GruppoError:
    """The error with its step; where numbers are the reason, what the step was working on is saved."""
    name, bad = non_finite(policy.model)
    if not isinstance(error, NotFinite) and name is None:
        return GruppoError(f"step {step}: {error}")
    weights = "" if name is None else f"; {bad} weights of the model are not finite, the first in {name}"
    groups = getattr(error, "groups", [])
    offending = [g for g in groups if any(not p.logp[p.mask].isfinite().all() for p in g.paths)] or groups
    if offending:
        file = folder.save_groups("broken", step, offending, getattr(policy, "tokenizer", None))
    else:  # sampling itself failed: there are prompts but no paths yet
        tasks = [{"prompt": t.prompt, "answer": t.answer, **t.extra} for t in drawn]
        file = folder.write(f"broken/step-{step:06d}.json", json.dumps(tasks, default=str, ensure_ascii=False, indent=1))
    steps = folder.steps()
    return GruppoError(
        f"step {step}: {error}{weights}. What the step was working on is saved in {file}; the last good checkpoint is "
        f"{folder.checkpoint(steps[-1]) if steps else 'none'}"
    )


def non_finite(model: Any) -> tuple[str | None, int]:
    """The first weight tensor that holds NaN or infinity, and how many such numbers there are in all."""
    first, count = None, 0
    for name, weight in model.named_parameters():
        bad = int((~weight.detach().isfinite()).sum())
        if bad and first is None:
            first = name
        count += bad
    return first, count
