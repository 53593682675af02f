"""Groups of completions as a table: one row per path, with its text, its tokens and what they were worth."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import Any

from torch import Tensor

from gruppo.rollouts.conversation import Transcript
from gruppo.runs.rows import row_of, table_of
from gruppo.types import Group

Strata = Callable[[Group], Sequence[Hashable]]
OWN = ("prompt_tokens", "tokens", "token_text", "logp_train", "unit", "messages", "stratum")


def table(step: int, groups: list[Group], tokenizer: Any, strata: Strata | None = None) -> Any:
    """A pyarrow table with one row per path."""

    @cache
    def text(token: int) -> str:
        return tokenizer.decode([token])

    rows: list[dict[str, Any]] = []
    for n, group in enumerate(groups):
        kinds = [None] * len(group) if strata is None else [label(x) for x in strata(group)]
        for i, path in enumerate(group.paths):
            said = path.output.messages if isinstance(path.output, Transcript) else ()
            # The turns are stored once, with the path; as a signal they would be there a second time.
            row = row_of(step, n, group, i, hidden=("messages",) if said else ())
            row |= {
                "prompt": tokenizer.decode(path.prompt.tolist()) if isinstance(path.prompt, Tensor) else str(path.prompt),
                "output": path.output if isinstance(path.output, str) else json.dumps(path.output, default=str),
                "prompt_tokens": path.prompt.tolist() if isinstance(path.prompt, Tensor) else None,
                "tokens": path.steps.tolist(),
                "token_text": [text(t) for t in path.steps.tolist()],
                "logp_train": None if path.logp_train is None else path.logp_train.tolist(),
                "unit": None if path.unit is None else path.unit.tolist(),
                "messages": json.dumps(list(said), default=str, ensure_ascii=False) if said else None,
                "stratum": kinds[i],
            }
            rows.append(row)
    return table_of(rows, OWN)


def label(stratum: Hashable) -> str:
    """A stratum as text; whole numbers without a point."""
    return str(int(stratum)) if isinstance(stratum, float) and stratum.is_integer() else str(stratum)
