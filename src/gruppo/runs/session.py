"""A run from its description to its last checkpoint: built, checked before step 0, trained, saved, resumed.

Everything that the future of a run depends on is in `state()`; a run that is killed and resumed takes the same path, bit for
bit on CPU.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from gruppo.policies.flow import FlowPolicy
from gruppo.policies.load import ignored_sampling
from gruppo.policies.reference import Ema, Warming, initial, swapped
from gruppo.recipe import Recipe
from gruppo.runs.broken import broken
from gruppo.runs.build import build_policy
from gruppo.runs.config import RunConfig, dump, read, validate
from gruppo.runs.data import Stream
from gruppo.runs.evaluate import evaluate, headline
from gruppo.runs.folder import AVERAGE_FOLDER, RunFolder
from gruppo.runs.given import Given, found_objects, keep_objects
from gruppo.runs.grading import counters, metrics_of, set_counters
from gruppo.runs.interrupt import Interrupted, stopping
from gruppo.runs.measure import measure
from gruppo.runs.optimizer import optimizer_of
from gruppo.runs.preflight import preflight
from gruppo.runs.resolve import default_name, resolve
from gruppo.runs.stages import stages_of
from gruppo.runs.tasks import tasks_of
from gruppo.runs.track import tracker
from gruppo.train import Iteration, fit
from gruppo.types import Group, GruppoError, Reference, Task


class Session:
    """One run. `new` or `resume` makes it, `run` trains it to its end."""

    def __init__(self, config: RunConfig, folder: RunFolder, given: Given, say: Callable[[str], None]) -> None:
        self.folder, self.given, self.say = folder, given, say
        self.config = config
        self.step, self.seconds = 0, 0.0
        self.best: dict[str, Any] | None = None  # step, metric and score of the best held-out evaluation
        torch.set_num_threads(config.policy.threads or 1)
        self.policy = build_policy(config, given.model, given.tokenizer, given.peft_config)
        self.tasks = tasks_of(config, self.policy, say)
        self.stages = stages_of(config, given, self.tasks)
        self.stage = 0
        self.rng = torch.Generator().manual_seed(config.fit.seed)
        self.stream = Stream(self.stages[0].at)
        # Made now, while the policy holds the initial weights; a resumed run does the same before it loads its checkpoint.
        self.references = {maker: maker(self.policy) for s in self.stages if (maker := s.recipe.reference) is not None}
        self.optimizer = optimizer_of(self.policy.parameters(), config.fit)
        self.average = None
        if (ema := config.fit.ema) is not None:
            self.average = Ema(self.policy, Warming(ema.most, ema.slow), ema.every)
            # the optimizer's own steps count: an iteration may hold several, and one that is skipped is none
            self.optimizer.register_step_post_hook(lambda *_: self.average.update([]) if self.average is not None else None)
        self.trackers = [tracker(name, folder.path) for name in config.track.to]
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

    def preflight(self) -> None:
        """Sample and grade one group per stage before step 0, so that what can be known to fail fails now."""
        for n, stage in enumerate(self.stages):
            self._enter(n)
            preflight(self.policy, self.config, stage, self.tasks.training[n], self.tasks.stored)
        self._enter(0)

    # -- where the run stands -----------------------------------------------------------------------------------------

    def _enter(self, n: int) -> None:
        """Switch to a stage: its stream from the beginning, its recipe, its numbers."""
        stage = self.stages[n]
        self.stage = n
        self.stream = Stream(stage.at)
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

    @property
    def held_out(self) -> list[Task]:
        return self.tasks.held_out

    def averaged(self) -> AbstractContextManager[None]:
        """The policy with the averaged weights, where the run keeps an average."""
        return nullcontext() if self.average is None else swapped(self.policy, self.average.weights)

    def facts(self) -> dict[str, str]:
        """What the run found out about itself, to be read before it starts."""
        parameters = list(self.policy.parameters())
        total = sum(p.numel() for p in self.policy.model.parameters())
        rows = [len(t) for t in self.tasks.training if t is not None]
        out = {
            "parameters": f"{sum(p.numel() for p in parameters):,} trained of {total:,}",
            "rewards": "; ".join(f"{name} x {weight:g}" for name, weight in self.stages[0].grade.weights.items()),
            "stored groups" if self.tasks.stored else "training tasks": " and ".join(f"{n:,} rows" for n in rows)
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
        return self.folder.scores(0), self.folder.scores(self.config.ends[-1])

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
        own = stage.config.fit
        drawn: list[Task] = []

        def draw() -> Any:
            stage.grade.at(self.step + 1, self.config.ends[-1])
            tasks = self.stream.take(own.prompts_per_step)
            drawn[:] = tasks
            return tasks

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
            budget=own.token_budget,
            max_grad_norm=own.max_grad_norm,
            skip_grad_norm=own.skip_grad_norm,
        )
        while self.step < stage.end:
            began, computed, failed = time.perf_counter(), Counter(self.policy.counts), Counter(stage.grade.failures)
            try:
                step, done = next(loop)
            except GruppoError as error:
                raise broken(error, self.step + 1, self.policy, self.folder, drawn) from error
            seconds = time.perf_counter() - began
            self.step, self.seconds = step, self.seconds + seconds
            record = self._record(done, seconds, self.policy.counts - computed, Counter(stage.grade.failures) - failed)
            self._log(record, done.groups)
            show.step(record, done.groups)
            self._between(show, stop)

    def _record(self, done: Iteration, seconds: float, counts: Counter[str], failures: Counter[str]) -> dict[str, Any]:
        """The line of metrics.jsonl of the step just done."""
        stage = self.stages[self.stage]
        record = measure(done, step=self.step, now=time.time(), seconds=seconds, lr=stage.rate(self.step))
        if "tokens" in record and not self.tasks.stored:  # those of groups that the rollout threw away were sampled too
            record["tokens"] = counts["sampled"]
            record["tokens_per_s"] = counts["sampled"] / seconds if seconds > 0 else None
        if failures:
            record["failures"] = dict(failures)
        if counts:
            record["counts"] = dict(counts)
        if len(self.stages) > 1:
            record["stage"] = self.stage + 1
        if stage.config.fit.sync_every > 1 or stage.config.fit.sync_lag:
            ages = [self.step - 1 - p.version for g in done.groups for p in g.paths]
            record["stale"] = sum(ages) / len(ages)
        if logged := stage.grade.take_metrics():
            record["logged"] = logged
        return record

    def _log(self, record: dict[str, Any], groups: list[Group]) -> None:
        self.folder.append(self.folder.metrics, record)
        for one in self.trackers:
            one.log(self.step, record)
        every = self.config.track.groups_every
        if every and (self.step % every == 0 or self.step == 1):
            self._save_groups("groups", groups, getattr(self.recipe.advantage, "stratum", None))

    def _between(self, show: Any, stop: list[int]) -> None:
        """What may be due after a step: an evaluation, the next stage, a checkpoint, an end that was asked for."""
        total, every = self.config.ends[-1], self.config.track.save_every
        last, improved = self.step == total, False
        if last or (self.config.eval.every and self.step % self.config.eval.every == 0):
            improved = self._evaluate(show)
        if self.step == self.stages[self.stage].end and not last:
            self._enter(self.stage + 1)
        if last or improved or stop or (every and self.step % every == 0):
            self._save()
        if stop and not last:
            raise Interrupted(
                f"stopped after step {self.step} of {total}; a checkpoint was written, continue with: "
                f"gruppo resume {self.folder.path}",
                128 + stop[0],
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
        self._save_groups("evals", found.groups + found.greedy_groups)
        for one in self.trackers:
            one.log(self.step, {"held_out": {name: score.value for name, score in found.scores.items()}})
        show.evaluation(self.step, found.as_dict()["scores"])
        name, value = headline(found)
        if self.step and math.isfinite(value) and (self.best is None or value > self.best["score"]):
            self.best = {"step": self.step, "metric": name, "score": value}
            return True
        return False

    def _save_groups(self, kind: str, groups: list[Group], strata: Any = None) -> None:
        self.folder.save_groups(kind, self.step, groups, getattr(self.policy, "tokenizer", None), strata)

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
