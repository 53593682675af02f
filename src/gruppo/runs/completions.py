"""Groups of completions as a table: one row per path, with its text, its tokens and what they were worth."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from torch import Tensor

from gruppo.rollouts.conversation import Transcript
from gruppo.runs.measure import finite
from gruppo.types import Group, Task

Strata = Callable[[Group], Sequence[Hashable]]


def table(step: int, groups: list[Group], tokenizer: Any, strata: Strata | None = None) -> Any:
    """A pyarrow table with one row per path."""
    import pyarrow as pa

    known: dict[int, str] = {}

    def text(token: int) -> str:
        if token not in known:
            known[token] = tokenizer.decode([token])
        return known[token]

    rows: list[dict[str, Any]] = []
    for n, group in enumerate(groups):
        reward = group.reward if group.reward is not None else group.signals.get("reward")
        kinds = None if strata is None else [label(x) for x in strata(group)]
        for i, path in enumerate(group.paths):
            T = len(path)
            value = None if reward is None else reward[i]
            advantage = [0.0] * T if group.advantage is None else group.advantage[i, :T].tolist()
            said = path.output.messages if isinstance(path.output, Transcript) else ()
            # The turns are stored once, with the path; as a signal they would be there a second time.
            own = {name: v for name, v in group.signals.items() if not (said and name == "messages")}
            rows.append(
                {
                    "step": step,
                    "group": n,
                    "row": i,
                    "problem": problem(group.task),
                    "prompt": tokenizer.decode(path.prompt.tolist()) if isinstance(path.prompt, Tensor) else str(path.prompt),
                    "answer": plain(group.task.answer),
                    "task": json.dumps(dict(group.task.extra), default=str, ensure_ascii=False),
                    "output": path.output if isinstance(path.output, str) else json.dumps(path.output, default=str),
                    "prompt_tokens": path.prompt.tolist() if isinstance(path.prompt, Tensor) else None,
                    "tokens": path.steps.tolist(),
                    "token_text": [text(t) for t in path.steps.tolist()],
                    "logp": path.logp.tolist(),
                    "logp_train": None if path.logp_train is None else path.logp_train.tolist(),
                    "mask": path.mask.tolist(),
                    "unit": None if path.unit is None else path.unit.tolist(),
                    "advantage": advantage,
                    "reward": value if value is None else value.tolist(),
                    "signals": json.dumps({name: finite(signal(v, i)) for name, v in own.items()}, default=str),
                    "truncated": path.truncated,
                    "off_policy": path.off_policy,
                    "version": path.version,
                    "fork": None if path.fork is None else f"{path.fork[0]}:{path.fork[1]}",
                    "messages": json.dumps(list(said), default=str, ensure_ascii=False) if said else None,
                    "stratum": None if kinds is None else kinds[i],
                }
            )
    columns = any(isinstance(r["reward"], list) for r in rows)
    number = pa.float32()
    schema = pa.schema(
        {
            **dict.fromkeys(("step", "group", "row"), pa.int32()),
            **dict.fromkeys(("problem", "prompt", "answer", "task", "output"), pa.string()),
            "prompt_tokens": pa.list_(pa.int32()),
            "tokens": pa.list_(pa.int32()),
            "token_text": pa.list_(pa.string()),
            **dict.fromkeys(("logp", "logp_train"), pa.list_(number)),
            "mask": pa.list_(pa.bool_()),
            "unit": pa.list_(pa.int32()),
            "advantage": pa.list_(number),
            "reward": pa.list_(number) if columns else number,
            "signals": pa.string(),
            **dict.fromkeys(("truncated", "off_policy"), pa.bool_()),
            "version": pa.int32(),
            **dict.fromkeys(("fork", "messages", "stratum"), pa.string()),
        }
    )
    return pa.Table.from_pylist(rows, schema=schema)


def problem(task: Task) -> str | None:
    """Prompt and answer as the data had them, so that a stored completion can be graded again; None where they are not JSON."""
    try:
        return json.dumps({"prompt": task.prompt, "answer": task.answer}, ensure_ascii=False)
    except TypeError:
        return None


def label(stratum: Hashable) -> str:
    """A stratum as text; whole numbers without a point."""
    return str(int(stratum)) if isinstance(stratum, float) and stratum.is_integer() else str(stratum)


def plain(value: Any) -> str | None:
    """An answer as text."""
    return value if value is None or isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def signal(values: Any, row: int) -> Any:
    """One path's value of a signal; long per-step tensors are left to the columns made for them."""
    value = values[row]
    if isinstance(value, Tensor):
        return float(value) if value.dim() == 0 else None
    return value
