"""UniGenBench (2508.20751, 2510.18701): 600 prompts with 1 to 10 test points each; a judge says of every picture which it meets.

The files are those of CodeGoat24/UniGenBench: `data/test_prompts_en.csv`, `_en_long`, `_zh`, `_zh_long`, with the columns index,
prompt_en, sub_dims_en (prompt_zh, sub_dims_zh). The last is JSON: theme, sub-theme, and two lists of one length, the names of the
test points ("Style", "Attribute - Quantity") and what each means in this prompt ("two pandas"). Pictures lie in one folder,
`<index>_<0 to 3>.png`.

    items = read("data/test_prompts_en.csv")
    result = evaluate(items, Folder("pictures"), VisionChecker(Chat("http://127.0.0.1:8000/v1", "QwenVL")))
    print(result.table())

A dimension's score is the share of its test points that are met, over all pictures. The primary dimension is the text before the
first "-" of a name, the overall score the mean over primary dimensions. A reply that cannot be read is skipped and counted; the
reference code asks again until it can (`attempts`). Scores depend on the judge: the published ones are Gemini 2.5 Pro's.

    python -m gruppo.benchmarks.unigenbench --prompts test.csv --images pictures --url http://host:8000/v1 --model QwenVL
"""

from __future__ import annotations

import argparse
import ast
import csv
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path as File
from typing import Any

import torch

from gruppo.graders.grade import Abstained
from gruppo.graders.vision import Chat
from gruppo.types import GruppoError


@dataclass(frozen=True)
class Columns:
    """Where the file keeps what: column names, and the keys inside the JSON column."""

    index: str = "index"
    prompt: str = "prompt_en"
    details: str = "sub_dims_en"
    names: str = "Testpoints"
    descriptions: str = "Testpoint Description"
    theme: str = "Primary Categories"
    subtheme: str = "Secondary Categories"


ENGLISH = Columns()
CHINESE = Columns("index", "prompt_zh", "sub_dims_zh", "考点", "考点对应描述", "一级垂类", "二级垂类")


@dataclass(frozen=True)
class Point:
    """One test point: its dimension's name, and what it asks of this prompt's pictures."""

    name: str
    description: str

    @property
    def primary(self) -> str:
        """The name before the first "-"."""
        return self.name.partition("-")[0].strip()


@dataclass(frozen=True)
class Item:
    """One prompt and its test points."""

    index: int
    prompt: str
    points: tuple[Point, ...]
    theme: str = ""
    subtheme: str = ""


def read(path: File | str, columns: Columns = ENGLISH) -> list[Item]:
    """The items of a file; a sentence with the row where one cannot be read."""
    if not File(path).is_file():
        raise GruppoError(f"there is no file {str(path)!r} with UniGenBench prompts")
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        missing = {columns.index, columns.prompt, columns.details} - set(rows.fieldnames or ())
        if missing:
            raise GruppoError(f"{path} lacks the column {sorted(missing)[0]!r}; it has: {', '.join(rows.fieldnames or ())}")
        items = [_item(row, n, path, columns) for n, row in enumerate(rows, 1)]
    index, times = Counter(i.index for i in items).most_common(1)[0] if items else (0, 0)
    if times != 1:
        what = f"{times} prompts of index {index}; pictures are found by it" if items else "no prompts"
        raise GruppoError(f"{path} has {what}")
    return items


def _item(row: dict[str, Any], n: int, path: File | str, columns: Columns) -> Item:
    try:
        details = json.loads(row[columns.details])
        names, descriptions = details[columns.names], details[columns.descriptions]
        index = int(row[columns.index])
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise GruppoError(f"prompt {n} of {path} cannot be read: {type(error).__name__} {error}") from error
    if not names or len(names) != len(descriptions):
        raise GruppoError(f"prompt {n} of {path} names {len(names)} test points and describes {len(descriptions)}")
    points = tuple(Point(str(a), str(b)) for a, b in zip(names, descriptions))
    return Item(index, row[columns.prompt], points, str(details.get(columns.theme, "")), str(details.get(columns.subtheme, "")))


def write(items: Sequence[Item], path: File | str, columns: Columns = ENGLISH) -> None:
    """The same format, for a set of one's own."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow((columns.index, columns.prompt, columns.details))
        for item in items:
            details = {
                columns.theme: item.theme,
                columns.subtheme: item.subtheme,
                columns.names: [p.name for p in item.points],
                columns.descriptions: [p.description for p in item.points],
            }
            out.writerow((item.index, item.prompt, json.dumps(details, ensure_ascii=False)))


# -- pictures ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Folder:
    """Pictures as `<index>_<number>.png`."""

    path: File | str

    def file(self, item: Item, number: int) -> File:
        """Where a picture lies."""
        return File(self.path) / f"{item.index}_{number}.png"

    def __call__(self, item: Item, number: int) -> Any:
        from PIL import Image

        if not self.file(item, number).is_file():
            raise GruppoError(f"picture {number} of prompt {item.index} is missing: there is no file {self.file(item, number)}")
        with Image.open(self.file(item, number)) as picture:
            return picture.convert("RGB")


def paint(policy: Any, items: Sequence[Item], folder: File | str, *, n: int = 4, seed: int = 0, batch: int = 8) -> Folder:
    """n pictures per prompt by a flow policy, on its evaluation grid; pictures that are there already are kept."""
    found = Folder(folder)
    File(folder).mkdir(parents=True, exist_ok=True)
    for at in range(0, len(items), batch):
        some = [(item, j) for item in items[at : at + batch] for j in range(n)]
        if all(found.file(*one).is_file() for one in some):
            continue
        paths = policy.sample([item.prompt for item, _ in some], g=torch.Generator().manual_seed(seed * 1_000_003 + at))
        for one, path in zip(some, paths):
            part = found.file(*one).with_suffix(".part")
            path.output.save(part, "PNG")
            os.replace(part, found.file(*one))  # a picture that is there is whole
    return found


# -- judging -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Question:
    """Which of the item's test points does this picture meet?"""

    item: Item
    image: Any


Checks = tuple[int, ...]  # 1 or 0 for every test point
Checker = Callable[[Sequence[Question]], Sequence[Any]]  # Checks; None = the reply was not readable; Abstained = none came

INSTRUCTION = """You check whether a generated image follows its prompt. Judge only what is visible; do not guess at a background.

The prompt: {prompt}

The image must meet these {count} checkpoints, each given as its dimension and what it means in this prompt:
{points}

Describe for each checkpoint what the image shows. Then decide: 1 if the image meets it, 0 if not or if it is unclear. End with
exactly one list of {count} numbers, in the order of the checkpoints:
<score>[1, 0, ...]</score>"""


@dataclass(frozen=True)
class Scores:
    """Reads the last <score>[1, 0, ...]</score> of a reply; None unless it has the right length and only 0 and 1."""

    tag: str = "score"

    def __call__(self, reply: str, count: int) -> Checks | None:
        found = re.findall(rf"<{self.tag}>(.*?)</{self.tag}>", reply, re.DOTALL | re.IGNORECASE)
        try:
            listed = ast.literal_eval(found[-1].strip()) if found else None
        except (ValueError, SyntaxError):
            return None
        if not isinstance(listed, list) or len(listed) != count or any(type(v) is not int or v not in (0, 1) for v in listed):
            return None
        return tuple(listed)


SCORES = Scores()


@dataclass(frozen=True)
class VisionChecker:
    """Asks a vision-language model; an unreadable reply is asked for anew until there were `attempts`."""

    chat: Chat
    instruction: str = INSTRUCTION
    parse: Callable[[str, int], Checks | None] = SCORES
    attempts: int = 1

    def __call__(self, questions: Sequence[Question]) -> list[Any]:
        out: list[Any] = [None] * len(questions)
        left = list(range(len(questions)))
        for _ in range(self.attempts):
            replies = self.chat([(self.text(questions[i].item), [questions[i].image]) for i in left])
            for i, reply in zip(left, replies):
                out[i] = reply if isinstance(reply, Abstained) else self.parse(reply, len(questions[i].item.points))
            left = [i for i in left if out[i] is None]
            if not left:
                break
        return out

    def text(self, item: Item) -> str:
        """What is asked about one picture of this item."""
        points = "\n".join(f"{k}. {p.name}: {p.description}" for k, p in enumerate(item.points, 1))
        said = self.instruction.replace("{count}", str(len(item.points))).replace("{points}", points)
        return said.replace("{prompt}", item.prompt)


@dataclass
class Count:
    """Test points that were met, of all that were judged."""

    met: int = 0
    all: int = 0

    @property
    def score(self) -> float:
        return self.met / self.all if self.all else float("nan")


@dataclass
class Result:
    """Counts per sub-dimension, and the pictures that could not be judged."""

    sub: dict[str, Count] = field(default_factory=dict)
    judged: int = 0
    unreadable: int = 0
    unanswered: int = 0

    def add(self, item: Item, checks: Any) -> None:
        """One picture."""
        if isinstance(checks, Abstained):
            self.unanswered += 1
        elif checks is None:
            self.unreadable += 1
        else:
            if len(checks) != len(item.points) or any(c not in (0, 1) for c in checks):
                raise GruppoError(
                    f"a checker answered {tuple(checks)!r} to the {len(item.points)} test points of prompt {item.index}; "
                    "one 0 or 1 for each belongs there"
                )
            self.judged += 1
            for point, met in zip(item.points, checks):
                count = self.sub.setdefault(point.name, Count())
                count.met, count.all = count.met + int(met), count.all + 1

    @property
    def primary(self) -> dict[str, Count]:
        """Counts per primary dimension, in the order in which they came up."""
        out: dict[str, Count] = {}
        for name, count in self.sub.items():
            whole = out.setdefault(Point(name, "").primary, Count())
            whole.met, whole.all = whole.met + count.met, whole.all + count.all
        return out

    @property
    def overall(self) -> float:
        """The mean score over primary dimensions."""
        scores = [count.score for count in self.primary.values()]
        return sum(scores) / len(scores) if scores else float("nan")

    def table(self) -> str:
        """Every dimension in percent, as Markdown."""
        lines = ["| dimension | met | of | score |", "|---|---|---|---|"]
        for name, whole in self.primary.items():
            lines.append(f"| **{name}** | {whole.met} | {whole.all} | {whole.score:.2%} |")
            parts = {k: c for k, c in sorted(self.sub.items()) if Point(k, "").primary == name and k != name}
            lines += [f"| {k} | {c.met} | {c.all} | {c.score:.2%} |" for k, c in parts.items()]
        lines.append(f"| overall | | | {self.overall:.2%} |")
        lines.append(f"\n{self.judged} pictures judged, {self.unreadable} replies unreadable, {self.unanswered} not answered")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Numbers for a file."""
        named = {"primary": self.primary, "sub": self.sub}
        scores = {kind: {k: {**asdict(c), "score": c.score} for k, c in counts.items()} for kind, counts in named.items()}
        return {"overall": self.overall, **scores, **{k: getattr(self, k) for k in ("judged", "unreadable", "unanswered")}}


def evaluate(
    items: Sequence[Item], pictures: Callable[[Item, int], Any], check: Checker, *, n: int = 4, batch: int = 64
) -> Result:
    """Judge n pictures of every item, `batch` of them at a time; nothing judged at all is a sentence."""
    result = Result()
    asked = [(item, j) for item in items for j in range(n)]
    for at in range(0, len(asked), batch):
        some = [Question(item, pictures(item, j)) for item, j in asked[at : at + batch]]
        answers = list(check(some))
        if len(answers) != len(some):
            raise GruppoError(f"a checker was asked about {len(some)} pictures and answered {len(answers)} times")
        for question, checks in zip(some, answers):
            result.add(question.item, checks)
    if not result.judged:
        raise GruppoError(
            f"none of {len(asked)} pictures was judged: {result.unreadable} replies were not readable, "
            f"{result.unanswered} never came"
        )
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Score a folder of pictures with a vision-language model behind an endpoint."""
    parser = argparse.ArgumentParser(prog="python -m gruppo.benchmarks.unigenbench", description=main.__doc__)
    parser.add_argument("--prompts", required=True, help="the benchmark's csv file")
    parser.add_argument("--images", required=True, help="folder of <index>_<number>.png")
    parser.add_argument("--url", required=True, help="OpenAI-compatible endpoint, up to and with /v1")
    parser.add_argument("--model", required=True, help="the model's name there")
    parser.add_argument("--key", help="name of the environment variable that holds the key, where one is needed")
    parser.add_argument("--n", type=int, default=4, help="pictures per prompt")
    parser.add_argument("--attempts", type=int, default=1, help="how often an unreadable reply is asked for")
    parser.add_argument("--chinese", action="store_true", help="the file has the columns prompt_zh and sub_dims_zh")
    parser.add_argument("--out", help="write the numbers to this JSON file")
    given = parser.parse_args(arguments)
    try:
        items = read(given.prompts, CHINESE if given.chinese else ENGLISH)
        chat = Chat(given.url, given.model, os.environ.get(given.key) if given.key else None)
        result = evaluate(items, Folder(given.images), VisionChecker(chat, attempts=given.attempts), n=given.n)
    except GruppoError as error:
        sys.exit(f"error: {error}")
    if given.out:
        File(given.out).write_text(json.dumps(result.to_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(result.table())


if __name__ == "__main__":
    main()
