"""UniPC: a predictor and a corrector of any order that share their model evaluations.

Zhao et al. 2023, "UniPC: a unified predictor-corrector framework for fast sampling of diffusion models", in the form
for data prediction (appendix): the weights solve R_p a = b (equation 11 of section 3.2), B(h) as in section 4.1. The
corrector of a step needs the evaluation at the predicted point, which the next step makes anyway; so row i corrects
x_i, then predicts x_{i+1} from it, and both are one combination of what was carried, m_i and the history.
"""

from __future__ import annotations

import math

import numpy as np

from pygen.diffusion.schedules import Array
from pygen.diffusion.solvers.base import CARRIED, Grid, SolverStep, Update, X, first_order, one_of, usable_order


def _weights(nodes: Array, h: float, b_h: float) -> Array:
    """a in sum_k a_k nodes_k^(n-1) = n! phi_{n+1}(h) h / B(h), n = 1, 2, ...: one order per node; none for a node at
    infinity, where a run may begin."""
    weights = np.zeros(len(nodes))
    near = nodes[np.isfinite(nodes)]
    order = len(near)
    phi = math.expm1(-h) / -h - 1.0
    moments = []
    for n in range(1, order + 1):
        moments.append(phi * math.factorial(n) / b_h)
        phi = phi / -h - 1.0 / math.factorial(n + 1)
    weights[np.isfinite(nodes)] = np.linalg.solve(np.vander(near, order, increasing=True).T, np.array(moments))
    return weights


def unipc_update(grid: Grid, i: int, order: int, variant: str = "bh2", corrects: bool = False) -> Update:
    """From i to i + 1 by the predictions of x_0 at i, i - 1, ...; to correct that, by the one at i + 1 before them.

    On a grid whose alpha and sigma have changed places, it is the update by predictions of epsilon.
    """
    sample, of_pred = first_order(grid, i)
    if order == 1 and not corrects:
        return Update(sample, (of_pred,))
    log_snr = grid.log_snr
    h = float(log_snr[i + 1] - log_snr[i])
    if variant == "bh1":
        b_h = -h
        alpha_b = -grid.alpha[i + 1] * b_h
    else:
        b_h = math.expm1(-h)
        alpha_b = of_pred  # -alpha' (e^-h - 1), without the loss of digits
    nodes = np.append((log_snr[i - np.arange(1, order)] - log_snr[i]) / h, 1.0)
    # The two smallest systems have the simpler solution 1/2, of the same order (section 3.3 and the authors' code).
    if corrects:
        weights = np.array([0.5]) if order == 1 else _weights(nodes, h, b_h)
    else:
        weights = np.array([0.5]) if order == 2 else _weights(nodes[:-1], h, b_h)
    differences = alpha_b * weights / nodes[: len(weights)]  # factors of m_{i-k} - m_i, the last of m_{i+1} - m_i
    behind = (of_pred - differences.sum(), *differences[: order - 1])
    return Update(sample, (differences[-1], *behind) if corrects else behind)


def unipc(
    grid: Grid, *, order: int = 2, corrector: bool = True, variant: str = "bh2", lower_order_final: bool = True
) -> list[SolverStep]:
    """``order``: 1 to 3, of the predictor; the corrector (UniC-p) adds one. ``variant``: B(h), "bh1" h, "bh2" e^h - 1.

    ``lower_order_final``: lower the order towards the end, as it always is where a step ends at sigma = 0.
    """
    one_of((1, 2, 3), order=order)
    one_of(("bh1", "bh2"), variant=variant)
    steps = []
    sample = X
    for i in range(grid.steps):
        usable = usable_order(grid, i, order, lower_order_final)
        following = unipc_update(grid, i, usable, variant).of(sample)
        steps.append(SolverStep(following, sample if corrector else None))
        finite = np.isfinite(grid.log_snr[i : i + 2]).all()
        sample = unipc_update(grid, i, usable, variant, corrects=True).of(CARRIED) if corrector and finite else X
    return steps
