"""How much GRPO teaches a world's base model: `python -m gruppo.worlds.measure arithmetic --seeds 3`.

Trains with the world's own defaults and prints, per seed, held-out accuracy before and after, CPU seconds of the training
alone, and the mean length of sampled completions.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from gruppo.graders.grade import Grading
from gruppo.policies.token import TokenPolicy
from gruppo.recipes.grpo import grpo
from gruppo.runs.config import arguments
from gruppo.train import Iteration, fit
from gruppo.types import Group, Path, Task
from gruppo.worlds import WORLDS
from gruppo.worlds.world import World


@dataclass(frozen=True)
class Accuracy:
    """Held-out accuracy, or mean reward where nothing is right or wrong: one greedy answer per task, and `samples` drawn."""

    greedy: float
    sampled: float
    length: float  # mean tokens of the sampled completions
    by_difficulty: dict[int, float]  # of the sampled ones


@dataclass(frozen=True)
class Outcome:
    """One training run: before, after, what it cost, and the sampled accuracy and length step by step."""

    seed: int
    before: Accuracy
    after: Accuracy
    cpu_seconds: float
    wall_seconds: float
    curve: list[tuple[int, float, float]]


def load(world: World) -> Any:
    """The base model of a world as a policy with the world's own settings and tools."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy = TokenPolicy(
        AutoModelForCausalLM.from_pretrained(world.base, dtype=torch.float32),
        AutoTokenizer.from_pretrained(world.base),
        max_new=world.defaults["policy"]["max_new_tokens"],
    )
    return world.equipped(policy)


def accuracy(policy: Any, world: World, tasks: list[Task], samples: int = 4, seed: int = 0) -> Accuracy:
    """Measured on these tasks with a generator of its own, so that measuring never changes training."""
    rng = torch.Generator().manual_seed(seed)
    greedy = policy.sample([t.prompt for t in tasks], g=rng, temperature=0.0)
    repeated = [t for t in tasks for _ in range(samples)]
    drawn = policy.sample([t.prompt for t in repeated], g=rng, temperature=1.0)
    right = [correct(world, p, t) for p, t in zip(drawn, repeated)]
    levels = sorted({t.extra["difficulty"] for t in tasks})
    return Accuracy(
        greedy=mean([correct(world, p, t) for p, t in zip(greedy, tasks)]),
        sampled=mean(right),
        length=mean([len(p) for p in drawn]),
        by_difficulty={d: mean([r for r, t in zip(right, repeated) if t.extra["difficulty"] == d]) for d in levels},
    )


def correct(world: World, path: Path, task: Task) -> float:
    """The world's own verdict on one path; the path's reward where nothing is right or wrong."""
    found = Grading(world.graders(), dict(world.weights))([Group(task, [path])])[0].signals
    return float(found.get("correct", found["reward"])[0])


def mean(values: list[Any]) -> float:
    return sum(values) / len(values)


def train(world: World, policy: Any, seed: int, **changes: Any) -> Iterator[tuple[int, Iteration]]:
    """GRPO on the world with its defaults; `changes` replace entries of the section `fit`."""
    numbers = {**world.defaults["fit"], **changes}
    size = numbers["prompts_per_step"]
    drawn = iter(range(10**9))
    taken = arguments("grpo")  # a world may suit numbers of another recipe
    recipe = grpo(n=numbers["paths_per_prompt"], **{k: v for k, v in world.defaults["recipe_args"].items() if k in taken})
    yield from fit(
        policy,
        lambda: [world.task(seed, next(drawn)) for _ in range(size)],
        Grading(world.graders(), dict(world.weights)),
        recipe,
        torch.optim.AdamW(policy.parameters(), lr=numbers["learning_rate"], weight_decay=0.0),
        torch.Generator().manual_seed(seed),
        steps=numbers["steps"],
        rate=lambda step: numbers["learning_rate"],
        ref=None if recipe.reference is None else recipe.reference(policy),
    )


def measure(world: World, seed: int, tasks: list[Task], log: Callable[[str], None] = print, **changes: Any) -> Outcome:
    """One run from the base model, with accuracy on `tasks` before and after."""
    policy = load(world)
    before = accuracy(policy, world, tasks)
    curve = []
    cpu, wall = time.process_time(), time.perf_counter()
    for step, done in train(world, policy, seed, **changes):
        signals = torch.cat([g.signals.get("correct", g.signals["reward"]) for g in done.groups])
        lengths = [len(p) for g in done.groups for p in g.paths]
        curve.append((step, float(signals.mean()), mean(lengths)))
        if step % 10 == 0:
            spent = time.process_time() - cpu
            log(f"seed {seed} step {step}: sampled {signals.mean():.2f}, length {mean(lengths):.1f}, {spent:.0f} s of CPU")
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return Outcome(seed, before, accuracy(policy, world, tasks), cpu, wall, curve)


def main() -> None:
    """Print one line per seed and the mean gain."""
    written = {name: world for name, world in WORLDS.items() if isinstance(world, World)}  # not those of pictures
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("world", choices=sorted(written))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", type=int, default=120)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    world = written[asked.world]
    given = {"steps": asked.steps, "learning_rate": asked.learning_rate}
    tasks = world.held_out(asked.tasks)
    quiet = (lambda line: None) if asked.json else print
    outcomes = [
        measure(world, seed, tasks, quiet, **{k: v for k, v in given.items() if v is not None}) for seed in range(asked.seeds)
    ]
    if asked.json:
        print(json.dumps([asdict(o) for o in outcomes]))
        return
    for o in outcomes:
        print(
            f"seed {o.seed}: greedy {o.before.greedy:.1%} -> {o.after.greedy:.1%}, "
            f"sampled {o.before.sampled:.1%} -> {o.after.sampled:.1%}, "
            f"length {o.before.length:.1f} -> {o.after.length:.1f} tokens, "
            f"training {o.cpu_seconds:.0f} s of CPU, {o.wall_seconds:.0f} s"
        )
        print(f"        sampled by difficulty {shown(o.before.by_difficulty)} -> {shown(o.after.by_difficulty)}")
    for name in ("greedy", "sampled"):
        gain = [100 * (getattr(o.after, name) - getattr(o.before, name)) for o in outcomes]
        print(f"gain in {name} accuracy: {mean(gain):.1f} points on average, {min(gain):.1f} at least")


def shown(levels: dict[int, float]) -> str:
    return " / ".join(f"{v:.0%}" for v in levels.values())


if __name__ == "__main__":
    main()
