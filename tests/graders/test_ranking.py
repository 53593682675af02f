"""Ranked lists: what reads as an item, what counts as a hit, and Recall, NDCG and catalogue share by hand."""

from __future__ import annotations

import math

import pytest
import torch

from gruppo.graders.grade import Abstained, Grading
from gruppo.graders.ranking import Item, NDCGAt, Ranking, RecallAt, catalog_share, hits, known, ndcg_at, parse, recall_at
from gruppo.runs.evaluate import score
from gruppo.types import Group, GruppoError, Path, Task

CATALOG = {("Alien", 1979), ("Alien", 1980), ("Alien", 1982), ("Heat", 1995), ("Dune", 1984), ("Dune", 2021), ("Se7en", 1995)}


def made(*items: tuple[str, int]) -> list[Item]:
    return [Item(title, year, (0, 0)) for title, year in items]


def found(items, truths, seen=(), ranks: int = 4, tolerance: int = 2) -> list[float]:
    return hits(made(*items), truths, catalog=CATALOG, seen=seen, ranks=ranks, tolerance=tolerance)


def group(*texts: str, answer=(("Alien", 1979), ("Heat", 1995)), **extra) -> Group:
    paths = [Path(torch.tensor([2]), torch.tensor([4]), torch.zeros(1), torch.ones(1, dtype=torch.bool), t) for t in texts]
    return Group(Task("q", answer=list(answer), extra=extra), paths)


def graded(*texts: str, **given) -> Group:
    return Grading([Ranking(CATALOG, ranks=4)], {"recall": 1.0})([group(*texts, **given)])[0]


def names(text: str) -> list[tuple[str, int]]:
    return [(i.title, i.year) for i in parse(text)]


# ---- reading


@pytest.mark.parametrize(
    "line",
    [
        "Alien (1979)",
        "1. Alien (1979)",
        "12) Alien (1979)",
        "- Alien (1979)",
        "* **Alien** (1979)",
        '3. "Alien" (1979) - a classic',
        "  Alien   (1979)  ",
        "Alien (director's cut) (1979)",
    ],
)
def test_one_item(line: str) -> None:
    assert names(line) == [("Alien", 1979)]


def test_numbers_in_titles_stay() -> None:
    assert names("2001: A Space Odyssey (1968)\n1. 9 (2009)\n3.5 Days (2000)") == [
        ("2001: A Space Odyssey", 1968),
        ("9", 2009),
        ("3.5 Days", 2000),
    ]


def test_a_line_that_is_no_item_takes_no_rank() -> None:
    assert names("Here you are:\nAlien (1979)\nand then\nHeat (1995)\nHeat (95)") == [("Alien", 1979), ("Heat", 1995)]


def test_a_span_reaches_over_its_line_end_and_blank_lines_up_to_the_next_line() -> None:
    text = "Alien (1979)\n\n \nHeat (1995)\nenjoy\n"
    assert [text[a:b] for a, b in (i.span for i in parse(text))] == ["Alien (1979)\n\n \n", "Heat (1995)\n"]


def test_spans_are_what_was_read() -> None:
    text = "so:\n1. Alien (1979)\nhm\n\n2. Dune (2021)"
    for item in parse(text):
        assert names(text[slice(*item.span)]) == [(item.title, item.year)]


# ---- hits


def test_a_hit_is_an_item_among_the_truths() -> None:
    assert found([("Heat", 1995), ("Dune", 1984), ("Alien", 1979)], [("Alien", 1979), ("Heat", 1995)]) == [1, 0, 1, 0]


def test_each_truth_is_found_once() -> None:
    assert found([("Heat", 1995), ("Heat", 1995)], [("Heat", 1995)]) == [1, 0, 0, 0]
    assert found([("Heat", 1995), ("Heat", 1995)], [("Heat", 1995), ("Heat", 1995)]) == [1, 1, 0, 0]


def test_a_seen_title_is_no_hit() -> None:
    assert found([("Heat", 1995), ("Alien", 1979)], [("Alien", 1979), ("Heat", 1995)], seen=["heat"]) == [0, 1, 0, 0]


def test_an_item_outside_the_catalogue_is_no_hit() -> None:
    assert found([("Alien", 1981)], [("Alien", 1981)]) == [0, 0, 0, 0]


@pytest.mark.parametrize(("year", "hit"), [(1977, 1), (1978, 1), (1979, 1), (1980, 1), (1981, 1), (1976, 0), (1982, 0)])
def test_the_year_may_be_two_off(year: int, hit: int) -> None:
    assert found([("Alien", 1979)], [("Alien", year)])[0] == hit


def test_no_tolerance() -> None:
    assert found([("Alien", 1980)], [("Alien", 1979)], tolerance=0)[0] == 0


def test_the_same_year_is_taken_first() -> None:
    # were 1980 or 1978 taken, 1982 would find nothing or 1979 would stay for it: 1982 reaches 1980 only
    assert found([("Alien", 1979), ("Alien", 1982)], [("Alien", 1980), ("Alien", 1979)]) == [1, 1, 0, 0]


def test_later_is_taken_before_earlier() -> None:
    # 1979 takes 1980 (+1), not 1978; then 1980 reaches 1978 (-2), and 1982 nothing
    assert found([("Alien", 1979), ("Alien", 1982)], [("Alien", 1978), ("Alien", 1980)]) == [1, 0, 0, 0]
    assert found([("Alien", 1979), ("Alien", 1980)], [("Alien", 1978), ("Alien", 1980)]) == [1, 1, 0, 0]


def test_one_off_is_taken_before_two_off() -> None:
    assert found([("Alien", 1979), ("Alien", 1982)], [("Alien", 1981), ("Alien", 1978)]) == [1, 1, 0, 0]


@pytest.mark.parametrize("year", [1995, "1995", " 1995 "])
def test_a_years_type_does_not_matter(year) -> None:
    assert found([("Heat", 1995)], [("Heat", year)])[0] == 1
    assert hits(made(("Heat", 1995)), [("Heat", 1995)], catalog={("Heat", "1995")}, ranks=1) == [1]


def test_titles_of_truths_are_compared_without_case_and_space() -> None:
    assert found([("Heat", 1995)], [("  HEAT ", 1995)])[0] == 1


def test_ranks_beyond_the_list_are_not_judged() -> None:
    assert found([("Dune", 1984), ("Heat", 1995)], [("Heat", 1995)], ranks=1) == [0]
    assert known(CATALOG, "Dune", 2021)


# ---- the grader


def test_the_signals() -> None:
    g = graded("Heat (1995)\nAlien (1979)", "Dune (2021)\nHeat (1995)\nNone (1999)")
    assert g.signals["hits"].tolist() == [[1, 1, 0, 0], [0, 1, 0, 0]]
    assert g.signals["recall"].tolist() == [1.0, 0.5]
    assert g.signals["in_catalog"].tolist() == pytest.approx([1.0, 2 / 3])
    assert g.signals["reward"].tolist() == [1.0, 0.5]


def test_text_without_items_is_one_rank_that_finds_nothing() -> None:
    g = graded("I do not know", "")
    assert not g.signals["hits"].any()
    assert g.signals["spans"] == [[(0, 13)], [(0, 0)]]
    assert g.signals["in_catalog"].tolist() == [0.0, 0.0]


def test_seen_titles_come_from_the_task() -> None:
    assert graded("Heat (1995)\nAlien (1979)", seen=["Heat"]).signals["hits"].tolist() == [[0, 1, 0, 0]]


def test_a_truth_without_a_year_abstains_and_is_counted() -> None:
    signals = Ranking(CATALOG, ranks=2).one(group("Heat (1995)", answer=[("Heat", "soon")]))
    assert isinstance(signals["recall"][0], Abstained)
    assert signals["hits"][0].isnan().all()
    with pytest.raises(GruppoError, match="the year of 'Heat'"):
        Grading([Ranking(CATALOG)], {"recall": 1.0}).preflight([group("Heat (1995)", answer=[("Heat", "soon")])])


def test_a_task_without_truths_has_no_recall() -> None:
    assert math.isnan(float(graded("Heat (1995)", answer=[]).signals["recall"][0]))


def test_a_column_that_holds_no_pairs_is_a_sentence() -> None:
    with pytest.raises(GruppoError, match=r"must hold \(title, year\) pairs"):
        Ranking(CATALOG).one(group("Heat (1995)", answer=["Heat"]))


# ---- metrics


def test_recall_by_hand() -> None:
    assert recall_at(torch.tensor([0.0, 1, 0, 1]), 4, 2) == 0.25
    assert recall_at(torch.tensor([0.0, 1, 0, 1]), 4, 20) == 0.5


def test_ndcg_by_hand() -> None:
    # (.630930 + .430677) / (1 + .630930)
    assert ndcg_at(torch.tensor([0.0, 1, 0, 1]), 2, 4) == pytest.approx(0.650921, abs=1e-6)
    assert ndcg_at(torch.tensor([0.0, 1, 0, 1]), 2, 2) == pytest.approx(0.386853, abs=1e-6)
    assert ndcg_at(torch.tensor([1.0, 1, 0, 0]), 2, 4) == 1.0
    assert ndcg_at(torch.tensor([1.0, 0, 0, 0]), 9, 1) == 1.0  # more truths than ranks


def test_metrics_enter_an_evaluation() -> None:
    groups = [graded("Heat (1995)\nAlien (1979)", "Dune (2021)\nHeat (1995)"), graded("x", "x"), graded("x", answer=[])]
    scores = score(groups, [], metrics=(RecallAt(1), NDCGAt(2), catalog_share)).scores
    assert scores["recall@1"].value == pytest.approx((0.25 + 0) / 2)
    assert scores["ndcg@2"].value == pytest.approx(((1 + 0.386853) / 2 + 0) / 2, abs=1e-6)
    assert scores["catalog_share"].value == pytest.approx(1 / 3)
