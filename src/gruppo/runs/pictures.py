"""Groups of pictures as a table: the same columns as for text where they mean the same, and the picture itself as PNG."""

from __future__ import annotations

import io
import json
from typing import Any

from PIL import Image

from gruppo.runs.measure import pictures
from gruppo.runs.rows import row_of, table_of
from gruppo.types import Group, Path

OWN = ("images", "sigmas", "deviations")
LARGEST = 512  # pixels of a stored picture's longer side; a run keeps thousands of them


def table(step: int, groups: list[Group]) -> Any:
    """A pyarrow table with one row per path. Latents are not kept: they are most of a path's size and no one can look at them."""
    rows = []
    for n, group in enumerate(groups):
        for i, path in enumerate(group.paths):
            row = row_of(step, n, group, i)
            row |= {
                "prompt": str(group.task.prompt),
                "output": said(path),
                "images": [png(image) for image in pictures(path.output)],
                "sigmas": path.prompt.sigmas.tolist(),
                "deviations": path.prompt.deviations.tolist(),
            }
            rows.append(row)
    return table_of(rows, OWN)


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
