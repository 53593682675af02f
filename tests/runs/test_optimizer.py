"""AdamW as torch keeps it by default; with `fit.moments` as bitsandbytes keeps it, where that is installed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.runs.small import Quiet, files, session, silent, timeless

from gruppo.runs.config import FitSection, MomentsSection, assemble, merge
from gruppo.runs.optimizer import optimizer_of
from gruppo.runs.session import Session
from gruppo.types import GruppoError

quiet = pytest.mark.filterwarnings("ignore")  # bitsandbytes warns of kernels that it lacks on CPU


def weights(n: int = 5000) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.linspace(-1, 1, n)), torch.nn.Parameter(torch.zeros(8))]


def fit(**numbers: Any) -> FitSection:
    return FitSection.model_validate(numbers)


def test_without_moments_it_is_torch_adamw_with_the_runs_numbers():
    made = optimizer_of(weights(), fit(betas=(0.8, 0.99), weight_decay=0.1))
    assert type(made) is torch.optim.AdamW
    assert (made.defaults["betas"], made.defaults["weight_decay"], made.defaults["lr"]) == ((0.8, 0.99), 0.1, 0.0)


def test_a_missing_library_is_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(GruppoError, match=r"pip install 'gruppo\[lowbit\]', or remove fit.moments"):
        optimizer_of(weights(), fit(moments={}))


def test_paging_on_the_cpu_is_refused():
    with pytest.raises(GruppoError, match="this run is on the CPU, where they are already"):
        optimizer_of(weights(), fit(moments={"paged": True}))


def test_the_section_is_a_value_with_defaults():
    assert fit(moments={}).moments == MomentsSection(bits=8, paged=False)
    with pytest.raises(GruppoError, match=r"moments\.bits"):
        assemble({"fit": {"moments": {"bits": 4}}})


def test_a_stage_has_no_moments_of_its_own(tmp_path):
    with pytest.raises(GruppoError, match="one optimizer goes on over all stages"):
        assemble(merge(files(tmp_path), {"stages": [{"fit": {"moments": {}}}]}))


@quiet
def test_eight_bits_hold_a_quarter_and_move_the_weights_almost_alike():
    pytest.importorskip("bitsandbytes")
    own, theirs = weights(), weights()
    pair = optimizer_of(own, fit()), optimizer_of(theirs, fit(moments={}))
    g = torch.Generator().manual_seed(0)
    for _ in range(5):
        grads = [torch.randn(p.shape, generator=g) for p in own]
        for made, some in zip(pair, (own, theirs)):
            for group in made.param_groups:
                group["lr"] = 1e-2
            for p, grad in zip(some, grads):
                p.grad = grad.clone()
            made.step()
    large, small = pair[1].state[theirs[0]], pair[1].state[theirs[1]]
    assert large["state1"].dtype == large["state2"].dtype == torch.uint8
    assert small["state1"].dtype == torch.float32
    assert pair[1].defaults["betas"] == (0.9, 0.999)
    moved = own[0].detach() - weights()[0].detach()
    assert 0 < float((own[0] - theirs[0]).detach().norm() / moved.norm()) < 0.1
    torch.testing.assert_close(own[1], theirs[1], atol=1e-6, rtol=0)


@quiet
def test_a_run_with_eight_bits_resumes_bit_for_bit(tmp_path: Path):
    pytest.importorskip("bitsandbytes")

    class Killed(Exception):
        pass

    def kill(step: int) -> None:
        if step == 2:
            raise Killed

    def made(folder: Path) -> Session:
        small = {"fit": {"steps": 3, "prompts_per_step": 2, "paths_per_prompt": 4, "moments": {}}, "policy": {"threads": 1}}
        quick = {"policy": {"max_new_tokens": 8}, "eval": {"tasks": 0}, "track": {"save_every": 1, "groups_every": 0}}
        return Session.new(assemble(merge(small, quick), {"folder": str(folder)}), say=silent)

    whole = made(tmp_path / "whole")
    whole.run(Quiet())
    part = made(tmp_path / "part")
    with pytest.raises(Killed):
        part.run(Quiet(kill))
    again = Session.resume(part.folder.path, say=silent)
    assert again.step >= 1
    again.run(Quiet())
    for a, b in zip(whole.policy.parameters(), again.policy.parameters()):
        assert torch.equal(a, b)
    assert timeless(whole.folder.records(whole.folder.metrics)) == timeless(again.folder.records(again.folder.metrics))
    large = next(p for p in again.policy.parameters() if p.numel() >= 4096)
    assert again.optimizer.state[large]["state1"].dtype == torch.uint8


def test_the_default_run_is_untouched(tmp_path):
    assert type(session(tmp_path).optimizer) is torch.optim.AdamW
