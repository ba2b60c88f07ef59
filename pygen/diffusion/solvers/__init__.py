"""The solvers: one file of coefficients each, and nothing else to edit when adding one but this list."""

from collections.abc import Callable

from pygen.diffusion.solvers.base import Combination, Grid, SolverStep
from pygen.diffusion.solvers.ddim import ddim
from pygen.diffusion.solvers.ddpm import ddpm
from pygen.diffusion.solvers.dpmpp_2m import dpmpp_2m
from pygen.diffusion.solvers.euler import euler
from pygen.diffusion.solvers.unipc import unipc

SOLVERS: dict[str, Callable[..., list[SolverStep]]] = {
    solver.__name__: solver for solver in (ddpm, ddim, euler, dpmpp_2m, unipc)
}

__all__ = ["SOLVERS", "Combination", "Grid", "SolverStep"]
