"""Fitting a reward model's heads: the loss by hand, labels that are missing or wrong, the folder that comes out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.graders.made import group
from tests.runs.small import write_rows
from tests.tiny import tiny_config, tiny_folder, tiny_tokenizer
from transformers import AutoModel, AutoModelForSequenceClassification, BertConfig
from typer.testing import CliRunner

from gruppo.cli import app
from gruppo.graders import RewardModel
from gruppo.reward_model import (
    Labelled,
    apart,
    begin,
    fit,
    fit_folder,
    pearson,
    ranks,
    read_labelled,
    saved_scores,
    scores,
    squared,
)
from gruppo.types import GruppoError

HEADS = ("vowels", "short")


def bert_folder(folder: Path) -> Path:
    """A random encoder with its tokenizer."""
    config = BertConfig(
        vocab_size=tiny_config().vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        initializer_range=0.25,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModel.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def backbone(folder: Path, family: str) -> Path:
    return bert_folder(folder) if family == "bert" else tiny_folder(folder, family)


def labelled(n: int = 48) -> list[dict[str, Any]]:
    """Completions whose share of vowels and whose shortness are their labels."""
    g = torch.Generator().manual_seed(0)
    rows = []
    for i in range(n):
        length = int(torch.randint(1, 9, (), generator=g))
        text = "".join("aeioubcdfg"[int(k)] for k in torch.randint(0, 10, (length,), generator=g))
        rows.append(
            {
                "prompt": f"{i % 16}?",
                "completion": text,
                "vowels": sum(c in "aeiou" for c in text) / length,
                "short": 1 - length / 8,
            }
        )
    return rows


def made(rows: list[dict[str, Any]]) -> list[Labelled]:
    return [Labelled(r["prompt"], r["completion"], tuple(float(r[h]) for h in HEADS)) for r in rows]


def test_the_loss_is_the_mean_squared_error_over_heads() -> None:
    said, labels = torch.tensor([[0.8, 0.6, 0.7, 0.2]]), torch.tensor([[1.0, 0.5, 0.5, 0.0]])
    assert float(squared(said, labels)) / 4 == pytest.approx(0.0325)


def test_a_missing_label_enters_neither_the_sum_nor_the_gradient() -> None:
    said = torch.tensor([[0.8, 0.6]], requires_grad=True)
    loss = squared(said, torch.tensor([[1.0, math.nan]]))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.04)
    assert said.grad is not None
    assert said.grad.tolist() == [[pytest.approx(-0.4), 0.0]]


def test_the_first_step_reports_the_loss_of_the_untrained_heads(tmp_path: Path) -> None:
    rows = made(labelled(6))
    rows[2] = Labelled(rows[2].prompt, rows[2].completion, (math.nan, rows[2].labels[1]))
    judge = begin(tiny_folder(tmp_path / "m"), HEADS)
    graded = judge([group([r.completion], prompt=r.prompt) for r in rows])
    errors = [(graded[i][h][0] - r.labels[k]) ** 2 for i, r in enumerate(rows) for k, h in enumerate(HEADS)]
    heard = [e for e in errors if not math.isnan(e)]
    rng = torch.Generator().manual_seed(0)
    [step] = fit(judge, rows, steps=1, batch=6, learning_rate=1e-3, warmup=0, rng=rng)
    assert (step.labels, len(heard)) == (11, 11)
    assert step.loss == pytest.approx(sum(heard) / 11, rel=1e-5)


def test_a_head_without_labels_in_the_data_does_not_move(tmp_path: Path) -> None:
    rows = [Labelled(r.prompt, r.completion, (r.labels[0], math.nan)) for r in made(labelled(8))]
    judge = begin(tiny_folder(tmp_path / "m"), HEADS)
    before = judge.model.score.weight.detach().clone()
    list(fit(judge, rows, steps=3, batch=8, learning_rate=1e-2, warmup=0, rng=torch.Generator().manual_seed(0)))
    after = judge.model.score.weight.detach()
    assert torch.equal(after[1], before[1])
    assert not torch.equal(after[0], before[0])


@pytest.mark.parametrize("family", ["qwen3", "bert"])
def test_the_token_budget_changes_neither_loss_nor_gradient(tmp_path: Path, family: str) -> None:
    folder, rows, ends = backbone(tmp_path / "m", family), made(labelled(8)), []
    for budget in (16384, 12):
        judge = begin(folder, HEADS)
        judge.budget = budget
        rng = torch.Generator().manual_seed(0)
        [step] = fit(judge, rows, steps=1, batch=8, learning_rate=1e-3, warmup=0, rng=rng)
        ends.append((step.loss, step.grad_norm))
    assert ends[0] == pytest.approx(ends[1], rel=1e-4)


@pytest.mark.parametrize("family", ["qwen3", "llama", "bert"])
def test_the_folder_is_a_plain_classifier_whose_heads_have_learned(tmp_path: Path, family: str) -> None:
    data = write_rows(tmp_path / "rows.jsonl", labelled(96))
    model = backbone(tmp_path / "m", family)
    told = list(fit_folder(model, data, tmp_path / "out", HEADS, steps=60, learning_rate=5e-3, held_out=0.2))
    assert [t.step for t in told] == list(range(1, 61))
    assert told[-1].loss < 0.3 * told[0].loss
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert plain.config.num_labels == 2
    assert plain.config.id2label == {0: "vowels", 1: "short"}
    assert (tmp_path / "out" / "model.safetensors").exists()
    judge = RewardModel(tmp_path / "out")
    assert judge.signals == HEADS
    saved, (train, held) = saved_scores(tmp_path / "out"), apart(read_labelled(data, HEADS), 0.2)
    assert [s.mse for s in scores(judge, train, held)] == pytest.approx([s.mse for s in saved], rel=1e-4)


def test_the_heads_say_held_out_labels(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", labelled(240))
    list(fit_folder(bert_folder(tmp_path / "m"), data, tmp_path / "out", HEADS, steps=60, learning_rate=5e-3, held_out=0.2))
    for found in saved_scores(tmp_path / "out"):
        assert found.mse is not None
        assert found.mse_of_mean is not None
        assert found.pearson is not None
        assert found.mse < 0.6 * found.mse_of_mean
        assert found.pearson > 0.6


@pytest.mark.parametrize("family", ["qwen3", "bert"])
def test_the_seed_alone_decides_the_weights(tmp_path: Path, family: str) -> None:
    data, model = write_rows(tmp_path / "rows.jsonl", labelled()), backbone(tmp_path / "m", family)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(ord(name))  # the global generator must not matter
        list(fit_folder(model, data, tmp_path / name, HEADS, steps=3, learning_rate=1e-3, seed=seed))
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_one_head_keeps_its_name(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", labelled())
    list(fit_folder(tiny_folder(tmp_path / "m"), data, tmp_path / "judge", ["short"], steps=1))
    assert RewardModel(tmp_path / "judge").signals == ("short",)


def test_a_reward_model_can_be_fitted_again_with_other_heads(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", labelled())
    list(fit_folder(tiny_folder(tmp_path / "m"), data, tmp_path / "one", ["short"], steps=1))
    list(fit_folder(tmp_path / "one", data, tmp_path / "two", HEADS, steps=1))
    assert RewardModel(tmp_path / "two").signals == HEADS


def test_chat_prompts_are_read_as_the_grader_reads_them(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}]
    rows = [{"prompt": chat, "completion": "a", "short": 1}, {"prompt": [*chat, *chat], "completion": "b", "short": 0}]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    judge = begin(tiny_folder(tmp_path / "m"), ["short"])
    [first, _] = read_labelled(data, ["short"])
    ids = judge.encode(first.prompt, first.completion)
    assert judge.tokenizer.decode(ids) == "<user>hi<assistant>a<eos>"


def test_all_replies_to_a_prompt_are_on_one_side() -> None:
    train, held = apart(made(labelled(64)), 0.25)
    assert len(train) + len(held) == 64
    assert {r.prompt for r in held}.isdisjoint(r.prompt for r in train)
    assert len({r.prompt for r in held}) == 4
    assert apart(made(labelled(64)), 0.0)[1] == []


def test_correlations_by_hand() -> None:
    a, b = torch.tensor([1.0, 2.0, 3.0, 4.0]).double(), torch.tensor([1.0, 3.0, 2.0, 4.0]).double()
    assert pearson(a, b) == pytest.approx(0.8)
    assert ranks(torch.tensor([10.0, 30.0, 30.0, 20.0])).tolist() == [1.0, 3.5, 3.5, 2.0]
    assert pearson(ranks(a.exp()), ranks(b)) == pytest.approx(0.8)
    assert pearson(a, torch.ones(4).double()) is None
    assert pearson(a[:1], b[:1]) is None


def refused(tmp_path: Path, rows: list[Any], heads: tuple[str, ...] = HEADS) -> str:
    with pytest.raises(GruppoError) as error:
        read_labelled(write_rows(tmp_path / "rows.jsonl", rows), heads)
    return str(error.value)


def test_wrong_data_is_refused_with_its_line(tmp_path: Path) -> None:
    good = labelled(2)
    assert "the label 'short' in line 2 of" in refused(tmp_path, [good[0], {**good[1], "short": math.nan}])
    assert "is 'high'; a label is a finite number" in refused(tmp_path, [{**good[0], "short": "high"}])
    assert "has the column 'shrot'; did you mean 'short'?" in refused(tmp_path, good, ("vowels", "shrot"))
    assert "'short' of " in refused(tmp_path, [{**r, "short": None} for r in good])
    assert "needs prompt and completion, or messages" in refused(tmp_path, [{"prompt": "x", "short": 1, "vowels": 0}])
    assert "holds no row" in refused(tmp_path, [])
    with pytest.raises(GruppoError, match="cannot read"):
        read_labelled(tmp_path / "nothing.jsonl", HEADS)


def test_null_and_absent_are_no_label(tmp_path: Path) -> None:
    good = labelled(3)
    del good[1]["short"]
    rows = read_labelled(write_rows(tmp_path / "rows.jsonl", [good[0], good[1], {**good[2], "vowels": None}]), HEADS)
    assert [[math.isnan(x) for x in r.labels] for r in rows] == [[False, False], [False, True], [True, False]]


def test_a_head_whose_labels_are_all_held_out_is_refused(tmp_path: Path) -> None:
    rows = labelled(64)
    held = {r.prompt for r in apart(made(rows), 0.25)[1]}
    data = write_rows(tmp_path / "rows.jsonl", [{**r, "short": r["short"] if r["prompt"] in held else None} for r in rows])
    with pytest.raises(GruppoError, match="all labels of the head 'short' are on held-out prompts"):
        next(fit_folder(tiny_folder(tmp_path / "m"), data, tmp_path / "out", HEADS, held_out=0.25))


def test_a_row_that_the_model_cannot_read_whole_is_refused(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [*labelled(8), {"prompt": "q", "completion": "a" * 300, "vowels": 1, "short": 0}])
    with pytest.raises(GruppoError, match="a row has 301 tokens, but this model reads 256"):
        next(fit_folder(tiny_folder(tmp_path / "m"), data, tmp_path / "out", HEADS))


def test_what_exists_is_not_overwritten_and_heads_are_named_once(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", labelled(8))
    with pytest.raises(GruppoError, match="exists and is not empty"):
        next(fit_folder(tiny_folder(tmp_path / "m"), data, tmp_path / "m", HEADS))
    with pytest.raises(GruppoError, match="every name once"):
        begin(tmp_path / "m", ["a", "a"])
    with pytest.raises(GruppoError, match="no model that can carry a regression head"):
        begin(tmp_path / "nowhere", HEADS)


def test_the_command_prints_a_line_per_head(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", labelled())
    words = ["reward-model", "fit", "--model", str(tiny_folder(tmp_path / "m")), "--data", str(data), "--heads", "vowels, short"]
    done = CliRunner().invoke(app, [*words, "--output", str(tmp_path / "out"), "--steps", "2", "--json"])
    assert done.exit_code == 0, done.output
    shown = json.loads(done.stdout)
    assert [row["head"] for row in shown] == ["vowels", "short"]
    assert shown[0].keys() == {"head", "labels", "mse", "mse_of_mean", "pearson", "spearman"}
