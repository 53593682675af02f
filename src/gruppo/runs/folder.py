"""A run on disk.

runs/<name>/  run.yaml  metrics.jsonl  evals.jsonl  groups/step-000010.parquet  evals/step-000000.parquet
              checkpoints/step-000100/  checkpoints/best.json  broken/  report.html
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gruppo.runs import completions, pictures
from gruppo.runs.completions import Strata
from gruppo.runs.disk import disk, whole
from gruppo.runs.measure import finite
from gruppo.types import Group, GruppoError

LAST = "state.pt"  # in a checkpoint: everything but the weights
AVERAGE_FOLDER = "average"  # in a checkpoint: the model with the averaged weights


@dataclass(frozen=True)
class RunFolder:
    """The files of one run."""

    path: Path

    @staticmethod
    def create(parent: Path, name: str, *, numbered: bool) -> RunFolder:
        """A new empty folder. A taken name gets a number when the person did not choose it, else a sentence."""
        parent = Path(parent).expanduser()
        with disk(parent):
            parent.mkdir(parents=True, exist_ok=True)
            for n in range(1, 10_000):
                path = parent / (name if n == 1 else f"{name}-{n}")
                try:
                    path.mkdir()
                except FileExistsError:
                    if numbered or n > 1:
                        continue
                    free = next(f"{name}-{i}" for i in range(2, 10_000) if not (parent / f"{name}-{i}").exists())
                    raise GruppoError(
                        f"the run {path} exists already and nothing in it was touched; choose another name (--name {free} is "
                        f"free), or continue it with `gruppo resume {path}`"
                    ) from None
                return RunFolder(path)
        raise GruppoError(f"{parent} holds ten thousand runs called {name}; give --name")

    @staticmethod
    def open(path: Path | str) -> RunFolder:
        """An existing run."""
        path = Path(path).expanduser()
        if not (path / "run.yaml").exists():
            near = sorted(p.parent.name for p in (path.parent.glob("*/run.yaml") if path.parent.is_dir() else ()))
            there = f"; runs there: {', '.join(near)}" if near else ""
            raise GruppoError(f"{path} is not a run folder (it has no run.yaml){there}")
        return RunFolder(path)

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def evals(self) -> Path:
        return self.path / "evals.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def write(self, name: str, text: str) -> Path:
        """A text file, whole."""
        with whole(self.path / name) as temporary:
            temporary.write_text(text)
        return self.path / name

    def append(self, file: Path, record: dict[str, Any]) -> None:
        """One line of JSON."""
        with disk(file), file.open("a") as out:
            out.write(json.dumps(finite(record), allow_nan=False) + "\n")

    def records(self, file: Path) -> list[dict[str, Any]]:
        """The lines of a .jsonl file; a last line that a killed process left half-written is not one."""
        if not file.exists():
            return []
        lines = file.read_text().split("\n")
        return [json.loads(line) for line in lines[:-1] if line]

    def rewind(self, step: int) -> None:
        """Forget what was logged after `step`, and what a killed process left unfinished."""
        for file in (self.metrics, self.evals):
            if file.exists():
                kept = [r for r in self.records(file) if r["step"] <= step]
                with whole(file) as temporary:
                    temporary.write_text("".join(json.dumps(r) + "\n" for r in kept))
        for left in [*self.path.glob(".*.partial"), *self.path.glob("*/.*.partial")]:
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        for kind in ("groups", "evals", "broken"):
            for file in (self.path / kind).glob("step-*"):
                if int(file.stem.removeprefix("step-")) > step:
                    file.unlink()

    def save_groups(self, kind: str, step: int, groups: list[Group], tokenizer: Any = None, strata: Strata | None = None) -> Path:
        """`kind`/step-000010.parquet: one row per path. Without a tokenizer the paths are pictures'.

        `strata` names the kind of each path where the recipe has such.
        """
        import pyarrow.parquet

        rows = pictures.table(step, groups) if tokenizer is None else completions.table(step, groups, tokenizer, strata)
        file = self.path / kind / f"step-{step:06d}.parquet"
        with whole(file) as temporary:
            pyarrow.parquet.write_table(rows, temporary, compression="zstd")
        return file

    def scores(self, step: int) -> dict[str, Any] | None:
        """The held-out scores recorded at a step."""
        return next((r["scores"] for r in reversed(self.records(self.evals)) if r["step"] == step), None)

    def steps(self) -> list[int]:
        """The steps with a complete checkpoint, ascending."""
        found = self.checkpoints.glob("step-*") if self.checkpoints.is_dir() else ()
        return sorted(int(p.name.removeprefix("step-")) for p in found if (p / LAST).exists())

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:06d}"

    def save(self, step: int, write: Callable[[Path], None], state: dict[str, Any]) -> Path:
        """A checkpoint: what `write(folder)` puts there, and `state`."""
        folder = self.checkpoint(step)
        with whole(folder) as temporary:
            temporary.mkdir()
            write(temporary)
            torch.save(state, temporary / LAST)
        return folder

    def load(self, step: int) -> dict[str, Any]:
        """The state beside a checkpoint's weights; only plain values and tensors are read."""
        return torch.load(self.checkpoint(step) / LAST, map_location="cpu", weights_only=True)

    def prune(self, keep_last: int, best: int | None) -> None:
        """Keep the newest checkpoints and the best one."""
        for step in self.steps()[:-keep_last]:
            if step != best:
                shutil.rmtree(self.checkpoint(step))
