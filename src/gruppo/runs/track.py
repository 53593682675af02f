"""Tracking beyond the run folder: the same numbers, sent to trackio, wandb or tensorboard when a run asks for it.

A tracker has three methods. The packages are extras and are imported only when asked for.
"""

from __future__ import annotations

import importlib
import json
import math
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from gruppo.runs.report import flat
from gruppo.types import GruppoError


@runtime_checkable
class Tracker(Protocol):
    """Where a run's numbers also go."""

    def start(self, settings: Mapping[str, Any]) -> None: ...
    def log(self, step: int, record: Mapping[str, Any]) -> None: ...
    def finish(self) -> None: ...


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """What can be drawn of a record: finite numbers, nested names joined by `/`, without the step and the clock."""
    return {name: v for name, v in flat(record) if math.isfinite(v) and name not in ("step", "time")}


def needed(module: str, extra: str) -> Any:
    """The module, or a sentence that says how to get it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in (module.split(".")[0], extra):
            raise
        raise GruppoError(
            f"tracking with {extra} needs the package {extra}, which is not installed: pip install 'gruppo[{extra}]'"
        ) from None


def identity(folder: Path) -> str:
    """A name for this run that a resumed run finds again and that a new run of the same name does not share."""
    file = folder / "track.json"
    if file.exists():
        return str(json.loads(file.read_text(encoding="utf-8"))["id"])
    name = f"{folder.resolve().name}-{secrets.token_hex(3)}"
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"id": name}) + "\n", encoding="utf-8")
    return name


@dataclass
class Trackio:
    """trackio: a local database and dashboard, no account."""

    folder: Path
    project: str = "gruppo"
    module: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.module = needed("trackio", "trackio")

    def start(self, settings: Mapping[str, Any]) -> None:
        self.module.init(project=self.project, name=identity(self.folder), config=dict(settings), resume="allow")

    def log(self, step: int, record: Mapping[str, Any]) -> None:
        self.module.log(numbers(record), step=step)

    def finish(self) -> None:
        self.module.finish()


@dataclass
class Wandb:
    """Weights & Biases; what is sent where is decided by its own settings (WANDB_MODE and the like)."""

    folder: Path
    project: str = "gruppo"
    module: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.module = needed("wandb", "wandb")

    def start(self, settings: Mapping[str, Any]) -> None:
        name = identity(self.folder)
        self.module.init(project=self.project, id=name, name=name, dir=str(self.folder), config=dict(settings), resume="allow")

    def log(self, step: int, record: Mapping[str, Any]) -> None:
        self.module.log(numbers(record), step=step)

    def finish(self) -> None:
        self.module.finish()


@dataclass
class TensorBoard:
    """Event files in `tensorboard/` of the run folder."""

    folder: Path
    module: Any = field(init=False, repr=False)
    writer: Any = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        needed("tensorboard", "tensorboard")  # torch's writer says less clearly what is missing
        self.module = needed("torch.utils.tensorboard", "tensorboard")

    def start(self, settings: Mapping[str, Any]) -> None:
        self.writer = self.module.SummaryWriter(log_dir=str(self.folder / "tensorboard"))
        self.writer.add_text("settings", f"```json\n{json.dumps(settings, indent=1, default=str)}\n```")

    def log(self, step: int, record: Mapping[str, Any]) -> None:
        for name, value in numbers(record).items():
            self.writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self.writer.close()


TRACKERS: dict[str, Callable[[Path], Tracker]] = {"trackio": Trackio, "wandb": Wandb, "tensorboard": TensorBoard}


def tracker(name: str, folder: Path) -> Tracker:
    """The tracker of that name for a run folder; a missing package is said here, before the run starts."""
    if name not in TRACKERS:
        raise GruppoError(f"there is no tracker {name!r}; there are: {', '.join(TRACKERS)}")
    return TRACKERS[name](folder)
