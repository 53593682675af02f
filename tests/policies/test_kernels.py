"""Every kernel and solver against worked numbers and against marginals that are known."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from gruppo.policies.kernels import CPS, DDIM, DanceSDE, DPMSolver2M, FlowSDE, Kernel, WanSDE, flow_ode, over
from gruppo.policies.schedules import linear, twice_shifted, unipc, unipc_below_one
from gruppo.types import GruppoError

X = torch.tensor([[0.5, -1.0]], dtype=torch.float64)
V = torch.tensor([[0.2, 0.4]], dtype=torch.float64)
EPS = torch.tensor([[1.0, -0.5]], dtype=torch.float64)


def near(found: Tensor, *expected: float, atol: float = 1e-9) -> None:
    torch.testing.assert_close(found.flatten().double(), torch.tensor(expected, dtype=torch.float64), atol=atol, rtol=0)


def step(kernel: Kernel, grid: list[float], t: int, v: Tensor = V, eps: Tensor = EPS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """mean, deviation, next latent and its log-density."""
    S = torch.tensor(grid, dtype=torch.float64)
    level, a, b = kernel.levels(S)[t : t + 1], S[t : t + 1], S[t + 1 : t + 2]
    mean, sd = kernel.mean(X, v, a, b, level), kernel.deviation(a, b, level)
    after = mean + over(sd, X) * eps
    return mean, sd, after, kernel.logp(after, mean, sd)


def reread(kernel: Kernel, grid: list[float], t: int, after: Tensor, v: Tensor) -> Tensor:
    S = torch.tensor(grid, dtype=torch.float64)
    level, a, b = kernel.levels(S)[t : t + 1], S[t : t + 1], S[t + 1 : t + 2]
    return kernel.logp(after, kernel.mean(X, v, a, b, level), kernel.deviation(a, b, level))


def test_flow_sde_inside_the_grid() -> None:
    mean, sd, after, logp = step(FlowSDE(0.7), [1, 0.8, 0.6, 0], 1)
    near(FlowSDE(0.7).levels(torch.tensor([1, 0.8, 0.6, 0]))[1:2], 1.4, atol=1e-6)
    near(mean, 0.3277, -0.8546)
    near(sd, 0.6260990337)
    near(after, 0.9537990337, -1.1676495168)
    near(logp, -0.7631918136)


def test_flow_sde_at_pure_noise_takes_the_second_value_of_the_grid() -> None:
    mean, sd, after, logp = step(FlowSDE(0.7), [1, 0.9, 0], 0)
    near(FlowSDE(0.7).levels(torch.tensor([1, 0.9, 0], dtype=torch.float64))[:1], 2.2135943621)
    near(mean, 0.3575, -0.795)
    near(sd, 0.7)
    near(after, 1.0575, -1.145)
    near(logp, -0.8747635893)


def test_a_grid_that_begins_a_rounding_error_above_1_is_pure_noise() -> None:
    S = torch.tensor([1.0000000000000002, 0.9, 0.5, 0.0], dtype=torch.float64)
    near(FlowSDE(0.7).levels(S)[:1], 2.2135943621)
    assert FlowSDE().levels(S).isfinite().all()


@pytest.mark.parametrize("grid", [unipc(20, 3.0), unipc(20, 3.0).float(), unipc_below_one(20, 3.0), unipc_below_one(20, 5.0)])
def test_a_grid_that_begins_a_hair_below_1_is_pure_noise(grid: Tensor) -> None:
    """By the formula s were 700 or 38 there, and the mean's factor 1 - s^2 h / (2 sigma) about -4000 or -12."""
    S, level = grid.double(), FlowSDE(0.7).levels(grid)
    near(level[:1], 0.7 * math.sqrt(float(S[0] / (1 - S[1]))), atol=1e-6)
    keep = 1 - level.square() * (S[:-1] - S[1:]) / (2 * S[:-1])
    assert bool((keep > 0.5).all())
    assert bool((keep < 1).all())


def test_a_grid_that_begins_elsewhere_follows_the_formula() -> None:
    near(FlowSDE(0.7).levels(torch.tensor([0.8, 0.6, 0.0], dtype=torch.float64)), 1.4, 0.7 * math.sqrt(1.5))


@pytest.mark.parametrize("kernel", [FlowSDE(), DanceSDE(), WanSDE(), CPS()])
def test_a_schedule_in_single_precision_is_the_same_schedule(kernel: Kernel) -> None:
    for S in (linear(10, 3.0), twice_shifted(10, 3.0)):
        rough = S.float()
        torch.testing.assert_close(kernel.levels(rough), kernel.levels(S), atol=1e-6, rtol=1e-6)
        both = [kernel.deviation(g[:-1].double(), g[1:].double(), kernel.levels(S)) for g in (S, rough)]
        torch.testing.assert_close(*both, atol=1e-6, rtol=0)


def test_dance_is_finite_at_pure_noise() -> None:
    mean, sd, _, logp = step(DanceSDE(0.3), [1, 0.9, 0], 0)
    near(sd, 0.3 * math.sqrt(0.1))
    near(mean, *(0.5 * (1 - 0.045 * 0.1) - 0.2 * 0.1, -1 * (1 - 0.045 * 0.1) - 0.4 * 0.1))
    assert bool(logp.isfinite())


def test_another_velocity_changes_the_ratio() -> None:
    _, _, after, logp = step(FlowSDE(0.7), [1, 0.8, 0.6, 0], 1)
    again = reread(FlowSDE(0.7), [1, 0.8, 0.6, 0], 1, after, torch.tensor([[0.21, 0.38]], dtype=torch.float64))
    near(again, -0.7671885910)
    near((again - logp).exp(), 0.9960111991)


def test_dance_sde() -> None:
    mean, sd, after, logp = step(DanceSDE(0.3), [1, 0.8, 0.6, 0], 1)
    near(mean, 0.453925, -1.06965)
    near(sd, 0.1341640786)
    near(after, 0.5880890786, -1.1367320393)
    near(logp, 0.7772532273)
    near(DanceSDE().clean(X, V, torch.tensor([0.8], dtype=torch.float64)), 0.34, -1.32)


def test_dance_is_flow_where_their_levels_agree() -> None:
    """eta .15 of the one is s = .3 at sigma .8, which is the other's constant."""
    for a, b in zip(step(FlowSDE(0.15), [1, 0.8, 0.6, 0], 1), step(DanceSDE(0.3), [1, 0.8, 0.6, 0], 1)):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_wan_falls_linearly_with_sigma() -> None:
    S = torch.tensor([0.999999, 0.9, 0.5, 0.0], dtype=torch.float64)
    near(WanSDE().levels(S), 0.9 * 0.999999, 0.81, 0.45)


def test_cps() -> None:
    mean, sd, after, logp = step(CPS(0.8), [1, 0.8, 0.6, 0], 1)
    near(sd, 0.5706339098)
    near(mean, 0.2361215062, -0.6985773809)
    near(after, 0.8067554160, -0.9838943358)
    near(logp, -0.2035144119)
    again = reread(CPS(0.8), [1, 0.8, 0.6, 0], 1, after, torch.tensor([[0.21, 0.38]], dtype=torch.float64))
    near((again - logp).exp(), 0.9967564096)


def test_cps_at_its_ends() -> None:
    mean, sd, _, _ = step(CPS(1.0), [1, 0.8, 0.6, 0], 1)
    near(mean, 0.136, -0.528)
    near(sd, 0.6)
    S = torch.tensor([0.8, 0.6], dtype=torch.float64)
    still = CPS(0.8).mean(X, V, S[:1], S[1:], torch.zeros(1, dtype=torch.float64))
    near(still, 0.46, -1.08)  # without noise it is the ODE
    near(CPS(0.8).levels(torch.tensor([0.3, 0.0])), 0.0)  # nothing is drawn on the step to the picture


def test_ddim() -> None:
    e = torch.tensor([[0.3, -0.2]], dtype=torch.float64)
    mean, sd, after, logp = step(DDIM(1.0), [math.sqrt(0.5), math.sqrt(0.3)], 0, v=e)
    near(sd, 0.4140393356)
    near(DDIM().clean(X, e, torch.tensor([math.sqrt(0.5)], dtype=torch.float64)), 0.4071067812, -1.2142135624)
    near(mean, 0.4481805452, -1.0875976679)
    near(after, 0.8622198808, -1.2946173357)
    near(logp, -0.3496442371)


def test_eta_of_ddim_scales_the_deviation() -> None:
    """var = .3/.5 (1 - .5/.7); sd = eta sqrt(var), and what sd takes from the direction to the noise depends on it."""
    e = torch.tensor([[0.3, -0.2]], dtype=torch.float64)
    mean, sd, _, _ = step(DDIM(0.5), [math.sqrt(0.5), math.sqrt(0.3)], 0, v=e)
    near(sd, 0.5 * 0.4140393356)
    clean, rest = torch.tensor([0.4071067812, -1.2142135624]), math.sqrt(0.3 - 0.25 * 0.1714285714)
    near(mean, *(math.sqrt(0.7) * clean + rest * torch.tensor([0.3, -0.2])).tolist(), atol=1e-6)


def test_ddim_on_the_first_and_last_step_of_stable_diffusion() -> None:
    e = torch.tensor([[0.3, -0.2]], dtype=torch.float64)
    first = [math.sqrt(1 - 0.0057755001), math.sqrt(1 - 0.0072817271)]
    mean, sd, _, _ = step(DDIM(1.0), first, 0, v=e)
    near(sd, 0.4544632724, atol=1e-6)
    near(mean, 0.4915451173, -1.0762645455, atol=1e-6)
    last = [math.sqrt(1 - 0.9982960278), math.sqrt(1 - 0.99915)]
    _, sd, _, logp = step(DDIM(1.0), last, 0, v=e)
    near(sd, 0.0206483202, atol=1e-6)
    near(logp, 2.6486827776, atol=1e-4)


@pytest.mark.parametrize("kernel", [FlowSDE(), DanceSDE(), WanSDE(), CPS()])
def test_without_noise_every_flow_kernel_is_the_ode(kernel: Kernel) -> None:
    S = torch.tensor([0.8, 0.6], dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.float64)
    torch.testing.assert_close(kernel.mean(X, V, S[:1], S[1:], zero), flow_ode(X, V, S[:1], S[1:]), atol=1e-12, rtol=0)
    near(flow_ode(X, V, S[:1], S[1:]), 0.46, -1.08)
    assert float(kernel.deviation(S[:1], S[1:], zero)) == 0


def test_the_log_density_is_a_mean_over_elements() -> None:
    """Twice as many elements of the same kind have the same log-density; a sum would double it."""
    mean, sd = torch.zeros(1, 3), torch.tensor([0.5])
    after = torch.tensor([[0.1, -0.2, 0.3]])
    for kernel in (FlowSDE(), DanceSDE(), CPS(), DDIM()):
        once = kernel.logp(after, mean, sd)
        twice = kernel.logp(torch.cat([after, after], 1), torch.zeros(1, 6), sd)
        torch.testing.assert_close(once, twice)


@pytest.mark.parametrize("make", [FlowSDE, DanceSDE, DDIM, CPS])
def test_a_kernel_without_noise_is_refused(make: type) -> None:
    with pytest.raises(GruppoError, match="eta"):
        make(0.0)


# -- marginals: data N(1, .5^2), the exact velocity, so the end must have that mean and deviation


def velocity(x: Tensor, sigma: float) -> Tensor:
    """E[x1 - x0 | x] for x = (1 - sigma) x0 + sigma x1."""
    a, var = 1 - sigma, (1 - sigma) ** 2 * 0.25 + sigma**2
    x0 = 1 + a * 0.25 / var * (x - a)
    x1 = sigma / var * (x - a)
    return x1 - x0


def ends(kernel: Kernel, steps: int, *, ode: bool = False, correct: bool = True, n: int = 100_000) -> tuple[float, float]:
    g = torch.Generator().manual_seed(0)
    S = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    level = torch.zeros(steps, dtype=torch.float64) if ode else kernel.levels(S)
    x = torch.randn(n, 1, generator=g, dtype=torch.float64)
    for t in range(steps):
        a, b, s = (u.expand(n) for u in (S[t], S[t + 1], level[t]))
        v = velocity(x, float(S[t]))
        mean = kernel.mean(x, v, a, b, s) if correct else flow_ode(x, v, a, b)
        x = mean + over(kernel.deviation(a, b, s), x) * torch.randn(n, 1, generator=g, dtype=torch.float64)
    return float(x.mean()), float(x.std())


def test_flow_sde_has_the_marginals_of_the_ode() -> None:
    mean, std = ends(FlowSDE(0.7), 40)
    assert mean == pytest.approx(1.0, abs=0.01)
    assert std == pytest.approx(0.4968, abs=0.006)
    assert ends(FlowSDE(0.7), 10)[1] == pytest.approx(0.4796, abs=0.006)


def test_dance_sde_has_the_marginals_of_the_ode() -> None:
    assert ends(DanceSDE(0.3), 40)[1] == pytest.approx(0.484, abs=0.006)
    assert ends(DanceSDE(0.3), 40, ode=True)[1] == pytest.approx(0.481, abs=0.006)


def test_noise_without_its_drift_has_not() -> None:
    assert ends(FlowSDE(0.7), 40, correct=False)[1] > 0.9


def test_cps_does_not_converge_to_the_marginals() -> None:
    """It keeps the coefficients of picture and noise, not the law."""
    assert ends(CPS(0.8), 40)[1] == pytest.approx(0.387, abs=0.006)


# -- solvers


def value(x: float) -> Tensor:
    return torch.tensor([x], dtype=torch.float64)


def test_dpm_solver_second_order() -> None:
    history = [(0.8, value(0.34)), (0.6, value(0.36))]
    near(DPMSolver2M()(value(0.46), history, 0.4), 0.4294226007)
    near(DPMSolver2M(heun=True)(value(0.46), history, 0.4), 0.4297910595)


def test_dpm_solver_first_order_is_euler() -> None:
    near(DPMSolver2M()(value(0.5), [(0.8, value(0.34))], 0.6), 0.46)
    near(DPMSolver2M()(value(0.46), [(0.6, value(0.36))], 0.4), 0.4266666667)


def test_dpm_solver_lands_on_the_expected_picture() -> None:
    near(DPMSolver2M()(value(0.46), [(0.8, value(0.34)), (0.6, value(0.36))], 0.0), 0.36)


def test_dpm_solver_does_not_look_back_at_pure_noise() -> None:
    near(DPMSolver2M()(value(0.46), [(1.0, value(9.0)), (0.6, value(0.36))], 0.4), 0.4266666667)


def worst(steps: int, solver: DPMSolver2M | None) -> float:
    """The largest distance from the exact flow map of the Gaussian over x in [-2, 2], on the grid with shift 3."""
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    S = (3 * t / (1 + 2 * t)).tolist()
    x0 = torch.linspace(-2, 2, 41, dtype=torch.float64)[:, None]
    x, history = x0.clone(), []
    for a, b in pairwise(S):
        v = velocity(x, a)
        history = [*history[-1:], (a, x - a * v)]
        x = x + (b - a) * v if solver is None else solver(x, history, b)
    return float((x - (1 + 0.5 * x0)).abs().max())


def test_dpm_solver_beats_euler_on_the_gaussian() -> None:
    for steps, euler, dpm in ((8, 0.320, 0.266), (16, 0.169, 0.065), (25, 0.111, 0.0085)):
        assert worst(steps, None) == pytest.approx(euler, abs=0.001)
        assert worst(steps, DPMSolver2M()) == pytest.approx(dpm, abs=0.001)
