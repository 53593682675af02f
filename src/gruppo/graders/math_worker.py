"""The program that one worker of the math pool runs: one JSON line in, one JSON line out, killed from outside when it is late.

It is started as a file, in an interpreter of its own: it imports neither torch nor gruppo, so it starts in half a second,
and the person's script needs no `if __name__ == "__main__"`.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import signal
import sys
from typing import Any

MARGIN = 5.0  # seconds after which the kernel ends a worker whose parent died before it could


def main(memory: int, timeout: float) -> None:
    """Answer requests until the pipe closes."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints must not be read as an answer
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory * 2**20, memory * 2**20))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, ValueError, OSError):
        pass  # no such limits here; the wall clock still holds
    logging.disable(logging.CRITICAL)
    try:
        judge_one("1", r"\boxed{2}")  # imports, and the first parse builds the grammar's tables
    except ImportError as error:
        say(out, {"broken": f"{type(error).__name__}: {error}"})
        return
    say(out, {"ready": True})
    for line in sys.stdin:
        gold, text = json.loads(line)
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, timeout + MARGIN)
        try:
            answer = judge_one(gold, text)
        except MemoryError:
            answer = {"failed": f"needed more than {memory} MiB"}
        except RecursionError:
            answer = {"failed": "nested too deeply"}
        except Exception as error:
            answer = {"failed": f"raised {type(error).__name__}: {str(error)[:200]}"}
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
        say(out, answer)


def say(out: Any, message: dict[str, Any]) -> None:
    """One line to the parent, at once."""
    out.write(json.dumps(message) + "\n")
    out.flush()


@functools.lru_cache(maxsize=1)
def readings() -> list[Any]:
    """How expressions are found: `\\boxed{}` first, then the phrases of a final answer, then the last expression."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig

    return [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]


@functools.lru_cache(maxsize=256)
def gold_of(gold: str) -> tuple[Any, ...]:
    """The readings of a reference answer: GSM8K's `#### 72`, LaTeX with or without dollars, or a bare expression."""
    from math_verify import parse

    gold = gold.rpartition("####")[2].strip()
    if "$" not in gold and "\\boxed" not in gold:
        gold = f"\\boxed{{{gold}}}"
    return tuple(parse(gold, readings(), parsing_timeout=None, raise_on_error=True))  # pyright: ignore[reportArgumentType]


def judge_one(gold: str, text: str) -> dict[str, Any]:
    """Whether the text's answer equals the gold one, and the answer as a string ("" where the text has none)."""
    from math_verify import parse, verify

    golds = gold_of(gold)
    if not golds:
        return {"unreadable": gold[:80]}
    found = parse(text, readings(), parsing_timeout=None, raise_on_error=True)  # pyright: ignore[reportArgumentType]
    correct, error = False, None
    for one in golds:
        for other in found:
            try:
                correct = correct or verify(one, other, timeout_seconds=None, raise_on_error=True)
            except (MemoryError, RecursionError):
                raise
            except Exception as broke:  # this pair cannot be compared; another reading of the same answer may be
                error = broke
    if error is not None and not correct:
        raise error
    return {"correct": bool(correct), "answer": name(found)}


def name(found: list[Any]) -> str:
    """The answer's value as a string, so that 2/6 and 1/3 are one vote; its text where the value has no short form."""
    if not found:
        return ""
    try:
        value = str(found[0])
    except ValueError:  # an integer of more than 4300 digits
        value = ""
    return (value or str(found[-1]))[:200]


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
