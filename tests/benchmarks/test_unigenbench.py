"""UniGenBench: the published files, the scores, the judge on loopback, and the set that the glyphs world answers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path as File
from random import Random
from typing import Any

import pytest
from PIL import Image
from tests.graders.clips import picture
from tests.graders.made import group
from tests.graders.servers import answering

from gruppo.benchmarks.glyphs import (
    CONSISTENCY,
    LAYOUT,
    QUANTITY,
    asked,
    glyph_checker,
    glyph_items,
    glyph_score,
    item_of,
    met,
    preferred,
)
from gruppo.benchmarks.unigenbench import (
    CHINESE,
    Folder,
    Item,
    Point,
    Question,
    Result,
    Scores,
    VisionChecker,
    evaluate,
    main,
    paint,
    read,
    write,
)
from gruppo.graders.grade import Abstained
from gruppo.graders.http import Patience
from gruppo.graders.vision import Chat
from gruppo.types import GruppoError, Path
from gruppo.worlds.glyphs import COLOURS, COUNTS, GLYPHS, SHAPES, draw, look, task_of

# Two rows in the layout of the published files, quoting included; the texts are made up.
PUBLISHED = """index,prompt_en,sub_dims_en
0,"Ink wash painting, two pandas in front of the pyramids.","{""Primary Categories"": ""Creative Divergence"", ""Secondary Categories"": ""Imaginative Thinking"", ""Subjects"": ""Animal"", ""Sentence Structure"": ""Descriptive"", ""Testpoints"": [""Style"", ""World Knowledge"", ""Attribute - Quantity"", ""Action - Full-body (Character/Anthropomorphic)""], ""Testpoint Description"": [""ink wash painting"", ""the pyramids"", ""two pandas"", ""sitting""]}"
7,A clay fox looks up,"{""Primary Categories"": ""Art"", ""Secondary Categories"": ""Sculpture"", ""Testpoints"": [""Attribute - Material"", ""Attribute - Quantity""], ""Testpoint Description"": [""clay"", ""a fox""]}"
"""  # noqa: E501
COLOUR = list(COLOURS)[-1]
QUICK = Patience(timeout=5.0, retries=0, backoff=0.0)


@pytest.fixture
def items(tmp_path: File) -> list[Item]:
    path = tmp_path / "test_prompts_en.csv"
    path.write_text(PUBLISHED, encoding="utf-8")
    return read(path)


def pictures(item: Item, number: int) -> Any:
    return picture("red" if item.index == 0 else "blue", size=8 + number)


def test_the_published_layout_is_read(items: list[Item]) -> None:
    first, second = items
    assert (first.index, second.index) == (0, 7)
    assert first.prompt == "Ink wash painting, two pandas in front of the pyramids."
    assert first.points[2] == Point("Attribute - Quantity", "two pandas")
    assert (first.theme, first.subtheme) == ("Creative Divergence", "Imaginative Thinking")
    assert [p.primary for p in first.points] == ["Style", "World Knowledge", "Attribute", "Action"]


def test_what_is_written_is_read_again(items: list[Item], tmp_path: File) -> None:
    for columns in (CHINESE, CHINESE):
        write(items, tmp_path / "mine.csv", columns)
        assert read(tmp_path / "mine.csv", columns) == items


def test_the_chinese_files_have_other_names(tmp_path: File) -> None:
    details = {"一级垂类": "艺术", "二级垂类": "平面艺术", "考点": ["风格", "属性-数量"], "考点对应描述": ["水墨画", "两只熊猫"]}
    quoted = json.dumps(details, ensure_ascii=False).replace('"', '""')
    (tmp_path / "zh.csv").write_text(f'index,prompt_zh,sub_dims_zh\n3,两只熊猫,"{quoted}"\n', encoding="utf-8")
    [item] = read(tmp_path / "zh.csv", CHINESE)
    assert [p.primary for p in item.points] == ["风格", "属性"]
    assert item.theme == "艺术"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("index,prompt,sub_dims_en\n", "lacks the column 'prompt_en'; it has: index, prompt, sub_dims_en"),
        ("index,prompt_en,sub_dims_en\n0,a,{}\n", "prompt 1 of .* cannot be read: KeyError"),
        ("index,prompt_en,sub_dims_en\n0,a,no json\n", "prompt 1 of .* cannot be read: JSONDecodeError"),
        (
            'index,prompt_en,sub_dims_en\n0,a,"{""Testpoints"": [""Style""], ""Testpoint Description"": []}"\n',
            "names 1 test points and describes 0",
        ),
        ("index,prompt_en,sub_dims_en\n", "has no prompts"),
    ],
)
def test_files_that_are_none(tmp_path: File, text: str, sentence: str) -> None:
    (tmp_path / "odd.csv").write_text(text)
    with pytest.raises(GruppoError, match=sentence):
        read(tmp_path / "odd.csv")


def test_an_index_stands_for_one_prompt(items: list[Item], tmp_path: File) -> None:
    write([items[0], items[0]], tmp_path / "twice.csv")
    with pytest.raises(GruppoError, match="2 prompts of index 0"):
        read(tmp_path / "twice.csv")
    with pytest.raises(GruppoError, match="no file"):
        read(tmp_path / "nowhere.csv")


# -- scores --------------------------------------------------------------------------------------------------------------------


def by_number(questions: Sequence[Question]) -> list[Any]:
    """The first picture meets everything, the second its first point, the third was not readable, the fourth not answered."""
    out: list[Any] = []
    for q in questions:
        n = len(q.item.points)
        out.append([(1,) * n, (1,) + (0,) * (n - 1), None, Abstained("gone")][q.image.width - 8])
    return out


def test_scores_of_a_hand_made_judgement(items: list[Item]) -> None:
    """Prompt 0: 1111 and 1000; prompt 7: 11 and 10."""
    for batch in (1, 3, 64):
        result = evaluate(items, pictures, by_number, batch=batch)
        assert {k: (c.met, c.all) for k, c in result.sub.items()} == {
            "Style": (2, 2),
            "World Knowledge": (1, 2),
            "Attribute - Quantity": (2, 4),
            "Action - Full-body (Character/Anthropomorphic)": (1, 2),
            "Attribute - Material": (2, 2),
        }
        assert {k: (c.met, c.all) for k, c in result.primary.items()} == {
            "Style": (2, 2),
            "World Knowledge": (1, 2),
            "Attribute": (4, 6),
            "Action": (1, 2),
        }
        assert result.overall == pytest.approx((1 + 1 / 2 + 4 / 6 + 1 / 2) / 4)
        assert (result.judged, result.unreadable, result.unanswered) == (4, 2, 2)


def test_the_overall_score_is_the_mean_of_the_primary_ones() -> None:
    """FLUX.1-dev's published row: ten primary scores average to 61.30."""
    scores = [83.90, 88.92, 67.84, 62.17, 67.26, 30.91, 60.96, 47.04, 71.83, 32.18]
    result = Result()
    for k, score in enumerate(scores):
        item = Item(k, "p", (Point(f"dimension {k} - a", ""),))
        for j in range(10_000):
            result.add(item, (int(j < round(100 * score)),))
    assert 100 * result.overall == pytest.approx(61.30, abs=5e-3)


def test_the_table_and_the_file(items: list[Item]) -> None:
    result = evaluate(items, pictures, by_number)
    lines = result.table().splitlines()
    assert "| **Attribute** | 4 | 6 | 66.67% |" in lines
    assert lines[lines.index("| **Attribute** | 4 | 6 | 66.67% |") + 1] == "| Attribute - Material | 2 | 2 | 100.00% |"
    assert sum("Style" in line for line in lines) == 1
    assert lines[-1] == "4 pictures judged, 2 replies unreadable, 2 not answered"
    saved = json.loads(json.dumps(result.to_dict()))
    assert saved["primary"]["Attribute"] == {"met": 4, "all": 6, "score": pytest.approx(4 / 6)}


@pytest.mark.parametrize("checks", [(1,), (1, 2, 0, 0), (1, 0, 0, 0, 1)])
def test_a_confused_checker_stops(items: list[Item], checks: Any) -> None:
    with pytest.raises(GruppoError, match="4 test points of prompt 0"):
        evaluate(items[:1], pictures, lambda qs: [checks] * len(qs))
    with pytest.raises(GruppoError, match="asked about 4 pictures and answered 1 times"):
        evaluate(items[:1], pictures, lambda qs: [None])


def test_nothing_judged_is_no_score(items: list[Item]) -> None:
    with pytest.raises(GruppoError, match="none of 8 pictures was judged: 8 replies were not readable, 0 never came"):
        evaluate(items, pictures, lambda qs: [None] * len(qs))
    assert math.isnan(Result().overall)


# -- the judge -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "read_as"),
    [
        ("<score>[1, 0]</score>", (1, 0)),
        ("first <score>[0, 0]</score>, then\n<SCORE>\n[1,1]\n</SCORE>", (1, 1)),
        ("<score>[1]</score>", None),
        ("<score>[1, 0, 1]</score>", None),
        ("<score>[1, 2]</score>", None),
        ("<score>[1, True]</score>", None),
        ("<score>[1, 0.5]</score>", None),
        ("<score>1, 0</score>", None),
        ("<score>[1, open('x')]</score>", None),
        ("[1, 0]", None),
        ("", None),
    ],
)
def test_replies_are_read_strictly(reply: str, read_as: Any) -> None:
    assert Scores()(reply, 2) == read_as


def says(text: str) -> tuple[int, Any]:
    return 200, {"choices": [{"message": {"content": text}}]}


def test_a_vision_model_is_asked_about_every_picture(items: list[Item]) -> None:
    def respond(body: Any, before: int) -> tuple[int, Any]:
        text = body["messages"][0]["content"][-1]["text"]
        return says("<score>[1, 0, 1, 0]</score>" if "pandas" in text else "<score>[0, 1]</score>")

    with answering(respond) as (url, seen):
        result = evaluate(items, pictures, VisionChecker(Chat(url, "m", patience=QUICK)), n=2)
    assert len(seen.bodies) == 4
    assert (result.primary["Style"].score, result.primary["Attribute"].score) == (1.0, 4 / 6)
    text = seen.bodies[0]["messages"][0]["content"][-1]["text"]
    assert "\n3. Attribute - Quantity: two pandas\n" in text or "\n1. Attribute - Material: clay\n" in text
    assert "{" not in text


@pytest.mark.parametrize(("attempts", "readable"), [(1, 0), (2, 1)])
def test_unreadable_replies_are_skipped_or_asked_again(items: list[Item], attempts: int, readable: int) -> None:
    def respond(body: Any, before: int) -> tuple[int, Any]:
        return says("well ..." if before == 0 else "<score>[1, 1]</score>")

    with answering(respond) as (url, seen):
        check = VisionChecker(Chat(url, "m", patience=QUICK), attempts=attempts)
        [found] = check([Question(items[1], picture())])
    assert found == ((1, 1) if readable else None)
    assert len(seen.bodies) == attempts


def test_the_command_scores_a_folder(items: list[Item], tmp_path: File, capsys: pytest.CaptureFixture[str]) -> None:
    for item in items:
        for j in range(2):
            pictures(item, j).save(Folder(tmp_path).file(item, j))
    words = ["--prompts", str(tmp_path / "test_prompts_en.csv"), "--images", str(tmp_path), "--model", "m"]
    with answering(lambda body, before: says("<score>[1, 1, 1, 1]</score>")) as (url, _):
        main([*words, "--url", url, "--n", "2", "--out", str(tmp_path / "scores.json")])
        with pytest.raises(SystemExit, match=r"picture 2 of prompt 0 is missing: .*0_2\.png"):
            main([*words, "--url", url])
    assert "2 pictures judged, 2 replies unreadable" in capsys.readouterr().out
    assert json.loads((tmp_path / "scores.json").read_text())["overall"] == 1.0


# -- painting ------------------------------------------------------------------------------------------------------------------


class Sketches:
    """Stands for a flow policy: paints the right picture of a glyph task, or of another one."""

    def __init__(self, right: bool = True) -> None:
        self.right, self.asked = right, []

    def sample(self, prompts: list[str], *, g: Any) -> list[Path]:
        import torch

        self.asked += prompts
        empty = torch.zeros(0)
        known = {t.prompt: t for t in GLYPHS.held_out(24)}
        wrong = task_of(len(COUNTS), COLOUR, SHAPES[-1], "right")
        return [
            Path(p, empty, empty, empty.bool(), draw(known[p] if self.right else wrong, Random(k))) for k, p in enumerate(prompts)
        ]


def test_pictures_lie_where_the_benchmark_looks_and_are_kept(tmp_path: File) -> None:
    policy, some = Sketches(), glyph_items(5)
    folder = paint(policy, some, tmp_path / "out", n=2, batch=2)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(f"{i}_{j}.png" for i in range(5) for j in range(2))
    assert policy.asked == [item.prompt for item in some for _ in range(2)]
    folder.file(some[4], 1).unlink()
    paint(policy, some, tmp_path / "out", n=2, batch=2)
    assert policy.asked[10:] == [some[4].prompt] * 2
    assert isinstance(folder(some[4], 1), Image.Image)


# -- the set of the world glyphs ----------------------------------------------------------------------------------------------


def test_right_pictures_meet_every_point(tmp_path: File) -> None:
    """Drawn, saved, read back from the published format, and judged: everything is met."""
    write(glyph_items(24), tmp_path / "glyphs.csv")
    some = read(tmp_path / "glyphs.csv")
    result = evaluate(some, paint(Sketches(), some, tmp_path / "out", n=1), glyph_checker, n=1)
    assert result.overall == 1.0
    assert set(result.primary) == {"Attribute", "Entity Layout", "Grammar"}
    assert set(result.sub) == {"Attribute - Quantity", "Attribute - Color", "Attribute - Shape", LAYOUT, CONSISTENCY}


def test_wrong_pictures_meet_what_happens_to_hold(tmp_path: File) -> None:
    some = glyph_items(24)
    result = evaluate(some, paint(Sketches(right=False), some, tmp_path, n=1), glyph_checker, n=1)
    assert result.sub[CONSISTENCY].score == 1.0
    assert result.sub["Attribute - Shape"].met == sum(SHAPES[-1] in i.prompt for i in some)
    assert result.sub["Attribute - Quantity"].met == sum(COUNTS[-1] in i.prompt for i in some)
    assert result.sub[LAYOUT].met == sum(i.prompt.endswith("right") for i in some)


@pytest.mark.parametrize(
    ("asked", "shown", "answers"),
    [
        ((2, "red", "square", "left"), (2, "red", "square", "left"), (1, 1, 1, 1, 1)),
        ((2, "red", "square", "left"), (3, "red", "square", "left"), (0, 1, 1, 1, 1)),
        ((2, "red", "square", "left"), (2, "blue", "square", "left"), (1, 0, 1, 1, 1)),
        ((2, "red", "square", "left"), (2, "red", "circle", "left"), (1, 1, 0, 1, 1)),
        ((2, "red", "square", "left"), (2, "red", "square", "right"), (1, 1, 1, 0, 1)),
        ((1, "cyan", "cross", "anywhere"), (1, "cyan", "cross", "top"), (1, 1, 1)),
    ],
)
def test_each_point_answers_for_itself(asked: Any, shown: Any, answers: tuple[int, ...]) -> None:
    item = item_of(0, task_of(*asked))
    assert glyph_checker([Question(item, draw(task_of(*shown), Random(0)))]) == [answers]


def test_an_empty_picture_meets_nothing_and_a_strange_point_is_refused() -> None:
    item = item_of(0, task_of(2, "red", "square", "left"))
    assert glyph_checker([Question(item, Image.new("RGB", (32, 32), (236, 236, 236)))]) == [(0,) * 5]
    seen = draw(task_of(1, "red", "square"), Random(0))
    with pytest.raises(GruppoError, match="cannot answer the test point 'Style'"):
        glyph_checker([Question(Item(0, "p", (Point("Style", "ink"),)), seen)])
    with pytest.raises(GruppoError, match="says 'beige'"):
        glyph_checker([Question(Item(0, "p", (Point("Attribute - Color", "beige"),)), seen)])


def test_mixed_things_are_not_consistent() -> None:
    def both(seed: int) -> Image.Image:
        picture = draw(task_of(1, "red", "square", "left"), Random(seed))
        picture.paste(draw(task_of(1, "red", "circle", "right"), Random(seed)).crop((16, 0, 32, 32)), (16, 0))
        return picture

    # where neither reaches over the middle, and so is cut
    seen = next(s for s in look([both(k) for k in range(30)]) if {t.shape for t in s.things} == {"square", "circle"})
    assert not met(Point(CONSISTENCY, "all red squares"), seen)
    assert met(Point(QUANTITY, "two squares"), seen)


def test_the_verifier_as_a_scorer_and_so_as_a_judge() -> None:
    right, other = task_of(2, "red", "square", "left"), task_of(1, "blue", "square", "right")
    images = [draw(right, Random(0)), draw(other, Random(0)), Image.new("RGB", (32, 32), (236, 236, 236))]
    assert glyph_score(images, [right.prompt] * 3) == [
        1.0,
        2 / 5,
        0.0,
    ]  # one blue square at the right: its shape, and consistency
    assert preferred([group(images, prompt=right.prompt)])[0]["win_rate"] == [1.0, 0.5, 0.0]
    for task in GLYPHS.held_out(20):
        assert asked(task.prompt) == task
    with pytest.raises(GruppoError, match="one of square"):
        glyph_score(images[:1], ["two red moons"])
