"""Pairwise judges and win rates: the worked numbers, groups of several prompts, ties, silence, and the endpoint on loopback."""

from __future__ import annotations

import json
import math
import re
import statistics
from typing import Any

import pytest
import torch
from tests.graders.clips import noise, picture, tiny_clip, tiny_tools
from tests.graders.made import group
from tests.graders.servers import answering

from gruppo.graders.flex import FlexRate, FlexReply, Verdict, flex_rewards, winner
from gruppo.graders.grade import Abstained, Grading
from gruppo.graders.http import Patience
from gruppo.graders.images import Clip, ClipScore, JpegSize
from gruppo.graders.judge import Judge, Margin, Pair, WinRate, pairs_of, win_rates
from gruppo.graders.sources import build
from gruppo.graders.vision import Chat, Decision, VisionJudge
from gruppo.types import GruppoError

QUICK = Patience(timeout=5.0, retries=1, backoff=0.001)
GONE = Abstained("no answer")


class Numbers:
    """A perfect judge of outputs that are numbers; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Pair] = []

    def __call__(self, pairs: Any) -> list[float]:
        self.asked += pairs
        return [0.5 if p.first == p.second else float(p.first > p.second) for p in pairs]


def rates(judge: Any, outputs: list[Any], **numbers: Any) -> list[float]:
    """The win rates of one group."""
    return WinRate(judge, **numbers)([group(outputs)])[0]["win_rate"]


def test_a_perfect_judge() -> None:
    assert rates(Numbers(), [0.8, 0.2, 0.5, 0.9]) == [0.667, 0.0, 0.333, 1.0]


def test_cycles_and_ties_say_nothing() -> None:
    """A cycle: 0 beats 1, 1 beats 2, 2 beats 0."""
    assert win_rates([1.0, 0.0, 1.0], 3) == [0.5, 0.5, 0.5]
    assert rates(lambda pairs: [0.5] * len(pairs), [1, 2, 3, 4]) == [0.5] * 4
    assert rates(lambda pairs: [math.nan] * len(pairs), [1, 2, 3, 4]) == [0.5] * 4


def first(pairs: Any) -> list[float]:
    """A judge that always likes what it sees first."""
    return [1.0] * len(pairs)


def test_a_judge_with_position_bias_ranks_by_index_and_swapping_cures_it() -> None:
    assert rates(first, [1, 2, 3]) == [1.0, 0.5, 0.0]
    assert rates(first, [1, 2, 3], swap=True) == [0.5, 0.5, 0.5]


def test_the_grader_passes_on_what_a_tie_is_worth_and_how_many_digits_are_kept() -> None:
    for tie, expected in ((0.5, [0.75, 0.75, 0.0]), (0.0, [0.5, 0.5, 0.0]), (1.0, [1.0, 1.0, 0.0])):
        assert rates(Numbers(), [2, 2, 1], tie=tie) == expected
    assert rates(first, [1, 2, 3, 4], digits=1) == [1.0, 0.7, 0.3, 0.0]


def test_swapping_keeps_what_both_orders_agree_on() -> None:
    judge = Numbers()
    assert rates(judge, [0.8, 0.2, 0.5, 0.9], swap=True) == [0.667, 0.0, 0.333, 1.0]
    assert len(judge.asked) == 4 * 3
    assert rates(lambda pairs: [1.0, 0.25] if len(pairs) == 2 else [1.0] * len(pairs), [1, 2], swap=True) == [0.5, 0.5]
    half = iter([[1.0], [0.5]])  # first wins in one order, the other order ties
    assert rates(lambda pairs: next(half), [1, 2], swap=True) == [0.75, 0.25]


def test_one_missing_order_leaves_the_pair_undecided() -> None:
    answers = iter([[1.0], [math.nan]])
    [found] = WinRate(lambda pairs: next(answers), swap=True)([group([1, 2])])
    assert found == {"win_rate": [0.5, 0.5], "win_rate_unparseable": [1.0, 1.0], "win_rate_unanswered": [0.0, 0.0]}


@pytest.mark.parametrize(
    ("n", "rounded", "exact"), [(4, 0.4304, 0.4303), (8, 0.3498, 0.3499), (16, 0.3174, 0.3174), (24, 0.3076, 0.3074)]
)
def test_the_spread_of_strict_win_rates(n: int, rounded: float, exact: float) -> None:
    """With the reference code's three decimals and without."""
    for digits, spread in ((3, rounded), (None, exact)):
        assert statistics.stdev(rates(Numbers(), list(range(n)), digits=digits)) == pytest.approx(spread, abs=5e-5)


def test_eight_strictly_ordered() -> None:
    assert rates(Numbers(), list(range(7, -1, -1))) == [1.0, 0.857, 0.714, 0.571, 0.429, 0.286, 0.143, 0.0]


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_every_pair_is_asked_once(n: int) -> None:
    judge = Numbers()
    grader = WinRate(judge)
    found = grader([group(list(range(n)))])[0]["win_rate"]
    assert len(judge.asked) == n * (n - 1) // 2 == grader.metrics["judged"][0]
    assert {(p.first, p.second) for p in judge.asked} == set(pairs_of(n))
    assert found == ([None] if n == 1 else rates(Numbers(), list(range(n))))


def test_groups_are_judged_within_their_own_prompt() -> None:
    """Pairs over everything at once, as with one prompt per process, would give the second group's best 1 and the first's 0.5."""
    judge = Numbers()
    low, high = WinRate(judge)([group([1, 2, 3], prompt="a"), group([30, 10], prompt="b")])
    assert low["win_rate"] == [0.0, 0.5, 1.0]
    assert high["win_rate"] == [1.0, 0.0]
    assert [(p.first, p.second, p.prompt) for p in judge.asked] == [(1, 2, "a"), (1, 3, "a"), (2, 3, "a"), (30, 10, "b")]


def test_unread_and_unanswered_pairs_tie_and_are_counted() -> None:
    answers: list[Any] = [1.0, math.nan, GONE]  # pairs 01, 02, 12
    [found] = WinRate(lambda pairs: answers)([group([1, 2, 3])])
    assert found["win_rate"] == [0.75, 0.25, 0.5]
    assert found["win_rate_unparseable"] == [0.5, 0.0, 0.5]
    assert found["win_rate_unanswered"] == [0.0, 0.5, 0.5]
    assert win_rates([1.0, math.nan, math.nan], 3, tie=0.0) == [0.5, 0.0, 0.0]


def test_a_path_that_was_never_judged_abstains_and_preflight_refuses() -> None:
    answers = [1.0, GONE, GONE]  # path 2 was in no answered pair
    grading = Grading([WinRate(lambda pairs: answers)], {"win_rate": 1.0})
    [graded] = grading([group([1, 2, 3])])
    assert graded.signals["reward"].isnan().tolist() == [False, False, True]
    assert grading.failures == {"win_rate: no answer": 1}
    lost = Abstained("no answer", OSError("refused"))
    with pytest.raises(GruppoError, match="no answer"):
        Grading([WinRate(lambda pairs: [lost] * len(pairs))], {"win_rate": 1.0}).preflight([group([1, 2, 3])])


def test_the_signals_of_a_run() -> None:
    grading = build([WinRate(Numbers()), WinRate(first, signal="taste")])
    [graded] = grading([group([3, 1, 2])])
    assert graded.signals["reward"].tolist() == pytest.approx([2.0, 0.5, 0.5])
    assert graded.signals["taste_unparseable"].tolist() == [0, 0, 0]
    assert grading.take_metrics() == {"judged": 3.0}
    assert isinstance(first, Judge)


@pytest.mark.parametrize(("answer", "sentence"), [([2.0], r"preferred the first by 2"), ([1.0, 0.0], "gave 2 preferences")])
def test_a_confused_judge_stops_the_run(answer: list[float], sentence: str) -> None:
    with pytest.raises(GruppoError, match=sentence):
        rates(lambda pairs: answer, [1, 2])
    with pytest.raises(GruppoError, match="3 paths make 3 pairs, but 2"):
        win_rates([1.0, 1.0], 3)


def test_tensors_are_preferences_too() -> None:
    assert rates(lambda pairs: torch.ones(len(pairs)), [1, 2, 3]) == [1.0, 0.5, 0.0]


# -- a scorer as judge ---------------------------------------------------------------------------------------------------------


def test_a_margin_judge_scores_each_picture_once() -> None:
    seen: list[Any] = []

    def size(images: Any, prompts: Any) -> list[float]:
        seen.extend(images)
        return [float(i.width) for i in images]

    pictures = [picture(size=s) for s in (10, 30, 31, 50)]
    assert rates(Margin(size), pictures) == [0.0, 0.333, 0.667, 1.0]
    assert len(seen) == 4
    assert rates(Margin(size, margin=1.0), pictures) == [0.0, 0.5, 0.5, 1.0]


def test_a_margin_judge_passes_silence_on() -> None:
    values: list[Any] = [1.0, None, GONE]
    [found] = WinRate(Margin(lambda images, prompts: values))([group([picture(size=s) for s in (8, 9, 10)])])
    assert found["win_rate_unparseable"] == [0.5, 0.5, 0.0]
    assert found["win_rate_unanswered"] == [0.5, 0.5, 1.0]


def test_clip_as_a_judge_depends_on_the_prompt() -> None:
    score = ClipScore(Clip(tiny_clip(), tiny_tools()))
    pictures = [picture("red"), picture("blue"), noise()]
    groups = [group(pictures, prompt=p) for p in ("red", "zzz")]
    for mine, found in zip(groups, WinRate(Margin(score))(groups)):
        values = score(pictures, [mine.task.prompt] * 3)
        assert found["win_rate"] == [sum(v > w for w in values) / 2 for v in values]


# -- replies -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "read"),
    [
        ("<think>7 against 5</think><answer>Image 1 is better</answer>", 1.0),
        ("<answer>\n image 2 is better. </answer>", 0.0),
        ("<answer>Video 1 is better</answer>", 1.0),
        ("<think><answer>Image 1 is better</answer> no:</think><answer>Image 2 is better</answer>", 0.0),
        ("Image 1 is better", math.nan),
        ("<answer>Both are equal</answer>", math.nan),
        ("<answer>Image 1 is better than Image 2</answer>", math.nan),
        ("<answer>Image 1 is better", math.nan),
        ("", math.nan),
    ],
)
def test_replies_are_read_strictly(reply: str, read: float) -> None:
    assert Decision()(reply) == pytest.approx(read, nan_ok=True)


def test_a_policy_of_reading_is_a_value() -> None:
    assert Decision(ties="Both are equal")("<answer>both are EQUAL</answer>") == 0.5
    assert Decision(tag="verdict")("<verdict>Image 2 is better</verdict>") == 0.0


# -- the endpoint --------------------------------------------------------------------------------------------------------------


def reply(text: str) -> tuple[int, Any]:
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}


def small_first(body: Any, before: int) -> tuple[int, Any]:
    """Prefers the picture whose file is smaller."""
    sizes = [len(part["image_url"]["url"]) for part in body["messages"][0]["content"] if part["type"] == "image_url"]
    return reply(f"<answer>Image {1 if sizes[0] < sizes[1] else 2} is better</answer>")


def test_the_vision_judge_asks_an_openai_endpoint() -> None:
    with answering(small_first, company=True) as (url, seen):
        judge = VisionJudge(Chat(url + "/v1", "judge", key="secret", patience=QUICK, workers=4))
        found = rates(judge, [noise(), picture(), noise(16)])
    assert found == [0.0, 1.0, 0.5]
    assert set(seen.paths) == {"/v1/chat/completions"}
    assert {h["Authorization"] for h in seen.headers} == {"Bearer secret"}
    assert "secret" not in repr(judge)
    assert 2 <= seen.most <= 4
    body = seen.bodies[0]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("judge", 0.0, 4096)
    *images, text = body["messages"][0]["content"]
    assert [re.match(r"data:image/jpeg;base64,", i["image_url"]["url"]) is not None for i in images] == [True, True]
    assert "made for this prompt:\n\np\n" in text["text"]


def test_one_exhausted_request_loses_no_other() -> None:
    """The reference code drops the pair's indices there and stops with a KeyError."""

    def sick(body: Any, before: int) -> tuple[int, Any]:
        return (500, b"") if len(body["messages"][0]["content"][0]["image_url"]["url"]) > 4000 else small_first(body, before)

    with answering(sick) as (url, seen):
        judge = VisionJudge(Chat(url, "judge", patience=QUICK))
        [found] = WinRate(judge)([group([noise(64), picture(), noise(16)])])  # pairs that begin with the large one fail
    assert len(seen.bodies) == 3 + 2  # two of the three asked again once
    assert found["win_rate_unanswered"] == [1.0, 0.5, 0.5]
    assert isinstance(found["win_rate"][0], Abstained)
    assert found["win_rate"][1:] == [0.75, 0.25]


@pytest.mark.parametrize("said", [{"error": "no"}, {"choices": []}, [1], {"choices": [{"message": None}]}])
def test_answers_that_are_no_chat_abstain(said: Any) -> None:
    with answering(lambda body, before: (200, said)) as (url, _):
        got = Chat(url, "judge", patience=QUICK).ask("?", [])
    assert isinstance(got, Abstained)
    assert "no reply of a chat" in got.reason


def test_an_empty_reply_is_unparseable_and_not_a_failure() -> None:
    nothing = {"choices": [{"message": {"content": None}}]}
    with answering(lambda body, before: (200, nothing)) as (url, _):
        [found] = WinRate(VisionJudge(Chat(url, "judge", patience=QUICK)))([group([picture(), noise()])])
    assert found == {"win_rate": [0.5, 0.5], "win_rate_unparseable": [1.0, 1.0], "win_rate_unanswered": [0.0, 0.0]}


def test_frames_of_both_videos_are_shown() -> None:
    with answering(lambda body, before: reply("<answer>Video 1 is better</answer>")) as (url, seen):
        judge = VisionJudge(Chat(url, "judge", patience=QUICK), instruction="{prompt}", frames=2)
        assert rates(judge, [[picture()] * 5, [noise()] * 3]) == [1.0, 0.0]
    assert [part["type"] for part in seen.bodies[0]["messages"][0]["content"]] == ["image_url"] * 4 + ["text"]


# -- UnifiedReward-Flex --------------------------------------------------------------------------------------------------------

OVERALL = [1.0, 0.667, 0.333, 0.0]
CATEGORIES = [[1.0, 0.5, 0.5, 0.0], [0.667, 1.0, 0.333, 0.0], [0.333, 0.333, 1.0, 0.333]]


def test_flex_mixes_overall_and_categories() -> None:
    dim = flex_rewards(OVERALL, CATEGORIES, weights=(0.0, 1.0))
    assert dim == pytest.approx([0.708333, 0.597125, 0.597125, 0.097125], abs=1e-6)
    assert flex_rewards(OVERALL, CATEGORIES) == pytest.approx([0.795833, 0.618088, 0.517888, 0.067987], abs=1e-6)
    assert flex_rewards(OVERALL, CATEGORIES, digits=3)[0] == pytest.approx(0.3 + 0.7 * 0.708)
    assert flex_rewards(OVERALL, CATEGORIES, weights=(1.0, 0.0)) == OVERALL
    tripled = flex_rewards(OVERALL, CATEGORIES, weights=(0.9, 2.1))  # only their ratio counts
    assert tripled == pytest.approx(flex_rewards(OVERALL, CATEGORIES))
    assert flex_rewards(OVERALL, []) == OVERALL


def test_a_category_that_did_not_come_up_leaves_its_weight_out() -> None:
    nan = math.nan
    assert flex_rewards([1.0, 0.0], [[nan, nan], [1.0, 0.0]]) == [1.0, 0.0]
    assert flex_rewards([1.0, 0.0], [[0.0, nan], [1.0, nan]]) == pytest.approx([0.3 + 0.7 * 0.7 / 1.7, 0.0])


def test_flex_replies() -> None:
    said = {
        "categories": [{"name": c, "cat_winner": w} for c, w in zip("abcd", ("Image 1", "Image 2", "both", "Image 1"))],
        "winner": "Image 2",
    }
    read = FlexReply()(f"```json\n{json.dumps(said)}\n```")
    assert read.overall == 0.0
    assert [name for name, _ in read.categories] == ["a", "b", "c"]
    assert [p for _, p in read.categories] == pytest.approx([1.0, 0.0, math.nan], nan_ok=True)
    for broken in ("", "no", "{", "{}", "[1]", '{"categories": 3, "winner": null}'):
        assert math.isnan(FlexReply()(broken).overall)
    assert math.isnan(winner("Image 1 or Image 2"))


def test_the_flex_grader_counts_categories_within_each_group() -> None:
    def judge(pairs: Any) -> list[Any]:
        out: list[Any] = []
        for p in pairs:
            better = float(p.first > p.second)
            out.append(Verdict(better, (("light", 1 - better),) if p.prompt == "a" else ()))
        return out

    one, two = FlexRate(judge)([group([3, 2, 1], prompt="a"), group([1, 2], prompt="b")])
    assert one["flex_overall"] == [1.0, 0.5, 0.0]
    assert one["flex"] == pytest.approx([0.3, 0.5, 0.7])
    assert two["flex"] == [0.0, 1.0]
    gone = FlexRate(lambda pairs: [GONE] * len(pairs))([group([1, 2])])[0]
    assert gone["flex"] == [GONE, GONE]
    unread = FlexRate(lambda pairs: [Verdict()] * len(pairs))([group([1, 2])])[0]
    assert unread["flex"] == [0.5, 0.5]
    assert unread["flex_unparseable"] == [1.0, 1.0]
    silent = FlexRate(lambda pairs: [None] * len(pairs))([group([1, 2])])[0]
    assert silent["flex_unparseable"] == [1.0, 1.0]
    assert FlexRate(judge)([group([1])])[0]["flex"] == [None]


def test_an_unread_category_ties_and_dims_are_rounded() -> None:
    verdicts = [Verdict(1.0, (("a", math.nan),)), Verdict(1.0, (("a", 1.0),)), Verdict(1.0, (("b", 0.0),))]  # pairs 01, 02, 12
    [found] = FlexRate(lambda pairs: verdicts, weights=(0.0, 1.0))([group([1, 2, 3])])
    # path 0 met a twice and won 1.5; path 1 tied in a (.5, weight 1) and lost b (0, weight .7): .5 / 1.7 = .294
    assert found["flex"] == pytest.approx([0.75, 0.294, 0.7 / 1.7], abs=5e-4)
    assert found["flex"] == [round(v, 3) for v in found["flex"]]


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ([1.0], "needs verdicts, but its judge gave 1.0"),
        ([Verdict(2.0)], "preferred the first by 2"),
        ([Verdict(1.0, (("light", -1.0),))], "preferred the first by -1"),
        ([Verdict(1.0)] * 2, "was given 1 pairs and gave 2 verdicts"),
        ([], "was given 1 pairs and gave 0 verdicts"),
    ],
)
def test_a_judge_that_gives_no_verdicts_stops_the_run(answer: list[Any], sentence: str) -> None:
    with pytest.raises(GruppoError, match=sentence):
        FlexRate(lambda pairs: answer)([group([1, 2])])


def test_a_size_judge_end_to_end_through_a_grading() -> None:
    grading = build([WinRate(Margin(JpegSize()))])
    [graded] = grading([group([picture(), noise(), noise(64)])])
    assert graded.signals["win_rate"].tolist() == [0.0, 0.5, 1.0]
