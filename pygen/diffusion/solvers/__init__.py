"""The solvers: one file of coefficients for each family, and nothing else to edit when adding one but this list."""

from collections.abc import Callable

from pygen.diffusion.solvers.base import Combination, Grid, SolverStep
from pygen.diffusion.solvers.consistency import consistency, lcm, tcd
from pygen.diffusion.solvers.ddim import ddim
from pygen.diffusion.solvers.ddpm import ddpm
from pygen.diffusion.solvers.dpm import dpm_multistep, dpm_singlestep
from pygen.diffusion.solvers.dpmpp import dpm_fast, dpmpp_2m, dpmpp_2m_sde, dpmpp_2s_ancestral, dpmpp_3m_sde, dpmpp_sde
from pygen.diffusion.solvers.euler import euler, euler_ancestral
from pygen.diffusion.solvers.heun import dpm_2, dpm_2_ancestral, flow_heun, heun
from pygen.diffusion.solvers.multistep import deis, lms
from pygen.diffusion.solvers.pndm import ipndm, plms, pndm
from pygen.diffusion.solvers.sa import sa_solver
from pygen.diffusion.solvers.unipc import unipc

SOLVERS: dict[str, Callable[..., list[SolverStep]]] = {
    solver.__name__: solver
    for solver in (
        ddpm, ddim, euler, euler_ancestral, heun, flow_heun, dpm_2, dpm_2_ancestral, lms, pndm, plms, ipndm, deis,
        dpm_multistep, dpm_singlestep, dpm_fast, dpmpp_2m, dpmpp_2m_sde, dpmpp_3m_sde, dpmpp_2s_ancestral, dpmpp_sde,
        unipc, sa_solver, consistency, lcm, tcd,
    )
}  # fmt: skip

__all__ = ["SOLVERS", "Combination", "Grid", "SolverStep"]
