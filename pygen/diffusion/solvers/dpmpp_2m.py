"""DPM-Solver++ (2M).

Lu et al. 2022, "DPM-Solver++: fast solver for guided sampling of diffusion probabilistic models": algorithm 2, with
lambda = log(alpha / sigma), h_i = lambda_i - lambda_{i-1} and r_i = h_{i-1} / h_i.
"""

from __future__ import annotations

import math

from pygen.diffusion.solvers.base import Combination, Grid, SolverStep, first_order


def dpmpp_2m(grid: Grid, *, lower_order_final: bool = True) -> list[SolverStep]:
    """``lower_order_final``: take the last step at first order, as it always is where it ends at sigma = 0."""
    log_snr = grid.log_snr
    steps = []
    for i in range(grid.steps):
        of_x, of_pred = first_order(grid, i)
        final = i == grid.steps - 1 and (lower_order_final or grid.sigma[i + 1] == 0)
        extrapolate = 0.0
        if i > 0 and not final and math.isfinite(log_snr[i - 1]):
            extrapolate = 0.5 * (log_snr[i + 1] - log_snr[i]) / (log_snr[i] - log_snr[i - 1])  # 1 / (2 r)
        steps.append(
            SolverStep(Combination(x=of_x, pred=of_pred * (1 + extrapolate), history=(-of_pred * extrapolate,)))
        )
    return steps
