"""A run on a diffusers pipeline from a folder: prompts and a reward of one's own, an adapter, a checkpoint, resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.policies import pipelines
from tests.runs.small import Quiet, silent

from gruppo.runs.config import assemble
from gruppo.runs.session import Session

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(300)]  # diffusers warns about its own insides

REWARD = """
import numpy as np
def dark(completions, **columns):
    return [-float(np.asarray(picture.convert("L")).mean()) for picture in completions]
"""


@pytest.fixture(scope="module")
def brought(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a person brings: a pipeline's folder, a file of prompts, a reward in a file."""
    folder = tmp_path_factory.mktemp("brought")
    pipelines.tiny(pipelines.sd3).save_pretrained(folder / "sd3")
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": f"a {w}"}) + "\n" for w in ("cat", "dog", "red car", "tree"))
    )
    (folder / "dark.py").write_text(REWARD)
    return {
        "recipe": "mix-grpo",
        "recipe_args": {"window": 2, "tau": 1, "updates": 1},
        "model": str(folder / "sd3"),
        "data": str(folder / "prompts.jsonl"),
        "rewards": [f"{folder / 'dark.py'}:dark"],
        "policy": {"denoising_steps": 3, "threads": 1, "device": "cpu", "lora": {"rank": 2}, "guidance": 2.0},
        "fit": {"steps": 2, "prompts_per_step": 2, "paths_per_prompt": 2, "learning_rate": 1e-2},
        "eval": {"share": 0.25, "tasks": 2, "samples": 1},
        "track": {"save_every": 1, "groups_every": 1},
    }


def test_an_adapter_of_a_pipeline_is_trained_saved_and_resumed(brought: dict[str, Any], tmp_path: Path) -> None:
    made = Session.new(assemble(brought, {"folder": str(tmp_path)}), say=silent)
    before = [p.detach().clone() for p in made.policy.parameters()]
    made.run(Quiet())
    assert any(not torch.equal(a, b) for a, b in zip(before, made.policy.parameters()))
    records = made.folder.records(made.folder.metrics)
    assert [r["counts"]["trained"] for r in records] == [2 * 2 * 2] * 2
    assert (made.folder.checkpoint(2) / "state.pt").exists()

    class Stopped(Exception):
        pass

    def stop(step: int) -> None:
        if step == 2:
            raise Stopped

    first = Session.new(assemble(brought, {"folder": str(tmp_path)}), say=silent)
    with pytest.raises(Stopped):
        first.run(Quiet(stop))
    again = Session.resume(first.folder.path, say=silent)
    again.run(Quiet())
    for a, b in zip(made.policy.parameters(), again.policy.parameters()):
        assert torch.equal(a, b)
