"""The checks for a GPU run on a CPU at tiny size, find a broken form, and need nothing but torch, transformers and peft."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gruppo import gpu_check
from gruppo.policies import graphs, prefix

MISSING = (
    "trl diffusers typer rich pytest datasets pydantic matplotlib pyarrow math_verify latex2sympy2_extended jaxtyping beartype"
)


def test_the_tiny_checks_hold_where_only_torch_transformers_and_peft_are_installed(tmp_path: Path) -> None:
    call = (
        f"import sys; sys.modules.update(dict.fromkeys({MISSING.split()!r})); from gruppo.gpu_check import main; "
        f"sys.exit(main(['--device', 'cpu', '--tiny', '--out', {str(tmp_path)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    found = json.loads((tmp_path / "gpu.json").read_text())
    named = {r["check"].split(":")[0] for r in found["checks"]}
    assert {"ordinary, fp32", "lse, fp32", "two, fp32", "lse, bf16", "two, bf16", "LoRA, two, fp32", "graphs, fp32"} <= named
    assert {r["form"].split(":")[0] for r in found["times"]} == {"ordinary", "lse", "two", "chosen"}
    page = (tmp_path / "gpu.md").read_text()
    assert "22 of 22 checks hold" in page
    assert "On a CPU no CUDA graph is recorded" in page


def test_a_wrong_form_and_one_that_fails_do_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = prefix._two

    def two(q, k, v, layout, scale, window, cap):  # values one percent too large
        return whole(q, k, v * 1.01, layout, scale, window, cap)

    def lse(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(prefix, "_two", two)
    monkeypatch.setattr(prefix._Merged, "forward", staticmethod(lse))
    results = {r.check: r for r in gpu_check.parity("cpu", "tiny")}
    assert not results["two, fp32: log-prob"].holds
    assert not results["two, fp32: gradient"].holds
    assert not results["LoRA, two, fp32: gradient"].holds
    assert not results["lse, fp32"].holds
    assert results["lse, fp32"].why == "RuntimeError: no such kernel"
    assert results["ordinary, fp32: gradient"].holds


def test_rows_of_fixed_shapes_that_differ_or_are_not_taken_do_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    run = graphs.GraphRows.step
    monkeypatch.setattr(graphs.GraphRows, "step", lambda self, token: run(self, token).roll(1, -1))
    with pytest.warns(UserWarning, match="differ"):
        results = {r.check: r.holds for r in gpu_check.graphs_agree("cpu", "tiny")}
    assert not results["graphs, fp32: not taken"]
    monkeypatch.setattr(graphs, "_compare", lambda policy: True)
    results = {r.check: r.holds for r in gpu_check.graphs_agree("cpu", "tiny")}
    assert [results[f"graphs, fp32: {name}"] for name in ("greedy paths that differ", "log-prob", "not taken")] == [
        False,
        False,
        True,
    ]


def test_a_form_that_was_not_used_is_no_result() -> None:
    model = gpu_check.network("tiny", torch.float32, "cpu")
    policy = gpu_check.policy_of(model, "two")
    policy.distrusted["two"] = "for this test"
    batch = gpu_check.near(groups := gpu_check.groups_of(1, 8, 3, 3, 64), [torch.zeros(3)] * len(groups[0]))
    (result,) = gpu_check.attempt("two", lambda: gpu_check.read(policy, batch) and [])
    assert not result.holds
    assert "no forward computed shared prefixes once" in result.why


def test_the_half_billion_model_has_that_size() -> None:
    with torch.device("meta"):
        model = gpu_check.network("half", torch.bfloat16, "meta")
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(0.533e9, rel=0.01)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_it_stops_with_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main([]) == 1
    said = capsys.readouterr()
    assert said.err == "error: gpu-check needs a CUDA device, and torch sees none here; nothing was checked\n"
    assert not said.out
