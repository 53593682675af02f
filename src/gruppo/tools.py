"""Tools: Python functions that a model may call, described by a schema, run with a wall-clock limit.

A tool may fail in any way and the conversation goes on: what went wrong becomes a sentence that the model reads and a mark
on the reply that the run counts.
"""

from __future__ import annotations

import inspect
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from gruppo.types import GruppoError

KINDS = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object"}
LONGEST = 200  # characters of an exception's message that the model is shown


@dataclass(frozen=True)
class Tool:
    """A function under a name, with what the model is told about it and the seconds it may take."""

    name: str
    run: Callable[..., Any]
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}, "required": []})
    seconds: float = 10.0

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise GruppoError(f"the tool {self.name!r} may take {self.seconds} seconds; give it more than 0")

    @property
    def schema(self) -> dict[str, Any]:
        """The function schema that chat templates take as one of `tools`."""
        about = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": about}

    def missing(self, arguments: Mapping[str, Any]) -> str:
        """What is wrong with these arguments, as a sentence for the model; empty when nothing is."""
        known = self.parameters.get("properties", {})
        for name in self.parameters.get("required", []):
            if name not in arguments:
                return f"{self.name} needs the argument {name}"
        for name, value in arguments.items():
            if name not in known:
                return f"{self.name} has no argument {name}"
            kind = known[name].get("type")
            if kind is not None and not _is(value, kind):
                return f"the argument {name} of {self.name} must be a JSON {kind}"
            if "enum" in known[name] and value not in known[name]["enum"]:
                return f"the argument {name} of {self.name} must be one of {', '.join(map(str, known[name]['enum']))}"
        return ""


def tool(
    run: Callable[..., Any],
    *,
    name: str | None = None,
    description: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    seconds: float = 10.0,
) -> Tool:
    """A function as a tool: its name, the first paragraph of its docstring, and its parameters by their type hints."""
    named = name or getattr(run, "__name__", "")
    if not named.isidentifier():
        raise GruppoError(f"a tool's name must be one word of letters, digits and underscores, not {named!r}; give it a name")
    about = description if description is not None else " ".join((inspect.getdoc(run) or "").split("\n\n")[0].split())
    return Tool(named, run, about, schema_of(run) if parameters is None else parameters, seconds)


def schema_of(run: Callable[..., Any]) -> dict[str, Any]:
    """The JSON schema of a function's parameters: type hints give the kinds, a default makes a parameter optional."""
    hints = get_type_hints(run if inspect.isroutine(run) else type(run).__call__)
    properties, required = {}, []
    for p in inspect.signature(run).parameters.values():
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD, p.POSITIONAL_ONLY):
            raise GruppoError(f"the tool {run!r} takes {p}, which a model cannot name; write every parameter out by name")
        properties[p.name] = _schema(hints.get(p.name, Any), p.name)
        if p.default is p.empty:
            required.append(p.name)
    return {"type": "object", "properties": properties, "required": required}


def _schema(kind: Any, name: str) -> dict[str, Any]:
    if kind is Any:
        return {}
    if get_origin(kind) is Literal:
        values = list(get_args(kind))
        return {"type": KINDS.get(type(values[0]), "string"), "enum": values}
    if get_origin(kind) in (Union, UnionType):
        rest = [k for k in get_args(kind) if k is not type(None)]
        return _schema(rest[0], name) if len(rest) == 1 else {}
    origin = get_origin(kind) or kind
    if origin not in KINDS:
        raise GruppoError(
            f"the parameter {name!r} of a tool is a {kind}, but a model writes JSON: use str, int, float, bool, list, dict, "
            "Literal, or give `parameters` as a JSON schema"
        )
    inner = get_args(kind)
    if origin is list and inner:
        return {"type": "array", "items": _schema(inner[0], name)}
    return {"type": KINDS[origin]}


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "number":
        return isinstance(value, (int, float))
    return any(isinstance(value, python) for python, json_kind in KINDS.items() if json_kind == kind)


@dataclass(frozen=True)
class Call:
    """What the model asked for: a tool and its arguments, or `wrong`, a sentence about a call that cannot be read."""

    tool: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    wrong: str = ""


@dataclass(frozen=True)
class Reply:
    """What a call gave: the text the model reads, and whether it is a complaint (`failed`) or a time-out (`late` too)."""

    tool: str
    text: str
    failed: bool = False
    late: bool = False


def answer(tools: Sequence[Tool], calls: Sequence[Call], workers: int = 8) -> list[Reply]:
    """The replies to these calls, in order; at most `workers` run at once. Nothing that a tool does can raise here."""
    by_name = {t.name: t for t in tools}
    replies: list[Reply | None] = [None] * len(calls)
    ready: list[int] = []
    for i, call in enumerate(calls):
        known = by_name.get(call.tool)
        wrong = call.wrong
        if not wrong and known is None:
            wrong = f"there is no tool {call.tool}; there are: {', '.join(by_name)}"
        if not wrong and known is not None:
            wrong = known.missing(call.arguments)
        if wrong:
            replies[i] = Reply(call.tool, f"error: {wrong}", failed=True)
        else:
            ready.append(i)
    for at in range(0, len(ready), workers):
        some = ready[at : at + workers]
        # Not an executor: its threads are joined at exit, so one tool that hangs would keep the program from ending.
        started = [_Running(by_name[calls[i].tool], calls[i]) for i in some]
        for i, running in zip(some, started):
            replies[i] = running.reply()
    return [r for r in replies if r is not None]


class _Running:
    """One call in a thread of its own, which is abandoned when the time is up."""

    def __init__(self, tool: Tool, call: Call) -> None:
        self.tool, self.call, self.found = tool, call, []
        self.until = time.monotonic() + tool.seconds
        self.thread = threading.Thread(target=self._work, daemon=True, name=f"tool {tool.name}")
        self.thread.start()

    def _work(self) -> None:
        try:
            self.found.append(Reply(self.tool.name, text_of(self.tool.run(**self.call.arguments))))
        except BaseException as error:  # the declared boundary: somebody's tool broke, and the model reads about it
            said = f"{type(error).__name__}: {error}".removesuffix(": ")[:LONGEST]
            self.found.append(Reply(self.tool.name, f"error: {said}", failed=True))

    def reply(self) -> Reply:
        self.thread.join(max(0.0, self.until - time.monotonic()))
        if self.found:
            return self.found[0]
        return Reply(self.tool.name, f"error: {self.tool.name} took longer than {self.tool.seconds:g} s", failed=True, late=True)


def text_of(value: Any) -> str:
    """A tool's result as the model reads it: text as it is, nothing as no text, anything else as JSON where it can be."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
