"""A made-up run folder in the exact format of a real one: a model that learns to work instead of guess."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from tests.rollouts.scripted import Scripted

from gruppo.rollouts.conversation import Talk, columns, talked
from gruppo.tools import tool
from gruppo.types import Group, Task
from gruppo.types import Path as Sampled

SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("group", pa.int64()),
        ("row", pa.int64()),
        ("prompt", pa.string()),
        ("answer", pa.string()),
        ("task", pa.string()),
        ("output", pa.string()),
        ("tokens", pa.list_(pa.int32())),
        ("token_text", pa.list_(pa.string())),
        ("logp", pa.list_(pa.float32())),
        ("mask", pa.list_(pa.bool_())),
        ("advantage", pa.list_(pa.float32())),
        ("reward", pa.float64()),
        ("signals", pa.string()),
        ("truncated", pa.bool_()),
        ("off_policy", pa.bool_()),
        ("fork", pa.string()),
    ]
)


def problem(rng: random.Random) -> tuple[str, str, str, int]:
    """prompt, worked thought, answer, difficulty: a sum of two to four numbers."""
    terms = [rng.randint(2, 9) for _ in range(rng.randint(2, 4))]
    lines, total = [], terms[0]
    for t in terms[1:]:
        lines.append(f"{total}+{t}={total + t}")
        total += t
    return f"What is {' + '.join(map(str, terms))}?", "\n".join(lines), str(total), len(terms)


def completion(rng: random.Random, work: float, thought: str, answer: str) -> tuple[str, dict[str, float]]:
    """A worked answer with probability `work`, a guess otherwise; and what the graders said."""
    if rng.random() < work:
        said = answer if rng.random() < 0.9 else str(int(answer) + 1)
        text = f"<think>{thought}</think><answer>{said}</answer>"
    else:
        said = answer if rng.random() < 0.2 else str(int(answer) + rng.randint(-5, 5) or 1)
        text = f"<answer>{said}</answer>"
    return text, {"correct": float(said == answer), "format": 1.0}


def row(
    step: int, group: int, r: int, asked: tuple, text: str, signals: dict[str, float], advantage: float, **marks: Any
) -> dict:
    prompt, thought, answer, difficulty = asked
    tokens = list(text)
    return {
        "step": step,
        "group": group,
        "row": r,
        "prompt": prompt,
        "answer": answer,
        "task": json.dumps({"difficulty": difficulty, "solution": thought}),
        "output": text,
        "tokens": [ord(c) for c in tokens],
        "token_text": tokens,
        "logp": [-0.05 - 0.01 * (i % 17) for i in range(len(tokens))],
        "mask": [True] * len(tokens),
        "advantage": [advantage] * len(tokens),
        "reward": signals["correct"] + 0.1 * signals.get("format", 0.0),
        "signals": json.dumps(signals),
        "truncated": False,
        "off_policy": False,
        "fork": None,
        **marks,
    }


def group_rows(rng: random.Random, step: int, group: int, paths: int, work: float) -> list[dict]:
    asked = problem(rng)
    said = [completion(rng, work, asked[1], asked[2]) for _ in range(paths)]
    rewards = [s["correct"] + 0.1 * s["format"] for _, s in said]
    mean = sum(rewards) / paths
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / max(paths - 1, 1))
    return [row(step, group, r, asked, t, s, (rewards[r] - mean) / (std + 1e-4)) for r, (t, s) in enumerate(said)]


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path)


def metrics(rng: random.Random, step: int, steps: int) -> dict[str, Any]:
    x = step / max(steps, 1)
    up = 1 / (1 + math.exp(-8 * (x - 0.4)))
    reward = 0.3 + 0.6 * up + rng.gauss(0, 0.04)
    return {
        "step": step,
        "time": 1790000000.0 + 1.5 * step,
        "seconds": 1.4 + 0.2 * rng.random(),
        "lr": 1e-4 * min(1, step / 5),
        "reward": reward,
        "reward_std": 0.45 - 0.25 * up,
        "live": 0.9 - 0.5 * up + rng.gauss(0, 0.04),
        "zero_variance": 0.1 + 0.5 * up,
        "length": 20 + 22 * up + rng.gauss(0, 1),
        "truncated": max(0.0, 0.03 - 0.03 * up),
        "abstained": 0,
        "signals": {"correct": reward - 0.1, "format": 0.95 + 0.05 * up},
        "signals_std": {"correct": 0.45 - 0.2 * up, "format": 0.1},
        "length_correct": 22 + 22 * up,
        "length_wrong": 19 + 14 * up,
        "tokens": 256 * int(20 + 22 * up),
        "tokens_per_s": 5200 + rng.gauss(0, 200),
        "updates": 1,
        "gap": 4e-7,
        "loss": 1e-8,
        "ratio": 1.0,
        "clip_low": 0.001 * up,
        "clip_high": 0.002 * up,
        "entropy": 0.7 - 0.4 * up,
        "kl": 0.02 * up,
        "grad_norm": 0.5 + rng.random() * 0.2,
    }


def folder(
    at: Path, steps: int = 40, groups: int = 4, paths: int = 8, held_out: int = 24, every: int = 10, evals: bool = True
) -> Path:
    """Writes the run and returns its folder."""
    rng = random.Random(0)
    at.mkdir(parents=True, exist_ok=True)
    settings = {
        "recipe": "2402.03300",
        "recipe_args": {"n": paths, "beta": 0.04},
        "world": "arithmetic",
        "policy": {"max_new_tokens": 96, "temperature": 1.0},
        "fit": {"steps": steps, "prompts_per_step": groups, "paths_per_prompt": paths, "learning_rate": 1e-4, "seed": 0},
    }
    (at / "run.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    (at / "metrics.jsonl").write_text("".join(json.dumps(metrics(rng, s, steps)) + "\n" for s in range(1, steps + 1)))
    for step in sorted({1, steps, *range(every, steps + 1, every)}):
        work = 0.15 + 0.8 * step / steps
        write(at / f"groups/step-{step:06d}.parquet", [r for g in range(groups) for r in group_rows(rng, step, g, paths, work)])
    if evals:
        asked = [problem(random.Random(1000 + i)) for i in range(held_out)]
        lines = []
        for step in sorted({0, *range(every, steps + 1, every), steps}):
            work = 0.15 + 0.8 * step / steps
            said = [[completion(rng, work, a[1], a[2]) for _ in range(5)] for a in asked]  # four samples and a greedy one
            rows = [row(step, i, r, a, *s[r], 0.0) for i, (a, s) in enumerate(zip(asked, said)) for r in range(4)]
            rows += [row(step, held_out + i, 0, a, *s[4], 0.0) for i, (a, s) in enumerate(zip(asked, said))]
            write(at / f"evals/step-{step:06d}.parquet", rows)
            everyone = range(held_out)
            by = {f"difficulty={d}": scores(said, [i for i in everyone if asked[i][3] == d]) for d in (2, 3, 4)}
            counts = {"tasks": held_out, "paths": 4 * held_out, "abstained": 0, "greedy_abstained": 0}
            record = {"step": step, "time": 1790000000.0, "scores": scores(said, everyone), "by": by, "counts": counts}
            lines.append(json.dumps(record) + "\n")
        (at / "evals.jsonl").write_text("".join(lines))
    return at


def scores(said: list, rows: Iterable[int]) -> dict[str, Any]:
    """Greedy and sampled scores of these problems, as an evaluation writes them."""
    rows = list(rows)
    n = max(len(rows), 1)
    greedy = sum(said[i][4][1]["correct"] for i in rows) / n
    mean = sum(s["correct"] for i in rows for _, s in said[i][:4]) / (4 * n)
    half = 1 / math.sqrt(n)

    def score(value: float, wide: float | None = half) -> dict[str, Any]:
        return {"value": value, "low": wide and max(0.0, value - wide), "high": wide and min(1.0, value + wide), "n": len(rows)}

    length = sum(len(t) for i in rows for t, _ in said[i][:4]) / (4 * n)
    return {
        "greedy": score(greedy),
        "pass@1": score(mean),
        "mean@4": score(mean),
        "format": score(1.0),
        "reward": score(mean + 0.1),
        "length": score(length, None),
        "truncated": score(0.0),
        "greedy_length": score(length, None),
    }


def sampled(outputs: list[str], rewards: list[float], prompt: Any = "What is 2 + 3?", answer: str = "5") -> Group:
    """A graded group in memory, as the loop hands it to whoever shows it."""
    reward = torch.tensor(rewards)
    width = max(map(len, outputs))
    paths = [
        Sampled(prompt, torch.zeros(len(o), dtype=torch.long), torch.zeros(len(o)), torch.ones(len(o), dtype=torch.bool), o)
        for o in outputs
    ]
    advantage = (reward - reward.nanmean())[:, None].expand(-1, width)
    return Group(Task(prompt, answer), paths, {"correct": reward, "reward": reward}, reward, advantage)


def conversations() -> Group:
    """A graded group of conversations with tools: answered, failed, given up, not asked, not read for want of room."""

    def shout(text: str) -> str:
        return text.upper()

    def broken(text: str) -> str:
        raise ValueError("no such page")

    def slow(text: str) -> str:
        time.sleep(2)
        return "too late"

    script = {
        "a:": ["<shout>hey</shout>", "<broken>b</broken>", "HEY it is"],
        "b:": ["<slow>s</slow>", "so what"],
        "c:": ["I just know"],
        "d:": ["<shout>" + "long " * 14 + "</shout>"],
    }
    talk = Talk((tool(shout), tool(broken), tool(slow, seconds=0.05)))
    policy = Scripted(script, context=130, max_new=130)
    paths = talk.sample(policy, list(script), g=torch.Generator())
    reward = torch.tensor([1.0, 0.0, 1.0, 0.0])
    made = Group(Task("q:", "HEY"), paths, {"correct": reward, "reward": reward}, reward)
    (own,) = talked([made])
    advantage = torch.where(made.mask, (reward - 0.5)[:, None].expand(-1, made.width), 0.0)
    return made.with_(signals={**made.signals, **columns(own)}, advantage=advantage)
