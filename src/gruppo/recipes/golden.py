"""Twenty recorded steps per recipe on a synthetic task: a change of any number in the loop shows as a changed curve.

The task: the prompt opens with `<` or `>`; an answer is right when more than half of its letters come from the first or from
the second half of the alphabet, as that sign says. A random two-layer transformer is right about half of the time and can
learn the rest in twenty steps of plain gradient descent. Plain, because Adam divides by the gradient's size and so turns
rounding noise in a near-zero gradient into a full step: the curve would differ from machine to machine.

    record("gspo")                                  -> {"recipe": ..., "steps": [{"reward": ..., "loss": ..., ...}, ...]}
    gruppo record gspo                              writes tests/golden/gspo.json again; `gruppo record all` every curve
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from gruppo.graders.grade import Grading
from gruppo.policies.token import TokenPolicy
from gruppo.recipe import Recipe, describe
from gruppo.recipes import find, recipe
from gruppo.recipes.golden_flow import FlowDraw, flow_grading, tiny_flow
from gruppo.rollouts.stale import stale
from gruppo.train import Iteration, iterate
from gruppo.types import Group, GruppoError, Reference, Task

CURVES = pathlib.Path(__file__).parents[3] / "tests" / "golden"
SIGNS, LETTERS = "<>", "abcdefghijklmnop"
STEPS, PROMPTS, LONGEST, RATE = 20, 6, 8, 0.2
RATES = {"text": RATE, "image": 3.0}  # of plain gradient descent; a mean over latent elements has small gradients


class Alphabet:
    """A tokenizer of twenty tokens: padding, the end, two signs, sixteen letters."""

    pad_token_id, eos_token_id, chat_template = 0, 1, None
    names = ("", "", *SIGNS, *LETTERS)

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [self.names.index(c, 2) for c in text]}

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(self.names[i] for i in ids)


def tiny_model(seed: int = 0) -> Any:
    """A random two-layer Qwen3 of width 32 over the alphabet; the same weights for the same seed."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=len(Alphabet.names),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        model = Qwen3ForCausalLM(config)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:  # norms stay at 1
                p.normal_(0.0, 0.2, generator=g)
    return model


def tiny_policy(seed: int = 0, temperature: float = 1.0, **numbers: Any) -> TokenPolicy:
    """The tiny model as a policy of at most eight new tokens."""
    return TokenPolicy(tiny_model(seed), Alphabet(), temperature=temperature, max_new=LONGEST, **numbers)


class Signs:
    """Grades `correct`: more than half of the letters lie in the half of the alphabet that the prompt's sign names."""

    def __call__(self, groups: list[Group]) -> list[dict[str, Any]]:
        return [{"correct": [right(g.task.answer, str(p.output)) for p in g.paths]} for g in groups]


def right(half: str, text: str) -> float:
    """1 when more than half of the text comes from `half`, 0 otherwise and for an empty text."""
    return float(sum(c in half for c in text) * 3 > 2 * len(text))


@dataclass
class Draw:
    """The next prompts of the task's endless stream."""

    at: int
    count: int
    stream: list[int] = field(default_factory=list)  # one integer, shared by every Draw of a run: how far it has been read

    def __iter__(self) -> Iterator[Task]:
        return (task(self.at + i) for i in range(self.count))

    def __len__(self) -> int:
        return self.count

    def more(self, n: int) -> Draw:
        """The n prompts after all that were drawn so far."""
        at = self.stream[0] if self.stream else self.at + self.count
        self.stream[:] = [at + n]
        return Draw(at, n, self.stream)


def task(index: int) -> Task:
    """Sign and one letter; both vary with the index."""
    sign = index % 2
    half = LETTERS[: len(LETTERS) // 2] if sign == 0 else LETTERS[len(LETTERS) // 2 :]
    return Task(SIGNS[sign] + LETTERS[(index // 2) % len(LETTERS)], answer=half)


def grading() -> Grading:
    """The task's graders and the weight of its one signal."""
    return Grading([Signs()], {"correct": 1.0})


@dataclass
class Trial:
    """A tiny run that can be advanced step by step."""

    recipe: Recipe
    policy: Any
    optimizer: torch.optim.Optimizer
    rng: torch.Generator
    reference: Reference | None
    stream: list[int]
    draw: Any
    grade: Grading

    @staticmethod
    def of(recipe: Recipe, seed: int = 0, rate: float = RATE, temperature: float = 1.0, *, family: str = "text") -> Trial:
        make, draw, grade = FAMILIES[family]
        policy = make(seed, temperature)
        reference = None if recipe.reference is None else recipe.reference(policy)
        policy.reference = reference
        rng = torch.Generator().manual_seed(seed + 1)
        return Trial(recipe, policy, torch.optim.SGD(policy.parameters(), lr=rate), rng, reference, [0], draw, grade())

    def advance(self) -> Iteration:
        draw = self.draw(self.stream[0], 0, self.stream).more(PROMPTS)
        return iterate(self.policy, draw, self.grade, self.recipe, self.optimizer, self.rng, ref=self.reference)


# what the tiny run of a family is made of: its policy, its stream of prompts, its graders
FAMILIES: dict[str, Any] = {"text": (tiny_policy, Draw, grading), "image": (tiny_flow, FlowDraw, flow_grading)}


def record(name: str, steps: int = STEPS) -> dict[str, Any]:
    """Train the recipe on the tiny task and return its curve: means over the step's groups, and the loss's statistics."""
    entry = find(name)
    rate = RATES[entry.family] if entry.rate is None else entry.rate
    trial = Trial.of(stale(recipe(entry.arxiv, **entry.tiny), entry.sync), rate=rate, family=entry.family)
    rows = []
    for _ in range(steps):
        done = trial.advance()
        correct = torch.cat([g.signals["correct"] for g in done.groups])
        shaped = torch.cat([g.reward for g in done.groups if g.reward is not None])
        length = sum(len(p) for g in done.groups for p in g.paths) / len(correct)
        stats = {k: v for k, v in done.stats.items() if k != "gap"}  # its size is rounding, not the method
        row = {"correct": float(correct.mean()), "reward": float(shaped.mean()), "length": length, **stats}
        rows.append({k: round(v, 7) for k, v in row.items()})
    numbers = {k: describe(v) if callable(v) else v for k, v in entry.tiny.items()}
    if entry.sync > 1:
        numbers["sync_every"] = entry.sync
    return {"recipe": entry.nickname, "numbers": numbers, "prompts": PROMPTS, "rate": rate, "steps": rows}


def write(name: str, folder: pathlib.Path = CURVES) -> pathlib.Path:
    """Record one curve, on one thread, into `folder`/<nickname>.json."""
    if not folder.is_dir():
        raise GruppoError(f"recorded curves belong to a checkout of gruppo, and there is no folder {folder}")
    path = folder / f"{find(name).nickname}.json"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    curve = record(name)
    torch.set_num_threads(threads)
    steps = ",\n".join("  " + json.dumps(row) for row in curve["steps"])
    head = json.dumps({k: v for k, v in curve.items() if k != "steps"})
    path.write_text(f'{head[:-1]}, "steps": [\n{steps}\n]}}\n')
    return path
