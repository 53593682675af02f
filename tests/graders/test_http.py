"""Scorers behind a URL, on loopback."""

from __future__ import annotations

import base64
import io
import socket
from typing import Any

import pytest
from PIL import Image
from tests.graders.clips import noise, picture
from tests.graders.made import group
from tests.graders.servers import answering, running
from tests.test_examples import load

from gruppo.graders.grade import Abstained, Grading
from gruppo.graders.http import HttpScorer, Jpeg, Patience, Unanswered, png, post
from gruppo.graders.images import ImageScore
from gruppo.types import GruppoError

QUICK = Patience(timeout=5.0, retries=2, backoff=0.001)


def widths(body: Any, before: int) -> tuple[int, Any]:
    """Answers with the width of every picture."""
    return 200, {"scores": [Image.open(io.BytesIO(base64.b64decode(i))).width for i in body["images"]]}


def test_the_example_server_scores_pictures() -> None:
    with running(load("image_scorer_server").serve(port=0)) as url:
        scorer = HttpScorer(url + "/score", patience=QUICK)
        red, blue, dot = scorer([picture("red"), picture("blue"), picture("red", size=1)], ["a", "b", "c"])
        assert red == pytest.approx((220 - 30) / 255)
        assert blue == pytest.approx((20 - 230) / 255)
        assert dot is None
        with pytest.raises(Unanswered, match=r"answered 400: .*1 images came with 2 prompts"):
            post(url, {"images": [base64.b64encode(png(picture())[1]).decode()], "prompts": ["a", "b"]}, QUICK)
        with pytest.raises(Unanswered, match="answered 400"):
            post(url, {"images": ["not a picture"], "prompts": ["a"]}, QUICK)


def test_pictures_and_prompts_arrive_in_order_and_batches() -> None:
    with answering(widths) as (url, seen):
        scorer = HttpScorer(url, batch=3, patience=QUICK, headers={"X-Key": "k"})
        assert scorer([picture(size=s) for s in range(10, 17)], [f"p{i}" for i in range(7)]) == list(range(10, 17))
    assert sorted(len(b["images"]) for b in seen.bodies) == [1, 3, 3]
    assert sorted(p for b in seen.bodies for p in b["prompts"]) == [f"p{i}" for i in range(7)]
    assert {b["mime"] for b in seen.bodies} == {"image/png"}
    assert {h["X-Key"] for h in seen.headers} == {"k"}
    assert "X-Key" not in repr(scorer)


def test_png_is_exact_and_jpeg_is_small() -> None:
    kind, data = png(noise())
    assert kind == "image/png"
    assert Image.open(io.BytesIO(data)).tobytes() == noise().tobytes()
    assert Jpeg(50)(noise())[0] == "image/jpeg"
    assert len(Jpeg(50)(noise())[1]) < len(data)


def test_requests_run_at_the_same_time() -> None:
    with answering(widths, company=True) as (url, seen):
        HttpScorer(url, batch=1, workers=4, patience=QUICK)([picture()] * 8, [""] * 8)
    assert 2 <= seen.most <= 4


def test_a_server_that_recovers_is_asked_again() -> None:
    def second_time(body: Any, before: int) -> tuple[int, Any]:
        return (503, b"loading") if before == 0 else (429, b"") if before == 1 else widths(body, before)

    with answering(second_time) as (url, seen):
        assert HttpScorer(url, patience=QUICK)([picture()], [""]) == [40.0]
    assert len(seen.bodies) == 3


def test_a_refused_question_is_not_repeated() -> None:
    with answering(lambda body, before: (422, b"prompts must be English")) as (url, seen):
        [value] = HttpScorer(url, patience=QUICK)([picture()], [""])
    assert isinstance(value, Abstained)
    assert "answered 422: prompts must be English" in value.reason
    assert len(seen.bodies) == 1


def test_patience_ends() -> None:
    with answering(lambda body, before: (500, b"out of memory")) as (url, seen):
        [value] = HttpScorer(url, patience=QUICK)([picture()], [""])
    assert isinstance(value, Abstained)
    assert "answered 500: out of memory, asked 3 times" in value.reason
    assert len(seen.bodies) == 3


def test_the_waits_double(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("gruppo.graders.http.time.sleep", waits.append)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(Unanswered, match="refused"):
        post(f"http://127.0.0.1:{port}", {}, Patience(timeout=1.0, retries=3, backoff=0.5))
    assert waits == [0.5, 1.0, 2.0]


def test_a_slow_server_is_left() -> None:
    with (
        answering(widths, delay=0.5) as (url, _),
        pytest.raises(Unanswered, match=r"did not answer within 0\.1 s"),
    ):
        post(url, {"images": []}, Patience(timeout=0.1, retries=0))


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"scores": [1.0]}, "sent 1 scores for 2 pictures"),
        ({"result": 3}, "no list of scores but"),
        ([1.0, "high"], "sent 'high' where a number or null belongs"),
        ([1.0, True], "sent 'True' where"),
        (b"<html>", "sent no JSON"),
    ],
)
def test_wrong_answers_abstain_with_the_reason(said: Any, reason: str) -> None:
    with answering(lambda body, before: (200, said)) as (url, _):
        values = HttpScorer(url, patience=Patience(5.0, 0))([picture()] * 2, [""] * 2)
    assert isinstance(values[1], Abstained)
    assert reason in values[1].reason


def test_null_abstains_and_failures_are_counted() -> None:
    def partly(body: Any, before: int) -> tuple[int, Any]:
        return (200, [0.5, None]) if body["prompts"][0] == "good" else (400, b"no")

    grading = Grading([], {"far": 1.0})
    with answering(partly) as (url, _):
        grading.graders = [ImageScore(HttpScorer(url, batch=2, patience=QUICK), "far")]
        groups = [group([picture()] * 2, prompt=p) for p in ("good", "bad")]
        good, bad = grading(groups)
        with pytest.raises(GruppoError, match="answered 400"):
            grading.preflight(groups)
    assert good.signals["far"].isnan().tolist() == [False, True]
    assert bad.signals["reward"].isnan().all()
    assert grading.abstained["far"] == 3
    assert list(grading.failures.values()) == [2]


def test_addresses_and_numbers_are_checked() -> None:
    with pytest.raises(GruppoError, match="no address of a server"):
        HttpScorer("localhost:8000")([picture()], [""])
    with pytest.raises(GruppoError, match="retries -1"):
        Patience(retries=-1)
