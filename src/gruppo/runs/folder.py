"""A run on disk. Files appear whole or not at all: written under a temporary name, flushed to the disk, renamed.

runs/<name>/  run.yaml  metrics.jsonl  evals.jsonl  groups/step-000010.parquet  evals/step-000000.parquet
              checkpoints/step-000100/  checkpoints/best.json  broken/  report.html
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gruppo.rollouts.conversation import Transcript
from gruppo.runs.measure import finite
from gruppo.types import Group, GruppoError, Task

Strata = Callable[[Group], Sequence[Hashable]]
LAST = "state.pt"  # in a checkpoint: everything but the weights


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

    def save_groups(self, kind: str, step: int, groups: list[Group], tokenizer: Any, strata: Strata | None = None) -> Path:
        """`kind`/step-000010.parquet: one row per path. `strata` names the kind of each path where the recipe has such."""
        import pyarrow.parquet

        file = self.path / kind / f"step-{step:06d}.parquet"
        with whole(file) as temporary:
            pyarrow.parquet.write_table(table(step, groups, tokenizer, strata), temporary, compression="zstd")
        return file

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


@contextmanager
def disk(path: Path) -> Iterator[None]:
    """An operating system's refusal as a sentence: full, read-only, not allowed, a file in the way."""
    try:
        yield
    except OSError as error:
        where = error.filename or path
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise GruppoError(f"the disk is full: {path} could not be written; free some space and resume the run") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise GruppoError(
                f"{where} cannot be written ({os.strerror(error.errno)}); choose a folder of yours with --folder"
            ) from error
        if error.errno in (errno.ENOTDIR, errno.EEXIST):
            raise GruppoError(f"{where} is a file, so no folder can be made there; choose another with --folder") from error
        raise


@contextmanager
def whole(target: Path) -> Iterator[Path]:
    """A temporary path beside `target`, renamed onto it when the block succeeds and removed when it does not."""
    temporary = target.parent / f".{target.name}.partial"
    with disk(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove(temporary)
        try:
            yield temporary
            for file in (*temporary.rglob("*"), temporary) if temporary.is_dir() else (temporary,):
                _flush(file)
            if target.is_dir():  # a folder cannot be renamed onto another one
                _remove(old := target.parent / f".{target.name}.old.partial")
                target.rename(old)
                temporary.rename(target)
                _remove(old)
            else:
                temporary.replace(target)
            _flush(target.parent)
        except BaseException:
            _remove(temporary)
            raise


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
