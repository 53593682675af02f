"""XRPO (2510.06672). Paths go where they decide something, stuck prompts see solved ones, rare right answers earn more.

    h(n)   = t_{1 - a/2, n-1} s / sqrt(n)          half width of the interval of a prompt's mean grade; s the sample std
    Delta  = h(n) - h(n + 1)                       what one more path would take off it, with the same s
    phi    = sqrt(log(1 + T) / n)                  T paths spent in this step when the round is planned, n of them on this prompt
    Pi     = Delta + lam phi                       who gets the next path

    A+_i   = A_i + min( max(lam_nov (1 - eta_i), 0), kappa A_i )      for right paths with A_i > 0; the others keep A_i
    eta_i  = exp(s_i - sbar),  s_i = mean over the trained steps of logp,  sbar = mean of s over the group

Phase 1 gives every prompt the same number of paths, two more phases follow Pi, and all phases together spend exactly n paths
per prompt on average. A prompt whose paths all failed is asked, in later phases, behind k solved examples: the policy's own
verified solutions of the most similar other prompts, from a store that grows with the run, forgets the oldest and is saved with
it. A prompt's own solution is never its example.

The paper's body could not be read: its text is known here through its abstract, its reviewers and two third parties, and no code
is published. **The constants of the planner are not from the paper**; nor is whatever the table marks as ours.

| | here | paper, as far as known | reference code |
|---|---|---|---|
| phi | `bonus=root_log`, or `log_over`: log(1 + T) / n | of T and n; a third party writes it both ways | none published |
| T | paths spent in this step (ours) | not established | |
| lam | 0.05 (ours) | above 0, no value known | |
| a | 0.05 (ours) | free | |
| phases | 3, the first uniform | 3, statistics estimated again in each | |
| first phase | half of the budget (ours) | not established | |
| who gets a path | the highest Pi, one by one; `spend=proportional` (ours) | not established | |
| grades in s | raw `correct`, abstained ones left out (ours) | rewards | |
| examples | k = 2, from the store, cut to `longest` characters | 2, long solutions cut | |
| similarity | words in common; injected | embeddings by Qwen3-Embedding-8B | |
| nothing similar | the prompt as it is | the same | |
| store | 512 newest prompts, one solution each (ours) | growing | |
| loss of a seeded path | under the prompt that sampled it; `kept=as_posed`: the original (ours) | not established | |
| seeded paths | join the group (ours) | not established | |
| sbar | over all paths of the group; `among=the_right` | "the other rollouts" | |
| A_i <= 0 | no bonus: the printed formula would multiply penalties by 1 + kappa | "for correct responses" | |
| base | GRPO, sample std, eps 1e-6, mean over all paths of the step, no KL (ours) | GRPO and GSPO | |

With lam too large the bonus drowns Delta and the plan is uniform again; with 0 an unlucky hard prompt is never tried again.
`gruppo claim xrpo` measures both.

Hyper-parameters: lam_nov 2.5, kappa 0.5, k 2, 16 paths per prompt (paper, as its reviewers report it). All others are ours.

Cost: sampling in three rounds instead of one; graders see each round's paths as a group of their own. Seeded prompts are longer.

Not for: graders that compare the paths of a group (each round is judged by itself); together with dynamic sampling, which spends
the same budget; with the unlikeliness reward, which pays for rarity too; or with SEED-GRPO, which shrinks what this buys.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from gruppo.clusters import asked
from gruppo.core.likelihood import mean_logp
from gruppo.core.student import student_quantile
from gruppo.graders.grade import text_of
from gruppo.recipe import Recipe, Signal
from gruppo.recipes.grpo import GroupNorm, grpo
from gruppo.rollouts.allocate import Allocate, greedy
from gruppo.types import Group, GruppoError, Path, Task

# ---- who gets the next path


def root_log(T: int, n: int) -> float:
    """sqrt(log(1 + T) / n), the form of upper confidence bounds."""
    return math.sqrt(math.log1p(T) / n)


def log_over(T: int, n: int) -> float:
    """log(1 + T) / n, the other transcription."""
    return math.log1p(T) / n


def half_width(s: float, n: int, a: float) -> float:
    """t_{1 - a/2, n-1} s / sqrt(n)."""
    return student_quantile(1 - a / 2, n - 1) * s / math.sqrt(n)


@dataclass(frozen=True)
class Ambiguity:
    """Delta + lam * bonus(T, n): what one more path takes off the interval of the mean, plus a bonus for the rarely tried."""

    lam: float
    a: float = 0.05
    bonus: Callable[[int, int], float] = root_log

    def __post_init__(self) -> None:
        if not (self.lam >= 0 and 0 < self.a < 1):
            raise GruppoError(f"the plan needs lam of at least 0 and a between 0 and 1, not {self.lam} and {self.a}")

    def __call__(self, heard: Tensor, n: int, T: int) -> float:
        return self.narrowing(heard, n) + self.lam * self.bonus(T, max(n, 1))

    def narrowing(self, heard: Tensor, n: int) -> float:
        """h(n) - h(n + 1) with the s of the grades heard; 0 where fewer than two were."""
        if len(heard) < 2:
            return 0.0
        s = float(heard.double().std())
        return half_width(s, n, self.a) - half_width(s, n + 1, self.a)


# ---- what a stuck prompt is shown


@dataclass
class Solved:
    """The policy's own verified solutions, one per question, the newest `size` of them."""

    size: int = 512
    signal: str = "correct"
    items: dict[str, str] = field(default_factory=dict)  # question -> solution, the oldest first

    def __post_init__(self) -> None:
        if self.size < 1:
            raise GruppoError(f"the store of solved problems holds {self.size}; it must hold at least 1 (k=0 switches it off)")

    def update(self, groups: list[Group]) -> None:
        for group in groups:
            right = (group.signals[self.signal] == 1).nonzero()[:, 0].tolist()
            question = asked(group.task.prompt)
            if right and question:
                self.items.pop(question, None)
                self.items[question] = text_of(group.paths[right[0]].output)
        while len(self.items) > self.size:
            del self.items[next(iter(self.items))]

    def state_dict(self) -> dict[str, Any]:
        return {"items": [list(pair) for pair in self.items.items()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.items = dict(state["items"])


def lexical(question: str, known: Sequence[str]) -> list[float]:
    """The cosine of word counts; numbers and signs are words."""

    def words(text: str) -> Counter[str]:
        return Counter(re.findall(r"\w+|[^\w\s]", text.lower()))

    mine = words(question)
    size = math.sqrt(sum(v * v for v in mine.values()))
    out = []
    for text in known:
        theirs = words(text)
        both = sum(v * theirs[w] for w, v in mine.items())
        out.append(both / (size * math.sqrt(sum(v * v for v in theirs.values()))) if both else 0.0)
    return out


Examples = Sequence[tuple[str, str]]  # question and solution


def turns(prompt: Any, examples: Examples) -> Any:
    """Chat: a turn of the user and one of the assistant per example, behind a system message; text: lines above the prompt."""
    if isinstance(prompt, str):
        return "".join(f"{q}\n{s}\n\n" for q, s in examples) + prompt
    system = [m for m in prompt[:1] if m["role"] == "system"]
    shown = [m for q, s in examples for m in ({"role": "user", "content": q}, {"role": "assistant", "content": s})]
    return [*system, *shown, *prompt[len(system) :]]


def side_by_side(prompt: str, examples: Examples) -> str:
    """Text without anything in between, for vocabularies that have no white space."""
    return "".join(q + s for q, s in examples) + prompt


def as_asked(policy: Any, task: Task, paths: list[Path]) -> list[Path]:
    """Trained under the prompt with the examples, from which they were sampled: the ratio is exact."""
    return paths


def as_posed(policy: Any, task: Task, paths: list[Path]) -> list[Path]:
    """Trained under the original prompt, where their log-probs are read again: what counts at test time, but off-policy."""
    prompt = policy.encode(task.prompt)
    moved = [replace(p, prompt=prompt, off_policy=True) for p in paths]
    return [replace(p, logp=logp) for p, logp in zip(moved, policy.score(moved))]


@dataclass(frozen=True)
class Seeded:
    """Asks a stuck task behind the k most similar solved problems; the most similar stands last, next to the question."""

    solved: Solved
    k: int = 2
    similar: Callable[[str, Sequence[str]], Sequence[float]] = lexical
    template: Callable[[Any, Examples], Any] = turns
    kept: Callable[[Any, Task, list[Path]], list[Path]] = as_asked
    longest: int = 1000

    def ask(self, policy: Any, task: Task) -> Any:
        """The prompt with as many examples as the context has room for; None where no example is left."""
        examples = self.examples(asked(task.prompt))
        while examples:
            prompt = self.template(task.prompt, examples)
            if len(policy.encode(prompt)) + policy.max_new <= policy.context:
                return prompt
            examples = examples[1:]
        return None

    def keep(self, policy: Any, task: Task, paths: list[Path]) -> list[Path]:
        return self.kept(policy, task, paths)

    def examples(self, question: str) -> list[tuple[str, str]]:
        """Question and cut solution of the k most similar other problems, of equally similar ones the newest."""
        known = [q for q in self.solved.items if q != question]
        if not known or not self.k:
            return []
        scores = self.similar(question, known)
        if len(scores) != len(known):
            raise GruppoError(f"the retriever gave {len(scores)} similarities for {len(known)} solved problems")
        best = sorted((i for i in range(len(known)) if scores[i] > 0), key=lambda i: (scores[i], i))[-self.k :]
        return [(known[i], self.solved.items[known[i]][: self.longest]) for i in best]


# ---- what a rare right answer earns


def everybody(correct: Tensor) -> Tensor:
    """sbar over all paths of the group."""
    return torch.ones_like(correct, dtype=torch.bool)


def the_right(correct: Tensor) -> Tensor:
    """sbar over the right paths only."""
    return correct == 1


@dataclass(frozen=True)
class Sharpened:
    """The inner advantage, raised by at most kappa of itself for right paths that are less likely than the group's mean."""

    inner: Callable[[Group], Tensor]
    lam_nov: float
    kappa: float
    among: Callable[[Tensor], Tensor] = everybody
    signal: str = "correct"

    def __post_init__(self) -> None:
        if not (self.lam_nov >= 0 and self.kappa >= 0):
            raise GruppoError(f"lam_nov is {self.lam_nov} and kappa {self.kappa}; a bonus for novelty cannot be negative")

    def __call__(self, group: Group) -> Tensor:
        assert group.reward is not None
        A = self.inner(group)
        correct, score = group.signals[self.signal], mean_logp(group)
        heard = score.isfinite() & ~group.reward.isnan().cpu()
        bonus = self.bonus(correct, score, heard).to(A)[:, None]
        return A + torch.where(A > 0, torch.minimum(bonus, self.kappa * A), torch.zeros_like(A))

    def bonus(self, correct: Tensor, score: Tensor, heard: Tensor) -> Tensor:
        """max(lam_nov (1 - eta), 0) [n] of the right paths that were heard, 0 for the others."""
        mean = score[heard & self.among(correct)].mean()
        eta = (score - mean).exp()
        right = heard & (correct == 1)
        return torch.where(right, (self.lam_nov * (1 - eta)).clamp(min=0), torch.zeros_like(score))


def xrpo(
    n: int = 16,
    first: float = 0.5,
    phases: int = 3,
    lam: float = 0.05,
    a: float = 0.05,
    k: int = 2,
    lam_nov: float = 2.5,
    kappa: float = 0.5,
    beta: float = 0.0,
    low: float = 0.2,
    high: float = 0.2,
    eps: float = 1e-6,
    size: int = 512,
    longest: int = 1000,
    bonus: Callable = root_log,
    spend: Callable = greedy,
    similar: Callable = lexical,
    template: Callable = turns,
    kept: Callable = as_asked,
    among: Callable = everybody,
) -> Recipe:
    """Paths go to undecided prompts under one budget, prompts that always fail see solved ones, rare right answers earn more."""
    solved = Solved(size)
    rescue = Seeded(solved, k, similar, template, kept, longest) if k else None
    return replace(
        grpo(n, beta, low, high, eps),
        rollout=Allocate(n, Ambiguity(lam, a, bonus), first, phases, spend, rescue=rescue),
        advantage=Sharpened(GroupNorm(ddof=1, eps=eps), lam_nov, kappa, among),
        state=(solved,) if k else (),
        needs=(Signal("correct", "the plan, the store and the bonus read raw correctness"),),
    )
