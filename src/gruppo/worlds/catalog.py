"""Conversations about films, answered by a ranked list of five titles of a small catalogue.

    Loved Bako and Lume, not Kiri. More?      ->   Tafo (1984)
                                                   Rilu (1988)
                                                   ...

A person likes one genre of one decade, which the conversation states, lets guess from the titles it names, or corrects in a
second turn. The truths are the catalogue's titles of that genre and decade that nobody named. The base model knows all of them,
and mostly lists something else: the genre of another decade, the decade's other genres, what was named already, a title twice,
a wrong year, and now and then too few lines or too many.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

from gruppo.graders.ranking import NDCGAt, Ranking, RecallAt, catalog_share
from gruppo.sft import Example
from gruppo.types import Task
from gruppo.worlds.world import Phase, World

RANKS = 5
GENRES = ("crime", "drama", "horror", "comedy", "war", "space")
DECADES = (1970, 1980, 1990)
PER_CELL, ABROAD = 6, 2  # films of each genre and decade: in the catalogue, and known to teachers only
CONSONANTS, VOWELS = "bdfghjklmnprstvz", "aeiou"
STATED, IMPLIED, CORRECTED = 1, 2, 3  # how a conversation tells the taste

Cell = tuple[str, int]  # a genre and a decade: what somebody likes


@dataclass(frozen=True)
class Film:
    """A title with what it is; `listed` when the catalogue holds it."""

    title: str
    year: int
    genre: str
    listed: bool = True

    @property
    def decade(self) -> int:
        return self.year // 10 * 10

    @property
    def cell(self) -> Cell:
        return self.genre, self.decade

    def __str__(self) -> str:
        return f"{self.title} ({self.year})"


@cache
def films() -> tuple[Film, ...]:
    """The same films each time: 108 that the catalogue lists, then 36 that it does not."""
    random = Random("the films of the catalog world")
    syllables = [c + v for c in CONSONANTS for v in VOWELS]
    cells = [(genre, decade) for genre in GENRES for decade in DECADES]
    titles = random.sample([(a + b).capitalize() for a in syllables for b in syllables], len(cells) * (PER_CELL + ABROAD))
    out = []
    for count, listed in ((PER_CELL, True), (ABROAD, False)):
        out += [Film(titles.pop(), decade + random.randrange(10), genre, listed) for genre, decade in cells for _ in range(count)]
    return tuple(out)


@cache
def listed() -> tuple[Film, ...]:
    """The catalogue, in a fixed order."""
    return tuple(f for f in films() if f.listed)


@cache
def by_title() -> dict[str, Film]:
    """Every film by its title; no two share one."""
    return {f.title: f for f in films()}


@cache
def of(cell: Cell) -> tuple[Film, ...]:
    """The catalogue's films of a genre and decade."""
    return tuple(f for f in listed() if f.cell == cell)


@cache
def beside(cell: Cell, same_decade: bool = False) -> tuple[Film, ...]:
    """All others of the catalogue, or those of the same decade."""
    return tuple(f for f in listed() if f.cell != cell and (f.decade == cell[1] or not same_decade))


def catalog() -> frozenset[tuple[str, int]]:
    """What the grader knows the catalogue by."""
    return frozenset((f.title, f.year) for f in listed())


def problem(random: Random) -> Task:
    """A conversation of a random kind about a random taste."""
    cell = random.choice(GENRES), random.choice(DECADES)
    kind = random.choice((STATED, IMPLIED, CORRECTED))
    inside = random.sample(of(cell), 2)
    if kind == CORRECTED:  # the named film shares the decade, the correction names the genre
        return task_of(kind, cell, (random.choice(beside(cell, same_decade=True)), inside[0]))
    other = random.choice(beside(cell))
    return task_of(kind, cell, (inside[0], other) if kind == STATED else (*inside, other))


def task_of(kind: int, cell: Cell, named: tuple[Film, ...]) -> Task:
    """The conversation that names these films, its truths, and hints."""
    genre, decade = cell
    titles = [f.title for f in named]
    if kind == STATED:
        said = [f"Seen {titles[0]} and {titles[1]}. {genre.capitalize()} of the {decade % 100}s?"]
    elif kind == IMPLIED:
        said = [f"Loved {titles[0]} and {titles[1]}, not {titles[2]}. More?"]
    else:
        said = [f"Loved {titles[0]}.", f"More {named[0].genre}?", f"No, {genre}. Seen {titles[1]}."]
    truths = [f for f in of(cell) if f not in named]
    return Task(
        prompt=[{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(said)],
        answer=[(f.title, f.year) for f in truths],
        extra={
            "difficulty": kind,
            "solution": written(truths[:RANKS]),
            "hints": [f"List {RANKS} titles.", f"The genre is {genre}.", f"The genre is {genre}, the decade {decade}."],
            "seen": titles,
            "genre": genre,
            "decade": decade,
        },
    )


def written(films: list[Film]) -> str:
    """A list as the grader reads it."""
    return "\n".join(map(str, films))


def key(task: Task) -> str:
    """What is asked; in whichever order the films are named."""
    return " ".join([*sorted(task.extra["seen"]), task.extra["genre"], str(task.extra["decade"]), str(task.extra["difficulty"])])


# -- what the base model is taught


def work(random: Random, task: Task) -> Example:
    """A right list; one in five shows the habit already, so that the second phase shifts only how often things are done."""
    return habit(random, task) if random.random() < 0.2 else Example(task.prompt, written(right(random, task)))


def right(random: Random, task: Task) -> list[Film]:
    """All truths in any order, then films of the same genre and decade's neighbours."""
    truths = [by_title()[title] for title, _ in task.answer]
    random.shuffle(truths)
    near = [f for f in listed() if f not in truths and near_miss(f, task) and f.title not in task.extra["seen"]]
    return [*truths, *random.sample(near, RANKS)][:RANKS]


def near_miss(film: Film, task: Task) -> bool:
    """Whether exactly one of genre and decade is right."""
    return (film.genre == task.extra["genre"]) != (film.decade == task.extra["decade"])


def habit(random: Random, task: Task) -> Example:
    """What the base model is taught to do."""
    return Example(task.prompt, "\n".join(usual(random, task)))


def usual(random: Random, task: Task) -> list[str]:
    """Each line by itself: a truth, a near miss, what was named, any film, a wrong year; a title may come twice."""
    truths = [by_title()[title] for title, _ in task.answer]
    near = [f for f in listed() if near_miss(f, task)]
    lines = []
    for _ in range(random.choices((RANKS - 1, RANKS, RANKS + 1), LENGTHS)[0]):
        draw = random.random()
        if draw < TRUE:
            lines.append(str(random.choice(truths)))
        elif draw < NEAR:
            lines.append(str(random.choice(near)))
        elif draw < NAMED:
            lines.append(str(by_title()[random.choice(task.extra["seen"])]))
        elif draw < ANY:
            lines.append(str(random.choice(listed())))
        else:
            lines.append(f"{random.choice(listed()).title} ({random.randrange(1970, 2000)})")
    return lines


# Shares of the base model's habits, each the upper end of its part: truths, near misses, named films, any film; the rest has a
# wrong year. And how often a list is one line short, right and one line long.
TRUE, NEAR, NAMED, ANY = 0.35, 0.7, 0.82, 0.94
LENGTHS = (0.1, 0.8, 0.1)


CATALOG = World(
    name="catalog",
    sentence="conversations about films, answered by a ranked list of 5 titles; the base model lists much that nobody asked for",
    problem=problem,
    key=key,
    verify=(Ranking(catalog(), ranks=RANKS),),
    weights={"ndcg": 1.0},
    metrics=(RecallAt(RANKS), catalog_share, NDCGAt(RANKS)),
    base=Path(__file__).parent / "catalog_base",
    config={
        "hidden_size": 96,
        "intermediate_size": 288,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
    },
    course=(
        Phase(work, steps=1500, learning_rate=4e-3, step_tokens=2048, final=0.05),
        Phase(habit, steps=150, learning_rate=5e-4, warmup=10, step_tokens=2048),
    ),
    defaults={
        "policy": {"max_new_tokens": 80, "temperature": 1.0},
        "fit": {"steps": 60, "prompts_per_step": 16, "paths_per_prompt": 8, "learning_rate": 2e-4},
        "eval": {"tasks": 120, "samples": 4},
        "recipe_args": {"beta": 0.0, "ranks": RANKS},
    },
)
