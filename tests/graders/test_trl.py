"""TRL reward functions run unmodified, fail as documented, and hang for a limited time."""

from __future__ import annotations

import asyncio
import functools
import math
import re
import signal
import threading
import time

import pytest
from tests.graders.made import group, path

from gruppo.graders import TrlRewards, build
from gruppo.types import Group, GruppoError, Task

CHAT = [{"role": "user", "content": "What is a third?"}]


def one(function, groups, **numbers):
    """The rewards of one function over all paths."""
    name = "f"
    return [v for got in TrlRewards({name: function}, **numbers)(groups) for v in got[name]]


def test_a_function_gets_what_trl_passes() -> None:
    seen = {}

    def look(**everything):
        seen.update(everything)
        return [0.0] * len(everything["prompts"])

    rewards = TrlRewards({"look": look})
    rewards.at(7, 100)
    rewards([Group(Task("p", "1", {"level": 3}), [path("a", 2), path("b", 3)]), Group(Task("q", "2", {"level": 4}), [path("c")])])
    assert seen["prompts"] == ["p", "p", "q"]
    assert seen["completions"] == ["a", "b", "c"]
    assert seen["completion_ids"] == [[0, 1], [0, 1, 2], [0]]
    assert (seen["answer"], seen["level"]) == (["1", "1", "2"], [3, 3, 4])
    assert (seen["trainer_state"].global_step, seen["trainer_state"].max_steps) == (7, 100)
    assert set(seen) == {
        *("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"),
        *("answer", "level"),
    }


def test_a_completion_of_a_chat_prompt_is_one_assistant_message() -> None:
    seen = []
    one(lambda completions, **_: seen.extend(completions) or [0.0], [group(["hi"], prompt=CHAT)])
    assert seen == [[{"role": "assistant", "content": "hi"}]]


def test_a_conversation_is_passed_whole() -> None:
    seen, turns = [], [{"role": "assistant", "content": "a"}, {"role": "tool", "content": "b"}]
    one(lambda completions, **_: seen.extend(completions) or [0.0], [group([turns], prompt=CHAT)])
    assert seen == [turns]


def test_a_function_without_open_keywords_gets_what_it_names() -> None:
    def short(completions, answer):
        return [float(c == a) for c, a in zip(completions, answer)]

    assert one(short, [group(["1", "2"], "1")]) == [1.0, 0.0]


def test_a_column_that_the_data_lacks_is_a_sentence() -> None:
    def needs(completions, solution, **kwargs):
        return [0.0]

    with pytest.raises(GruppoError, match="function f needs the column 'solution'; the columns of the data are: answer"):
        one(needs, [group(["1"], "1")])


def test_a_column_named_like_a_keyword_is_a_sentence() -> None:
    with pytest.raises(GruppoError, match="the data has a column 'completions'"):
        one(lambda completions, **_: [0.0], [group(["1"], completions=1)])


def test_a_column_that_some_tasks_lack_is_none_there() -> None:
    seen = []
    one(lambda hint, **_: seen.extend(hint) or [0.0, 0.0], [group(["1"], hint="h"), group(["2"])])
    assert seen == ["h", None]


def test_none_skips_nan_fails_and_both_reach_the_reward() -> None:
    def some(completions, **_):
        return [None, math.nan, 1, True]

    def all_(completions, **_):
        return [1.0, 1.0, 1.0, None]

    grading = build([some, all_])
    reward = grading([group(["a", "b", "c", "d"])])[0].signals["reward"].tolist()
    assert reward[0] == 1.0
    assert math.isnan(reward[1])
    assert reward[2:] == [2.0, 1.0]
    assert grading.failures == {"some: returned nan": 1}


def test_every_reward_is_logged_under_its_name_and_weighed() -> None:
    def short(completions, **_):
        return [1.0 for _ in completions]

    def polite(completions, **_):
        return [0.5 for _ in completions]

    signals = build([short, polite], [1.0, -2.0])([group(["a"])])[0].signals
    assert {k: v.tolist() for k, v in signals.items()} == {"short": [1.0], "polite": [0.5], "reward": [0.0]}


@pytest.mark.parametrize("result", [[1.0], [1.0] * 3, []])
def test_a_list_of_the_wrong_length_is_a_sentence(result) -> None:
    sentence = f"the reward function f returned {len(result)} rewards for 2 completions; it must return one for each"
    with pytest.raises(GruppoError, match=sentence):
        one(lambda completions, **_: result, [group(["a", "b"])])


@pytest.mark.parametrize(
    ("result", "sentence"),
    [
        (1.0, "returned a float where a list of 2 numbers belongs"),
        (None, "returned a NoneType where a list of 2 numbers belongs"),
        (["good", 1.0], "returned 'good' as a reward; a number or None belongs there"),
    ],
)
def test_no_list_of_numbers_is_a_sentence(result, sentence) -> None:
    with pytest.raises(GruppoError, match=sentence):
        one(lambda completions, **_: result, [group(["a", "b"])])


def test_a_function_that_raises_abstains_alone_and_is_refused_in_the_preflight() -> None:
    def broken(completions, **_):
        raise KeyError("gold")

    def fine(completions, **_):
        return [1.0] * len(completions)

    grading = build([broken, fine])
    signals = grading([group(["a", "b"])])[0].signals
    assert signals["fine"].tolist() == [1.0, 1.0]
    assert signals["reward"].isnan().all()  # half a reward is another reward
    assert grading.failures == {"broken: raised KeyError: 'gold'": 2}
    with pytest.raises(GruppoError, match="cannot give 'broken': raised KeyError: 'gold'"):
        grading.preflight([group(["a", "b"])])


HANGS = r"the reward function f did not return within 0\.3 seconds; it cannot be killed, so the run stops here"


def spin(completions, **_):
    while True:
        pass


def sleep(completions, **_):
    time.sleep(60)


def stubborn(completions, **_):
    while True:
        try:
            time.sleep(60)
        except Exception:
            continue


async def slow(completions, **_):
    await asyncio.sleep(60)


@pytest.mark.parametrize("function", [spin, sleep, stubborn, slow])
def test_a_function_that_hangs_stops_the_run_with_a_sentence(function) -> None:
    before = time.monotonic()
    with pytest.raises(GruppoError, match=HANGS):
        one(function, [group(["a"])], seconds=0.3)
    assert time.monotonic() - before < 10


def test_a_function_that_hangs_off_the_main_thread_is_left_behind() -> None:
    caught: list[Exception] = []

    def run() -> None:
        try:
            one(sleep, [group(["a"])], seconds=0.3)
        except GruppoError as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(20)
    assert re.match(HANGS, str(caught[0]))


def test_the_time_limit_leaves_signals_as_they_were() -> None:
    before = signal.getsignal(signal.SIGVTALRM)
    assert one(lambda completions, **_: [1.0], [group(["a"])]) == [1.0]
    with pytest.raises(GruppoError):
        one(sleep, [group(["a"])], seconds=0.1)
    assert signal.getsignal(signal.SIGVTALRM) is before


def test_a_function_may_set_an_alarm_of_its_own() -> None:
    def alarmed(completions, **_):
        old = signal.signal(signal.SIGALRM, lambda *_: None)
        signal.alarm(5)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
        return [1.0]

    assert one(alarmed, [group(["a"])]) == [1.0]


def test_async_functions_run_side_by_side() -> None:
    async def first(completions, **_):
        ready.set()
        return [1.0]

    async def second(completions, **_):
        await asyncio.wait_for(ready.wait(), 20)  # comes back only if the other one runs meanwhile
        return [None]

    ready = asyncio.Event()
    rewards = TrlRewards({"second": second, "first": first})
    assert rewards([group(["a"])]) == [{"second": [None], "first": [1.0]}]


def test_async_functions_work_inside_a_running_loop_and_keep_their_own() -> None:
    loops = []

    class Client:
        async def __call__(self, completions, **_):
            loops.append(asyncio.get_running_loop())
            return [1.0]

    rewards = TrlRewards({"client": functools.partial(Client())})

    async def notebook():
        return rewards([group(["a"])]), rewards([group(["a"])])

    assert asyncio.run(notebook()) == ([{"client": [1.0]}], [{"client": [1.0]}])
    assert loops[0] is loops[1]


def test_an_async_function_that_raises_abstains() -> None:
    async def broken(completions, **_):
        raise ConnectionError("no route")

    grading = build(broken)
    assert grading([group(["a"])])[0].signals["reward"].isnan().all()
    assert grading.failures == {"broken: raised ConnectionError: no route": 1}


def test_log_extra_and_log_metric_are_kept() -> None:
    def talks(completions, log_extra, log_metric, **_):
        log_extra("said", [c.upper() for c in completions])
        log_metric("share", 0.25)
        return [1.0] * len(completions)

    grading = build(talks)
    signals = [g.signals for g in grading([group(["a", "b"]), group(["c"])])]
    grading([group(["a"])])
    assert [s["extra/said"] for s in signals] == [["A", "B"], ["C"]]
    assert grading.take_metrics() == {"share": 0.25}
    assert grading.take_metrics() == {}


def test_two_functions_may_log_under_one_name() -> None:
    def talker(word):
        def talks(completions, log_extra, **_):
            log_extra("said", [word])
            return [1.0]

        return talks

    signals = build([talker("a"), talker("a"), talker("b")])([group(["x"])])[0].signals
    assert {k: v for k, v in signals.items() if k.startswith("extra/")} == {"extra/said": ["a"], "extra/said_2": ["b"]}


def test_log_extra_of_the_wrong_length_is_a_sentence() -> None:
    def talks(completions, log_extra, **_):
        log_extra("said", ["x"])
        return [1.0] * len(completions)

    with pytest.raises(GruppoError, match=r"log_extra\('said'\) of the reward function f was given 1 values for 2 completions"):
        one(talks, [group(["a", "b"])])


SHIPPED = [
    "<think>\nA third.\n</think>\n" + r"My answer is $\boxed{\frac{1}{3}}$",
    r"My answer is $\boxed{\frac{1}{2}}$",
    "no answer",
]


def shipped_functions():
    from trl.rewards import (
        accuracy_reward,
        get_cosine_scaled_reward,
        get_repetition_penalty_reward,
        get_soft_overlong_punishment,
        reasoning_accuracy_reward,
        think_format_reward,
    )

    return [
        accuracy_reward,
        reasoning_accuracy_reward,
        think_format_reward,
        get_soft_overlong_punishment(max_completion_len=10, soft_punish_cache=4),
        get_repetition_penalty_reward(ngram_size=2),
        get_cosine_scaled_reward(max_len=12),
    ]


@pytest.mark.parity
def test_the_functions_that_trl_ships_give_the_values_they_give_there() -> None:
    pytest.importorskip("trl")
    lengths = (5, 8, 12)
    task = Task(CHAT, None, {"solution": r"$\frac{1}{3}$"})
    groups = [Group(task, [path(t, n) for t, n in zip(SHIPPED, lengths)])]
    as_trl_calls = {
        "prompts": [CHAT] * 3,
        "completions": [[{"role": "assistant", "content": t}] for t in SHIPPED],
        "completion_ids": [list(range(n)) for n in lengths],
        "solution": [r"$\frac{1}{3}$"] * 3,
        "trainer_state": None,
        "log_extra": None,
        "log_metric": None,
    }
    functions = shipped_functions()
    signals = build(functions)(groups)[0].signals
    for function in functions:
        assert signals[function.__name__].tolist() == pytest.approx(function(**as_trl_calls)), function.__name__
    assert signals["accuracy_reward"].tolist() == [1.0, 0.0, 0.0]
    assert signals["soft_overlong_punishment_reward"].tolist() == [0.0, -0.5, -1.0]


@pytest.mark.parity
def test_the_sum_is_trls_sum() -> None:
    pytest.importorskip("trl")
    groups = [Group(Task(CHAT, None, {"solution": "no mathematics here"}), [path(t) for t in SHIPPED])]
    from trl.rewards import accuracy_reward, think_format_reward

    signals = build([accuracy_reward, think_format_reward], [1.0, 0.5])(groups)[0].signals
    assert signals["accuracy_reward"].isnan().all()  # unreadable gold: TRL's function says None
    assert signals["reward"].tolist() == [0.5, 0.0, 0.0]  # and TRL's trainer adds up the rest (nansum)
