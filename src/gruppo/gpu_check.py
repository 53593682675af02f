"""What only a GPU can show, on a machine with CUDA and torch, transformers and peft: `make gpu-check`.

Nothing is downloaded; all weights are random. Checked, and a failure ends with exit code 1:

    long way   `evaluate` against the model's own logits of one row at a time: log-probabilities and gradient
    forms      shared prefixes in each form of the device, forced, against the ordinary forward; float32
    half       the same in bfloat16: beside the float32 numbers of the same weights, no form may err more than TIMES as much as
               the ordinary forward does
    adapter    the float32 checks of a form with a LoRA adapter on every layer
    sampler    the log-probabilities that sampling wrote down against those that training reads
    graphs     decoding with fixed shapes, on CUDA by graphs, against the ordinary rows: greedy tokens and log-probabilities in
               float32, and in bfloat16 what was sampled against what the trainer reads; that graphs were recorded at all
    memory     a training step with shared prefixes peaks no higher than one without

Timed and not judged: scoring and training of a 0.5 B Qwen3 in bfloat16 in each form, and the sampler's tokens per second, with
graphs and without.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path as Folder
from statistics import median
from typing import Any

import torch
from torch import Tensor

from gruppo.core.collate import collate
from gruppo.core.reduce import sequence_mean, weigh
from gruppo.recipe import Recipe
from gruppo.train import accumulate
from gruppo.types import Batch, Group, GruppoError, Path, Scope, Steps, Task

G = 8
CLOSE = 1e-4  # float32, another order of summation
TIMES = 2.0


@dataclass(frozen=True)
class Result:
    """One check: a figure, what it may be at most, and the sentence where there is no figure."""

    check: str
    figure: float
    allowed: float
    why: str = ""

    @property
    def holds(self) -> bool:
        return self.figure <= self.allowed  # NaN does not hold


class Clipped:
    """The clipped ratio of PPO, written out again: the recipes' own pieces need packages that this machine may not have."""

    scope: Scope = "step"
    reads_reference = False

    def __call__(self, batch: Batch, now: Steps, ref: Steps | None) -> tuple[Tensor, dict[str, Tensor]]:
        ratio = (now.logp - batch.logp_old).exp()
        return -torch.minimum(ratio * batch.advantage, ratio.clamp(0.8, 1.2) * batch.advantage), {}


def uncalled(*_: Any, **__: Any) -> Any:
    raise GruppoError("the checks bring their own paths and advantages")


METHOD = Recipe(rollout=uncalled, reward=uncalled, advantage=uncalled, loss=Clipped(), reduce=sequence_mean)


class Marks:
    """All that a policy asks of a tokenizer here."""

    pad_token_id, eos_token_id, chat_template = 0, 1, None

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids))


def network(size: str, dtype: torch.dtype, device: str) -> Any:
    """A random Qwen3: `tiny`, `small` (3.4 M) or `half` (0.53 B: Qwen3-0.6B's width and vocabulary, 24 layers)."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    width, layers, heads, groups, head, vocab = {
        "tiny": (32, 2, 4, 2, 8, 64),
        "small": (256, 4, 4, 2, 64, 512),
        "half": (1024, 24, 16, 8, 128, 151_936),
    }[size]
    shape = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers, "head_dim": head}
    rest = {"num_attention_heads": heads, "num_key_value_heads": groups, "vocab_size": vocab, "max_position_embeddings": 8192}
    marks: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "tie_word_embeddings": True}
    torch.manual_seed(0)
    config = Qwen3Config(**shape, **rest, **marks)  # pyright: ignore[reportArgumentType]
    model: Any = Qwen3ForCausalLM(config)
    return model.to(device=device, dtype=dtype).eval()


def policy_of(model: Any, form: Any = None, graphs: bool | None = None) -> Any:
    """A policy that reads every block of rows in this form, or never shares; its own comparison is left to the checks."""
    from gruppo.policies import prefix
    from gruppo.policies.token import TokenPolicy

    always = prefix.Rates(call=1e3, small=0.0, margin=-1e9)
    policy = TokenPolicy(model, Marks(), sharing=None if form is None else always, graphs=graphs)
    if form is not None:
        policy._compared.add(form)
        policy.distrusted.update({other: "another form is forced" for other in ("lse", "two", "flex") if other != form})
    return policy


def groups_of(prompts: int, prompt: int, low: int, high: int, vocab: int) -> list[Group]:
    """Random tokens, advantages and behaviour log-probabilities, the same each time."""
    g = torch.Generator().manual_seed(1)
    out = []
    for _ in range(prompts):
        p = torch.randint(2, vocab, (prompt,), generator=g)
        lengths = torch.randint(low, high + 1, (G,), generator=g)
        lengths[0] = high
        steps = [torch.randint(2, vocab, (int(n),), generator=g) for n in lengths]
        old = [0.1 * torch.randn(len(s), generator=g) for s in steps]
        paths = [Path(p, s, o, torch.ones(len(s), dtype=torch.bool)) for s, o in zip(steps, old)]
        out.append(Group(Task(p), paths, advantage=torch.randn(G, generator=g)[:, None].expand(G, high)))
    return out


def near(groups: list[Group], logp: list[Tensor]) -> Batch:
    """A weighted batch whose behaviour log-probabilities are close to these."""
    per = iter(logp)
    for g in groups:
        for p in g.paths:
            p.logp = next(per) + (p.logp if float(p.logp.abs().max()) < 1 else 0.0)
    return weigh(collate(groups), METHOD.reduce)


def long_way(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probabilities and gradient from the model's own logits, one row at a time, nothing padded or shared."""
    model.zero_grad(set_to_none=True)
    device, out = next(model.parameters()).device, torch.zeros(batch.mask.shape)
    for i, p in enumerate(batch.paths):
        n = len(p.steps)
        ids = torch.cat([p.prompt, p.steps])[None].to(device)
        said = model(input_ids=ids, use_cache=False).logits[0, len(p.prompt) - 1 : -1].float().log_softmax(-1)
        logp = said.gather(-1, p.steps.to(device)[:, None])[:, 0]
        one = batch.rows([i]).to(device)
        loss, _ = METHOD.loss(one, Steps(logp[None]), None)
        (one.weight * loss).sum().backward()
        out[i, :n] = logp.detach().cpu()
    return out, gradient(model)


def gradient(model: Any) -> Tensor:
    """Every gradient behind one another, on the CPU in float32."""
    return torch.cat([p.grad.flatten().float().cpu() for p in model.parameters() if p.grad is not None])


def read(policy: Any, batch: Batch, budget: int = 100_000) -> tuple[Tensor, Tensor]:
    """The policy's log-probabilities and gradient; a sentence where a forced form was not what ran."""
    policy.model.zero_grad(set_to_none=True)
    with torch.no_grad():
        logp = policy.evaluate(batch.to(policy.device)).logp.float().cpu()
    accumulate(policy, batch, METHOD, ref=None, budget=budget)
    if policy.cost is not None and not any(plan.layout.used for plan, pays in policy._plans.values() if pays):
        raise GruppoError("no forward computed shared prefixes once, so the form was not checked")
    return logp, gradient(policy.model)


def apart(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """The largest difference of log-probabilities, and the gradients' relative one."""
    return float((a[0] - b[0]).abs().max()), float((a[1] - b[1]).norm() / b[1].norm())


def attempt(check: str, measure: Callable[[], list[Result]]) -> list[Result]:
    """The check's results; what it raised is a result that does not hold, so that the others still run."""
    try:
        return measure()
    except Exception as error:  # a kernel that does not compile here must not hide the other forms
        return [Result(check, math.inf, 0.0, f"{type(error).__name__}: {error}"[:300])]


def parity(device: str, size: str) -> list[Result]:
    """Every way of reading log-probabilities against the long way round."""
    from gruppo.policies import prefix

    model = network(size, torch.float32, device)
    groups = groups_of(2, 40, 5, 23, model.config.vocab_size)
    with torch.no_grad():
        batch = near(groups, policy_of(model).score([p for g in groups for p in g.paths]))
    exact = long_way(model, batch)

    def compared(name: str, policy: Any, budget: int = 100_000) -> list[Result]:
        logp, grad = apart(read(policy, batch, budget), exact)
        return [Result(f"{name}: log-prob", logp, CLOSE), Result(f"{name}: gradient", grad, CLOSE)]

    out = attempt("ordinary, fp32", lambda: compared("ordinary, fp32", policy_of(model)))
    out += attempt("small blocks, fp32", lambda: compared("ordinary in small blocks, fp32", policy_of(model), 130))
    for form in prefix.forms(torch.device(device)):
        out += attempt(f"{form}, fp32", lambda form=form: compared(f"{form}, fp32", policy_of(model, form)))
    out += attempt("sampler, fp32", lambda: sampler_agrees(model))
    out += attempt("graphs", lambda: graphs_agree(device, size))
    half = network(size, torch.float32, device).to(torch.bfloat16)
    rounded = network(size, torch.float32, device)
    rounded.load_state_dict({k: v.float() for k, v in half.state_dict().items()})
    truth = long_way(rounded, batch)
    own = apart(read(policy_of(half), batch), truth)
    out += [Result("ordinary, bf16: log-prob", own[0], 0.25), Result("ordinary, bf16: gradient", own[1], 0.25)]

    def rough(form: Any) -> list[Result]:
        logp, grad = apart(read(policy_of(half, form), batch), truth)
        return [
            Result(f"{form}, bf16: log-prob", logp, TIMES * own[0]),
            Result(f"{form}, bf16: gradient", grad, TIMES * own[1]),
        ]

    for form in prefix.forms(torch.device(device)):
        out += attempt(f"{form}, bf16", lambda form=form: rough(form))
    return out + attempt("adapter", lambda: adapter(device, size, batch))


def sampler_agrees(model: Any) -> list[Result]:
    """What sampling said against what training reads."""
    policy = policy_of(model)
    prompt = torch.arange(2, 30)
    g = torch.Generator().manual_seed(0)
    paths = policy.sample([prompt] * G, g=g, max_new=24)
    off = max(float((p.logp - s).abs().max()) for p, s in zip(paths, policy.score(paths)))
    return [Result("sampler and trainer, fp32: log-prob", off, CLOSE)]


def graphs_agree(device: str, size: str) -> list[Result]:
    """Decoding with fixed shapes against the ordinary rows, while rows end and others enter."""
    from gruppo.policies import graphs

    model = network(size, torch.float32, device)
    policies = [policy_of(model, graphs=choice) for choice in (True, False)]
    vocab = model.config.vocab_size
    for policy in policies:
        policy.eos, policy.sample_rows = list(range(1, vocab // 32 + 2)), 12
    draw = torch.Generator().manual_seed(2)
    prompts = [torch.randint(2, vocab, (n,), generator=draw) for n in (3, 40, 17)]
    prompts = [p for p in prompts for _ in range(G)]

    def paths(policy: Any, temperature: float) -> list[Path]:
        return policy.sample(prompts, g=torch.Generator().manual_seed(0), max_new=80, temperature=temperature)

    greedy, wanted = (paths(policy, 0.0) for policy in policies)
    other = sum(a.steps.tolist() != b.steps.tolist() for a, b in zip(greedy, wanted))
    drawn, wanted = (paths(policy, 1.0) for policy in policies)
    same = [a.steps.tolist() == b.steps.tolist() for a, b in zip(drawn, wanted)]
    off_by = max(float((a.logp - b.logp).abs().max()) for a, b in zip(drawn, wanted)) if all(same) else math.inf
    out = [
        Result("graphs, fp32: greedy paths that differ", float(other), 0.0),
        Result("graphs, fp32: log-prob", off_by, CLOSE, "" if all(same) else f"{len(same) - sum(same)} paths differ"),
    ]
    half = network(size, torch.bfloat16, device)
    rough = policy_of(half, graphs=True)
    said = rough.sample(prompts, g=torch.Generator().manual_seed(0), max_new=40)
    gap = max(float((p.logp - s).abs().max()) for p, s in zip(said, rough.score(said)))
    out.append(Result("graphs, bf16, against the trainer: log-prob", gap, 0.25))
    for name, policy in (("fp32", policies[0]), ("bf16", rough)):
        with torch.no_grad():
            rows = graphs.rows(policy, True, 0, 64)
            rows.enter(torch.empty(0, dtype=torch.long, device=device), prompts[:2], hold=False)
            for _ in range(graphs.WARM + 3):
                rows.step(torch.full((2,), 5, device=device))
        recorded = isinstance(rows, graphs.GraphRows) and (device != "cuda" or len(rows.graphs) == 1)
        why = "" if recorded else "the ordinary rows decoded, or no graph was recorded; the warning above says why"
        out.append(Result(f"graphs, {name}: not taken", 0.0 if recorded else math.inf, 0.0, why))
    return out


def adapter(device: str, size: str, batch: Batch) -> list[Result]:
    """A form against the long way round with LoRA on every linear layer."""
    from peft import LoraConfig, get_peft_model

    from gruppo.policies import prefix

    model: Any = get_peft_model(network(size, torch.float32, device), LoraConfig(r=4, target_modules="all-linear"))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:  # zeros would leave the other half without gradient
                p.normal_(std=0.02)
    model.eval()
    exact = long_way(model, batch)
    form = prefix.forms(torch.device(device))[-1]
    logp, grad = apart(read(policy_of(model, form), batch), exact)
    return [Result(f"LoRA, {form}, fp32: log-prob", logp, CLOSE), Result(f"LoRA, {form}, fp32: gradient", grad, CLOSE)]


def clock(device: str, call: Callable[[], Any]) -> float:
    """Milliseconds of a call."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    call()
    wait()
    return 1000 * (time.perf_counter() - start)


def timed(device: str, size: str, works: list[tuple[int, int]], rounds: int) -> tuple[list[dict[str, Any]], list[Result]]:
    """One row per work and form: times in alternation, memory of a step over the weights, and whether sharing saves any."""
    from gruppo.policies import prefix
    from gruppo.policies.token import TokenPolicy

    model = network(size, torch.bfloat16, device)
    rows, results = [], []
    for prompt, high in works:
        groups = groups_of(1, prompt, high, high, model.config.vocab_size)
        paths = [p for g in groups for p in g.paths]
        budget = G * (prompt + high)
        forms: list[Any] = [None, *prefix.forms(torch.device(device))]
        policies = {str(f or "ordinary"): policy_of(model, f) for f in forms}
        policies["chosen"] = TokenPolicy(model, Marks())
        batch = near(groups, policies["ordinary"].score(paths, budget))
        spent: dict[str, dict[str, list[float]]] = {}
        peaks: dict[str, float | None] = {}

        def first(
            policy: Any, name: str, paths: list[Path] = paths, batch: Batch = batch, budget: int = budget, peaks: Any = peaks
        ) -> list[Result]:
            policy.score(paths, budget)
            step(policy, batch, budget)
            peaks[name] = peak(device, policy, batch, budget)
            return []

        for name, policy in list(policies.items()):  # untimed: compilation, and the policy's own comparison
            failed = attempt(f"{prompt}/{high}, {name}", lambda p=policy, n=name: first(p, n))
            results += failed
            if failed:
                del policies[name]
            else:
                spent[name] = {"score": [], "train": []}
        for _ in range(rounds):
            for name, policy in policies.items():
                spent[name]["score"].append(clock(device, lambda p=policy, x=paths, n=budget: p.score(x, n)))
                spent[name]["train"].append(clock(device, lambda p=policy, x=batch, n=budget: step(p, x, n)))
        base = spent.get("ordinary")
        for name, times in spent.items():
            row: dict[str, Any] = {"work": f"{prompt}/{high}", "form": name, "peak_mb": peaks[name]}
            if name == "chosen":
                row["form"] = "chosen: " + next((p.layout.form for p, pays in policies[name]._plans.values() if pays), "ordinary")
            for phase, ms in times.items():
                row[phase] = median(ms)
                if base is not None:
                    row[f"{phase} ratio"] = median(b / a for a, b in zip(ms, base[phase]))
            rows.append(row)
        for name, mb in peaks.items():
            if name not in ("ordinary", "chosen") and mb is not None and (own := peaks.get("ordinary")) is not None:
                results.append(Result(f"{prompt}/{high}, {name}: memory over ordinary", mb / own, 1.0))
    return rows, results


def step(policy: Any, batch: Batch, budget: int) -> None:
    """Forward and backward of the batch."""
    policy.model.zero_grad(set_to_none=True)
    accumulate(policy, batch, METHOD, ref=None, budget=budget)


def peak(device: str, policy: Any, batch: Batch, budget: int) -> float | None:
    """Megabytes that a step adds at its peak; None where the device does not count."""
    if device != "cuda":
        return None
    policy.model.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    accumulate(policy, batch, METHOD, ref=None, budget=budget)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def sampled(device: str, size: str, prompts: int, prompt: int, new: int, graphs: bool) -> dict[str, Any]:
    """Tokens per second of the sampler: groups of G, all of full length."""
    policy = policy_of(network(size, torch.bfloat16, device), graphs=graphs)
    policy.eos = [-1]
    g = torch.Generator(device=device).manual_seed(0)
    asked = [torch.randint(2, policy.config.vocab_size, (prompt,)) for _ in range(prompts)]
    rows = [p for p in asked for _ in range(G)]
    policy.sample(rows, g=g, max_new=2)
    ms = clock(device, lambda: policy.sample(rows, g=g, max_new=new))
    return {"rows": len(rows), "prompt": prompt, "new": new, "tokens_per_s": 1000 * len(rows) * new / ms}


def page(found: dict[str, Any]) -> str:
    """The Markdown page."""
    results = [Result(**r) for r in found["checks"]]
    failed = sum(not r.holds for r in results)
    lines = ["# Checks on a GPU", "", f"`make gpu-check`; {found['device']}, torch {found['torch']}.", ""]
    lines += [
        f"{len(results) - failed} of {len(results)} checks hold.",
        "",
        "| check | figure | allowed | holds |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {r.check} | {r.why or f'{r.figure:.2g}'} | {r.allowed:.2g} | {'yes' if r.holds else '**no**'} |" for r in results
    ]
    lines += ["", f"Times of {found['model']}, one group of {G}, medians of {found['rounds']} alternating rounds;"]
    lines += [
        "*ratio*: the ordinary forward's time over this one's; *peak*: memory that a training step adds, gradients included.",
        "",
    ]
    lines += ["| prompt/completion | form | score ms (ratio) | train ms (ratio) | peak MB |", "|---|---|---|---|---|"]
    for r in found["times"]:
        mb = "not counted" if r["peak_mb"] is None else f"{r['peak_mb']:.0f}"
        both = [f"{r[p]:.1f} ({r.get(f'{p} ratio', float('nan')):.2f})" for p in ("score", "train")]
        lines.append(f"| {r['work']} | {r['form']} | {both[0]} | {both[1]} | {mb} |")
    s, without = found["sampler"], found["sampler without graphs"]
    lines += [
        "",
        f"The sampler draws {s['tokens_per_s']:.0f} tokens/s, without graphs {without['tokens_per_s']:.0f}: {s['rows']} rows, "
        f"prompts of {s['prompt']}, {s['new']} new tokens.",
    ]
    if found["device"] == "cpu":
        lines += ["", "On a CPU no CUDA graph is recorded: the checks of graphs saw the fixed shapes alone."]
    return "\n".join(lines) + "\n"


def check(device: str, tiny: bool) -> dict[str, Any]:
    """Everything, as plain values. `tiny` shrinks all sizes: it shows that the checks run, its times mean nothing."""
    if device == "cuda" and not torch.cuda.is_available():
        raise GruppoError("gpu-check needs a CUDA device, and torch sees none here; nothing was checked")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # float32 means float32
    rounds = 1 if tiny else 5
    results = parity(device, "tiny" if tiny else "small")
    size = "tiny" if tiny else "half"
    times, more = timed(device, size, [(48, 6)] if tiny else [(512, 256), (1024, 128), (2048, 128)], rounds)
    works = (2, 16, 4) if tiny else (8, 256, 256)
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "torch": torch.__version__,
        "model": "a random Qwen3 of 0.53 B parameters in bfloat16" if not tiny else "a tiny random Qwen3 in bfloat16",
        "rounds": rounds,
        "checks": [asdict(r) for r in results + more],
        "times": times,
        "sampler": sampled(device, size, *works, graphs=True),
        "sampler without graphs": sampled(device, size, *works, graphs=False),
    }
    found["holds"] = all(r.holds for r in results + more)
    return found


def main(words: list[str] | None = None) -> int:
    """Check, print the page, write it; 0 when every check holds."""
    parser = argparse.ArgumentParser(prog="python -m gruppo.gpu_check", description="What only a GPU can show.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="Sizes that only show that the checks run.")
    parser.add_argument("--out", type=Folder, help="A folder for gpu.md and gpu.json.")
    given = parser.parse_args(words)
    warnings.simplefilter("ignore", FutureWarning)
    try:
        found = check(given.device, given.tiny)
    except GruppoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    text = page(found)
    print(text)
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "gpu.md").write_text(text)
        (given.out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    return 0 if found["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
