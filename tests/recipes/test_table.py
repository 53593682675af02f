"""The table of recipes: ids, nicknames, near misses, ill-typed numbers, needs."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest

from gruppo.recipe import Column, check_needs, difference
from gruppo.recipes import RECIPES, find, recipe
from gruppo.types import GruppoError, Task


@pytest.mark.parametrize(
    ("name", "nickname"),
    [
        ("2402.03300", "grpo"),
        ("arXiv:2402.03300v2", "grpo"),
        ("Dr.GRPO", "dr-grpo"),
        ("dr_grpo", "dr-grpo"),
        ("DAPO", "dapo"),
        ("2507.18071", "gspo"),
        ("2507.18071/token", "gspo-token"),
        ("gspo_token", "gspo-token"),
        ("2510.13786", "scalerl"),
        ("tis", "grpo-tis"),
    ],
)
def test_names(name: str, nickname: str) -> None:
    assert find(name).nickname == nickname


def test_the_key_is_the_id() -> None:
    assert all(key == e.arxiv for key, e in RECIPES.items())
    assert len({e.nickname for e in RECIPES.values()}) == len(RECIPES)


@pytest.mark.parametrize("name", [e.nickname for e in RECIPES.values()])
def test_recipes_print_compare_and_pickle(name: str) -> None:
    entry = find(name)
    made = recipe(name)
    assert pickle.loads(pickle.dumps(made)) == made == recipe(entry.arxiv)
    assert entry.sentence.endswith(".")
    if entry.base is not None:
        assert difference(made, recipe(entry.base))
    assert recipe(name, **entry.tiny) == entry.factory(**entry.tiny)


def test_unknown_id_offers_the_nearest() -> None:
    with pytest.raises(GruppoError, match=r"there is no recipe 'dapoo'; did you mean 'dapo'\?"):
        recipe("dapoo")
    with pytest.raises(GruppoError, match=r"there is no recipe '2503\.20784'; did you mean '2503\.20783'\?"):
        recipe("2503.20784")
    with pytest.raises(GruppoError, match="there is no recipe 'xyzzy'; known are: grpo, grpo-tis"):
        recipe("xyzzy")


def test_ambiguous_nickname_names_the_ids() -> None:
    two = {
        "1111.11111": replace(find("grpo"), arxiv="1111.11111", nickname="s-grpo", title="Serial"),
        "2222.22222": replace(find("grpo"), arxiv="2222.22222", nickname="s-grpo-2", aliases=("S-GRPO",), title="Stable"),
    }
    with pytest.raises(GruppoError, match=r"2 methods: 1111\.11111 \(Serial\); 2222\.22222 \(Stable\)\. Ask by arXiv id"):
        find("S-GRPO", two)
    assert find("2222.22222", two).title == "Stable"


def test_unknown_number() -> None:
    with pytest.raises(GruppoError, match=r"grpo has no number 'betta'; did you mean 'beta'\? It has: n = 64, beta = 0\.04"):
        recipe("grpo", betta=0.1)


@pytest.mark.parametrize(
    ("number", "value", "words"),
    [
        ("n", "8", "a str, but a whole number belongs there"),
        ("n", 8.0, "a float, but a whole number belongs there"),
        ("n", True, "a bool, but a whole number belongs there"),
        ("low", "a", "a str, but a number belongs there"),
        ("dual", "x", "a str, but a number or nothing belongs there"),
        ("drop_truncated", 1, "an? int, but true or false belongs there"),
    ],
)
def test_ill_typed_number(number: str, value: object, words: str) -> None:
    with pytest.raises(GruppoError, match=f"{number} of dapo is .*{words}"):
        recipe("dapo", **{number: value})


def test_a_whole_number_may_stand_for_a_number() -> None:
    assert recipe("dapo", dual=3, low=0) == recipe("dapo", dual=3.0, low=0.0)


def test_missing_column_names_the_task_and_its_columns() -> None:
    needy = replace(recipe("grpo"), needs=(Column("hints", "rescues unsolved groups"),))
    tasks = [Task("a", extra={"hints": []}), Task("b", answer="7")]
    with pytest.raises(
        GruppoError, match=r"column 'hints' \(rescues unsolved groups\), but 1 of 2 tasks lack it, first task 1; .*prompt, answer"
    ):
        check_needs(needy, tasks)
    check_needs(needy, tasks[:1])
