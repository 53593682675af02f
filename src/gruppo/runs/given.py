"""Python objects that stand in for what a run file would name, and the copies by which a run is resumed without them."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gruppo.policies.load import load_tokenizer, save
from gruppo.recipe import Recipe
from gruppo.runs.config import RunConfig
from gruppo.runs.data import rows_of
from gruppo.runs.disk import whole
from gruppo.runs.evaluate import Metric
from gruppo.runs.folder import RunFolder
from gruppo.types import GruppoError

RECIPE_FILE, PEFT_FOLDER, INITIAL_FOLDER = "recipe.pickle", "peft", "initial"


@dataclass(frozen=True)
class Given:
    """Python objects that stand in for what the file would name."""

    model: Any = None
    tokenizer: Any = None
    peft_config: Any = None
    data: Any = None
    held_out: Any = None
    recipe: Recipe | None = None
    rewards: Sequence[Any] | None = None
    metrics: tuple[Metric, ...] = ()


def keep_objects(config: RunConfig, given: Given, folder: RunFolder, say: Callable[[str], None]) -> tuple[RunConfig, Given]:
    """Save Python objects into the run folder and name the copies in its description, so that the run can be resumed."""
    changes: dict[str, Any] = {}
    if given.recipe is not None:
        try:
            blob = pickle.dumps(given.recipe)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            again = "; what it remembers goes on into the next run with this object" if given.recipe.state else ""
            say(f"the recipe cannot be saved ({error}); resuming this run needs gruppo.resume(..., recipe=...){again}")
        else:
            with whole(folder.path / RECIPE_FILE) as temporary:
                temporary.write_bytes(blob)
            given = replace(given, recipe=pickle.loads(blob))  # its memories are this run's: the object may be trained again
        changes |= {"recipe": RECIPE_FILE, "recipe_args": {}}
    if given.model is not None and not isinstance(given.model, (str, Path)):
        tokenizer = given.tokenizer if given.tokenizer is not None else load_tokenizer(given.model.name_or_path)
        with whole(folder.path / INITIAL_FOLDER) as temporary:
            save(given.model, load_tokenizer(tokenizer), temporary)
        changes |= {"model": str((folder.path / INITIAL_FOLDER).resolve()), "tokenizer": None}
    if given.peft_config is not None:
        given.peft_config.save_pretrained(str(folder.path / PEFT_FOLDER))
    if given.data is not None:
        changes["data"] = _keep_rows(given.data, folder, "data.jsonl")
    if given.held_out is not None:
        changes["eval"] = config.eval.model_copy(update={"data": _keep_rows(given.held_out, folder, "held_out.jsonl")})
    # from here on the copies are read, as a resumed run does
    return config.model_copy(update=changes), replace(given, data=None, held_out=None)


def _keep_rows(source: Any, folder: RunFolder, name: str) -> str:
    rows, called = rows_of(source)
    try:
        text = "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows)
    except TypeError as error:
        raise GruppoError(
            f"a column of {called} is not plain data ({error}); the run keeps its rows as JSON, to be resumable"
        ) from None
    return str(folder.write(name, text).resolve())


def found_objects(given: Given, folder: RunFolder) -> Given:
    """What `keep_objects` saved, for whatever is not given again."""
    if given.recipe is None and (folder.path / RECIPE_FILE).exists():
        given = replace(given, recipe=pickle.loads((folder.path / RECIPE_FILE).read_bytes()))
    if given.peft_config is None and (folder.path / PEFT_FOLDER).is_dir():
        from peft import PeftConfig

        given = replace(given, peft_config=PeftConfig.from_pretrained(str(folder.path / PEFT_FOLDER)))
    return given
