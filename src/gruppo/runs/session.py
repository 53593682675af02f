"""A run from its description to its last checkpoint: built, checked before step 0, trained, saved, resumed.

Everything that the future of a run depends on is in `state()`; a run that is killed and resumed takes the same path, bit for
bit on CPU.
"""

from __future__ import annotations

import json
import math
import pickle
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gruppo.core.collate import NotFinite, Passes
from gruppo.policies.flow import FlowPolicy
from gruppo.policies.load import ignored_sampling, load_tokenizer, save
from gruppo.policies.reference import Ema, Warming, initial, swapped
from gruppo.recipe import Recipe, check_needs, whole
from gruppo.recipes import find, recipe
from gruppo.rollouts.stale import stale
from gruppo.rollouts.stored import Stored, offline, read_groups
from gruppo.runs import data as tasks_of
from gruppo.runs import threads as torch_threads
from gruppo.runs.build import agree, build_policy, for_engine, paints, probe, world_of
from gruppo.runs.config import RunConfig, arguments, dump, read, validate
from gruppo.runs.evaluate import Evaluation, Metric, evaluate
from gruppo.runs.folder import RunFolder
from gruppo.runs.folder import whole as written_whole
from gruppo.runs.measure import measure
from gruppo.runs.pictures import save_pictures
from gruppo.runs.track import tracker
from gruppo.train import fit
from gruppo.types import Group, GruppoError, Reference, Task

RECIPE_FILE, PEFT_FOLDER, INITIAL_FOLDER = "recipe.pickle", "peft", "initial"
AVERAGE_FOLDER = "average"  # in a checkpoint: the model with the averaged weights


@dataclass(frozen=True)
class Given:
    """Python objects that stand in for what the file would name."""

    model: Any = None
    tokenizer: Any = None
    peft_config: Any = None
    data: Any = None
    held_out: Any = None
    recipe: Recipe | None = None
    rewards: Sequence[Any] | None = None
    metrics: tuple[Metric, ...] = ()


class Sampled:
    """How many tokens the policy's sampler has written, whatever became of them."""

    def __init__(self, policy: Any) -> None:
        self.tokens = 0
        sampler = getattr(policy, "policy", policy)  # below a world's tools, where every turn is sampled
        inner = sampler.sample

        def counted(*args: Any, **numbers: Any) -> list[Any]:
            paths = inner(*args, **numbers)
            self.tokens += sum(map(len, paths))
            return paths

        sampler.sample = counted


@dataclass
class Stage:
    """A part of the run that has one recipe, one stream and one grading; it covers the steps begin+1 .. end."""

    config: RunConfig
    recipe: Recipe
    grade: Any
    at: Callable[[int], Task]
    begin: int
    end: int
    rate: Callable[[int], float]


class Interrupted(Exception):
    """A person or the machine asked the run to stop; it can be resumed."""

    def __init__(self, sentence: str, code: int) -> None:
        super().__init__(sentence)
        self.code = code


class Session:
    """One run. `new` or `resume` makes it, `run` trains it to its end."""

    def __init__(self, config: RunConfig, folder: RunFolder, given: Given, say: Callable[[str], None]) -> None:
        self.folder, self.given, self.say = folder, given, say
        self.config = config
        self.step, self.seconds = 0, 0.0
        self.best: dict[str, Any] | None = None  # step, metric and score of the best held-out evaluation
        torch.set_num_threads(config.policy.threads or 1)
        self.policy = build_policy(config, given.model, given.tokenizer, given.peft_config)
        self.tasks, self.held_out = self._data()
        self.stages = self._stages()
        self.stage = 0
        self.rng = torch.Generator().manual_seed(config.fit.seed)
        self.stream = tasks_of.Stream(self.stages[0].at)
        # Made now, while the policy holds the initial weights; a resumed run does the same before it loads its checkpoint.
        self.references = {maker: maker(self.policy) for s in self.stages if (maker := s.recipe.reference) is not None}
        self.optimizer = torch.optim.AdamW(
            list(self.policy.parameters()), lr=0.0, betas=config.fit.betas, weight_decay=config.fit.weight_decay
        )
        self.average = None
        if (ema := config.fit.ema) is not None:
            self.average = Ema(self.policy, Warming(ema.most, ema.slow), ema.every)
            # the optimizer's own steps count: an iteration may hold several, and one that is skipped is none
            self.optimizer.register_step_post_hook(lambda *_: self.average.update([]) if self.average is not None else None)
        self.trackers = [tracker(name, folder.path) for name in config.track.to]
        self.sampled = Sampled(self.policy)
        self._enter(0)

    # -- beginnings ---------------------------------------------------------------------------------------------------

    @staticmethod
    def new(config: RunConfig, given: Given | None = None, say: Callable[[str], None] = print) -> Session:
        """A run in a folder of its own, checked up to the first graded group; nothing is left behind when a check fails."""
        given = given or Given()
        config = resolve(config, given, say)
        folder = RunFolder.create(Path(config.folder), config.name or default_name(config, given), numbered=config.name is None)
        try:
            config, given = keep_objects(config, given, folder, say)
            session = Session(config, folder, given, say)
            session.preflight()
        except BaseException:
            shutil.rmtree(folder.path)
            raise
        # without the name: running this file again makes a run of its own
        folder.write("run.yaml", dump(config.model_copy(update={"name": None})))
        return session

    @staticmethod
    def resume(path: Path | str, given: Given | None = None, say: Callable[[str], None] = print) -> Session:
        """The run in this folder at its last complete checkpoint, or at its beginning when it has none."""
        folder = RunFolder.open(path)
        config = validate(read(folder.path / "run.yaml"), str(folder.path / "run.yaml"))
        given = found_objects(given or Given(), folder)
        steps = folder.steps()
        last = steps[-1] if steps else 0
        if last >= config.ends[-1]:
            raise GruppoError(
                f"the run {folder.path} is finished: {last} of {config.ends[-1]} steps; to go on, start a new run from its "
                f"model, --model {folder.checkpoint(last)}"
            )
        session = Session(config, folder, given, say)
        session.preflight()
        if last:
            session.load(last)
        folder.rewind(last)
        say(f"resuming {folder.path} after step {last} of {config.ends[-1]}")
        return session

    def _data(self) -> tuple[list[list[Task] | None], list[Task]]:
        """Each stage's own tasks (None where a world makes them), and the held-out tasks of the run."""
        config, out = self.config, []
        held: list[Task] = []
        world = world_of(config)
        if config.offline and isinstance(self.policy, FlowPolicy):
            raise GruppoError("stored groups of an image model hold no latents, so it cannot be trained on them; remove offline")
        self.buffer = read_groups(config.offline, self.policy) if config.offline else []
        for n in range(max(1, len(config.stages))):
            own = config.at(n)
            if self.buffer:
                out.append(tasks_of.only([g.task for g in self.buffer], own.only))
                continue
            if own.data is None and self.given.data is None:
                out.append(None)
                continue
            source = self.given.data if n == 0 or own.data == config.data else None
            rows = tasks_of.load_data(own.data if source is None else source)
            name = str(own.data) if source is None else "the data"
            self._check_lengths(rows, own.policy.max_new_tokens, name)
            kept = tasks_of.only(rows, own.only)
            inside = 0.0 if own.eval.data or self.given.held_out is not None or world else own.eval.share
            train, away = tasks_of.split(kept, inside, own.eval.tasks)
            held = held or away
            out.append(train)
        if self.given.held_out is not None or config.eval.data:
            source = config.eval.data if self.given.held_out is None else self.given.held_out
            held = tasks_of.load_data(source)[: config.eval.tasks]
            self._check_lengths(held, config.policy.max_new_tokens, "the held-out data")
            own_prompts = {tasks_of.digest(t.prompt) for t in held}
            for train in out:
                shared = sum(tasks_of.digest(t.prompt) in own_prompts for t in train or ())
                if shared:
                    self.say(f"{shared} training rows have the same prompt as a held-out row: the evaluation will look too good")
        elif world is not None and config.eval.tasks:
            held = world.held_out(config.eval.tasks)
        # a later stage must not train on what an earlier one holds out
        away = {tasks_of.digest(t.prompt) for t in held}
        out = [t if t is None or config.eval.data else [x for x in t if tasks_of.digest(x.prompt) not in away] for t in out]
        return out, held

    def _check_lengths(self, rows: list[Task], longest: int, name: str) -> None:
        if not isinstance(self.policy, FlowPolicy):  # what a painter reads of a prompt is cut by its text encoder, not by us
            tasks_of.check_lengths(self.policy, rows, longest, name)

    def _stages(self) -> list[Stage]:
        out: list[Stage] = []
        begin = 0
        for n, end in enumerate(self.config.ends):
            own = self.config.at(n)
            before = out[-1] if out else None
            same = before is not None and (own.recipe, own.recipe_args) == (before.config.recipe, before.config.recipe_args)
            same = same and before is not None and sampling(own) == sampling(before.config)
            grade = grading_of(own, self.given)
            same = same and before is not None and weight_of_correct(own, grade) == weight_of_correct(before.config, before.grade)
            if same and before is not None:
                made = before.recipe
            else:
                made = recipe_of(own, self.given, weight_of_correct(own, grade))
                made = offline(made, self._stored(own)) if self.buffer else for_engine(made, own)
                made = stale(made, own.fit.sync_every, own.fit.sync_lag, begin)
            seed = own.fit.seed + n
            tasks = self.tasks[n]
            if tasks is not None:
                at = tasks_of.shuffled(tasks, seed)
            else:
                at = _world_stream(own, seed)
            out.append(Stage(own, made, grade, at, begin, end, rate_of(own, begin)))
            begin = end
        return out

    def _stored(self, config: RunConfig) -> Stored:
        """The buffer as a rollout: stored rewards, other weights of stored signals, or new grades."""
        world = world_of(config)
        regrade = bool(config.rewards)
        weights = None if regrade else by_signal(config) or (None if world is None else dict(world.weights))
        stored = Stored(", ".join(config.offline), self.buffer, weights, regrade)
        stored.check()
        return stored

    def _enter(self, n: int) -> None:
        """Switch to a stage: its stream from the beginning, its recipe, its numbers."""
        stage = self.stages[n]
        self.stage = n
        self.stream = tasks_of.Stream(stage.at)
        if not isinstance(self.policy, FlowPolicy):  # a flow has neither
            self.policy.temperature, self.policy.max_new = stage.config.policy.temperature, stage.config.policy.max_new_tokens
        maker = stage.recipe.reference
        if n and maker is not None and maker != self.stages[n - 1].recipe.reference and maker is not initial:
            self.references[maker] = maker(self.policy)  # a moving average starts where its stage starts
        self.policy.reference = self.reference

    @property
    def recipe(self) -> Recipe:
        return self.stages[self.stage].recipe

    @property
    def reference(self) -> Reference | None:
        maker = self.recipe.reference
        return None if maker is None else self.references[maker]

    def preflight(self) -> None:
        """Sample and grade one group per stage before step 0, so that what can be known to fail fails now."""
        for n, stage in enumerate(self.stages):
            self._enter(n)
            task = stage.at(0)
            check_needs(stage.recipe, self.tasks[n] or [task])
            rng = torch.Generator().manual_seed(stage.config.fit.seed)
            if self.buffer:  # as it was read: the prompt's text is not tokenised again
                first = self.buffer[0].paths[0]
                paths = self.policy.sample([first.prompt] * 2, g=rng, max_new=min(32, self.policy.max_new, len(first)))
            else:
                paths = probe(self.policy, task, rng)
            agree(self.policy, self.config, paths)
            if self.buffer:
                regraded = stage.grade.preflight(self.buffer[:1]) if stage.config.rewards else self.buffer
                check_needs(stage.recipe, (), regraded)
                continue
            graded = stage.grade.preflight([Group(task, paths)])[0]
            check_needs(stage.recipe, (), [graded])
        self._enter(0)

    def facts(self) -> dict[str, str]:
        """What the run found out about itself, to be read before it starts."""
        parameters = list(self.policy.parameters())
        total = sum(p.numel() for p in self.policy.model.parameters())
        rows = [len(t) for t in self.tasks if t is not None]
        out = {
            "parameters": f"{sum(p.numel() for p in parameters):,} trained of {total:,}",
            "rewards": "; ".join(f"{name} x {weight:g}" for name, weight in self.stages[0].grade.weights.items()),
            "stored groups" if self.buffer else "training tasks": " and ".join(f"{n:,} rows" for n in rows)
            or "an endless stream",
            "held-out tasks": f"{len(self.held_out):,}",
        }
        if (ema := self.config.fit.ema) is not None:
            out["evaluated"] = f"a moving average of the weights (decay up to {ema.most:g}, every {ema.every} optimizer steps)"
        if isinstance(self.policy, FlowPolicy):
            return out
        ignored = ignored_sampling(self.policy.model, self.policy.temperature)
        return out | ({"note": ignored} if ignored else {})

    def scores(self) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """Held-out scores before and after the run."""
        return scores_at(self.folder, 0), scores_at(self.folder, self.config.ends[-1])

    # -- the run ------------------------------------------------------------------------------------------------------

    def run(self, show: Any) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """Train to the end; the held-out scores before and after. `show` is told of every step."""
        total = self.config.ends[-1]
        for one in self.trackers:
            one.start(self.config.model_dump(mode="json"))
        if self.step == 0 and not self.folder.evals.exists():
            self._evaluate(show)
        try:
            with stopping() as stop:
                while self.step < total:
                    self._run_stage(show, stop)
        finally:
            for one in self.trackers:
                one.finish()
        return self.scores()

    def _run_stage(self, show: Any, stop: list[int]) -> None:
        stage = self.stages[self.stage]
        own, track = stage.config, self.config.track
        drawn: list[Any] = []

        def draw() -> Any:
            stage.grade.at(self.step + 1, self.config.ends[-1])
            drawn[:] = [self.stream.take(own.fit.prompts_per_step)]
            return drawn[0]

        loop = fit(
            self.policy,
            draw,
            stage.grade,
            stage.recipe,
            self.optimizer,
            self.rng,
            start=self.step,
            steps=stage.end,
            rate=stage.rate,
            ref=self.reference,
            budget=own.fit.token_budget,
            max_grad_norm=own.fit.max_grad_norm,
            skip_grad_norm=own.fit.skip_grad_norm,
        )
        while self.step < stage.end:
            began, before, written = time.perf_counter(), Counter(self._counted()), self.sampled.tokens
            failed = Counter(stage.grade.failures)
            try:
                step, done = next(loop)
            except GruppoError as error:
                raise self._broken(error, drawn) from error
            seconds, counts = time.perf_counter() - began, self._counted() - before
            self.step, self.seconds = step, self.seconds + seconds
            record = measure(done, step=step, now=time.time(), seconds=seconds, lr=stage.rate(step))
            if "tokens" in record and not self.buffer:  # those of groups that the rollout threw away were sampled too
                record["tokens"] = self.sampled.tokens - written
                record["tokens_per_s"] = record["tokens"] / seconds if seconds > 0 else None
            if failures := Counter(stage.grade.failures) - failed:
                record["failures"] = dict(failures)
            if counts:
                record["counts"] = dict(counts)
            if len(self.stages) > 1:
                record["stage"] = self.stage + 1
            if own.fit.sync_every > 1 or own.fit.sync_lag:
                ages = [step - 1 - p.version for g in done.groups for p in g.paths]
                record["stale"] = sum(ages) / len(ages)
            logged = stage.grade.take_metrics()
            if logged:
                record["logged"] = logged
            self.folder.append(self.folder.metrics, record)
            for one in self.trackers:
                one.log(step, record)
            if track.groups_every and (step % track.groups_every == 0 or step == 1):
                strata = getattr(stage.recipe.advantage, "stratum", None)
                self._save_groups("groups", step, done.groups, strata)
            show.step(record, done.groups)
            last = step == self.config.ends[-1]
            improved = False
            if last or (self.config.eval.every and step % self.config.eval.every == 0):
                improved = self._evaluate(show)
            if step == stage.end and not last:
                self._enter(self.stage + 1)
            if last or improved or stop or (track.save_every and step % track.save_every == 0):
                self._save()
            if stop and not last:
                raise Interrupted(
                    f"stopped after step {step} of {self.config.ends[-1]}; a checkpoint was written, continue with: "
                    f"gruppo resume {self.folder.path}",
                    128 + stop[0],
                )

    def _counted(self) -> Counter[str]:
        """What the policy has computed so far, by purpose."""
        return self.policy.counts

    def _save_groups(self, kind: str, step: int, groups: list[Group], strata: Any = None) -> Path:
        if isinstance(self.policy, FlowPolicy):
            return save_pictures(self.folder.path / kind / f"step-{step:06d}.parquet", step, groups)
        return self.folder.save_groups(kind, step, groups, self.policy.tokenizer, strata)

    def _broken(self, error: GruppoError, drawn: list[Any]) -> GruppoError:
        """Save what the failing step was working on, when numbers are the reason, and say where."""
        name, bad = non_finite(self.policy.model)
        step = self.step + 1
        if not isinstance(error, NotFinite) and name is None:
            return GruppoError(f"step {step}: {error}")
        weights = "" if name is None else f"; {bad} weights of the model are not finite, the first in {name}"
        groups = getattr(error, "groups", [])
        offending = [g for g in groups if any(not p.logp[p.mask].isfinite().all() for p in g.paths)] or groups
        if not offending:  # sampling itself failed: there are prompts but no paths yet
            offending = [Group(t, []) for t in (drawn[0] if drawn else ())]

            file = self.folder.path / "broken" / f"step-{step:06d}.json"
            tasks = [{"prompt": g.task.prompt, "answer": g.task.answer, **g.task.extra} for g in offending]
            with written_whole(file) as temporary:
                temporary.write_text(json.dumps(tasks, default=str, ensure_ascii=False, indent=1))
        else:
            file = self._save_groups("broken", step, offending)
        steps = self.folder.steps()
        return GruppoError(
            f"step {step}: {error}{weights}. What the step was working on is saved in {file}; the last good checkpoint is "
            f"{self.folder.checkpoint(steps[-1]) if steps else 'none'}"
        )

    def _evaluate(self, show: Any) -> bool:
        """Try the held-out problems; True when the score is the best so far."""
        if not self.held_out or not self.config.eval.tasks:
            return False
        own = self.config.eval
        rng = torch.Generator().manual_seed(own.tasks + 1_000_003 * self.config.fit.seed)  # never the training rng
        grade = self.stages[self.stage].grade
        counted = counters(grade)
        with self.averaged():
            found = evaluate(
                self.policy,
                self.held_out,
                grade,
                rng,
                samples=own.samples,
                greedy=own.greedy,
                by=own.by,
                metrics=metrics_of(self.config, self.given.metrics),
            )
        set_counters(grade, counted)  # what a held-out grade abstained on belongs to the evaluation's own counts
        self.folder.append(self.folder.evals, {"step": self.step, "time": time.time(), **found.as_dict()})
        self._save_groups("evals", self.step, found.groups + found.greedy_groups)
        for one in self.trackers:
            one.log(self.step, {"held_out": {name: score.value for name, score in found.scores.items()}})
        show.evaluation(self.step, found.as_dict()["scores"])
        name, value = headline(found)
        if self.step and math.isfinite(value) and (self.best is None or value > self.best["score"]):
            self.best = {"step": self.step, "metric": name, "score": value}
            return True
        return False

    def averaged(self) -> AbstractContextManager[None]:
        """The policy with the averaged weights, where the run keeps an average."""
        return nullcontext() if self.average is None else swapped(self.policy, self.average.weights)

    # -- saving -------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """All that the run's future depends on beside the weights; plain values and tensors only."""
        return {
            "step": self.step,
            "stage": self.stage,
            "position": self.stream.position,
            "seconds": self.seconds,
            "best": self.best,
            "rng": self.rng.get_state(),
            "optimizer": self.optimizer.state_dict(),
            "memories": [[m.state_dict() for m in s.recipe.state] for s in self.stages],
            "references": [r.state_dict() for r in self.references.values()],
            "average": None if self.average is None else self.average.state_dict(),
            "counters": [counters(s.grade) for s in self.stages],
        }

    def _save(self) -> None:
        lora = self.config.policy.lora
        merge = bool(lora and lora.merge)

        def write(folder: Path) -> None:
            self.policy.save(folder, merge=merge)
            if self.average is not None:  # the model whose scores were measured
                (folder / AVERAGE_FOLDER).mkdir()
                with self.averaged():
                    self.policy.save(folder / AVERAGE_FOLDER, merge=merge)

        try:
            self.folder.save(self.step, write, self.state())
        except GruppoError as error:
            steps = self.folder.steps()
            raise GruppoError(f"{error} (the last complete checkpoint is of step {steps[-1] if steps else 'none'})") from error
        best = None if self.best is None else int(self.best["step"])
        if best == self.step:
            self.folder.write("checkpoints/best.json", json.dumps(self.best))
        self.folder.prune(self.config.track.keep_last, best)

    def load(self, step: int) -> None:
        """Back to the moment a checkpoint was written."""
        state = self.folder.load(step)
        self.policy.restore(self.folder.checkpoint(step))
        self._enter(state["stage"])
        self.step, self.best, self.seconds = state["step"], state["best"], state["seconds"]
        self.stream.position = state["position"]
        self.rng.set_state(state["rng"])
        self.optimizer.load_state_dict(state["optimizer"])
        for stage, memories, counted in zip(self.stages, state["memories"], state["counters"], strict=True):
            for memory, saved in zip(stage.recipe.state, memories, strict=True):
                memory.load_state_dict(saved)
            set_counters(stage.grade, counted)
        for reference, saved in zip(self.references.values(), state["references"], strict=True):
            reference.load_state_dict(saved)
        if self.average is not None:
            self.average.load_state_dict(state["average"])


# -- parts --------------------------------------------------------------------------------------------------------------------


def _world_stream(config: RunConfig, seed: int) -> Callable[[int], Task]:
    world = world_of(config)
    return tasks_of.only_at(lambda i: world.task(seed, i), config.only)


def sampling(config: RunConfig) -> tuple[int, int, int]:
    """What a stage may change about sampling under the same recipe."""
    return config.fit.paths_per_prompt, config.fit.sync_every, config.fit.sync_lag


def weight_of_correct(config: RunConfig, grade: Any) -> float | None:
    """What `correct` counts for in the run's reward, for a recipe that asks by a number `weight`; None where nothing says so."""
    if config.recipe == RECIPE_FILE or "weight" in config.recipe_args or "weight" not in arguments(config.recipe):
        return None
    return float(grade.weights.get("correct", 0.0)) if grade.weights else None


def recipe_of(config: RunConfig, given: Given, weight: float | None = None) -> Recipe:
    """The recipe with the run's numbers in it."""
    if given.recipe is not None:
        made = given.recipe
    else:
        numbers = dict(config.recipe_args)
        if "n" in arguments(config.recipe):
            numbers["n"] = config.fit.paths_per_prompt
        if weight is not None:
            numbers["weight"] = weight
        made = recipe(config.recipe, **numbers)
    if config.fit.epochs is None and config.fit.updates_per_epoch is None:
        return made
    if made.cadence is not whole and not isinstance(made.cadence, Passes):
        raise GruppoError(
            f"fit.epochs and fit.updates_per_epoch place the optimizer steps, but the recipe {config.recipe} does so itself "
            f"({made.cadence!r}); remove them"
        )
    passes = made.cadence if isinstance(made.cadence, Passes) else Passes()
    return replace(made, cadence=Passes(config.fit.epochs or passes.epochs, config.fit.updates_per_epoch or passes.parts))


def grading_of(config: RunConfig, given: Given) -> Any:
    """The graders of the run: the world's, the file's, or Python functions; weights where they are named."""
    from gruppo.graders import build
    from gruppo.graders.grade import Grading

    world = world_of(config)
    rewards = list(given.rewards) if given.rewards is not None else list(config.rewards)
    weights = config.weights or None
    if world is None and config.offline and not rewards:
        return Grading([], by_signal(config) or {})
    if world is None:
        return build(rewards, weights)
    if not rewards:
        return Grading(world.graders(), by_signal(config) or dict(world.weights))
    # weights by name may weigh the world's signals as well; without any, the reward is what the person brought
    own = build(rewards, weights if isinstance(weights, list) else None)
    named = weights if isinstance(weights, dict) else own.weights
    return Grading([*world.graders(), *own.graders], named)


def metrics_of(config: RunConfig, given: Sequence[Metric] = ()) -> tuple[Metric, ...]:
    """What the run's evaluations report beside the signals: the world's own metrics, then those that were given."""
    world = world_of(config)
    own = () if world is None else world.metrics
    return (*own, *(m for m in given if m not in own))


def by_signal(config: RunConfig) -> dict[str, float] | None:
    """The weights by the name of their signal; a list fits only rewards given in the same order."""
    if isinstance(config.weights, dict):
        return config.weights or None
    if config.weights:
        raise GruppoError(
            f"the weights are a list of {len(config.weights)}, but here they weigh signals, which have names; write them as "
            "name: number"
        )
    return None


def rate_of(config: RunConfig, begin: int) -> Callable[[int], float]:
    """Linear warm-up, then constant, or a cosine down to `decay_to` of the learning rate at the stage's last step."""
    own = config.fit

    def rate(step: int) -> float:
        k = step - begin
        if k <= own.warmup_steps:
            return own.learning_rate * k / own.warmup_steps
        if own.decay_to is None:
            return own.learning_rate
        past = (k - own.warmup_steps) / max(1, own.steps - own.warmup_steps)
        return own.learning_rate * (own.decay_to + (1 - own.decay_to) * 0.5 * (1 + math.cos(math.pi * min(1.0, past))))

    return rate


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


def keep_objects(config: RunConfig, given: Given, folder: RunFolder, say: Callable[[str], None]) -> tuple[RunConfig, Given]:
    """Save Python objects into the run folder and name the copies in its description, so that the run can be resumed."""
    changes: dict[str, Any] = {}
    if given.recipe is not None:
        try:
            blob = pickle.dumps(given.recipe)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            say(f"the recipe cannot be saved ({error}); resuming this run needs gruppo.resume(..., recipe=...)")
        else:
            with written_whole(folder.path / RECIPE_FILE) as temporary:
                temporary.write_bytes(blob)
        changes |= {"recipe": RECIPE_FILE, "recipe_args": {}}
    if given.model is not None and not isinstance(given.model, (str, Path)):
        tokenizer = given.tokenizer if given.tokenizer is not None else load_tokenizer(given.model.name_or_path)
        with written_whole(folder.path / INITIAL_FOLDER) as temporary:
            save(given.model, load_tokenizer(tokenizer), temporary)
        changes |= {"model": str((folder.path / INITIAL_FOLDER).resolve()), "tokenizer": None}
    if given.peft_config is not None:
        given.peft_config.save_pretrained(str(folder.path / PEFT_FOLDER))
    if given.data is not None:
        changes["data"] = _keep_rows(given.data, folder, "data.jsonl")
    if given.held_out is not None:
        changes["eval"] = config.eval.model_copy(update={"data": _keep_rows(given.held_out, folder, "held_out.jsonl")})
    # from here on the copies are read, as a resumed run does
    return config.model_copy(update=changes), replace(given, data=None, held_out=None)


def _keep_rows(source: Any, folder: RunFolder, name: str) -> str:
    rows, called = tasks_of.rows_of(source)
    try:
        text = "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows)
    except TypeError as error:
        raise GruppoError(
            f"a column of {called} is not plain data ({error}); the run keeps its rows as JSON, to be resumable"
        ) from None
    return str(folder.write(name, text).resolve())


def found_objects(given: Given, folder: RunFolder) -> Given:
    """What `keep_objects` saved, for whatever is not given again."""
    if given.recipe is None and (folder.path / RECIPE_FILE).exists():
        given = replace(given, recipe=pickle.loads((folder.path / RECIPE_FILE).read_bytes()))
    if given.peft_config is None and (folder.path / PEFT_FOLDER).is_dir():
        from peft import PeftConfig

        given = replace(given, peft_config=PeftConfig.from_pretrained(str(folder.path / PEFT_FOLDER)))
    return given


def counters(grade: Any) -> dict[str, dict[str, int]]:
    """The grading's counts since the start of the run, as plain dictionaries."""
    return {"abstained": dict(grade.abstained), "failures": dict(grade.failures)}


def set_counters(grade: Any, counted: dict[str, dict[str, int]]) -> None:
    for name, counts in counted.items():
        counter = getattr(grade, name)
        counter.clear()
        counter.update(counts)


def headline(found: Evaluation) -> tuple[str, float]:
    """The score by which checkpoints are compared: sampled accuracy, else greedy accuracy, else the mean reward."""
    for name in (*(n for n in found.scores if n.startswith("mean@")), "greedy", "reward", "greedy_reward"):
        if name in found.scores:
            return name, found.scores[name].value
    return "none", math.nan


def scores_at(folder: RunFolder, step: int) -> dict[str, Any] | None:
    """The held-out scores recorded at a step."""
    for record in reversed(folder.records(folder.evals)):
        if record["step"] == step:
            return record["scores"]
    return None


def non_finite(model: Any) -> tuple[str | None, int]:
    """The first weight tensor that holds NaN or infinity, and how many such numbers there are in all."""
    first, count = None, 0
    for name, weight in model.named_parameters():
        bad = int((~weight.detach().isfinite()).sum())
        if bad and first is None:
            first = name
        count += bad
    return first, count


@contextmanager
def stopping() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM put their number into the list, so that the step can finish; the second Ctrl-C acts at once."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def note(number: int, frame: Any) -> None:
        asked.append(number)
        print("finishing this step, then saving (again to stop at once)", file=sys.stderr, flush=True)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
