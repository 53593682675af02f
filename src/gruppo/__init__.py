"""Group-relative policy optimization: every published method as one readable recipe under one training loop.

import gruppo
recipe = gruppo.recipe("grpo", n=8)
run = gruppo.train(model="Qwen/Qwen2.5-0.5B-Instruct", recipe=recipe, data=dataset, rewards=[correct])
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Imported when first used: `gruppo --help` must not wait for torch.
_WHERE = {
    "train": "gruppo.api",
    "resume": "gruppo.api",
    "Run": "gruppo.api",
    "compare": "gruppo.runs.compare",
    "recipe": "gruppo.recipes",
    "RECIPES": "gruppo.recipes",
    "Recipe": "gruppo.recipe",
    "RunConfig": "gruppo.runs.config",
    "GruppoError": "gruppo.types",
    "Task": "gruppo.types",
    "Path": "gruppo.types",
    "Group": "gruppo.types",
    "WORLDS": "gruppo.worlds",
}

if TYPE_CHECKING:
    from gruppo.api import Run, resume, train
    from gruppo.recipe import Recipe
    from gruppo.recipes import RECIPES, recipe
    from gruppo.runs.compare import compare
    from gruppo.runs.config import RunConfig
    from gruppo.types import Group, GruppoError, Path, Task
    from gruppo.worlds import WORLDS

__all__ = [
    "RECIPES",
    "WORLDS",
    "Group",
    "GruppoError",
    "Path",
    "Recipe",
    "Run",
    "RunConfig",
    "Task",
    "compare",
    "recipe",
    "resume",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'gruppo' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


class _Package(ModuleType):
    """Keeps `gruppo.train` and `gruppo.recipe` the functions that people call.

    Importing the modules of the same names would put the modules there; `from gruppo.train import fit` never looks there.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _WHERE and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
