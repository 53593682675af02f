"""MixGRPO and MixGRPO-Flash (2507.21802). Noise, and with it the gradient, only in a sliding window of w steps.

    W(l)  = {l, .., l + w - 1};   in W the SDE of Flow-GRPO, outside the ODE
    J     = 1/G sum_i 1/|W| sum_{t in W} min(rho_t A_i, clip(rho_t, 1 - c, 1 + c) A_i)
    A_i   = sum_k w_k (r_i^k - mean_k) / (std_k + eps)
    l     <- min(l + s, T - w) every tau iterations                                                (progressive)

Flash: behind the window DPM-Solver++ 2M takes the deterministic steps, on a tail of int((T - last) r) nodes. The network's
expectations inside the window are its history, so the first step behind a window is of second order already.

| | here | paper | reference code |
|---|---|---|---|
| end of the grid | the window stays at the last w steps, or begins again (`roll_back`) | stays | shrinks until it is empty |
| last two steps | in the window (`spare` 0) | the same | never (`spare` 2, `shrinks`) |
| random window | one draw of the run's generator for all ranks | not said | each rank draws for itself |
| tail of one node | ends at sigma 0 | not said | stops before sigma 0 |
| solver before the window | the ODE | the same (it collapses otherwise) | the same |
| decoding | the last latent | not said | the last latent |
| std | sample (n - 1), eps 1e-8 | "std" | the same |
| advantage | clamped to +-5 | not said | the same |
| optimizer steps | `updates` equal parts | 4 per iteration | every 3 of 12 samples |
| KL | none | to the rollout policy | coefficient 0 |

At toy scale (`gruppo claim mix-grpo`, 5 seeds) noise in the window alone raises the signal-to-noise ratio of each of its steps'
gradients at least 1.17 [1.09, 1.25] times, less than the 1.25 expected: that claim does not hold. A window of a third of the
steps ends 0.28 [0.12, 0.44] above Flow-GRPO in reward (`gruppo claim mix-grpo/third`).

Hyper-parameters: n 12, w 4, tau 25, s 1, eta .7, clip 1e-4, 25 steps, shift 3, lr 1e-5; Flash tau 20 and r .4; Flash* stands
still (stride 0) with r .2. The moving window is `Window(hold=Constant(25))`; `hold` may be LinearDecay or ExponentialDecay.

Cost: T network calls per path to sample, w with gradient (4 of 25); Flash samples with last + nodes calls, 11 at the first
window with r .4. The paper's speed-up is T / (w + (T - w) r).

Not for: few steps. With T near w there is nothing to save.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from gruppo.core.reduce import sequence_mean
from gruppo.core.surrogate import PPOClip
from gruppo.policies.kernels import CPS, DPMSolver2M, FlowSDE
from gruppo.recipe import Recipe, whole
from gruppo.recipes.dance_grpo import Parts
from gruppo.recipes.flow_grpo import Clamped, Compared
from gruppo.recipes.gdpo import Columns, Decoupled
from gruppo.recipes.grpo import total
from gruppo.recipes.multi_objective import listed, objectives
from gruppo.rollouts.trajectories import Trajectories
from gruppo.rollouts.window import CompressedTail, Constant, RandomWindow, Window


def mix_grpo(
    n: int = 12,
    window: int = 4,
    tau: int = 25,
    stride: int = 1,
    eta: float = 0.7,
    clip: float = 1e-4,
    updates: int = 4,
    weights: Mapping[str, int | float] | None = None,
    hold: Callable[[int, int], int] | None = None,
    random: bool = False,
    spare: int = 0,
    shrinks: bool = False,
    roll_back: bool = False,
    shared_noise: bool = True,
    cps: bool = False,
    eps: float = 1e-8,
) -> Recipe:
    """Noise and gradient only in a sliding window of denoising steps, the ODE everywhere else."""
    named = None if weights is None else listed(weights)
    moving = Window(window, Constant(tau) if hold is None else hold, stride, spare, shrinks, roll_back)
    noisy = RandomWindow(window, spare=spare) if random else moving
    return Recipe(
        rollout=Trajectories(n, CPS(eta) if cps else FlowSDE(eta), noisy, shared_noise=shared_noise),
        reward=total if named is None else Columns(named),
        advantage=Clamped(Compared(ddof=1, eps=eps) if named is None else Decoupled(named, ddof=1, eps=eps)),
        loss=PPOClip(clip, clip, scope="step"),
        reduce=sequence_mean,
        cadence=whole if updates == 1 else Parts(updates),
        state=() if random else (moving,),
        needs=() if named is None else objectives(named),
    )


def mix_grpo_flash(
    n: int = 12,
    window: int = 4,
    tau: int = 20,
    stride: int = 1,
    ratio: float = 0.4,
    eta: float = 0.7,
    clip: float = 1e-4,
    updates: int = 4,
    weights: Mapping[str, int | float] | None = None,
    heun: bool = False,
    roll_back: bool = False,
    shared_noise: bool = True,
    eps: float = 1e-8,
) -> Recipe:
    """MixGRPO with a second-order solver and a compressed grid behind the window."""
    base = mix_grpo(n, window, tau, stride, eta, clip, updates, weights, roll_back=roll_back, shared_noise=shared_noise, eps=eps)
    assert isinstance(base.rollout, Trajectories)
    return replace(base, rollout=replace(base.rollout, grid=CompressedTail(ratio), solver=DPMSolver2M(heun)))
