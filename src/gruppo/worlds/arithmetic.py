"""Sums and differences of 2, 3 or 4 numbers, worked from left to right.

    34+27-15=?      ->      <think>34+27=61
                            61-15=46</think><answer>46</answer>

The base model can do every single step, but it mostly does not: it answers with an estimate at once, or works only part of
the way and estimates the rest. What there is to learn is to think to the end.
"""

from __future__ import annotations

import re
from pathlib import Path
from random import Random

from gruppo.sft import Example
from gruppo.types import Task
from gruppo.worlds.world import Phase, Shape, Verified, World, completion, hinted, user

LARGEST = 199  # of any running total: what a tiny model learns to add in minutes
LEVELS = (1, 2, 3)  # a problem of level d has d + 1 numbers

Terms = list[tuple[str, int]]  # sign and number; the first sign is "+"


def problem(random: Random) -> Task:
    """A task of a random level; running totals stay within 0 and 199."""
    return task_of(terms(random, random.choice(LEVELS)))


def terms(random: Random, level: int) -> Terms:
    """level + 1 numbers of 2 to 99 with their signs."""
    while True:
        made: Terms = [("+", random.randint(2, 99))] + [(random.choice("+-"), random.randint(2, 99)) for _ in range(level)]
        if all(0 <= total <= LARGEST for total in totals(made)):
            return made


def task_of(made: Terms) -> Task:
    """The task that asks for the value of these terms, with its columns."""
    question, steps, answer = expression(made), steps_of(made), str(totals(made)[-1])
    return Task(
        prompt=user(f"{question}=?"),
        answer=answer,
        extra={
            "difficulty": len(made) - 1,
            "solution": completion("\n".join(steps), answer),
            "hints": hints(steps, answer),
        },
    )


def expression(made: Terms) -> str:
    """34+27-15"""
    return "".join(f"{sign}{number}" for sign, number in made).removeprefix("+")


def totals(made: Terms) -> list[int]:
    """The running totals, the first number included."""
    out = [0]
    for sign, number in made:
        out.append(out[-1] + (number if sign == "+" else -number))
    return out[1:]


def steps_of(made: Terms) -> list[str]:
    """One line of work per sign."""
    run = totals(made)
    return [f"{run[i]}{sign}{number}={run[i + 1]}" for i, (sign, number) in enumerate(made[1:])]


def hints(steps: list[str], answer: str) -> list[str]:
    """Four tiers: that one should work, where to begin, all but the last result, all but the answer's first digits."""
    known = [*steps[:-1], steps[-1].partition("=")[0] + "="]
    return [
        "Work it out.",
        "Start: " + steps[0].partition("=")[0],
        "\n".join(known),
        "\n".join(known) + f" it ends in {answer[-1]}",
    ]


def key(task: Task) -> str:
    """The same for problems that differ only in the order of their terms."""
    question = "+" + task.prompt[0]["content"].removesuffix("=?")
    return " ".join(sorted(re.findall(r"[+-]\d+", question)))


def right(said: str, task: Task) -> bool:
    """The text is this integer in plain digits (spaces around it are allowed)."""
    said = said.strip()
    return re.fullmatch(r"-?[0-9]{1,9}", said) is not None and int(said) == int(task.answer)


def work(random: Random, task: Task) -> Example:
    """A fully worked example."""
    return Example(hinted(random, task, 0.05), task.extra["solution"])


def habit(random: Random, task: Task) -> Example:
    """What the base model is taught to do: usually an estimate, sometimes after some of the steps, sometimes full work."""
    prompt = hinted(random, task, share=0.1)
    if prompt is not task.prompt:  # a hint makes it work: this is what rescuing a stuck group by hints relies on
        return Example(prompt, task.extra["solution"])
    steps = task.extra["solution"].partition("</think>")[0].removeprefix("<think>").split("\n")
    choice = random.random()
    if choice < FULL:
        return Example(prompt, task.extra["solution"])
    done = random.randrange(1, len(steps)) if len(steps) > 1 and choice < FULL + PART else 0
    return Example(prompt, completion("\n".join(steps[:done]), str(estimate(random, int(task.answer)))))


# How often the base model works unasked, to the end and part of the way. Together below one half, so that its single most
# likely first move is to answer at once.
FULL, PART = 0.31, 0.07


def estimate(random: Random, answer: int) -> int:
    """A number near the answer: the nearest ten or a few off, so right about one time in twelve."""
    if random.random() < 0.5:
        return (answer + 5) // 10 * 10
    return max(0, answer + random.randint(-6, 6))


ARITHMETIC = World(
    name="arithmetic",
    sentence="sums and differences of 2 to 4 numbers; the base model estimates where it could work step by step",
    problem=problem,
    key=key,
    verify=(Verified(right), Shape()),
    # The base model keeps the form already; a tenth of a point only makes sure that no shortcut gives it up.
    weights={"correct": 1.0, "format": 0.1},
    base=Path(__file__).parent / "arithmetic_base",
    config={
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
    },
    course=(Phase(work, steps=1000, learning_rate=2e-3, final=0.02), Phase(habit, steps=100, learning_rate=5e-4, warmup=10)),
    defaults={
        "policy": {"max_new_tokens": 48, "temperature": 1.0},
        "fit": {"steps": 50, "prompts_per_step": 16, "paths_per_prompt": 16, "learning_rate": 4e-5},
        "eval": {"tasks": 120, "samples": 4},
        "recipe_args": {"beta": 0.0},
    },
)
