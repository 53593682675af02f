"""What a person sees while a run goes: settings, one live line, sampled completions, before and after.

On a terminal the line is redrawn in place; into a file or a CI log it becomes plain lines without control characters.
"""

from __future__ import annotations

import atexit
import math
import re
import statistics
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.console import Group as Stack
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from gruppo.rollouts.conversation import Transcript
from gruppo.types import Group

TURNS = 12  # of a conversation, at most, in a line of the terminal
LOSS_ZERO = (
    "loss 0 is normal here: before any update the ratio is 1, so the advantages of a group cancel; "
    "watch the reward and the share of live groups"
)

# Bidirectional overrides and terminal escapes in a completion must not be able to repaint the screen.
_VISIBLE = {
    **{c: 0x2400 + c for c in range(32)},
    0x0A: "↵",
    0x09: "→",
    0x7F: 0x2421,
    **dict.fromkeys((*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)), 0xFFFD),
}


@dataclass(frozen=True)
class Reading:
    """One score with the interval it was measured to, where there is one."""

    value: float
    low: float | None = None
    high: float | None = None


def readings(scores: Mapping[str, Any], prefix: str = "") -> dict[str, Reading]:
    """Scores by name; an interval is `[value, low, high]`, `{value, low, high}` or the keys `name_low` and `name_high`."""
    found: dict[str, Reading] = {}
    for name, value in scores.items():
        base, _, end = str(name).rpartition("_")
        if end in ("low", "high") and base in scores:
            continue
        label = f"{prefix}{name}"
        if isinstance(value, Mapping):
            if "value" in value:
                found[label] = Reading(_number(value["value"]), _limit(value.get("low")), _limit(value.get("high")))
            else:
                found |= readings(value, f"{label}/")
        elif isinstance(value, (list, tuple)):
            if len(value) == 3:
                found[label] = Reading(_number(value[0]), _limit(value[1]), _limit(value[2]))
        elif value is None or isinstance(value, (int, float)):
            found[label] = Reading(_number(value), _limit(scores.get(f"{name}_low")), _limit(scores.get(f"{name}_high")))
    return found


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _limit(value: Any) -> float | None:
    return None if value is None or not math.isfinite(float(value)) else float(value)


SHARES = {"greedy", "mean", "sampled", "format", "correct", "accuracy", "truncated", "majority", "maj", "pass"}
SHARES |= {"recall", "catalog_share"}


def is_share(name: str) -> bool:
    """Whether a score of this name is a share, which people read in percent."""
    return re.sub(r"^greedy_|@\d+$", "", name.rsplit("/", 1)[-1]) in SHARES


def headline(names: Iterable[str]) -> list[str]:
    """The scores that a person reads first, in that order; pass@1 is the sampled mean and is not said twice."""
    order = (
        r"greedy|accuracy|correct",
        r"mean(@\d+)?|sampled",
        r"maj(ority)?(@\d+)?",
        r"pass@\d+",
        r"recall@\d+",
        r"ndcg@\d+",
        r"catalog_share",
        r"format",
        r"length",
        r"truncated",
    )
    names = [n for n in names if n != "pass@1"]
    most = max((int(n.split("@")[1]) for n in names if n.startswith("pass@")), default=0)
    found = [n for want in order for n in names if re.fullmatch(want, n) and (not n.startswith("pass@") or n == f"pass@{most}")]
    judged = [n for n in found if n not in ("length", "truncated")]
    return (
        found if judged else [*(n for n in ("reward", "greedy_reward") if n in names), *found]
    )  # nothing is right or wrong here


def shown(name: str, value: float | None) -> str:
    """A score as a person reads it: shares in percent, lengths with one decimal."""
    if value is None or not math.isfinite(value):
        return "-"
    if is_share(name):
        return f"{100 * value:.1f} %"
    return f"{value:.1f}" if "length" in name or abs(value) >= 100 else f"{value:.3g}"


def difference(name: str, before: float, after: float) -> str:
    """After minus before; in percentage points for shares."""
    d = after - before
    if not math.isfinite(d):
        return "-"
    if is_share(name):
        return f"{100 * d:+.1f} points"
    return f"{d:+.1f}" if "length" in name or abs(d) >= 100 else f"{d:+.3g}"


def interval(name: str, r: Reading) -> str:
    """`low to high`, or nothing where no interval was measured."""
    if r.low is None or r.high is None:
        return ""
    low, high = shown(name, r.low), shown(name, r.high)
    return f"{low.removesuffix(' %')} to {high}" if is_share(name) else f"{low} to {high}"


LABELS = {
    "greedy": "greedy accuracy",
    "mean": "sampled accuracy",
    "pass": "solved in {} tries",
    "majority": "majority of {} samples",
    "recall": "recall in the first {}",
    "ndcg": "NDCG of the first {}",
    "catalog_share": "titles in the catalogue",
    "length": "completion length, tokens",
    "format": "answers in the asked form",
    "truncated": "cut by the length limit",
}


def label(name: str) -> str:
    """What to call a score in a table."""
    base, _, k = name.partition("@")
    if base.startswith("greedy_"):
        return f"{label(base.removeprefix('greedy_'))} (greedy)"
    return LABELS.get(base, name).format(k)


def visible(text: str) -> str:
    """One line of text in which every control character can be seen and none can act."""
    return text.translate(_VISIBLE)


def fold(text: str, width: int) -> str:
    """The beginning and the end of a long text, with what was left out in between counted."""
    text = visible(text)
    if len(text) <= width:
        return text
    head, tail = width * 2 // 3, width // 3
    return f"{text[:head]} [... {len(text) - head - tail} more characters ...] {text[-tail:]}"


def prompt_text(prompt: Any) -> str:
    """The last thing that was asked, as text; pictures by name only."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and prompt and isinstance(prompt[-1], dict):
        content = prompt[-1].get("content", "")
        if isinstance(content, list):
            return " ".join(str(p.get("text", f"[{p.get('type', '?')}]")) if isinstance(p, dict) else str(p) for p in content)
        return str(content)
    return f"[{type(prompt).__name__}]"


def output_text(output: Any) -> str:
    """A completion as text, whichever form it has."""
    if isinstance(output, str):
        return output
    return prompt_text(output) if isinstance(output, list) else f"[{type(output).__name__}]"


def spoken(output: Any, width: int) -> Text:
    """A completion in one line; what tools answered stands in brackets and dim, each turn cut so that all of them fit."""
    if not isinstance(output, Transcript) or not output.replies:
        return Text(fold(output_text(output), width))
    turns = list(output.messages)
    if len(turns) > TURNS:
        gap = {"role": "gap", "content": f"[... {len(turns) - TURNS} more turns ...]"}
        turns = [*turns[: TURNS // 2], gap, *turns[len(turns) - TURNS // 2 :]]
    # Answers are what is shortened first: what the model itself wrote is what is being looked at.
    own = sum(len(m["content"]) for m in turns if m["role"] == "assistant")
    answers = sum(m["role"] == "tool" for m in turns)
    room = max(32, (width - min(own, width // 2)) // max(answers, 1))
    line = Text()
    for m in turns:
        if m["role"] == "tool":
            how = " timed out" if m.get("late") else " failed" if m.get("failed") else ""
            heard = visible(m["content"])
            line.append(f" [{visible(m['name'])}{how}: {heard if len(heard) <= room else heard[:room] + ' ...'}] ", style="dim")
        else:
            line.append(fold(m["content"], max(width // 2, 40)) if m["role"] == "assistant" else m["content"])
    return line


def scalar_rewards(group: Group) -> list[float]:
    """One number per path: the reward, or the sum of its columns."""
    if group.reward is None:
        return [math.nan] * len(group)
    reward = group.reward if group.reward.dim() == 1 else group.reward.sum(1)
    return [float(r) for r in reward]


def path_advantage(group: Group, row: int) -> float:
    """The mean advantage over the trained steps of a path; NaN when it trains nothing."""
    mask = group.paths[row].mask
    if group.advantage is None or not bool(mask.any()):
        return math.nan
    return float(group.advantage[row, : len(mask)][mask].float().mean())


def extremes(groups: list[Group], n: int = 2) -> Iterator[tuple[Group, int, int]]:
    """The n groups whose rewards vary most, each with the row of its best and of its worst path."""

    def spread(group: Group) -> float:
        heard = [r for r in scalar_rewards(group) if math.isfinite(r)]
        return max(heard) - min(heard) if heard else -1.0

    for group in sorted(groups, key=spread, reverse=True)[:n]:
        rewards = scalar_rewards(group)
        heard = [row for row, r in enumerate(rewards) if math.isfinite(r)]
        if heard:
            yield group, max(heard, key=rewards.__getitem__), min(heard, key=rewards.__getitem__)


def _numeric_signals(group: Group, row: int) -> dict[str, float]:
    """The scalar signals of one path, without the reward itself and without errors of tools that did not occur."""
    found = {
        name: float(v[row])
        for name, v in group.signals.items()
        if name != "reward" and isinstance(v, torch.Tensor) and v.dim() == 1 and len(v) == len(group)
    }
    return {name: v for name, v in found.items() if v or name not in ("tool_errors", "tool_timeouts")}


def settings_rows(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as dotted names and values."""
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from settings_rows(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value)


def duration(seconds: float) -> str:
    """Seconds as `m:ss` or `h:mm:ss`."""
    s = round(max(seconds, 0))
    return f"{s // 3600}:{s // 60 % 60:02d}:{s % 60:02d}" if s >= 3600 else f"{s // 60}:{s % 60:02d}"


def quantity(value: Any, form: str) -> str:
    """A number of a record, or a dash when the step has none."""
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return "-"
    return format(value, form)


class Show:
    """Tells a run in the terminal. Use it as a context manager, or call `stop`, so that the cursor comes back."""

    def __init__(self, console: Console, total_steps: int, every: int = 10, plain: bool = False) -> None:
        self.console = console
        self.total = total_steps
        self.every = every  # 0 = no completions
        self.plain = plain or not console.is_terminal
        self.live: Live | None = None
        self.seconds: deque[float] = deque(maxlen=20)
        self.abstained = 0
        self.failed: Counter[str] = Counter()  # grades that could not be given, by reason
        self.last: dict[str, Any] = {}
        self.began = time.monotonic()
        self.explained = False
        self.printed = 0  # the last step that a plain line told of

    def __enter__(self) -> Show:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, settings: Mapping[str, Any], derived: Mapping[str, Any]) -> None:
        """The resolved settings, and what follows from them, before anything is sampled."""
        parts = {"settings": list(settings_rows(settings)), "what follows from them": list(settings_rows(derived))}
        width = max((len(k) for rows in parts.values() for k, _ in rows), default=0)
        for part, rows in parts.items():
            if rows:
                self._line(part, style=None if self.plain else "bold")
            for name, value in rows:
                self._line(f"  {name:<{width}}  {value}", style=None if self.plain else "dim")
        self.began = time.monotonic()
        if not self.plain:
            atexit.register(self.stop)  # a crash between two steps must not leave the cursor hidden
            self.live = Live(self, console=self.console, refresh_per_second=2, transient=False)
            self.live.start()

    def stop(self) -> None:
        """Ends the live line; what was printed stays."""
        if self.live is not None:
            live, self.live = self.live, None
            live.stop()
            atexit.unregister(self.stop)

    def say(self, sentence: str) -> None:
        """One sentence above the live line."""
        self._line(sentence)

    def step(self, record: Mapping[str, Any], groups: list[Group]) -> None:
        """One finished step: its numbers, and every few steps what was sampled."""
        self.last = dict(record)
        step = int(record["step"])
        self.abstained += int(record.get("abstained") or 0)
        for why, n in (record.get("failures") or {}).items():
            if why not in self.failed:
                self._line(f"step {step}: {n} {'grade' if n == 1 else 'grades'} could not be given: {visible(why)}")
            self.failed[why] += n
        if isinstance(record.get("seconds"), (int, float)):
            self.seconds.append(float(record["seconds"]))
        loss = record.get("loss")
        if not self.explained and isinstance(loss, (int, float)) and abs(loss) < 0.005:
            self.explained = True
            self._line(LOSS_ZERO, style=None if self.plain else "italic")
        if step % (self.every or 10) == 0 or step >= self.total or self.printed == 0:
            self.printed = step
            if self.plain:
                self._line(f"step {step}/{self.total}  {self._numbers()}  {self.time_left()} left")
            if self.every:
                self._completions(step, groups)

    def evaluation(self, step: int, scores: Mapping[str, Any]) -> None:
        """One line of held-out scores."""
        found = readings(scores)
        told = []
        for name in (
            n for n in headline(found) if re.fullmatch(r"greedy|mean(@\d+)?|recall@\d+|ndcg@\d+|format|length|reward", n)
        ):
            r = found[name]
            told.append(f"{label(name)} {shown(name, r.value)}" + (f" ({i})" if (i := interval(name, r)) else ""))
        self._line(f"held out, step {step}:  " + "  ".join(told), style=None if self.plain else "bold")

    def finish(self, before: Mapping[str, Any] | None, after: Mapping[str, Any] | None, report: Path | None) -> None:
        """Before -> after on held-out problems, and where the report is."""
        self.stop()
        if before is not None and after is not None:
            self._before_after(readings(before), readings(after))
        elif after is not None:
            self.evaluation(int(self.last.get("step", self.total)), after)
        if report is not None:
            self._line(f"report: {report}")

    def time_left(self) -> str:
        """From the median of the last steps, so that one slow evaluation does not frighten anybody."""
        if not self.seconds:
            return "?"
        return duration(statistics.median(self.seconds) * (self.total - int(self.last.get("step", 0))))

    def _numbers(self) -> str:
        r = self.last
        live, painted = r.get("live"), "pictures" in r
        pace = ("pictures_per_s", ",.1f", "pictures/s") if painted else ("tokens_per_s", ",.0f", "tokens/s")
        told = [
            f"reward {quantity(r.get('reward'), '.3f')}",
            f"live groups {quantity(None if live is None else 100 * live, '.0f')} %",
            *([f"KL {quantity(r['kl'], '.2g')}"] if "kl" in r else []),
            *([] if painted else [f"entropy {quantity(r.get('entropy'), '.2f')}", f"length {quantity(r.get('length'), '.1f')}"]),
            f"{quantity(r.get(pace[0]), pace[1])} {pace[2]}",
            f"abstained {self.abstained}",
            *([f"failed grades {self.failed.total()}"] if self.failed else []),
        ]
        return "  ".join(told)

    def __rich__(self) -> Stack:
        step = int(self.last.get("step", 0))
        bar = Table.grid(padding=(0, 1))
        clock = f"{duration(time.monotonic() - self.began)} so far, {self.time_left()} left"
        bar.add_row(
            Spinner("dots"), f"step {step}/{self.total}", ProgressBar(total=self.total, completed=step, width=30), Text(clock)
        )
        return Stack(bar, Text("  " + (self._numbers() if self.last else "sampling the first groups"), overflow="fold"))

    def _line(self, text: str, style: str | None = None) -> None:
        # Text, not markup: a sentence with [brackets] or :colons: is printed as it is. soft_wrap keeps a log line one line.
        code = self.console.encoding
        safe = text.encode(code, "backslashreplace").decode(code)  # a log in ASCII must not end a run
        self.console.print(Text(safe, style=style or ""), soft_wrap=self.plain, highlight=False)

    def _completions(self, step: int, groups: list[Group]) -> None:
        chosen = list(extremes(groups))
        if not chosen:
            return
        if self.plain:
            for group, *rows in chosen:
                asked = visible(prompt_text(group.task.prompt))[-100:]
                self._line(
                    f"    asked  {asked}" + (f"   (answer {visible(str(group.task.answer))})" if group.task.answer else "")
                )
                for what, row in zip(("best", "worst"), dict.fromkeys(rows)):
                    said = spoken(group.paths[row].output, 160).plain
                    self._line(f"    {what:<5}  {self._grades(group, row)}  {said}")
            return
        table = Table(title=f"sampled at step {step}", box=box.SIMPLE_HEAD, expand=True, title_justify="left", show_lines=False)
        for name, ratio in (("asked", 3), ("sampled", 6)):
            table.add_column(name, ratio=ratio, overflow="fold")
        table.add_column("signals", ratio=2, overflow="fold")
        table.add_column("reward", justify="right", no_wrap=True)
        table.add_column("advantage", justify="right", no_wrap=True)
        for group, *rows in chosen:
            asked = visible(prompt_text(group.task.prompt))[-160:]
            if group.task.answer is not None:
                asked += f"\nanswer {fold(str(group.task.answer), 60)}"
            for i, row in enumerate(dict.fromkeys(rows)):
                signals = "\n".join(f"{k} {v:.3g}" for k, v in _numeric_signals(group, row).items())
                advantage = path_advantage(group, row)
                table.add_row(
                    Text(asked if i == 0 else ""),
                    spoken(group.paths[row].output, 320),
                    Text(signals),
                    f"{scalar_rewards(group)[row]:.3g}",
                    Text(f"{advantage:+.2f}", style="blue" if advantage > 0 else "dark_orange" if advantage < 0 else "dim"),
                )
            table.add_section()
        self.console.print(table)

    def _grades(self, group: Group, row: int) -> str:
        signals = "  ".join(f"{k} {v:.3g}" for k, v in _numeric_signals(group, row).items())
        return f"reward {scalar_rewards(group)[row]:.3g}  advantage {path_advantage(group, row):+.2f}  {signals} |"

    def _before_after(self, before: dict[str, Reading], after: dict[str, Reading]) -> None:
        rows = []
        for name in (n for n in headline(after) if n in before):
            b, a = before[name], after[name]
            told = [f"{shown(name, r.value)}" + (f"  ({i})" if (i := interval(name, r)) else "") for r in (b, a)]
            rows.append((label(name), *told, difference(name, b.value, a.value)))
        head = ("on held-out problems", "before", "after", "difference")
        if self.plain:
            widths = [max(len(r[c]) for r in [head, *rows]) for c in range(4)]
            for r in [head, *rows]:
                self._line("  ".join([f"{r[0]:<{widths[0]}}", *(f"{r[c]:>{widths[c]}}" for c in (1, 2, 3))]).rstrip())
            return
        table = Table(box=box.SIMPLE_HEAD)
        for i, name in enumerate(head):
            table.add_column(name, justify="left" if i == 0 else "right", style="bold" if i == 3 else None)
        for r in rows:
            table.add_row(*(Text(cell) for cell in r))
        self.console.print(table)
