"""Graders that read text: exact answers, choices, numbers, tags, patterns, lengths. No answer in a completion is wrong: 0."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from gruppo.graders.grade import Abstained, text_of
from gruppo.types import Group, GruppoError, Path

SPACES = "\u00a0\u2009\u202f"  # no-break, thin and narrow no-break space, all in use between thousands
NUMBER = re.compile(  # a sign after a digit, a word or a bracket is a minus between two numbers
    rf"(?:(?<![\w)\]])[-+])?\$?(?:\d[\d,_{SPACES}]*(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?(?:\s*/\s*[-+]?\d+)?(?:\s*\\?%)?"
)
GROUPED = re.compile(rf"\d{{1,3}}(?:([ ,_{SPACES}])\d{{3}})(?:\1\d{{3}})*|\d+")
FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
SAID = re.compile(r"(?i:\b(?:answer|choice|option)\b)(?:\s+is|\s*:)*[\s:*]*")


def inside(text: str, tag: str | None) -> str | None:
    """The part that is graded: after the last `</think>`, within the last `<tag>...</tag>`; None when the tag is not there."""
    text = text.rpartition("</think>")[2]
    if tag is None:
        return text
    before, close, _ = text.rpartition(f"</{tag}>")
    _, opened, content = before.rpartition(f"<{tag}>")
    return content if close and opened else None


def boxed(text: str) -> str | None:
    """What the last `\\boxed{...}` holds, braces matched; None without a complete one."""
    at = text.rfind("\\boxed{")
    if at < 0:
        return None
    start, depth = at + len("\\boxed{"), 1
    for i in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[start:i]
    return None


def plain(text: str) -> str:
    """Numbers in one spelling: fractions with a slash, one minus sign, LaTeX's thin spaces and protected commas undone."""
    text = FRACTION.sub(r"\1/\2", text.replace("\u2212", "-"))
    return text.replace("{,}", ",").replace("\\,", ",").replace("\\!", "").replace("\\$", "$")


def number(text: str) -> Fraction | None:
    """The exact value of one number: 1,234.5  -3/4  \\frac{3}{4}  12%  1e-3  $5. None where the text is not one number."""
    text = plain(text).strip().strip("$").removesuffix(".").strip()
    text = "-" + text[2:] if text.startswith("-$") else text
    percent = text.endswith("%")
    text = text.removesuffix("%").removesuffix("\\").strip() if percent else text
    top, slash, bottom = text.partition("/")
    value, below = decimal(top.strip()), decimal(bottom.strip()) if slash else Fraction(1)
    if value is None or not below:
        return None
    return value / below / (100 if percent else 1)


def decimal(text: str) -> Fraction | None:
    """The exact value of a decimal with optional thousands separators and exponent; None where it is not one."""
    match = re.fullmatch(rf"([-+]?)([ \d,_{SPACES}]*)(\.\d*)?(?:[eE]([-+]?\d{{1,3}}))?", text)
    if match is None or len(text) > 1000:  # a model can write 1e999999999, which would take all memory
        return None
    sign, whole, part, exponent = match.groups()
    if (whole and not GROUPED.fullmatch(whole)) or not (whole or (part or ".") != "."):
        return None
    whole = re.sub(r"\D", "", whole) or "0"
    return Fraction(f"{sign}{whole}{'' if part in (None, '.') else part}e{exponent or 0}")


def said_number(text: str) -> str:
    """The number a completion ends on: its last `\\boxed{}`, what follows `####`, the whole text, or the last number written."""
    box = boxed(text)
    part = text.rpartition("####")[2] if box is None else box
    if number(part) is not None:
        return part.strip()
    found = [m.group().strip() for m in NUMBER.finditer(plain(part[-4000:]))]
    if box is not None:  # "5 apples" is 5; "2 and 3" is not one number
        return found[0] if len(found) == 1 else box
    return found[-1] if found else ""


def said_choice(text: str, letters: str) -> str:
    """The choice a completion names: boxed, the whole text, or after its last "answer"; "" rather than a guess."""
    one = rf"[\s*_(\[]*(?:\\text\{{)?[(]?([{re.escape(letters)}])\b(?![\w'])"
    if (box := boxed(text)) is not None:
        match = re.fullmatch(one + r"[\s).\]}*_]*", box)
        return match.group(1) if match else ""
    if match := re.fullmatch(one + r"[\s).:\]*_]*", text):
        return match.group(1)
    for said in reversed(list(SAID.finditer(text))):
        if match := re.match(one, text[said.end() :]):
            return match.group(1)
    return ""


@dataclass(frozen=True)
class Exact:
    """1 where the completion's answer is the column's text, letter for letter between white space, else 0."""

    column: str = "answer"
    tag: str | None = None
    signal: str = "correct"

    @property
    def signals(self) -> tuple[str, ...]:
        return (self.signal,)

    def __call__(self, groups: list[Group]) -> list[dict[str, Any]]:
        out = []
        for group in groups:
            said = [(inside(text_of(p.output), self.tag) or "").strip() for p in group.paths]
            right = str(group.task.column(self.column)).strip()
            out.append({self.signal: [float(bool(s) and s == right) for s in said], "answers": said})
        return out


@dataclass(frozen=True)
class Choice:
    """1 where the completion names the column's choice, else 0. The column holds a letter, or the choice's place from 0."""

    column: str = "answer"
    letters: str = "ABCD"
    tag: str | None = None
    signal: str = "correct"

    @property
    def signals(self) -> tuple[str, ...]:
        return (self.signal,)

    def __call__(self, groups: list[Group]) -> list[dict[str, Any]]:
        out = []
        for group in groups:
            said = [said_choice(inside(text_of(p.output), self.tag) or "", self.letters) for p in group.paths]
            right = self.right(group.task.column(self.column))
            grades = [right if isinstance(right, Abstained) else float(s == right) for s in said]
            out.append({self.signal: grades, "answers": said})
        return out

    def right(self, gold: Any) -> str | Abstained:
        """The gold letter; a fault of the data where the column names no choice."""
        if isinstance(gold, int) and 0 <= gold < len(self.letters):
            return self.letters[gold]
        letter = str(gold).strip().strip("()")
        if len(letter) == 1 and letter in self.letters:
            return letter
        reason = f"the {self.column} column is {gold!r}, which is none of the choices {self.letters}"
        return Abstained(reason, ValueError(reason))


@dataclass(frozen=True)
class Number:
    """1 where the completion's number is the column's within a tolerance, else 0; values are compared as exact fractions.

    Close means |said - gold| <= max(absolute, relative * |gold|). 12% is 0.12. A comma groups thousands and is never a
    decimal point, so 1,23 is no number. Read is the last `\\boxed{}`, what follows `####`, or the last number written.
    """

    column: str = "answer"
    relative: float = 1e-6
    absolute: float = 0.0
    tag: str | None = None
    signal: str = "correct"

    @property
    def signals(self) -> tuple[str, ...]:
        return (self.signal,)

    def __call__(self, groups: list[Group]) -> list[dict[str, Any]]:
        out = []
        for group in groups:
            right = self.right(group.task.column(self.column))
            said = [said_number(inside(text_of(p.output), self.tag) or "") for p in group.paths]
            out.append({self.signal: [self.grade(number(s), right) for s in said], "answers": said})
        return out

    def right(self, gold: Any) -> Fraction | Abstained:
        """The gold value; a fault of the data where the column holds no number."""
        value = number(said_number(str(gold))) if isinstance(gold, str) else number(repr(gold))
        if value is not None:
            return value
        reason = f"the {self.column} column is {gold!r}, which is no number"
        return Abstained(reason, ValueError(reason))

    def grade(self, said: Fraction | None, gold: Fraction | Abstained) -> float | Abstained:
        """Close or not; the gold's fault passes through."""
        if isinstance(gold, Abstained):
            return gold
        allowed = max(Fraction(self.absolute), Fraction(self.relative) * abs(gold))
        return float(said is not None and abs(said - gold) <= allowed)


@dataclass(frozen=True)
class Tags:
    """1 where every tag opens and closes exactly once, in the order named, none inside another; else 0.

    `opened`: the prompt already ends in the first opening tag. `only`: nothing but white space stands outside the tags.
    """

    names: tuple[str, ...] = ("think", "answer")
    opened: bool = False
    only: bool = False
    signal: str = "format"

    def __post_init__(self) -> None:
        if not self.names or len(set(self.names)) < len(self.names):
            raise GruppoError(f"a format needs at least one tag, each named once; got {self.names}")

    @property
    def signals(self) -> tuple[str, ...]:
        return (self.signal,)

    def __call__(self, groups: list[Group]) -> list[dict[str, Any]]:
        return [{self.signal: [float(self.holds(text_of(p.output))) for p in g.paths]} for g in groups]

    def holds(self, text: str) -> bool:
        """Is this one text in the form?"""
        text = f"<{self.names[0]}>" + text if self.opened else text
        found = re.findall("|".join(rf"</?{re.escape(n)}>" for n in self.names), text)
        if found != [t for n in self.names for t in (f"<{n}>", f"</{n}>")]:
            return False
        outside = re.split("|".join(rf"<{re.escape(n)}>.*?</{re.escape(n)}>" for n in self.names), text, flags=re.DOTALL)
        return not self.only or not "".join(outside).strip()


@dataclass(frozen=True)
class Matches:
    """1 where the pattern is found in the completion (`whole`: is the completion), else 0; too slow a search abstains.

    Some patterns take exponential time on some texts, and Python's own `re` cannot be interrupted; `regex` can.
    """

    pattern: str
    whole: bool = False
    timeout: float = 1.0
    signal: str = "matches"

    def __post_init__(self) -> None:
        import regex

        try:
            regex.compile(self.pattern)
        except regex.error as error:
            raise GruppoError(f"the pattern {self.pattern!r} is no regular expression: {error}") from None

    @property
    def signals(self) -> tuple[str, ...]:
        return (self.signal,)

    def __call__(self, groups: list[Group]) -> list[dict[str, Any]]:
        return [{self.signal: [self.grade(text_of(p.output)) for p in g.paths]} for g in groups]

    def grade(self, text: str) -> float | Abstained:
        """One text."""
        import regex

        compiled = regex.compile(self.pattern)
        try:
            found = (compiled.fullmatch if self.whole else compiled.search)(text, timeout=self.timeout)
        except TimeoutError:
            return Abstained(f"time-out after {self.timeout:g} s")
        return float(found is not None)


def tokens(path: Path) -> int:
    """|y|: every step of the completion, its end token included."""
    return len(path)


def characters(path: Path) -> int:
    """The length of the completion's text."""
    return len(text_of(path.output))


@dataclass(frozen=True)
class Budget:
    """1 for a completion of at most `limit` tokens, then falling in a straight line to 0 at `limit + slack` and beyond."""

    limit: int
    slack: int = 0
    of: Callable[[Path], int] = tokens
    signal: str = "brief"

    def __post_init__(self) -> None:
        if self.limit < 0 or self.slack < 0:
            raise GruppoError(f"a length budget needs a limit and a slack of at least 0, not {self.limit} and {self.slack}")

    @property
    def signals(self) -> tuple[str, ...]:
        return (self.signal,)

    def __call__(self, groups: list[Group]) -> list[dict[str, Any]]:
        return [{self.signal: [self.grade(self.of(p)) for p in g.paths]} for g in groups]

    def grade(self, length: int) -> float:
        """One length."""
        over = max(0, length - self.limit)
        return 1.0 if over == 0 else max(0.0, 1.0 - over / self.slack) if self.slack else 0.0


def soft_overlong(length: int, limit: int, cache: int) -> float:
    """0 up to limit - cache, then down in a straight line to -1 at limit, -1 beyond (DAPO, 2503.14476, Eq. 13)."""
    if length <= limit - cache:
        return 0.0
    return ((limit - cache) - length) / cache if length <= limit else -1.0


@dataclass(frozen=True)
class SoftOverlong:
    """DAPO's length penalty as a signal in [-1, 0] that any recipe's reward may weigh."""

    limit: int = 20480
    cache: int = 4096
    of: Callable[[Path], int] = tokens
    signal: str = "overlong"

    def __post_init__(self) -> None:
        if not 0 <= self.cache <= self.limit:
            raise GruppoError(
                f"the soft part of the length limit is {self.cache} tokens, but must lie between 0 and {self.limit}"
            )

    @property
    def signals(self) -> tuple[str, ...]:
        return (self.signal,)

    def __call__(self, groups: list[Group]) -> list[dict[str, Any]]:
        return [{self.signal: [soft_overlong(self.of(p), self.limit, self.cache) for p in g.paths]} for g in groups]
