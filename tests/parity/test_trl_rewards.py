"""Reward functions written for TRL get the same keywords and give the same rewards here, without a change to them.

TRL runs its own `_generate_and_score_completions` on a `datasets.Dataset`; gruppo reads the same dataset, samples the same
completions and grades them through `graders.sources.build`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="parity needs the extra: pip install 'gruppo[parity]'")

from datasets import Dataset
from tests.parity.tiny import LIMIT, TEMPERATURE, Replay, Tiny, build
from tests.tiny import tiny_tokenizer
from trl import GRPOConfig, GRPOTrainer
from trl.rewards import accuracy_reward, get_soft_overlong_punishment, think_format_reward

from gruppo.graders.sources import build as grading_of
from gruppo.rollouts import Parallel
from gruppo.runs.data import load_data
from gruppo.types import Group

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:You are using 'rollout_func':UserWarning"),
]

G = 4
COLUMNS = {
    "answer": ["3", "a", "d"],
    "kind": ["sum", "copy", "sum"],
    "numbers": [[1, 2], [], [7]],
    "nested": [{"level": 1}, {"level": 2}, {"level": 3}],
}
TEXT = ["1+2=", "a", "what is b+c?"]
CHAT = [[{"role": "system", "content": "be short"}, {"role": "user", "content": p}] for p in TEXT]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return build(tmp_path_factory.mktemp("qwen3"))


def text_of(completion: Any) -> str:
    return completion if isinstance(completion, str) else completion[0]["content"]


# Functions as people write them for TRL.


def length(completions, **kwargs):
    return [-abs(4 - len(text_of(c))) for c in completions]


def contains(prompts, completions, answer, **kwargs):
    return [float(a in text_of(c)) for c, a in zip(completions, answer)]


def sums_only(completions, kind, numbers, **kwargs):
    return [None if k != "sum" else len(text_of(c)) / (1 + sum(n)) for c, k, n in zip(completions, kind, numbers)]


def token_count(completion_ids, **kwargs):
    return [0.1 * len(ids) for ids in completion_ids]


async def judge(prompts, completions, nested, **kwargs):
    return [None if n["level"] == 2 else float(len(str(p)) % 5) for p, n in zip(prompts, nested)]


class Counting:
    """A callable object that logs as TRL lets it."""

    __name__ = "counting"

    def __call__(self, completions, trainer_state, log_extra, log_metric, **kwargs):
        log_extra("letters", [len(text_of(c)) for c in completions])
        log_metric("mean_letters", sum(len(text_of(c)) for c in completions) / len(completions))
        return [trainer_state.global_step + 0.5 for _ in completions]


FUNCTIONS: list[Callable[..., Any]] = [length, contains, sums_only, token_count, judge, Counting()]


def by_trl(tiny: Tiny, prompts: list[Any], functions: list[Callable[..., Any]], **columns: list[Any]) -> dict[str, list[float]]:
    """Each function's values as TRL logs them, one per path, NaN for None."""
    tokens = [c for group in tiny.completions for c in group]

    def rollout(asked: list[Any], trainer: GRPOTrainer) -> dict[str, Any]:
        return {"prompt_ids": [[5, 6]] * len(asked), "completion_ids": tokens, "logprobs": [[0.0] * len(c) for c in tokens]}

    data = Dataset.from_dict({"prompt": prompts, **columns})
    args = GRPOConfig(
        output_dir=str(tiny.folder / "trl"),
        use_cpu=True,
        bf16=False,
        report_to="none",
        activation_checkpointing=False,
        per_device_train_batch_size=len(tokens),
        num_generations=G,
        max_completion_length=LIMIT,
    )
    trainer = GRPOTrainer(str(tiny.folder), functions, args, data, processing_class=tiny_tokenizer(), rollout_func=rollout)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    trainer._generate_and_score_completions([dict(row) for row in data for _ in range(G)])
    return {name: list(values) for name, values in trainer._logs["rewards"].items()}


def here(tiny: Tiny, prompts: list[Any], functions: list[Callable[..., Any]], **columns: list[Any]) -> list[Group]:
    policy = Replay(tiny, holes=lambda row, t: False, gap=None, temperature=TEMPERATURE)
    tasks = load_data(Dataset.from_dict({"prompt": prompts, **columns}))
    return Parallel(G)(policy, tasks, grading_of(functions), torch.Generator())


@pytest.mark.parametrize("prompts", [TEXT, CHAT], ids=["strings", "chat"])
def test_same_rewards_as_trl(tiny, prompts):
    """Sync, async, an object, extra columns, None: every function's value for every path."""
    expected = by_trl(tiny, prompts, FUNCTIONS, **COLUMNS)
    groups = here(tiny, prompts, FUNCTIONS, **COLUMNS)
    assert set(expected) == {"length", "contains", "sums_only", "token_count", "judge", "counting"}
    for name, values in expected.items():
        got = torch.cat([g.signals[name] for g in groups]).tolist()
        assert got == pytest.approx(values, rel=1e-6, nan_ok=True), name
    assert sum(math.isnan(v) for v in expected["judge"]) == G


@pytest.mark.parametrize("prompts", [TEXT, CHAT], ids=["strings", "chat"])
def test_the_total_is_trls_weighted_nansum(tiny, prompts):
    """None leaves the rest of the sum standing; a path of which every function says None has no reward."""
    expected = by_trl(tiny, prompts, [sums_only, judge], **COLUMNS)
    totals = torch.cat([g.signals["reward"] for g in here(tiny, prompts, [sums_only, judge], **COLUMNS)])
    both = torch.tensor([expected["sums_only"], expected["judge"]])
    total = both.nansum(0).masked_fill(both.isnan().all(0), math.nan)
    torch.testing.assert_close(totals, total, equal_nan=True)
    assert int(total.isnan().sum()) == G


@pytest.mark.parametrize("prompts", [TEXT, CHAT], ids=["strings", "chat"])
def test_functions_see_the_keywords_that_trl_gives(tiny, prompts):
    """The same names and the same values, so that a function can rely on either."""
    seen: list[dict[str, Any]] = []

    def spy(**given):
        seen.append(given)
        return [0.0] * len(given["prompts"])

    by_trl(tiny, prompts, [spy], **COLUMNS)
    here(tiny, prompts, [spy], **COLUMNS)
    theirs, ours = seen
    assert ours.keys() == theirs.keys()
    helpers = ("trainer_state", "log_extra", "log_metric")
    assert {k: v for k, v in ours.items() if k not in helpers} == {k: v for k, v in theirs.items() if k not in helpers}
    assert type(ours["trainer_state"]) is type(theirs["trainer_state"])


@pytest.mark.parametrize("prompts", [TEXT, CHAT], ids=["strings", "chat"])
def test_trls_own_reward_functions_run_here(tiny, prompts):
    """The ones that ship with TRL; its accuracy and format rewards read chat messages only."""
    functions = [get_soft_overlong_punishment(LIMIT, 4)]
    if prompts is CHAT:
        functions += [think_format_reward, accuracy_reward]
    solution = {"solution": ["3", "$x$", "7"]}
    expected = by_trl(tiny, prompts, functions, **solution)
    groups = here(tiny, prompts, functions, **solution)
    for name, values in expected.items():
        assert torch.cat([g.signals[name] for g in groups]).tolist() == pytest.approx(values, nan_ok=True), name
