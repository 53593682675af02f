"""The commands in this process (`gruppo.cli.main`), and in one of their own where a process is what is tested."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.runs.small import files, write_rows

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def gruppo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    """Runs a command line in `tmp_path`; the exit code, what was printed, what was said."""
    from gruppo import cli

    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gruppo", *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    return call


def brought(folder: Path, **changes: Any) -> list[str]:
    files(folder)
    given = {"model": "model", "data": "rows.jsonl", "reward": "vowels.py:vowels", **changes}
    return [word for key, value in given.items() for word in (f"--{key}", value)]


SHORT = [
    "policy.max_new_tokens=5",
    "policy.threads=1",
    "fit.steps=2",
    "fit.prompts_per_step=2",
    "fit.paths_per_prompt=3",
    "eval.tasks=2",
    "eval.samples=2",
]


def test_model_data_and_reward_need_nothing_else(gruppo: Call, tmp_path: Path) -> None:
    code, out, err = gruppo("train", *brought(tmp_path), *SHORT)
    assert code == 0, err
    assert "2 steps of 2 prompts x 3 paths = 6 rows, at most 30 sampled tokens" in out
    assert "before" in out
    assert "after" in out
    assert "runs/grpo-rows/report.html" in out
    assert (tmp_path / "runs" / "grpo-rows" / "report.html").stat().st_size > 1000


def test_eval_of_a_run_uses_its_own_settings_and_repeats_its_last_evaluation(gruppo: Call, tmp_path: Path) -> None:
    gruppo("train", *brought(tmp_path), *SHORT, "track.report=false", "--name", "mine")
    code, out, err = gruppo("eval", "runs/mine", "--json")
    assert code == 0, err
    found = json.loads(out)
    last = json.loads((tmp_path / "runs" / "mine" / "evals.jsonl").read_text().splitlines()[-1])
    assert found["counts"] == last["counts"]
    assert found["scores"]["greedy_length"] == last["scores"]["greedy_length"]
    code, out, _ = gruppo("eval", "runs/mine")
    assert code == 0
    assert "metric" in out


def test_eval_of_a_model_needs_to_know_on_what(gruppo: Call, tmp_path: Path) -> None:
    files(tmp_path)
    code, _, err = gruppo("eval", "model")
    assert code == 1
    assert "on what shall model be evaluated? Give --world NAME, or --data FILE and --reward module:function" in err
    code, out, err = gruppo("eval", "model", *brought(tmp_path)[2:], "policy.max_new_tokens=5", "--samples", "2", "--json")
    assert code == 0, err
    assert json.loads(out)["counts"]["tasks"] == 40


def test_eval_of_a_step_that_was_not_kept_lists_those_that_were(gruppo: Call, tmp_path: Path) -> None:
    gruppo("train", *brought(tmp_path), *SHORT, "track.report=false", "--name", "mine")
    code, _, err = gruppo("eval", "runs/mine", "--step", "1")
    assert (code, "has no checkpoint of step 1; it keeps: 2" in err) == (1, True)


def test_the_run_file_is_beaten_by_options_and_settings(gruppo: Call, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("world: arithmetic\nrecipe: rloo\nfit: {learning_rate: 1e-6, steps: 9}\n")
    code, out, err = gruppo("train", "run.yaml", "--recipe", "dr-grpo", "fit.steps=3", "--dry")
    assert code == 0, err
    assert "recipe: dr-grpo" in out
    assert "learning_rate: 1.0e-06" in out
    assert "steps: 3" in out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["train", "--recipe", "grppo"], "there is no recipe 'grppo'; did you mean"),
        (["train", "--world", "arithmetic", "fit.stepz=3"], "unknown key 'fit.stepz'; did you mean 'fit.steps'?"),
        (["train", "fit.paths_per_prompt=1"], "fit.paths_per_prompt is 1; a group needs at least 2 paths"),
        (["train", "nothing.yaml"], "cannot read the run file nothing.yaml: No such file or directory"),
        (["train", "--model", "m"], "lacks data and rewards"),
        (["resume", "runs/none"], "runs/none is not a run folder"),
        (["report", "runs/none"], "runs/none is not a run folder"),
        (["show", "nobody"], "there is no recipe 'nobody'"),
        (["worlds", "build", "arithmetics"], "there is no world 'arithmetics'; did you mean 'arithmetic'?"),
        (["train", "--track", "wandbb"], "there is no tracker 'wandbb'"),
    ],
)
def test_what_a_person_can_mend_is_a_sentence_without_traceback(gruppo: Call, words: list[str], sentence: str) -> None:
    code, out, err = gruppo(*words)
    assert code == 1
    assert sentence in err
    assert "Traceback" not in out + err


def test_wrong_usage_is_exit_code_2(gruppo: Call) -> None:
    code, _, err = gruppo("train", "--nonsense")
    assert (code, "No such option" in err) == (2, True)


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from gruppo import cli
    from gruppo.types import GruppoError

    monkeypatch.setattr(sys, "argv", ["gruppo", "--debug", "show", "nobody"])
    with pytest.raises(GruppoError):
        cli.main()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"data": "empty.jsonl"}, "empty.jsonl is empty"),
        ({"data": "bare.jsonl"}, "has no column 'prompt' (row 0 has: question)"),
        ({"data": "long.jsonl"}, "the prompt in row 1 of"),
        ({"reward": "vowels.py:vowel"}, "has no 'vowel' (did you mean 'vowels'?)"),
        ({"reward": "wrong.py:short"}, "returned 1 rewards for 2 completions"),
        ({"reward": "wrong.py:raises"}, "ValueError: no such thing"),
        ({"model": "nowhere/at/all"}, "the model folder nowhere/at/all does not exist"),
    ],
)
def test_bad_input_is_refused_by_train_and_leaves_no_run(
    gruppo: Call, tmp_path: Path, change: dict[str, str], sentence: str
) -> None:
    write_rows(tmp_path / "empty.jsonl", [])
    write_rows(tmp_path / "bare.jsonl", [{"question": "2+2"}])
    write_rows(tmp_path / "long.jsonl", [{"prompt": "2+2="}, {"prompt": "2" * 300}])
    (tmp_path / "wrong.py").write_text(
        "def short(completions, **_): return [1.0]\ndef raises(completions, **_): raise ValueError('no such thing')\n"
    )
    code, _, err = gruppo("train", *brought(tmp_path, **change), *SHORT)
    assert code == 1
    assert sentence in err
    assert not list((tmp_path / "runs").glob("*"))


def test_an_existing_name_and_a_file_in_the_way_are_sentences(gruppo: Call, tmp_path: Path) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    code, _, err = gruppo("train", *brought(tmp_path), *SHORT, "--name", "mine")
    assert (code, "runs/mine exists already and nothing in it was touched" in err) == (1, True)
    (tmp_path / "blocked").write_text("")
    code, _, err = gruppo("train", *brought(tmp_path), *SHORT, "--folder", "blocked/here")
    assert (code, "is a file, so no folder can be made there" in err) == (1, True)


def test_tables_come_as_json_too(gruppo: Call) -> None:
    code, out, _ = gruppo("list", "--json")
    assert code == 0
    assert {"2402.03300", "2503.14476"} <= {row["id"] for row in json.loads(out)}
    assert all(row["sentence"] and row["family"] for row in json.loads(out))
    code, out, _ = gruppo("worlds", "--json")
    assert {row["name"] for row in json.loads(out)} >= {"arithmetic"}
    code, out, _ = gruppo("show", "dapo", "--json")
    assert "loss" in json.loads(out)["difference"]


def test_every_command_explains_itself(gruppo: Call) -> None:
    commands = ["list", "show", "worlds", "train", "resume", "eval", "report", "doctor", "sft", "record"]
    _, out, _ = gruppo("--help")
    assert all(command in out for command in commands)
    for command in commands:
        code, out, _ = gruppo(command, "--help")
        assert (code, "Usage" in out) == (0, True)


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; sys.argv = ['gruppo', 'train', '--help']\n"
        "import gruppo.cli\n"
        "try: gruppo.cli.main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'pandas', 'pyarrow', 'yaml'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("[]")


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "gruppo", "--help"], capture_output=True, text=True, check=True)
    assert "train" in done.stdout
