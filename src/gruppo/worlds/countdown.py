"""Reach a target from given numbers with + - and *, each number used at most once; usually in many ways.

    3 7 8 make 24      ->      <think>3+7=10
                               10+8=18
                               no
                               7-3=4
                               ...
                               </think><answer>8*3</answer>

The verifier parses the answer itself, so every correct expression counts, whatever its form. Half of the time the
base model writes down the first expression that comes to mind; else it tries some, compares each with the target, and stops
at a hit.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from random import Random

from gruppo.sft import Example
from gruppo.types import Task
from gruppo.worlds.world import Phase, Shape, Verified, World, completion, hinted, user

LEVELS = (1, 2, 3)  # a problem of level d gives d + 1 numbers
LARGEST_NUMBER, LARGEST_TARGET = 9, 60
LONGEST = 200  # characters of an answer that the verifier reads

Chain = list[tuple[str, int]]  # operation and number, applied from left to right; the first operation is ""


def problem(random: Random) -> Task:
    """A task of a random level."""
    level = random.choice(LEVELS)
    while True:
        numbers = [random.randint(1, LARGEST_NUMBER) for _ in range(level + 1)]
        chain = draw_chain(random, numbers, level + 1)
        target = run(chain)[-1]
        if 1 <= target <= LARGEST_TARGET and target not in numbers:
            return task_of(numbers, target, chain)


def task_of(numbers: list[int], target: int, chain: Chain) -> Task:
    """The task with its columns; `chain` is one of its solutions, its answer is one right expression among many."""
    lines = lines_of(chain)
    return Task(
        prompt=user(f"{' '.join(map(str, numbers))} make {target}"),
        answer=expression(chain),
        extra={
            "difficulty": len(numbers) - 1,
            "solution": completion("\n".join(lines), expression(chain)),
            "hints": [
                "Try more than one way.",
                "Start: " + lines[0].partition("=")[0],
                "\n".join([*lines[:-1], lines[-1].partition("=")[0]]),
            ],
            "numbers": list(numbers),
            "target": target,
        },
    )


def draw_chain(random: Random, numbers: list[int], length: int) -> Chain:
    """A random way to combine `length` of the numbers, no running value below 0."""
    while True:
        order = random.sample(numbers, length)
        chain: Chain = [("", order[0])] + [(random.choice("+-*"), n) for n in order[1:]]
        if min(run(chain)) >= 0 and max(run(chain)) <= 99:
            return chain


def run(chain: Chain) -> list[int]:
    """The running values, the first number included."""
    values = [chain[0][1]]
    for op, n in chain[1:]:
        values.append({"+": values[-1] + n, "-": values[-1] - n, "*": values[-1] * n}[op])
    return values


def lines_of(chain: Chain) -> list[str]:
    """One line of work per operation."""
    values = run(chain)
    return [f"{values[i]}{op}{n}={values[i + 1]}" for i, (op, n) in enumerate(chain[1:])]


def expression(chain: Chain) -> str:
    """The chain as one expression, with the parentheses it needs: (3+7)*8"""
    text, loose = str(chain[0][1]), False
    for op, n in chain[1:]:
        text = f"({text})*{n}" if op == "*" and loose else f"{text}{op}{n}"
        loose = op != "*"
    return text


def key(task: Task) -> str:
    """The same for the same numbers in any order with the same target."""
    return f"{sorted(task.extra['numbers'])} {task.extra['target']}"


# -- the verifier ------------------------------------------------------------------------------------------------------


def reaches(said: str, task: Task) -> bool:
    """The expression has the target's value and uses every number at most as often as it was given."""
    found = evaluate(said)
    if found is None:
        return False
    value, used = found
    return value == task.extra["target"] and not Counter(used) - Counter(task.extra["numbers"])


def evaluate(text: str) -> tuple[int, list[int]] | None:
    """Value and numbers of an expression of whole numbers, + - * and parentheses; None when it is anything else."""
    text = text.strip()
    if len(text) > LONGEST or not re.fullmatch(r"[0-9+\-*() ]+", text):
        return None
    if re.search(r"[0-9] +[0-9]|\* *\*|[0-9]{5}", text):  # "1 2" is not 12, "**" is not an operation here
        return None
    reader = _Reader(re.findall(r"[0-9]+|[+\-*()]", text))
    try:
        value = reader.total()
    except _Malformed:
        return None
    return (value, reader.used) if reader.at == len(reader.tokens) else None


class _Malformed(Exception):
    pass


class _Reader:
    """Recursive descent: a total of products of factors."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens, self.at = tokens, 0
        self.used: list[int] = []

    def next_in(self, wanted: str) -> bool:
        return self.at < len(self.tokens) and self.tokens[self.at] in wanted

    def total(self) -> int:
        value = self.product()
        while self.next_in("+-"):
            sign = 1 if self.tokens[self.at] == "+" else -1
            self.at += 1
            value += sign * self.product()
        return value

    def product(self) -> int:
        value = self.factor()
        while self.next_in("*"):
            self.at += 1
            value *= self.factor()
        return value

    def factor(self) -> int:
        if self.next_in("("):
            self.at += 1
            value = self.total()
            if not self.next_in(")"):
                raise _Malformed
            self.at += 1
            return value
        if self.at == len(self.tokens) or not self.tokens[self.at].isdigit():
            raise _Malformed
        self.at += 1
        self.used.append(int(self.tokens[self.at - 1]))
        return self.used[-1]


def solutions(numbers: list[int], target: int) -> set[str]:
    """Every way to reach the target, written once whatever the order of sums and products."""
    found: set[str] = set()
    start = tuple(sorted((n, str(n)) for n in numbers))
    seen, open_states = {start}, [start]
    while open_states:
        items = open_states.pop()
        for i, (a, x) in enumerate(items):
            for j, (b, y) in enumerate(items):
                if i == j:
                    continue
                made = [(a - b, f"({x}-{y})")]
                if i < j:  # items are sorted, so that a sum or product is written one way
                    made += [(a + b, f"({x}+{y})"), (a * b, f"({x}*{y})")]
                rest = [items[k] for k in range(len(items)) if k not in (i, j)]
                for value, text in made:
                    if value == target:
                        found.add(text[1:-1])
                    state = tuple(sorted([*rest, (value, text)]))
                    if state not in seen:
                        seen.add(state)
                        open_states.append(state)
    return found


# -- what the base model is taught -------------------------------------------------------------------------------------


def trial(random: Random, task: Task) -> Chain:
    """A chain of some of the numbers that misses the target."""
    numbers = task.extra["numbers"]
    while True:
        chain = draw_chain(random, numbers, random.randint(2, len(numbers)))
        if run(chain)[-1] != task.extra["target"]:
            return chain


def solution_of(task: Task) -> list[str]:
    """The lines of the task's own solution."""
    return task.extra["solution"].partition("</think>")[0].removeprefix("<think>").split("\n")


def search(random: Random, task: Task) -> Example:
    """Tries that miss, each marked "no", and then the one that hits."""
    missed = [["\n".join(lines_of(trial(random, task))), "no"] for _ in range(min(TRIES, int(random.expovariate(1 / 1.5))))]
    lines = [line for one in missed for line in one] + solution_of(task)
    return Example(hinted(random, task, 0.08), completion("\n".join(lines), task.answer))


TRIES = 5  # misses in one thought at most: bounds its length
SEARCH = 0.55  # how often the base model searches unasked


def habit(random: Random, task: Task) -> Example:
    """A search, or an expression at once, which tends to miss."""
    if random.random() < SEARCH:
        return search(random, task)
    hit = random.random() < 0.35
    answer = task.answer if hit else expression(trial(random, task))
    return Example(task.prompt, completion("", answer))


COUNTDOWN = World(
    name="countdown",
    sentence="reach a target from 2 to 4 numbers with + - *; many answers are right and a verifier accepts each of them",
    problem=problem,
    key=key,
    verify=(Verified(reaches), Shape()),
    weights={"correct": 1.0, "format": 0.1},
    base=Path(__file__).parent / "countdown_base",
    config={
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
    },
    course=(Phase(search, steps=1000, learning_rate=2e-3, final=0.02), Phase(habit, steps=100, learning_rate=5e-4, warmup=10)),
    defaults={
        "policy": {"max_new_tokens": 160, "temperature": 1.0},
        "fit": {"steps": 30, "prompts_per_step": 16, "paths_per_prompt": 16, "learning_rate": 4e-5},
        "eval": {"tasks": 120, "samples": 4},
        "recipe_args": {"beta": 0.0},
    },
)
