"""One HTML file that tells a run: curves, held-out problems before and after, and the groups it learned from.

The page holds its data as JSON and asks the network for nothing. What does not fit is left out by count, never in silence.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import platform
import re
import statistics
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml
from PIL import Image

from gruppo.runs.show import Reading, difference, duration, headline, interval, label, readings, shown
from gruppo.types import GruppoError

TEMPLATE = Path(__file__).with_name("report.html.j2")
STEPS, GROUPS, PATHS, TOKENS = 12, 8, 32, 1500  # at most: steps, groups of a step, paths of a group, tokens of a path
GROUP_BYTES, PAIR_BYTES = 2_000_000, 600_000
POINTS = 1500  # of a curve
THUMB = 128  # pixels of a picture's longer side


# --- curves -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Series:
    """A column of numbers against the step; `band` names the column that is drawn around it."""

    key: str
    name: str = ""
    band: str = ""


@dataclass(frozen=True)
class Chart:
    """What is drawn together, and the sentence that says what it means. `form` is share, number, or count."""

    title: str
    sentence: str
    series: tuple[Series, ...]
    form: str = "number"
    noisy: bool = True  # a moving mean is drawn over it


PARTS: dict[str, tuple[Chart, ...]] = {
    "Did it learn?": (
        Chart(
            "Reward",
            "Mean reward of the sampled paths; the band is one standard deviation between the paths of a group.",
            (Series("reward", band="reward_std"),),
        ),
    ),
    "What the paths look like": (
        Chart(
            "Length",
            "Mean tokens of a path: of all paths, of the correct ones and of the wrong ones.",
            (Series("length", "all"), Series("length_correct", "correct"), Series("length_wrong", "wrong")),
            "count",
        ),
        Chart(
            "Truncated", "Share of paths that were cut by the length limit before they ended.", (Series("truncated"),), "share"
        ),
        Chart(
            "Abstained",
            "Paths of the step that a grader could not grade. They train nothing and never count as 0.",
            (Series("abstained"),),
            "count",
        ),
    ),
    "Is the update healthy?": (
        Chart(
            "Live groups",
            "Live: share of groups with a non-zero advantage, the only ones that teach. "
            "Same reward: share of groups whose paths all got the same reward.",
            (Series("live", "live"), Series("zero_variance", "same reward")),
            "share",
        ),
        Chart(
            "Entropy",
            "Mean uncertainty about the next step, in nats. It falls as the model commits; near 0 nothing new is tried.",
            (Series("entropy"),),
        ),
        Chart("KL", "How far the policy has moved from its reference, per step, in nats.", (Series("kl"),)),
        Chart(
            "Ratio",
            "Mean of new over old probability of the sampled steps. It is 1 before the first update on a batch.",
            (Series("ratio"),),
        ),
        Chart(
            "Clipped",
            "Share of steps whose ratio left the trusted range, below for bad paths (low) or above for good paths (high).",
            (Series("clip_low", "low"), Series("clip_high", "high")),
            "share",
        ),
        Chart("Gradient norm", "Length of the gradient before it is clipped; spikes precede collapses.", (Series("grad_norm"),)),
        Chart(
            "Sampler-trainer gap",
            "Largest difference between the log-probability at sampling and the trainer's own. It should be rounding noise; "
            "a large gap means that two programs disagree.",
            (Series("gap"),),
        ),
        Chart(
            "Loss",
            "Near 0 is normal: before any update the ratio is 1 and the advantages of a group cancel. Watch the reward instead.",
            (Series("loss"),),
        ),
    ),
    "Pace": (
        Chart("Learning rate", "Step size of the optimizer.", (Series("lr"),), noisy=False),
        Chart("Tokens per second", "Sampled tokens over the time of the whole step.", (Series("tokens_per_s"),), "count"),
        Chart("Seconds per step", "Wall-clock time of one step: sampling, grading and training.", (Series("seconds"),)),
        Chart("Tokens", "Tokens sampled in the step.", (Series("tokens"),), "count"),
        Chart("Pictures per second", "Painted pictures over the time of the whole step.", (Series("pictures_per_s"),)),
        Chart(
            "Pictures",
            "Paths that were compared, pictures that were decoded for a grader, and prompts that were encoded anew.",
            (Series("pictures", "compared"), Series("counts/decoded", "decoded"), Series("counts/encoded", "encoded")),
            "count",
        ),
        Chart(
            "Network calls",
            "What the step computed: calls to sample, calls with gradient, and the denoising steps that these trained "
            "(more than calls where paths share a latent).",
            (
                Series("counts/sampled", "to sample"),
                Series("counts/forwards", "with gradient"),
                Series("counts/trained", "steps trained"),
            ),
            "count",
        ),
        Chart(
            "Updates",
            "Optimizer steps taken on what one step sampled; 0 where nothing could be learned.",
            (Series("updates"),),
            "count",
        ),
    ),
}

WORDS = {
    "advantage": "How much better a path is than its siblings: blue tokens became likelier, orange ones less likely.",
    "group": "The paths that are sampled for one prompt and compared with one another.",
    "path": "One completion: the sequence of tokens that the model chose.",
    "signal": "What one grader measured on a path, before any weighting.",
    "reward": "The number that the recipe makes of the signals; only its differences within a group matter.",
    "live group": "A group with a non-zero advantage. Where all paths get the same reward there is nothing to compare.",
    "abstained": "The grader could not grade the path (it crashed, timed out or does not apply). The path is left out.",
    "truncated": "The path was stopped by the length limit.",
    "off-policy": "The path was sampled under another prompt than the one that it is trained under.",
    "fork": "The path shares its first tokens or denoising steps with another path of the group. A step that several paths share "
    "is coloured, and trained, in one of them; in a tree its advantage is that of everything below it.",
    "not trained": "Tokens that the model read but did not choose, or that another path trains; shown in grey.",
    "call": "The model asks a tool for something and stops; it reads the tool's answer, which trains nothing, and goes on.",
    "stratum": "The kind of path, such as its number of calls. A stratified advantage compares a path with its own kind first.",
    "greedy": "Taking the likeliest token every time, so the score has no sampling noise.",
    "held out": "Problems that training never sees.",
    "interval": "The range that holds the true score with 95 % confidence, as far as the number of problems allows.",
}

HELD_OUT = {
    "format": "Share of the completions of held-out problems that have the asked form.",
    "length": "Mean tokens of a completion of a held-out problem.",
    "reward": "Mean reward on held-out problems.",
    "truncated": "Share of the completions of held-out problems that the length limit cut.",
    "calls": "Mean number of tool calls in a conversation about a held-out problem.",
    "tool_errors": "Mean number of calls in a conversation that were answered with an error, time-outs included.",
    "tool_timeouts": "Mean number of calls in a conversation that were given up because the tool took too long.",
}

ACCURACY = re.compile(r"^(greedy|mean|sampled|correct|accuracy|majority)$|^(pass|maj|majority|mean)@\d+$")


# --- reading ------------------------------------------------------------------------------------------------------------


def lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file, one per step; a step that was run again after a crash counts once, as it was last."""
    if not file.exists():
        return []
    found: dict[int, dict[str, Any]] = {}
    rows = file.read_text(encoding="utf-8").splitlines()
    for n, row in enumerate(rows):
        if not row.strip():
            continue
        try:
            item = json.loads(row)
        except json.JSONDecodeError as error:
            if n == len(rows) - 1:  # the run was killed while it wrote
                break
            raise GruppoError(f"line {n + 1} of {file} is not JSON ({error.msg}); remove that line to read the rest") from None
        found[int(item["step"])] = item
    return [found[step] for step in sorted(found)]


def flat(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a record under names like `signals/correct`; None is NaN."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}/")
        elif value is None or isinstance(value, (int, float)):
            yield f"{prefix}{name}", math.nan if value is None else float(value)


def columns(records: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Records as columns of equal length, NaN where a record lacks the name."""
    names = list(dict.fromkeys(name for r in records for name in r))
    return {name: [r.get(name, math.nan) for r in records] for name in names}


def thinned(table: dict[str, list[float]], points: int) -> tuple[dict[str, list[float]], int]:
    """Columns of at most `points` rows, each the mean of k successive ones (of their numbers), and k."""
    n = len(next(iter(table.values()), []))
    k = max(1, math.ceil(n / points))
    if k == 1:
        return table, 1

    def mean(values: list[float]) -> float:
        heard = [v for v in values if math.isfinite(v)]
        return statistics.fmean(heard) if heard else math.nan

    return {name: [mean(column[i : i + k]) for i in range(0, n, k)] for name, column in table.items()}, k


def snapshots(folder: Path) -> dict[int, Path]:
    """Saved tables by step."""
    found = {}
    for file in sorted(folder.glob("step-*.parquet")):
        if match := re.fullmatch(r"step-(\d+)\.parquet", file.name):
            found[int(match[1])] = file
    return found


def spread_out(steps: Sequence[int], n: int) -> list[int]:
    """At most n of them: the first, the last, and evenly between."""
    if len(steps) <= n:
        return list(steps)
    return sorted({steps[round(i * (len(steps) - 1) / (n - 1))] for i in range(n)})


def groups_of(table: pa.Table, n: int | None = None) -> list[list[dict[str, Any]]]:
    """The rows of the first n groups, by group."""
    ids = list(dict.fromkeys(table["group"].to_pylist()))[:n]
    rows = table.filter(pc.field("group").isin(ids)).to_pylist()
    by_id: dict[int, list[dict[str, Any]]] = {i: [] for i in ids}
    for row in rows:
        by_id[row["group"]].append(row)
    return [sorted(by_id[i], key=lambda r: r.get("row") or 0) for i in ids]


# --- what goes into the page --------------------------------------------------------------------------------------------


def tidy(value: Any, digits: int = 6) -> Any:
    """JSON that a browser reads: no NaN or infinity (null instead), floats to a few significant digits."""
    if value is None or type(value) in (int, str, bool):
        return value
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): tidy(v, digits) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [tidy(v, digits) for v in value]
    return value


def embedded(value: Any) -> str:
    """JSON that may stand inside a script element: no text in it can close the element or open a comment."""
    text = json.dumps(tidy(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def parsed(text: Any) -> dict[str, Any]:
    """A JSON column as a dictionary."""
    value = json.loads(text) if isinstance(text, str) and text else text
    return dict(value) if isinstance(value, Mapping) else {}


COUNTS = ("calls", "tool_errors", "tool_timeouts")  # of a conversation: its head says them in words


def turns_of(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Who wrote which tokens of a conversation: `at` [start, end) per turn of the model and per answer of its tools.

    An answer that did not fit into the context was never read: it has its text instead. Nothing where units and messages
    do not tell the same story, as when a recipe cut the path into units of another kind.
    """
    unit, messages = list(row.get("unit") or ()), json.loads(row.get("messages") or "[]")
    spoken = [(role == "assistant", list(some)) for role, some in groupby(messages, key=lambda m: m["role"])]
    spans = [(own, len(list(some))) for own, some in groupby(u >= 0 for u in unit)]
    read, unread = spoken[: len(spans)], spoken[len(spans) :]
    last_was_read = not unread or (len(unread) == 1 and not unread[0][0])
    if len(unit) != len(row.get("token_text") or ()) or [o for o, _ in read] != [o for o, _ in spans] or not last_was_read:
        return []
    turns, start = [], 0
    for (own, some), (_, length) in zip(read, spans):
        end = start + length
        about = {"trained": sum(row["mask"][start:end]), "of": length} if own else answers(some)
        turns.append({"at": [start, end], **about})
        start = end
    return turns + [{"text": "\n".join(str(m["content"]) for m in some), **answers(some)} for _, some in unread]


def answers(messages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Which tools answered, and how many of them failed or ran out of time."""
    return {
        "tools": [m["name"] for m in messages],
        "late": sum(bool(m.get("late")) for m in messages),
        "failed": sum(bool(m.get("failed")) and not m.get("late") for m in messages),
    }


def counted(n: Any, what: str) -> str:
    """`1 call`, `2 calls`."""
    return f"{n:g} {what}{'' if n == 1 else 's'}"


def path_record(row: Mapping[str, Any]) -> dict[str, Any]:
    """One path as the page draws it: its text cut into tokens, and per token the advantage, the mask and the chance it had."""
    tokens = list(row.get("token_text") or [])
    mask = list(row.get("mask") or [])
    advantage = list(row.get("advantage") or [])
    logp = list(row.get("logp") or [])
    trained = [a for a, m in zip(advantage, mask) if m and a is not None and math.isfinite(a)]
    signals = {k: v for k, v in parsed(row.get("signals")).items() if k != "reward"}
    talked = list(json.loads(row.get("messages") or "[]"))
    out: dict[str, Any] = {
        "row": row.get("row"),
        "reward": row.get("reward"),
        "signals": {k: v for k, v in signals.items() if not (talked and k in COUNTS)},
        "advantage": statistics.fmean(trained) if trained else None,
        "tokens": len(tokens),
        "marks": [name for name, key in (("truncated", "truncated"), ("off-policy", "off_policy")) if row.get(key)],
    }
    if fork := row.get("fork"):
        parent, _, at = str(fork).partition(":")
        painted = row.get("images") is not None
        out["marks"].append(
            f"begins at the noise of path {parent}"
            if painted and at == "0"
            else f"shares path {parent} before {'step' if painted else 'token'} {at}"
            if at
            else f"fork {fork}"
        )
    if talked:
        found = answers([m for m in talked if m["role"] == "tool"])
        out["calls"] = len(found["tools"])
        out["marks"] += [counted(found[k], what) for k, what in (("failed", "failed call"), ("late", "time-out")) if found[k]]
    if row.get("stratum") is not None:
        out["stratum"] = row["stratum"]
    if row.get("images") is not None:
        return {**out, **picture_record(row), "text": str(row.get("output") or "")}
    if not tokens:
        return {**out, "text": str(row.get("output") or "")}
    keep = list(range(len(tokens)))
    if len(tokens) > TOKENS:
        head = TOKENS * 2 // 3
        keep = [*range(head), *range(len(tokens) - (TOKENS - head), len(tokens))]
        out |= {"gap_after": head, "left_out": len(tokens) - TOKENS}
    text = [tokens[i] for i in keep]
    out["text"] = "".join(text)
    if any(len(t) != 1 for t in text):
        out["lengths"] = [len(t) for t in text]
    values = [round(advantage[i], 3) if i < len(advantage) and math.isfinite(advantage[i] or 0.0) else 0.0 for i in keep]
    used = [i < len(mask) and bool(mask[i]) for i in keep]
    alike = {v for v, u in zip(values, used) if u}
    out["step_advantage"] = values if len(alike) > 1 else next(iter(alike), 0.0)
    if not all(used):
        out["untrained"] = runs_of([not u for u in used])
    if turns := turns_of(row):
        for turn in turns:
            if "at" in turn:
                turn["at"] = [bisect_left(keep, i) for i in turn["at"]]
        out["turns"] = turns
    if len(logp) == len(tokens):
        out["chance"] = [round(100 * math.exp(min(logp[i], 0.0))) if math.isfinite(logp[i] or 0.0) else None for i in keep]
    return out


def picture_record(row: Mapping[str, Any]) -> dict[str, Any]:
    """What was painted, and of every denoising step: sigma before and after, the noise drawn, the advantage (None: untrained)."""
    sigmas, noise = list(row["sigmas"]), list(row["deviations"])
    taught = [a if m else None for a, m in zip(row["advantage"], row["mask"])]
    return {
        "images": [f"data:image/png;base64,{base64.b64encode(shrunk(image)).decode()}" for image in row["images"]],
        "denoising": [[*pair, s, a] for pair, s, a in zip(pairwise(sigmas), noise, taught)],
    }


def shrunk(image: bytes) -> bytes:
    """The picture as PNG with at most THUMB pixels a side: a page holds hundreds of them."""
    found = Image.open(io.BytesIO(image))
    if max(found.size) <= THUMB:
        return image
    found.thumbnail((THUMB, THUMB))
    buffer = io.BytesIO()
    found.save(buffer, "PNG")
    return buffer.getvalue()


def runs_of(flags: Sequence[bool]) -> list[list[int]]:
    """[start, end) of every run of True."""
    edges = [i for i, (a, b) in enumerate(pairwise([False, *flags, False])) if a != b]
    return [[a, b] for a, b in zip(edges[::2], edges[1::2])]


def group_record(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One group: what was asked, and its paths."""
    first, paths = rows[0], [path_record(r) for r in rows]
    return {
        "group": first["group"],
        "prompt": first.get("prompt") or "",
        "answer": first.get("answer"),
        "task": parsed(first.get("task")),
        "paths": paths[:PATHS],
        "paths_left_out": max(0, len(rows) - PATHS),
        **strata(rows, paths),
    }


def strata(rows: Sequence[Mapping[str, Any]], paths: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the kinds of paths earned: the recipe's strata, else the numbers of tool calls where there were tools."""
    by = "stratum" if any("stratum" in p for p in paths) else "calls"
    kinds: dict[str, list[int]] = {}
    for i, p in enumerate(paths):
        if "stratum" in p or "calls" in p:
            kinds.setdefault(str(p.get(by, "none")), []).append(i)
    names = sorted(kinds, key=int) if all(k.isdigit() for k in kinds) else list(kinds)

    def mean(values: Iterable[float | None]) -> float | None:
        heard = [v for v in values if v is not None and math.isfinite(v)]
        return statistics.fmean(heard) if heard else None

    found = [
        [name, len(at), mean(reward_of(rows[i]) for i in at), mean(paths[i]["advantage"] for i in at)]
        for name, at in ((name, kinds[name]) for name in names)
    ]
    return {"by": by, "kinds": found} if found else {}


def browsable(folder: Path) -> dict[str, Any]:
    """Groups of some steps, as many as the page may hold: the first of every step, then the second, and so on."""
    saved = snapshots(folder / "groups")
    chosen = spread_out(sorted(saved), STEPS)
    tables = {step: pq.read_table(saved[step]) for step in chosen}
    found = {step: groups_of(table, GROUPS) for step, table in tables.items()}
    kept: dict[int, list[dict[str, Any]]] = {step: [] for step in chosen}
    room = GROUP_BYTES
    for rank in range(GROUPS):
        for step in chosen:
            if rank >= len(found[step]):
                continue
            record = group_record(found[step][rank])
            size = len(embedded(record).encode())
            if size <= room:
                room -= size
                kept[step].append(record)
    return {
        "steps": [
            {
                "step": step,
                "groups": kept[step],
                "groups_left_out": len(set(tables[step]["group"].to_pylist())) - len(kept[step]),
            }
            for step in chosen
            if kept[step]
        ],
        "steps_left_out": len(saved) - sum(bool(kept[step]) for step in chosen),
    }


def grade_of(row: Mapping[str, Any]) -> tuple[float, bool]:
    """Correctness where it was measured (and True), else the reward as one number."""
    signals = parsed(row.get("signals"))
    if isinstance(signals.get("correct"), (int, float)):
        return float(signals["correct"]), True
    if "correct" in signals:
        return math.nan, True
    return reward_of(row), False


def reward_of(row: Mapping[str, Any]) -> float:
    """The reward as one number, the sum of its columns; NaN where there is none."""
    reward = row.get("reward")
    if isinstance(reward, (list, tuple)):
        reward = math.fsum(r for r in reward if r is not None)
    return math.nan if reward is None else float(reward)


def kind_of(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """How one held-out problem changed."""
    (b, graded), (a, _) = grade_of(before), grade_of(after)
    if math.isnan(b) or math.isnan(a):
        return "not graded"
    if not graded:
        return "reward rose" if a > b else "reward fell" if a < b else "reward unchanged"
    return {
        (False, True): "became right",
        (True, False): "became wrong",
        (False, False): "stayed wrong",
        (True, True): "stayed right",
    }[b > 0.5, a > 0.5]


KINDS = (
    "became right",
    "became wrong",
    "stayed wrong",
    "stayed right",
    "reward rose",
    "reward fell",
    "reward unchanged",
    "not graded",
)


@dataclass(frozen=True)
class Tried:
    """One held-out problem at one evaluation: the path to show (the greedy one where there is one) and the sampled ones."""

    shown: dict[str, Any]
    samples: list[dict[str, Any]]


def tried(table: pa.Table) -> dict[tuple[int, str], Tried]:
    """The problems of an evaluation by position and prompt. Greedy paths stand after the samples, in the same order."""
    groups = groups_of(table)
    half = len(groups) // 2
    prompts = [g[0].get("prompt") or "" for g in groups]
    if len(groups) % 2 == 0 and half and prompts[:half] == prompts[half:] and all(len(g) == 1 for g in groups[half:]):
        pairs = [Tried(greedy[0], sampled) for sampled, greedy in zip(groups[:half], groups[half:])]
    else:
        pairs = [Tried(g[0], g if len(g) > 1 else []) for g in groups]
    return {(n, prompt): one for n, (prompt, one) in enumerate(zip(prompts, pairs))}


def side_by_side(folder: Path, each: int = 8) -> dict[str, Any]:
    """The same held-out problems before and after, counted by how they changed, with some of every kind to read."""
    saved = snapshots(folder / "evals")
    if len(saved) < 2:
        return {"steps": [], "pairs": [], "counts": {}}
    steps = [min(saved), max(saved)]
    light = ("group", "row", "prompt", "signals", "reward")
    tables = [pq.read_table(saved[s]) for s in steps]
    before, after = (tried(t.select([n for n in light if n in t.column_names])) for t in tables)
    by_kind: dict[str, list[tuple[int, str]]] = {kind: [] for kind in KINDS}
    for key in (k for k in before if k in after):
        by_kind[kind_of(before[key].shown, after[key].shown)].append(key)
    picked = [(kind, key) for kind, keys in by_kind.items() for key in keys[:each]]

    def whole(side: dict[tuple[int, str], Tried], table: pa.Table) -> dict[tuple[int, str], dict[str, Any]]:
        at = {side[key].shown["group"]: key for _, key in picked}
        rows = table.filter(pc.field("group").isin(list(at)))
        return {at[g[0]["group"]]: gallery(g) for g in groups_of(rows)}

    first, last = whole(before, tables[0]), whole(after, tables[1])
    pairs, room = [], PAIR_BYTES
    for kind, key in picked:
        b, a = before[key].samples, after[key].samples
        record = {
            "kind": kind,
            "prompt": key[1],
            "answer": first[key].get("answer"),
            "task": parsed(first[key].get("task")),
            "before": shown_record(first[key]),
            "after": shown_record(last[key]),
            "right": [[sum(grade_of(r)[0] > 0.5 for r in s), len(s)] for s in (b, a)] if b and a and grade_of(b[0])[1] else None,
        }
        size = len(embedded(record).encode())
        if size <= room:
            room -= size
            pairs.append(record)
    return {"steps": steps, "pairs": pairs, "counts": {kind: len(keys) for kind, keys in by_kind.items() if keys}}


def shown_record(row: Mapping[str, Any]) -> dict[str, Any]:
    """A path of a held-out problem; pictures carry their verdicts."""
    out = path_record(row)
    if "verdicts" not in row:
        return out
    out |= {"right": [g > 0.5 if graded and not math.isnan(g) else None for g, graded in row["verdicts"]], "denoising": []}
    return {**out, "reward": None, "signals": {}}  # of one path only, where many are shown


def gallery(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The path to show; of a painted problem, with the pictures of all its paths, each marked right or wrong."""
    first = rows[0]
    if first.get("images") is None:
        return first
    some = [(r, image) for r in rows for image in r["images"]]
    return {**first, "images": [i for _, i in some], "verdicts": [grade_of(r) for r, _ in some]}


def by_part(first: Mapping[str, Any], last: Mapping[str, Any]) -> dict[str, Any]:
    """One score by part of the held-out problems (a difficulty, a source), before and after, ready to print."""
    rows, best = [], ""
    for part, scores in (last.get("by") or {}).items():
        after, before = readings(scores), readings((first.get("by") or {}).get(part, {}))
        best = best or next((n for n in headline(after) if ACCURACY.match(n)), "")
        if best in after:
            a, b = after[best], before.get(best)
            n = scores[best].get("n") if isinstance(scores[best], Mapping) else None
            rows.append(
                {
                    "part": part.replace("=", " "),
                    "problems": "-" if n is None else n,
                    "before": shown(best, b.value) if b else "-",
                    "after": shown(best, a.value),
                    "interval": interval(best, a),
                    "difference": difference(best, b.value, a.value) if b else "-",
                }
            )
    return {"score": label(best), "rows": rows}


def charts(metrics: Mapping[str, list[float]], evals: Mapping[str, list[float]]) -> list[dict[str, Any]]:
    """Every chart that has a number to show; statistics that no chart names get one of their own."""

    def there(key: str) -> bool:
        return any(math.isfinite(v) for v in metrics.get(key, ()))

    claimed = {"step", "time"}
    out: list[dict[str, Any]] = []
    for part, known in PARTS.items():
        if part == "Did it learn?":
            out += held_out_charts(part, evals)
        for chart in known:
            claimed |= {name for s in chart.series for name in (s.key, s.band)}
            series = [asdict(s) | {"from": "metrics"} for s in chart.series if there(s.key)]
            if series:
                out.append({**asdict(chart), "part": part, "series": series})
        if part == "Did it learn?":
            for key in (k for k in metrics if k.startswith("signals/") and there(k)):
                name = key.removeprefix("signals/")
                band = f"signals_std/{name}"
                sentence = f"Mean of the signal {name} over the sampled paths, before weighting" + (
                    "; the band is one standard deviation between the paths of a group." if there(band) else "."
                )
                one = {"key": key, "name": "", "band": band if there(band) else "", "from": "metrics"}
                out.append(
                    {
                        "part": part,
                        "title": f"Signal: {name}",
                        "sentence": sentence,
                        "form": "number",
                        "noisy": True,
                        "series": [one],
                    }
                )
    for key in metrics:
        if key not in claimed and not key.startswith(("signals/", "signals_std/")) and there(key):
            sentence = "A statistic that this recipe or run adds, as recorded."
            one = {"key": key, "name": "", "band": "", "from": "metrics"}
            out.append({"part": "More", "title": key, "sentence": sentence, "form": "number", "noisy": True, "series": [one]})
    return out


def held_out_charts(part: str, evals: Mapping[str, list[float]]) -> list[dict[str, Any]]:
    """Accuracies of the held-out problems in one chart, every other score in its own."""
    names = [n for n in evals if n != "step" and ":" not in n and "/" not in n and any(map(math.isfinite, evals[n]))]
    accuracy = [n for n in headline(names) if ACCURACY.match(n)]
    out = []
    if accuracy:
        sentence = "Share of problems solved that training never sees, with the interval where it was measured."
        series = [{"key": n, "name": label(n), "band": "", "from": "evals"} for n in accuracy]
        out.append({"part": part, "title": "Held-out problems", "sentence": sentence, "form": "share", "series": series})
    for n in names:
        if not ACCURACY.match(n) and not n.startswith("greedy_") and any(evals[n]):
            form = "share" if "%" in shown(n, 0.5) else "number"
            one = {"key": n, "name": "", "band": "", "from": "evals"}
            sentence = HELD_OUT.get(n, f"The score {n} of the held-out problems, as recorded.")
            out.append({"part": part, "title": f"Held out: {label(n)}", "sentence": sentence, "form": form, "series": [one]})
    return out


def ends(column: Iterable[float]) -> tuple[float, float] | None:
    """The mean of a curve's beginning and of its end: up to ten steps each, at most a fifth of it."""
    heard = [v for v in column if math.isfinite(v)]
    if not heard:
        return None
    n = max(1, min(10, len(heard) // 5))
    return statistics.fmean(heard[:n]), statistics.fmean(heard[-n:])


def summary(
    metrics: Mapping[str, list[float]], scores: Sequence[dict[str, Reading]], steps: Sequence[int], counts: Mapping[str, int]
) -> list[str]:
    """What happened, in sentences."""
    told = []
    if scores:
        before, after = scores[0], scores[-1]
        best = next((n for n in headline(after) if ACCURACY.match(n)), None)
        if best and len(scores) > 1 and best in before:
            b, a = before[best], after[best]
            told.append(
                f"On held-out problems {label(best)} went from {shown(best, b.value)} (step {steps[0]}) "
                f"to {shown(best, a.value)} (step {steps[-1]}), {difference(best, b.value, a.value)}."
            )
        elif best:
            told.append(f"On held-out problems {label(best)} is {shown(best, after[best].value)} at step {steps[-1]}.")
    if counts:
        total = sum(counts.values())
        told.append(f"Of the {total} held-out problems: " + ", ".join(f"{n} {kind}" for kind, n in counts.items()) + ".")
    reward = ends(metrics.get("reward", ()))
    if reward:
        told.append(f"The mean reward of sampled paths went from {reward[0]:.3g} to {reward[1]:.3g} (first and last steps).")
    length = ends(metrics.get("length", ()))
    if length and length[0] > 0:
        more = length[1] / length[0]
        how = (
            "about as long as before"
            if 0.9 < more < 1.1
            else f"{more:.1f} times as long"
            if more >= 1
            else f"{1 / more:.1f} times shorter"
        )
        told.append(f"Paths went from {length[0]:.0f} to {length[1]:.0f} tokens, {how}.")
    live = ends(metrics.get("live", ()))
    if live:
        told.append(
            f"{100 * live[0]:.0f} % of the groups taught something at the start and {100 * live[1]:.0f} % at the end; "
            "the rest had nothing to compare."
        )
    return told


def worth_a_look(metrics: Mapping[str, list[float]], scores: Sequence[dict[str, Reading]]) -> list[str]:
    """Rules of thumb that point at a curve; none of them is a verdict."""

    def at(name: str) -> tuple[float, float] | None:
        return ends(metrics.get(name, ()))

    told = []
    abstained = sum(v for v in metrics.get("abstained", ()) if math.isfinite(v))
    if abstained:
        told.append(f"{abstained:.0f} paths could not be graded and were left out; look at what the graders said.")
    if (x := at("truncated")) and x[1] > 0.2:
        told.append(f"{100 * x[1]:.0f} % of the last paths were cut by the length limit; a longer limit may change the result.")
    if (x := at("live")) and x[1] < 0.1:
        told.append(
            f"Only {100 * x[1]:.0f} % of the last groups were live: the problems are nearly all solved, or nearly all unsolved."
        )
    if (x := at("entropy")) and x[0] > 0 and x[1] < 0.1 * x[0]:
        told.append(f"Entropy fell from {x[0]:.2g} to {x[1]:.2g}: the policy hardly tries anything new.")
    gap = max((v for v in metrics.get("gap", ()) if math.isfinite(v)), default=0.0)
    if gap > 0.1:
        told.append(f"Sampler and trainer once disagreed by {gap:.2g} nats about a token; run `gruppo doctor` on this model.")
    for name in ("clip_low", "clip_high"):
        if (x := at(name)) and x[1] > 0.2:
            told.append(
                f"{100 * x[1]:.0f} % of the last steps were clipped ({name}); a lower learning rate or fewer updates would help."
            )
    updates = metrics.get("updates", ())
    idle = sum(v == 0 for v in updates)
    if idle:
        told.append(f"{idle} of {len(updates)} steps made no update, because no group was live.")
    reward = at("reward")
    if len(scores) > 1 and reward and reward[1] > reward[0]:
        name = next((n for n in scores[-1] if ACCURACY.match(n) and n in scores[0]), None)
        if name and scores[-1][name].value < scores[0][name].value:
            told.append(
                f"The reward rose but {label(name)} on held-out problems fell: the model may satisfy the grader without solving."
            )
    return told


def versions(settings: Mapping[str, Any]) -> dict[str, str]:
    """The versions that the run recorded, else those installed where the report is written."""
    if isinstance(settings.get("versions"), Mapping):
        return {str(k): str(v) for k, v in settings["versions"].items()}
    found = {"python": platform.python_version()}
    for package in ("gruppo", "torch", "transformers", "peft"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def number_table(metrics: Mapping[str, list[float]], rows: int = 25) -> tuple[list[str], list[list[str]]]:
    """The curves as a table, evenly thinned."""
    names = [n for n in metrics if n != "time"]
    n = len(metrics.get("step", ()))
    at = spread_out(range(n), rows)
    return names, [[f"{metrics[c][i]:.4g}" if math.isfinite(metrics[c][i]) else "-" for c in names] for i in at]


def write_report(folder: Path) -> Path:
    """Writes `report.html` into a run folder and returns its path."""
    folder = Path(folder)
    records = lines(folder / "metrics.jsonl")
    rated = lines(folder / "evals.jsonl")
    if not records and not rated:
        raise GruppoError(f"{folder} has no finished step to report: metrics.jsonl and evals.jsonl are missing or empty")
    config = folder / "run.yaml"
    settings_text = config.read_text(encoding="utf-8") if config.exists() else ""
    settings = yaml.safe_load(settings_text) or {}
    metrics = columns([dict(flat(r)) for r in records])
    scores = [readings(r.get("scores", {})) for r in rated]
    evals = columns(
        [
            {"step": float(r["step"])}
            | {n: s.value for n, s in score.items()}
            | {f"{n}:{end}": v for n, s in score.items() for end, v in (("low", s.low), ("high", s.high)) if v is not None}
            for r, score in zip(rated, scores)
        ]
    )
    evaluated = [int(r["step"]) for r in rated]
    pairs = side_by_side(folder)
    thin, mean_of = thinned({name: column for name, column in metrics.items() if name != "time"}, POINTS)
    data = {
        "metrics": thin,
        "mean_of": mean_of,
        "evals": evals,
        "charts": charts(metrics, evals),
        "groups": browsable(folder),
        "pairs": pairs,
    }
    tiles = []
    if scores:
        for name in (n for n in headline(scores[-1]) if n != "truncated" or scores[-1][n].value > 0):
            after, before = scores[-1][name], scores[0].get(name) if len(scores) > 1 else None
            tiles.append(
                {
                    "label": label(name),
                    "before": shown(name, before.value) if before else None,
                    "before_interval": interval(name, before) if before else "",
                    "after": shown(name, after.value),
                    "after_interval": interval(name, after),
                    "difference": difference(name, before.value, after.value) if before else None,
                }
            )
    times = [t for t in metrics.get("time", ()) if math.isfinite(t)]
    spent = math.fsum(s for s in metrics.get("seconds", ()) if math.isfinite(s))
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    names, rows = number_table(metrics)
    text = page.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        name=folder.resolve().name,
        facts={
            "recipe": settings.get("recipe"),
            "world" if settings.get("world") else "model": settings.get("world") or settings.get("model"),
            "steps": len(records),
            "ended": datetime.fromtimestamp(times[-1], UTC).strftime("%Y-%m-%d %H:%M UTC") if times else None,
            "training time": duration(spent) if spent else None,
        },
        versions=versions(settings),
        settings_text=settings_text,
        tiles=tiles,
        summary=summary(metrics, scores, evaluated, pairs["counts"]),
        warnings=worth_a_look(metrics, scores),
        parts=by_part(rated[0], rated[-1]) if rated else {"score": "", "rows": []},
        words=WORDS,
        mean_of=mean_of,
        table_names=names,
        table_rows=rows,
        data=embedded(data),
    )
    out = folder / "report.html"
    fresh = folder / "report.html.part"
    fresh.write_text(text, encoding="utf-8", errors="replace")
    os.replace(fresh, out)
    return out
