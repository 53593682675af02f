"""The benchmark of flow models counts the same work that the recipes say they do."""

from __future__ import annotations

import torch

from gruppo.bench_flow import run, table


def test_counts_of_one_small_round() -> None:
    threads = torch.get_num_threads()
    rows = {r["method"]: r for r in run(steps=6, n=4, prompts=1, rounds=1)}
    assert torch.get_num_threads() == threads
    assert rows["dance-grpo"]["sampling calls"] == rows["mix-grpo"]["sampling calls"] == 4 * 6
    assert rows["dance-grpo"]["trained steps"] == 4 * 3  # int(5 x .6)
    assert rows["mix-grpo"]["trained steps"] == 4 * 4
    assert rows["mix-grpo"]["training calls"] == 4 * 3 + 1  # all paths of a prompt begin at one noise
    assert rows["mix-grpo-flash"]["sampling calls"] == 4 * 5  # the window of four and one step to the picture
    assert rows["branch-grpo"]["sampling calls"] < 4 * 6
    assert rows["dance-grpo"]["ratio"] == 1.0
    assert "| mix-grpo | " in table(list(rows.values()), "about")
