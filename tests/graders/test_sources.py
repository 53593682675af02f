"""What a person may give as rewards, and the sentences for what they may not."""

from __future__ import annotations

import sys
from functools import partial

import pytest
from tests.graders.made import group

from gruppo.graders import MathAnswer, Tags, build, describe
from gruppo.types import GruppoError

SOURCE = '''
from helper import BONUS
def correct(completions, answer, **kwargs):
    """1 where right."""
    return [float(c == a) + BONUS for c, a in zip(completions, answer)]
def groupwise(groups):
    return [{"first": [1.0] + [0.0] * (len(g) - 1)} for g in groups]
class Made:
    signals = ("made",)
    def __call__(self, groups):
        return [{"made": [2.0] * len(g)} for g in groups]
class Needy(Made):
    def __init__(self, n): ...
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(SOURCE)
    (tmp_path / "helper.py").write_text("BONUS = 0.5")
    (tmp_path / "broken_rewards.py").write_text("import nothing_of_this_name")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in [n for n in sys.modules if n.startswith(("my_rewards", "helper", "broken_rewards"))]:
        del sys.modules[name]


@pytest.mark.parametrize("source", ["my_rewards:correct", "my_rewards.py:correct", "{}/my_rewards.py:correct"])
def test_a_function_by_name(folder, source) -> None:
    grading = build(source.format(folder))
    assert grading([group(["1", "2"], "1")])[0].signals["correct"].tolist() == [1.5, 0.5]
    assert describe(grading) == ["correct: TRL reward function, weight 1"]


def test_a_class_by_name_is_made(folder) -> None:
    assert build("my_rewards:Made")([group(["a"])])[0].signals["reward"].tolist() == [2.0]


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (
            "my_rewards:corrects",
            r"has no 'corrects' \(did you mean 'correct'\?\); it has: correct, groupwise, Made, Needy",
        ),
        ("my_reward:correct", r"there is no module 'my_reward'"),
        ("gone.py:correct", r"there is no file 'gone.py'"),
        ("broken_rewards:f", r"importing 'broken_rewards' failed: ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("broken_rewards.py:f", r"running '.*broken_rewards.py' failed: ModuleNotFoundError"),
        ("correct", r"the reward 'correct' is neither a folder nor of the form module:function or path/file.py:function"),
        ("my_rewards:Needy", r"is a class and cannot be made without arguments"),
        ("my_rewards:SOURCE", r"has no 'SOURCE'"),
        ("helper:BONUS", r"0.5 is no reward: a function, a grader"),
    ],
)
def test_a_wrong_name_is_a_sentence(folder, source, sentence) -> None:
    with pytest.raises(GruppoError, match=sentence):
        build(source)


def f(completions, **_):
    return [1.0] * len(completions)


def test_functions_and_graders_mix_and_keep_their_order_in_the_weights() -> None:
    grading = build([f, Tags()], [2.0, 0.5])
    assert grading.weights == {"f": 2.0, "format": 0.5}
    assert grading([group(["<think></think><answer></answer>"])])[0].signals["reward"].tolist() == [2.5]
    assert sorted(describe(grading)) == ["f: TRL reward function, weight 2", "format: grader Tags, weight 0.5"]


def test_names_that_are_taken_are_numbered_and_said() -> None:
    def reward(completions, **_):
        return [0.0] * len(completions)

    grading = build([f, partial(f), reward])
    assert list(grading.weights) == ["f", "f_2", "reward_2"]
    assert describe(grading)[1:] == [
        "f_2: TRL reward function (its name 'f' was taken), weight 1",
        "reward_2: TRL reward function (its name 'reward' was taken), weight 1",
    ]
    assert grading([group(["x"])])[0].signals["reward"].tolist() == [2.0]


def test_weights_by_name_measure_the_rest() -> None:
    grading = build([f, Tags()], {"f": 1.0})
    assert grading([group(["x"])])[0].signals["format"].tolist() == [0.0]
    assert "format: grader Tags, measured only" in describe(grading)


def neither(x, y):
    return x


@pytest.mark.parametrize(
    ("rewards", "weights", "sentence"),
    [
        ([], None, "no reward was given"),
        ([f], [1.0, 2.0], "2 weights were given for 1 rewards"),
        ([f], {"g": 1.0}, "the weights name the signal 'g', but the rewards give: f"),
        ([f], [0.0], "must be finite and not all 0"),
        ([f], [float("nan")], "must be finite and not all 0"),
        ([neither], None, r"the function neither\(x, y\) is neither a TRL reward function.* nor a grader"),
        ([3], None, "3 is no reward"),
        ([MathAnswer], None, "is no reward"),
        ([lambda groups: []], None, "does not say which signals enter the reward"),
        ([MathAnswer(), MathAnswer(column="other")], None, "two rewards give the signal 'correct'"),
    ],
)
def test_what_cannot_be_a_reward_is_a_sentence(rewards, weights, sentence) -> None:
    with pytest.raises(GruppoError, match=sentence):
        build(rewards, weights)
