"""Tools: what the model is told about a function, and what comes back when it fails."""

from __future__ import annotations

import threading
import time
from typing import Any, Literal

import pytest

from gruppo.tools import Call, answer, tool
from gruppo.types import GruppoError


def find(what: str, most: int = 3, order: Literal["new", "old"] = "new", tags: list[str] | None = None) -> dict[str, Any]:
    """Find pages.

    More that a model need not know.
    """
    return {"what": what, "most": most, "order": order}


def test_the_schema_is_read_from_the_signature():
    assert tool(find).schema == {
        "type": "function",
        "function": {
            "name": "find",
            "description": "Find pages.",
            "parameters": {
                "type": "object",
                "properties": {
                    "what": {"type": "string"},
                    "most": {"type": "integer"},
                    "order": {"type": "string", "enum": ["new", "old"]},
                    "tags": {"type": "array", "items": {"type": "string"}},
                },
                "required": ["what"],
            },
        },
    }


def test_a_result_that_is_not_text_is_json():
    (reply,) = answer([tool(find)], [Call("find", {"what": "ä"})])
    assert reply.text == '{"what": "ä", "most": 3, "order": "new"}'


def test_a_value_outside_the_choices_is_answered():
    (reply,) = answer([tool(find)], [Call("find", {"what": "a", "order": "big"})])
    assert (reply.failed, reply.text) == (True, "error: the argument order of find must be one of new, old")


def test_replies_come_in_the_order_of_the_calls():
    def wait(seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    replies = answer([tool(wait)], [Call("wait", {"seconds": s}) for s in (0.05, 0.0, 0.02)])
    assert [r.text for r in replies] == ["0.05", "0.0", "0.02"]


def test_no_more_than_workers_run_at_once():
    running, most, lock = [0], [0], threading.Lock()

    def count(i: int) -> None:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.01)
        with lock:
            running[0] -= 1

    answer([tool(count)], [Call("count", {"i": i}) for i in range(9)], workers=3)
    assert most[0] == 3


def test_even_an_exit_is_only_a_failed_reply():
    def leave() -> None:
        raise SystemExit(3)

    (reply,) = answer([tool(leave)], [Call("leave")])
    assert (reply.failed, reply.text) == (True, "error: SystemExit: 3")


def test_a_function_without_a_name_needs_one():
    with pytest.raises(GruppoError, match="give it a name"):
        tool(lambda text: text)
    assert tool(lambda text: text, name="same").parameters["required"] == ["text"]


def test_parameters_a_model_cannot_write_are_refused():
    def starred(*words: str) -> None: ...

    def odd(thing: set) -> None: ...

    with pytest.raises(GruppoError, match="which a model cannot name"):
        tool(starred)
    with pytest.raises(GruppoError, match="the parameter 'thing' of a tool is a"):
        tool(odd)
