"""Math answers compared as mathematics, by math-verify, under a time limit that holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path as File
from typing import Any

from gruppo.graders.grade import Abstained, text_of
from gruppo.graders.pool import Failed, Pool
from gruppo.graders.text import inside
from gruppo.types import Group, GruppoError

WORKER = str(File(__file__).with_name("math_worker.py"))


@dataclass(frozen=True)
class MathAnswer:
    """1 where the completion's answer equals the column's as mathematics, else 0; `answers` holds what was extracted.

    Read is what follows the last `</think>`; inside `tag` only, if one is named. `\\boxed{}` goes before "the answer is",
    before the last expression. No answer and an unreadable one are wrong: 0. An answer on which sympy does not come back
    within `timeout` seconds, or that kills the worker, abstains; so does a path whose gold answer cannot be read.
    """

    column: str = "answer"
    timeout: float = 5.0
    workers: int = 2
    tag: str | None = None
    signal: str = "correct"
    memory: int = 2048  # MiB of address space per worker; a power tower asks for more than any machine has
    pool: Pool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.timeout > 0 or self.workers < 1:
            raise GruppoError(
                f"a math grader needs a time limit above 0 and at least one worker, not {self.timeout} s and {self.workers}"
            )
        object.__setattr__(self, "pool", Pool(WORKER, (str(self.memory), str(self.timeout))))

    @property
    def signals(self) -> tuple[str, ...]:
        return (self.signal,)

    def __call__(self, groups: list[Group]) -> list[dict[str, Any]]:
        pairs = [(gold(g.task.column(self.column)), inside(text_of(p.output), self.tag)) for g in groups for p in g.paths]
        unique = list(dict.fromkeys(p for p in pairs if p[1] is not None))  # samples agree often; each pair is judged once
        judged = dict(zip(unique, self.pool.map(unique, workers=self.workers, timeout=self.timeout)))
        rows = iter(pairs)
        out = []
        for group in groups:
            mine = [judged.get(next(rows), {"correct": False, "answer": ""}) for _ in group.paths]
            out.append({self.signal: [self.grade(m) for m in mine], "answers": [answer(m) for m in mine]})
        return out

    def grade(self, judged: Any) -> float | Abstained:
        """One worker's answer as a grade."""
        if isinstance(judged, Failed):
            return Abstained(judged.reason)
        if "failed" in judged:
            return Abstained(judged["failed"])
        if "unreadable" in judged:
            reason = f"the {self.column} column is not readable as mathematics: {judged['unreadable']!r}"
            return Abstained(reason, ValueError(reason))
        return float(judged["correct"])


def gold(value: Any) -> str:
    """A reference answer as text; the first of a list."""
    return str(value[0] if isinstance(value, (list, tuple)) and value else value)


def answer(judged: Any) -> str:
    """What was extracted; "" where nothing was, or nobody knows."""
    return "" if isinstance(judged, Failed) else judged.get("answer", "")
