"""The math grader: right and wrong as mathematics, and every way in which a worker can fail."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time

import pytest
from tests.graders.made import group

from gruppo.graders import Grading, MathAnswer
from gruppo.graders.pool import Failed, Pool
from gruppo.types import GruppoError

TOWER = r"\boxed{9^{9^{9^{9}}}}"  # sympy does not come back from comparing it with a number

ODD_WORKER = """
import json, os, sys, time
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if request == "crash":
        os._exit(7)
    if request == "hang":
        time.sleep(60)
    print(json.dumps([request, os.getpid()]), flush=True)
"""


@pytest.fixture(scope="module")
def judge():
    grader = MathAnswer(timeout=20.0, workers=1)
    yield grader
    grader.pool.close()


@pytest.fixture
def odd(tmp_path):
    program = tmp_path / "odd.py"
    program.write_text(ODD_WORKER)
    pool = Pool(str(program))
    yield pool
    pool.close()


@pytest.mark.parametrize(
    ("gold", "text", "correct", "answer"),
    [
        ("72", r"so \boxed{72}", 1.0, "72"),
        ("72", "The answer is 72.", 1.0, "72"),
        ("She has 8*9 = 72.\n#### 72", r"\boxed{72}", 1.0, "72"),
        ("1/3", r"$\frac{2}{6}$", 1.0, "1/3"),
        (r"\frac{1}{3}", r"\boxed{0.3}", 0.0, "0.300000000000000"),
        ("$x^2 + 2x + 1$", r"\boxed{(x+1)^2}", 1.0, "(x + 1)**2"),
        (r"\sqrt{2}", r"\boxed{2^{1/2}}", 1.0, "sqrt(2)"),
        ("1,234", r"\boxed{1234}", 1.0, "1234"),
        (5, r"\boxed{5}", 1.0, "5"),
        ("72", r"<think> \boxed{72} </think> I give up", 0.0, ""),
        ("72", "no idea", 0.0, ""),
        ("72", "", 0.0, ""),
    ],
)
def test_answers_are_compared_as_mathematics(judge, gold, text, correct, answer) -> None:
    assert judge([group([text], gold)]) == [{"correct": [correct], "answers": [answer]}]


def test_only_the_tag_is_read_when_one_is_named() -> None:
    grader = MathAnswer(tag="answer", workers=1, timeout=20.0)
    outputs = ["<answer>72</answer>", "72", r"\boxed{72} <answer>71</answer>", "<answer>72"]
    assert grader([group(outputs, "72")])[0]["correct"] == [1.0, 0.0, 0.0, 0.0]
    grader.pool.close()


def test_an_answer_that_hangs_sympy_is_killed_alone_and_abstains() -> None:
    grader = MathAnswer(timeout=2.0)
    grading = Grading([grader], {"correct": 1.0})
    before = time.monotonic()
    graded = grading([group([r"\boxed{72}", TOWER, r"\boxed{71}"], "72"), group(["1/2", "0.25"], r"\frac{2}{4}")])
    assert time.monotonic() - before < 30
    first, second = (g.signals["reward"].tolist() for g in graded)
    assert (first[0], first[2], second) == (1.0, 0.0, [1.0, 0.0])
    assert first[1] != first[1]
    assert grading.failures == {"correct: time-out after 2 s": 1}
    assert grading.abstained["correct"] == 1
    assert grader([group([r"\boxed{72}"], "72")])[0]["correct"] == [1.0]  # the pool lives on
    grader.pool.close()


def test_gold_that_cannot_be_read_abstains_and_is_refused_in_the_preflight(judge) -> None:
    grading = Grading([judge], {"correct": 1.0})
    graded = grading([group(["72"], "")])
    assert graded[0].signals["reward"].isnan().all()
    assert list(grading.failures) == ["correct: the answer column is not readable as mathematics: ''"]
    with pytest.raises(GruppoError, match="MathAnswer cannot give 'correct': the answer column is not readable"):
        grading.preflight([group(["72"], "")])


def test_a_missing_column_is_a_sentence(judge) -> None:
    with pytest.raises(GruppoError, match="reads the column 'answer', but this task has only: gold"):
        judge([group(["72"], None, gold="72")])


def test_it_works_off_the_main_thread(judge) -> None:
    found: list = []
    thread = threading.Thread(target=lambda: found.extend(judge([group([r"\boxed{72}"], "72")])))
    thread.start()
    thread.join(60)
    assert found == [{"correct": [1.0], "answers": ["72"]}]


def test_workers_start_when_needed_and_are_reused(odd) -> None:
    assert odd.workers == []
    pids = {pid for _, pid in odd.map(list(range(20)), workers=2, timeout=20.0)}
    assert 1 <= len(pids) <= 2
    assert {pid for _, pid in odd.map(list(range(20)), workers=2, timeout=20.0)} <= {w.process.pid for w in odd.workers}
    assert [r for r, _ in odd.map(list(range(20)), workers=2, timeout=20.0)] == list(range(20))


def test_one_request_starts_one_worker(odd) -> None:
    odd.map(["one"], workers=8, timeout=20.0)
    assert len(odd.workers) == 1


def test_a_crash_costs_one_answer_and_the_pool_recovers(odd) -> None:
    answers = odd.map(["a", "crash", "b", "crash", "c"], workers=2, timeout=20.0)
    assert [a if isinstance(a, Failed) else a[0] for a in answers] == [
        "a",
        Failed("worker crashed (status 7)"),
        "b",
        Failed("worker crashed (status 7)"),
        "c",
    ]
    assert odd.map(["again"], workers=2, timeout=20.0)[0][0] == "again"


def test_a_crash_in_a_math_worker_abstains(judge, monkeypatch) -> None:
    judge([group(["1"], "1")])
    real, killed = judge.pool.workers[0].send, []

    def send(job, request, timeout):
        sent = real(job, request, timeout)
        killed.append(os.kill(judge.pool.workers[0].process.pid, signal.SIGKILL))
        return sent

    os.kill(judge.pool.workers[0].process.pid, signal.SIGSTOP)  # so that it cannot answer before it dies
    monkeypatch.setattr(judge.pool.workers[0], "send", send)
    grading = Grading([judge], {"correct": 1.0})
    graded = grading([group([r"\boxed{72}", r"\boxed{70}"], "72")])
    assert killed == [None]
    assert graded[0].signals["correct"].isnan().tolist() == [True, False]
    assert grading.failures == {"correct: worker crashed (status -9)": 1}


def test_a_late_request_is_a_time_out_and_the_others_are_answered(odd) -> None:
    answers = odd.map(["hang", "a", "b"], workers=2, timeout=1.0)
    assert answers[0] == Failed("time-out after 1 s")
    assert [a[0] for a in answers[1:]] == ["a", "b"]


def test_a_worker_that_died_while_idle_loses_no_answer(odd) -> None:
    odd.map(["a"], workers=1, timeout=20.0)
    odd.workers[0].process.kill()
    odd.workers[0].process.wait()
    assert odd.map(["b"], workers=1, timeout=20.0)[0][0] == "b"


def test_workers_end_when_the_pool_is_dropped(tmp_path) -> None:
    program = tmp_path / "odd.py"
    program.write_text(ODD_WORKER)
    pool = Pool(str(program))
    pool.map(["a"], workers=1, timeout=20.0)
    process = pool.workers[0].process
    del pool
    assert process.wait(10) == -9


def test_workers_end_with_the_interpreter(tmp_path) -> None:
    program = tmp_path / "odd.py"
    program.write_text(ODD_WORKER)
    script = (
        f"from gruppo.graders.pool import Pool\np = Pool({str(program)!r})\nprint(p.map(['a'], workers=1, timeout=20.0)[0][1])"
    )
    pid = int(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_worker_that_cannot_start_is_a_sentence(tmp_path) -> None:
    program = tmp_path / "broken.py"
    program.write_text("import json; print(json.dumps({'broken': 'ImportError: no math_verify'}))")
    with pytest.raises(GruppoError, match="a grading worker cannot start: ImportError: no math_verify"):
        Pool(str(program)).map(["a"], workers=1, timeout=5.0)


def test_a_grader_with_running_workers_pickles(judge) -> None:
    judge([group(["1"], "1")])
    other = pickle.loads(pickle.dumps(judge))
    assert other == judge
    assert other.pool.workers == []
