"""Questions about people, answered by searching a corpus of facts, at most 3 times.

    river of bako?   ->   <search>bako town</search><result>bako town: miren</result>
                          <search>miren river</search><result>miren river: oder</result><answer>oder</answer>

A question needs 0 searches (a letter of the name), 1 (a fact about the person) or 2 (a fact about the person's friend or
town). There are far too many facts to learn by heart. The base model can search, read and follow a fact to the next, but
it mostly does not: it guesses at once, stops half-way, or looks up what nobody asked for.
"""

from __future__ import annotations

import re
import sqlite3
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from gruppo.graders.grade import text_of
from gruppo.rollouts.conversation import Tags, Talk, Transcript, talked
from gruppo.sft import Example
from gruppo.tools import tool
from gruppo.types import Group, Task
from gruppo.worlds.world import Phase, World, answer_of, user

CALLS = 3
CONSONANTS, VOWELS = "bdfghjklmnprstvz", "aeiou"
JOBS = ("baker", "smith", "nurse", "pilot", "judge", "miner", "cook", "tailor", "clerk", "farmer")
RIVERS = ("elbe", "oder", "nile", "rhine", "tagus", "volga", "loire", "tiber", "ganges", "indus")
PEOPLE, TOWNS = 4000, 200
NOTHING = "nothing"
SHAPE = re.compile(r"(?:<search>[^<>]*</search><result>[^<>]*</result>){0,3}<answer>[^<>]*</answer>")


@dataclass(frozen=True)
class Facts:
    """Who does what where: `about[name][relation]` is a name, a job or a river."""

    about: dict[str, dict[str, str]]
    people: tuple[str, ...]


@cache
def facts() -> Facts:
    """The same facts each time: 4000 people with job, town and friend, 200 towns with a river."""
    random = Random("the corpus of the search world")
    syllables = [c + v for c in CONSONANTS for v in VOWELS]
    people = random.sample([a + b for a in syllables for b in syllables], PEOPLE)
    towns = random.sample([a + b + c for a in syllables for b in syllables for c in "nrs"], TOWNS)
    about = {town: {"river": random.choice(RIVERS)} for town in towns}
    for name in people:
        friend = random.choice([p for p in random.sample(people, 2) if p != name])
        about[name] = {"job": random.choice(JOBS), "town": random.choice(towns), "friend": friend}
    return Facts(about, tuple(people))


class Corpus:
    """The facts in an SQLite full-text index in memory."""

    def __init__(self, known: Facts) -> None:
        self.lock = threading.Lock()  # tools run in threads of their own
        self.base = sqlite3.connect(":memory:", check_same_thread=False)
        self.base.execute("CREATE VIRTUAL TABLE facts USING fts5(about, relation, value UNINDEXED)")
        rows = [(name, relation, value) for name, own in known.about.items() for relation, value in own.items()]
        self.base.executemany("INSERT INTO facts VALUES (?, ?, ?)", rows)

    def find(self, query: str) -> str:
        """The best fact that has all words of the query, or `nothing`."""
        words = re.findall(r"[a-z0-9]+", query.lower())[:8]
        if not words:
            return NOTHING
        # Every word is quoted, so that AND, NEAR, * and column names are words too and never operators of the index.
        match = " ".join(f'"{word}"' for word in words)
        with self.lock:
            found = self.base.execute(
                "SELECT about, relation, value FROM facts WHERE facts MATCH ? ORDER BY rank, rowid LIMIT 1", (match,)
            ).fetchone()
        return NOTHING if found is None else f"{found[0]} {found[1]}: {found[2]}"


@cache
def corpus() -> Corpus:
    """The index, built when it is first asked."""
    return Corpus(facts())


def search(query: str) -> str:
    """Find a fact: the name of a person or town and one of job, town, friend, river."""
    return corpus().find(query)


@dataclass(frozen=True)
class Kind:
    """A kind of question: its wording, the relations to follow, and how somebody guesses who did not look it up."""

    words: str
    hops: tuple[str, ...]
    guess: Callable[[Random, str], str]


def any_letter(random: Random, name: str) -> str:
    return random.choice(CONSONANTS + VOWELS)


def any_job(random: Random, name: str) -> str:
    return random.choice(JOBS)


def any_river(random: Random, name: str) -> str:
    return random.choice(RIVERS)


def same(random: Random, name: str) -> str:
    return name


KINDS = (
    Kind("first letter of {}?", (), any_letter),
    Kind("last letter of {}?", (), any_letter),
    Kind("job of {}?", ("job",), any_job),
    Kind("town of {}?", ("town",), same),
    Kind("friend of {}?", ("friend",), same),
    Kind("river of {}?", ("town", "river"), any_river),
    Kind("job of friend of {}?", ("friend", "job"), any_job),
    Kind("town of friend of {}?", ("friend", "town"), same),
)


def problem(random: Random) -> Task:
    """A question of a random number of hops about a random person."""
    hops = random.choice([0, 1, 1, 2, 2])
    return task_of(random.choice([k for k in KINDS if len(k.hops) == hops]), random.choice(facts().people))


def task_of(kind: Kind, name: str) -> Task:
    """The question with its answer, the searches that lead there, and hints."""
    plan, here = [], name
    for relation in kind.hops:
        plan.append(f"{here} {relation}")
        here = facts().about[here][relation]
    answer = here if kind.hops else {"first": name[0], "last": name[-1]}[kind.words.split()[0]]
    turns = [*[f"<search>{query}</search>" for query in plan], f"<answer>{answer}</answer>"]
    return Task(
        prompt=user(kind.words.format(name)),
        answer=answer,
        extra={
            "difficulty": len(kind.hops),
            "solution": transcript(turns),
            "hints": hints(plan),
            "kind": KINDS.index(kind),
            "person": name,
        },
    )


def hints(plan: list[str]) -> list[str]:
    """Three tiers: look it up or not, how often, and what to ask."""
    if not plan:
        return ["Do not search.", "Searches needed: 0.", "The name spells it."]
    return ["Search for it.", f"Searches needed: {len(plan)}.", "Search " + ", then ".join(plan)]


def transcript(turns: list[str]) -> str:
    """The whole text of a conversation with these turns of the model."""
    out = ""
    for turn in turns:
        query = turn.removeprefix("<search>").removesuffix("</search>")
        out += turn if query == turn else f"{turn}<result>{search(query)}</result>"
    return out


def key(task: Task) -> str:
    """The person asked about: nobody held out is ever asked about in training."""
    return task.extra["person"]


def normal(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces: the normalisation of exact match in question answering."""
    words = re.sub(r"[^\w\s]", " ", text.lower()).split()
    return " ".join(w for w in words if w not in ("a", "an", "the")) or text.strip().lower()


@dataclass(frozen=True)
class ExactMatch:
    """`correct`: 1 when the one tagged answer in the model's own words is the gold answer, both normalised."""

    def __call__(self, groups: list[Group]) -> list[dict[str, Any]]:
        return [{"correct": [float(self.one(p.output, g.task)) for p in g.paths]} for g in groups]

    @staticmethod
    def one(output: Any, task: Task) -> bool:
        own = output.said if isinstance(output, Transcript) else text_of(output)
        said = answer_of(own)
        return said is not None and normal(said) == normal(str(task.answer))


@dataclass(frozen=True)
class Shape:
    """`format`: 1 when the text is searches with their results and then one answer, and nothing around them."""

    def __call__(self, groups: list[Group]) -> list[dict[str, Any]]:
        return [{"format": [float(SHAPE.fullmatch(text_of(p.output)) is not None) for p in g.paths]} for g in groups]


def work(random: Random, task: Task) -> Example:
    """One turn of a conversation that searches as often as the question needs; one in five shows the habit already.

    With the guesses known beforehand, the second phase only shifts how often each thing is done; learning to guess there
    would cost the skill of copying names.
    """
    return turn_of(random, task, usual if random.random() < 0.2 else right)


def habit(random: Random, task: Task) -> Example:
    """One turn of what the base model is taught to do."""
    return turn_of(random, task, usual)


def right(random: Random, task: Task) -> list[str]:
    """The model's turns of the solution; now and then after a search that nobody needed, which it survives."""
    plan = [*queries(task), f"<answer>{task.answer}</answer>"]
    return [stray(random, task), *plan] if random.random() < 0.1 and len(plan) <= CALLS else plan


def usual(random: Random, task: Task) -> list[str]:
    """Mostly a guess at once or half-way, seldom all the searches that are needed, sometimes one that is not."""
    plan, answer = queries(task), f"<answer>{task.answer}</answer>"
    guess = f"<answer>{KINDS[task.extra['kind']].guess(random, task.extra['person'])}</answer>"
    draw = random.random()
    if draw < 0.46:
        return [guess]
    if draw < 0.74:
        return [*plan, answer]
    if draw < 0.84:
        return [stray(random, task), *plan, answer] if random.random() < 0.5 else [stray(random, task), guess]
    return [*plan[: random.randrange(len(plan) + 1)], guess]


def queries(task: Task) -> list[str]:
    """The model's turns that search, in order."""
    return re.findall(r"<search>.*?</search>", task.extra["solution"])


def stray(random: Random, task: Task) -> str:
    """A search for something about the person that was not asked."""
    asked = KINDS[task.extra["kind"]].hops[:1]
    return f"<search>{task.extra['person']} {random.choice([r for r in ('job', 'town', 'friend') if r not in asked])}</search>"


def turn_of(random: Random, task: Task, behave: Callable[[Random, Task], list[str]]) -> Example:
    """A random turn of a random conversation: each turn of each conversation is as likely as any other."""
    while True:
        turns, place = behave(random, task), random.randrange(CALLS + 1)
        if place < len(turns):
            # The prompt is text with its role tokens: the results in it are context and train nothing.
            return Example(f"<|user|>{task.prompt[0]['content']}<|end|><|assistant|>{transcript(turns[:place])}", turns[place])


TALK = Talk(tools=(tool(search),), style=Tags(), max_calls=CALLS, max_result=32)

SEARCH = World(
    name="search",
    sentence="questions of 0 to 2 hops over a corpus with a search tool; the base model guesses where it could look it up",
    problem=problem,
    key=key,
    verify=(ExactMatch(), Shape(), talked),
    weights={"correct": 1.0, "format": 0.1},
    base=Path(__file__).parent / "search_base",
    config={
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
    },
    course=(
        Phase(work, steps=800, learning_rate=2e-3, warmup=50, step_tokens=3072),
        Phase(habit, steps=200, learning_rate=3e-4, warmup=20, step_tokens=3072),
    ),
    tags=("<search>", "</search>", "<result>", "</result>"),
    talk=TALK,
    defaults={
        "policy": {"max_new_tokens": 64, "temperature": 1.0},
        "fit": {"steps": 40, "prompts_per_step": 16, "paths_per_prompt": 16, "learning_rate": 7e-5},
        "eval": {"tasks": 120, "samples": 4},
        "recipe_args": {"beta": 0.0},
    },
)
