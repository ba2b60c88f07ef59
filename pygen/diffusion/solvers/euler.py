"""Euler on the probability flow ODE.

Karras et al. 2022, "Elucidating the design space of diffusion-based generative models": algorithm 1 without its second
order correction, d(x/alpha)/d(sigma/alpha) = eps (also Song et al. 2021, DDIM, equation 14). On the flow path this is
x' = x + (t' - t) v, as rectified flow samples (Liu et al. 2022).
"""

from __future__ import annotations

from pygen.diffusion.solvers.base import Combination, Grid, SolverStep, first_order


def euler(grid: Grid) -> list[SolverStep]:
    """x'/alpha' = x/alpha + (sigma'/alpha' - sigma/alpha) eps with eps = (x - alpha m) / sigma."""
    steps = []
    for i in range(grid.steps):
        of_x, of_pred = first_order(grid, i)
        steps.append(SolverStep(Combination(x=of_x, pred=of_pred)))
    return steps
