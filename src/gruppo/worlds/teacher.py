"""A teacher of the world `catalog`, and its lists repaired into demonstrations.

    python -m gruppo.worlds.teacher demonstrations.jsonl --rows 600

The teacher that stands in for a large model understands the conversation and knows more films than the catalogue lists. It
repeats what was named, strays, and always begins with the same famous films. `--teacher module:function` puts another one in its
place: a function from a task to lines "Title (Year)", best first.

The table compares its lists with what each step makes of them, on held-out conversations, by the world's own grader. The file
holds the repaired lists of training conversations, the data of `gruppo sft`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path as File
from random import Random
from typing import Any

import torch
from torch import Tensor

from gruppo.demonstrations import Repair, Teacher, demonstrations
from gruppo.graders.ranking import NDCGAt, RecallAt, catalog_share, parse
from gruppo.graders.sources import load
from gruppo.types import Group, Path, Task
from gruppo.worlds.catalog import CATALOG, DECADES, GENRES, RANKS, Film, by_title, films, key, listed

LINES = 8  # of the teacher's lists
TASTE, NEAR, NAMED = 0.6, 0.8, 0.9  # shares of its lines, each the upper end of its part; the rest is any film
SURE = 0.85  # how often the judge sees what a film is
NOISE = 0.5  # per dimension of an embedding


def teacher(task: Task) -> list[str]:
    """Eight lines, mostly what was asked for, the famous first; the same for the same question."""
    random = Random(f"teacher {key(task)}")
    named = [by_title()[t] for t in task.extra["seen"]]
    taste = [f for f in famous() if alike(f, task) == 1]
    near = [f for f in famous() if alike(f, task) == 0.5]
    lines: list[str] = []
    for _ in range(LINES):
        draw = random.random()
        pool = taste if draw < TASTE else near if draw < NEAR else named if draw < NAMED else list(films())
        # the min of two draws: fame decides
        at = min(random.randrange(len(pool)), random.randrange(len(pool)))
        if (line := str(pool[at])) not in lines:
            lines.append(line)
    return lines


@cache
def famous() -> tuple[Film, ...]:
    """All films, the famous first."""
    return tuple(Random("fame").sample(films(), len(films())))


def alike(film: Film, task: Task) -> float:
    """How well a film suits the taste: 1 for genre and decade, 0.5 for one of them."""
    return likeness(film, task.extra["genre"], task.extra["decade"])


def likeness(film: Film, genre: str, decade: int) -> float:
    return ((film.genre == genre) + (film.decade == decade)) / 2


def judge(task: Task, lines: Sequence[str]) -> list[float]:
    """-2 for a film beside the taste, 0 for one that misses genre or decade, 2 for one that suits; sometimes it cannot tell."""
    random = Random(f"judge {key(task)}")
    return [4 * alike(film_of(line) or listed()[0], task) - 2 if random.random() < SURE else 0.0 for line in lines]


# -- what a repair knows about films


def film_of(line: str) -> Film | None:
    """The film that a line names; None for one that nobody knows."""
    items = parse(line)
    found = by_title().get(items[0].title) if items else None
    return found if found is not None and found.year == items[0].year else None


@cache
def embeddings() -> dict[str, Tensor]:
    """A vector of length 1 for each film: its genre and its decade, and as much again that means nothing."""
    rng = torch.Generator().manual_seed(0)
    out = {}
    for f in films():
        says = torch.tensor([float(f.genre == g) for g in GENRES] + [float(f.decade == d) for d in DECADES])
        out[f.title] = torch.nn.functional.normalize(says + NOISE * torch.randn(len(says), generator=rng), dim=0)
    return out


@cache
def cosines() -> dict[str, Tensor]:
    """Of each film with each film of the catalogue."""
    table = torch.stack([embeddings()[f.title] for f in listed()])
    return {title: table @ vector for title, vector in embeddings().items()}


def similarity(lines: Sequence[str]) -> Tensor:
    """The cosine between a line's film and each film of the catalogue; 0 for a film that nobody knows."""
    known = [film_of(line) for line in lines]
    return torch.stack([torch.zeros(len(listed())) if f is None else cosines()[f.title] for f in known])


def sameness(lines: Sequence[str]) -> Tensor:
    """1 where a line is the film."""
    return torch.tensor([[float(line == str(c)) for c in listed()] for line in lines])


def overheard(task: Task) -> Tensor:
    """How often the conversation's words say a film's genre or decade."""
    said = " ".join(m["content"].lower() for m in task.prompt if m["role"] == "user")
    return torch.tensor([((f.genre in said) + (f"{f.decade % 100}s" in said)) / 2 for f in listed()])


def named(task: Task) -> Tensor:
    """What the conversation names."""
    return torch.tensor([f.title in task.extra["seen"] for f in listed()])


def truths(task: Task) -> Tensor:
    """What the person would like."""
    return torch.tensor([(f.title, f.year) in task.answer for f in listed()])


def repair() -> Repair:
    """The steps over the world's catalogue, before w and b are fitted."""
    return Repair([str(f) for f in listed()], similarity, sameness, overheard, named, judge)


# -- the lists of each step


@dataclass(frozen=True)
class Row:
    """How good the lists of one step are: means over held-out conversations."""

    lists: str
    catalog_share: float
    recall: float
    ndcg: float


def compared(tasks: Sequence[Task], by: Teacher, ready: Repair) -> Iterator[Row]:
    """The teacher's own lists and those after Remap, Reflect and Adjust."""
    plain = replace(ready, weight=None, bias=None)
    for name, made in {"teacher": None, "remap": replace(plain, judge=None), "reflect": plain, "adjust": ready}.items():
        write: Callable[[Task], Sequence[str]] = by if made is None else lambda t, made=made: made(t, by(t), RANKS)
        found = [graded(t, "\n".join(write(t))) for t in tasks]
        recall, ndcg = RecallAt(RANKS)(found), NDCGAt(RANKS)(found)
        yield Row(name, *catalog_share(found).values(), *recall.values(), *ndcg.values())


def graded(task: Task, text: str) -> Group:
    """One list as the world's grader sees it."""
    none = torch.zeros(0)
    group = Group(task, [Path(none, none, none, none.bool(), text)])
    return group.with_(signals=CATALOG.verify[0]([group])[0])


def rows(tasks: Sequence[Task], by: Teacher, ready: Repair) -> Iterator[dict[str, Any]]:
    """The data of `gruppo sft`."""
    for example in demonstrations(tasks, by, ready, RANKS):
        yield {"prompt": example.prompt, "completion": example.completion}


def main() -> None:
    """Write the demonstrations, and say what each step gained and which command reads them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=File)
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--tasks", type=int, default=120, help="held-out conversations that the steps are compared on")
    parser.add_argument("--teacher", help="module:function or file.py:function instead of the built-in one")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    by = load(asked.teacher) if asked.teacher else teacher
    tasks = [CATALOG.task(asked.seed, i) for i in range(asked.rows)]
    ready = repair().fitted(tasks, by, truths)
    asked.file.write_text("".join(json.dumps(row) + "\n" for row in rows(tasks, by, ready)), encoding="utf-8")
    print(f"{'lists':8}  in catalogue  recall@{RANKS}  ndcg@{RANKS}")
    for row in compared(CATALOG.held_out(asked.tasks), by, ready):
        print(f"{row.lists:8}  {row.catalog_share:12.3f}  {row.recall:8.3f}  {row.ndcg:6.3f}")
    print(f"{asked.rows} rows in {asked.file}; gruppo sft --model MODEL --data {asked.file} --output FOLDER")


if __name__ == "__main__":
    main()
