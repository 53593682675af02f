"""The benchmark: equal work on both sides, refused otherwise; counted operations; what it writes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path as Folder

import pytest
import torch

from gruppo import bench, bench_vision
from gruppo.types import GruppoError

SMALL = bench.Work(2, 12, 3, 7)


def test_the_operations_of_one_prompt_and_eight_completions() -> None:
    need = bench.operations(bench.Work(1, 128, 64, 64))
    tokens = 128 + 8 * 63  # the last token of a completion predicts nothing
    layer = 256 * (256 + 128 + 128) + 256 * 256 + 3 * 256 * 768
    pairs = 191**2 / 2 + 7 * 63**2 / 2 + 7 * 63 * 128
    head = 2 * 256 * 512 * 8 * 64
    assert need["tokens"] == tokens
    assert need["score"] == pytest.approx(2 * 4 * layer * tokens + 4 * 4 * 256 * pairs + head, rel=0.01)
    assert need["train"] == 3 * need["score"]
    assert 2.2 < need["saved"] < 2.5  # 8 x 192 tokens against 632, attention a little less


def test_the_same_rows_each_time() -> None:
    a, b = ([p.steps for g in bench.rows(SMALL) for p in g.paths] for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a, b))
    assert {len(x) for x in a} <= set(range(3, 8))
    assert max(len(x) for x in a) == 7


def test_shared_and_ordinary_training_have_one_gradient() -> None:
    sides = [bench.Here(SMALL, sharing) for sharing in (None, bench.prefix.Rates(call=1e3, small=0.0, margin=-1e9))]
    old = sides[0].score()
    losses = [s.train(s.given(old)) for s in sides]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    mine, theirs = (torch.cat([g.flatten() for g in bench.gradient(s.model).values()]) for s in sides)
    assert float((mine - theirs).norm() / theirs.norm()) < 1e-5


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_trl_does_the_same_work_and_other_work_is_refused(tmp_path: Folder) -> None:
    pytest.importorskip("trl", reason="needs the extra: pip install 'gruppo[parity]'")
    here, there = bench.Here(SMALL), bench.There(SMALL, tmp_path)
    old = there.score()
    assert max(bench.refuse_difference(here, there, old).values()) < 1e-5
    there.inputs["advantages"] = there.inputs["advantages"] + 1
    with pytest.raises(GruppoError, match="the two sides differ"):
        bench.refuse_difference(here, there, old)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_trl_samples_as_many_tokens_and_the_same_ones_when_greedy(tmp_path: Folder) -> None:
    pytest.importorskip("trl", reason="needs the extra: pip install 'gruppo[parity]'")
    work = bench.Work(1, 12, 5, 5)
    here, there = bench.Here(work), bench.There(work, tmp_path)
    bench.refuse_other_samples(here, there)
    for side in (here, there):
        bench.full(side)
        assert side.sample() != side.sample(greedy=True)
    there.trainer.generation_config.top_k = 3
    with pytest.raises(GruppoError, match="another distribution"):
        bench.refuse_other_samples(here, there)
    there.trainer.generation_config.top_k = 0
    here.model.model.embed_tokens.weight.data.neg_()
    with pytest.raises(GruppoError, match="other tokens"):
        bench.refuse_other_samples(here, there)
    here.policy.eos = list(range(512))
    with pytest.raises(GruppoError, match=r"completions of \[1\] tokens where 5"):
        bench.full(here)


def test_an_unknown_work_and_no_rounds_are_sentences() -> None:
    with pytest.raises(GruppoError, match="no work '1/2'; there are 128/64"):
        bench.report(["1/2"], 1, None)
    with pytest.raises(GruppoError, match="0 rounds"):
        bench.report(["128/64"], 0, None)


def test_the_larger_model_has_its_own_row() -> None:
    work = bench.WORKS["1024/32@24.7M"]
    assert (work.prompt, work.high) == (1024, 32)
    assert sum(p.numel() for p in bench.network(work.model).parameters()) == 24_651_264


def found(name: str, ratio: float) -> dict:
    phase = {
        "ms": {"gruppo": 100.0, "TRL": 100.0 * ratio},
        "ratio": [ratio, ratio - 0.1, ratio + 0.2],
        "of_limit": {"gruppo": 0.7, "TRL": 0.3},
        "of_torch": {"gruppo": 1.4, "TRL": 0.6},
        "completion_tokens_per_s": {"gruppo": 5000.0, "TRL": 2000.0},
    }
    head = {"work": name, "groups": 1, "rounds": 3, "apart": {"logp": 1e-6}, "gemm": 2e11, "gemm_torch": 1e11, "saved": 2.4}
    return {**head, "score": phase, "train": phase, "both": phase, "peak_mb": {"gruppo": 50.0, "TRL": 200.0}}


def test_the_page_has_every_ratio_with_its_spread_and_the_memory() -> None:
    page = bench.table(
        [found("128/64", 2.25), found("1024/32", 6.5)], {"128/64": {bench.LINEAR: [60.0, 45.0], bench.STARTING: [40.0, 0.0]}}
    )
    assert page.count("2.25 (2.15..2.45)") == 3
    assert page.count("6.50 (6.40..6.70)") == 3
    assert "| 128/64 | 200 | 50 | 0.25 |" in page
    assert "spends 100 ms at 128/64" in page
    assert "| linear layers | 0.60 | 0.75 |" in page
    assert "| starting operations: Python, views, autograd | 0.40 | 0.00 |" in page
    assert "* 128/64: train, times as fast as TRL, 2.25 (3 wanted)" in page
    assert "* 1024/32: train, times as fast as TRL, 6.50 (8 wanted)" in page
    assert "1024/32: train, of the limit" not in page, "1.4 of it is more than the 0.8 that are wanted"


def test_the_parts_of_a_step_are_told_apart() -> None:
    parts = bench.profile(bench.Work(1, 200, 40, 70), rounds=1)
    assert set(parts) == set(bench.PARTS)
    assert all(ms > 0 for ms, _ in parts.values())
    need = bench.operations(bench.Work(1, 200, 40, 70))
    assert sum(need[p] for p in (bench.LINEAR, bench.HEAD, bench.ATTENTION)) == pytest.approx(need["train"])
    assert parts[bench.LINEAR][0] > parts[bench.HEAD][0]


def test_the_plot_is_written(tmp_path: Folder) -> None:
    bench.draw([found("128/64", 2.25), found("1024/32", 6.5)], tmp_path / "train.svg")
    assert (tmp_path / "train.svg").read_text().count("<svg") == 1


def test_a_micro_batch_is_one_group_of_padded_rows() -> None:
    assert SMALL.budget == 8 * (12 + 7)
    assert (SMALL.name, replace(SMALL, high=3).name) == ("12/3..7", "12/3")


def test_a_picture_in_the_shared_prompt_is_equal_work_or_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    work = bench_vision.Picture(height=4, width=5, text=9, steps=6, hidden=128, layers=2)
    found = bench_vision.compare(work, rounds=1)
    assert max(found["apart"].values()) < 1e-5
    assert f"| 20+9/6, picture and text | {found['ms']['ordinary']:.0f} |" in "\n".join(bench_vision.table(found))
    own = bench_vision.prefix.Layout.pick
    wrong = lambda self, values: own(self, values) * (2 if values[0].dim() == 2 else 1)  # noqa: E731  other positions
    monkeypatch.setattr(bench_vision.prefix.Layout, "pick", wrong)
    with pytest.raises(GruppoError, match="nothing was timed"):
        bench_vision.compare(work, rounds=1)
