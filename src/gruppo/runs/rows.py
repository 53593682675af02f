"""One row per path, whatever it is made of: where it stands, its task, its reward and what was decided by it."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from torch import Tensor

from gruppo.runs.measure import finite
from gruppo.types import Group, Task

SHARED = (  # columns of every path
    *("step", "group", "row", "problem", "prompt", "answer", "task", "output", "logp", "mask", "advantage", "reward"),
    *("signals", "truncated", "off_policy", "version", "fork"),
)


def row_of(step: int, n: int, group: Group, i: int, *, hidden: Collection[str] = ()) -> dict[str, Any]:
    """The i-th path of the n-th group, without its prompt and its output; the `hidden` signals are left out."""
    path = group.paths[i]
    reward = group.reward if group.reward is not None else group.signals.get("reward")
    signals = {name: finite(signal(v, i)) for name, v in group.signals.items() if name not in hidden}
    return {
        "step": step,
        "group": n,
        "row": i,
        "problem": problem(group.task),
        "answer": plain(group.task.answer),
        "task": json.dumps(dict(group.task.extra), default=str, ensure_ascii=False),
        "logp": path.logp.tolist(),
        "mask": path.mask.tolist(),
        "advantage": [0.0] * len(path) if group.advantage is None else group.advantage[i, : len(path)].tolist(),
        "reward": None if reward is None else reward[i].tolist(),
        "signals": json.dumps(signals, default=str),
        "truncated": path.truncated,
        "off_policy": path.off_policy,
        "version": path.version,
        "fork": None if path.fork is None else f"{path.fork[0]}:{path.fork[1]}",
    }


def table_of(rows: list[dict[str, Any]], own: Collection[str]) -> Any:
    """A pyarrow table of the rows; `own` names the columns that only paths of this kind have."""
    import pyarrow as pa

    number, whole, text = pa.float32(), pa.int32(), pa.string()
    columns = any(isinstance(r["reward"], list) for r in rows)
    kinds = {
        **dict.fromkeys(("step", "group", "row"), whole),
        **dict.fromkeys(("problem", "prompt", "answer", "task", "output"), text),
        "images": pa.list_(pa.binary()),
        **dict.fromkeys(("prompt_tokens", "tokens"), pa.list_(whole)),
        "token_text": pa.list_(text),
        **dict.fromkeys(("sigmas", "deviations", "logp", "logp_train"), pa.list_(number)),
        "mask": pa.list_(pa.bool_()),
        "unit": pa.list_(whole),
        "advantage": pa.list_(number),
        "reward": pa.list_(number) if columns else number,
        "signals": text,
        **dict.fromkeys(("truncated", "off_policy"), pa.bool_()),
        "version": whole,
        **dict.fromkeys(("fork", "messages", "stratum"), text),
    }
    return pa.Table.from_pylist(rows, schema=pa.schema({k: v for k, v in kinds.items() if k in (*SHARED, *own)}))


def problem(task: Task) -> str | None:
    """Prompt and answer as the data had them, so that a stored completion can be graded again; None where they are not JSON."""
    try:
        return json.dumps({"prompt": task.prompt, "answer": task.answer}, ensure_ascii=False)
    except TypeError:
        return None


def plain(value: Any) -> str | None:
    """An answer as text."""
    return value if value is None or isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def signal(values: Any, row: int) -> Any:
    """One path's value of a signal; long per-step tensors are left to the columns made for them."""
    value = values[row]
    if isinstance(value, Tensor):
        return float(value) if value.dim() == 0 else None
    return value
