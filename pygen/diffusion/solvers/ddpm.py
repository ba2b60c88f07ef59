"""DDPM: ancestral sampling.

Ho, Jain & Abbeel 2020, "Denoising diffusion probabilistic models": the posterior of equations 6 and 7, sampled as in
algorithm 2; between times that are not neighbours as in Nichol & Dhariwal 2021, section 4.
"""

from __future__ import annotations

from pygen.diffusion.solvers.base import Combination, Grid, SolverStep, posterior


def ddpm(grid: Grid, *, variance: str = "fixed_small") -> list[SolverStep]:
    """``variance``: "fixed_small", that of the posterior, or "fixed_large", that of the forward step (section 3.2)."""
    if variance not in ("fixed_small", "fixed_large"):
        raise ValueError(f"variance must be fixed_small or fixed_large, got {variance!r}")
    steps = []
    for i in range(grid.steps):
        of_x, of_x0, small, large = posterior(grid, i)
        chosen = small if variance == "fixed_small" else large
        noise = chosen**0.5 if grid.sigma[i + 1] > 0 else 0.0
        steps.append(SolverStep(Combination(x=of_x, pred=of_x0, noise=noise)))
    return steps
