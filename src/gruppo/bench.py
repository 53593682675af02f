"""What a training step costs beside TRL's GRPOTrainer, on equal work: `gruppo bench text`.

Both sides get the same weights (a random Qwen3, float32, one thread), prompts, completions, advantages and micro-batches, and
train on the same clipped objective. Before anything is timed their log-probabilities, losses and gradients are compared; a
difference above 1e-5 stops the benchmark. Three phases are timed, in alternation in one process:

    sample  drawing the completions                       TRL: `_generate_single_turn`                 here: `sample`
    score   reading log-probabilities without gradient    TRL: `_get_per_token_logps_and_entropies`    here: `score`
    train   loss and backward of the whole batch          TRL: `_compute_loss` and backward            here: `accumulate`

`sample` is equal work only where every completion has the full length: no token ends one on either side, greedy decoding must
give the same tokens on both, and every timed call must return the full number of tokens. Ragged works have no such phase: two
programs that draw differently draw other lengths. Here log-probabilities come with the tokens, there they do not.

Times are seconds of CPU of the one thread, which other programs on the machine disturb less than wall time. The limit is the
number of operations that the step needs with every shared token computed once, divided by the rate of a large matrix product
measured in each round. Peak memory is the growth of the resident set over the loaded model, in a fresh process per figure.
"""

from __future__ import annotations

import contextlib
import json
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path as Folder
from statistics import median
from typing import Any

import torch
from torch import Tensor

from gruppo import bench_vision
from gruppo.core.collate import collate
from gruppo.core.reduce import weigh
from gruppo.policies import prefix, products
from gruppo.policies.token import TokenPolicy
from gruppo.recipes import recipe
from gruppo.train import accumulate
from gruppo.types import Batch, Group, GruppoError, Path, Task
from gruppo.worlds.tokenizer import tokenizer

G = 8
METHOD = recipe("grpo", n=G, beta=0.0)


@dataclass(frozen=True)
class Work:
    """`prompts` groups of G completions of `low` to `high` tokens; a micro-batch is one group."""

    prompts: int
    prompt: int
    low: int
    high: int
    model: str = "3.4M"

    @property
    def name(self) -> str:
        lengths = f"{self.prompt}/{self.low}" + (f"..{self.high}" if self.high > self.low else "")
        return lengths if self.model == "3.4M" else f"{lengths}@{self.model}"

    @property
    def budget(self) -> int:
        """Tokens of one micro-batch: what TRL's takes with padding."""
        return G * (self.prompt + self.high)


SIZES = {"3.4M": (256, 4), "24.7M": (512, 8)}  # width, layers
WORKS = {
    w.name: w
    for w in (
        Work(1, 128, 64, 64),
        Work(4, 128, 16, 256),
        Work(1, 1024, 32, 32),
        Work(1, 2048, 32, 32),
        Work(1, 1024, 32, 32, "24.7M"),
    )
}


def network(model: str = "3.4M") -> Any:
    """A random Qwen3 of one of `SIZES`; the same weights each time."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    width, layers = SIZES[model]
    size = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers, "vocab_size": 2 * width}
    heads = {"num_attention_heads": width // 64, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 4096}
    marks = {"pad_token_id": tokenizer().pad_token_id, "eos_token_id": tokenizer().eos_token_id, "bos_token_id": None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Qwen3ForCausalLM(Qwen3Config(**size, **heads, **marks, tie_word_embeddings=True)).eval()


def rows(work: Work) -> list[Group]:
    """Random tokens and advantages, the same each time; the longest completion has the full length."""
    g = torch.Generator().manual_seed(1)
    groups = []
    for _ in range(work.prompts):
        p = torch.randint(0, 256, (work.prompt,), generator=g)
        lengths = torch.randint(work.low, work.high + 1, (G,), generator=g)
        lengths[0] = work.high
        steps = [torch.randint(0, 256, (int(n),), generator=g) for n in lengths]
        paths = [Path(p, s, torch.zeros(len(s)), torch.ones(len(s), dtype=torch.bool)) for s in steps]
        advantage = torch.randn(G, generator=g)[:, None].expand(G, int(lengths.max()))
        groups.append(Group(Task(p), paths, advantage=advantage))
    return groups


class Here:
    """gruppo's side."""

    name = "gruppo"

    def __init__(self, work: Work, sharing: prefix.Rates | None = prefix.MEASURED) -> None:
        self.work, self.groups = work, rows(work)
        self.paths = [p for g in self.groups for p in g.paths]
        # one group at a time, as the other side takes them; what a group shares counts once, so TRL's number would let two in
        self.budget = work.budget if sharing is None else max(work.prompt + sum(map(len, g.paths)) for g in self.groups)
        self.policy = TokenPolicy(network(work.model), tokenizer(), sharing=sharing)
        self.model = self.policy.model
        self.policy.eos = [-1]  # nothing ends a completion: `sample` draws the full length, as on the other side

    def sample(self, greedy: bool = False) -> list[list[int]]:
        g = torch.Generator().manual_seed(0)
        prompts = [p.prompt for p in self.paths]
        found = self.policy.sample(prompts, g=g, max_new=self.work.high, temperature=0.0 if greedy else 1.0)
        return [p.steps.tolist() for p in found]

    def score(self) -> list[Tensor]:
        return self.policy.score(self.paths, budget=self.budget)

    def given(self, old: list[Tensor]) -> Batch:
        """The batch with these behaviour log-probabilities."""
        per = iter(replace(p, logp=s) for p, s in zip(self.paths, old))
        groups = [g.with_(paths=[next(per) for _ in g.paths]) for g in self.groups]
        return weigh(collate(groups), METHOD.reduce)

    def train(self, batch: Batch) -> float:
        self.model.zero_grad(set_to_none=True)
        return accumulate(self.policy, batch, METHOD, ref=None, budget=self.budget)["loss"]


class There:
    """TRL's side: its own trainer, scoring and loss."""

    name = "TRL"

    def __init__(self, work: Work, folder: Folder) -> None:
        try:
            import trl
        except ImportError as error:
            raise GruppoError("the benchmark compares with TRL: pip install 'gruppo[parity]'") from error
        from datasets import Dataset

        made: Any = trl  # its names are resolved lazily
        self.work, self.groups = work, rows(work)
        network(work.model).save_pretrained(folder / "model")
        quiet: dict[str, Any] = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}
        quiet |= {"activation_checkpointing": False, "save_strategy": "no", "output_dir": str(folder / "out")}
        size: dict[str, Any] = {"per_device_train_batch_size": G, "num_generations": G, "max_completion_length": work.high}
        size |= {"gradient_accumulation_steps": work.prompts, "num_iterations": 2, "loss_type": "grpo", "beta": 0.0}
        with contextlib.redirect_stdout(sys.stderr):
            self.trainer: Any = made.GRPOTrainer(
                str(folder / "model"),
                lambda completions, **_: [0.0] * len(completions),
                made.GRPOConfig(**quiet, **size),
                Dataset.from_dict({"prompt": ["a"]}),
                processing_class=tokenizer(),
            )
        self.trainer.current_gradient_accumulation_steps = work.prompts
        self.model = self.trainer.model
        self.model.train()
        self.trainer.generation_config.eos_token_id = self.model.generation_config.eos_token_id = None
        self.trainer.eos_token_ids = [-1]
        paths = [p for g in self.groups for p in g.paths]
        here = torch.arange(work.high) < torch.tensor([len(p) for p in paths])[:, None]
        ids = torch.full(here.shape, int(tokenizer().pad_token_id))  # pyright: ignore[reportArgumentType]
        ids[here] = torch.cat([p.steps for p in paths])
        prompt = torch.stack([p.prompt for p in paths])
        self.inputs = {
            "prompt_ids": prompt,
            "prompt_mask": torch.ones_like(prompt),
            "completion_ids": ids,
            "completion_mask": here.long(),
            "advantages": torch.cat([g.advantage[:, 0] for g in self.groups if g.advantage is not None]),
            "num_items_in_batch": here.sum(),
        }

    def sample(self, greedy: bool = False) -> list[list[int]]:
        self.trainer.generation_config.do_sample = not greedy
        found, _ = self.trainer._generate_single_turn(self.inputs["prompt_ids"].tolist(), None, {}, G)
        return found

    @torch.no_grad()
    def score(self) -> list[Tensor]:
        some = self.inputs
        ids = torch.cat([some["prompt_ids"], some["completion_ids"]], 1)
        mask = torch.cat([some["prompt_mask"], some["completion_mask"]], 1)
        logp, _, _ = self.trainer._get_per_token_logps_and_entropies(self.model, ids, mask, self.work.high, G)
        return [row[m.bool()] for row, m in zip(logp, some["completion_mask"])]

    def given(self, old: list[Tensor]) -> dict[str, Tensor]:
        """The inputs with these behaviour log-probabilities."""
        wide = torch.zeros(self.inputs["completion_ids"].shape)
        wide[self.inputs["completion_mask"].bool()] = torch.cat(old)
        return {**self.inputs, "old_per_token_logps": wide}

    def train(self, inputs: dict[str, Tensor]) -> float:
        self.model.zero_grad(set_to_none=True)
        total = 0.0
        for at in range(0, G * self.work.prompts, G):
            some = {k: v[at : at + G] if v.dim() else v for k, v in inputs.items()}
            loss = self.trainer._compute_loss(self.model, some)
            loss.backward()
            total += float(loss.detach())
        return total


def gradient(model: Any) -> dict[str, Tensor]:
    """The gradient by parameter name."""
    return {n.removeprefix("module."): p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def refuse_difference(a: Here, b: There, old: list[Tensor]) -> dict[str, float]:
    """The largest differences of both sides' numbers; a sentence when they do not do the same work."""
    logp = max(float((x - y).abs().max()) for x, y in zip(a.score(), b.score()))
    loss = abs(a.train(a.given(old)) - b.train(b.given(old)))
    mine, theirs = gradient(a.model), gradient(b.model)
    if mine.keys() != theirs.keys():
        raise GruppoError(f"gradients of {len(mine)} and {len(theirs)} parameters; they must be the same ones")
    off = sum(float((mine[n] - theirs[n]).square().sum()) for n in mine) ** 0.5
    off /= sum(float(g.square().sum()) for g in theirs.values()) ** 0.5
    found = {"logp": logp, "loss": loss, "gradient": off}
    if not max(found.values()) <= 1e-5:
        raise GruppoError(f"{a.work.name}: the two sides differ: {found}; nothing was timed")
    return found


def refuse_other_samples(a: Here, b: There) -> None:
    """A sentence when the two sides do not decode the same distribution to the same length."""
    config = b.trainer.generation_config
    if (config.temperature, config.top_k or 0, config.top_p, config.repetition_penalty or 1.0) != (1.0, 0, 1.0, 1.0):
        raise GruppoError(f"TRL samples another distribution than softmax(logits): {config}; nothing was timed")
    mine, theirs = a.sample(greedy=True), b.sample(greedy=True)
    if mine != theirs:
        off = sum(x != y for x, y in zip(mine, theirs))
        raise GruppoError(f"{a.work.name}: greedy decoding gives other tokens in {off} of {len(mine)} rows; nothing was timed")


def full(side: Here | There) -> None:
    """Sample; refuse completions that are not of the full length."""
    lengths = sorted({len(ids) for ids in side.sample()})
    if lengths != [side.work.high]:
        raise GruppoError(f"{side.name} sampled completions of {lengths} tokens where {side.work.high} were asked for")


def operations(work: Work) -> dict[str, float]:
    """Operations of each phase with every shared token computed once: weights, attention, head."""
    model = network(work.model)
    paths = [p for g in rows(work) for p in g.paths]
    where = torch.arange(work.high) < torch.tensor([len(p) for p in paths])[:, None]
    plain = prefix.Cost.of(model, prefix.Rates(pair=1.0, call=0.0, touch=0.0))
    plan = prefix.plan([p.prompt for p in paths], [p.steps for p in paths], where, plain, least=1)
    head = 2 * model.config.hidden_size * model.config.vocab_size * len(plan.at)
    forward = plain.packed(plan.layout, "lse") + head
    linear = 2.0 * plain.weights * plan.layout.total
    padded = plain.ordinary(len(paths), work.prompt + work.high) + 2 * model.config.hidden_size * model.config.vocab_size * (
        work.high * len(paths)
    )
    return {
        "sample": forward,  # a token is read when it is drawn, so decoding passes the same tokens
        "score": forward,
        "train": 3 * forward,
        LINEAR: 3 * linear,
        HEAD: 3.0 * head,
        ATTENTION: 3 * (forward - head - linear),
        "saved": padded / forward,
        "tokens": float(plan.layout.total),
        "steps": float(where.sum()),
    }


def gemm() -> tuple[float, float]:
    """Operations per second of one large matrix product, the best of a few: the fastest kind here, and torch's own."""
    x, w = torch.randn(1024, 256), torch.randn(768, 256)

    def rate(multiply: Callable[[], Any]) -> float:
        def once() -> None:
            for _ in range(20):
                multiply()

        once()
        return 20 * 2 * x.numel() * len(w) / min(seconds(once) for _ in range(5))

    own = rate(lambda: torch.mm(x, w.T))
    return max(own, rate(lambda: products.product(x, w)) if products.usable() else 0.0), own


def seconds(f: Callable[[], Any]) -> float:
    """CPU seconds of a call."""
    start = time.process_time()
    f()
    return time.process_time() - start


def compare(work: Work, rounds: int, peaks: bool) -> dict[str, Any]:
    """One row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        a, b = Here(work), There(work, Folder(folder))
        old = [logp + 0.05 * torch.randn(logp.shape, generator=torch.Generator().manual_seed(2)) for logp in b.score()]
        apart = refuse_difference(a, b, old)
        inputs: dict[str, Any] = {side.name: side.given(old) for side in (a, b)}
        phases: dict[str, Callable[[Here | There], Any]] = {
            "score": lambda side: side.score(),
            "train": lambda side: side.train(inputs[side.name]),
        }
        if work.low == work.high:
            refuse_other_samples(a, b)
            phases = {"sample": full, **phases}
        spent: dict[str, dict[str, list[float]]] = {s.name: {name: [] for name in phases} for s in (a, b)}
        rate: list[tuple[float, float]] = []
        for n in range(rounds):
            rate.append(gemm())
            for side in (a, b) if n % 2 else (b, a):
                for name, run in phases.items():
                    spent[side.name][name].append(seconds(lambda run=run, side=side: run(side)))
    need = operations(work)
    sums = {"both": ("score", "train")} | ({"step": tuple(phases)} if "sample" in phases else {})
    for name, parts in sums.items():
        need[name] = sum(need[p] for p in parts)
        for times in spent.values():
            times[name] = [sum(some) for some in zip(*(times[p] for p in parts))]
    out: dict[str, Any] = {"work": work.name, "groups": work.prompts, "rounds": rounds, "apart": apart}
    out["gemm"], out["gemm_torch"] = (median(some) for some in zip(*rate))
    out["saved"] = need["saved"]
    for phase in (*phases, *sums):
        ratio = [y / x for x, y in zip(spent[a.name][phase], spent[b.name][phase])]
        limit = need[phase] / out["gemm"]
        ms = {s: 1000 * median(t[phase]) for s, t in spent.items()}
        out[phase] = {
            "ms": ms,
            "ratio": [median(ratio), min(ratio), max(ratio)],
            "of_limit": {s: 1000 * limit / t for s, t in ms.items()},
            "of_torch": {s: 1000 * need[phase] / out["gemm_torch"] / t for s, t in ms.items()},
            "completion_tokens_per_s": {s: 1000 * need["steps"] / t for s, t in ms.items()},
        }
    if peaks:
        out["peak_mb"] = {side: peak_of(side, work) for side in ("gruppo", "TRL")}
    return out


def peak_of(side: str, work: Work) -> float:
    """Megabytes that `train` adds to the resident set at its peak, in a process of its own."""
    call = f"import torch; from gruppo import bench; torch.set_num_threads(1); print(bench.peak({side!r}, bench.{work!r}))"
    command = [sys.executable, "-c", call]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise GruppoError(f"measuring the memory of {side} failed: {done.stderr.strip().splitlines()[-1:]}")
    return float(done.stdout.strip().splitlines()[-1])


def peak(side: str, work: Work) -> float:
    """The same, in this process (Linux)."""
    with tempfile.TemporaryDirectory() as folder:
        one = Here(work) if side == "gruppo" else There(work, Folder(folder))
        small = replace(work, prompts=1, prompt=16, low=4, high=4)  # what the first call loads is not the step's
        first = Here(small) if side == "gruppo" else There(small, Folder(folder) / "small")
        first.train(first.given(first.score()))  # pyright: ignore[reportArgumentType]
        if isinstance(one, Here):  # the comparison before the first use reads a piece, once per run
            one.policy._compared |= {"lse", "two"}
        inputs = one.given([torch.full((len(p),), -6.0) for g in one.groups for p in g.paths])
        Folder("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = _status("VmHWM")
        one.train(inputs)  # pyright: ignore[reportArgumentType]
        return (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    return next(int(line.split()[1]) for line in Folder("/proc/self/status").read_text().splitlines() if line.startswith(name))


LINEAR, ATTENTION, HEAD = "linear layers", "attention", "output head and its softmax"
BETWEEN, STARTING = "norms, rotary positions, activations, residuals, loss", "starting operations: Python, views, autograd"
PARTS = (LINEAR, ATTENTION, HEAD, BETWEEN, STARTING)
NUMBERS = (  # operations that compute or move numbers; whatever else is recorded only prepares them
    "add add_ mul mul_ div div_ sub sub_ neg pow mean sum rsqrt sqrt exp exp_ log silu silu_backward sigmoid softmax _softmax "
    "cat clamp minimum maximum where copy_ fill_ zero_ index index_put _index_put_impl_ gather index_select embedding "
    "embedding_dense_backward cos sin ge le eq lt gt masked_fill_ index_add_ scatter_add_ logaddexp addcmul_ abs max"
)
PRODUCTS = {"mm", "addmm", "bmm", "_linear_pointwise"}


def part_of(event: Any) -> str:
    """The part of a step that a recorded operation belongs to: by what called it, then by its own name."""
    caller = event
    while caller is not None:
        if "_Merged" in caller.name or "flash_attention" in caller.name:
            return ATTENTION
        if caller.name.startswith("_Read"):
            return HEAD
        caller = caller.cpu_parent
    name = event.name.rpartition("::")[2]
    return LINEAR if name in PRODUCTS else BETWEEN if name in NUMBERS.split() else STARTING


def profile(work: Work, rounds: int = 3) -> dict[str, list[float]]:
    """Milliseconds of `train` by part, and those that its operations take at the rate of the fastest large product.

    The profiler slows small operations down, so its shares are applied to a time measured without it.
    """
    side = Here(work)
    batch = side.given(side.score())
    side.train(batch)
    ms = 1000 * median(seconds(lambda: side.train(batch)) for _ in range(rounds))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        for _ in range(rounds):
            side.train(batch)
    spent: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    for event in seen.events() or ():
        spent[part_of(event)] += float(event.self_cpu_time_total)
    need, rate = operations(work), gemm()[0]
    return {part: [ms * t / sum(spent.values()), 1000 * need.get(part, 0.0) / rate] for part, t in spent.items()}


def table(found: list[dict[str, Any]], profiles: dict[str, dict[str, list[float]]]) -> str:
    """The Markdown page."""
    head = found[0]
    lines = [
        "# Training beside TRL's GRPOTrainer",
        "",
        f"`gruppo bench text`; random Qwen3 of 3.4 M parameters (24.7 M where named), float32, one thread, G = {G}, "
        f"{head['rounds']} alternating rounds, torch {torch.__version__}, {platform.processor() or platform.machine()}, "
        f"matrix products at {head['gemm'] / 1e9:.0f} GFLOP/s, torch's own at {head['gemm_torch'] / 1e9:.0f}.",
        "",
        "Equal work: the same weights, tokens, advantages and micro-batches; log-probabilities, loss and gradient agree to",
        f"{max(max(r['apart'].values()) for r in found):.0e} before anything is timed. Times are CPU seconds of one thread. "
        "*Limit*: the operations of the step with every",
        "shared token computed once, at the measured rate of the fastest large matrix product here; *of torch's*: the same at",
        "the rate of torch's own product, which is the slower one on processors where MKL leaves AVX-512 unused (those that are",
        "not Intel's). There gruppo multiplies by oneDNN, TRL and transformers do not. *Ratio*: TRL's time / gruppo's.",
        "*Sample* is timed where all completions have the full length: greedy decoding gives the same tokens on both sides,",
        "and every timed call returns the same number of tokens. Ragged completions have no such phase: two programs draw",
        "other lengths. Its limit is out of reach, since products of eight rows are not large. *Both* is score and train,",
        "*step* is all three.",
        "*Saved*: how many times as many operations full rows, padded to the longest, take. *Peak*: memory that one step adds.",
        "",
        "| prompt/completion | groups | phase | TRL ms | gruppo ms | ratio (min..max) | saved | completion tokens/s "
        "| of limit | of torch's |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in found:
        for phase in (name for name in ("sample", "score", "train", "both", "step") if name in r):
            p = r[phase]
            lines.append(
                f"| {r['work']} | {r['groups']} | {phase} | {p['ms']['TRL']:.0f} | {p['ms']['gruppo']:.0f} | "
                f"{p['ratio'][0]:.2f} ({p['ratio'][1]:.2f}..{p['ratio'][2]:.2f}) | {r['saved']:.2f} | "
                f"{p['completion_tokens_per_s']['gruppo']:.0f} (TRL {p['completion_tokens_per_s']['TRL']:.0f}) | "
                f"{p['of_limit']['gruppo']:.2f} (TRL {p['of_limit']['TRL']:.2f}) | "
                f"{p['of_torch']['gruppo']:.2f} (TRL {p['of_torch']['TRL']:.2f}) |"
            )
    if any("peak_mb" in r for r in found):
        lines += ["", "| prompt/completion | TRL peak MB | gruppo peak MB | gruppo / TRL |", "|---|---|---|---|"]
        for r in (r for r in found if "peak_mb" in r):
            mb = r["peak_mb"]
            lines.append(f"| {r['work']} | {mb['TRL']:.0f} | {mb['gruppo']:.0f} | {mb['gruppo'] / mb['TRL']:.2f} |")
    lines += ["", "![TRL / gruppo](train.svg)", ""]
    lines += misses(found)
    for name, parts in profiles.items():
        total = sum(ms for ms, _ in parts.values())
        lines += [
            f"Where gruppo's `train` spends {total:.0f} ms at {name}, and how much of that is the limit's:",
            "",
            "| part | share of the time | of that, at the limit |",
            "|---|---|---|",
        ]
        lines += [f"| {part} | {ms / total:.2f} | {least / ms if ms else 0:.2f} |" for part, (ms, least) in parts.items()] + [""]
    return "\n".join(lines)


WANTED = {  # times as fast as TRL, and of the limit at the rate of torch's own product
    "128/64": {"sample": 1.9, "train": 3.0, "step": 2.2},
    "128/16..256": {"train": 5.0},
    "1024/32": {"train": 8.0, "step": 6.9, "of_torch": 0.8},
    "1024/32@24.7M": {"train": 8.0, "of_torch": 0.8},
}
LEAST_MEMORY = 0.5  # of TRL's peak


def missed(row: dict[str, Any]) -> list[str]:
    """What this row does not reach of what is wanted, with both numbers."""
    out = []
    for what, least in WANTED.get(row["work"], {}).items():
        if what == "of_torch":
            figure, name = row["train"]["of_torch"]["gruppo"], "train, of the limit at torch's own product"
        elif what in row:
            figure, name = row[what]["ratio"][0], f"{what}, times as fast as TRL"
        else:
            continue
        if figure < least:
            out.append(f"{row['work']}: {name}, {figure:.2f} ({least:g} wanted)")
    mb = row.get("peak_mb")
    if mb and mb["gruppo"] > LEAST_MEMORY * mb["TRL"]:
        out.append(f"{row['work']}: peak memory over TRL's, {mb['gruppo'] / mb['TRL']:.2f} ({LEAST_MEMORY:g} wanted)")
    return out


def misses(found: list[dict[str, Any]]) -> list[str]:
    """Lines about what is wanted and not reached."""
    some = [line for row in found for line in missed(row)]
    known = [row["work"] for row in found if row["work"] in WANTED]
    if not known:
        return []
    return [
        "Wanted and not reached:" if some else f"What is wanted at {', '.join(known)} is reached.",
        "",
        *(f"* {x}" for x in some),
        "",
    ]


def draw(found: list[dict[str, Any]], file: Folder) -> None:
    """Bars of the ratio per work and phase, with the spread over rounds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    for n, phase in enumerate(("score", "train")):
        middle, low, high = zip(*(r[phase]["ratio"] for r in found))
        at = [i + 0.38 * (n - 0.5) for i in range(len(found))]
        error = [[m - lo for m, lo in zip(middle, low)], [hi - m for m, hi in zip(middle, high)]]
        axes.bar(at, middle, 0.36, yerr=error, capsize=3, label=phase, color=("#8fb3d9", "#2b5c8a")[n])
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(found)), [r["work"] for r in found])
    axes.set_ylabel("times as fast as TRL")
    axes.set_xlabel("prompt / completion tokens")
    axes.legend(frameon=False)
    figure.savefig(file)


def report(names: Sequence[str], rounds: int, out: Folder | None, *, memory: bool = True, profiled: bool = True) -> str:
    """Run the named works on one thread; the page, written with its numbers and plot where `out` is a folder."""
    wrong = [name for name in names if name not in WORKS]
    if wrong:
        raise GruppoError(f"there is no work {wrong[0]!r}; there are {', '.join(WORKS)}")
    if rounds < 1:
        raise GruppoError(f"{rounds} rounds were asked for; at least one is needed")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)
    works = [WORKS[name] for name in names]
    found = []
    for work in works:
        found.append(compare(work, rounds, memory))
        print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    slow = [r["work"] for r in found if missed(r)] or [found[0]["work"]]
    profiles = {name: profile(WORKS[name]) for name in slow} if profiled else {}
    beside = bench_vision.compare(rounds=rounds) if profiled else None
    page = table(found, profiles)
    if beside is not None:
        page += "\n" + "\n".join(bench_vision.table(beside))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "train.md").write_text(page)
        (out / "train.json").write_text(json.dumps({"rows": found, "profile": profiles, "vision": beside}, indent=1) + "\n")
        draw(found, out / "train.svg")
    return page
