"""Measures on a person's own model what training relies on, and says in a sentence what is broken.

Nothing here is a promise read from a configuration: the ratio before the first update, the agreement of sampler and trainer,
the end tokens, the chat template and the gradient's independence of the block size are measured with the given weights on
the given machine.
"""

from __future__ import annotations

import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from typing import Any, Literal

import torch
from torch import Tensor

from gruppo.core.collate import collate
from gruppo.core.reduce import weigh
from gruppo.policies.flow import FlowPolicy
from gruppo.policies.reference import AdapterOff
from gruppo.recipe import Recipe
from gruppo.runs.memory import low_precision, memory
from gruppo.runs.threads import choose
from gruppo.train import accumulate
from gruppo.types import Batch, Group, GruppoError, Path, Steps, Task

Verdict = Literal["ok", "note", "warn", "fail"]
TEXTS = (
    "What is 2 + 3?",
    "List three colours and say which of them you would paint a door with.",
    "Hi",
    "A train leaves at 9:40 and arrives at 11:05. How many minutes does it travel? Think before you answer.",
)
TEMPERATURE = 0.7  # at 1 a forgotten temperature would go unseen
PATIENCE = 10.0  # seconds for finding out how long completions are
ANSWERS = 64  # completions for finding that out


@dataclass(frozen=True)
class Check:
    """One thing measured: the number, the limit it was held against, and what it means."""

    name: str
    verdict: Verdict
    sentence: str
    value: float | int | None = None
    limit: float | None = None


@dataclass(frozen=True)
class Report:
    """All checks, the memory that the planned run needs in MB, and the versions at work."""

    checks: list[Check]
    memory: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def failed(self) -> list[Check]:
        """The checks whose invariant broke."""
        return [c for c in self.checks if c.verdict == "fail"]

    def __getitem__(self, name: str) -> Check:
        return next(c for c in self.checks if c.name == name)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON: NaN and infinities become None."""
        checks = [{k: _finite(v) for k, v in asdict(c).items()} for c in self.checks]
        return {"healthy": not self.failed, "checks": checks, "memory_mb": self.memory, "versions": self.versions}

    def lines(self) -> list[str]:
        """What to print."""
        out = ["  ".join(f"{name} {v}" for name, v in self.versions.items())]
        out += [f"{c.verdict:>4}  {c.name}: {c.sentence}" for c in self.checks]
        if self.failed:
            out.append(f"{len(self.failed)} of {len(self.checks)} checks failed; training on this model would be silently wrong")
        return out


def main(model: str | None, as_json: bool, world: str | None = None, words: Sequence[str] = (), measured: bool = False) -> int:
    """Examine a model folder, or the base model of a world (arithmetic by default); 1 when an invariant broke, else 0.

    `words` are settings of the planned run, such as fit.token_budget=4096. `measured` also trains three steps of it in a process
    of its own and says what memory they took.
    """
    from gruppo.policies.load import load_model, load_tokenizer, lora_config, with_adapter
    from gruppo.policies.painters import on_the_hub
    from gruppo.policies.token import TokenPolicy
    from gruppo.runs.build import paints, world_of
    from gruppo.runs.config import RunConfig, assemble, merge, overrides

    if measured and model is not None:
        raise GruppoError("what a run takes is measured on a world, which brings its own tasks and graders: give --world alone")
    asked = overrides(words)
    prompts: Sequence[Any] | None = None
    if model is None or world is not None:
        planned = assemble({"world": world or "arithmetic"}, asked)
        prompts = [t.prompt for t in world_of(planned).held_out(8)]
        source: Any = world_of(planned).base if model is None else model
    else:
        unused = {"model": model, "data": "none", "rewards": ["none:none"]}
        planned, source = RunConfig.model_validate(merge(unused, asked)), model
    if paints(planned, source) or on_the_hub(source):  # off this disk `paints` asks the recipe, and none is named here
        found = _painting(planned, source, prompts)
    else:
        own = planned.policy
        loaded, tokenizer = load_model(source), load_tokenizer(source)
        if own.lora is not None:
            loaded = with_adapter(loaded, lora_config(own.lora.rank, own.lora.alpha, own.lora.targets), planned.fit.seed)
        policy = TokenPolicy(loaded, tokenizer, max_new=own.max_new_tokens, checkpointing=own.gradient_checkpointing)
        reference = True if planned.world is None else _refers(planned)
        found = doctor(policy, None, planned.model_dump(), prompts=prompts, reference=reference)
    print(json.dumps(found.as_dict(), indent=1, allow_nan=False) if as_json else "\n".join(found.lines()))
    if measured:
        from gruppo.runs.memory import main as measure

        print(measure([f"world={planned.world}", *words]), file=sys.stderr if as_json else sys.stdout)
    return 1 if found.failed else 0


def _refers(planned: Any) -> bool:
    """Whether the recipe of the planned run has a reference model."""
    from gruppo.runs.given import Given
    from gruppo.runs.stages import recipe_of

    return recipe_of(planned, Given()).reference is not None


def _painting(planned: Any, source: Any, prompts: Sequence[Any] | None) -> Report:
    """The report on a painter, under Flow-GRPO as its world would train it."""
    from gruppo.runs.build import painting_policy
    from gruppo.runs.config import assemble
    from gruppo.runs.given import Given
    from gruppo.runs.stages import recipe_of

    if planned.world is not None:
        planned = assemble({"world": planned.world, "recipe": "flow-grpo"})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    planned = planned.model_copy(update={"policy": planned.policy.model_copy(update={"device": device})})
    policy = painting_policy(planned, source, None)
    recipe = recipe_of(planned, Given()) if planned.world is not None else None
    return doctor(policy, recipe, {"fit": planned.fit.model_dump()}, prompts=prompts)


def doctor(
    policy: Any,
    recipe: Recipe | None = None,
    planned: Mapping[str, Any] | None = None,
    *,
    prompts: Sequence[Any] | None = None,
    rng: torch.Generator | None = None,
    reference: bool | None = None,
) -> Report:
    """Measure every invariant on this policy; its weights, gradients and settings are left as they were found.

    `recipe` lends its loss and reduction to the gradient checks (GRPO without KL by default). `planned` holds the sections
    "policy" and "fit" of the run's settings for the memory estimate, `reference` whether the run has one (as `recipe` says when
    not given). `prompts` should be like those of the run. A policy that
    paints is examined by `doctor_flow`.
    """
    if isinstance(policy, FlowPolicy):
        from gruppo.runs.doctor_flow import doctor_flow

        return doctor_flow(policy, recipe, planned, prompts=prompts, rng=rng)
    rng = torch.Generator().manual_seed(0) if rng is None else rng
    prompts = _prompts(policy, prompts)
    checks = [threads(policy), *ends(policy, prompts[0], rng), *template(policy)]
    with _untouched(policy):
        began = time.perf_counter()
        paths = _sample(policy, prompts, rng)
        sampling = sum(map(len, paths)) / (time.perf_counter() - began)
        checks += [repeatable(policy, paths), agreement(policy, paths), padding(policy, paths), ratio(policy, paths)]
        batch = _batch(paths, rng)
        checks += [blocks(policy, batch, recipe), masked(policy, batch, recipe, rng)]
        began = time.perf_counter()
        gradient(policy, batch, recipe, 8192)
        tokens = sum(len(p.prompt) + len(p) for p in paths)
        training = tokens / (time.perf_counter() - began)
    checks.append(
        Check(
            "speed",
            "note",
            f"about {sampling:.0f} tokens/s sampled and {training:.0f} tokens/s trained in a batch of {len(paths)} paths; "
            "larger batches are faster per token",
            training,
        )
    )
    parts: dict[str, float] = {}
    if planned is not None:
        longest = max(len(policy.encode(p)) for p in prompts)
        refers = (recipe is None or recipe.reference is not None) if reference is None else reference
        parts = memory(policy, planned, prompt=longest, reference=refers)
        siblings = planned.get("fit", {}).get("paths_per_prompt", 8)
        if (seen := _answers(policy, prompts, siblings, sampling, rng)) is not None:
            parts["peak now"] = memory(policy, planned, prompt=longest, reference=refers, answers=seen)["peak"]
        checks.append(_fits(parts, policy.device))
    return Report(checks, parts, versions())


# -- the checks -------------------------------------------------------------------------------------------------------


def ratio(policy: Any, paths: list[Path]) -> Check:
    """exp(logp - logp_old) is 1 at every sampled token as long as no update has happened."""
    limit = 0.65 if low_precision(policy) else 1e-3
    batch = _batch(paths, torch.Generator().manual_seed(0))
    worst = 0.0
    with torch.no_grad():
        for part in policy.split(batch, "path", 8192):
            off = ((policy.evaluate(part).logp - part.logp_old).exp() - 1).abs()[part.mask]
            worst = max(worst, largest(off))
    return limited(
        "ratio",
        worst,
        limit,
        f"the ratio before the first update is 1 within {worst:.1e} at temperature {policy.temperature}",
        f"the ratio before the first update is off 1 by {worst:.3g} at temperature {policy.temperature} (at most {limit} is "
        "rounding): the trainer reads other probabilities than the sampler drew from",
    )


def agreement(policy: Any, paths: list[Path]) -> Check:
    """The sampler (cache, left padding) and the trainer (whole rows, right padding) give a token the same log-probability."""
    limit = 0.5 if low_precision(policy) else 1e-3
    worst = max(largest((p.logp - read).abs()) for p, read in zip(paths, policy.score(paths)))
    n, lengths = sum(map(len, paths)), sorted({len(p.prompt) for p in paths})
    return limited(
        "sampler and trainer",
        worst,
        limit,
        f"log-probabilities agree within {worst:.1e} nats over {n} tokens, prompts of {lengths[0]} to {lengths[-1]} tokens",
        f"the sampler's and the trainer's log-probabilities of the same tokens differ by up to {worst:.3g} nats (at most {limit} "
        f"is rounding) over {n} tokens, prompts of {lengths[0]} to {lengths[-1]} tokens: cache, positions or padding are wrong",
    )


def repeatable(policy: Any, paths: list[Path]) -> Check:
    """Reading the same paths twice gives the same numbers: no dropout, no noise."""
    one, two = policy.score(paths), policy.score(paths)
    worst = max(largest((a - b).abs()) for a, b in zip(one, two))
    limit = 1e-2 if low_precision(policy) else 1e-5
    return limited(
        "repeatable",
        worst,
        limit,
        f"reading the same paths twice differs by {worst:.1e}",
        f"reading the same paths twice gives log-probabilities that differ by up to {worst:.3g}: something in the model is "
        "random (dropout or noise), so ratios and gradients are noise too",
    )


def padding(policy: Any, paths: list[Path]) -> Check:
    """A path reads the same alone and among longer ones, whatever token fills the padding."""
    limit = 0.5 if low_precision(policy) else 1e-3
    together = policy.score(paths, budget=10**9)
    alone = policy.score(paths, budget=1)
    own = policy.pad
    policy.pad = next(i for i in range(policy.config.vocab_size) if i != own)
    try:
        filled = policy.score(paths, budget=10**9)
    finally:
        policy.pad = own
    worst = max(largest((a - b).abs()) for a, b in [*zip(together, alone), *zip(together, filled)])
    return limited(
        "padding",
        worst,
        limit,
        f"a path reads the same alone, among longer ones and with other padding, within {worst:.1e}",
        f"a path's log-probabilities change by up to {worst:.3g} with the company it keeps in the batch or with the padding "
        f"token (at most {limit} is rounding): rows are not independent in this model",
    )


def blocks(policy: Any, batch: Batch, recipe: Recipe | None) -> Check:
    """The gradient of one block of everything equals the sum over blocks of single rows."""
    limit = 0.1 if low_precision(policy) else 1e-3
    worst = difference(gradient(policy, batch, recipe, 10**9), gradient(policy, batch, recipe, 1))
    return limited(
        "micro-batch",
        worst,
        limit,
        f"the gradient is the same for any block size, within {worst:.1e} of its length",
        f"the gradient changes by {worst:.3g} of its length with the size of the micro-batch (at most {limit} is rounding): the "
        "loss or the model mixes rows",
    )


def masked(policy: Any, batch: Batch, recipe: Recipe | None, rng: torch.Generator, *, budget: int = 10**9) -> Check:
    """What stands at masked steps (advantages, old log-probabilities) does not enter the gradient."""
    off = (torch.rand(batch.mask.shape, generator=rng) < 0.5) & batch.mask
    off[:, 0] = False  # every row keeps a trained step
    half = batch.with_(mask=batch.mask & ~off)
    noise = torch.where(half.mask, torch.zeros(()), torch.randn(half.mask.shape, generator=rng))
    other = half.with_(
        advantage=half.advantage + 3 * noise, logp_old=half.logp_old + noise, logp_sampler=half.logp_sampler - noise
    )
    worst = difference(gradient(policy, half, recipe, budget), gradient(policy, other, recipe, budget))
    limit = 1e-2 if low_precision(policy) else 1e-5
    return limited(
        "masked steps",
        worst,
        limit,
        f"changing what stands at {int(off.sum())} masked steps changes the gradient by {worst:.1e}",
        f"changing what stands at {int(off.sum())} masked steps changes the gradient by {worst:.3g} of its length: masked steps "
        "are trained",
    )


def ends(policy: Any, prompt: Any, rng: torch.Generator) -> list[Check]:
    """Each end id of the generation config and the tokenizer, forced on the model, really ends a completion and is trained."""
    config = getattr(getattr(policy.model, "generation_config", None), "eos_token_id", None)
    listed = [*_ids(config), *_ids(policy.tokenizer.eos_token_id)]
    ids = list(dict.fromkeys(listed or policy.eos))
    vocabulary = policy.config.vocab_size
    outside = [i for i in ids if not 0 <= i < vocabulary]
    deaf = [i for i in ids if i not in outside and not _ends(policy, prompt, i, rng)]
    out = []
    if outside:
        out.append(
            Check("end tokens", "fail", f"the end id {outside[0]} does not exist: the model has {vocabulary} tokens", outside[0])
        )
    elif deaf:
        out.append(
            Check(
                "end tokens",
                "fail",
                f"the model wrote the end id {deaf[0]} ({_token(policy, deaf[0])}) and the completion went on: of the end ids "
                f"{ids} the policy honours {policy.eos}; completions would run into the length limit",
                deaf[0],
            )
        )
    else:
        names = ", ".join(f"{i} ({_token(policy, i)})" for i in ids)
        out.append(Check("end tokens", "ok", f"each of {names} ends a completion, is kept and trained", len(ids)))
    if policy.pad in policy.eos:
        out.append(
            Check(
                "padding token",
                "warn",
                f"the padding token is the end token {policy.pad}; harmless here, where masks come from lengths, but trainers "
                "that mask padding by its id would never train the end",
                policy.pad,
            )
        )
    return out


def template(policy: Any) -> list[Check]:
    """The chat template opens the assistant's turn, tokenises one way only, and begins with at most one BOS."""
    tokenizer = policy.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        return [Check("chat template", "note", "this tokenizer has no chat template; prompts must be strings")]
    ask = [{"role": "user", "content": TEXTS[0]}]
    closed = tokenizer.apply_chat_template(ask, add_generation_prompt=False, tokenize=False)
    opened = tokenizer.apply_chat_template(ask, add_generation_prompt=True, tokenize=False)
    ids = policy.encode(ask).tolist()
    direct = tokenizer.apply_chat_template(ask, add_generation_prompt=True, tokenize=True)
    direct = list(direct["input_ids"] if isinstance(direct, Mapping) else direct)
    bos = tokenizer.bos_token_id
    again = tokenizer(tokenizer.decode(ids), add_special_tokens=False)["input_ids"]
    out = []
    if bos is not None and ids[:2] == [bos, bos]:
        out.append(
            Check(
                "chat template", "fail", f"a prompt of chat messages begins with the BOS token {bos} twice; models see it once", 2
            )
        )
    elif opened == closed or not opened.startswith(closed):
        out.append(
            Check(
                "chat template",
                "fail",
                "the chat template does not append a generation prompt, so the model would continue the user's message instead "
                "of answering it",
            )
        )
    elif direct != ids:
        out.append(
            Check(
                "chat template",
                "fail",
                f"the chat template gives {len(direct)} tokens when it tokenises and {len(ids)} when its text is tokenised; the "
                "prompt that is trained would not be the prompt of other programs",
                abs(len(direct) - len(ids)),
            )
        )
    else:
        out.append(
            Check("chat template", "ok", f"opens the assistant's turn with {opened[len(closed) :]!r}; tokenised one way only")
        )
    if again != ids:
        out.append(
            Check(
                "round trip",
                "warn",
                f"a prompt of {len(ids)} tokens comes back as {len(again)} other tokens from its own text; gruppo never "
                "re-tokenises, but programs that do will disagree",
                len(again),
            )
        )
    if bos is not None and list(tokenizer(opened)["input_ids"])[:2] == [bos, bos]:
        out.append(
            Check(
                "rendered prompts",
                "warn",
                "a string that was already rendered with the chat template would get a second BOS token; give messages, not "
                "rendered strings",
            )
        )
    with_answer = [*ask, {"role": "assistant", "content": "5"}]
    full = tokenizer(tokenizer.apply_chat_template(with_answer, tokenize=False), add_special_tokens=False)["input_ids"]
    if not set(full[len(ids) :]) & set(policy.eos):
        out.append(
            Check(
                "end of turn",
                "warn",
                f"the chat template closes an answer with {tokenizer.decode(full[-2:])!r}, which holds none of the end ids "
                f"{policy.eos}: completions may run on past their turn",
            )
        )
    return out


def threads(policy: Any) -> Check:
    """The number of torch threads that is fastest for a layer of this width, right now, on this machine."""
    if policy.device.type != "cpu":
        return Check("threads", "note", f"the model is on {policy.device}; CPU threads hardly matter")
    best = choose(getattr(policy.config, "hidden_size", 128), policy.config.vocab_size)
    now = torch.get_num_threads()
    return Check("threads", "note", f"{best}; torch now uses {now}", best.threads)


def versions() -> dict[str, str]:
    """Python and the packages whose behaviour the numbers above depend on."""
    out = {"python": platform.python_version()}
    for name in ("torch", "transformers", "peft", "gruppo"):
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            out[name] = "not installed"
    return out


# -- memory -----------------------------------------------------------------------------------------------------------


def _fits(parts: dict[str, float], device: torch.device) -> Check:
    free = _free(device)
    parted = ", ".join(
        f"{k} {v:.0f}" for k, v in sorted(parts.items(), key=lambda kv: -kv[1]) if not k.startswith("peak") and v >= 1
    )
    now = f", {parts['peak now']:.0f} MB at the lengths that it writes now" if "peak now" in parts else ""
    says = f"the planned run needs about {parts['peak']:.0f} MB when every completion has the full length{now} "
    says += f"({parted or 'all parts below 1'} MB)"
    if free is not None and parts["peak"] > free:
        hint = "lower fit.token_budget or policy.sample_rows, or train an adapter (policy.lora)"
        return Check("memory", "warn", f"{says}, but {free:.0f} MB are free: {hint}", parts["peak"], free)
    return Check("memory", "note", says + ("" if free is None else f"; {free:.0f} MB are free"), parts["peak"], free)


def _free(device: torch.device) -> float | None:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 2**20
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) / 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


# -- how they measure -------------------------------------------------------------------------------------------------


def _prompts(policy: Any, prompts: Sequence[Any] | None) -> list[Any]:
    if prompts is None:
        chat = bool(getattr(policy.tokenizer, "chat_template", None))
        prompts = [[{"role": "user", "content": t}] if chat else t for t in TEXTS]
    fit = [p for p in prompts if len(policy.encode(p)) + 8 <= policy.context]
    if not fit:
        raise GruppoError(f"none of the {len(prompts)} prompts leaves room for 8 new tokens in a context of {policy.context}")
    return list(fit[:8])


def _sample(policy: Any, prompts: Sequence[Any], rng: torch.Generator) -> list[Path]:
    longest = max(len(policy.encode(p)) for p in prompts)
    new = min(24, policy.context - longest)
    return policy.sample([p for p in prompts for _ in range(4)], g=rng, max_new=new)


def _answers(policy: Any, prompts: Sequence[Any], siblings: int, rate: float, rng: torch.Generator) -> list[list[Tensor]] | None:
    """What the model writes now: some `ANSWERS` answers, as many to a prompt as in the run, since siblings share beginnings.
    None where trying would take long at `rate` tokens per second."""
    fit = [p for p in prompts if len(policy.encode(p)) + policy.max_new <= policy.context]
    some = [p for p in fit[: max(1, ANSWERS // siblings)] for _ in range(siblings)]
    if not some or len(some) * policy.max_new > PATIENCE * rate:
        return None
    counts = policy.counts.copy()
    steps = [p.steps for p in policy.sample(some, g=rng)]
    policy.counts.clear()
    policy.counts.update(counts)
    return [steps[i : i + siblings] for i in range(0, len(steps), siblings)]


def _batch(paths: list[Path], rng: torch.Generator) -> Batch:
    """Groups of four siblings with random advantages; every third path has its end cut off, so that lengths are ragged."""
    ragged = [_cut(p, max(1, len(p) * 2 // 3)) if i % 3 == 0 else p for i, p in enumerate(paths)]
    groups = [Group(Task(None), ragged[i : i + 4]) for i in range(0, len(ragged), 4)]
    return collate([g.with_(advantage=torch.randn(len(g), g.width, generator=rng)) for g in groups])


def _cut(path: Path, n: int) -> Path:
    return replace(path, steps=path.steps[:n], logp=path.logp[:n], mask=path.mask[:n])


class _Itself(AdapterOff):
    """A reference equal to the policy: the KL and its gradient are 0, and no second set of weights is needed."""

    def evaluate(self, batch: Batch) -> Steps:
        return self.policy.evaluate(batch)


def gradient(policy: Any, batch: Batch, recipe: Recipe | None, budget: int) -> list[Tensor]:
    if recipe is None:
        from gruppo.recipes.grpo import grpo

        recipe = grpo(n=4, beta=0.0)
    for p in policy.parameters():
        p.grad = None
    ref = _Itself(policy) if recipe.reference is not None else None
    accumulate(policy, weigh(batch, recipe.reduce), recipe, ref=ref, budget=budget)
    return [torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in policy.parameters()]


def difference(a: list[Tensor], b: list[Tensor]) -> float:
    """|a - b| / |b|, the length over all parameters."""
    apart = math.sqrt(sum(float((x.double() - y.double()).square().sum()) for x, y in zip(a, b)))
    return apart / max(math.sqrt(sum(float(y.double().square().sum()) for y in b)), 1e-30)


def _ends(policy: Any, prompt: Any, token: int, rng: torch.Generator) -> bool:
    """With a model that writes `token` and nothing else, a completion is that one token, trained, and not truncated."""

    def force(module: Any, args: Any, out: Any) -> Any:
        out.logits = torch.full_like(out.logits, -1e4)
        out.logits[..., token] = 0.0
        return out

    hook = policy.model.register_forward_hook(force)
    try:
        (path,) = policy.sample([prompt], g=rng, max_new=3)
    finally:
        hook.remove()
    return path.steps.tolist() == [token] and bool(path.mask.all()) and not path.truncated


@contextmanager
def _untouched(policy: Any) -> Iterator[None]:
    """Measure at `TEMPERATURE`; gradients and temperature come back as they were."""
    temperature, grads = policy.temperature, [p.grad for p in policy.parameters()]
    policy.temperature = TEMPERATURE
    try:
        yield
    finally:
        policy.temperature = temperature
        for p, grad in zip(policy.parameters(), grads):
            p.grad = grad


def largest(x: Tensor) -> float:
    """The largest entry; infinite where one is NaN, so that it never passes for small."""
    return float(torch.nan_to_num(x, nan=math.inf).max()) if x.numel() else 0.0


def limited(name: str, value: float, limit: float, fine: str, broken: str) -> Check:
    return Check(name, "ok", fine, value, limit) if value <= limit else Check(name, "fail", broken, value, limit)


def _ids(value: Any) -> list[int]:
    return [int(i) for i in (value if isinstance(value, (list, tuple)) else [value]) if i is not None]


def _token(policy: Any, token: int) -> str:
    convert: Callable[[int], Any] = policy.tokenizer.convert_ids_to_tokens
    return str(convert(token))


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
