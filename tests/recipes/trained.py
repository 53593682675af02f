"""A short run from the command line on an embedded world, for recipes that must train end to end."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

SHORT = (
    "policy.threads=1",
    "policy.device=cpu",
    "policy.max_new_tokens=24",
    "fit.steps=3",
    "fit.prompts_per_step=3",
    "fit.paths_per_prompt=8",
    "eval.tasks=0",
    "track.report=false",
    "track.show_every=0",
    "track.groups_every=1",
)


def trained(patch: pytest.MonkeyPatch, folder: Path, recipe: str, world: str, *settings: str) -> list[dict[str, Any]]:
    """`gruppo train --recipe ... --world ...` in this process; the records of its steps, in folder/run."""
    from gruppo import cli

    words = ["gruppo", "train", "--recipe", recipe, "--world", world, "--name", "run", "--folder", str(folder), "--plain"]
    patch.setattr(sys, "argv", [*words, *SHORT, *settings])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
