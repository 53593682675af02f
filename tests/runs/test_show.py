import io
import random
import re
from pathlib import Path

import pytest
from rich.console import Console
from tests.runs.fabricate import conversations, metrics, sampled

from gruppo.rollouts.conversation import Transcript
from gruppo.runs.show import (
    LOSS_ZERO,
    Reading,
    Show,
    _numeric_signals,
    difference,
    duration,
    extremes,
    fold,
    headline,
    readings,
    shown,
    spoken,
)

BEFORE = {
    "greedy": {"value": 0.25, "low": 0.18, "high": 0.335, "n": 128},
    "pass@1": 0.2,
    "mean@4": 0.2,
    "length": 20.0,
    "format": 1.0,
}
AFTER = {
    "greedy": {"value": 0.875, "low": 0.8, "high": 0.925, "n": 128},
    "pass@1": 0.8,
    "mean@4": 0.8,
    "length": 41.5,
    "format": 0.99,
}


def told(run, terminal: bool = False, width: int = 100, steps: int = 20, every: int = 10, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    with Show(Console(file=file, force_terminal=terminal, width=width), steps, every=every) as show:
        run(show)
    file.flush()
    return raw.getvalue().decode(encoding)


def steps_of(show: Show, n: int = 20, groups=None) -> None:
    rng = random.Random(0)
    for step in range(1, n + 1):
        show.step(metrics(rng, step, n), groups or [sampled(["good 5", "bad"], [1.0, 0.0])])


def test_no_completions_when_none_are_wanted() -> None:
    text = told(steps_of, every=0)
    assert "asked" not in text
    assert "step 20/20" in text


def test_loss_zero_is_explained_once() -> None:
    assert told(steps_of).count(LOSS_ZERO) == 1


def test_a_loss_that_is_not_zero_is_not_explained_away() -> None:
    assert LOSS_ZERO not in told(lambda s: s.step({"step": 1, "loss": 0.4}, []))


def test_a_log_has_one_line_every_few_steps_and_no_control_characters() -> None:
    text = told(steps_of)
    assert [int(n) for n in re.findall(r"^step (\d+)/20", text, re.M)] == [1, 10, 20]
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)


def test_a_grade_that_could_not_be_given_is_told_once_with_its_reason_and_counted() -> None:
    def run(show: Show) -> None:
        show.step({"step": 1, "failures": {"correct: raised ValueError: no\x1b[2J number": 2}}, [])
        show.step({"step": 2, "failures": {"correct: raised ValueError: no\x1b[2J number": 3}}, [])
        show.step({"step": 20}, [])

    text = told(run)
    assert text.count("could not be given") == 1
    assert "step 1: 2 grades could not be given: correct: raised ValueError: no" in text
    assert "\x1b" not in text
    assert "failed grades 5" in text
    assert "failed grades" not in told(lambda show: show.step({"step": 20}, []))


def test_a_long_log_line_is_not_broken() -> None:
    text = told(steps_of, width=40)
    assert all("tokens/s" in line and "left" in line for line in text.splitlines() if line.startswith("step "))


def test_what_a_model_writes_cannot_act_on_the_terminal() -> None:
    nasty = "\x1b[2J\x1b]0;title\x07[bold]x[/bold] :smile: \u202eabc\r\nend"
    for terminal in (False, True):
        text = told(
            lambda s: steps_of(s, 1, [sampled([nasty, "y"], [1.0, 0.0], prompt=nasty, answer=nasty)]),
            terminal=terminal,
            width=300,
        )
        assert "\x1b[2J" not in text
        assert "\x1b]0" not in text
        assert "\u202e" not in text
        assert "[bold]x[/bold] :smile:" in text


def test_an_ascii_log_does_not_end_the_run() -> None:
    assert "step 1/20" in told(lambda s: steps_of(s, 1, [sampled(["5 ≠ 6\n", "y"], [1.0, 0.0])]), encoding="ascii")


def test_before_and_after_in_points_with_intervals() -> None:
    text = told(lambda s: s.finish(BEFORE, AFTER, Path("runs/x/report.html")))
    assert text == (
        "on held-out problems                         before                     after    difference\n"
        "greedy accuracy            25.0 %  (18.0 to 33.5 %)  87.5 %  (80.0 to 92.5 %)  +62.5 points\n"
        "sampled accuracy                             20.0 %                    80.0 %  +60.0 points\n"
        "answers in the asked form                   100.0 %                    99.0 %   -1.0 points\n"
        "completion length, tokens                      20.0                      41.5         +21.5\n"
        "report: runs/x/report.html\n"
    )


def test_a_terminal_gets_the_same_figures_and_its_cursor_back() -> None:
    def run(show: Show) -> None:
        show.start({"recipe": "2402.03300", "fit": {"steps": 20}}, {"paths per step": 64})
        steps_of(show)
        show.finish(BEFORE, AFTER, None)

    text = told(run, terminal=True)
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert "+62.5 points" in plain
    assert "sampled at step 10" in plain
    assert "fit.steps" in plain
    assert "step 20/20" in plain


def test_the_cursor_comes_back_when_the_run_breaks() -> None:
    def run(show: Show) -> None:
        show.start({}, {})
        raise RuntimeError("broken")

    raw = io.StringIO()
    with pytest.raises(RuntimeError), Show(Console(file=raw, force_terminal=True), 3) as show:
        run(show)
    assert raw.getvalue().rindex("\x1b[?25h") > raw.getvalue().rindex("\x1b[?25l")


def test_abstained_paths_add_up_over_steps() -> None:
    text = told(lambda s: [s.step({"step": i, "abstained": 3}, []) for i in (1, 2, 20)])
    assert "abstained 9" in text


def test_time_left_is_the_median_step_times_what_remains() -> None:
    show = Show(Console(file=io.StringIO()), 110)
    for step, seconds in enumerate([2.0, 2.0, 60.0], 8):
        show.step({"step": step, "seconds": seconds}, [])
    assert show.time_left() == "3:20"


def test_the_groups_that_vary_most_come_first_with_their_best_and_worst() -> None:
    dull, wide = sampled(["a", "b"], [1.0, 1.0]), sampled(["a", "b", "c"], [0.5, 1.0, float("nan")])
    assert [(g is wide, b, w) for g, b, w in extremes([dull, wide])] == [(True, 1, 0), (False, 0, 0)]


def test_a_group_whose_grades_all_abstained_is_not_shown() -> None:
    assert list(extremes([sampled(["a", "b"], [float("nan")] * 2)])) == []


def test_folding_keeps_both_ends_and_counts_the_middle() -> None:
    text = fold("a" * 100 + "b" * 100, 30)
    assert text == "a" * 20 + " [... 170 more characters ...] " + "b" * 10


def test_scores_are_read_in_every_form_they_are_written_in() -> None:
    forms = {
        "a": 0.5,
        "b": [0.5, 0.4, 0.6],
        "c": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 9},
        "d": 0.5,
        "d_low": 0.4,
        "d_high": 0.6,
    }
    got = readings({**forms, "e": {"value": None, "low": None, "high": None}, "by": {"hard": {"value": 0.1}}})
    assert got["a"] == Reading(0.5)
    assert got["b"] == got["c"] == got["d"] == Reading(0.5, 0.4, 0.6)
    assert got["e"].value != got["e"].value
    assert got["by/hard"] == Reading(0.1)
    assert "d_low" not in got


def test_shares_are_percent_and_lengths_are_not() -> None:
    assert (shown("greedy", 0.125), shown("greedy_length", 0.5), shown("pass@8", 1.0)) == ("12.5 %", "0.5", "100.0 %")
    assert (difference("mean@4", 0.5, 0.25), difference("length", 10.0, 12.5)) == ("-25.0 points", "+2.5")
    assert shown("greedy", float("nan")) == "-"


def test_the_headline_says_nothing_twice() -> None:
    names = ["pass@1", "pass@2", "pass@4", "mean@4", "majority@4", "greedy", "reward", "greedy_length", "length", "format"]
    assert headline(names) == ["greedy", "mean@4", "majority@4", "pass@4", "format", "length"]


def test_durations() -> None:
    assert (duration(65.0), duration(3725.0), duration(-1.0)) == ("1:05", "1:02:05", "0:00")


def test_a_conversation_in_one_line_sets_its_tools_apart() -> None:
    answered, late, bare, full = (spoken(p.output, 160) for p in conversations().paths)
    assert answered.plain == (
        "<shout>hey</shout> [shout: HEY] <broken>b</broken> [broken failed: error: ValueError: no such page] HEY it is"
    )
    assert "[slow timed out: error: slow took" in late.plain
    assert bare.plain == "I just know"
    assert full.plain.endswith("</shout> [shout: " + "LONG " * 13 + "LONG] ")
    assert spoken(conversations().paths[3].output, 100).plain.endswith(" [shout: " + "LONG " * 10 + " ...] ")
    assert [answered.plain[s.start : s.end].strip()[:7] for s in answered.spans] == ["[shout:", "[broken"]  # dim


def test_a_conversation_of_many_turns_shows_its_ends_and_tools_cannot_act_on_the_terminal() -> None:
    turns = [{"role": "assistant", "content": "a"}, {"role": "tool", "name": "t", "content": "\x1b[2Jb"}] * 20
    said = spoken(Transcript("", turns), 160).plain
    assert said.count("[t:") == 6
    assert "[... 28 more turns ...]" in said
    assert "\x1b" not in said


def test_errors_of_tools_are_told_only_where_they_occurred() -> None:
    group = conversations()
    assert set(_numeric_signals(group, 0)) == {"correct", "calls", "tool_errors"}
    assert set(_numeric_signals(group, 2)) == {"correct", "calls"}
