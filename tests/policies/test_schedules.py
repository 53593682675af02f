"""Grids: published numbers, diffusers' own schedulers, and what every grid must be."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from gruppo.policies import schedules as S
from gruppo.types import GruppoError


def close(found: Tensor, expected: list[float], at: slice = slice(None), atol: float = 6e-9) -> None:
    assert found.dtype == torch.float64
    torch.testing.assert_close(found[at], torch.tensor(expected, dtype=torch.float64), atol=atol, rtol=0)


def test_stable_diffusion_3_in_ten_steps() -> None:
    close(
        S.twice_shifted(10, 3.0),
        [1, 0.96012931, 0.91334895, 0.85769231, 0.79036827, 0.70727848, 0.60215054, 0.46487603, 0.27804878, 0.00892857, 0],
    )


def test_linear_shifted_by_three() -> None:
    close(
        S.linear(10, 3.0),
        [1, 0.96428571, 0.92307692, 0.875, 0.81818182, 0.75, 0.66666667, 0.5625, 0.42857143, 0.25, 0],
    )
    assert [int(1000 * s) for s in S.linear(16, 3.0)[:-1]] == [
        1000, 978, 954, 928, 900, 868, 833, 794, 750, 700, 642, 576, 500, 409, 300, 166,
    ]  # fmt: skip


def test_flux_at_two_resolutions() -> None:
    mu = S.resolution_shift(1024)  # 512 x 512
    assert mu == pytest.approx(0.63)
    close(S.resolution_shifted(6, mu), [1, 0.90373557, 0.78970484, 0.65248946, 0.48421845, 0.27300333, 0])
    mu = S.resolution_shift(4096)  # 1024 x 1024
    assert math.exp(mu) == pytest.approx(3.158193, abs=1e-6)
    close(S.resolution_shifted(28, mu), [1, 0.98840865, 0.97622247], slice(0, 3))
    close(S.resolution_shifted(28, mu), [0.19545459, 0.10472089, 0], slice(-3, None))


def test_the_exponential_shift_is_a_shift_by_e_to_the_mu() -> None:
    t = torch.tensor([1.0, 0.8, 0.25, 0.01], dtype=torch.float64)
    told = math.exp(1.15) / (math.exp(1.15) + 1 / t - 1)
    torch.testing.assert_close(S.exponentially_shifted(t, 1.15), told, atol=1e-15, rtol=0)


def test_unipc_in_both_forms() -> None:
    close(S.unipc(20, 3.0), [0.999999, 0.982776, 0.964324], slice(0, 3), atol=6e-7)
    close(S.unipc(20, 3.0), [0.13871495, 0], slice(-2, None))
    close(S.unipc_below_one(20, 3.0), [0.99966644, 0.98241952, 0.96394110], slice(0, 3))
    close(S.unipc_below_one(20, 3.0), [0.13623966, 0], slice(-2, None))


def test_stable_diffusion_1() -> None:
    abar = S.scaled_linear_abar()
    close(abar[[981, 961, 1, 0]], [0.0057755001, 0.0072817271, 0.9982960278, 0.99915])
    assert S.ddim_timesteps(50)[:2] == [981, 961]
    assert S.ddim_timesteps(50)[-1] == 1
    grid = S.ddim(abar, 50)
    close(grid.square()[[0, 1, 49, 50]], [1 - 0.0057755001, 1 - 0.0072817271, 1 - 0.9982960278, 1 - 0.99915])
    assert float(S.ddim(abar, 50, to_one=True)[-1]) == 0


def flow_match(**config: object):
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**config)  # type: ignore[arg-type]


def same(scheduler: object, grid: Tensor) -> None:
    torch.testing.assert_close(scheduler.sigmas.double(), grid, atol=1e-6, rtol=0)  # type: ignore[attr-defined]


@pytest.mark.parametrize("steps", [1, 2, 10, 28])
def test_diffusers_flow_matching_schedulers(steps: int) -> None:
    scheduler = flow_match(shift=3.0)
    scheduler.set_timesteps(steps)
    same(scheduler, S.twice_shifted(steps, 3.0))

    scheduler.set_timesteps(sigmas=list(np.linspace(1, 0, steps + 1)[:-1]))
    same(scheduler, S.linear(steps, 3.0))

    scheduler = flow_match(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=list(np.linspace(1, 1 / steps, steps)), mu=0.63)
    same(scheduler, S.resolution_shifted(steps, 0.63))

    if steps > 1:
        scheduler = flow_match(use_dynamic_shifting=True, shift_terminal=0.02)
        scheduler.set_timesteps(sigmas=list(np.linspace(1, 1 / steps, steps)), mu=0.7)
        same(scheduler, S.resolution_shifted(steps, 0.7, terminal=0.02))


@pytest.mark.parametrize("steps", [1, 4, 20])
def test_diffusers_unipc_is_one_of_the_two_forms(steps: int) -> None:
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    scheduler.set_timesteps(steps)
    forms = [S.unipc(steps, 3.0), S.unipc_below_one(steps, 3.0)]
    assert min(float((scheduler.sigmas.double() - form).abs().max()) for form in forms) < 1e-6


@pytest.mark.parametrize("steps", [1, 7, 20, 50])
def test_diffusers_ddim(steps: int) -> None:
    from diffusers import DDIMScheduler

    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    scheduler = DDIMScheduler(**config, set_alpha_to_one=False)  # type: ignore[arg-type]
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == S.ddim_timesteps(steps)
    levels = [1 - scheduler.alphas_cumprod[t].double() for t in scheduler.timesteps]
    expected = torch.stack([*levels, 1 - scheduler.final_alpha_cumprod.double()]).sqrt()
    torch.testing.assert_close(S.ddim(S.scaled_linear_abar(), steps), expected, atol=1e-6, rtol=0)


GRIDS = {
    "linear": lambda n: S.linear(n, 3.0),
    "sd3": lambda n: S.twice_shifted(n, 3.0),
    "flux": lambda n: S.resolution_shifted(n, 1.15),
    "qwen": lambda n: S.resolution_shifted(n, 0.7, terminal=0.02),
    "unipc": lambda n: S.unipc(n, 5.0),
    "unipc_below_one": lambda n: S.unipc_below_one(n, 5.0),
    "ddim": lambda n: S.ddim(S.scaled_linear_abar(), n),
}


@pytest.mark.parametrize("name", GRIDS)
def test_a_grid_falls_from_at_most_one_to_the_picture(name: str) -> None:
    for steps in (2, 10, 50):
        grid = GRIDS[name](steps)
        assert grid.shape == (steps + 1,)
        assert grid.dtype == torch.float64
        assert float(grid[0]) <= 1
        assert bool((grid.diff() < 0).all())
        assert float(grid[-1]) == (0 if name != "ddim" else pytest.approx(0.00085**0.5))


def test_grids_that_cannot_be() -> None:
    with pytest.raises(GruppoError, match="0 steps"):
        S.linear(0)
    with pytest.raises(GruppoError, match=r"1 step cannot be stretched to end at 0\.02"):
        S.resolution_shifted(1, 0.7, terminal=0.02)
    with pytest.raises(GruppoError, match="1001 steps, but the network was trained on 1000"):
        S.ddim(S.scaled_linear_abar(), 1001)
