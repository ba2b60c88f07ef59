"""Euler on the probability flow ODE, with and without noise.

Karras et al. 2022, "Elucidating the design space of diffusion-based generative models": algorithm 2 without its second
order correction, d(x/alpha)/d(sigma/alpha) = eps (also Song et al. 2021, DDIM, equation 14). On the flow path this is
x' = x + (t' - t) v, as rectified flow samples (Liu et al. 2022).
"""

from __future__ import annotations

import math

from pygen.diffusion.solvers.base import (
    NOISE,
    Grid,
    Point,
    SolverStep,
    ancestral,
    not_negative,
    transfer,
    with_churn,
)


def euler(
    grid: Grid, *, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0
) -> list[SolverStep]:
    """x'/alpha' = x/alpha + (sigma'/alpha' - sigma/alpha) eps with eps = (x - alpha m) / sigma.

    ``s_churn``, ``s_noise``: how much noise is added before each evaluation, and its factor; between ``s_tmin`` and
    ``s_tmax`` of sigma / alpha.
    """

    def step(start: Point, end: Point) -> list[SolverStep]:
        return [SolverStep(transfer(start, end), at=start)]

    return with_churn(grid, step, s_churn, s_tmin, s_tmax, s_noise)


def euler_ancestral(grid: Grid, *, eta: float = 1.0, s_noise: float = 1.0) -> list[SolverStep]:
    """Euler to less noise than the next time has, then noise. ``eta``: 1 for the posterior's variance."""
    not_negative(eta=eta, s_noise=s_noise)
    steps = []
    for i in range(grid.steps):
        down, up = ancestral(grid, i, eta)
        steps.append(SolverStep(transfer(grid.point(i), down) + s_noise * up * NOISE))
    return steps
