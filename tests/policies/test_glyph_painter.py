"""The small painter on pixels: a Painter, its folder, its grid, what it knows of words."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from gruppo.policies.flow import CFG, FlowPolicy, Painter
from gruppo.policies.painters import load_painter
from gruppo.policies.painters.glyph import GlyphConfig, GlyphPainter, places, waves
from gruppo.types import GruppoError

SMALL = GlyphConfig(words=("one", "two", "red", "squares"), channels=8, width=32, layers=1)


def small(seed: int = 0) -> GlyphPainter:
    """Random weights with nothing left at zero, so that every part of the network matters."""
    painter = GlyphPainter.fresh(SMALL, seed)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for w in painter.model.parameters():
            w.add_(0.05 * torch.randn(w.shape, generator=g))
    return painter


def predicted(painter: GlyphPainter, prompts: list[str], seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    x, sigma = torch.randn(len(prompts), *painter.shape, generator=g), torch.rand(len(prompts), generator=g)
    with torch.no_grad():
        return painter.predict(x, sigma, painter.encode(prompts))


def test_it_is_a_painter():
    painter = small()
    assert isinstance(painter, Painter)
    assert painter.shape == (3, 32, 32)
    assert painter.tokens == 64


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    a, b, c = (GlyphPainter.fresh(SMALL, seed).model.state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert not torch.equal(a["enter.weight"], c["enter.weight"])


def test_a_fresh_network_expects_a_grey_picture():
    painter = GlyphPainter.fresh(SMALL, 0)
    x, sigma = torch.randn(3, *painter.shape), torch.tensor([1.0, 0.5, 0.01])
    v = painter.predict(x, sigma, painter.encode(["two", "red", "one"]))
    least = SMALL.least
    assert torch.allclose(v, x / torch.tensor([1.0, 0.5, least])[:, None, None, None])


def test_words_become_ids():
    painter = small()
    ids = painter.encode(["two Red squares", ""])
    assert ids[0].tolist() == [2, 3, 4, 0, 0, 0, 0, 0]
    assert ids[1].tolist() == [0] * 8


def test_unknown_words_long_prompts_and_other_things_are_sentences():
    painter = small()
    with pytest.raises(GruppoError, match=r"'pink', 'cats'.*one two red squares"):
        painter.encode(["two pink cats"])
    with pytest.raises(GruppoError, match="9 words, the painter reads 8"):
        painter.encode(["red " * 9])
    with pytest.raises(GruppoError, match="not dict"):
        painter.encode([{"role": "user"}])


def test_the_prompt_matters_and_rows_do_not_see_each_other():
    painter = small()
    v = predicted(painter, ["one red", "two red", ""])
    assert not torch.allclose(v[0], predicted(painter, ["two red", "two red", ""])[0])
    assert torch.allclose(v[1], predicted(painter, ["two squares", "two red", "one"])[1], atol=1e-5)


def test_every_parameter_learns():
    painter = small()
    x, sigma = torch.randn(4, *painter.shape), torch.rand(4)
    painter.predict(x, sigma, painter.encode(["one red", "two squares", "one", "two red squares"])).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in painter.model.parameters())


def test_pictures_are_clamped():
    painter = small()
    x = torch.zeros(2, *painter.shape)
    x[0] = 3.0
    x[1, 0], x[1, 1], x[1, 2] = -1.0, 1.0, -7.0
    images = painter.decode(x)
    assert [i.size for i in images] == [(32, 32)] * 2
    assert images[0].getpixel((5, 5)) == (255, 255, 255)
    assert images[1].getpixel((5, 5)) == (0, 255, 0)


def test_the_grid_is_shifted():
    painter = GlyphPainter(small().model)
    painter.config = replace(SMALL, shift=3.0)
    grid = painter.sigmas(10)
    assert grid.dtype == torch.float64
    assert grid.tolist() == pytest.approx([1, 27 / 28, 12 / 13, 0.875, 9 / 11, 0.75, 2 / 3, 0.5625, 3 / 7, 0.25, 0])


def test_a_folder_gives_the_painter_back(tmp_path):
    painter = small()
    painter.save(tmp_path / "a")
    assert json.loads((tmp_path / "a" / "model_index.json").read_text())["_class_name"] == "GlyphPipeline"
    again = load_painter(tmp_path / "a")
    assert isinstance(again, GlyphPainter)
    assert again.config == SMALL
    assert torch.equal(predicted(again, ["two red", "one"]), predicted(painter, ["two red", "one"]))
    again.save(tmp_path / "b")
    for file in ("config.json", "model_index.json", "model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_half_precision_on_disk_is_float32_in_memory(tmp_path):
    painter = small()
    painter.save(tmp_path, torch.float16)
    again = GlyphPainter.load(tmp_path)
    for mine, theirs in zip(painter.model.parameters(), again.model.parameters()):
        assert theirs.dtype == torch.float32
        assert torch.equal(theirs, mine.half().float())


def test_restoring_keeps_the_parameters_and_refuses_another_network(tmp_path):
    painter, other = small(0), small(1)
    other.save(tmp_path / "other")
    held = list(painter.model.parameters())
    painter.restore(tmp_path / "other")
    assert all(a is b for a, b in zip(held, painter.model.parameters()))
    assert torch.equal(predicted(painter, ["two"]), predicted(other, ["two"]))
    GlyphPainter.fresh(replace(SMALL, layers=2), 0).save(tmp_path / "larger")
    with pytest.raises(GruppoError, match=r"another network: blocks\.1"):
        painter.restore(tmp_path / "larger")


def test_guidance_asks_without_words_as_well():
    policy = FlowPolicy(small(), steps=2, cfg=CFG(2.0))
    plain = FlowPolicy(small(), steps=2)
    a = policy.sample(["two red"], g=torch.Generator().manual_seed(0))[0]
    b = plain.sample(["two red"], g=torch.Generator().manual_seed(0))[0]
    assert not torch.allclose(a.steps[-1], b.steps[-1])


def test_places_and_levels_differ():
    table = places(SMALL)
    assert table.shape == (64, 32)
    assert torch.cdist(table, table).fill_diagonal_(9).min() > 0.1
    close = waves(torch.tensor([0.5, 0.51]), 32)
    assert (close[0] - close[1]).norm() > 0.1
