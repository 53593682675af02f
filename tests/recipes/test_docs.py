"""The committed pages are what the recipes say about themselves today."""

from __future__ import annotations

import pytest

from gruppo import docs
from gruppo.recipes import RECIPES, find, recipe


def test_pages_are_current() -> None:
    stale = [name for name, text in docs.pages().items() if not (f := docs.PAGES / name).exists() or f.read_text() != text]
    assert not stale, f"{', '.join(stale)}: run `python -m gruppo.docs`"


def test_the_readme_lists_the_recipes() -> None:
    text = (docs.PAGES.parent.parent / "README.md").read_text()
    assert docs.readme(text) == text, "run `python -m gruppo.docs`"


def test_no_page_without_a_recipe() -> None:
    assert {p.name for p in docs.PAGES.iterdir()} == set(docs.pages())


@pytest.mark.parametrize("name", [e.nickname for e in RECIPES.values()])
def test_every_statistic_is_explained(name: str) -> None:
    assert set(docs.statistics(recipe(name), find(name).family)) <= set(docs.STATISTICS)


def test_changes_go_as_deep_as_the_types_agree() -> None:
    found = {place: (theirs, ours) for place, theirs, ours in docs.changes(recipe("cispo", n=8), recipe("dapo", n=8))}
    assert found["loss"] == ("PPOClip(low=0.2, high=0.28)", "WeightClip(low=0.0, high=1.28)")
    deep = list(docs.changes(recipe("gspo-token"), recipe("gspo")))
    assert deep == [("loss.ratio", "unit_ratio", "unit_token_ratio")]


def test_a_page_holds_what_a_reader_needs() -> None:
    text = docs.page("dapo")
    for wanted in (
        "arXiv 2503.14476",
        "| `advantage.eps` | `0.0001` | `1e-06` |",
        "the signal `correct`: dynamic sampling keeps the groups",
        "## Cost",
        "## When not to use it",
        "soft overlong reward",
        "| `clip_high` |",
    ):
        assert wanted in text
