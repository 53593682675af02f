"""Pref-GRPO on pictures of shapes: a judge that compares two pictures, and a benchmark before and after.

    python examples/judged_pictures.py --steps 45        two and a half minutes of one CPU core

The judge prefers the picture that meets more test points of its prompt. Yours may be a vision-language model:

    from gruppo.graders.judge import WinRate
    from gruppo.graders.vision import Chat, VisionJudge
    preferred = WinRate(VisionJudge(Chat("http://127.0.0.1:8000/v1", "UnifiedReward")))

The same from the command line:

    gruppo train --recipe pref-grpo --world glyphs --reward gruppo.benchmarks.glyphs:preferred
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from gruppo.benchmarks.glyphs import glyph_checker, glyph_items, points, preferred
from gruppo.benchmarks.unigenbench import Result, evaluate, paint
from gruppo.graders.sources import build
from gruppo.policies.flow import FlowPolicy
from gruppo.policies.painters.glyph import GlyphPainter
from gruppo.recipes import recipe
from gruppo.train import iterate
from gruppo.worlds.glyphs import GLYPHS


def scored(policy: FlowPolicy, folder: Path, n: int) -> Result:
    """The set in UniGenBench's format, painted and judged."""
    items = glyph_items(n)
    return evaluate(items, paint(policy, items, folder, n=2), glyph_checker, n=2)


def main(steps: int = 45, prompts: int = 6, paths: int = 16, rate: float = 2e-4, items: int = 40) -> tuple[Result, Result]:
    """Train, and return the scores before and after."""
    policy = FlowPolicy(GlyphPainter.load(GLYPHS.base), steps=8)
    method = recipe("pref-grpo", n=paths, clip=0.01)
    grade = build([preferred, points], {"win_rate": 1.0})
    optimizer, rng = torch.optim.AdamW(policy.parameters(), lr=rate), torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        before = scored(policy, Path(folder) / "before", items)
        for step in range(steps):
            tasks = [GLYPHS.task(0, step * prompts + k) for k in range(prompts)]
            done = iterate(policy, tasks, grade, method, optimizer, rng)
            met = torch.cat([g.signals["points"] for g in done.groups]).mean()
            print(f"step {step + 1:3d}  points met {float(met):.3f}", flush=True)
        after = scored(policy, Path(folder) / "after", items)
    print(f"\nbefore\n{before.table()}\n\nafter\n{after.table()}")
    return before, after


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Pref-GRPO on pictures of shapes")
    parser.add_argument("--steps", type=int, default=45)
    parser.add_argument("--prompts", type=int, default=6, help="per step")
    parser.add_argument("--paths", type=int, default=16, help="pictures per prompt")
    given = parser.parse_args()
    main(given.steps, given.prompts, given.paths)
