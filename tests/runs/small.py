"""A run small enough to train in a second: a tiny model on disk, forty rows of data, a reward in a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.tiny import tiny_folder

from gruppo.runs.config import RunConfig, assemble, merge
from gruppo.runs.session import Session

REWARD = """
def vowels(prompts, completions, **columns):
    return [sum(c in "aeiou0123" for c in text) / 10 for text in completions]
"""


class Quiet:
    """A display that remembers the records instead of printing them."""

    def __init__(self, at_step: Any = None) -> None:
        self.records: list[dict[str, Any]] = []
        self.at_step = at_step

    def step(self, record: dict[str, Any], groups: Any) -> None:
        self.records.append(record)
        if self.at_step is not None:
            self.at_step(record["step"])

    def evaluation(self, step: int, scores: Any) -> None:
        pass


def silent(sentence: str) -> None:
    """Says nothing."""


def rows(n: int = 40) -> list[dict[str, Any]]:
    return [{"prompt": f"{i}+{i % 7}=", "answer": str(i + i % 7), "difficulty": i % 3} for i in range(n)]


def write_rows(file: Path, some: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in some))
    return file


def files(folder: Path, family: str = "qwen3") -> dict[str, Any]:
    """The three files that a person brings, and numbers that make the run short."""
    if not (folder / "model").exists():
        tiny_folder(folder / "model", family)
        write_rows(folder / "rows.jsonl", rows())
        (folder / "vowels.py").write_text(REWARD)
    return {
        "model": str(folder / "model"),
        "data": str(folder / "rows.jsonl"),
        "rewards": [f"{folder / 'vowels.py'}:vowels"],
        "folder": str(folder / "runs"),
        "policy": {"max_new_tokens": 6, "threads": 1, "device": "cpu"},
        "fit": {"steps": 4, "prompts_per_step": 3, "paths_per_prompt": 4, "learning_rate": 1e-3},
        "eval": {"tasks": 2, "samples": 2, "greedy": False},
        "track": {"report": False, "save_every": 0, "groups_every": 2},
    }


def config(folder: Path, family: str = "qwen3", **changes: Any) -> RunConfig:
    return assemble(merge(files(folder, family), changes))


def session(folder: Path, family: str = "qwen3", **changes: Any) -> Session:
    return Session.new(config(folder, family, **changes), say=silent)


def timeless(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metrics without what the clock decides."""
    return [{k: v for k, v in r.items() if k not in ("time", "seconds", "tokens_per_s")} for r in records]
