"""The page on rewards for pictures: its examples that need no download run, and the names in all of them exist."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path as File

import pytest
from tests.test_examples import load

PAGE = File(__file__).parents[2] / "docs" / "graders-images.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_every_imported_name_exists() -> None:
    found = 0
    for block in BLOCKS:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gruppo"):
                module = importlib.import_module(str(node.module))
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"
                    found += 1
    assert found > 20


@pytest.mark.parametrize("marker", ["large", "glyph_pictures"])
def test_examples_without_downloads_run(
    marker: str, tmp_path: File, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    [block] = [b for b in BLOCKS if f'"{marker}"' in b]
    exec(compile(block.replace("glyph_items(16)", "glyph_items(3)"), str(PAGE), "exec"), {})
    said = capsys.readouterr().out
    assert ("'reward'" in said) if marker == "large" else ("3 pictures judged" in said)


def test_scorers_and_judges_of_the_page_can_be_made() -> None:
    """The blocks that name models only make values: nothing is loaded before the first picture."""
    names: dict[str, object] = {}
    for block in BLOCKS[:4]:
        if "Image.new" not in block:
            exec(compile(block, str(PAGE), "exec"), names)
    assert names["grader"].signals == ("warmth",)  # type: ignore[attr-defined]
    assert len(names["rewards"]) == 5  # type: ignore[arg-type]


def test_the_judged_pictures_are_trained_and_scored(capsys: pytest.CaptureFixture[str]) -> None:
    before, after = load("judged_pictures").main(steps=1, prompts=2, paths=2, items=2)
    assert before.judged == after.judged == 4
    assert "points met" in capsys.readouterr().out
