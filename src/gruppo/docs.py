"""A page per recipe, written from the recipe itself: nothing on it is typed twice, so nothing on it can be out of date.

python -m gruppo.docs           writes docs/recipes/<nickname>.md and .svg, and the tables in docs/recipes/README.md and README.md
"""

from __future__ import annotations

import inspect
import json
import pathlib
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass, replace
from typing import Any

import torch

from gruppo.policies.flow import Course
from gruppo.policies.kernels import FlowSDE
from gruppo.recipe import Column, Recipe, Signal, describe
from gruppo.recipes import RECIPES, Entry, find, recipe
from gruppo.recipes.golden import CURVES
from gruppo.types import Batch, Path, Steps

ROOT = pathlib.Path(__file__).parents[2]  # of a checkout; an installed package has neither tests nor docs beside it
TESTS, PAGES = ROOT / "tests" / "recipes", ROOT / "docs" / "recipes"

STATISTICS = {
    "loss": "the objective as it is minimised. About 0 before the first update of a rollout, because advantages cancel; its "
    "level says nothing about learning",
    "ratio": "mean of the new over the old probability. 1 before the first update; far from 1 means stale data or a mismatch",
    "clip_low": "share of the steps held by the lower bound: the loss no longer pushes them down (bounded weight: raised)",
    "clip_high": "share of the steps held by the upper bound: the loss no longer pushes them up (bounded weight: cut)",
    "entropy": "mean entropy of the next-step distribution, in nats. A fall towards 0 means that sampling no longer explores",
    "kl": "mean divergence from the reference per step, in nats, as the loss adds it",
    "weight": "mean of the bounded importance weight that multiplies each step's gradient",
    "square": "mean squared distance, in nats, of the log-probabilities from those of the policy that sampled",
    "sampler_weight": "mean importance weight between sampler and trainer. 1 where they are one program",
    "grad_norm": "norm of the gradient before it is clipped",
}
SECTIONS = ("Hyper-parameters", "Cost", "Not for")


# ---- what a recipe says about itself


def docstring(entry: Entry) -> str:
    """The docstring of the file in which the recipe is written."""
    module = inspect.getmodule(inspect.unwrap(entry.factory))
    return inspect.cleandoc(module.__doc__ or "") if module is not None else ""


def section(entry: Entry, name: str) -> str:
    """The docstring's paragraph that opens with `name:`, without that word; empty where there is none."""
    for paragraph in docstring(entry).split("\n\n"):
        if paragraph.startswith(f"{name}:"):
            text = " ".join(paragraph.removeprefix(f"{name}:").split())
            return text[:1].upper() + text[1:]
    return ""


def formulas(entry: Entry) -> str:
    """The docstring without its named paragraphs: claim, formulas, deviations."""
    kept = [p for p in docstring(entry).split("\n\n") if not p.startswith(tuple(f"{s}:" for s in SECTIONS))]
    return "\n\n".join(kept)


def changes(ours: Any, theirs: Any, at: str = "") -> Iterator[tuple[str, str, str]]:
    """(place, theirs, ours) for every part in which two pieces differ, as deep as they are of one type."""
    if ours == theirs:
        return
    if is_dataclass(ours) and type(ours) is type(theirs):
        for f in fields(ours):
            place = f"{at}.{f.name}" if at else f.name
            yield from changes(getattr(ours, f.name), getattr(theirs, f.name), place)
        return
    yield at, short(theirs), short(ours)


def short(piece: Any) -> str:
    """`describe` without the numbers that stand at their default."""
    if is_dataclass(piece) and not isinstance(piece, type):
        told = [f for f in fields(piece) if f.repr and (f.default is MISSING or getattr(piece, f.name) != f.default)]
        return f"{type(piece).__name__}({', '.join(f'{f.name}={short(getattr(piece, f.name))}' for f in told)})"
    if isinstance(piece, tuple):
        return ", ".join(short(p) for p in piece) or "nothing"
    return "nothing" if piece is None else describe(piece)


def needs(made: Recipe) -> list[str]:
    """What must be there before step 0, in words."""
    word = {Signal: "signal", Column: "column"}
    found = [f"the {word[type(n)]} `{n.name}`" + (f": {n.why}" if n.why else "") for n in made.needs]
    return found + (["a reference policy"] if made.reference is not None else [])


def statistics(made: Recipe, family: str = "text") -> list[str]:
    """The names that the recipe's loss gives to its statistics, from one call on one path of one step."""
    one, yes = torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)
    path = Path(torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long), one[0], yes[0])
    now = Steps(logp=one, entropy=one)
    if family == "image":
        course = Course.of("", torch.tensor([0.5, 0.25], dtype=torch.float64), FlowSDE())
        path = replace(path, prompt=course, steps=torch.zeros(2, 2), mean=torch.zeros(1, 2))
        now = Steps(logp=one, mean=torch.zeros(1, 1, 2), std=torch.ones(1, 1, 1))
    batch = Batch(
        paths=[path],
        logp_old=one,
        logp_sampler=one,
        advantage=one,
        mask=yes,
        weight=one + 1,
        unit=torch.zeros(1, 1, dtype=torch.long),
        group=torch.zeros(1, dtype=torch.long),
        off_policy=torch.zeros(1, dtype=torch.bool),
    )
    _, found = made.loss(batch, now, replace(now))
    return ["loss", *found, "grad_norm"]


def worked(entry: Entry) -> list[str]:
    """The worked numbers: names of the tests in the file that imports this recipe's module, as sentences."""
    module = inspect.getmodule(inspect.unwrap(entry.factory))
    name = module.__name__ if module is not None else ""
    for file in sorted(TESTS.glob("test_*.py")):
        text = file.read_text()
        if f"from {name} import" in text and file.stem != "test_table" and file.stem.removeprefix("test_") in home(entry):
            return [f"`tests/recipes/{file.name}`", *re.findall(r"^def test_(\w+)", text, re.M)]
    return []


def home(entry: Entry) -> set[str]:
    """Names that the recipe's test file may have: its module's, or its base's where two recipes share one."""
    module = inspect.getmodule(inspect.unwrap(entry.factory))
    names = {entry.nickname, *([entry.base] if entry.base else []), module.__name__.split(".")[-1] if module else ""}
    return {n.replace("-", "_") for n in names}


def curve(entry: Entry) -> dict[str, Any] | None:
    """The recorded run, where this is a checkout that has one."""
    file = CURVES / f"{entry.nickname}.json"
    return json.loads(file.read_text()) if file.exists() else None


# ---- the page


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A markdown table; `|` inside a cell is escaped."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines)


def code(text: str) -> str:
    return f"`{text}`"


def page(name: str) -> str:
    """The recipe's page, in markdown."""
    entry = find(name)
    made = recipe(entry.arxiv)
    parts = [
        f"# {entry.nickname}\n\n{entry.sentence}",
        f"[{entry.title}](https://arxiv.org/abs/{entry.id}) (arXiv {entry.id}). Ask for it as `{entry.arxiv}`"
        + "".join(f" or `{n}`" for n in (entry.nickname, *entry.aliases))
        + f": `gruppo train --recipe {entry.nickname}`.",
    ]
    if entry.base is not None:
        rows = [tuple(code(c) for c in row) for row in changes(made, recipe(entry.base))]
        link = f"[{entry.base}]({entry.base}.md)"
        parts.append(
            f"## What it changes\n\nEvery field in which it differs from {link}, both at their defaults.\n\n"
            + table(("field", entry.base, entry.nickname), rows)
        )
    parts.append("## Formulas and deviations\n\n" + formulas(entry))
    numbers = [(code(k), code(describe(v))) for k, v in entry.numbers.items()]
    parts.append("## Hyper-parameters\n\n" + table(("number", "default"), numbers) + "\n\n" + section(entry, "Hyper-parameters"))
    if needs(made):
        parts.append("## Needs\n\nThe run stops before step 0 when one of these is missing.\n\n" + bullets(needs(made)))
    if entry.laws:
        parts.append("## Laws it opts out of\n\n" + bullets([f"`{law}`: {why}" for law, why in entry.laws.items()]))
    told = [(code(s), STATISTICS.get(s, "")) for s in statistics(made, entry.family)]
    parts.append(
        "## Logged statistics\n\nMeans over the trained steps, with the weights of the loss.\n\n"
        + table(("name", "meaning"), told)
    )
    if tests := worked(entry):
        named = [t.replace("_", " ") for t in tests[1:]]
        parts.append(f"## Worked numbers\n\nBy hand, against the recipe's own pieces, in {tests[0]}:\n\n" + bullets(named))
    if (run := curve(entry)) is not None:
        parts.append("## Recorded run\n\n" + recorded(entry, run))
    for head, name in (("Cost", "Cost"), ("When not to use it", "Not for")):
        if text := section(entry, name):
            parts.append(f"## {head}\n\n{text}")
    return "\n\n".join(p.strip() for p in parts) + "\n"


def bullets(items: list[str]) -> str:
    return "\n".join(f"* {item}" for item in items)


def recorded(entry: Entry, run: dict[str, Any]) -> str:
    """The golden run in words, a figure and six of its steps."""
    steps = run["steps"]
    shown = [0, 3, 7, 11, 15, len(steps) - 1]
    known = ("correct", "reward", "length", "loss", "ratio", "clip_low", "clip_high", "entropy", "kl", "grad_norm")
    keys = [k for k in known if k in steps[0] and (not k.startswith("clip") or any(row[k] for row in steps))]
    rows = [(str(i + 1), *(f"{steps[i][k]:.3f}" for k in keys)) for i in shown]
    numbers = ", ".join(f"{k} {v}" for k, v in run["numbers"].items())
    task = "gruppo.recipes.golden_flow" if entry.family == "image" else "gruppo.recipes.golden"
    return (
        f"{len(steps)} steps on the synthetic task of `{task}` ({numbers}; {run['prompts']} prompts per step, "
        f"plain gradient descent at {run['rate']}), share of right answers. A toy that guards the numbers, not a "
        f"benchmark: curves of two recipes must not be compared. `gruppo record {entry.nickname}` repeats it.\n\n"
        f"![share of right answers]({entry.nickname}.svg)\n\n" + table(("step", *keys), rows)
    )


def figure(name: str) -> str:
    """The recorded share of right answers as a small SVG; empty where nothing was recorded."""
    entry = find(name)
    run = curve(entry)
    if run is None:
        return ""
    values = [row["correct"] for row in run["steps"]]
    width, height, left, low = 420, 150, 34, 22
    x = [left + (width - left - 8) * i / (len(values) - 1) for i in range(len(values))]
    y = [8 + (height - low - 8) * (1 - v) for v in values]
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y))
    grid = ""
    for v in (0.0, 0.5, 1.0):
        at = 8 + (height - low - 8) * (1 - v)
        grid += f'<line x1="{left}" x2="{width - 8}" y1="{at:.1f}" y2="{at:.1f}" stroke="#ccc" stroke-width="1"/>'
        grid += f'<text x="{left - 6}" y="{at + 4:.1f}" text-anchor="end">{v:g}</text>'
    for i in (0, 9, len(values) - 1):
        grid += f'<text x="{x[i]:.1f}" y="{height - 5}" text-anchor="middle">{i + 1}</text>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="11" fill="#555"><title>{entry.nickname}: share of right answers by step</title>'
        f'<rect width="{width}" height="{height}" fill="#fff"/>{grid}'
        f'<polyline points="{points}" fill="none" stroke="#2a6fb0" stroke-width="2"/></svg>\n'
    )


def index() -> str:
    """The table of all recipes."""
    rows = [
        (
            f"[{e.nickname}]({e.nickname}.md)",
            code(e.arxiv),
            e.family,
            ", ".join(n.name for n in recipe(e.arxiv).needs),
            e.sentence,
        )
        for e in RECIPES.values()
    ]
    return "# Recipes\n\n" + table(("recipe", "id", "family", "needs", "what it does"), rows) + "\n"


def pages() -> dict[str, str]:
    """Every file of docs/recipes by name."""
    found = {"README.md": index()}
    for e in RECIPES.values():
        found[f"{e.nickname}.md"] = page(e.arxiv)
        if drawn := figure(e.arxiv):
            found[f"{e.nickname}.svg"] = drawn
    return found


def readme(text: str) -> str:
    """The README with the table of methods that the code has today."""
    head, begin, rest = text.partition("<!-- methods:begin -->\n")
    _, end, tail = rest.partition("<!-- methods:end -->")
    rows = []
    for e in RECIPES.values():
        own, golden = "yes" if worked(e) else "no", "yes" if curve(e) else "no"
        laws = "all" if not e.laws else "all but " + ", ".join(e.laws)
        rows.append((f"[{e.nickname}](docs/recipes/{e.nickname}.md)", f"`{e.arxiv}`", e.title, own, laws, golden))
    columns = ("recipe", "id", "paper", "worked numbers", "laws", "recorded curve")
    return head + begin + table(columns, rows) + "\n" + end + tail


if __name__ == "__main__":
    front = PAGES.parent.parent / "README.md"
    front.write_text(readme(front.read_text()))
    PAGES.mkdir(parents=True, exist_ok=True)
    for file, text in pages().items():
        (PAGES / file).write_text(text)
        print(PAGES / file)
