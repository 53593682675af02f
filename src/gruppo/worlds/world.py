"""A world: an endless stream of tasks with known answers, a verifier, and a tiny model trained to have something to learn."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch

from gruppo.graders.grade import text_of
from gruppo.rollouts.conversation import Talk, WithTools
from gruppo.sft import Example, sft, warm_cosine
from gruppo.types import Grader, Group, Task
from gruppo.worlds.problems import Problems

SHAPE = re.compile(r"<think>(.*?)</think><answer>(.*?)</answer>", re.DOTALL)
TAGS = ("<think>", "</think>", "<answer>", "</answer>")


@dataclass(frozen=True)
class Phase:
    """A stretch of supervised training of a base model: which examples, how many steps, how fast."""

    lesson: Callable[[Random, Task], Example]
    steps: int
    learning_rate: float
    step_tokens: int = 4096
    warmup: int = 50
    final: float = 0.1


@dataclass(frozen=True)
class World(Problems):
    """A seeded generator of tasks, the graders that verify them, and the base model that ships with the package."""

    name: str
    sentence: str
    problem: Callable[[Random], Task]
    key: Callable[[Task], str]  # equal for problems that are the same question; decides train or held-out
    verify: tuple[Grader, ...]
    weights: Mapping[str, float]
    base: Path
    config: Mapping[str, Any]  # the base model's architecture
    course: tuple[Phase, ...]  # how the base model is trained
    defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tags: tuple[str, ...] = ()  # tags of its own that are one token each
    recipe: str = "grpo"  # what trains it when none is named
    talk: Talk | None = None  # the tools and rules of a world whose paths are conversations
    metrics: tuple[Callable[[list[Group]], dict[str, float]], ...] = ()  # what an evaluation reports beside the signals

    def equipped(self, policy: Any) -> Any:
        """The policy with this world's tools in its hands, for training and for evaluation."""
        return policy if self.talk is None else WithTools(policy, self.talk)

    def graders(self) -> list[Grader]:
        """The graders of this world, each giving `correct` or `format`."""
        return list(self.verify)

    def build(self, folder: Path | str, seed: int = 0, log: Callable[[str], None] = print, *, steps: int | None = None) -> None:
        """Train the base model from nothing and save it as a plain transformers folder.

        The same seed on the same machine with the same number of threads gives the same bytes. `steps` caps every phase.
        """
        from gruppo.policies.token import TokenPolicy
        from gruppo.worlds.tokenizer import tokenizer

        words = tokenizer(self.tags)
        policy = TokenPolicy(fresh(self.config, words, seed), words, entropy=False)
        for number in range(len(self.course)):
            self.teach(policy, number, seed, log, steps=steps)
        policy.model.save_pretrained(folder)
        words.save_pretrained(folder)
        for file in Path(folder).iterdir():  # safetensors writes weights that only their owner can read
            file.chmod(0o644)

    def teach(self, policy: Any, number: int, seed: int, log: Callable[[str], None] = print, *, steps: int | None = None) -> None:
        """One phase of the course, with an optimizer of its own."""
        phase = self.course[number]
        total = phase.steps if steps is None else min(steps, phase.steps)
        rate = warm_cosine(phase.learning_rate, total, warmup=min(phase.warmup, total // 2), final=phase.final)
        for done in sft(
            policy,
            self._lessons(phase, seed, number),
            steps=total,
            step_tokens=phase.step_tokens,
            row_tokens=256,
            rate=rate,
            rng=torch.Generator().manual_seed(seed),
            betas=(0.9, 0.98),
        ):
            if done.step % 50 == 0 or done.step == total:
                log(f"{self.name} phase {number + 1} step {done.step}/{total} loss {done.loss:.4f} filled {done.filled:.2f}")

    def _lessons(self, phase: Phase, seed: int, number: int) -> Callable[[int], Example]:
        def lesson(index: int) -> Example:
            random = Random(f"{self.name} base {seed} {number} {index}")
            return phase.lesson(random, self._draw(random, held_out=False))

        return lesson


def fresh(config: Mapping[str, Any], words: Any, seed: int) -> Any:
    """A Qwen3 of this size with random weights that depend on the seed alone."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from gruppo.worlds.tokenizer import CONTEXT

    settings = Qwen3Config(
        vocab_size=len(words),
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        bos_token_id=None,
        **config,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(settings).float()


def user(text: str) -> list[dict[str, str]]:
    """A prompt of one user turn."""
    return [{"role": "user", "content": text}]


def hinted(random: Random, task: Task, share: float) -> list[dict[str, str]]:
    """The prompt; in this share of the draws with one of the task's hints below the question."""
    if random.random() >= share:
        return task.prompt
    return user(task.prompt[0]["content"] + "\nHint: " + random.choice(task.extra["hints"]))


def answer_of(text: str) -> str | None:
    """What stands between the answer tags; None unless each of the two tags occurs exactly once, in order."""
    if text.count("<answer>") != 1 or text.count("</answer>") != 1:
        return None
    after = text.partition("<answer>")[2]
    return after.partition("</answer>")[0] if "</answer>" in after else None


def completion(thought: str, answer: str) -> str:
    """The form that every world asks for."""
    return f"<think>{thought}</think><answer>{answer}</answer>"


@dataclass(frozen=True)
class Shape:
    """`format`: 1 when the text is one thought and one answer, each tag exactly once and nothing around them."""

    def __call__(self, groups: list[Group]) -> list[dict[str, Any]]:
        return [{"format": [float(self.holds(text_of(p.output))) for p in g.paths]} for g in groups]

    @staticmethod
    def holds(text: str) -> bool:
        return all(text.count(tag) == 1 for tag in TAGS) and SHAPE.fullmatch(text) is not None


@dataclass(frozen=True)
class Verified:
    """`correct`: 1 when `check(answer text, task)` holds for the one tagged answer, else 0."""

    check: Callable[[str, Task], bool]

    def __call__(self, groups: list[Group]) -> list[dict[str, Any]]:
        return [{"correct": [float(self.one(text_of(p.output), g.task)) for p in g.paths]} for g in groups]

    def one(self, text: str, task: Task) -> bool:
        said = answer_of(text)
        return said is not None and self.check(said, task)


def texts(tasks: list[Task]) -> Iterator[str]:
    """Every text that these tasks hold, for tests of the tokenizer."""
    for task in tasks:
        for message in task.prompt:
            yield message["content"]
        yield str(task.answer)
        yield task.extra["solution"]
        yield from task.extra["hints"]
