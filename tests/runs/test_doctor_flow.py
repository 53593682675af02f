"""The doctor on models that paint: nothing on healthy ones, and each planted fault in a sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gruppo import api
from gruppo.policies.flow import CFG, FlowPolicy
from gruppo.policies.kernels import CPS, DDIM, DanceSDE, FlowSDE, Kernel, WanSDE, flow_ode
from gruppo.policies.schedules import ddim, linear, resolution_shifted, scaled_linear_abar, twice_shifted, unipc
from gruppo.recipe import Recipe
from gruppo.recipes.dance_grpo import dance_grpo
from gruppo.recipes.flow_fast import grpo_guard
from gruppo.recipes.flow_grpo import flow_grpo
from gruppo.recipes.golden_flow import Points, tiny_flow
from gruppo.rollouts import Trajectories
from gruppo.runs import build
from gruppo.runs import doctor as surgery
from gruppo.runs.doctor import Report, doctor, main
from gruppo.runs.doctor_flow import ending, law
from gruppo.worlds.glyphs import GLYPHS


def examined(policy: FlowPolicy, recipe: Recipe | None = None) -> Report:
    return doctor(policy, recipe, prompts=["a", "b"])


def failures(report: Report) -> dict[str, str]:
    return {c.name: c.sentence for c in report.failed}


class Faulty(Points):
    """The tiny painter with something done to what its network says."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change

    def predict(self, x: Tensor, sigma: Tensor, conditions: list[Any]) -> Tensor:
        return self.change(super().predict(x, sigma, conditions))


def faulty(change: Callable[[Tensor], Tensor], **numbers: Any) -> FlowPolicy:
    return FlowPolicy(Faulty(change), steps=6, **numbers)


class Epsilon(Points):
    """The same network, asked for epsilon on the grid of Stable Diffusion 1."""

    epsilon = True

    def sigmas(self, steps: int) -> Tensor:
        return ddim(scaled_linear_abar(), steps)


class Gridded(Points):
    def __init__(self, grid: Tensor) -> None:
        super().__init__()
        self.grid = grid

    def sigmas(self, steps: int) -> Tensor:
        return self.grid


def gridded(*levels: float) -> FlowPolicy:
    return FlowPolicy(Gridded(torch.tensor(levels, dtype=torch.float64)), steps=len(levels) - 1)


@pytest.mark.parametrize("recipe", [None, flow_grpo(), grpo_guard(), dance_grpo(), flow_grpo(beta=0.0, clip=0.1)])
def test_a_healthy_painter_has_nothing_to_report(recipe: Recipe | None) -> None:
    report = examined(tiny_flow(), recipe)
    assert failures(report) == {}
    assert report["sampler and trainer"].value == pytest.approx(0, abs=1e-4)
    assert report["masked steps"].value == 0.0
    assert "6 steps" in report["schedule"].sentence
    assert "took 2 calls" in report["shared calls"].sentence


def test_guided_and_epsilon_painters_are_healthy_too() -> None:
    report = examined(tiny_flow(cfg=CFG(3.0, negative="d")))
    assert failures(report) == {}
    assert "scale 3, gradient through both branches" in report["guidance"].sentence
    assert failures(examined(FlowPolicy(Epsilon(), steps=10), dance_grpo(ddim=1.0))) == {}


def test_nothing_of_the_policy_is_changed() -> None:
    policy = tiny_flow()
    first = next(iter(policy.parameters()))
    first.grad = torch.ones_like(first)
    policy.counts["sampled"] = 7
    weights = [p.clone() for p in policy.parameters()]
    examined(policy)
    assert dict(policy.counts) == {"sampled": 7}
    assert policy.rows == 64
    assert all(torch.equal(a, b) for a, b in zip(weights, policy.parameters()))
    assert [p.grad is None for p in policy.parameters()] == [False, True, True, True]
    assert float(first.grad.min()) == 1.0


@pytest.mark.parametrize(
    ("levels", "sentence"),
    [
        ((1.0, 0.6, 0.7, 0.0), "does not fall at step 1, from 0.6 to 0.7"),
        ((1.0, 0.6, 0.3, 0.1), "ends at 0.1, so noise would be left on every picture"),
        ((1.5, 0.6, 0.3, 0.0), "begins at 1.5, above pure noise"),
        ((1.0, float("nan"), 0.3, 0.0), "1 of them not finite"),
    ],
)
def test_a_broken_grid_is_found(levels: tuple[float, ...], sentence: str) -> None:
    report = examined(gridded(*levels))
    assert sentence in failures(report)["schedule"]
    assert [c.name for c in report.checks] == ["schedule", "noise"]


class Driftless(FlowSDE):
    """Noise that nothing takes back."""

    def mean(self, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, level: Tensor) -> Tensor:
        return flow_ode(x, v, sigma, sigma_next)


class Literal(FlowSDE):
    """The formula as it stands, just below 1 as well."""

    def levels(self, sigmas: Tensor) -> Tensor:
        sigma = sigmas[:-1].double().clamp(max=1 - 1e-6)
        return self.eta * (sigma / (1 - sigma)).sqrt()


def with_kernel(kernel: Kernel) -> Recipe:
    return replace(flow_grpo(beta=0.0), rollout=Trajectories(4, kernel))


def test_the_law_of_the_steps_is_the_published_one() -> None:
    S = linear(10)
    for kernel, spread in ((FlowSDE(0.7), 0.4796), (DanceSDE(0.3), 0.441), (CPS(0.8), 0.351)):
        assert ending(kernel, S, kernel.levels(S), False) == pytest.approx(spread, abs=0.003)
    assert ending(FlowSDE(), S, torch.zeros(10, dtype=torch.float64), False) == pytest.approx(0.431, abs=0.001)
    assert ending(Driftless(0.7), linear(40), FlowSDE(0.7).levels(linear(40)), False) == pytest.approx(0.971, abs=0.003)
    fine = ddim(scaled_linear_abar(), 500, to_one=True)
    assert ending(DDIM(1.0), fine, DDIM(1.0).levels(fine), True) == pytest.approx(0.5, abs=0.01)


def test_noise_that_is_not_taken_back_is_found() -> None:
    assert "come out with" in failures(examined(FlowPolicy(Points(), steps=40), with_kernel(Driftless(0.7))))["noise"]
    below = FlowPolicy(Gridded(unipc(20, 3.0)), steps=20)
    assert "is not taken back on this grid" in failures(examined(below, with_kernel(Literal(0.7))))["noise"]
    for kernel in (FlowSDE(0.7), DanceSDE(0.3), WanSDE(), CPS(0.8)):
        for grid in (
            unipc(20, 3.0),
            unipc(20, 3.0).float(),
            twice_shifted(10, 3.0),
            resolution_shifted(6, 0.63),
            linear(16, 3.0),
        ):
            check = law(FlowPolicy(Gridded(grid), steps=len(grid) - 1), kernel)
            assert check.verdict == "ok", (kernel, grid, check)


def test_a_network_that_looks_at_the_rest_of_the_batch_is_found() -> None:
    found = failures(examined(faulty(lambda v: v + 0.5 * v.mean(0, keepdim=True))))
    assert "rows are not independent in this network" in found["company"]
    assert "differ by up to" in found["sampler and trainer"]
    assert "changes by" in found["micro-batch"]


def test_noise_in_the_network_is_found() -> None:
    found = failures(examined(faulty(lambda v: v + 0.1 * torch.randn_like(v))))
    assert "something in the network is random" in found["repeatable"]
    assert "does not answer equal questions equally" in found["shared calls"]


def test_another_reading_in_training_is_found() -> None:
    found = failures(examined(faulty(lambda v: v * (1.1 if torch.is_grad_enabled() else 1.0))))
    assert "the ratio before the first update is off 1 by" in found["ratio"]


def test_latents_that_break_are_found() -> None:
    found = failures(examined(faulty(lambda v: v.masked_fill(torch.ones_like(v, dtype=torch.bool), float("inf")))))
    assert list(found) == ["latents"]
    assert "not finite, first behind step 0" in found["latents"]


def test_rounding_beyond_the_clip_range_is_a_warning() -> None:
    policy = faulty(lambda v: v + 1e-4 * v.mean(0, keepdim=True))
    assert examined(policy, flow_grpo(beta=0.0, clip=1e-6))["ratio"].verdict == "warn"
    assert examined(policy, flow_grpo(clip=1e-6))["ratio"].verdict == "warn"  # below a divergence too
    assert examined(policy, flow_grpo(clip=0.2))["ratio"].verdict == "ok"


def test_a_loss_that_trains_masked_steps_is_found() -> None:
    class Leaky:
        scope = "path"

        def __call__(self, batch: Any, now: Any, ref: Any) -> Any:
            return -now.logp * (batch.advantage + batch.advantage.mean()), {}

    found = failures(examined(tiny_flow(), replace(flow_grpo(beta=0.0), loss=Leaky())))
    assert "masked steps are trained" in found["masked steps"]


def test_the_command_examines_the_world_of_pictures(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(None, True, "glyphs") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["healthy"] is True
    assert {"schedule", "noise", "sampler and trainer", "micro-batch", "shared calls"} <= {c["name"] for c in report["checks"]}
    assert "diffusers" in report["versions"]


def test_a_folder_with_a_pipeline_is_known_as_a_painter(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(surgery, "doctor", lambda policy, *rest, **numbers: seen.append((policy, *rest)) or Report([]))
    assert main(str(GLYPHS.base), False) == 0
    assert main(str(GLYPHS.base), False, "glyphs") == 0
    assert [type(policy) for policy, *_ in seen] == [FlowPolicy] * 2
    assert seen[1][1] == flow_grpo(n=16, beta=0.0, last=False, share=0.5, clip=1e-3)  # as the world would train it


def test_a_pipeline_on_the_hub_is_known_as_a_painter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No recipe is named to the doctor or to an evaluation, so the hub is asked."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda source, name: name)
    loaded, seen = [], []
    monkeypatch.setattr(build, "painting_policy", lambda config, source, peft: loaded.append(source) or tiny_flow())
    monkeypatch.setattr(surgery, "doctor", lambda policy, *rest, **numbers: seen.append(policy) or Report([]))
    assert main("somebody/some-pipeline", False) == 0
    assert loaded == ["somebody/some-pipeline"]
    assert isinstance(seen[0], FlowPolicy)

    class Built(Exception):
        pass

    def built(config: Any) -> None:
        assert build.paints(config)
        raise Built

    monkeypatch.setattr(api, "build_policy", built)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a red circle"}\n' * 40)
    with pytest.raises(Built):
        api.evaluation_of("somebody/some-pipeline", data=str(rows), rewards=["gruppo.graders.images:JpegSize"])
