"""Every recipe obeys every law, or its entry says why not. The law `learn` is read from the recorded curves: tests/golden."""

from __future__ import annotations

import pytest
from tests.laws.laws import EXPECTED, LAWS, MAKE

from gruppo.recipes import RECIPES, Entry, recipe


@pytest.mark.parametrize("law", list(LAWS))
@pytest.mark.parametrize("name", [e.nickname for e in RECIPES.values()])
def test_law(name: str, law: str) -> None:
    entry: Entry = next(e for e in RECIPES.values() if e.nickname == name)
    value, make = recipe(entry.arxiv, **entry.tiny), MAKE[entry.family]
    if law == "paper":
        LAWS[law](value, make, name=name)
    elif law == "weight":  # what an opt-out leaves standing: no negative weight, none off the mask, no row left out
        LAWS[law](value, make, one=law not in entry.laws)
    elif law in entry.laws:
        pytest.skip(f"{name} opts out of {law}: {entry.laws[law]}")
    else:
        LAWS[law](value, make)


def test_every_recipe_has_worked_numbers() -> None:
    assert set(EXPECTED) == {e.nickname for e in RECIPES.values()}


def test_opt_outs_name_laws_and_give_reasons() -> None:
    for entry in RECIPES.values():
        for law, why in entry.laws.items():
            assert law in {*LAWS, "learn"}
            assert len(why) > 20
            print(f"{entry.nickname} opts out of {law}: {why}")
