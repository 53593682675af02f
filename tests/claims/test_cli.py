"""The table of claims and the command that measures them."""

from __future__ import annotations

import json
import math
import sys

import pytest

from gruppo import claims, cli
from gruppo.claims import CLAIMS, about, measured
from gruppo.claims.claim import Claim
from gruppo.recipes import find
from gruppo.types import GruppoError


def made(seeds: int) -> Claim:
    """Seeds, doubled."""
    rows = tuple({"gain": 2.0 + i, "other": 1.0} for i in range(seeds))
    return Claim("grpo", "more is more", "by counting", "gain", rows, (0.0, math.inf))


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["gruppo", "claim", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


def test_every_claim_belongs_to_a_recipe_and_says_what_it_measures() -> None:
    for name in CLAIMS:
        nickname = name.split("/")[0]
        assert find(nickname).nickname == nickname
        assert len(about(name)) > 20, name


def test_a_claim_is_found_by_id_and_nickname_and_gets_the_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CLAIMS, "grpo", made)
    for name in ("grpo", "GRPO", "arXiv:2402.03300"):
        assert len(measured(name, 3).rows) == 3


def test_unknown_claims_and_single_seeds_are_sentences() -> None:
    with pytest.raises(GruppoError, match=r"no claim of gspo is measured here; .*seed-grpo"):
        measured("gspo")
    with pytest.raises(GruppoError, match="there is no recipe 'seed-gpro'; did you mean 'seed-grpo'"):
        measured("seed-gpro")
    with pytest.raises(GruppoError, match="seeds is 1; an interval over seeds needs at least 2"):
        measured("seed-grpo", 1)


@pytest.mark.parametrize(("expected", "said"), [((-9.0, math.inf), "grpo holds"), ((9.0, math.inf), "grpo does not hold")])
def test_the_command_ends_well_whatever_the_verdict(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], expected: tuple[float, float], said: str
) -> None:
    def one(seeds: int) -> Claim:
        found = made(seeds)
        return Claim(found.name, found.sentence, found.measured, found.figure, found.rows, expected)

    monkeypatch.setitem(CLAIMS, "grpo", one)
    code, out, err = call(monkeypatch, capsys, "grpo", "--seeds", "2")
    assert (code, err) == (0, "")
    assert f"{said} at toy scale: gain is 2.5 [-3.85, 8.85] over 2 seeds" in out
    code, out, _ = call(monkeypatch, capsys, "grpo", "--seeds", "2", "--json")
    told = json.loads(out)
    assert (code, told["holds"], told["expected"][1], len(told["rows"])) == (0, said == "grpo holds", None, 2)


def test_without_an_id_the_claims_are_listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(monkeypatch, capsys, "--json")
    assert code == 0
    assert [row["claim"] for row in json.loads(out)] == list(claims.CLAIMS)


def test_an_unknown_id_is_a_sentence_and_code_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(monkeypatch, capsys, "nothing-like-it")
    assert code == 1
    assert err.startswith("error: there is no recipe 'nothing-like-it'")
