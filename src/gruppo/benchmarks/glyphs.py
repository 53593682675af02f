"""A small set in UniGenBench's format that the world `glyphs` can paint and its verifier can answer, without any judge.

    items = glyph_items(64)                                  the world's held-out tasks
    result = evaluate(items, paint(policy, items, "pictures"), glyph_checker)
    preferred                                                win rates by a pairwise judge, for Pref-GRPO

Its dimensions are UniGenBench's: Attribute - Shape, - Color and - Quantity, Entity Layout - Two-Dimensional Space where the
prompt names a side, and Grammar - Consistency where it asks for several things: all of them have one colour and one shape.
The benchmark keeps Quantity for three or more things; here every count has it. Scores are not comparable with published ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gruppo.benchmarks.unigenbench import Checks, Item, Point, Question
from gruppo.graders.images import ImageScore
from gruppo.graders.judge import Margin, WinRate
from gruppo.types import GruppoError, Task
from gruppo.worlds.glyphs import ANYWHERE, COLOURS, COUNTS, GLYPHS, PLURALS, POSITIONS, SHAPES, Seen, look, stands, task_of

SHAPE, COLOUR, QUANTITY = "Attribute - Shape", "Attribute - Color", "Attribute - Quantity"
LAYOUT, CONSISTENCY = "Entity Layout - Two-Dimensional Space", "Grammar - Consistency"


def glyph_items(n: int = 64) -> list[Item]:
    """The first n held-out tasks of the world, as prompts with test points."""
    return [item_of(i, task) for i, task in enumerate(GLYPHS.held_out(n))]


def item_of(index: int, task: Task) -> Item:
    """One task's prompt and what it asks for."""
    want = task.extra
    several = want["count"] > 1
    things = PLURALS[want["shape"]] if several else want["shape"]
    points = [
        Point(QUANTITY, f"{COUNTS[want['count'] - 1]} {things}"),
        Point(COLOUR, want["colour"]),
        Point(SHAPE, things),
    ]
    if want["position"] != ANYWHERE:
        points.append(Point(LAYOUT, f"at the {want['position']}"))
    if several:
        points.append(Point(CONSISTENCY, f"all {want['colour']} {things}"))
    return Item(index, str(task.prompt), tuple(points), "Glyphs", things)


def glyph_checker(questions: Sequence[Question]) -> list[Checks]:
    """What the world's verifier sees in each picture, test point by test point; it reads the descriptions alone."""
    seen = look([q.image for q in questions])
    return [tuple(int(met(point, s)) for point in q.item.points) for q, s in zip(questions, seen)]


def met(point: Point, seen: Seen) -> bool:
    """Does the picture meet this point? A picture without any thing meets none."""
    words, things = point.description.split(), seen.things
    if not things:
        return False
    if point.name == QUANTITY:
        return len(things) == COUNTS.index(words[0]) + 1
    if point.name == COLOUR:
        return all(t.colour == one_of(words, list(COLOURS)) for t in things)
    if point.name == SHAPE:
        shape = one_of([singular(w) for w in words], SHAPES)
        return all(t.shape == shape for t in things)
    if point.name == LAYOUT:
        return all(stands(t, one_of(words, list(POSITIONS))) for t in things)
    if point.name == CONSISTENCY:
        return None not in (things[0].colour, things[0].shape) and len({(t.colour, t.shape) for t in things}) == 1
    raise GruppoError(f"the verifier of the world glyphs cannot answer the test point {point.name!r}")


def glyph_score(images: Sequence[Any], prompts: Sequence[Any]) -> list[float]:
    """A scorer: the share of its prompt's test points that each picture meets."""
    items = [item_of(0, asked(str(prompt))) for prompt in prompts]
    checks = glyph_checker([Question(item, image) for item, image in zip(items, images)])
    return [sum(row) / len(row) for row in checks]


preferred = WinRate(Margin(glyph_score))
points = ImageScore(glyph_score, "points")  # measured, not trained: the mean win rate of a group is always 1/2


def asked(prompt: str) -> Task:
    """The task of one of the world's prompts."""
    words = prompt.split()
    position = words[-1] if words[-1] in POSITIONS else ANYWHERE
    shape = one_of([singular(w) for w in words], SHAPES)
    return task_of(COUNTS.index(one_of(words, COUNTS)) + 1, one_of(words, list(COLOURS)), shape, position)


def singular(word: str) -> str:
    """ "squares" -> "square"."""
    return next((shape for shape, plural in PLURALS.items() if plural == word), word)


def one_of(words: Sequence[str], known: Sequence[str]) -> str:
    """The one word that the world knows."""
    found = [w for w in words if w in known]
    if len(found) != 1:
        raise GruppoError(f"a test point of the world glyphs says {' '.join(words)!r}; one of {', '.join(known)} belongs there")
    return found[0]
