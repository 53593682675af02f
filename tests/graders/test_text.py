"""Text graders: what counts as an answer, what is wrong, and what abstains."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
from tests.graders.made import group, path

from gruppo.graders import Budget, Choice, Exact, Grading, Matches, Number, SoftOverlong, Tags, characters, soft_overlong
from gruppo.graders.text import boxed, inside, number, said_choice, said_number
from gruppo.types import Group, GruppoError, Task


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,234.5", Fraction(2469, 2)),
        ("1,234,567", 1234567),
        ("10 000", 10000),
        ("10\u202f000", 10000),
        (r"10\,000", 10000),
        ("-3/4", Fraction(-3, 4)),
        (r"-\frac{1}{2}", Fraction(-1, 2)),
        ("12%", Fraction(3, 25)),
        (r"12\%", Fraction(3, 25)),
        ("1e-3", Fraction(1, 1000)),
        ("$5.00", 5),
        ("-$5", -5),
        ("\u22127", -7),
        (".5", Fraction(1, 2)),
        ("5.", 5),
        ("007", 7),
        ("1,23", None),
        ("12,34,567", None),
        ("1 23", None),
        ("1/0", None),
        ("1e999999999", None),
        ("9" * 2000, None),
        ("abc", None),
        ("", None),
        (".", None),
    ],
)
def test_a_number_has_one_exact_value_or_none(text, value) -> None:
    assert number(text) == value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (r"first \boxed{3} then \boxed{5 \text{ apples}}", "5"),
        (r"\boxed{2, 3}", "2, 3"),
        ("8*9 = 72\n#### 72 dollars", "72"),
        ("so 10-5=5", "5"),
        ("it is x=-2", "-2"),
        ("a-2", "2"),
        ("it costs $1,200.50 in all.", "$1,200.50"),
        ("3/4 of it, or 75%", "75%"),
        ("no number", ""),
    ],
)
def test_the_last_number_is_the_answer(text, said) -> None:
    assert said_number(text) == said


def test_number_is_right_within_its_tolerance_and_no_number_is_wrong() -> None:
    outputs = ["0.3333", "0.33", r"\boxed{1/3}", "none", ""]
    assert Number(relative=1e-3)([group(outputs, "1/3")])[0]["correct"] == [1.0, 0.0, 1.0, 0.0, 0.0]
    assert Number(absolute=0.5)([group(["10.5", "10.51"], 10)])[0]["correct"] == [1.0, 0.0]
    assert Number()([group(["0.3", "0.30000000000000004"], 0.3)])[0]["correct"] == [1.0, 1.0]


def test_a_gold_answer_without_a_number_is_a_fault_of_the_data() -> None:
    grading = Grading([Number()], {"correct": 1.0})
    assert grading([group(["1", "2"], "many")])[0].signals["correct"].isnan().all()
    assert grading.failures == {"correct: the answer column is 'many', which is no number": 2}
    with pytest.raises(GruppoError, match="the answer column is 'many', which is no number"):
        grading.preflight([group(["1"], "many")])


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        (" (B). ", "B"),
        ("**B**", "B"),
        ("The answer is (C).", "C"),
        ("Answer: **A**", "A"),
        (r"so \boxed{D}", "D"),
        (r"\boxed{\text{D}}", "D"),
        ("option B is wrong, the answer: C", "C"),
        ("The answer is a dog", ""),
        ("Answer: Apple", ""),
        ("A dog", ""),
        ("", ""),
        (r"\boxed{AB}", ""),
    ],
)
def test_a_choice_is_named_or_not_never_guessed(text, letter) -> None:
    assert said_choice(text, "ABCD") == letter


def test_choice_reads_letters_and_places() -> None:
    outputs = ["B", "The answer is C", "a dog"]
    assert Choice()([group(outputs, "(B)")])[0] == {"correct": [1.0, 0.0, 0.0], "answers": ["B", "C", ""]}
    assert Choice()([group(outputs, 2)])[0]["correct"] == [0.0, 1.0, 0.0]
    assert Choice(tag="answer")([group(["<answer>B</answer>", "B"], "B")])[0]["correct"] == [1.0, 0.0]
    with pytest.raises(GruppoError, match="is 'E', which is none of the choices ABCD"):
        Grading([Choice()], {"correct": 1.0}).preflight([group(["A"], "E")])


def test_exact_is_letter_for_letter_and_empty_is_wrong() -> None:
    assert Exact()([group([" Paris\n", "paris", ""], "Paris")])[0]["correct"] == [1.0, 0.0, 0.0]
    assert Exact()([group([""], "")])[0]["correct"] == [0.0]


def test_what_is_graded_stands_after_the_thought_and_in_the_last_tag() -> None:
    assert inside("<think>1</think>2", None) == "2"
    assert inside("<a>1</a> <a>2</a>", "a") == "2"
    assert inside("<a>1", "a") is None
    assert inside("<think><a>1</a></think>", "a") is None
    assert boxed(r"\boxed{\frac{1}{2}}") == r"\frac{1}{2}"
    assert boxed(r"\boxed{1") is None


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("<think>a</think><answer>b</answer>", 1.0),
        ("x <think>a</think>\n<answer>b</answer> y", 1.0),
        ("<answer>b</answer><think>a</think>", 0.0),
        ("<think>a<answer>b</answer></think>", 0.0),
        ("<think>a</think><think>a</think><answer>b</answer>", 0.0),
        ("<think>a</think><answer>b", 0.0),
        ("", 0.0),
    ],
)
def test_tags_stand_in_order_exactly_once(text, holds) -> None:
    assert Tags()([group([text])])[0]["format"] == [holds]


def test_tags_may_be_opened_by_the_prompt_and_forbid_text_outside() -> None:
    assert Tags(opened=True)([group(["a</think><answer>b</answer>"])])[0]["format"] == [1.0]
    only = Tags(only=True)([group(["<think>a</think>\n<answer>b</answer>\n", "x<think>a</think><answer>b</answer>"])])
    assert only[0]["format"] == [1.0, 0.0]


def test_matches_finds_or_is_the_text() -> None:
    assert Matches(r"\d+")([group(["a1", "a"])])[0]["matches"] == [1.0, 0.0]
    assert Matches(r"\d+", whole=True)([group(["12", "a1"])])[0]["matches"] == [1.0, 0.0]


def test_a_pattern_that_explodes_abstains_in_time() -> None:
    grading = Grading([Matches(r"^(\w|\w\w)+(?<!\w)$", timeout=0.2)], {"matches": 1.0})
    before = time.monotonic()
    signals = grading([group(["a" * 200 + "!", "b!"])])[0].signals
    assert time.monotonic() - before < 5
    assert signals["matches"].isnan().tolist() == [True, False]
    assert grading.failures == {"matches: time-out after 0.2 s": 1}


def test_a_broken_pattern_is_a_sentence() -> None:
    with pytest.raises(GruppoError, match=r"'\(' is no regular expression"):
        Matches("(")


@pytest.mark.parametrize(
    ("length", "penalty"), [(16384, 0.0), (16385, -1 / 4096), (18432, -0.5), (20480, -1.0), (20481, -1.0), (0, 0.0)]
)
def test_the_soft_overlong_penalty_has_the_papers_numbers(length, penalty) -> None:
    assert soft_overlong(length, 20480, 4096) == penalty


def test_overlong_counts_tokens_with_the_end_token() -> None:
    some = Group(Task("p"), [path("a", 8), path("a", 9), path("a", 10), path("a", 11)])
    assert SoftOverlong(10, 2)([some])[0]["overlong"] == [0.0, -0.5, -1.0, -1.0]
    assert SoftOverlong(10, 0)([some])[0]["overlong"] == [0.0, 0.0, 0.0, -1.0]


def test_a_budget_falls_in_a_straight_line() -> None:
    some = Group(Task("p"), [path("abc", 4), path("abcde", 6), path("", 8)])
    assert Budget(4, 4)([some])[0]["brief"] == [1.0, 0.5, 0.0]
    assert Budget(3, of=characters)([some])[0]["brief"] == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("make", [lambda: SoftOverlong(10, 11), lambda: Budget(-1), lambda: Tags(()), lambda: Tags(("a", "a"))])
def test_impossible_numbers_are_refused(make) -> None:
    with pytest.raises(GruppoError):
        make()
