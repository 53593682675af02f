"""What a description leaves open, decided before the run starts: device, threads, absolute paths, a name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gruppo.recipes import find
from gruppo.runs import threads as torch_threads
from gruppo.runs.build import paints
from gruppo.runs.config import RunConfig
from gruppo.runs.given import RECIPE_FILE, Given
from gruppo.types import GruppoError


def resolve(config: RunConfig, given: Given, say: Callable[[str], None]) -> RunConfig:
    """The description with everything that was left open decided: device, threads, absolute paths."""
    policy = config.policy
    device = policy.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device.startswith("cuda") and not torch.cuda.is_available():
        raise GruppoError(
            f"policy.device is {device!r}, but torch {torch.__version__} sees no CUDA device; use policy.device=cpu"
        )
    threads = policy.threads
    if threads is None:
        choice = torch_threads.choose()
        threads = choice.threads
        say(f"torch threads: {choice}")
    changes: dict[str, Any] = {"policy": policy.model_copy(update={"device": device, "threads": threads})}
    greedy = config.eval.greedy and not paints(config, given.model)  # a flow has no likeliest picture
    changes["offline"] = [absolute(source) or source for source in config.offline]
    for key in ("model", "tokenizer", "data"):
        changes[key] = absolute(getattr(config, key))
    changes["rewards"] = [absolute_reward(r) for r in config.rewards]
    changes["eval"] = config.eval.model_copy(update={"data": absolute(config.eval.data), "greedy": greedy})
    changes["stages"] = [
        stage.model_copy(
            update={
                **({"data": absolute(stage.data)} if stage.data else {}),
                **({"rewards": [absolute_reward(r) for r in stage.rewards]} if stage.rewards else {}),
            }
        )
        for stage in config.stages
    ]
    return config.model_copy(update=changes)


def absolute(source: str | None) -> str | None:
    """A path that exists here as an absolute one, so that the run resumes from any folder; anything else as it is."""
    if source is None or not Path(source).expanduser().exists():
        return source
    return str(Path(source).expanduser().resolve())


def absolute_reward(reward: str) -> str:
    """`rewards.py:correct` with the whole path; `module:function` as it is."""
    where, colon, name = reward.rpartition(":")
    if colon and where.endswith(".py"):
        return f"{absolute(where)}:{name}"
    return absolute(reward) or reward


def default_name(config: RunConfig, given: Given) -> str:
    """`grpo-arithmetic`, `dapo-problems`: the recipe and what it trains on."""
    nickname = "recipe" if given.recipe is not None or config.recipe == RECIPE_FILE else find(config.recipe).nickname
    about = config.world or (Path(config.data).stem if config.data else "stored" if config.offline else "data")
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in f"{nickname}-{about}")
