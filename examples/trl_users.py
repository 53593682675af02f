"""A GRPO script written for TRL, and what has to change in it: nothing above the line, the call below it.

    python examples/trl_users.py                    train with gruppo, a minute or two on one CPU core
    python examples/trl_users.py --with trl         the same functions and data through TRL (pip install 'gruppo[parity]')

The table of all settings, TRL's name and the name here, is in docs/from-trl.md.
"""

from __future__ import annotations

import argparse
import random
import re
from typing import Any

from datasets import Dataset

from gruppo.worlds import WORLDS

BASE = str(WORLDS["arithmetic"].base)  # a trained model of half a million parameters that ships with gruppo; any folder works

# ---- from here to the next line: an ordinary TRL script ------------------------------------------------------------------


def sums(n: int, seed: int = 0) -> Dataset:
    """Chat prompts, and columns that the reward functions get by keyword."""
    draw, rows = random.Random(seed), []
    while len(rows) < n:
        numbers = [draw.randint(2, 60) for _ in range(draw.choice([2, 3]))]
        if sum(numbers) < 200:
            question = "+".join(map(str, numbers)) + "=?"
            rows.append({"prompt": [{"role": "user", "content": question}], "answer": str(sum(numbers)), "terms": len(numbers)})
    return Dataset.from_list(rows)


def correct(completions, answer, **kwargs):
    """1 when the tagged answer is the right number."""
    said = [re.search(r"<answer>(.*?)</answer>", c[0]["content"]) for c in completions]
    return [float(s is not None and s.group(1).strip() == a) for s, a in zip(said, answer)]


async def shows_work(completions, terms, **kwargs):
    """A little for writing a step; nothing to say (None) about sums of two numbers, which have only one."""
    return [None if n == 2 else 0.1 * ("=" in c[0]["content"]) for c, n in zip(completions, terms)]


def with_trl(dataset: Dataset, steps: int, output: str) -> None:
    from trl import GRPOConfig, GRPOTrainer

    args = GRPOConfig(
        output_dir=output,
        max_steps=steps,
        per_device_train_batch_size=64,  # 8 prompts x 8 completions
        num_generations=8,
        max_completion_length=48,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        loss_type="grpo",
        beta=0.0,
        temperature=1.0,
        use_cpu=True,
        bf16=False,
        report_to="none",
        logging_steps=1,
        save_strategy="no",
    )
    GRPOTrainer(model=BASE, reward_funcs=[correct, shows_work], args=args, train_dataset=dataset).train()


# ---- below: the same run with gruppo -------------------------------------------------------------------------------------


def with_gruppo(dataset: Dataset, steps: int, output: str) -> Any:
    import gruppo

    return gruppo.train(
        model=BASE,
        data=dataset,
        rewards=[correct, shows_work],
        recipe=gruppo.recipe("grpo", n=8, beta=0.0),  # loss_type, num_generations, beta
        policy={"max_new_tokens": 48, "temperature": 1.0},  # max_completion_length, temperature
        fit={"steps": steps, "prompts_per_step": 8, "learning_rate": 1e-4},  # max_steps, the batch in prompts, learning_rate
        eval={"tasks": 64, "samples": 1},  # a tenth of the rows is held out and tried before and after
        folder=output,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--with", dest="library", choices=["gruppo", "trl"], default="gruppo")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--output", default="runs")
    asked = parser.parse_args()
    run = with_gruppo if asked.library == "gruppo" else with_trl
    run(sums(2000), asked.steps, asked.output)
