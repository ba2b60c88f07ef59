"""k-diffusion's samplers of the DPM-Solver++ family, and of DPM-Solver with step sizes of its own.

The updates are those of ``dpm.py``; ``eta`` is the strength of the noise, ``s_noise`` a factor on it. A step that ends
at sigma = 0 is of first order and adds no noise.
"""

from __future__ import annotations

import math
from dataclasses import replace

from pygen.diffusion.solvers.base import (
    CARRIED,
    NOISE,
    PRED,
    Grid,
    Point,
    SolverStep,
    X,
    ancestral,
    not_negative,
    one_of,
    transfer,
    usable_order,
)
from pygen.diffusion.solvers.dpm import SOLVER_TYPES, block, multistep_update, singlestep_update


def dpmpp_2m(grid: Grid, *, lower_order_final: bool = True) -> list[SolverStep]:
    """DPM-Solver++ (2M), algorithm 2 of Lu et al. 2022. ``lower_order_final``: take the last step at first order."""
    return [
        SolverStep(multistep_update(grid, i, usable_order(grid, i, 2, lower_order_final)).of())
        for i in range(grid.steps)
    ]


def _multistep_sde(grid: Grid, order: int, solver_type: str, eta: float, s_noise: float) -> list[SolverStep]:
    not_negative(eta=eta, s_noise=s_noise)
    steps = []
    for i in range(grid.steps):
        usable = usable_order(grid, i, order, lower_order_final=False)
        update = multistep_update(grid, i, usable, algorithm_type="sde-dpmsolver++", solver_type=solver_type, eta=eta)
        steps.append(SolverStep(update._replace(noise=s_noise * update.noise).of()))
    return steps


def dpmpp_2m_sde(
    grid: Grid, *, eta: float = 1.0, s_noise: float = 1.0, solver_type: str = "midpoint"
) -> list[SolverStep]:
    """DPM-Solver++ (2M) SDE."""
    one_of(SOLVER_TYPES, solver_type=solver_type)
    return _multistep_sde(grid, 2, solver_type, eta, s_noise)


def dpmpp_3m_sde(grid: Grid, *, eta: float = 1.0, s_noise: float = 1.0) -> list[SolverStep]:
    """DPM-Solver++ (3M) SDE."""
    return _multistep_sde(grid, 3, "heun", eta, s_noise)


def dpmpp_2s_ancestral(grid: Grid, *, eta: float = 1.0, s_noise: float = 1.0) -> list[SolverStep]:
    """DPM-Solver++ (2S), algorithm 1 with r = 1/2, to less noise than the next time has; then noise."""
    not_negative(eta=eta, s_noise=s_noise)
    steps: list[SolverStep] = []
    for i in range(grid.steps):
        start = grid.point(i)
        end, up = ancestral(grid, i, eta)
        noise = s_noise * up * NOISE
        if end.sigma == 0:
            steps.append(SolverStep(transfer(start, end) + noise, at=start))
            continue
        middle = grid.at_rho(math.sqrt(start.rho * end.rho))
        steps.append(SolverStep(transfer(start, middle), carry=X, at=start))
        steps.append(SolverStep(transfer(start, end, CARRIED) + noise, at=middle))
    return steps


def dpmpp_sde(grid: Grid, *, eta: float = 1.0, s_noise: float = 1.0, r: float = 1 / 2) -> list[SolverStep]:
    """DPM-Solver++ (SDE). ``r``: where, in log sigma, the second evaluation is; both steps begin at the same sample and
    follow one Brownian motion in sigma, so that the noise up to there is part of the whole step's."""
    not_negative(eta=eta, s_noise=s_noise)
    if not 0 < r <= 1:
        raise ValueError(f"r must lie in (0, 1], got {r!r}")
    steps: list[SolverStep] = []
    for i in range(grid.steps):
        start, end = grid.point(i), grid.point(i + 1)
        if end.sigma == 0:
            steps.append(SolverStep(transfer(start, end), at=start))
            continue
        middle = grid.at_rho(start.rho ** (1 - r) * end.rho**r)
        first_end, first_up = ancestral(Grid.through(start, middle), 0, eta)
        whole_end, whole_up = ancestral(grid, i, eta)
        share = (start.rho - middle.rho) / (start.rho - end.rho)  # of the variance
        noise = s_noise * whole_up * NOISE
        steps.append(
            SolverStep(
                transfer(start, first_end) + s_noise * first_up * NOISE,
                carry=transfer(start, whole_end, X, (1 - 1 / (2 * r)) * PRED) + math.sqrt(share) * noise,
                at=start,
            )
        )
        ahead = transfer(start, whole_end, CARRIED, 1 / (2 * r) * PRED)
        steps.append(SolverStep(replace(ahead, carry=1.0) + math.sqrt(1 - share) * noise, at=middle))
    return steps


def dpm_fast(grid: Grid, *, eta: float = 0.0, s_noise: float = 1.0) -> list[SolverStep]:
    """DPM-Solver-fast (Lu et al. 2022, section 3.4): as many evaluations as the grid has steps, in steps of order 3
    that are equal in lambda, and one or two of lower order at the end.

    Of the grid only the ends matter; where it ends at sigma = 0 its last step is the last evaluation.
    """
    not_negative(eta=eta, s_noise=s_noise)
    last = grid.steps if grid.sigma[-1] > 0 else grid.steps - 1
    orders = [3] * (last // 3)
    if last % 3:
        orders.append(last % 3)
    elif last:
        orders[-1:] = [2, 1]
    first_rho, last_rho = grid.point(0).rho, grid.point(last).rho

    def at(share: float) -> Point:
        rho = first_rho ** (1 - share) * last_rho**share
        return grid.at_rho(rho)

    ends = [grid.point(0), *(at(k / len(orders)) for k in range(1, len(orders))), grid.point(last)]
    steps: list[SolverStep] = []
    for start, end, order in zip(ends, ends[1:], orders, strict=False):
        down, up = ancestral(Grid.through(start, end), 0, eta)
        if end is ends[-1]:
            down, up = end, 0.0
        elif down.rho < last_rho:  # no further than the end
            sigma = end.alpha * last_rho
            down, up = Point(end.alpha, sigma, end.time), math.sqrt(end.sigma**2 - sigma**2)
        inner = [grid.at_rho(start.rho ** (1 - j / order) * down.rho ** (j / order)) for j in range(1, order)]
        *stages, final = block([start, *inner, down], "dpmsolver", "midpoint", "heun")
        steps += [*stages, replace(final, next=final.next + s_noise * up * NOISE)]
    if last < grid.steps:
        update = singlestep_update(grid, last, (), grid.steps, algorithm_type="dpmsolver")
        steps.append(SolverStep(update.of(), at=grid.point(last), epsilon=True))
    return steps
