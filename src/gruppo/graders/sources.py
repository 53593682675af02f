"""From what a person gives (functions, graders, names, folders, models) to a Grading, saying how each was understood."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path as File
from types import ModuleType
from typing import Any

import torch

from gruppo.graders.grade import Grading, described, name_of
from gruppo.graders.reward_model import RewardModel
from gruppo.graders.trl import TrlRewards, is_async, is_trl, plain_name, signature
from gruppo.types import GruppoError

RESERVED = ("reward", "logp_ref", "answers")  # signals that mean something else everywhere


def build(rewards: Any, weights: Mapping[str, float] | Sequence[float] | None = None, *, seconds: float = 120.0) -> Grading:
    """A Grading of one reward or a list of them.

    A reward is a TRL function, a grader, a loaded classification model or its folder, or the name of any of these as
    "module:function" or "path/file.py:function". `weights`: a list with one number per reward, in order, or numbers by signal
    (signals it does not name are measured and shown only); without weights every reward counts 1. `seconds` limits TRL functions.
    """
    given = list(rewards) if isinstance(rewards, (list, tuple)) else [rewards]
    if not given:
        raise GruppoError("no reward was given; nothing can be learned without at least one")
    graders: list[Any] = []
    functions: dict[str, Any] = {}
    mine: list[tuple[str, ...]] = []  # the signals of each reward, in the order given
    for one in given:
        one = load(one) if isinstance(one, (str, File)) else one
        if isinstance(one, torch.nn.Module):
            one = RewardModel(one)
        kind = kind_of(one)
        if kind == "grader":
            graders.append(one)
            mine.append(tuple(getattr(one, "signals", ())))
        else:
            name = free(plain_name(one), functions)
            functions[name] = one
            mine.append((name,))
    if functions:
        graders.append(TrlRewards(functions, seconds))
    signals = [name for names in mine for name in names]
    twice = next((name for name in signals if signals.count(name) > 1), None)
    if twice is not None:
        raise GruppoError(f"two rewards give the signal {twice!r}; call one of them differently with signal= or names=")
    return Grading(graders, weigh(mine, weights, given))


def weigh(
    mine: list[tuple[str, ...]], weights: Mapping[str, float] | Sequence[float] | None, given: Sequence[Any]
) -> dict[str, float]:
    """The weight of each signal in the reward."""
    if isinstance(weights, Mapping):
        known = [name for names in mine for name in names]
        for name in weights:
            if all(mine) and name not in known:
                raise GruppoError(
                    f"the weights name the signal {name!r}, but the rewards give: {', '.join(known)}{close(name, known)}"
                )
        result = {name: float(w) for name, w in weights.items()}
    else:
        if weights is not None and len(weights) != len(given):
            raise GruppoError(f"{len(weights)} weights were given for {len(given)} rewards; each reward needs exactly one")
        unnamed = [name_of(one) for one, names in zip(given, mine) if not names]
        if unnamed:
            raise GruppoError(
                f"the grader {unnamed[0]} does not say which signals enter the reward: give weights by name, "
                "or give it an attribute `signals` with their names"
            )
        each = [1.0] * len(given) if weights is None else [float(w) for w in weights]
        result = {name: w for names, w in zip(mine, each) for name in names}
    if not all(math.isfinite(w) for w in result.values()) or not any(result.values()):
        raise GruppoError(f"the reward's weights are {result}; they must be finite and not all 0")
    return result


def kind_of(one: Any) -> str:
    """ "trl" or "grader", read from the signature; a sentence for anything that is neither."""
    if not callable(one) or isinstance(one, type):
        raise GruppoError(f"{one!r} is no reward: a function, a grader, a classification model or the name of one belongs there")
    parameters = signature(one)
    first = next(iter(parameters.values()), None)
    if first is not None and first.name == "groups" and first.kind is not first.VAR_KEYWORD:
        return "grader"
    if is_trl(one):
        return "trl"
    raise GruppoError(
        f"the function {plain_name(one)}({', '.join(parameters)}) is neither a TRL reward function, which takes prompts and "
        "completions by these names and the columns of the data as keywords, nor a grader, whose first parameter is groups"
    )


def describe(grading: Grading) -> list[str]:
    """One line per grader: how it was understood and what it weighs."""
    lines = []
    for grader in grading.graders:
        if isinstance(grader, TrlRewards):
            for name, function in grader.functions.items():
                kind = "async TRL reward function" if is_async(function) else "TRL reward function"
                called = "" if plain_name(function) == name else f" (its name {plain_name(function)!r} was taken)"
                lines.append(f"{name}: {kind}{called}, {share(grading, name)}")
        else:
            names = getattr(grader, "signals", ()) or ("?",)
            lines.extend(f"{name}: grader {type(grader).__name__}, {share(grading, name)}" for name in names)
    return lines


def share(grading: Grading, name: str) -> str:
    """A signal's part in the reward."""
    return f"weight {grading.weights[name]:g}" if name in grading.weights else "measured only"


def free(name: str, taken: Mapping[str, Any]) -> str:
    """The name, numbered when it is taken."""
    n, found = 1, name
    while found in taken or found in RESERVED:
        n += 1
        found = f"{name}_{n}"
    return found


def load(source: str | File) -> Any:
    """What "module:name" or "path/file.py:name" points to, or the reward model in a folder."""
    text = str(source)
    if File(text).is_dir():
        return RewardModel(text)
    where, colon, name = text.rpartition(":")
    if not colon or not name.isidentifier():
        raise GruppoError(f"the reward {text!r} is neither a folder nor of the form module:function or path/file.py:function")
    module = from_file(File(where)) if where.endswith(".py") else from_module(where)
    if not hasattr(module, name):
        known = [k for k, v in vars(module).items() if callable(v) and not k.startswith("_")]
        raise GruppoError(f"{where} has no {name!r}{close(name, known)}; it has: {', '.join(known) or 'no function at all'}")
    found = getattr(module, name)
    if not isinstance(found, type):
        return found
    try:
        return found()
    except TypeError as error:
        raise GruppoError(f"{text} is a class and cannot be made without arguments ({error}); name an instance of it") from None


def from_module(name: str) -> ModuleType:
    """Import by name; the current folder counts, last, as it does for `python -m`."""
    here = str(File.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise GruppoError(f"there is no module {name!r} (looked in the installed packages and in {here})") from None
        raise GruppoError(f"importing {name!r} failed: {described(error)}") from error
    except Exception as error:
        raise GruppoError(f"importing {name!r} failed: {described(error)}") from error


def from_file(path: File) -> ModuleType:
    """Import a file; its own folder counts, last, so that it finds its neighbours."""
    if not path.is_file():
        raise GruppoError(f"there is no file {str(path)!r} (looked from {File.cwd()})")
    path = path.resolve()
    name = f"{path.stem}_{abs(hash(str(path))):x}"  # two files of one name may be rewards of one run
    if name in sys.modules:
        return sys.modules[name]
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise GruppoError(f"running {str(path)!r} failed: {described(error)}") from error
    return module


def close(name: str, known: Sequence[str]) -> str:
    """ " (did you mean ...?)" where something similar exists."""
    near = difflib.get_close_matches(name, known, 1)
    return f" (did you mean {near[0]!r}?)" if near else ""
