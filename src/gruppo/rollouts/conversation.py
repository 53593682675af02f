"""Conversations with tools: the model speaks, its calls are answered, it reads the answers and speaks again.

Tokens in, tokens out: the context of turn k + 1 is the tokens of turn k as they were sampled, followed by the tokens of the
tool's reply. Nothing that the model said is ever tokenised again. A path holds the whole conversation:

    steps   s0 s1 </search> <result> r0 r1 </result> a0 a1 <end>
    mask    1  1  1         0        0  0  0         1  1  1        a reply is context, never trained
    unit    0  0  0        -1       -1 -1 -1         1  1  1        the turn
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from gruppo.tools import Call, Reply, Tool, answer
from gruppo.types import Grade, Group, GruppoError, Path

Piece = tuple[str, bool]  # text, and whether it is markup: only markup may become special tokens


@runtime_checkable
class Style(Protocol):
    """How calls and replies are written. `announces`: the chat template is given the tools' schemas."""

    @property
    def announces(self) -> bool: ...
    def check(self, tools: Sequence[Tool]) -> None: ...
    def stops(self, tools: Sequence[Tool]) -> tuple[str, ...]: ...
    def calls(self, text: str, tools: Sequence[Tool]) -> list[Call]: ...
    def framed(self, replies: Sequence[Reply]) -> list[Piece]: ...


@dataclass(frozen=True)
class Tags:
    """`<name>argument</name>` at the end of a turn, answered by `<result>text</result>`; one argument, one call per turn."""

    before: str = "<result>"
    after: str = "</result>"
    announces: bool = False

    def check(self, tools: Sequence[Tool]) -> None:
        for tool in tools:
            if len(tool.parameters.get("required", [])) > 1 or not tool.parameters.get("properties"):
                raise GruppoError(
                    f"the tool {tool.name!r} has the parameters {list(tool.parameters.get('properties', {}))}, but a call in "
                    "tags carries exactly one argument; use ToolCalls() or give the others defaults"
                )

    def stops(self, tools: Sequence[Tool]) -> tuple[str, ...]:
        return tuple(f"</{t.name}>" for t in tools)

    def calls(self, text: str, tools: Sequence[Tool]) -> list[Call]:
        for tool in tools:
            opening, closing = f"<{tool.name}>", f"</{tool.name}>"
            if text.endswith(closing):
                _, found, inside = text.removesuffix(closing).rpartition(opening)
                if not found:
                    return [Call(tool.name, wrong=f"{closing} without {opening}")]
                return [argument_of(inside, tool)]
        return []

    def framed(self, replies: Sequence[Reply]) -> list[Piece]:
        return [piece for r in replies for piece in ((self.before, True), (r.text, False), (self.after, True))]


def argument_of(text: str, tool: Tool) -> Call:
    """A call whose one argument is this text, read as a number or as JSON where the parameter is not text."""
    known = tool.parameters["properties"]
    name = next(iter([*tool.parameters.get("required", []), *known]))
    kind = known[name].get("type", "string")
    if kind == "string":
        return Call(tool.name, {name: text.strip()})
    try:
        return Call(tool.name, {name: json.loads(text)})
    except ValueError:
        return Call(tool.name, wrong=f"the argument {name} of {tool.name} must be a JSON {kind}")


TOOL_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


@dataclass(frozen=True)
class ToolCalls:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, several per turn: Qwen's chat templates and their kin.

    A turn ends with the end-of-sequence token; the replies are a user turn of `<tool_response>` blocks, after which `after`
    opens the assistant's next turn. The texts are ChatML's and must be those of the model's own template.
    """

    before: str = "\n<|im_start|>user"
    after: str = "<|im_end|>\n<|im_start|>assistant\n"
    announces: bool = True

    def check(self, tools: Sequence[Tool]) -> None:
        pass

    def stops(self, tools: Sequence[Tool]) -> tuple[str, ...]:
        return ()

    def calls(self, text: str, tools: Sequence[Tool]) -> list[Call]:
        found = [self.one(body) for body in TOOL_CALL.findall(text)]
        if text.count("<tool_call>") > len(found):
            found.append(Call("tool_call", wrong="<tool_call> without </tool_call>"))
        return found

    @staticmethod
    def one(body: str) -> Call:
        try:
            said = json.loads(body)
        except ValueError as error:
            return Call("tool_call", wrong=f"a tool call must be JSON: {error}")
        if not isinstance(said, dict) or not isinstance(said.get("name"), str):
            return Call("tool_call", wrong='a tool call must be a JSON object {"name": ..., "arguments": {...}}')
        arguments = said.get("arguments") or {}
        if not isinstance(arguments, dict):
            return Call(said["name"], wrong='"arguments" must be a JSON object')
        return Call(said["name"], arguments)

    def framed(self, replies: Sequence[Reply]) -> list[Piece]:
        blocks: list[Piece] = [(self.before, True)]
        for r in replies:
            blocks += [("\n<tool_response>\n", True), (r.text, False), ("\n</tool_response>", True)]
        return [*blocks, (self.after, True)]


class Transcript(str):
    """The text of a whole conversation, and its turns: assistant and tool messages in order.

    A string, so that every grader of text reads it; `said` is the model's own part, for graders that must not be fooled by
    what a tool wrote.
    """

    messages: tuple[dict[str, Any], ...]

    def __new__(cls, text: str, messages: Sequence[dict[str, Any]] = ()) -> Transcript:
        made = super().__new__(cls, text)
        made.messages = tuple(messages)
        return made

    def __getnewargs__(self) -> tuple[Any, ...]:
        return str(self), self.messages

    @property
    def replies(self) -> list[dict[str, Any]]:
        return [m for m in self.messages if m["role"] == "tool"]

    @property
    def said(self) -> str:
        return "".join(m["content"] for m in self.messages if m["role"] == "assistant")


@dataclass
class _Live:
    """One conversation while it is held."""

    prompt: Tensor
    steps: list[Tensor] = field(default_factory=list)
    logp: list[Tensor] = field(default_factory=list)
    unit: list[Tensor] = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)
    turns: int = 0
    sampled: int = 0
    calls: int = 0
    open: bool = True
    truncated: bool = False

    @property
    def context(self) -> Tensor:
        return torch.cat([self.prompt, *self.steps])

    def __len__(self) -> int:
        return len(self.prompt) + sum(map(len, self.steps))

    def say(self, steps: Tensor, logp: Tensor, text: str) -> None:
        self.append(steps, logp, self.turns)
        self.messages.append({"role": "assistant", "content": text})
        self.turns, self.sampled = self.turns + 1, self.sampled + len(steps)

    def append(self, steps: Tensor, logp: Tensor, unit: int) -> None:
        self.steps.append(steps)
        self.logp.append(logp)
        self.unit.append(torch.full((len(steps),), unit))

    def close(self, *, truncated: bool) -> None:
        self.open, self.truncated = False, truncated


@dataclass(frozen=True)
class Talk:
    """A conversation's rules: the tools, how they are called, how often, and how much of a reply is read.

    `max_new` (the policy's, or the caller's) bounds the tokens that the model samples in the whole conversation; replies are
    not counted in it, but they do fill the context. A conversation ends with a turn without a call. It ends truncated when it
    asks for more than `max_calls` calls, uses up `max_new`, or fills the context.

    With `by_turn` every turn is a `unit` of its own, so that GSPO's ratio becomes one per turn; without, the sampled tokens
    of the path are one unit.
    """

    tools: tuple[Tool, ...]
    style: Style = field(default_factory=Tags)
    max_calls: int = 4
    max_result: int | None = None  # tokens of one reply's text; None = as much as the context holds
    workers: int = 8  # calls that run at once
    by_turn: bool = True

    def __post_init__(self) -> None:
        names = [t.name for t in self.tools]
        if not names or len(set(names)) < len(names):
            raise GruppoError(f"a conversation needs tools with different names; these are: {', '.join(names) or 'none'}")
        if self.max_calls < 1 or self.workers < 1:
            raise GruppoError(f"max_calls is {self.max_calls} and workers is {self.workers}; both must be at least 1")
        self.style.check(self.tools)

    def sample(
        self,
        policy: Any,
        prompts: Sequence[Any],
        *,
        g: torch.Generator,
        max_new: int | None = None,
        temperature: float | None = None,
        stop: Sequence[str] = (),
    ) -> list[Path]:
        """One path per prompt, in order; all conversations that are still held advance together."""
        budget = policy.max_new if max_new is None else max_new
        known: dict[int, Tensor] = {}
        talks = []
        for p in prompts:
            if id(p) not in known:
                known[id(p)] = self.encode(policy, p)
                if len(known[id(p)]) >= policy.context:
                    raise GruppoError(
                        f"a prompt of {len(known[id(p)])} tokens leaves no room in this model's {policy.context} positions"
                    )
            talks.append(_Live(known[id(p)]))
        stops = (*self.style.stops(self.tools), *stop)
        while held := [t for t in talks if t.open]:
            asked: list[tuple[_Live, list[Call]]] = []
            room = [min(budget - t.sampled, policy.context - len(t)) for t in held]
            for some in together([len(t) for t in held], room, policy.context):
                longest = max(room[i] for i in some)
                turns = policy.sample([held[i].context for i in some], g=g, max_new=longest, temperature=temperature, stop=stops)
                for i, turn in zip(some, turns):
                    if calls := self.heard(policy, held[i], turn, room[i]):
                        asked.append((held[i], calls))
            asked = [(t, calls) for t, calls in asked if self.may_go_on(policy, t, calls, budget)]
            replies = iter(answer(self.tools, [c for _, calls in asked for c in calls], self.workers))
            for talk, calls in asked:
                self.reply(policy, talk, [next(replies) for _ in calls])
        return [self.path(policy, t) for t in talks]

    def encode(self, policy: Any, prompt: Any) -> Tensor:
        """The prompt's ids; chat messages are shown the tools' schemas where the style announces them."""
        if not self.style.announces or isinstance(prompt, (str, Tensor)):
            return policy.encode(prompt)
        schemas = [t.schema for t in self.tools]
        text = policy.tokenizer.apply_chat_template(prompt, tools=schemas, add_generation_prompt=True, tokenize=False)
        return torch.tensor(policy.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)

    def heard(self, policy: Any, talk: _Live, turn: Path, room: int) -> list[Call]:
        """Note one turn and return its calls; none when the conversation ends with it."""
        cut = len(turn) > room  # another row had more room left; the first tokens are as good a sample as any
        steps = turn.steps[:room]
        text = policy.decode(steps) if cut else turn.output
        talk.say(steps, turn.logp[:room], text)
        if cut or turn.truncated:
            talk.close(truncated=True)
            return []
        calls = self.style.calls(text, self.tools)
        if not calls:
            talk.close(truncated=False)
        return calls

    def may_go_on(self, policy: Any, talk: _Live, calls: list[Call], budget: int) -> bool:
        """Whether these calls are allowed and an answer to them could be read and followed by a word."""
        allowed = talk.calls + len(calls) <= self.max_calls and talk.sampled < budget and len(talk) < policy.context
        if not allowed:
            talk.close(truncated=True)
        return allowed

    def reply(self, policy: Any, talk: _Live, replies: list[Reply]) -> None:
        """Put the replies into the conversation as tokens that are read and never trained."""
        talk.calls += len(replies)
        for r in replies:
            talk.messages.append({"role": "tool", "name": r.tool, "content": r.text, "failed": r.failed, "late": r.late})
        ids = [i for text, markup in self.style.framed(replies) for i in self.tokens(policy, text, markup)]
        if len(talk) + len(ids) >= policy.context:
            talk.close(truncated=True)
            return
        steps = torch.tensor(ids, dtype=torch.long)
        talk.append(steps, torch.zeros(len(ids)), -1)

    def tokens(self, policy: Any, text: str, markup: bool) -> list[int]:
        """Ids of a piece of a reply. In a tool's own text an end-of-turn token is only letters: it cannot forge a turn."""
        ids = policy.tokenizer(text, add_special_tokens=False, split_special_tokens=not markup)["input_ids"] if text else []
        return ids if markup else ids[: self.max_result]

    def path(self, policy: Any, talk: _Live) -> Path:
        steps, unit = torch.cat(talk.steps), torch.cat(talk.unit)
        mask = unit >= 0
        whole = steps[:-1] if int(steps[-1]) in policy.eos else steps
        return Path(
            talk.prompt,
            steps,
            torch.cat(talk.logp),
            mask,
            Transcript(policy.decode(whole), talk.messages),
            unit=unit if self.by_turn else unit.clamp(max=0),
            truncated=talk.truncated,
        )


def together(lengths: Sequence[int], room: Sequence[int], context: int) -> Iterator[list[int]]:
    """Rows that one call of `sample` can take: the longest context plus the largest room must fit. Usually all of them."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    some: list[int] = []
    for i in order:
        if some and lengths[some[0]] + max(room[j] for j in [*some, i]) > context:
            yield some
            some = []
        some.append(i)
    if some:
        yield some


def talked(groups: list[Group]) -> list[dict[str, Any]]:
    """Signals of conversations: `calls`, `tool_errors` and `tool_timeouts` per path, and the `messages` themselves."""

    def signals(group: Group) -> dict[str, Any]:
        outputs = [p.output for p in group.paths]
        for i, said in enumerate(outputs):
            if not isinstance(said, Transcript):
                raise GruppoError(
                    f"path {i} is a completion without turns, but its tool calls are asked for; sample it with "
                    "rollouts.Conversation, or with a policy in rollouts.WithTools"
                )
        return {
            "calls": [float(len(o.replies)) for o in outputs],
            "tool_errors": [float(sum(m["failed"] for m in o.replies)) for o in outputs],
            "tool_timeouts": [float(sum(m["late"] for m in o.replies)) for o in outputs],
            "messages": [list(o.messages) for o in outputs],
        }

    return [signals(g) for g in groups]


@dataclass(frozen=True)
class Conversation:
    """n conversations with tools for every task, held together."""

    n: int
    talk: Talk

    def __post_init__(self) -> None:
        if self.n < 1:
            raise GruppoError(f"n is {self.n}; a task needs at least one conversation")

    def __call__(self, policy: Any, tasks: Any, grade: Grade, rng: torch.Generator) -> list[Group]:
        tasks = list(tasks)
        paths = self.talk.sample(policy, [t.prompt for t in tasks for _ in range(self.n)], g=rng)
        groups = [Group(t, paths[i * self.n : (i + 1) * self.n]) for i, t in enumerate(tasks)]
        return grade([g.with_(signals=columns(s)) for g, s in zip(groups, talked(groups))])


def columns(signals: dict[str, Any]) -> dict[str, Any]:
    """Numbers as [G] tensors, anything else as it is."""
    return {k: torch.tensor(v) if v and isinstance(v[0], float) else v for k, v in signals.items()}


class WithTools:
    """A policy whose every sample is a conversation: any rollout, and any evaluation, then works with tools unchanged."""

    def __init__(self, policy: Any, talk: Talk) -> None:
        object.__setattr__(self, "policy", policy)
        object.__setattr__(self, "talk", talk)

    def sample(self, prompts: Sequence[Any], *, g: torch.Generator, **numbers: Any) -> list[Path]:
        return self.talk.sample(self.policy, prompts, g=g, **numbers)

    def __getattr__(self, name: str) -> Any:
        if name in ("policy", "talk"):  # not yet there while a copy is made
            raise AttributeError(name)
        return getattr(self.policy, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.policy, name, value)
