"""Scorers of pictures on a random CLIP, without network and without torchvision."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path as File
from typing import Any

import pytest
import torch
from tests.graders.clips import COLOURS, noise, picture, tiny_clip, tiny_tools
from tests.graders.made import group

from gruppo.graders.grade import Abstained, Grading
from gruppo.graders.images import (
    Above,
    Aesthetic,
    Clip,
    ClipScore,
    ImageScore,
    JpegSize,
    frames_of,
    linear_chain,
    pick_score,
    scored,
)
from gruppo.graders.sources import build
from gruppo.types import GruppoError


@pytest.fixture(scope="module")
def clip() -> Clip:
    return Clip(tiny_clip(), tiny_tools())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> File:
    """The same CLIP as people keep it: a folder."""
    where = tmp_path_factory.mktemp("clip")
    tokenizer, prepare = tiny_tools()
    tiny_clip().save_pretrained(where)
    tokenizer.save_pretrained(where)
    prepare.save_pretrained(where)
    return where


def known(image: Any, value: Any) -> Any:
    """A scorer with one answer."""
    return lambda images, prompts: [value] * len(images)


PROMPTS = ["a red one", "blue"]


def test_clip_score_is_the_cosine_of_the_two_embeddings(clip: Clip) -> None:
    images = [picture("red"), picture("blue")]
    tokenizer, prepare = tiny_tools()
    model = tiny_clip()
    with torch.no_grad():
        for image, prompt, got in zip(images, PROMPTS, ClipScore(clip)(images, PROMPTS)):
            out = model(**tokenizer([prompt], return_tensors="pt"), **prepare(images=[image], return_tensors="pt"))
            assert got == pytest.approx(float(torch.cosine_similarity(out.image_embeds, out.text_embeds)), abs=1e-6)
            assert out.logits_per_image.item() == pytest.approx(ClipScore(clip, scale=None)([image], [prompt])[0], rel=1e-5)


def test_it_tells_pictures_and_prompts_apart(clip: Clip) -> None:
    score = ClipScore(clip)
    assert len({round(s, 4) for s in score([picture(c) for c in COLOURS], ["red"] * 4)}) == 4
    assert score([picture()], ["red"]) != score([picture()], ["blue"])


def test_a_batch_scores_as_its_pictures_alone(clip: Clip) -> None:
    images = [*(picture(c) for c in COLOURS), noise(), noise(64, 1)]
    prompts = ["red", "a much longer one", "blue", "green", "x", "noise"]
    together = ClipScore(clip)(images, prompts)
    alone = [ClipScore(clip)([i], [p])[0] for i, p in zip(images, prompts)]
    assert together == pytest.approx(alone, abs=1e-6)
    assert scored(ClipScore(clip), images, prompts, batch=4) == pytest.approx(together, abs=1e-6)


def test_a_folder_is_loaded_when_first_asked_and_gives_the_same_numbers(clip: Clip, folder: File) -> None:
    from_disk = Clip(str(folder), device="cpu")
    assert "loaded" not in vars(from_disk)
    got = ClipScore(from_disk)([picture(), noise()], PROMPTS)
    assert got == pytest.approx(ClipScore(clip)([picture(), noise()], PROMPTS), abs=1e-6)
    assert type(from_disk.tools[1]).__name__.endswith("Pil")


def test_no_gradient_is_kept(clip: Clip) -> None:
    assert not clip.images([picture()]).requires_grad
    assert all(p.grad is None for p in clip.loaded.parameters())


def test_a_prompt_longer_than_clip_reads_is_cut_or_abstains(clip: Clip) -> None:
    long = "a" * 40
    assert isinstance(ClipScore(clip)([picture()], [long])[0], float)
    strict = Clip(clip.loaded, clip.tools, truncate=False)
    first, second = ClipScore(strict)([picture(), picture()], [long, "red"])
    assert isinstance(first, Abstained)
    assert "42 tokens, but CLIP reads 16" in first.reason
    assert isinstance(second, float)


def test_missing_folders_and_odd_prompts_are_sentences(clip: Clip, tmp_path: File) -> None:
    with pytest.raises(GruppoError, match="gives no AutoTokenizer"):
        ClipScore(Clip(str(tmp_path)))([picture()], ["x"])
    with pytest.raises(GruppoError, match="names no folder"):
        ClipScore(Clip(tiny_clip()))([picture()], ["x"])
    with pytest.raises(GruppoError, match="text elsewhere and a dict"):
        ClipScore(clip)([picture()], [{"role": "user"}])


def test_pick_score_is_a_clip_with_its_learned_scale(folder: File) -> None:
    mine = pick_score(str(folder), str(folder), device="cpu")
    plain = ClipScore(Clip(str(folder), device="cpu"))
    scale = float(tiny_clip().logit_scale.detach().exp())
    assert mine([picture()], ["red"])[0] == pytest.approx(scale * plain([picture()], ["red"])[0], rel=1e-5)


# -- the aesthetic head --------------------------------------------------------------------------------------------------------


def head() -> torch.nn.Sequential:
    """The shape of the published predictor, in small: linear layers with dropout between them."""
    g = torch.Generator().manual_seed(3)
    made = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Dropout(0.2), torch.nn.Linear(6, 4), torch.nn.Linear(4, 1))
    with torch.no_grad():
        for p in made.parameters():
            p.normal_(0, 0.5, generator=g)
    return made.eval()


@pytest.mark.parametrize("kind", ["module", "pth", "safetensors"])
def test_the_aesthetic_score_is_the_head_on_the_embedding(clip: Clip, tmp_path: File, kind: str) -> None:
    from safetensors.torch import save_file

    made = head()
    named = {f"layers.{k}": v for k, v in made.state_dict().items()}
    given: Any = made
    if kind == "pth":
        given = str(tmp_path / "head.pth")
        torch.save(named, given)
    elif kind == "safetensors":
        given = tmp_path / "head.safetensors"
        save_file(named, given)
    images = [picture("red"), noise()]
    expected = made(clip.images(images).clone())[:, 0].tolist()
    assert Aesthetic(clip, given)(images, ["", ""]) == pytest.approx(expected, abs=1e-5)


def test_layers_are_taken_in_the_order_of_their_numbers() -> None:
    widths = [8, 7, 6, 5, 4, 3, 2, 2, 2, 2, 2, 1]  # ten layers and more: "layers.10" sorts before "layers.2" as text
    tensors = {f"layers.{i}.weight": torch.ones(b, a) for i, (a, b) in enumerate(pairwise(widths))}
    assert [len(w) for w, _ in linear_chain(tensors, 8)] == widths[1:]


def test_a_head_of_another_clip_is_refused(clip: Clip) -> None:
    with pytest.raises(GruppoError, match="reads 768 numbers, but 8 come in"):
        Aesthetic(clip, {"weight": torch.zeros(1, 768)})([picture()], [""])
    with pytest.raises(GruppoError, match="this one ends in 3"):
        linear_chain({"weight": torch.zeros(3, 8)}, 8)
    with pytest.raises(GruppoError, match="no file 'nowhere"):
        linear_chain("nowhere.pth", 8)


# -- without a network ---------------------------------------------------------------------------------------------------------


def test_jpeg_size_is_small_for_one_colour_and_large_for_noise() -> None:
    flat, wild = JpegSize()([picture(size=64), noise(64)], ["", ""])
    assert flat < 1.0 < 4.0 < wild
    assert JpegSize(quality=20)([noise(64)], [""])[0] < wild / 2


def test_above_a_threshold() -> None:
    """HPS scores against .28."""
    values = [0.27, 0.281, 0.30, 0.26, 0.28]
    assert Above(lambda i, p: values, 0.28)([picture()] * 5, [""] * 5) == [0, 1, 1, 0, 0]


def test_what_abstains_stays_abstained_behind_a_threshold() -> None:
    lost = Abstained("no")
    assert Above(lambda i, p: [None, lost, 5.0], 1.0)([picture()] * 3, [""] * 3) == [None, lost, 1.0]


# -- the grader ----------------------------------------------------------------------------------------------------------------


def test_groups_of_several_prompts_get_their_own_numbers(clip: Clip) -> None:
    groups = [group([picture("red"), noise()], prompt="red"), group([picture("blue")], prompt="blue")]
    first, second = ImageScore(ClipScore(clip), "clip", batch=2)(groups)
    assert first["clip"] == pytest.approx(ClipScore(clip)([picture("red"), noise()], ["red"] * 2), abs=1e-6)
    assert second["clip"] == pytest.approx(ClipScore(clip)([picture("blue")], ["blue"]), abs=1e-6)


def test_a_video_is_the_mean_of_evenly_spaced_frames() -> None:
    frames = [picture(size=8 + i) for i in range(11)]
    assert [f.width - 8 for f in frames_of(frames, 3)] == [0, 5, 10]
    assert [f.width - 8 for f in frames_of(frames, 1)] == [5]
    assert len(frames_of(frames, 20)) == 11
    wide = ImageScore(lambda images, prompts: [float(i.width) for i in images], "width", frames=3)
    assert wide([group([frames, frames[0]])])[0]["width"] == [13.0, 8.0]


def test_what_is_no_picture_stops_the_run() -> None:
    grader = ImageScore(JpegSize(), "size")
    with pytest.raises(GruppoError, match="output is a str"):
        grader([group(["text"])])
    with pytest.raises(GruppoError, match="an empty list"):
        grader([group([[]])])


def moody(images: Any, prompts: Any) -> list[float]:
    """Breaks on a white picture, says NaN about a blue one."""
    if any(i.getpixel((0, 0)) == COLOURS["white"] for i in images):
        raise ValueError("too bright")
    return [math.nan if i.getpixel((0, 0)) == COLOURS["blue"] else 1.0 for i in images]


def test_one_bad_picture_costs_one_grade_and_is_counted() -> None:
    grading = Grading([ImageScore(moody, "mood")], {"mood": 1.0})
    [graded] = grading([group([picture("red"), picture("white"), picture("blue"), picture("green")])])
    assert graded.signals["reward"].isnan().tolist() == [False, True, True, False]
    assert grading.abstained["mood"] == 2
    assert grading.failures == {"mood: raised ValueError: too bright": 1, "mood: the scorer said nan": 1}


def test_preflight_refuses_a_broken_scorer() -> None:
    grading = Grading([ImageScore(moody, "mood")], {"mood": 1.0})
    with pytest.raises(GruppoError, match="too bright"):
        grading.preflight([group([picture("white")])])


def test_a_scorer_that_miscounts_stops_the_run() -> None:
    with pytest.raises(GruppoError, match="gave 1 numbers for 2 pictures"):
        ImageScore(lambda images, prompts: [1.0], "x")([group([picture(), picture()])])


def test_it_stands_in_a_list_of_rewards() -> None:
    grading = build([ImageScore(JpegSize(), "kb")], [-1.0])
    [graded] = grading([group([picture(), noise()])])
    assert graded.signals["reward"][0] > graded.signals["reward"][1]
