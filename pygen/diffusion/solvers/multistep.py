"""Linear multistep coefficients: integrals of the polynomial through the model's last values of epsilon.

In y = x / alpha and rho = sigma / alpha, the probability flow is dy = eps d rho (Karras et al. 2022). The methods
differ in the variable in which eps is taken for a polynomial.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from pygen.diffusion.schedules import Array
from pygen.diffusion.solvers.base import Grid, SolverStep, Update, one_of, phi, usable_order

# Adams-Bashforth over equal steps, newest first: the integrals over the next one.
ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def lagrange_integrals(nodes: ArrayLike, z: float = 0.0) -> Array:
    """For each node, the integral over s from 0 to 1 of e^(z (1 - s)) times the Lagrange polynomial that is 1 at it."""
    places = np.asarray(nodes, dtype=np.float64)
    moments = [math.factorial(k) * phi(k + 1, z) for k in range(len(places))]  # of s^k
    weights = np.empty(len(places))
    for j, place in enumerate(places):
        others = np.delete(places, j)
        powers = np.atleast_1d(np.poly(others))[::-1] / np.prod(place - others)  # from s^0 up
        weights[j] = powers @ moments
    return weights


def adams_bashforth_update(grid: Grid, i: int, order: int) -> Update:
    """PLMS and IPNDM (Liu et al. 2022, equations 11 and 12): the exact step for constant epsilon, given that of equal
    steps. The values are epsilon at i and at the order - 1 evaluations before it."""
    x = grid.alpha[i + 1] / grid.alpha[i]
    of_epsilon = grid.sigma[i + 1] - grid.sigma[i] * x
    return Update(x, tuple(of_epsilon * weight for weight in ADAMS_BASHFORTH[order - 1]))


def lms_update(grid: Grid, i: int, previous: Sequence[int]) -> Update:
    """Epsilon as a polynomial in rho, through the values at i and at the times ``previous``."""
    rho = grid.sigma[[i, *previous]] / grid.alpha[[i, *previous]]
    step = grid.sigma[i + 1] / grid.alpha[i + 1] - rho[0]
    weights = grid.alpha[i + 1] * step * lagrange_integrals((rho - rho[0]) / step)
    return Update(grid.alpha[i + 1] / grid.alpha[i], tuple(weights.tolist()))


def deis_update(grid: Grid, i: int, previous: Sequence[int]) -> Update:
    """tAB-DEIS in log rho (Zhang & Chen 2023, "Fast sampling of diffusion models with exponential integrator",
    equation 15): epsilon as a polynomial in log rho, through the values at i and at the times ``previous``."""
    x = grid.alpha[i + 1] / grid.alpha[i]
    if not previous:
        return Update(x, (grid.sigma[i + 1] - grid.sigma[i] * x,))
    log_snr = grid.log_snr
    h = log_snr[i + 1] - log_snr[i]
    weights = -grid.sigma[i + 1] * h * lagrange_integrals((log_snr[[i, *previous]] - log_snr[i]) / h, h)
    return Update(x, tuple(weights.tolist()))


def lms(grid: Grid, *, order: int = 4) -> list[SolverStep]:
    """Linear multistep in sigma / alpha, as k-diffusion's. ``order``: 1 to 4."""
    one_of((1, 2, 3, 4), order=order)
    updates = (lms_update(grid, i, range(i - 1, max(i - order, -1), -1)) for i in range(grid.steps))
    return [SolverStep(update.of(), epsilon=True) for update in updates]


def deis(grid: Grid, *, order: int = 3, lower_order_final: bool = True) -> list[SolverStep]:
    """tAB-DEIS in log rho. ``order``: 1 to 4; ``lower_order_final``: lower it towards the end."""
    one_of((1, 2, 3, 4), order=order)
    steps = []
    for i in range(grid.steps):
        usable = usable_order(grid, i, order, lower_order_final)
        steps.append(SolverStep(deis_update(grid, i, range(i - 1, i - usable, -1)).of(), epsilon=True))
    return steps
