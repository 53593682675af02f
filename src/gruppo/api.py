"""From Python: `gruppo.train(...)` returns a Run, whose folder holds everything that the command line would have written."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from gruppo.graders.sources import load as load_source
from gruppo.policies.flow import FlowPolicy
from gruppo.policies.painters import on_the_hub
from gruppo.recipe import Recipe
from gruppo.runs.build import build_policy
from gruppo.runs.config import RunConfig, assemble, read
from gruppo.runs.data import load_data
from gruppo.runs.evaluate import Evaluation, Metric, evaluate
from gruppo.runs.folder import AVERAGE_FOLDER, RunFolder
from gruppo.runs.given import Given
from gruppo.runs.grading import grading_of, metrics_of
from gruppo.runs.resolve import resolve
from gruppo.runs.session import Session
from gruppo.runs.tasks import held_out_tasks
from gruppo.types import GruppoError


@dataclass
class Run:
    """A finished run."""

    session: Session
    before: dict[str, Any] | None  # held-out scores
    after: dict[str, Any] | None

    @property
    def folder(self) -> Path:
        return self.session.folder.path

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """One dictionary per step."""
        return self.session.folder.records(self.session.folder.metrics)

    @property
    def model(self) -> Any:
        return self.session.policy.model

    @property
    def tokenizer(self) -> Any:
        return self.session.policy.tokenizer

    def evaluate(self, data: Any = None, *, samples: int = 4, greedy: bool = True, metrics: Sequence[Metric] = ()) -> Evaluation:
        """The trained model, or its moving average where the run keeps one, on held-out tasks or on data of your own."""
        tasks = self.session.held_out if data is None else load_data(data)
        if not tasks:
            raise GruppoError("this run holds nothing out; pass data to evaluate on")
        rng = torch.Generator().manual_seed(self.session.config.fit.seed)
        grade = self.session.stages[-1].grade
        policy = self.session.policy
        with self.session.averaged():
            return evaluate(
                policy,
                tasks,
                grade,
                rng,
                samples=samples,
                greedy=greedy and not isinstance(policy, FlowPolicy),  # a flow has no likeliest picture
                by=self.session.config.eval.by,
                metrics=metrics_of(self.session.config, metrics),
            )


def train(
    *,
    model: Any = None,
    recipe: str | Recipe = "grpo",
    data: Any = None,
    offline: str | Path | Sequence[str | Path] = (),
    rewards: Any = None,
    weights: dict[str, float] | list[float] | None = None,
    world: str | None = None,
    tokenizer: Any = None,
    peft_config: Any = None,
    recipe_args: dict[str, Any] | None = None,
    policy: dict[str, Any] | None = None,
    fit: dict[str, Any] | None = None,
    eval: dict[str, Any] | None = None,
    eval_data: Any = None,
    metrics: Sequence[Metric] = (),
    track: dict[str, Any] | None = None,
    stages: list[dict[str, Any]] | None = None,
    config: RunConfig | None = None,
    name: str | None = None,
    folder: str | Path | None = None,
    quiet: bool = False,
) -> Run:
    """Train and return the run.

    `model`: hub id, folder or loaded model. `data`: path, `datasets.Dataset` or list of dictionaries with `prompt`. `rewards`:
    TRL functions, graders, or their names. `offline`: stored groups to train on instead of sampling. `policy`, `fit`, `eval` and
    `track` are the sections of a run file, checked the same way; `config` is a whole run, which the other arguments change.
    """
    given = Given(
        model=None if isinstance(model, (str, Path)) else model,
        tokenizer=tokenizer,
        peft_config=peft_config,
        data=None if isinstance(data, (str, Path)) else data,
        held_out=None if isinstance(eval_data, (str, Path)) else eval_data,
        recipe=recipe if isinstance(recipe, Recipe) else None,
        rewards=None if rewards is None else list(rewards) if isinstance(rewards, (list, tuple)) else [rewards],
        metrics=tuple(metrics),
    )
    asked: dict[str, Any] = {
        "world": world,
        "model": None if model is None else str(model) if given.model is None else "a Python object",
        "tokenizer": str(tokenizer) if isinstance(tokenizer, (str, Path)) else None,
        "data": None if data is None else str(data) if given.data is None else "a Python object",
        "offline": [str(f) for f in ([offline] if isinstance(offline, (str, Path)) else offline)] or None,
        "rewards": None if given.rewards is None else [name_of_reward(r) for r in given.rewards],
        "weights": weights,
        "recipe": recipe if isinstance(recipe, str) else None,
        "recipe_args": recipe_args,
        "policy": policy,
        "fit": fit,
        "eval": eval if not isinstance(eval_data, (str, Path)) else {**(eval or {}), "data": str(eval_data)},
        "track": track,
        "stages": stages,
        "name": name,
        "folder": None if folder is None else str(folder),
    }
    asked = {k: v for k, v in asked.items() if v is not None}
    if config is not None and recipe == "grpo":
        asked.pop("recipe", None)
    if given.recipe is not None:
        asked["fit"] = with_paths(given.recipe, asked.get("fit", {}))
    whole = assemble({} if config is None else config.model_dump(mode="json", exclude_unset=True), asked)
    return _drive(Session.new(whole, given, _say(quiet)), quiet)


def resume(
    run: str | Path,
    *,
    recipe: Recipe | None = None,
    rewards: Any = None,
    metrics: Sequence[Metric] = (),
    quiet: bool = False,
) -> Run:
    """Go on with a run from its last checkpoint. `rewards` and `recipe` are needed again only where a name cannot find them."""
    given = Given(
        recipe=recipe,
        rewards=None if rewards is None else list(rewards) if isinstance(rewards, (list, tuple)) else [rewards],
        metrics=tuple(metrics),
    )
    return _drive(Session.resume(run, given, _say(quiet)), quiet)


def _drive(session: Session, quiet: bool) -> Run:
    from gruppo.cli import drive, report_of

    if quiet:
        before, after = session.run(Silent())
        report_of(session)
        return Run(session, before, after)
    drive(session, plain=False)
    before, after = session.scores()
    return Run(session, before, after)


class Silent:
    """Shows nothing."""

    def step(self, record: Any, groups: Any) -> None:
        pass

    def evaluation(self, step: int, scores: Any) -> None:
        pass


def _say(quiet: bool) -> Callable[[str], None]:
    return (lambda sentence: None) if quiet else (lambda sentence: print(sentence, file=sys.stderr, flush=True))


def name_of_reward(reward: Any) -> str:
    """The name by which a resumed run finds a reward again, or `<name>` where only Python can give it."""
    if isinstance(reward, (str, Path)):
        return str(reward)
    module, name = str(getattr(reward, "__module__", "")), str(getattr(reward, "__qualname__", ""))
    importable = name.isidentifier() and module != "__main__"
    if importable and getattr(sys.modules.get(module), name, None) is reward:
        return f"{module}:{name}"
    return f"<{name or type(reward).__name__}>"


def with_paths(recipe: Recipe, fit: dict[str, Any]) -> dict[str, Any]:
    """`fit` with the number of paths that the recipe's rollout samples, so that it is told once and the same everywhere."""
    at: Any = recipe.rollout
    while at is not None and not isinstance(getattr(at, "n", None), int):
        at = getattr(at, "inner", None) or getattr(at, "first", None)
    if at is None:
        return fit
    if fit.get("paths_per_prompt", at.n) != at.n:
        raise GruppoError(
            f"fit.paths_per_prompt is {fit['paths_per_prompt']}, but the recipe given samples {at.n} paths per prompt; "
            "say it once"
        )
    return {**fit, "paths_per_prompt": at.n}


def evaluation_of(
    target: str,
    *,
    world: str | None = None,
    data: str | None = None,
    rewards: Sequence[Any] | None = None,
    step: int | None = None,
    tasks: int | None = None,
    samples: int | None = None,
    settings: Mapping[str, Any] = MappingProxyType({}),
    metrics: Sequence[Any] = (),
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> Evaluation:
    """Evaluate a run's checkpoint with the run's own settings, or any model on a world or on data with rewards.

    Of a run with `fit.ema` the averaged model is taken; name a checkpoint's folder for the weights themselves.
    """
    scorers = tuple(load_source(m) if isinstance(m, str) else m for m in metrics)
    path = Path(target).expanduser()
    base: dict[str, Any] = {}
    if (path / "run.yaml").exists():
        folder = RunFolder.open(path)
        base = read(path / "run.yaml")
        steps = folder.steps()
        if not steps:
            raise GruppoError(f"the run {path} has no checkpoint yet; evaluate its model folder instead")
        if step is not None and step not in steps:
            raise GruppoError(f"the run {path} has no checkpoint of step {step}; it keeps: {', '.join(map(str, steps))}")
        kept = folder.checkpoint(steps[-1] if step is None else step)
        averaged = (kept / AVERAGE_FOLDER).is_dir()  # what the run itself evaluated
        model = str(kept / AVERAGE_FOLDER if averaged else kept)
        base |= {"model": model, "tokenizer": model}
        base["offline"] = []
        base["policy"] = {**base.get("policy", {}), "lora": None}
    else:
        base = {"model": target}
        if (path / "model_index.json").exists() or on_the_hub(target):
            base["recipe"] = "flow-grpo"  # evaluation asks a recipe nothing, but one for text does not fit a painter
    asked: dict[str, Any] = {"world": world, "data": data, "rewards": list(rewards) if rewards else None}
    if data is not None and base.get("world"):
        base.pop("world")
    if not any((world, data, base.get("world"), base.get("data"))):
        raise GruppoError(f"on what shall {target} be evaluated? Give --world NAME, or --data FILE and --reward module:function")
    config = assemble(base, {k: v for k, v in asked.items() if v is not None}, settings)
    config = resolve(config, Given(), say)
    own = config.eval
    policy = build_policy(config)
    grade = grading_of(config, Given())
    return evaluate(
        policy,
        held_out_tasks(config, whole=data is not None)[: own.tasks if tasks is None else tasks],
        grade,
        torch.Generator().manual_seed(seed),
        samples=own.samples if samples is None else samples,
        greedy=own.greedy,
        by=own.by,
        metrics=metrics_of(config, scorers),
    )
