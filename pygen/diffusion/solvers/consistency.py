"""Samplers of models that jump to the data: predict x_0, then renoise.

Song et al. 2023, "Consistency models": algorithm 1. Luo et al. 2023, "Latent consistency models": algorithm 3, whose
consistency function is c_skip x + c_out x_0. Zheng et al. 2024, "Trajectory consistency distillation": algorithm 4,
which jumps to a time between, then renoises from there.
"""

from __future__ import annotations

import math

from pygen.diffusion.solvers.base import NOISE, PRED, Grid, Point, SolverStep, X, not_negative, transfer


def renoise(start: Point, end: Point) -> tuple[float, float]:
    """The forward process from a point to one of more noise: the factor of the sample, and the noise's deviation."""
    ratio = end.alpha / start.alpha
    return ratio, math.sqrt(max(end.sigma**2 - (ratio * start.sigma) ** 2, 0.0))


def consistency(grid: Grid, *, sigma_min: float = 0.0) -> list[SolverStep]:
    """x' = alpha' (m + sqrt(rho'^2 - sigma_min^2) z), rho = sigma / alpha. The model is the consistency function;
    ``sigma_min`` is the noise left in what it returns (epsilon in the paper)."""
    not_negative(sigma_min=sigma_min)
    steps = []
    for i in range(grid.steps):
        end = grid.point(i + 1)
        noise = math.sqrt(max(end.sigma**2 - (end.alpha * sigma_min) ** 2, 0.0))
        steps.append(SolverStep(end.alpha * PRED + noise * NOISE))
    return steps


def lcm(grid: Grid, *, timestep_scaling: float = 10.0, sigma_data: float = 0.5) -> list[SolverStep]:
    """x' = alpha' f + sigma' z, f = c_skip x + c_out m with the time t in training steps, scaled:
    c_skip = sigma_data^2 / (t^2 + sigma_data^2), c_out = t / sqrt(t^2 + sigma_data^2)."""
    not_negative(timestep_scaling=timestep_scaling, sigma_data=sigma_data)
    steps = []
    for i in range(grid.steps):
        end, time = grid.point(i + 1), grid.point(i).time * timestep_scaling
        skip, out = sigma_data**2 / (time**2 + sigma_data**2), time / math.hypot(time, sigma_data)
        steps.append(SolverStep(end.alpha * (skip * X + out * PRED) + end.sigma * NOISE))
    return steps


def tcd(grid: Grid, *, eta: float = 0.3) -> list[SolverStep]:
    """To s = (1 - eta) t' along the predicted path, then to t' by noise; times count from the clean end. ``eta``: in
    [0, 1], the paper's gamma: 0 for DDIM, 1 for multistep consistency sampling."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1], got {eta!r}")
    assert grid.schedule is not None
    clean = grid.schedule.t_clean
    steps = []
    for i in range(grid.steps):
        end = grid.point(i + 1)
        between = grid.at_time(clean + (1 - eta) * (end.time - clean)) if end.sigma > 0 else end
        kept, noise = renoise(between, end)
        steps.append(SolverStep(kept * transfer(grid.point(i), between) + noise * NOISE))
    return steps
