"""What one line of metrics.jsonl says about an iteration."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from gruppo.train import Iteration
from gruppo.types import Group


def measure(done: Iteration, *, step: int, now: float, seconds: float, lr: float) -> dict[str, Any]:
    """The record of one step; NaN becomes None, because JSON has no NaN."""
    groups = done.groups
    paths = [p for g in groups for p in g.paths]
    rewards = [row_rewards(g) for g in groups]
    flat = torch.cat(rewards) if rewards else torch.empty(0)
    signals = {name: [values_of(g, name) for g in groups] for name in numeric(groups)}
    record: dict[str, Any] = {
        "step": step,
        "time": now,
        "seconds": seconds,
        "lr": lr,
        "reward": average(flat),
        "reward_std": average(spread(r) for r in rewards),
        "live": average(float(is_live(g)) for g in groups),
        "zero_variance": average(float(is_flat(r)) for r in rewards),
        "abstained": int(flat.isnan().sum()),
        "signals": {name: average(torch.cat(v)) for name, v in signals.items()},
        "signals_std": {name: average(spread(x) for x in v) for name, v in signals.items()},
        "updates": done.updates,
    }
    if any(pictures(p.output) for p in paths):
        record |= {"pictures": len(paths), "pictures_per_s": len(paths) / seconds if seconds > 0 else None}
    else:
        record |= written(groups, seconds)
    gaps = [gap for p in paths if p.logp_train is not None for gap in [(p.logp - p.logp_train)[p.mask].abs()] if len(gap)]
    if gaps:
        record["gap"] = float(torch.cat(gaps).max())
    record |= done.stats
    return {k: finite(v) for k, v in record.items()}


def written(groups: list[Group], seconds: float) -> dict[str, Any]:
    """What only paths of tokens have: lengths, and a pace in tokens."""
    paths = [p for g in groups for p in g.paths]
    tokens = sum(map(len, paths))
    return {
        "length": average(float(len(p)) for p in paths),
        "truncated": average(float(p.truncated) for p in paths),
        "length_correct": length_where(groups, 1.0),
        "length_wrong": length_where(groups, 0.0),
        "tokens": tokens,
        "tokens_per_s": tokens / seconds if seconds > 0 else None,
    }


def pictures(output: Any) -> list[Image.Image]:
    """The pictures of an output: one, the frames of a video, or none where it is something else."""
    found = output if isinstance(output, (list, tuple)) else [output]
    return [image for image in found if isinstance(image, Image.Image)]


def finite(value: Any) -> Any:
    """The value with NaN and infinities as None, inside dictionaries too."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def row_rewards(group: Group) -> Tensor:
    """[G]: the reward, or the sum of its columns; NaN = abstained."""
    if group.reward is None:
        return torch.full((len(group),), math.nan)
    return (group.reward if group.reward.dim() == 1 else group.reward.sum(1)).float().cpu()


def average(values: Tensor | Iterable[float]) -> float:
    """The mean of the finite entries, NaN where there are none."""
    x = values if isinstance(values, Tensor) else torch.tensor(list(values), dtype=torch.float64)
    return float(x[x.isfinite()].double().mean()) if x.isfinite().any() else math.nan


def spread(x: Tensor) -> float:
    """The sample standard deviation of the finite entries, 0 for a single one, NaN for none."""
    heard = x[x.isfinite()].double()
    return math.nan if len(heard) == 0 else float(heard.std()) if len(heard) > 1 else 0.0


def is_live(group: Group) -> bool:
    """Whether any trained step of the group has an advantage other than zero."""
    return group.advantage is not None and bool((group.advantage.cpu()[group.mask.cpu()] != 0).any())


def is_flat(rewards: Tensor) -> bool:
    """Whether the rewards that were given are all the same."""
    heard = rewards[rewards.isfinite()]
    return len(heard) == 0 or bool((heard == heard[0]).all())


def numeric(groups: list[Group]) -> list[str]:
    """Signals that are one number per path, in order of first appearance; the total reward has its own entry."""
    names = dict.fromkeys(name for g in groups for name, v in g.signals.items() if isinstance(v, Tensor) and v.dim() == 1)
    return [name for name in names if name != "reward"]


def values_of(group: Group, name: str) -> Tensor:
    """[G] values of one signal; NaN where the group has none."""
    value = group.signals.get(name)
    return value.float().cpu() if isinstance(value, Tensor) and value.dim() == 1 else torch.full((len(group),), math.nan)


def length_where(groups: list[Group], grade: float) -> float:
    """The mean length of the paths whose signal `correct` is `grade`; NaN where nobody measures it."""
    return average(
        float(len(p))
        for g in groups
        if "correct" in g.signals
        for p, c in zip(g.paths, values_of(g, "correct").tolist())
        if c == grade
    )
