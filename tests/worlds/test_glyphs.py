"""The world of pictures: prompts, drawing, a verifier that pixels cannot fool, and the shipped base model."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path as File
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter

from gruppo.graders.grade import Grading
from gruppo.policies.flow import FlowPolicy
from gruppo.policies.painters import load_painter
from gruppo.types import Group, GruppoError, Path, Task
from gruppo.worlds import WORLDS
from gruppo.worlds.glyphs import (
    COLOURS,
    GLYPHS,
    GROUND,
    POSITIONS,
    SHAPES,
    SIDE,
    draw,
    judge,
    key,
    look,
    mistold,
    outline,
    patches,
    task_of,
)
from gruppo.worlds.problems import is_held_out

TWO = task_of(2, "red", "square", "left")


def verdict(picture: Image.Image, task: Task) -> dict[str, float]:
    return judge(look([picture])[0], task)


def blank() -> Image.Image:
    return Image.new("RGB", (SIDE, SIDE), GROUND)


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))


# -- tasks


def test_the_world_is_registered():
    assert WORLDS["glyphs"] is GLYPHS


@pytest.mark.parametrize(
    ("asked", "prompt"),
    [
        ((2, "red", "square", "left"), "two red squares at the left"),
        ((3, "blue", "circle"), "three blue circles"),
        ((1, "green", "triangle", "top"), "one green triangle at the top"),
        ((3, "black", "cross", "bottom"), "three black crosses at the bottom"),
    ],
)
def test_prompts(asked, prompt):
    task = task_of(*asked)
    assert task.prompt == prompt
    assert task.extra["difficulty"] == task.extra["count"] == asked[0]


def test_a_task_depends_on_seed_and_index_alone():
    ahead = [GLYPHS.task(3, i) for i in range(20)]
    assert [GLYPHS.task(3, i) for i in reversed(range(20))] == ahead[::-1]
    assert [GLYPHS.task(4, i) for i in range(20)] != ahead


def test_no_training_task_is_a_held_out_one():
    held = GLYPHS.held_out(GLYPHS.defaults["eval"]["tasks"])
    assert len({key(t) for t in held}) == len(held)
    assert all(is_held_out(key(t)) for t in held)
    assert not {key(t) for t in held} & {key(GLYPHS.task(seed, i)) for seed in range(3) for i in range(1000)}


def test_more_held_out_tasks_than_there_are_is_a_sentence():
    only = GLYPHS.held_out(1)[0]
    with pytest.raises(GruppoError, match="has only 1 different held-out problems, 2 were asked for"):
        replace(GLYPHS, problem=lambda random: only).held_out(2)


# -- the verifier on what is right


def test_drawn_pictures_are_right():
    random = Random(7)
    asked = product((1, 2, 3), COLOURS, SHAPES, ("anywhere", *POSITIONS))
    tasks = [task_of(*one) for one in asked]
    seen = look([draw(t, random) for t in tasks])
    found = [judge(s, t)["correct"] for s, t in zip(seen, tasks)]
    assert sum(found) >= 0.99 * len(found)


def test_slightly_blurred_and_noisy_pictures_are_right():
    random, shaken = Random(8), np.random.default_rng(8)
    tasks = [GLYPHS.problem(random) for _ in range(100)]
    made = []
    for t in tasks:
        pixels = np.asarray(draw(t, random).filter(ImageFilter.GaussianBlur(0.3)), dtype=np.float32)
        made.append(Image.fromarray((pixels + shaken.normal(0, 5, pixels.shape)).clip(0, 255).astype(np.uint8)))
    found = [judge(s, t)["correct"] for s, t in zip(look(made), tasks)]
    assert sum(found) >= 97


# -- and on what is not


@pytest.mark.parametrize(
    ("drawn", "part", "value"),
    [
        ((2, "green", "square", "left"), "colour", 0.0),
        ((2, "purple", "square", "left"), "colour", 0.0),
        ((3, "red", "square", "left"), "count", 0.5),
        ((1, "red", "square", "left"), "count", 0.5),
        ((2, "red", "circle", "left"), "shape", 0.0),
        ((2, "red", "triangle", "left"), "shape", 0.0),
        ((2, "red", "cross", "left"), "shape", 0.0),
        ((2, "red", "square", "right"), "position", 0.0),
    ],
)
def test_one_part_wrong(drawn, part, value):
    for seed in range(10):
        found = verdict(draw(task_of(*drawn), Random(seed)), TWO)
        assert found["correct"] == 0
        assert found[part] == value
        assert all(found[other] == 1 for other in ("shape", "colour", "count", "position") if other != part)


def test_shares_count_things():
    big = Image.new("RGB", (SIDE * 4, SIDE * 4), GROUND)
    pen = ImageDraw.Draw(big)
    outline(pen, "square", 28.0, 32.0, 16.0, COLOURS["red"])
    outline(pen, "circle", 96.0, 32.0, 16.0, COLOURS["red"])
    outline(pen, "square", 96.0, 96.0, 16.0, COLOURS["blue"])
    found = verdict(big.reduce(4), TWO)
    assert found == {
        "correct": 0.0,
        "shape": pytest.approx(2 / 3),
        "colour": pytest.approx(2 / 3),
        "count": 0.5,
        "position": pytest.approx(1 / 3),
        "plain": pytest.approx(1.0, abs=0.02),
    }


def test_a_blank_picture_shows_nothing():
    assert verdict(blank(), TWO) == {"correct": 0, "shape": 0, "colour": 0, "count": 0, "position": 0, "plain": 1}


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_wrong(seed):
    for task in (TWO, task_of(1, "black", "circle"), task_of(3, "cyan", "cross")):
        assert verdict(noise(seed), task)["correct"] == 0


@pytest.mark.parametrize("colour", [(255, 255, 255), (0, 0, 0), (220, 30, 40), (128, 128, 128)])
def test_one_flat_colour_is_wrong(colour):
    for count, shape in product((1, 2), SHAPES):
        assert verdict(Image.new("RGB", (SIDE, SIDE), colour), task_of(count, "red", shape))["correct"] == 0


def test_a_right_picture_on_a_wrong_ground_is_wrong():
    picture = draw(TWO, Random(0))
    pixels = np.asarray(picture).astype(np.int16)
    tinted = Image.fromarray((pixels - np.array([0, 40, 40])).clip(0, 255).astype(np.uint8))
    assert verdict(picture, TWO)["correct"] == 1
    assert verdict(tinted, TWO)["correct"] == 0


def test_an_uneven_ground_is_less_plain_before_it_is_wrong():
    shaken = np.random.default_rng(0)
    pixels = np.asarray(draw(TWO, Random(0)), dtype=np.float32)
    found = []
    for strength in (0, 8, 15, 40):
        spoilt = (pixels + shaken.normal(0, strength, pixels.shape)).clip(0, 255).astype(np.uint8)
        found.append(verdict(Image.fromarray(spoilt), TWO))
    assert [f["correct"] for f in found] == [1, 1, 1, 0]
    assert [f["plain"] for f in found] == sorted((f["plain"] for f in found), reverse=True)
    assert found[0]["plain"] > 0.98
    assert found[3]["plain"] < 0.25


def test_specks_spoil_a_picture():
    pixels = np.asarray(draw(task_of(1, "red", "square", "left"), Random(0))).copy()
    pixels[2:30:4, 20:30:4] = COLOURS["red"]
    assert verdict(Image.fromarray(pixels), task_of(1, "red", "square", "left"))["correct"] == 0


def test_a_thing_of_two_colours_or_none_of_ours_has_no_colour():
    pixels = np.asarray(draw(task_of(1, "red", "square"), Random(1))).copy()
    thing = pixels[..., 1] < 100
    pixels[thing] = (245, 130, 170)
    assert verdict(Image.fromarray(pixels), task_of(1, "red", "square"))["colour"] == 0


def test_a_large_bar_has_no_shape():
    pixels = np.asarray(blank()).copy()
    pixels[8:14, 2:30] = COLOURS["red"]
    assert verdict(Image.fromarray(pixels), task_of(1, "red", "square"))["shape"] == 0


def test_things_that_touch_at_a_corner_are_one():
    mask = torch.zeros(2, 6, 6, dtype=torch.bool)
    mask[0, 0, 0] = mask[0, 1, 1] = mask[0, 4, 4] = True
    label = patches(mask)
    assert label[0, 0, 0] == label[0, 1, 1] != label[0, 4, 4]
    assert not label[1].any()


def test_pictures_do_not_depend_on_their_company():
    random = Random(3)
    tasks = [GLYPHS.problem(random) for _ in range(6)]
    made = [*(draw(t, random) for t in tasks), noise(0), blank()]
    assert look(made) == [look([m])[0] for m in made]


def test_the_grader_gives_every_signal():
    path = Path(TWO.prompt, torch.zeros(1), torch.zeros(0), torch.zeros(0, dtype=torch.bool), output=draw(TWO, Random(0)))
    wrong = replace(path, output=blank())
    graded = Grading(GLYPHS.graders(), dict(GLYPHS.weights))([Group(TWO, [path, wrong])])[0].signals
    for name in ("correct", "shape", "colour", "count", "position"):
        assert graded[name].tolist() == [1, 0]
    assert graded["plain"].tolist() == pytest.approx([1, 1], abs=0.02)
    assert set(GLYPHS.weights) == set(graded) - {"reward"}
    assert graded["reward"][0] > graded["reward"][1]


def test_what_is_no_picture_of_this_size_is_a_sentence():
    with pytest.raises(GruppoError, match="is a str"):
        look(["two red squares"])
    with pytest.raises(GruppoError, match="64 x 64"):
        look([Image.new("RGB", (64, 64))])


# -- the base model


def test_the_captions_it_learns_from_are_as_often_wrong_as_the_world_says():
    random = Random(0)
    tasks = [GLYPHS.problem(random) for _ in range(4000)]
    shown = [mistold(task, random) for task in tasks]
    for name, share in (("count", 0.2), ("colour", 0.3), ("position", 0.2), ("shape", 0.0)):
        pairs = [(t, s) for t, s in zip(tasks, shown) if name != "position" or t.extra[name] in POSITIONS]
        wrong = sum(t.extra[name] != s.extra[name] for t, s in pairs) / len(pairs)
        assert wrong == pytest.approx(share, abs=0.03 if share else 0), name
    assert all(s.extra["position"] == "anywhere" for t, s in zip(tasks, shown) if t.extra["position"] == "anywhere")


def test_a_lesson_shows_the_mistold_picture_under_the_caption_that_was_drawn():
    """The pictures of one world's lessons are the other's, the captions are not."""
    black = replace(GLYPHS, shown=lambda task, random: task_of(1, "black", "square", "left"))
    pictures, prompts = black._lessons(0, 1)
    assert len(set(prompts)) > 1
    assert all(verdict(p, task_of(1, "black", "square", "left"))["correct"] == 1 for p in pictures)


def test_a_build_gives_the_same_bytes_again(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        quick = replace(GLYPHS, course=replace(GLYPHS.course, batch=4))
        for name in ("a", "b"):
            quick.build(tmp_path / name, seed=1, log=lambda line: None, steps=3)
        quick.build(tmp_path / "c", seed=2, log=lambda line: None, steps=3)
    finally:
        torch.set_num_threads(threads)
    files = sorted(f.name for f in (tmp_path / "a").iterdir())
    assert files == ["config.json", "model.safetensors", "model_index.json"]
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    assert (tmp_path / "a" / files[1]).read_bytes() != (tmp_path / "c" / files[1]).read_bytes()


def test_the_shipped_base_is_small_and_is_this_world_s():
    assert sum(f.stat().st_size for f in File(GLYPHS.base).iterdir()) < 6 * 2**20
    painter = load_painter(GLYPHS.base)
    assert painter.config == GLYPHS.config
    assert len(painter.encode([GLYPHS.task(0, i).prompt for i in range(200)])) == 200
    assert all(p.dtype == torch.float32 for p in painter.model.parameters())


def test_the_shipped_base_is_sometimes_right():
    """Between what cannot be learned from and what needs no learning."""
    policy = FlowPolicy(load_painter(GLYPHS.base), steps=GLYPHS.defaults["policy"]["denoising_steps"])
    tasks = GLYPHS.held_out(40)
    paths = policy.sample([t.prompt for t in tasks], g=torch.Generator().manual_seed(0))
    seen = look([p.output for p in paths])
    right = sum(judge(s, t)["correct"] for s, t in zip(seen, tasks)) / len(tasks)
    assert 0.05 <= right <= 0.5
