"""Groups of pictures as a table: the same columns as for text where they mean the same, and the picture itself as PNG."""

from __future__ import annotations

import io
import json
from typing import Any

from PIL import Image

from gruppo.runs.completions import plain, problem, signal
from gruppo.runs.measure import finite, pictures
from gruppo.types import Group, Path

LARGEST = 512  # pixels of a stored picture's longer side; a run keeps thousands of them


def table(step: int, groups: list[Group]) -> Any:
    """A pyarrow table with one row per path. Latents are not kept: they are most of a path's size and no one can look at them."""
    import pyarrow as pa

    rows = [row_of(step, n, group, i) for n, group in enumerate(groups) for i in range(len(group))]
    columns = any(isinstance(r["reward"], list) for r in rows)
    number = pa.float32()
    schema = pa.schema(
        {
            **dict.fromkeys(("step", "group", "row"), pa.int32()),
            **dict.fromkeys(("problem", "prompt", "answer", "task", "output"), pa.string()),
            "images": pa.list_(pa.binary()),
            **dict.fromkeys(("sigmas", "deviations", "logp"), pa.list_(number)),
            "mask": pa.list_(pa.bool_()),
            "advantage": pa.list_(number),
            "reward": pa.list_(number) if columns else number,
            "signals": pa.string(),
            **dict.fromkeys(("truncated", "off_policy"), pa.bool_()),
            "version": pa.int32(),
            "fork": pa.string(),
        }
    )
    return pa.Table.from_pylist(rows, schema=schema)


def row_of(step: int, n: int, group: Group, i: int) -> dict[str, Any]:
    """The i-th path of the n-th group."""
    path = group.paths[i]
    course = path.prompt
    reward = group.reward if group.reward is not None else group.signals.get("reward")
    value = None if reward is None else reward[i].tolist()
    return {
        "step": step,
        "group": n,
        "row": i,
        "problem": problem(group.task),
        "prompt": str(group.task.prompt),
        "answer": plain(group.task.answer),
        "task": json.dumps(dict(group.task.extra), default=str, ensure_ascii=False),
        "output": said(path),
        "images": [png(image) for image in pictures(path.output)],
        "sigmas": course.sigmas.tolist(),
        "deviations": course.deviations.tolist(),
        "logp": path.logp.tolist(),
        "mask": path.mask.tolist(),
        "advantage": [0.0] * len(path) if group.advantage is None else group.advantage[i, : len(path)].tolist(),
        "reward": value,
        "signals": json.dumps({name: finite(signal(v, i)) for name, v in group.signals.items()}, default=str),
        "truncated": path.truncated,
        "off_policy": path.off_policy,
        "version": path.version,
        "fork": None if path.fork is None else f"{path.fork[0]}:{path.fork[1]}",
    }


def said(path: Path) -> str:
    """The output in words, where a table of text has the completion."""
    found = pictures(path.output)
    return f"{len(found)} pictures" if len(found) > 1 else "" if found else json.dumps(path.output, default=str)


def png(image: Image.Image) -> bytes:
    """The picture as PNG, made smaller where it is large."""
    if max(image.size) > LARGEST:
        image = image.copy()
        image.thumbnail((LARGEST, LARGEST))
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()
