"""Pictures of one to three shapes, asked for by shape, colour, count and side.

    two red squares at the left         three blue circles        one green triangle at the top

A picture is right when everything that was asked holds: that many things, all of that shape and colour, all their centres in
that half of the picture, on a plain ground. The base model learned from captions that do not always say what the picture shows,
as captions from the web do: it paints another colour, number or side than was asked, runs things together, and leaves shapes
half done. The verifier sees pixels only: things are connected patches that differ from the ground, and a shape is the ideal
outline that a patch covers best.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from gruppo.policies.painters.glyph import GlyphConfig, GlyphPainter
from gruppo.types import Grader, Group, GruppoError, Task
from gruppo.worlds.problems import Problems

SIDE = 32
COUNTS = ("one", "two", "three")
SHAPES = ("square", "circle", "triangle", "cross")
COLOURS = {  # red, green, blue in 0 to 255
    "red": (220, 30, 40),
    "green": (30, 160, 60),
    "blue": (40, 70, 220),
    "yellow": (240, 205, 20),
    "purple": (150, 40, 170),
    "cyan": (20, 190, 210),
    "black": (25, 25, 25),
}
GROUND = (236, 236, 236)
POSITIONS = {"left": (0, -1), "right": (0, 1), "top": (1, -1), "bottom": (1, 1)}  # axis (x, y) and side
ANYWHERE = "anywhere"  # the prompt names no position
PLURALS = {shape: shape + ("es" if shape.endswith("s") else "s") for shape in SHAPES}
WORDS = (*COUNTS, *COLOURS, *SHAPES, *PLURALS.values(), "at", "the", *POSITIONS)


# -- tasks


def problem(random: Random) -> Task:
    """A task of any count, colour, shape and position."""
    position = random.choice((ANYWHERE, *POSITIONS))
    return task_of(random.randint(1, len(COUNTS)), random.choice(list(COLOURS)), random.choice(SHAPES), position)


def task_of(count: int, colour: str, shape: str, position: str = ANYWHERE) -> Task:
    """The task that asks for this picture; its difficulty is the count."""
    things = shape if count == 1 else PLURALS[shape]
    where = "" if position == ANYWHERE else f" at the {position}"
    return Task(
        prompt=f"{COUNTS[count - 1]} {colour} {things}{where}",
        answer={"count": count, "colour": colour, "shape": shape, "position": position},
        extra={"difficulty": count, "shape": shape, "colour": colour, "count": count, "position": position},
    )


CHOICES: dict[str, tuple[Any, ...]] = {"count": (1, 2, 3), "colour": tuple(COLOURS), "position": tuple(POSITIONS)}
MISTOLD = {"count": 0.2, "colour": 0.3, "position": 0.2}  # shares of the base model's captions that are wrong about it


def mistold(task: Task, random: Random) -> Task:
    """What the picture really shows under this caption; a caption that names no position is not wrong about it."""
    shows = {name: task.extra[name] for name in (*CHOICES, "shape")}
    for name, share in MISTOLD.items():
        if random.random() < share and shows[name] in CHOICES[name]:
            shows[name] = random.choice([choice for choice in CHOICES[name] if choice != shows[name]])
    return task_of(shows["count"], shows["colour"], shows["shape"], shows["position"])


def key(task: Task) -> str:
    """What is asked, whatever the words."""
    return " ".join(str(task.extra[name]) for name in ("count", "colour", "shape", "position"))


# -- drawing

SCALE = 4  # drawn larger, then averaged: edges are smooth
SIZES = {1: (9.0, 12.0), 2: (8.5, 11.0), 3: (7.5, 8.5)}  # pixels across, by count
GAP = 2.0  # pixels between two things at least
INSIDE = 2.5  # how far a centre stays within the asked half; a triangle's centre of gravity lies off its middle


def draw(task: Task, random: Random) -> Image.Image:
    """A picture that is right for this task; sizes and places vary."""
    want = task.extra
    picture = Image.new("RGB", (SIDE * SCALE, SIDE * SCALE), GROUND)
    pen = ImageDraw.Draw(picture)
    for x, y, r in placed(want["count"], want["position"], random):
        outline(pen, want["shape"], x * SCALE, y * SCALE, r * SCALE, COLOURS[want["colour"]])
    return picture.reduce(SCALE)


def placed(count: int, position: str, random: Random) -> list[tuple[float, float, float]]:
    """Centres and half sizes of things that do not touch."""
    low, high = SIZES[count]
    while True:
        size = random.uniform(low, high)
        found: list[tuple[float, float, float]] = []
        for _ in range(12 * count):
            r = size * random.uniform(0.95, 1.05) / 2
            at = [random.uniform(r + 1, SIDE - r - 1) for _ in range(2)]
            if position != ANYWHERE:
                axis, side = POSITIONS[position]
                half = random.uniform(r + 1, SIDE / 2 - INSIDE)
                at[axis] = half if side < 0 else SIDE - half
            if all(max(abs(at[0] - x), abs(at[1] - y)) >= r + s + GAP for x, y, s in found):
                found.append((at[0], at[1], r))
            if len(found) == count:
                return found


def outline(pen: Any, shape: str, x: float, y: float, r: float, ink: int | tuple[int, int, int]) -> None:
    """One filled shape around (x, y) that reaches r to every side."""
    if shape == "square":
        pen.rectangle((x - r, y - r, x + r - 1, y + r - 1), ink)
    elif shape == "circle":
        pen.ellipse((x - r, y - r, x + r - 1, y + r - 1), ink)
    elif shape == "triangle":
        pen.polygon([(x - r, y + r - 1), (x + r - 1, y + r - 1), (x - 0.5, y - r)], ink)
    else:
        arm = r / 3
        pen.rectangle((x - r, y - arm, x + r - 1, y + arm - 1), ink)
        pen.rectangle((x - arm, y - r, x + arm - 1, y + r - 1), ink)


# -- measuring

SPECK = 8  # pixels: a smaller patch is not a thing
SPECKS = 6  # pixels in specks that a plain ground may have
UNEVEN = 0.12  # mean distance of the ground's pixels from its colour, of a plain ground
UNLIKE = 0.3  # how far from a palette colour (0 to 1 per channel) a thing may be and still have it
ALIKE = 0.75  # overlap over union with an ideal outline from which on a thing has that shape
WINDOW = 17  # pixels: what is larger than all but a margin of this has no shape


@dataclass(frozen=True)
class Thing:
    """A connected patch of a picture: its colour and shape (None = none of ours), and its centre in pixels from the middle."""

    colour: str | None
    shape: str | None
    centre: tuple[float, float]
    likeness: float = 1.0  # overlap over union with the best outline


@dataclass(frozen=True)
class Seen:
    """What a picture shows: things, pixels in patches too small to be one, and how far the ground is from its colour."""

    things: tuple[Thing, ...]
    specks: int
    uneven: float

    @property
    def plain(self) -> bool:
        return self.specks <= SPECKS and self.uneven <= UNEVEN


def look(pictures: Sequence[Any]) -> list[Seen]:
    """Every picture's things; all pictures together, because the outlines are compared in one call."""
    if not pictures:
        return []
    pixels = torch.stack([pixels_of(picture) for picture in pictures])  # [N, H, W, 3]
    ground, inks = palette()
    away = pixels - ground
    toward = inks - ground
    size = toward.square().sum(1)
    share = away @ toward.T / size  # [N, H, W, colours]: of this colour on the ground, 0 to 1
    rest = (away[..., None, :] - share[..., None] * toward).square().sum(-1)
    best = rest.argmin(-1, keepdim=True)
    cover = share.gather(-1, best)[..., 0].clamp(0, 1)
    label = patches(cover >= 0.5)
    found, windows, out = [], [], []
    for n in range(len(pixels)):
        ids, counts = label[n].unique(return_counts=True)
        keep = [int(i) for i, c in zip(ids, counts) if i > 0 and c >= SPECK]
        specks = sum(int(c) for i, c in zip(ids, counts) if i > 0 and c < SPECK)
        for i in keep:
            mask = label[n] == i
            found.append((n, mask))
            windows.append(window(cover[n], mask))
        bare = F.max_pool2d((label[n] > 0).float()[None], 3, 1, 1)[0] == 0
        uneven = float(away[n][bare].norm(dim=-1).mean()) if bool(bare.any()) else 1.0
        out.append((specks, uneven))
    shapes = shaped(windows)
    things: list[list[Thing]] = [[] for _ in out]
    for (n, mask), (shape, likeness) in zip(found, shapes):
        weight = cover[n] * mask
        ys, xs = torch.meshgrid(torch.arange(mask.shape[0]), torch.arange(mask.shape[1]), indexing="ij")
        middle = (SIDE - 1) / 2
        x, y = (float((weight * (at - middle)).sum() / weight.sum()) for at in (xs, ys))
        things[n].append(Thing(coloured(pixels[n][mask], cover[n][mask]), shape, (x, y), likeness))
    return [Seen(tuple(t), *rest) for t, rest in zip(things, out)]


def pixels_of(picture: Any) -> Tensor:
    """[SIDE, SIDE, 3] in 0 to 1."""
    if not isinstance(picture, Image.Image):
        raise GruppoError(f"this grader looks at pictures, but a path's output is a {type(picture).__name__}")
    if picture.size != (SIDE, SIDE):
        raise GruppoError(
            f"this grader looks at pictures of {SIDE} x {SIDE} pixels, this one has {picture.width} x {picture.height}"
        )
    return torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255)


@cache
def palette() -> tuple[Tensor, Tensor]:
    """The ground [3] and the palette [colours, 3] in 0 to 1."""
    return torch.tensor(GROUND) / 255, torch.tensor(list(COLOURS.values())) / 255


def patches(mask: Tensor) -> Tensor:
    """[N, H, W] bool -> connected patches (diagonals connect) as equal numbers above 0; 0 = not in the mask."""
    on = mask.float()
    label = on * torch.arange(1, mask[0].numel() + 1).reshape(mask.shape[1:])
    while True:
        grown = F.max_pool2d(label[:, None], 3, 1, 1)[:, 0] * on
        if torch.equal(grown, label):
            return label.long()
        label = grown


def coloured(pixels: Tensor, cover: Tensor) -> str | None:
    """The palette colour nearest to the mean of a thing's inner pixels [n, 3]."""
    inner = pixels[cover >= cover.median()]
    distance = (palette()[1] - inner.mean(0)).norm(dim=-1)
    return list(COLOURS)[int(distance.argmin())] if float(distance.min()) <= UNLIKE else None


def window(cover: Tensor, mask: Tensor) -> Tensor | None:
    """What a thing covers of the WINDOW x WINDOW pixels that begin one above and left of it; None = it is too large."""
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    top, left = int(rows[0]), int(columns[0])
    if max(int(rows[-1]) - top, int(columns[-1]) - left) + 3 > WINDOW:
        return None
    own = cover * F.max_pool2d(mask.float()[None], 3, 1, 1)[0]  # with its soft edge
    return F.pad(own, (1, WINDOW, 1, WINDOW))[top : top + WINDOW, left : left + WINDOW]


@cache
def outlines() -> tuple[tuple[str, ...], Tensor]:
    """Ideal things of every shape, size and place between pixels, as `window` cuts them out: names and [outlines, WINDOW^2]."""
    names, made = [], []
    for shape in SHAPES:
        for step in range(2 * 6, 2 * 14 + 1):
            r = step / 4 * SCALE
            for dx in range(SCALE):
                for dy in range(SCALE):
                    picture = Image.new("L", (SIDE * SCALE, SIDE * SCALE), 0)
                    middle = SIDE * SCALE / 2
                    outline(ImageDraw.Draw(picture), shape, middle + dx, middle + dy, r, 255)
                    cover = torch.from_numpy(np.asarray(picture.reduce(SCALE), dtype=np.float32) / 255)
                    cut = window(cover, cover >= 0.5)
                    if cut is not None:
                        names.append(shape)
                        made.append(cut.flatten())
    return tuple(names), torch.stack(made)


def shaped(windows: Sequence[Tensor | None]) -> list[tuple[str | None, float]]:
    """The shape of each thing and its likeness: overlap over union with the best outline."""
    given = [w.flatten() for w in windows if w is not None]
    if not given:
        return [(None, 0.0) for _ in windows]
    names, ideal = outlines()
    have = torch.stack(given)
    differ = torch.cdist(have, ideal, p=1.0)
    both = have.sum(1, keepdim=True) + ideal.sum(1)
    likeness, at = ((both - differ) / (both + differ)).max(1)  # sum of minima over sum of maxima
    found = iter([(names[i] if v >= ALIKE else None, v) for v, i in zip(likeness.tolist(), at.tolist())])
    return [(None, 0.0) if w is None else next(found) for w in windows]


def judge(seen: Seen, task: Task) -> dict[str, float]:
    """`correct` is 1 when everything is as asked; the parts are shares, and `plain` falls with the ground's unevenness."""
    want, n = task.extra, len(seen.things)

    def share(holds: Callable[[Thing], bool]) -> float:
        return sum(map(holds, seen.things)) / n if n else 0.0

    parts = {
        "shape": share(lambda t: t.shape == want["shape"]),
        "colour": share(lambda t: t.colour == want["colour"]),
        "count": max(0.0, 1 - abs(n - want["count"]) / want["count"]),
        "position": share(lambda t: stands(t, want["position"])),
    }
    right = seen.plain and all(value == 1 for value in parts.values())
    return {"correct": float(right), **parts, "plain": max(0.0, 1 - seen.uneven / (2 * UNEVEN))}


def stands(thing: Thing, position: str) -> bool:
    """Whether the thing's centre lies in the asked half."""
    if position == ANYWHERE:
        return True
    axis, side = POSITIONS[position]
    return thing.centre[axis] * side > 0


@dataclass(frozen=True)
class Verifier:
    """`correct` (0 or 1) and its parts `shape`, `colour`, `count`, `position` and `plain` (0 to 1) of each path's picture."""

    def __call__(self, groups: list[Group]) -> list[dict[str, Any]]:
        seen = iter(look([p.output for g in groups for p in g.paths]))
        out = []
        for g in groups:
            found = [judge(next(seen), g.task) for _ in g.paths]
            out.append({name: [f[name] for f in found] for name in SIGNALS})
        return out


SIGNALS = ("correct", "shape", "colour", "count", "position", "plain")


# -- the world


@dataclass(frozen=True)
class Training:
    """How the base model learns to paint: the flow-matching loss on drawn pictures, and a moving average of the weights."""

    steps: int
    batch: int = 16
    learning_rate: float = 2e-3
    warmup: int = 100
    average: float = 0.995  # of the weights that are kept
    untold: float = 0.1  # pictures without their prompt, so that guidance has something to guide away from


@dataclass(frozen=True)
class PictureWorld(Problems):
    """What `World` is for text: a seeded generator of tasks, their verifier, and a base model that paints."""

    name: str
    sentence: str
    problem: Callable[[Random], Task]
    key: Callable[[Task], str]  # equal for prompts that ask for the same; decides train or held-out
    draw: Callable[[Task, Random], Image.Image]  # a picture that is right
    shown: Callable[[Task, Random], Task]  # what is drawn under a caption that the base model learns from
    verify: tuple[Grader, ...]
    weights: Mapping[str, float]
    base: Path
    config: GlyphConfig
    course: Training
    defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    metrics: tuple[Callable[[list[Group]], dict[str, float]], ...] = ()
    recipe: str = "mix-grpo"  # what trains it when none is named

    def equipped(self, policy: Any) -> Any:
        """The policy as it is: a painter has no tools."""
        return policy

    def graders(self) -> list[Grader]:
        """The graders of this world."""
        return list(self.verify)

    def build(self, folder: Path | str, seed: int = 0, log: Callable[[str], None] = print, *, steps: int | None = None) -> None:
        """Train the base model from nothing and save it, in half precision. One thread and one seed give the same bytes."""
        painter = GlyphPainter.fresh(self.config, seed)
        total = self.course.steps if steps is None else min(steps, self.course.steps)
        self.teach(painter, total, seed, log)
        painter.save(folder, torch.float16)

    def teach(self, painter: GlyphPainter, steps: int, seed: int, log: Callable[[str], None] = print) -> None:
        """Minimise |v - (noise - picture)|^2 over noise levels; the weights become their moving average."""
        from gruppo.sft import warm_cosine

        own, model = self.course, painter.model
        g = torch.Generator().manual_seed(seed)
        rate = warm_cosine(own.learning_rate, steps, warmup=min(own.warmup, steps // 2), final=0.02)
        weights = list(model.parameters())
        kept = [w.detach().clone() for w in weights]
        optimizer = torch.optim.AdamW(weights, lr=own.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
        model.train()
        for step in range(1, steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
            pictures, prompts = self._lessons(seed, step)
            x0 = 2 * torch.stack([pixels_of(p) for p in pictures]).permute(0, 3, 1, 2) - 1
            words = torch.stack(painter.encode(prompts))
            words = words * (torch.rand(len(words), 1, generator=g) >= own.untold)
            u = torch.rand(len(x0), generator=g)
            sigma = self.config.shift * u / (1 + (self.config.shift - 1) * u)
            noise = torch.randn(x0.shape, generator=g)
            at = sigma[:, None, None, None]
            loss = (model((1 - at) * x0 + at * noise, sigma, words) - (noise - x0)).square().mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            for mean, weight in zip(kept, weights):
                mean.lerp_(weight.detach(), 1 - min(own.average, step / (step + 10)))
            if step % 50 == 0 or step == steps:
                log(f"{self.name} step {step}/{steps} loss {loss.item():.4f}")
        for mean, weight in zip(kept, weights):
            weight.data.copy_(mean)
        model.eval()

    def _lessons(self, seed: int, step: int) -> tuple[list[Image.Image], list[str]]:
        random = Random(f"{self.name} base {seed} {step}")
        tasks = [self._draw(random, held_out=False) for _ in range(self.course.batch)]
        return [self.draw(self.shown(task, random), random) for task in tasks], [task.prompt for task in tasks]


GLYPHS = PictureWorld(
    name="glyphs",
    sentence="pictures of 1 to 3 coloured shapes; the base model learned from captions that are often wrong",
    problem=problem,
    key=key,
    draw=draw,
    shown=mistold,
    verify=(Verifier(),),
    # Where no picture of a prompt is right the parts still tell better from worse; without `plain` the ground drifts until
    # nothing is right any more, and then nothing says why.
    weights={"correct": 1.0, "shape": 0.3, "colour": 0.1, "count": 0.2, "position": 0.1, "plain": 2.0},
    base=Path(__file__).parent / "glyphs_base",
    config=GlyphConfig(words=WORDS),
    course=Training(steps=4000),
    defaults={
        "policy": {"denoising_steps": 8},
        "fit": {
            "steps": 70,
            "prompts_per_step": 6,
            "paths_per_prompt": 16,
            "learning_rate": 1e-3,
            "warmup_steps": 5,
            "decay_to": 0.1,
        },
        "eval": {"tasks": 40, "samples": 4, "greedy": False},
        # Noise of the last step would stay on the picture, where the verifier sees it; the first half of the steps decides.
        "recipe_args": {"beta": 0.0, "last": False, "share": 0.5, "clip": 1e-3, "updates": 1},
    },
)
