"""DDIM.

Song, Meng & Ermon 2021, "Denoising diffusion implicit models": equation 12, with the standard deviation of equation 16.
"""

from __future__ import annotations

from pygen.diffusion.solvers.base import Combination, Grid, SolverStep, posterior


def ddim(grid: Grid, *, eta: float = 0.0, use_clipped_model_output: bool = True) -> list[SolverStep]:
    """``eta``: 0 for the deterministic sampler, 1 for the variance of DDPM.

    ``use_clipped_model_output``: where the prediction of x_0 is clipped, derive epsilon from it (Dhariwal & Nichol
    2021), instead of taking the model's own, which contradicts it where alpha is small.
    """
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta must lie in [0, 1], got {eta}")
    steps = []
    for i in range(grid.steps):
        noise = eta * posterior(grid, i)[2] ** 0.5 if eta else 0.0
        direction = (grid.sigma[i + 1] ** 2 - noise**2) ** 0.5
        if use_clipped_model_output:
            rescaled = direction / grid.sigma[i]  # eps = (x - alpha m) / sigma
            y = Combination(x=rescaled, pred=grid.alpha[i + 1] - grid.alpha[i] * rescaled, noise=noise)
        else:
            y = Combination(pred=grid.alpha[i + 1], epsilon=direction, noise=noise)
        steps.append(SolverStep(y))
    return steps
