import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from tests.runs.fabricate import conversations, folder, metrics, problem, row, sampled, write
from tests.tiny import tiny_tokenizer

from gruppo.runs import report
from gruppo.runs.folder import RunFolder
from gruppo.runs.report import (
    embedded,
    ends,
    flat,
    path_record,
    runs_of,
    side_by_side,
    spread_out,
    thinned,
    turns_of,
    worth_a_look,
    write_report,
)
from gruppo.runs.show import readings
from gruppo.types import GruppoError

NASTY = "</script><script>alert(1)</script><b>&amp;</b><!-- \x00\u2028 'quoted' \"too\" ]]>"


def page(at: Path) -> str:
    return write_report(at).read_text(encoding="utf-8")


def data_of(html: str) -> dict[str, Any]:
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    assert len(found) == 1
    return json.loads(found[0])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("runs") / "demo", steps=20)


def test_every_recorded_number_is_in_the_page(run: Path) -> None:
    data = data_of(page(run))
    for i, line in enumerate((run / "metrics.jsonl").read_text().splitlines()):
        for name, value in flat(json.loads(line)):
            if name != "time":
                assert data["metrics"][name][i] == pytest.approx(value, rel=1e-5), name
    for i, line in enumerate((run / "evals.jsonl").read_text().splitlines()):
        for name, r in readings(json.loads(line)["scores"]).items():
            assert data["evals"][name][i] == pytest.approx(r.value, rel=1e-5), name
            if r.low is not None:
                assert data["evals"][f"{name}:low"][i] == pytest.approx(r.low, rel=1e-5), name


def test_every_recorded_number_is_on_a_curve(run: Path) -> None:
    data = data_of(page(run))
    drawn = {k for c in data["charts"] for s in c["series"] for k in (s["key"], s["band"]) if s["from"] == "metrics"}
    assert set(data["metrics"]) - {"step"} == drawn - {""}


def test_every_curve_is_explained_in_a_sentence(run: Path) -> None:
    for chart in data_of(page(run))["charts"]:
        assert re.fullmatch(r"[A-Z].{10,}\.", chart["sentence"]), chart["title"]


def test_nothing_is_fetched(run: Path) -> None:
    html = page(run)
    assert not re.search(r"https?:|@import|url\(|<link|<img|<iframe| src=|\bfetch\(|XMLHttp|\bimport\(", html)
    assert "default-src 'none'" in html


def test_a_groups_paths_are_there_with_their_grades(run: Path) -> None:
    shown = {s["step"]: s for s in data_of(page(run))["groups"]["steps"]}
    assert list(shown) == [1, 10, 20]
    saved = pq.read_table(run / "groups/step-000010.parquet").to_pylist()
    paths = [(g["group"], p["row"], p) for g in shown[10]["groups"] for p in g["paths"]]
    assert [(r["group"], r["row"]) for r in saved] == [(g, r) for g, r, _ in paths]
    for source, (_, _, p) in zip(saved, paths):
        assert p["text"] == source["output"]
        assert p["signals"] == json.loads(source["signals"])
        assert p["reward"] == pytest.approx(source["reward"], rel=1e-5)
        assert p["advantage"] == pytest.approx(source["advantage"][0], abs=1e-5)
        assert p["tokens"] == len(source["tokens"])


def test_the_summary_says_before_and_after(run: Path) -> None:
    html = page(run)
    first, last = (json.loads(x)["scores"]["greedy"]["value"] for x in (run / "evals.jsonl").read_text().splitlines()[::2])
    said = f"greedy accuracy went from {100 * first:.1f} % (step 0) to {100 * last:.1f} % (step 20), "
    assert said + f"{100 * (last - first):+.1f} points." in html


def test_text_of_a_model_stays_text(tmp_path: Path) -> None:
    at = folder(tmp_path / "<b>run", steps=2, every=1)
    rows = [row(1, 0, 0, (NASTY, "t", NASTY, 2), NASTY, {"correct": 1.0, "format": 1.0}, 0.5)]
    write(at / "groups/step-000001.parquet", rows)
    with (at / "run.yaml").open("a") as file:
        file.write("note: '</pre><script>alert(2)</script>'\n")
    html = page(at)
    assert html.count("<script") == 2  # the data and the page's own
    assert html.count("</script") == 2
    assert not re.search(r"alert\(\d\)</script>|<b>run|<!--|\x00", html)
    group = data_of(html)["groups"]["steps"][0]["groups"][0]
    assert (group["prompt"], group["answer"], group["paths"][0]["text"]) == (NASTY, NASTY, NASTY)


def test_what_has_no_number_is_a_gap(tmp_path: Path) -> None:
    at = folder(tmp_path / "run", steps=5, evals=False)
    lines = [json.loads(x) for x in (at / "metrics.jsonl").read_text().splitlines()]
    lines[1]["reward"] = None
    lines[2]["reward"] = float("nan")
    lines[3]["reward"] = float("inf")
    del lines[4]["kl"]
    (at / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    data = data_of(page(at))
    assert [v is None for v in data["metrics"]["reward"]] == [False, True, True, True, False]
    assert data["metrics"]["kl"][4] is None


def test_a_run_of_one_step_with_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    data = data_of(page(tmp_path))
    assert [c["title"] for c in data["charts"]] == ["Reward"]
    assert data["metrics"] == {"step": [1], "reward": [0.5]}
    assert data["groups"]["steps"] == []
    assert data["pairs"]["pairs"] == []


def test_a_run_that_was_only_evaluated(tmp_path: Path) -> None:
    (tmp_path / "evals.jsonl").write_text('{"step": 0, "scores": {"greedy": 0.25}}\n')
    assert "greedy accuracy is 25.0 % at step 0" in page(tmp_path)


def test_nothing_to_report_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(GruppoError, match="has no finished step to report"):
        write_report(tmp_path)


def test_a_line_cut_short_by_a_kill_is_left_out_and_a_broken_one_is_named(tmp_path: Path) -> None:
    good = '{"step": 1, "reward": 0.5}\n'
    (tmp_path / "metrics.jsonl").write_text(good + '{"step": 2, "rew')
    assert data_of(page(tmp_path))["metrics"]["step"] == [1]
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "rew\n' + good)
    with pytest.raises(GruppoError, match=r"line 1 of .* is not JSON"):
        write_report(tmp_path)


def test_a_step_run_twice_counts_once_as_it_was_last(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "reward": 0.5}\n{"step": 2, "reward": 0.1}\n{"step": 2, "reward": 0.9}\n'
    )
    assert data_of(page(tmp_path))["metrics"]["reward"] == [0.5, 0.9]


def test_the_page_stays_small_and_counts_what_it_leaves_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at = folder(tmp_path / "run", steps=40, groups=9, paths=6, every=2, held_out=4)
    whole = write_report(at).stat().st_size
    assert whole < 400_000
    monkeypatch.setattr(report, "GROUP_BYTES", 30_000)
    shown = data_of(page(at))["groups"]
    assert 20_000 < len(embedded(shown["steps"]).encode()) < 33_000
    assert len(shown["steps"]) + shown["steps_left_out"] == 21
    assert all(len(s["groups"]) + s["groups_left_out"] == 9 for s in shown["steps"])
    assert {s["step"] for s in shown["steps"]} >= {1, 40}


def test_a_long_path_is_cut_in_the_middle_with_a_count() -> None:
    asked = ("p", "t", "a", 2)
    p = path_record(row(1, 0, 0, asked, "a" * 5000 + "z" * 5000, {"correct": 1.0}, 0.5))
    assert (p["tokens"], p["left_out"], p["gap_after"]) == (10_000, 8500, 1000)
    assert p["text"] == "a" * 1000 + "z" * 500


def test_tokens_keep_their_borders_masks_marks_and_chances() -> None:
    one = row(1, 0, 3, ("p", "t", "a", 2), "abcdé", {"correct": 1.0}, 0.0)
    one |= {
        "token_text": ["ab", "c", "", "dé"],
        "mask": [True, False, False, True],
        "advantage": [1.0, 9.0, 9.0, -0.5],
        "logp": [0.0, -1.0, float("-inf"), -0.5108256],
        "truncated": True,
        "off_policy": True,
        "fork": "0:12",
    }
    p = path_record(one)
    assert (p["text"], p["lengths"]) == ("abcdé", [2, 1, 0, 2])
    assert p["untrained"] == [[1, 3]]
    assert p["step_advantage"] == [1.0, 9.0, 9.0, -0.5]
    assert p["advantage"] == 0.25  # of the trained tokens only
    assert p["chance"] == [100, 37, None, 60]
    assert p["marks"] == ["truncated", "off-policy", "shares path 0 before token 12"]


def test_runs_of_true() -> None:
    assert runs_of([True, False, True, True]) == [[0, 1], [2, 4]]
    assert runs_of([False]) == []


def test_held_out_problems_are_compared_by_their_greedy_path(tmp_path: Path) -> None:
    import random

    asked = [problem(random.Random(i)) for i in range(4)]
    for step, greedy in ((0, [0, 0, 1, 1]), (9, [1, 0, 0, 1])):
        samples = [row(step, i, r, asked[i], "sample", {"correct": float(r == 0)}, 0.0) for i in range(4) for r in range(2)]
        best = [row(step, 4 + i, 0, asked[i], f"greedy {step}", {"correct": float(c)}, 0.0) for i, c in enumerate(greedy)]
        write(tmp_path / f"evals/step-{step:06d}.parquet", samples + best)
    found = side_by_side(tmp_path)
    assert found["counts"] == {"became right": 1, "became wrong": 1, "stayed wrong": 1, "stayed right": 1}
    pair = found["pairs"][0]
    assert (pair["kind"], pair["prompt"], pair["answer"]) == ("became right", asked[0][0], asked[0][2])
    assert (pair["before"]["text"], pair["after"]["text"]) == ("greedy 0", "greedy 9")
    assert pair["right"] == [[1, 2], [1, 2]]


def test_an_abstained_grade_is_not_called_wrong(tmp_path: Path) -> None:
    for step in (0, 5):
        one = row(step, 0, 0, ("p", "t", "a", 2), "x", {"correct": 0.0, "format": 1.0}, 0.0)
        write(tmp_path / f"evals/step-{step:06d}.parquet", [one | {"signals": '{"correct": null}'}])
    assert side_by_side(tmp_path)["counts"] == {"not graded": 1}


def test_what_the_run_writes_is_what_the_report_reads(tmp_path: Path) -> None:
    class Letters:
        def decode(self, ids: list[int]) -> str:
            return "".join(chr(97 + i) for i in ids)

    group = sampled(["aaa", "a"], [1.0, float("nan")])
    group = group.with_(reward=torch.tensor([[1.0, 2.0], [float("nan"), 0.0]]))
    run = RunFolder(tmp_path)
    run.append(run.metrics, {"step": 3, "reward": float("nan"), "signals": {"correct": 0.5}})
    run.save_groups("groups", 3, [group], Letters())
    data = data_of(page(tmp_path))
    assert data["metrics"] == {"step": [3], "reward": [None], "signals/correct": [0.5]}
    first, second = data["groups"]["steps"][0]["groups"][0]["paths"]
    assert (first["reward"], second["reward"]) == ([1.0, 2.0], [None, 0.0])
    assert (first["signals"], second["signals"]) == ({"correct": 1.0}, {"correct": None})
    assert first["text"] == "aaa"


def test_a_very_long_run_is_drawn_from_means_of_several_steps() -> None:
    table, k = thinned({"step": [float(i) for i in range(10)], "x": [1.0, 3.0] * 4 + [float("nan"), 5.0]}, 5)
    assert k == 2
    assert table["step"] == [0.5, 2.5, 4.5, 6.5, 8.5]
    assert table["x"] == [2.0, 2.0, 2.0, 2.0, 5.0]


def test_steps_are_chosen_evenly_with_both_ends() -> None:
    assert spread_out([1, 10, 20, 30, 40], 3) == [1, 20, 40]
    assert spread_out([1, 2], 3) == [1, 2]


def test_a_curves_ends_are_means_of_up_to_a_fifth() -> None:
    assert ends([1.0, 3.0] + [0.0] * 6 + [5.0, 7.0]) == (2.0, 6.0)
    assert ends([float("nan")]) is None


def test_what_is_worth_a_look_is_said() -> None:
    import random

    calm = report.columns([dict(flat(metrics(random.Random(0), s, 20))) for s in range(1, 21)])
    assert worth_a_look(calm, []) == []
    bad = {**calm, "truncated": [0.5] * 20, "abstained": [2.0] * 20, "gap": [0.3] * 20, "updates": [0.0, *[1.0] * 19]}
    said = " ".join(worth_a_look(bad, [readings({"greedy": 0.5}), readings({"greedy": 0.4})]))
    for part in (
        "50 % of the last paths were cut",
        "40 paths could not be graded",
        "disagreed by 0.3",
        "1 of 20 steps made no update",
    ):
        assert part in said
    assert "The reward rose but greedy accuracy on held-out problems fell" in said


def test_an_interrupted_write_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    before = page(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == before


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_an_address_opens_its_group_in_a_browser(tmp_path: Path) -> None:
    at = folder(tmp_path / "run", steps=20)
    rows = [
        row(10, 7, r, ("<b>asked</b>", "t", "9", 2), NASTY.replace("\x00", ""), {"correct": r / 3}, r - 1.5) for r in range(4)
    ]
    rows[3]["mask"][:5] = [False] * 5
    write(at / "groups/step-000010.parquet", rows)
    address = write_report(at).resolve().as_uri() + "#step-10/group-7/path-2"
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
    command = ["chromium", *quiet, f"--user-data-dir={tmp_path / 'browser'}", "--virtual-time-budget=2000", "--dump-dom", address]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    browser = dom[dom.index('<div id="browser">') : dom.index('<section id="settings">')]
    assert "4 paths, reward 0 to 1, mean 0.5." in browser
    assert "&lt;b&gt;asked&lt;/b&gt;" in browser
    assert re.search(r'<article class="path up chosen" data-row="2">', browser)
    assert browser.count('class="off"') == 5
    assert "alert" in re.sub(r"<[^>]*>", "", browser)
    assert dom.count('<svg class="plot"') == len(data_of((at / "report.html").read_text())["charts"])
    assert re.search(r'<path d="M[\d. L-]{100,}', dom)


# -- conversations


def talked_group(at: Path, strata: Any = None) -> dict[str, Any]:
    """The group of conversations as a run stores it and the page holds it."""
    run = RunFolder(at)
    at.mkdir(exist_ok=True)
    run.append(run.metrics, {"step": 1, "reward": 0.5})
    run.save_groups("groups", 1, [conversations()], tiny_tokenizer(), strata)
    return data_of(page(at))["groups"]["steps"][0]["groups"][0]


def heard(p: dict[str, Any]) -> list[str]:
    """What the page writes into every turn of a path."""
    letters = p.get("lengths") or [1] * len(p["text"])
    starts = [sum(letters[:i]) for i in range(len(letters) + 1)]
    return [p["text"][starts[t["at"][0]] : starts[t["at"][1]]] if "at" in t else t["text"] for t in p["turns"]]


def test_every_turn_of_a_conversation_is_told_from_what_its_tools_wrote(tmp_path: Path) -> None:
    answered, late, bare, full = talked_group(tmp_path)["paths"]
    assert heard(answered) == [
        "<shout>hey</shout>",
        "<result>HEY</result>",
        "<broken>b</broken>",
        "<result>error: ValueError: no such page</result>",
        "HEY it is<eos>",
    ]
    assert [t.get("tools") for t in answered["turns"]] == [None, ["shout"], None, ["broken"], None]
    assert [t.get("failed") for t in answered["turns"]] == [None, 0, None, 1, None]
    assert [(t["trained"], t["of"]) for t in answered["turns"] if "of" in t] == [(18, 18), (18, 18), (10, 10)]
    assert answered["untrained"] == [t["at"] for t in answered["turns"] if "tools" in t]
    assert (answered["calls"], answered["marks"]) == (2, ["1 failed call"])
    assert [(t["late"], t["failed"]) for t in late["turns"] if "tools" in t] == [(1, 0)]
    assert (late["calls"], late["marks"]) == (1, ["1 time-out"])
    assert (bare["calls"], bare["marks"], heard(bare)) == (0, [], ["I just know<eos>"])
    assert (full["calls"], full["marks"]) == (1, ["truncated"])
    assert "at" not in full["turns"][1]  # it was answered, but the answer did not fit and was never read
    assert full["turns"][1]["text"] == "LONG " * 13 + "LONG"


def test_the_turns_are_not_a_signal_of_the_page(tmp_path: Path) -> None:
    for p in talked_group(tmp_path)["paths"]:
        assert set(p["signals"]) == {"correct"}


def test_the_kinds_of_paths_are_counted_with_what_they_earned(tmp_path: Path) -> None:
    by_calls = talked_group(tmp_path / "calls")
    assert by_calls["by"] == "calls"
    assert by_calls["kinds"] == [["0", 1, 1.0, 0.5], ["1", 2, 0.0, -0.5], ["2", 1, 1.0, 0.5]]
    by_stratum = talked_group(tmp_path / "strata", lambda g: ["x", 10.0, "x", 2.0])
    assert [p["stratum"] for p in by_stratum["paths"]] == ["x", "10", "x", "2"]
    assert (by_stratum["by"], by_stratum["kinds"][0]) == ("stratum", ["x", 2, 1.0, 0.5])
    assert [k[0] for k in talked_group(tmp_path / "numbers", lambda g: [10, 9, 9, 2])["kinds"]] == ["2", "9", "10"]


def test_groups_without_tools_have_no_kinds(run: Path) -> None:
    group = data_of(page(run))["groups"]["steps"][0]["groups"][0]
    assert "kinds" not in group
    assert not any("turns" in p or "calls" in p for p in group["paths"])


def test_a_masked_conversation_keeps_its_turns_and_says_that_they_train_nothing(tmp_path: Path) -> None:
    file = RunFolder(tmp_path).save_groups("groups", 1, [conversations()], tiny_tokenizer())
    first = pq.read_table(file).to_pylist()[0]
    turns = turns_of({**first, "mask": [False] * len(first["mask"])})
    assert [t["trained"] for t in turns if "of" in t] == [0, 0, 0]
    one_unit = turns_of({**first, "unit": [min(u, 0) for u in first["unit"]]})
    assert one_unit == turns_of(first)


def test_units_of_another_kind_make_no_turns_up(tmp_path: Path) -> None:
    file = RunFolder(tmp_path).save_groups("groups", 1, [conversations()], tiny_tokenizer())
    first = pq.read_table(file).to_pylist()[0]
    for unit in ([0] * len(first["unit"]), None, [-1, *first["unit"][1:]]):
        assert turns_of({**first, "unit": unit}) == []
        assert path_record({**first, "unit": unit})["calls"] == 2


def test_turns_of_a_long_conversation_are_cut_with_their_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "TOKENS", 30)
    answered = talked_group(tmp_path)["paths"][0]
    assert heard(answered) == ["<shout>hey</shout>", "<r", "", "", "HEY it is<eos>"]
    assert (answered["gap_after"], answered["left_out"]) == (20, 84)
