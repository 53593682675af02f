"""Train an image model on a reward of your own: pictures in, one number per picture out.

    python examples/images.py

The model is the small painter that ships with gruppo. A diffusers pipeline takes its place with `model="path/to/pipeline"` and
prompts of your own: `data=[{"prompt": "..."}, ...]`.
"""

from __future__ import annotations

import numpy as np

import gruppo


def emptiness(completions, **columns):
    """How much of the picture is ground: 1 for an empty canvas. A model that is paid for it alone forgets what was asked."""
    return [float((np.asarray(picture.convert("L")) > 200).mean()) for picture in completions]


def main(**numbers) -> gruppo.Run:
    """MixGRPO on correctness and emptiness together: pictures that are right and small."""
    return gruppo.train(
        recipe="mix-grpo",
        world="glyphs",
        rewards=[emptiness],
        weights={"correct": 1.0, "emptiness": 1.0},
        **numbers,
    )


if __name__ == "__main__":
    run = main(fit={"steps": 10})
    print(f"before {run.before}\nafter  {run.after}\nreport {run.folder / 'report.html'}")
