"""SA-Solver: stochastic Adams predictor and corrector.

Xue et al. 2023, "SA-Solver: stochastic Adams solver for fast sampling of diffusion models", for data prediction and
constant tau over a step (equations 13 to 18): with z = (1 + tau^2) h, x' is e^(-tau^2 h) sigma'/sigma x, plus the
integral of the polynomial through predictions of x_0 against e^(-z (1 - s)), plus noise; the corrector's polynomial
goes through the prediction at the predicted point as well, and its noise is the predictor's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pygen.diffusion.solvers.base import (
    CARRIED,
    PRED,
    Grid,
    SolverStep,
    Update,
    X,
    not_negative,
    one_of,
    phi,
    usable_order,
)
from pygen.diffusion.solvers.multistep import lagrange_integrals


def adams_update(
    grid: Grid, i: int, nodes: Sequence[int], tau: float, *, few_steps: bool = True, epsilon: bool = False
) -> Update:
    """From i to i + 1 by the predictions of x_0 at ``nodes``: i, i - 1, ... to predict; i + 1, i, ... to correct.

    ``few_steps``: with two nodes, the slope has the weight z / 2 of the authors' code in the place of its integral's.
    ``epsilon``: by the predictions of epsilon instead (section 4.1), against the exponential of lambda alone.
    """
    alpha, sigma = grid.alpha[i], grid.sigma[i]
    next_alpha, next_sigma = grid.alpha[i + 1], grid.sigma[i + 1]
    if epsilon:
        x = next_alpha / alpha
        noise = tau * math.sqrt((sigma * x) ** 2 - next_sigma**2)
        if len(nodes) == 1:
            return Update(x, ((1 + tau**2) * (next_sigma - sigma * x),), noise)
        h = grid.log_snr[i + 1] - grid.log_snr[i]
        places = (grid.log_snr[list(nodes)] - grid.log_snr[i]) / h
        weights = -(1 + tau**2) * h * next_sigma * lagrange_integrals(places, h)
        return Update(x, tuple(weights.tolist()), noise)
    shrink = next_sigma * alpha / (next_alpha * sigma)  # e^-h
    x = next_sigma / sigma * shrink ** (tau**2)
    noise = next_sigma * math.sqrt(1 - shrink ** (2 * tau**2))
    if len(nodes) == 1:
        return Update(x, (next_alpha - alpha * x,), noise)
    h = grid.log_snr[i + 1] - grid.log_snr[i]
    z = (1 + tau**2) * h
    places = (grid.log_snr[list(nodes)] - grid.log_snr[i]) / h
    weights = z * next_alpha * lagrange_integrals(places, -z)
    if len(nodes) == 2 and few_steps:
        change = next_alpha * z * (0.5 - phi(2, -z)) / (places[0] - places[1])
        weights += np.array([change, -change])
    return Update(x, tuple(weights.tolist()), noise)


def sa_solver(
    grid: Grid,
    *,
    predictor_order: int = 2,
    corrector_order: int = 2,
    tau: float = 1.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    few_steps: bool = True,
    lower_order_final: bool = True,
) -> list[SolverStep]:
    """``predictor_order``: 1 to 4; ``corrector_order``: 1 to 4, or 0 for none. ``tau``: the noise of a step that begins
    between ``s_tmin`` and ``s_tmax`` of sigma / alpha: 0 for the ODE, 1 for the SDE that reverses the forward process.

    Row i corrects x_i and predicts x_{i+1}. It carries what the corrector of x_{i+1} will add to, so that the noise of
    both is one.
    """
    one_of((1, 2, 3, 4), predictor_order=predictor_order)
    one_of((0, 1, 2, 3, 4), corrector_order=corrector_order)
    not_negative(tau=tau)
    steps = []
    sample = X
    for i in range(grid.steps):
        noise = tau if s_tmin <= grid.point(i).rho <= s_tmax else 0.0
        order = usable_order(grid, i, predictor_order, lower_order_final)
        predict = adams_update(grid, i, range(i, i - order, -1), noise, few_steps=few_steps)
        following, carry = predict.of(sample), None
        if corrector_order and i + 1 < grid.steps:
            behind = usable_order(grid, i, max(corrector_order - 1, 1), False) if np.isfinite(grid.log_snr[i]) else 0
            order = min(corrector_order, behind + 1, grid.steps - i + 1 if lower_order_final else corrector_order)
            x, (ahead, *known), deviation = adams_update(
                grid, i, range(i + 1, i + 1 - order, -1), noise, few_steps=few_steps
            )
            carry = Update(x, tuple(known), deviation).of(sample)
            sample = CARRIED + ahead * PRED
        steps.append(SolverStep(following, carry))
    return steps
