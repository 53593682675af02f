"""Several recipes under the same conditions: one description, one run per recipe and seed, one table with intervals, one page.

Equal for all: the task stream of a seed, the most tokens and the paths that may be asked for, the optimizer's numbers, the
held-out tasks and the generator that samples on them. What a recipe decides itself, as a refill of dynamic sampling does, cannot
be made equal, so it is measured: every row and every token that the sampler was asked for, thrown away or not.

One recipe may stand there several times with other numbers, each time under a label: `strata=stratified-grpo`.

runs/<name>/  compare.yaml  compare.json  curves.png  compare.html  <label>-seed0/ ...
"""

from __future__ import annotations

import base64
import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from gruppo.claims.claim import half_width, mean
from gruppo.policies.flow import FlowPolicy
from gruppo.recipes import RECIPES, find
from gruppo.runs.build import DENOISING_STEPS, paints
from gruppo.runs.config import RunConfig, assemble, merge, parse, read, validate
from gruppo.runs.disk import disk
from gruppo.runs.folder import RunFolder
from gruppo.runs.given import Given
from gruppo.runs.interrupt import Interrupted
from gruppo.runs.report import versions, write_report
from gruppo.runs.resolve import absolute, absolute_reward
from gruppo.runs.session import Session
from gruppo.runs.show import duration, is_share, label, settings_rows
from gruppo.runs.stages import recipe_of
from gruppo.types import GruppoError

TEMPLATE = Path(__file__).with_name("compare.html.j2")
DESCRIPTION, RESULT, CURVES, PAGE = "compare.yaml", "compare.json", "curves.png", "compare.html"
SAMPLED = "sampled.jsonl"  # in a run's folder: what the sampler was asked for, per training step
EVALUATIONS = 5  # of a run after its beginning, unless eval.every says otherwise: a curve needs points
COLOURS = ("#0072b2", "#c8500a", "#00805c", "#8e4b9e", "#6b5d00", "#5a6570")
DASHES = ("-", "--", "-.", ":")

LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

Say = Callable[[str], None]


# -- what is compared ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """What a run may ask of the sampler, and what it is judged on. Two recipes are compared only if theirs are equal."""

    steps: int
    prompts_per_step: int
    paths_per_prompt: int
    max_new_tokens: int
    temperature: float
    held_out_tasks: int
    held_out_samples: int
    denoising_steps: int = 0  # of a picture; 0 where the model writes

    @property
    def paths(self) -> int:
        """Paths of a whole run."""
        return self.steps * self.prompts_per_step * self.paths_per_prompt

    @property
    def tokens(self) -> int:
        """The most tokens that those paths can hold, or the network calls of those pictures painted one by one."""
        return self.paths * (self.denoising_steps or self.max_new_tokens)

    @property
    def unit(self) -> str:
        """What sampling costs."""
        return "network calls" if self.denoising_steps else "tokens"

    @property
    def most(self) -> str:
        """What those paths cost at most, in words. Branches of one trunk cost less than pictures painted one by one."""
        return (
            f"{self.tokens:,} network calls if painted one by one" if self.denoising_steps else f"at most {self.tokens:,} tokens"
        )


def budget(config: RunConfig) -> Budget:
    """The budget that a description grants, with the number of paths that its recipe really samples where it says so."""
    at: Any = recipe_of(config, Given()).rollout
    while at is not None and not isinstance(getattr(at, "n", None), int):
        at = getattr(at, "inner", None) or getattr(at, "first", None)
    return Budget(
        steps=config.fit.steps,
        prompts_per_step=config.fit.prompts_per_step,
        paths_per_prompt=config.fit.paths_per_prompt if at is None else at.n,
        max_new_tokens=config.policy.max_new_tokens,
        temperature=config.policy.temperature,
        held_out_tasks=config.eval.tasks,
        held_out_samples=config.eval.samples,
        denoising_steps=(config.policy.denoising_steps or DENOISING_STEPS) if paints(config) else 0,
    )


def check_budgets(configs: Mapping[str, RunConfig]) -> Budget:
    """The one budget of all, or a sentence with both numbers."""
    (first, own), *others = ((name, budget(config)) for name, config in configs.items())
    for name, other in others:
        for key, here in asdict(own).items():
            there = asdict(other)[key]
            if here != there:
                raise GruppoError(
                    f"the budgets differ: {key} is {here:g} for {first} and {there:g} for {name} ({own.most} and "
                    f"{other.most} per run); recipes are compared on equal budgets"
                )
    return own


@dataclass(frozen=True)
class Plan:
    """A comparison before it runs: one description per label, equal but for the recipe and its own numbers."""

    folder: Path
    configs: dict[str, RunConfig]  # by label, which is the recipe's nickname unless another was given; with the first seed
    seeds: tuple[int, ...]
    budget: Budget
    described: dict[str, Any]  # what compare.yaml holds

    def run(self, called: str, seed: int) -> RunConfig:
        """One run's description."""
        config = self.configs[called]
        fit = config.fit.model_copy(update={"seed": seed})
        return config.model_copy(update={"fit": fit, "name": f"{called}-seed{seed}", "folder": str(self.folder)})

    @property
    def runs(self) -> list[tuple[str, int]]:
        """Seed by seed, so that a comparison that was stopped holds every recipe equally often."""
        return [(called, seed) for seed in self.seeds for called in self.configs]


def plan(
    recipes: Sequence[str],
    *,
    seeds: int = 3,
    settings: Mapping[str, Any] = MappingProxyType({}),
    own: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    name: str | None = None,
    folder: str | Path = "runs",
) -> Plan:
    """`settings` for all of them and `own` for one label, checked before anything is made.

    A recipe is named by its id or as `label=id`.
    """
    labels = labelled(recipes)
    if seeds < 1:
        raise GruppoError(f"seeds is {seeds}; a comparison trains every recipe at least once, and an interval needs 2 seeds")
    for key in ("recipe", "stages", "name", "folder"):
        if settings.get(key):
            raise GruppoError(f"{key!r} cannot be set for a comparison, which runs each of its recipes in a folder of its own")
    alone = {n if n in labels else find(n).nickname: dict(changes) for n, changes in own.items()}
    for called, changes in alone.items():
        if called not in labels:
            raise GruppoError(f"there are settings for {called}, which is not compared; compared are: {', '.join(labels)}")
        shared = [k for k in changes if k not in ("recipe_args", "fit")] or ["fit.seed"] * ("seed" in changes.get("fit", {}))
        if shared:
            raise GruppoError(
                f"{shared[0]} is set for {called} alone, but it is the same for all recipes of a comparison; only recipe_args "
                "and fit may differ"
            )
    given = placed(settings)
    configs = {
        called: with_evaluations(assemble(suited(given, nickname, labels.values()), alone.get(called, {}), {"recipe": nickname}))
        for called, nickname in labels.items()
    }
    check_different(configs)
    granted = check_budgets(configs)
    first = next(iter(configs.values()))
    if not first.eval.tasks:
        raise GruppoError("eval.tasks is 0, so nothing would be held out and the recipes could not be compared")
    about = first.world or Path(first.data or "data").stem
    title = name or "-".join(("compare", *labels, "".join(c if c.isalnum() or c in "._-" else "-" for c in about)))
    validate({**first.model_dump(mode="json"), "name": title}, "the comparison")
    begin = first.fit.seed
    words = [called if called == nickname else f"{called}={nickname}" for called, nickname in labels.items()]
    described = {"recipes": words, "seeds": list(range(begin, begin + seeds)), "settings": dict(given), "own": alone}
    described["library"] = versions({})["gruppo"]
    return Plan(Path(folder).expanduser() / title, configs, tuple(described["seeds"]), granted, plain(described))


def labelled(recipes: Sequence[str]) -> dict[str, str]:
    """Nicknames by label; a recipe without `label=` in front is called by its nickname."""
    found: dict[str, str] = {}
    for word in recipes:
        called, given, name = word.rpartition("=")
        nickname = find(name).nickname
        called = called if given else nickname
        if not LABEL.fullmatch(called):
            raise GruppoError(f"the label {called!r} becomes a folder's name; it needs letters, digits, '.', '_' or '-' only")
        if called != nickname and any(called in (e.nickname, e.arxiv, *e.aliases) for e in RECIPES.values()):
            raise GruppoError(f"{called} is the name of a recipe, so it cannot be the label of {nickname}; choose another")
        if called in found:
            raise GruppoError(
                f"{called} is named twice; give one of them a label and numbers of its own, for example "
                f"`gruppo compare {nickname} other={nickname} other:recipe_args.NUMBER=VALUE`"
            )
        found[called] = nickname
    if len(found) < 2:
        said = f"{len(found)} recipe is named" if found else "no recipe is named"
        raise GruppoError(f"{said}; a comparison needs at least two different ones, for example `gruppo compare grpo dapo`")
    return found


def check_different(configs: Mapping[str, RunConfig]) -> None:
    """A sentence when two labels describe the same runs."""
    known: dict[str, str] = {}
    for called, config in configs.items():
        # A number that is written out but is the default changes nothing.
        numbers = {
            **{k: str(v) for k, v in find(config.recipe).numbers.items()},
            **{k: str(v) for k, v in config.recipe_args.items()},
        }
        same = json.dumps([config.recipe, numbers, config.fit.model_dump(mode="json")], sort_keys=True, default=str)
        if same in known:
            raise GruppoError(
                f"{known[same]} and {called} are the same recipe with the same numbers, so their runs would be the same; set "
                f"one of its numbers for one of them, for example {called}:recipe_args.NUMBER=VALUE"
            )
        known[same] = called


def placed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with absolute paths, so that the comparison goes on from any folder."""
    out = {k: v for k, v in settings.items() if v not in (None, [], {})}
    out |= {key: absolute(str(out[key])) for key in ("model", "tokenizer", "data") if key in out}
    if isinstance(out.get("eval"), Mapping) and out["eval"].get("data"):
        out["eval"] = {**out["eval"], "data": absolute(out["eval"]["data"])}
    if "rewards" in out:
        out["rewards"] = [absolute_reward(str(r)) for r in out["rewards"]]
    return out


def suited(settings: Mapping[str, Any], nickname: str, nicknames: Iterable[str]) -> dict[str, Any]:
    """The settings with the numbers that this recipe takes; a number that no recipe takes stays, and is refused."""
    args = dict(settings.get("recipe_args", {}))
    taken = {n: find(n).numbers for n in nicknames}
    kept = {k: v for k, v in args.items() if k in taken[nickname] or not any(k in numbers for numbers in taken.values())}
    return {**settings, "recipe_args": kept}


def with_evaluations(config: RunConfig) -> RunConfig:
    """The description with evaluations on the way, where it does not place them itself."""
    if config.eval.every:
        return config
    every = max(1, math.ceil(config.fit.steps / EVALUATIONS))
    return config.model_copy(update={"eval": config.eval.model_copy(update={"every": every})})


def plain(value: Any) -> Any:
    """The value as its YAML reads back."""
    return parse(yaml.safe_dump(json.loads(json.dumps(value, default=str))))


def check_same(file: Path, described: Mapping[str, Any]) -> None:
    """A sentence when the comparison in this folder is another one."""
    before = read(file)
    for key, here, there in differences(before, described):
        raise GruppoError(
            f"{file} describes another comparison: {key} is {here!r} there and {there!r} now. Its runs are kept as they "
            "are; give the new comparison another --name, or repeat the old words to go on with it"
        )


def differences(a: Any, b: Any, at: str = "") -> list[tuple[str, Any, Any]]:
    """The dotted places where two descriptions differ."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        keys = dict.fromkeys([*a, *b])
        return [d for k in keys for d in differences(a.get(k), b.get(k), f"{at}.{k}" if at else str(k))]
    return [] if a == b else [(at, a, b)]


# -- running it ---------------------------------------------------------------------------------------------------------------


class Watch:
    """A run's display that counts: what the sampler was asked for in every training step goes into the run's folder.

    A row is one sequence that the sampler was asked to begin or to go on with, so that a turn of a conversation and a branch of
    a tree count as one each. Evaluations count nothing.
    """

    def __init__(self, folder: RunFolder, policy: Any, step: int, say: Say) -> None:
        self.folder, self.say = folder, say
        self.rows = self.tokens = 0
        file = folder.path / SAMPLED
        if file.exists():  # what was sampled after the checkpoint is sampled again
            kept = [r for r in folder.records(file) if r["step"] <= step]
            folder.write(SAMPLED, "".join(json.dumps(r) + "\n" for r in kept))
        self.counts: Counter[str] | None = None
        if isinstance(policy, FlowPolicy):
            self.counts, self.before = policy.counts, Counter(policy.counts)
            return
        sampler = getattr(policy, "policy", policy)  # below a world's tools, where every turn is sampled
        inner = sampler.sample

        def counted(prompts: Sequence[Any], **numbers: Any) -> list[Any]:
            paths = inner(prompts, **numbers)
            self.rows += len(paths)
            self.tokens += sum(map(len, paths))
            return paths

        sampler.sample = counted

    def step(self, record: Any, groups: Any) -> None:
        if (
            self.counts is not None
        ):  # pictures that were decoded, and calls of the network; evaluations have counters of their own
            spent = self.counts - self.before
            self.rows, self.tokens = sum(len(g) for g in groups), spent["sampled"]
            self.before = Counter(self.counts)
        self.folder.append(self.folder.path / SAMPLED, {"step": record["step"], "rows": self.rows, "tokens": self.tokens})
        self.rows = self.tokens = 0

    def evaluation(self, step: int, scores: Any) -> None:
        self.rows = self.tokens = 0
        name = next(iter(chosen([scores])), None)
        if name:
            self.say(f"{self.folder.path.name}  step {step}  {label(name)} {shown(name, scores[name]['value'])}")


def execute(made: Plan, say: Say) -> None:
    """All runs to their end: finished ones are kept, an interrupted one goes on from its last checkpoint."""
    file = made.folder / DESCRIPTION
    fresh = not file.exists()
    if not fresh:
        check_same(file, made.described)
    elif made.folder.exists() and any(made.folder.iterdir()):
        raise GruppoError(f"{made.folder} exists and is no comparison (it has no {DESCRIPTION}); choose another --name")
    if fresh:
        try:
            for called in made.configs:  # what can be known to fail fails for all recipes before any of them trains
                begin(as_the_first(made, made.run(called, made.seeds[0])), quiet)
            RunFolder(made.folder).write(DESCRIPTION, yaml.safe_dump(made.described, sort_keys=False, allow_unicode=True))
        except BaseException:
            shutil.rmtree(made.folder, ignore_errors=True)  # nothing was trained in it
            raise
    for n, (called, seed) in enumerate(made.runs, start=1):
        config = as_the_first(made, made.run(called, seed))
        path = Path(config.folder) / str(config.name)
        if finished(path, config):
            if config.track.report and not (path / "report.html").exists():
                write_report(path)
            say(f"{path.name} is finished ({n} of {len(made.runs)})")
            continue
        session = begin(config, quiet)
        say(f"{path.name}  {session.step} of {config.fit.steps} steps done ({n} of {len(made.runs)})")
        try:
            session.run(Watch(session.folder, session.policy, session.step, say))
        except GruppoError as error:
            raise GruppoError(f"{path.name}: {error}") from error
        except (Interrupted, KeyboardInterrupt) as error:
            code = error.code if isinstance(error, Interrupted) else 130
            raise Interrupted(f"stopped in {path}; the same `gruppo compare` goes on from there", code) from None
        if config.track.report:
            write_report(path)


def begin(config: RunConfig, say: Say) -> Session:
    """The run, new or where it was stopped; a complaint names the recipe."""
    path = Path(config.folder) / str(config.name)
    try:
        if (path / "run.yaml").exists():
            return Session.resume(path, say=say)
        if path.exists():  # killed before its description was written, so before it trained anything
            shutil.rmtree(path)
        return Session.new(config, say=say)
    except GruppoError as error:
        raise GruppoError(f"{config.recipe}: {error}") from error


def as_the_first(made: Plan, config: RunConfig) -> RunConfig:
    """The description on the device and threads that the first run found best: another number of threads rounds differently."""
    file = made.folder / f"{next(iter(made.configs))}-seed{made.seeds[0]}" / "run.yaml"
    if not file.exists():
        return config
    found = read(file)["policy"]
    return config.model_copy(update={"policy": config.policy.model_copy(update={k: found[k] for k in ("device", "threads")})})


def finished(path: Path, config: RunConfig) -> bool:
    """Whether the run has its last checkpoint, which is written after its last evaluation."""
    return (path / "run.yaml").exists() and config.fit.steps in RunFolder(path).steps()


def quiet(sentence: str) -> None:
    """Says nothing."""


# -- the result ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % interval by Student's t; no interval for a single seed."""

    mean: float
    low: float | None
    high: float | None
    values: tuple[float, ...]

    @staticmethod
    def of(values: Sequence[float]) -> Estimate:
        half = half_width(values) if len(values) > 1 else None
        centre = mean(values)
        return Estimate(centre, *((None, None) if half is None else (centre - half, centre + half)), tuple(values))


@dataclass(frozen=True)
class Outcome:
    """What one run came to. `rows` and `tokens` are None where some of its steps ran without being counted."""

    folder: str
    seed: int
    scores: dict[str, float | None]  # at the end
    curve: list[dict[str, Any]]  # step, scores; sampled: tokens sampled until then
    rewards: list[float | None]  # per step, of the groups that were kept
    rows: int | None
    tokens: int | None
    seconds: float

    @staticmethod
    def read(path: Path, seed: int) -> Outcome:
        folder = RunFolder.open(path)
        metrics = {r["step"]: r for r in folder.records(folder.metrics)}
        counted = {r["step"]: r for r in folder.records(path / SAMPLED)}
        complete = sorted(counted) == sorted(metrics)
        spent = {step: sum(r["tokens"] for s, r in counted.items() if s <= step) for step in (0, *metrics)}
        curve = []
        for record in folder.records(folder.evals):
            values = {name: s["value"] for name, s in record["scores"].items()}
            curve.append({"step": record["step"], **values, "sampled": spent[record["step"]] if complete else None})
        if not curve or curve[-1]["step"] != max(metrics):
            raise GruppoError(
                f"{path} has no evaluation of its last step, so it cannot be compared; remove the folder to repeat it"
            )
        return Outcome(
            path.name,
            seed,
            {k: v for k, v in curve[-1].items() if k not in ("step", "sampled")},
            curve,
            [r["reward"] for r in metrics.values()],
            sum(r["rows"] for r in counted.values()) if complete else None,
            sum(r["tokens"] for r in counted.values()) if complete else None,
            sum(r["seconds"] for r in metrics.values()),
        )


@dataclass(frozen=True)
class Line:
    """One recipe of the table. Differences are paired by seed: the same prompts in the same order, the same evaluation."""

    recipe: str  # its label in this comparison
    nickname: str
    arxiv: str
    own: dict[str, Any]  # settings of this line alone
    scores: dict[str, Estimate | None]  # None: in some run every grade abstained
    differences: dict[str, Estimate | None]  # to the first recipe; empty for itself
    rows: float | None  # mean over seeds
    tokens: float | None
    seconds: float
    rows_ratio: float | None  # to the first recipe
    tokens_ratio: float | None
    marked: bool  # it sampled more or less than the first one, by more than is tolerated, or was not counted
    runs: list[Outcome]


@dataclass(frozen=True)
class Comparison:
    """The finished comparison; its files are in `folder`."""

    folder: Path
    budget: Budget
    seeds: tuple[int, ...]
    tolerance: float
    names: list[str]  # of the scores
    lines: list[Line]
    settings: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "folder": str(self.folder),
            "budget": {**asdict(self.budget), "paths": self.budget.paths, "most_tokens": self.budget.tokens},
            "seeds": list(self.seeds),
            "tolerance": self.tolerance,
            "recipes": [asdict(line) for line in self.lines],
            "settings": self.settings,
        }

    def table(self) -> list[dict[str, str]]:
        """One row per recipe, for a person."""
        first = self.lines[0].recipe
        out = []
        for line in self.lines:
            row = {"recipe": line.recipe}
            for name in self.names:
                title = f"{label(name)} %" if is_share(name) else label(name)
                row[title] = told(name, line.scores[name])
                row[f"{title} - {first}"] = told(name, line.differences[name], signed=True) if line.differences else "-"
            row["paths"], row[self.budget.unit] = (
                f"{count(n)} ({times(ratio)}){' *' * line.marked}"
                for n, ratio in ((line.rows, line.rows_ratio), (line.tokens, line.tokens_ratio))
            )
            row["time"] = duration(line.seconds)
            out.append(row)
        return out

    def notes(self) -> list[str]:
        """What the table's reader has to know."""
        budget, first = self.budget, self.lines[0].recipe
        out = [
            f"Every run: {budget.steps} steps of {budget.prompts_per_step} prompts x {budget.paths_per_prompt} paths of "
            + (
                f"{budget.denoising_steps} denoising steps"
                if budget.denoising_steps
                else f"at most {budget.max_new_tokens} tokens"
            )
            + f", so {budget.paths:,} paths and {budget.most}; judged on the same "
            f"{budget.held_out_tasks} held-out problems, {budget.held_out_samples} samples each.",
        ]
        if len(self.seeds) > 1:
            out.append(
                f"Means over {len(self.seeds)} seeds; ± is half of the 95 % interval by Student's t over seeds, and a difference "
                "is paired by seed."
            )
        else:
            out.append("One seed, so there are no intervals: a difference between two recipes may be chance.")
        out.append(
            f"Paths and {budget.unit}: what a run asked of its sampler while training, also what it threw away; mean per run."
        )
        for line in self.lines:
            own = ", ".join(f"{k}={v}" for k, v in settings_rows(line.own))
            if line.recipe != line.nickname or own:
                out.append(f"{line.recipe} is {line.nickname}" + (f" with {own}." if own else "."))
        marked = [line for line in self.lines if line.marked]
        allowed = f"more than the tolerated {100 * self.tolerance:g} % away from" if self.tolerance else "other than"
        if any(line.tokens_ratio is None for line in marked):
            out.append("* not counted, because some steps of a run were trained outside of the comparison.")
        if any(line.tokens_ratio is not None for line in marked):
            out.append(
                f"* paths or {budget.unit} {allowed} those of {first}, so this score was bought with another amount of sampling."
            )
        elif self.tolerance and not marked:
            out.append(
                f"No recipe's paths or {budget.unit} are more than the tolerated {100 * self.tolerance:g} % away from {first}'s."
            )
        return out


def judge(made: Plan, tolerance: float = 0.0) -> Comparison:
    """The finished runs of a plan as a table."""
    runs = {n: [Outcome.read(made.folder / f"{n}-seed{s}", s) for s in made.seeds] for n in made.configs}
    names = chosen([o.scores for outcomes in runs.values() for o in outcomes])
    if not names:
        raise GruppoError(f"the runs in {made.folder} share no held-out score, so there is nothing to compare")
    first = next(iter(runs.values()))
    lines = []
    for called, outcomes in runs.items():
        entry = find(made.configs[called].recipe)
        scores = {name: estimate([o.scores[name] for o in outcomes]) for name in names}
        apart = {name: estimate([minus(o.scores[name], f.scores[name]) for o, f in zip(outcomes, first)]) for name in names}
        rows, tokens = (average([getattr(o, key) for o in outcomes]) for key in ("rows", "tokens"))
        more_rows = ratio(rows, average([o.rows for o in first]))
        more_tokens = ratio(tokens, average([o.tokens for o in first]))
        lines.append(
            Line(
                called,
                entry.nickname,
                entry.arxiv,
                dict(made.described["own"].get(called, {})),
                scores,
                {} if outcomes is first else apart,
                rows,
                tokens,
                mean([o.seconds for o in outcomes]),
                more_rows,
                more_tokens,
                any(r is None or abs(r - 1) > tolerance for r in (more_rows, more_tokens)),
                outcomes,
            )
        )
    return Comparison(made.folder, made.budget, made.seeds, tolerance, names, lines, made.described)


def chosen(scores: Sequence[Mapping[str, Any]]) -> list[str]:
    """Greedy and sampled accuracy; where nothing is right or wrong, what is measured of ranked lists, else the mean reward."""
    shared = [name for name in scores[0] if all(name in s for s in scores)]
    exact = [n for n in shared if n == "greedy" or n.startswith("mean@")]
    ranked = [n for n in shared if re.fullmatch(r"(recall|ndcg)@\d+|catalog_share", n)]
    return exact or ranked or [n for n in shared if n in ("reward", "greedy_reward")]


def estimate(values: Sequence[float | None]) -> Estimate | None:
    heard = [v for v in values if v is not None and math.isfinite(v)]
    return Estimate.of(heard) if len(heard) == len(values) else None


def average(values: Sequence[int | float | None]) -> float | None:
    heard = [float(v) for v in values if v is not None]
    return mean(heard) if len(heard) == len(values) else None


def minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def ratio(a: float | None, b: float | None) -> float | None:
    if a is None or b is None:
        return None
    return a / b if b else 1.0  # nothing is sampled on stored groups


def shown(name: str, value: float | None, *, signed: bool = False) -> str:
    """A score in percent, or a plain number."""
    if value is None:
        return "-"
    sign = "+" if signed else ""
    return f"{100 * value:{sign}.1f}" if is_share(name) else f"{value:{sign}.3g}"


def told(name: str, found: Estimate | None, *, signed: bool = False) -> str:
    """`71.2 ± 6.2`, the mean and half of its interval."""
    if found is None:
        return "abstained"
    said = shown(name, found.mean, signed=signed)
    return said if found.high is None else f"{said} ± {shown(name, found.high - found.mean)}"


def count(n: int | float | None) -> str:
    return "-" if n is None else f"{n:,.0f}"


def times(ratio: float | None) -> str:
    return "not counted" if ratio is None else f"{ratio:.2f}x"


# -- files --------------------------------------------------------------------------------------------------------------------


def draw(found: Comparison, file: Path) -> Path:
    """Learning curves as a PNG: the mean over seeds in a band from the lowest to the highest seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    panels = [(name, "step") for name in found.names]
    if all(line.tokens is not None for line in found.lines):
        panels.append((found.names[-1], "sampled"))
    panels.append(("reward", "training"))
    high = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(11, 3.7 * high), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(high, 2, squeeze=False).flatten()
    for (name, against), ax in zip(panels, axes):
        scale = 100 if against != "training" and is_share(name) else 1
        for i, line in enumerate(found.lines):
            x, columns = points(line, name, against)
            if not x:
                continue
            colour, dash = COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)]
            ax.plot(x, [scale * mean(c) for c in columns], color=colour, linestyle=dash, label=line.recipe, linewidth=1.8)
            ax.fill_between(
                x, [scale * min(c) for c in columns], [scale * max(c) for c in columns], color=colour, alpha=0.15, lw=0
            )
        held = f"{label(name)}, held out" + (" (%)" if scale == 100 else "")
        ax.set_title("training reward of the groups that were kept" if against == "training" else held, fontsize=10, loc="left")
        ax.set_xlabel(f"{found.budget.unit} sampled" if against == "sampled" else "step", fontsize=9)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        ax.tick_params(labelsize=8)
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=9, frameon=False)
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    with disk(file):
        figure.savefig(file, format="png")
    return file


def points(line: Line, name: str, against: str) -> tuple[list[float], list[list[float]]]:
    """x, and for every x the values of all seeds; a point that some seed lacks is left out."""
    if against == "training":
        rows = [list(enumerate(o.rewards, start=1)) for o in line.runs]
    else:
        rows = [[(c[against], c.get(name)) for c in o.curve] for o in line.runs]
    kept = [p for p in zip(*rows) if all(x is not None and y is not None for x, y in p)]
    return [mean([float(x) for x, _ in p]) for p in kept], [[y for _, y in p] for p in kept]


def write(found: Comparison) -> Path:
    """compare.json, curves.png and the page, which needs no other file but for its links to the runs' reports."""
    import jinja2

    folder = RunFolder(found.folder)
    folder.write(RESULT, json.dumps(found.as_dict(), indent=1, allow_nan=False) + "\n")
    image = draw(found, found.folder / CURVES)
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = page.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        name=found.folder.resolve().name,
        recipes=[(find(line.nickname), line) for line in found.lines],
        seeds=found.seeds,
        table=found.table(),
        notes=found.notes(),
        curves=base64.b64encode(image.read_bytes()).decode(),
        runs=[(line.recipe, o, (found.folder / o.folder / "report.html").exists()) for line in found.lines for o in line.runs],
        names=found.names,
        unit=found.budget.unit,
        label=label,
        shown=shown,
        count=count,
        duration=duration,
        settings=yaml.safe_dump(found.settings, sort_keys=False, allow_unicode=True),
        versions=versions({}),
    )
    return folder.write(PAGE, text)


# -- from Python and from the command line ------------------------------------------------------------------------------------


def compare(
    recipes: Sequence[str],
    *,
    world: str | None = None,
    model: str | Path | None = None,
    data: str | Path | None = None,
    rewards: Sequence[str] = (),
    seeds: int = 3,
    settings: Mapping[str, Any] = MappingProxyType({}),
    own: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    tolerance: float = 0.0,
    name: str | None = None,
    folder: str | Path = "runs",
    say: Say = print,
) -> Comparison:
    """Train every recipe once per seed under the same conditions, one run after the other, and compare them.

    `settings` are sections of a run file for all runs (`{"fit": {"steps": 40}}`), `own` those of one recipe. A recipe may be
    named `label=recipe`, and then several times. The same call again goes on where the last one was stopped.
    """
    if not tolerance >= 0:
        raise GruppoError(f"tolerance is {tolerance}; it is a share of the first recipe's tokens, for example 0.05")
    asked = {"world": world, "model": model and str(model), "data": data and str(data), "rewards": list(rewards)}
    given = merge({k: v for k, v in asked.items() if v}, settings)
    made = plan(recipes, seeds=seeds, settings=given, own=own, name=name, folder=folder)
    execute(made, say)
    found = judge(made, tolerance)
    write(found)
    return found


def named(words: Iterable[str]) -> tuple[list[str], list[str]]:
    """Recipes, also as `label=recipe`, and settings: a setting's key has a dot or a colon, or is a key of the run file."""
    recipes: list[str] = []
    settings: list[str] = []
    for word in words:
        key, equals, _ = word.partition("=")
        setting = equals and (set(key) & set(".:") or key in RunConfig.model_fields)
        (settings if setting else recipes).append(word)
    return recipes, settings


def own_settings(words: Iterable[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Settings for all, and those of `recipe:section.key=value` by recipe or label."""
    common: list[str] = []
    alone: dict[str, list[str]] = {}
    for word in words:
        key, equals, value = word.partition("=")
        owner, colon, rest = key.rpartition(":")
        if colon:
            alone.setdefault(owner, []).append(f"{rest}{equals}{value}")
        else:
            common.append(word)
    return common, alone
