"""Two evaluations a step: Heun's method and the midpoint method in x / alpha and sigma / alpha, and Heun's on the flow.

Karras et al. 2022, "Elucidating the design space of diffusion-based generative models": algorithm 2, which is ``heun``
(algorithm 1 with s_churn = 0); ``dpm_2`` is its variant with the midpoint, in log sigma, of k-diffusion. A step that
ends at sigma = 0 is Euler's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from pygen.diffusion.solvers.base import (
    CARRIED,
    NOISE,
    PRED,
    Combination,
    Grid,
    Point,
    SolverStep,
    X,
    ancestral,
    direction,
    not_negative,
    transfer,
    with_churn,
)


def _trapezoid(
    start: Point, end: Point, scale: float, half: float, slope: Callable[[Point], Combination]
) -> list[SolverStep]:
    """x' = scale x + half (slope at x + slope at Euler's x')."""
    if end.sigma == 0:
        return [SolverStep(transfer(start, end), at=start)]
    return [
        SolverStep(transfer(start, end), carry=scale * X + half * slope(start), at=start),
        SolverStep(CARRIED + half * slope(end), at=end),
    ]


def heun(
    grid: Grid, *, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0
) -> list[SolverStep]:
    """The sampler of EDM. ``s_churn``, ``s_tmin``, ``s_tmax`` (of sigma / alpha), ``s_noise``: of algorithm 2."""

    def step(start: Point, end: Point) -> list[SolverStep]:
        half = end.alpha * (end.rho - start.rho) / 2
        return _trapezoid(start, end, end.alpha / start.alpha, half, direction)

    return with_churn(grid, step, s_churn, s_tmin, s_tmax, s_noise)


def flow_heun(grid: Grid) -> list[SolverStep]:
    """Heun's method on the straight path (Liu et al. 2022, rectified flow): d(x/c)/d(sigma/c) = eps - x_0 with
    c = alpha + sigma, which is 1 on the flow schedule."""

    def slope(at: Point) -> Combination:
        return direction(at) - PRED

    steps = []
    for i in range(grid.steps):
        start, end = grid.point(i), grid.point(i + 1)
        c, next_c = start.alpha + start.sigma, end.alpha + end.sigma
        half = next_c * (end.sigma / next_c - start.sigma / c) / 2
        steps += _trapezoid(start, end, next_c / c, half, slope)
    return steps


def _midpoint(grid: Grid, start: Point, end: Point) -> list[SolverStep]:
    if end.sigma == 0:
        return [SolverStep(transfer(start, end), at=start)]
    middle = grid.at_rho(math.sqrt(start.rho * end.rho))
    following = end.alpha / start.alpha * CARRIED + end.alpha * (end.rho - start.rho) * direction(middle)
    return [SolverStep(transfer(start, middle), carry=X, at=start), SolverStep(following, at=middle)]


def dpm_2(
    grid: Grid, *, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0
) -> list[SolverStep]:
    """The midpoint method; the options are those of ``heun``."""
    return with_churn(grid, lambda start, end: _midpoint(grid, start, end), s_churn, s_tmin, s_tmax, s_noise)


def dpm_2_ancestral(grid: Grid, *, eta: float = 1.0, s_noise: float = 1.0) -> list[SolverStep]:
    """The midpoint method to less noise than the next time has, then noise. ``eta``: 1 for the posterior's variance."""
    not_negative(eta=eta, s_noise=s_noise)
    steps: list[SolverStep] = []
    for i in range(grid.steps):
        down, up = ancestral(grid, i, eta)
        *stages, last = _midpoint(grid, grid.point(i), down)
        steps += [*stages, replace(last, next=last.next + s_noise * up * NOISE)]
    return steps
