"""10 steps = 5 + a kill + 5, bit for bit: weights, optimizer, generator, data position, memory, reference, counters."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.runs.small import Quiet, config, files, rows, session, silent, timeless

from gruppo.policies.reference import Average
from gruppo.recipe import Recipe
from gruppo.recipes import recipe
from gruppo.runs.config import assemble, merge, read
from gruppo.runs.given import Given
from gruppo.runs.interrupt import Interrupted
from gruppo.runs.session import Session
from gruppo.types import Group, GruppoError

ROOT = Path(__file__).parents[2]


class Killed(Exception):
    """Stands for the end of the process."""


def kill_at(step: int) -> Quiet:
    def kill(now: int) -> None:
        if now == step:
            raise Killed

    return Quiet(kill)


@dataclass
class Moving:
    """A memory that matters: the running mean of the rewards, which the advantage subtracts."""

    mean: float = 0.0
    seen: list[int] = field(default_factory=list)

    def update(self, groups: list[Group]) -> None:
        for group in groups:
            assert group.reward is not None
            self.mean = 0.9 * self.mean + 0.1 * float(group.reward.mean())
            self.seen.append(len(group))

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "seen": list(self.seen)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean, self.seen = state["mean"], list(state["seen"])


def remembering() -> Recipe:
    """GRPO against a moving average of the rewards, with a moving average of the weights as reference."""
    base, memory = recipe("grpo", n=4, beta=0.05), Moving()
    return replace(
        base,
        advantage=lambda group: base.advantage(group) - memory.mean,
        state=(memory,),
        reference=Average(decay=0.8, every=2),
    )


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b))
    return a == b


def assert_same(one: Session, two: Session) -> None:
    for name, weight in one.policy.model.state_dict().items():
        assert torch.equal(weight, two.policy.model.state_dict()[name]), name
    a, b = one.state(), two.state()
    a.pop("seconds"), b.pop("seconds")
    for key in a:
        assert equal(a[key], b[key]), key
    assert timeless(one.folder.records(one.folder.metrics)) == timeless(two.folder.records(two.folder.metrics))
    evals = [[{k: v for k, v in r.items() if k != "time"} for r in s.folder.records(s.folder.evals)] for s in (one, two)]
    assert evals[0] == evals[1]


CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "adapter": {"policy": {"lora": {"rank": 2, "alpha": 4}}},
    "schedule": {"fit": {"warmup_steps": 7, "decay_to": 0.1, "epochs": 2, "updates_per_epoch": 2, "weight_decay": 0.01}},
    "bfloat16": {"policy": {"dtype": "bfloat16"}},
    "evaluated": {"eval": {"every": 2, "greedy": True}},
    "averaged": {"fit": {"ema": {"every": 3, "most": 0.7}}, "eval": {"every": 2, "greedy": True}},
    "abstaining": {},
    "refilling": {"recipe": "dapo", "recipe_args": {"length": 8, "cache": 2}},
}


@pytest.mark.parametrize("case", CASES)
def test_ten_steps_are_five_and_five(tmp_path: Path, case: str) -> None:
    changes = merge({"fit": {"steps": 10}, "track": {"save_every": 5}}, CASES[case])
    if case == "refilling":
        (tmp_path / "binary.py").write_text(
            "def correct(completions, **_): return [float(any(c in 'aeiou0123' for c in t)) for t in completions]"
        )
        changes["rewards"] = [f"{tmp_path / 'binary.py'}:correct"]
    if case == "abstaining":
        (tmp_path / "shy.py").write_text(
            "def shy(completions, **_): return [None if t[:1] > 'a' else float(len(t)) for t in completions]"
        )
        changes["rewards"] = [f"{tmp_path / 'shy.py'}:shy"]
    whole = session(tmp_path, name="whole", **changes)
    whole.run(Quiet())
    assert (case == "abstaining") == bool(whole.stages[0].grade.abstained.total())
    with pytest.raises(Killed):
        session(tmp_path, name="broken", **changes).run(kill_at(7))
    resumed = Session.resume(tmp_path / "runs" / "broken", say=silent)
    assert resumed.step in (5, 6)
    resumed.run(Quiet())
    assert_same(whole, resumed)


def test_memory_and_moving_reference_resume(tmp_path: Path) -> None:
    changes = {"fit": {"steps": 10}, "track": {"save_every": 5}, "recipe": "grpo"}
    whole = Session.new(config(tmp_path, name="whole", **changes), Given(recipe=remembering()), silent)
    whole.run(Quiet())
    with pytest.raises(Killed):
        Session.new(config(tmp_path, name="broken", **changes), Given(recipe=remembering()), silent).run(kill_at(8))
    resumed = Session.resume(tmp_path / "runs" / "broken", Given(recipe=remembering()), silent)
    assert len(resumed.stages[0].recipe.state[0].seen) == 15  # type: ignore[attr-defined]
    resumed.run(Quiet())
    assert_same(whole, resumed)


@pytest.mark.parametrize("killed", [3, 5, 6])
def test_stages_resume_in_their_own_stage(tmp_path: Path, killed: int) -> None:
    changes = {
        "track": {"save_every": 2},
        "fit": {"steps": 4},
        "stages": [
            {"only": {"difficulty": 0}},
            {"only": {"difficulty": [1, 2]}, "recipe": "rloo", "fit": {"steps": 3, "learning_rate": 5e-4, "prompts_per_step": 2}},
        ],
    }
    whole = session(tmp_path, name="whole", **changes)
    whole.run(Quiet())
    assert [r["stage"] for r in whole.folder.records(whole.folder.metrics)] == [1] * 4 + [2] * 3
    with pytest.raises(Killed):
        session(tmp_path, name="broken", **changes).run(kill_at(killed))
    resumed = Session.resume(tmp_path / "runs" / "broken", say=silent)
    resumed.run(Quiet())
    assert_same(whole, resumed)


def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path: Path) -> None:
    whole = session(tmp_path, name="whole")
    whole.run(Quiet())
    with pytest.raises(Killed):
        session(tmp_path, name="broken").run(kill_at(2))
    resumed = Session.resume(tmp_path / "runs" / "broken", say=silent)
    assert resumed.step == 0
    resumed.run(Quiet())
    assert_same(whole, resumed)


def test_the_saved_file_repeats_the_run(tmp_path: Path) -> None:
    first = session(tmp_path)
    first.run(Quiet())
    again = Session.new(assemble(read(first.folder.path / "run.yaml")), say=silent)
    again.run(Quiet())
    assert again.folder.path != first.folder.path
    assert_same(first, again)


def test_a_finished_run_says_how_to_go_on(tmp_path: Path) -> None:
    done = session(tmp_path)
    done.run(Quiet())
    with pytest.raises(GruppoError, match=r"is finished: 4 of 4 steps; .* --model .*step-000004"):
        Session.resume(done.folder.path, say=silent)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_leaves_a_resumable_run(tmp_path: Path, number: int) -> None:
    before = signal.getsignal(number)  # ignored where the suite itself runs in the background
    whole = session(tmp_path, name="whole")
    whole.run(Quiet())
    ask = Quiet(lambda step: os.kill(os.getpid(), number) if step == 1 else None)
    with pytest.raises(Interrupted) as error:
        session(tmp_path, name="stopped").run(ask)
    assert error.value.code == 128 + number
    assert f"continue with: gruppo resume {tmp_path / 'runs' / 'stopped'}" in str(error.value)
    assert signal.getsignal(number) is before
    resumed = Session.resume(tmp_path / "runs" / "stopped", say=silent)
    assert resumed.step == len(ask.records)
    resumed.run(Quiet())
    assert_same(whole, resumed)


def command(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "gruppo.cli", *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_a_process_killed_with_sigkill_resumes_bit_for_bit(tmp_path: Path) -> None:
    """The reward kills its own process in step 8, as the kernel would: no handler runs, nothing is flushed."""
    given = files(tmp_path)
    (tmp_path / "deadly.py").write_text(
        "import os, pathlib, signal\n"
        "def vowels(prompts, completions, **columns):\n"
        "    log = pathlib.Path('runs/broken/metrics.jsonl')\n"
        "    if pathlib.Path('armed').exists() and log.exists() and len(log.read_text().splitlines()) == 7:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return [sum(c in 'aeiou0123' for c in text) / 10 for text in completions]\n"
    )
    settings = [
        *(f"policy.{k}={v}" for k, v in given["policy"].items()),
        *(f"fit.{k}={v}" for k, v in {**given["fit"], "steps": 10}.items()),
        "eval.tasks=4",
        "track.save_every=5",
        "track.report=false",
    ]
    brought = ["--model", "model", "--data", "rows.jsonl", "--reward", "deadly.py:vowels"]
    whole = command(tmp_path, "train", *brought, "--name", "whole", *settings)
    assert whole.returncode == 0, whole.stderr
    (tmp_path / "armed").write_text("")
    killed = command(tmp_path, "train", *brought, "--name", "broken", *settings)
    assert killed.returncode == -signal.SIGKILL
    (tmp_path / "armed").unlink()
    resumed = command(tmp_path, "resume", "runs/broken")
    assert resumed.returncode == 0, resumed.stderr
    assert "after step 5 of 10" in resumed.stderr

    from safetensors.torch import load_file

    one, two = (tmp_path / "runs" / name / "checkpoints" / "step-000010" for name in ("whole", "broken"))
    weights = load_file(one / "model.safetensors")
    assert weights.keys() == load_file(two / "model.safetensors").keys()
    for name, weight in load_file(two / "model.safetensors").items():
        assert torch.equal(weight, weights[name]), name
    states = [torch.load(path / "state.pt", weights_only=True) for path in (one, two)]
    for state in states:
        state.pop("seconds")
    assert equal(*states)
    from gruppo.runs.folder import RunFolder

    a, b = (RunFolder(tmp_path / "runs" / name) for name in ("whole", "broken"))
    assert [r["step"] for r in b.records(b.metrics)] == list(range(1, 11))
    assert timeless(a.records(a.metrics)) == timeless(b.records(b.metrics))


def test_python_data_is_read_back_on_resume(tmp_path: Path) -> None:
    given = config(tmp_path, name="broken", track={"save_every": 2}, eval={"tasks": 3})
    with pytest.raises(Killed):
        Session.new(given, Given(data=rows(), held_out=rows(2)), silent).run(kill_at(3))
    resumed = Session.resume(tmp_path / "runs" / "broken", say=silent)
    assert len(resumed.held_out) == 2
    resumed.run(Quiet())
    assert resumed.step == 4


def test_the_best_score_so_far_survives_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.0, 0.9, 0.1, 0.2])  # before, then after steps 1, 2 and 3
    monkeypatch.setattr("gruppo.runs.session.headline", lambda found: ("mean@2", next(scores)))
    with pytest.raises(Killed):
        session(tmp_path, name="broken", eval={"every": 1}, track={"save_every": 1, "keep_last": 1}).run(kill_at(3))
    resumed = Session.resume(tmp_path / "runs" / "broken", say=silent)
    assert resumed.step == 2
    assert resumed.best == {"step": 1, "metric": "mean@2", "score": 0.9}
