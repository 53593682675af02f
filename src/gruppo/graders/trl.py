"""TRL reward functions, unmodified: `f(prompts, completions, **columns) -> list[float | None]`, plain or async.

What TRL's GRPO trainer passes by keyword is passed here: `prompts`, `completions` (a string for a string prompt, a list of one
assistant message for a chat prompt), `completion_ids`, every column of the data but the prompt, `trainer_state`, `log_extra`
and `log_metric`. Where TRL would fail on a function without `**kwargs`, only what it names is passed.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import inspect
import math
import signal
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from gruppo.graders.grade import Abstained, described
from gruppo.types import Group, GruppoError

GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")


class OutOfTime(BaseException):
    """Raised inside a reward function by the alarm; no `except Exception` of the function may swallow it."""


@dataclass
class TrlRewards:
    """Runs TRL reward functions, each a signal under its own name.

    None means that a function has nothing to say about a path: the sum of the others stands, as in TRL. NaN is a failure here:
    TRL reads it as None, but it is nearly always 0/0 in the function. A function that raises abstains for its whole call. One
    that does not return in `seconds` stops the run, because Python cannot kill it.
    """

    functions: dict[str, Callable[..., Any]]  # signal -> function
    seconds: float = 120.0
    state: Any = None  # transformers' TrainerState; made when first needed
    metrics: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    skips: bool = field(default=True, init=False)
    loop: asyncio.AbstractEventLoop | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise GruppoError(f"the time limit of the reward functions is {self.seconds} seconds, but must be above 0")
        if self.state is None:
            from transformers import TrainerState

            self.state = TrainerState()

    @property
    def signals(self) -> tuple[str, ...]:
        return tuple(self.functions)

    @property
    def name(self) -> str:
        return ", ".join(self.functions)

    def at(self, step: int, steps: int) -> None:
        """What `trainer_state` says from now on."""
        self.state.global_step, self.state.max_steps = step, steps

    def __call__(self, groups: list[Group]) -> list[dict[str, Any]]:
        given = self.arguments(groups)
        n = len(given["prompts"])
        extras: dict[str, dict[str, list[Any]]] = {name: defaultdict(list) for name in self.functions}
        results: dict[str, Any] = {}
        coming: dict[str, Any] = {}
        for name, function in self.functions.items():
            accepted = fitting(function, {**given, "log_extra": functools.partial(keep, extras[name])}, name)
            if is_async(function):
                coming[name] = functools.partial(function, **accepted)
                continue
            try:
                results[name] = limited(functools.partial(function, **accepted), self.seconds, name)
            except GruppoError:
                raise
            except Exception as error:  # the declared boundary: somebody's function broke
                results[name] = error
        results.update(self.gather(coming))
        columns = {name: graded(results[name], n, name) for name in self.functions}
        columns.update(shown(extras, n))
        out, at = [], 0
        for group in groups:
            out.append({name: values[at : at + len(group)] for name, values in columns.items()})
            at += len(group)
        return out

    def arguments(self, groups: list[Group]) -> dict[str, Any]:
        """The keywords of one call but `log_extra`: lists over all paths of all groups, and what the trainer would say."""
        names = list(dict.fromkeys(name for g in groups for name in g.task.columns()))
        for name in names:
            if name in GIVEN:
                raise GruppoError(
                    f"the data has a column {name!r}, which is a keyword that reward functions get already; rename it"
                )
        per_group = [g.task.columns() for g in groups]
        return {
            "prompts": [g.task.prompt for g in groups for _ in g.paths],
            "completions": [completion(g.task.prompt, p.output) for g in groups for p in g.paths],
            "completion_ids": [p.steps.tolist() for g in groups for p in g.paths],
            **{
                name: [columns.get(name) for g, columns in zip(groups, per_group) for _ in g.paths]
                for name in names
                if name not in ("prompt", "completion")
            },
            "trainer_state": self.state,
            "log_metric": lambda name, value: self.metrics[name].append(float(value)),
        }

    def gather(self, coming: dict[str, Any]) -> dict[str, Any]:
        """The results of the async functions, run side by side in a loop of their own that lives as long as this grader.

        A loop per call would break clients that keep connections; the caller's thread may be running a loop already.
        """
        if not coming:
            return {}
        if self.loop is None:
            self.loop = asyncio.new_event_loop()
            threading.Thread(target=run_loop, args=(self.loop,), daemon=True, name="gruppo-async-rewards").start()
            weakref.finalize(self, self.loop.call_soon_threadsafe, self.loop.stop)
        future = asyncio.run_coroutine_threadsafe(together(coming, self.seconds), self.loop)
        try:
            results = future.result(self.seconds + 5)  # a coroutine that blocks the loop blocks its timer as well
        except concurrent.futures.TimeoutError:
            raise hanging(", ".join(coming), self.seconds) from None
        for result in results.values():
            if isinstance(result, GruppoError):
                raise result
        return results


async def together(coming: dict[str, Callable[[], Any]], seconds: float) -> dict[str, Any]:
    """What each async call gave: its result, the exception it raised, or the sentence that it is late."""

    async def one(call: Callable[[], Any]) -> Any:
        return await call()

    tasks = {name: asyncio.ensure_future(one(call)) for name, call in coming.items()}
    _, late = await asyncio.wait(tasks.values(), timeout=seconds)
    for task in late:
        task.cancel()
    return {name: hanging(name, seconds) if task in late else outcome(task) for name, task in tasks.items()}


def outcome(task: asyncio.Task) -> Any:
    """A finished task's result, or the exception it ended with."""
    if task.cancelled():
        return RuntimeError("it was cancelled")
    error = task.exception()
    return task.result() if error is None else error


def run_loop(loop: asyncio.AbstractEventLoop) -> None:
    """Run until stopped, then let go of its sockets."""
    loop.run_forever()
    loop.close()


def keep(extras: dict[str, list[Any]], column: str, values: Any) -> None:
    """What `log_extra` does: values of one call, or of several in pieces, follow one another."""
    extras[column].extend(values)


def shown(extras: dict[str, dict[str, list[Any]]], n: int) -> dict[str, list[str]]:
    """The logged columns as text signals `extra/...`, for eyes only; one that differs from its namesake is numbered."""
    columns: dict[str, list[str]] = {}
    for function, logged in extras.items():
        for name, values in logged.items():
            if len(values) != n:
                raise GruppoError(
                    f"log_extra({name!r}) of the reward function {function} was given {len(values)} values for {n} completions; "
                    "it needs one for each"
                )
            column, number = f"extra/{name}", 1
            values = [str(v) for v in values]
            while columns.get(column, values) != values:
                number += 1
                column = f"extra/{name}_{number}"
            columns[column] = values
    return columns


def completion(prompt: Any, output: Any) -> Any:
    """A completion as TRL shows it: text for a text prompt, messages for a chat prompt."""
    if isinstance(output, list) or isinstance(prompt, str):
        return output
    return [{"role": "assistant", "content": output}]


def graded(result: Any, n: int, name: str) -> list[Any]:
    """One function's result as n values; a failure stands for all of them."""
    if isinstance(result, Exception):
        return [Abstained(f"raised {described(result)}", result)] * n
    if hasattr(result, "tolist"):
        result = result.tolist()
    if not isinstance(result, (list, tuple)):
        raise GruppoError(f"the reward function {name} returned a {type(result).__name__} where a list of {n} numbers belongs")
    if len(result) != n:
        raise GruppoError(
            f"the reward function {name} returned {len(result)} rewards for {n} completions; it must return one for each"
        )
    return [value(v, name) for v in result]


def value(v: Any, name: str) -> float | Abstained | None:
    """One reward: a number, None, or a failure."""
    if v is None:
        return None
    try:
        v = float(v)
    except (TypeError, ValueError):
        raise GruppoError(f"the reward function {name} returned {v!r} as a reward; a number or None belongs there") from None
    return v if math.isfinite(v) else Abstained(f"returned {v}")


def fitting(function: Callable[..., Any], given: dict[str, Any], name: str) -> dict[str, Any]:
    """The keywords that the function takes; a sentence when it requires one that the data does not have."""
    parameters = signature(function)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {k: p for k, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    for key, parameter in named.items():
        if parameter.default is parameter.empty and key not in given:
            columns = ", ".join(k for k in given if k not in GIVEN) or "none"
            raise GruppoError(f"the reward function {name} needs the column {key!r}; the columns of the data are: {columns}")
    return given if open_ended else {k: v for k, v in given.items() if k in named}


def signature(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters a call must fill, without those a partial has bound by position."""
    try:
        return dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        raise GruppoError(f"the parameters of {function!r} cannot be read, so it cannot be used as a reward") from None


def is_trl(function: Callable[..., Any]) -> bool:
    """Can this be called with TRL's keywords? It names prompts, completions or completion_ids, or takes any keyword."""
    parameters = signature(function).values()
    keywords = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return bool(keywords & {"prompts", "completions", "completion_ids"}) or (
        any(p.kind is p.VAR_KEYWORD for p in parameters) and "groups" not in keywords
    )


def is_async(function: Any) -> bool:
    """Does calling it give a coroutine? Looks through partials and at `__call__` of instances."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


def plain_name(function: Any) -> str:
    """What TRL calls a function in its logs."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__).strip("<>")


def hanging(name: str, seconds: float) -> GruppoError:
    """The sentence for a function that did not come back."""
    return GruppoError(
        f"the reward function {name} did not return within {seconds:g} seconds; it cannot be killed, so the run stops here. "
        "Give it a time limit of its own, or raise `seconds` if it needs longer"
    )


def limited(call: Callable[[], Any], seconds: float, name: str) -> Any:
    """The call's result, or a sentence when it does not return in time.

    In the main thread the call stays there: functions that set alarms (math-verify's defaults) work nowhere else. A second
    thread then interrupts it with a signal. Called from another thread, it runs in a thread that is left behind when late.
    """
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGVTALRM"):
        return _interruptible(call, seconds, name)
    box: list[Any] = []

    def run() -> None:
        try:
            box.append((True, call()))
        except Exception as error:
            box.append((False, error))

    thread = threading.Thread(target=run, daemon=True, name=f"gruppo-reward-{name}")
    thread.start()
    thread.join(seconds)
    if not box:
        raise hanging(name, seconds)
    worked, result = box[0]
    if not worked:
        raise result
    return result


def _interruptible(call: Callable[[], Any], seconds: float, name: str) -> Any:
    returned, late = threading.Event(), threading.Event()
    main = threading.main_thread().ident
    assert main is not None

    def watch() -> None:
        wait = seconds
        while not returned.wait(wait):
            late.set()
            signal.pthread_kill(main, signal.SIGVTALRM)
            wait = 1.0  # again, should the function have swallowed it

    def interrupt(number: int, frame: Any) -> None:
        if late.is_set() and not returned.is_set():
            raise OutOfTime
        if callable(before):
            before(number, frame)

    before = signal.signal(signal.SIGVTALRM, interrupt)
    watcher = threading.Thread(target=watch, daemon=True, name="gruppo-reward-watch")
    try:
        try:
            watcher.start()
            return call()
        finally:
            returned.set()
    except OutOfTime:  # raised above, or by a signal that came between the call's return and the line before
        raise hanging(name, seconds) from None
    finally:
        returned.set()
        watcher.join()  # no signal can arrive once the old handler is back
        signal.signal(signal.SIGVTALRM, before if before is not None else signal.SIG_DFL)
        if late.is_set():
            raise hanging(name, seconds) from None
