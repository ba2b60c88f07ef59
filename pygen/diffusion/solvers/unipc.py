"""UniPC: a predictor and a corrector of any order that share their model evaluations.

Zhao et al. 2023, "UniPC: a unified predictor-corrector framework for fast sampling of diffusion models", in the form
for data prediction (appendix): the weights solve R_p a = b (equation 11 of section 3.2), B(h) as in section 4.1. The
corrector of a step needs the evaluation at the predicted point, which the next step makes anyway; so row i corrects
x_i, then predicts x_{i+1} from it, and both are one combination of what was carried, m_i and the history.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pygen.diffusion.schedules import Array
from pygen.diffusion.solvers.base import Combination, Grid, SolverStep, first_order


@dataclass(frozen=True)
class _Update:
    """x_{i+1} = sample * x_i + predictions[0] * m_i + predictions[1] * m_{i-1} + ... + ahead * m_{i+1}."""

    sample: float
    predictions: Array
    ahead: float


def _weights(nodes: Array, h: float, b_h: float) -> Array:
    """a in sum_k a_k nodes_k^(n-1) = n! phi_{n+1}(h) h / B(h), n = 1, 2, ...: one order per node."""
    order = len(nodes)
    phi = math.expm1(-h) / -h - 1.0
    moments = []
    for n in range(1, order + 1):
        moments.append(phi * math.factorial(n) / b_h)
        phi = phi / -h - 1.0 / math.factorial(n + 1)
    return np.linalg.solve(np.vander(nodes, order, increasing=True).T, np.array(moments))


def _update(grid: Grid, i: int, order: int, variant: str, corrects: bool) -> _Update:
    """The step from i to i + 1 at an order, by prediction (m_i and before) or correction (m_{i+1} too)."""
    sample, of_pred = first_order(grid, i)
    predictions = np.zeros(order)
    predictions[0] = of_pred
    if order == 1 and not corrects:
        return _Update(sample, predictions, 0.0)

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
    predictions[0] -= differences.sum()
    predictions[1:] += differences[: order - 1]
    return _Update(sample, predictions, float(differences[-1]) if corrects else 0.0)


def unipc(
    grid: Grid, *, order: int = 2, corrector: bool = True, variant: str = "bh2", lower_order_final: bool = True
) -> list[SolverStep]:
    """``order``: 1 to 3, of the predictor; the corrector (UniC-p) adds one. ``variant``: B(h), "bh1" h, "bh2" e^h - 1.

    ``lower_order_final``: lower the order towards the end, as it always is where a step ends at sigma = 0.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"order must be 1, 2 or 3, got {order!r}")
    if variant not in ("bh1", "bh2"):
        raise ValueError(f"variant must be bh1 or bh2, got {variant!r}")
    finite = np.isfinite(grid.log_snr)
    steps = []
    corrections: _Update | None = None
    for i in range(grid.steps):
        # A point at infinite lambda has no place among the nodes.
        reach = next((k for k in range(1, order) if k > i or not finite[i - k]), order)
        this_order = min(reach, grid.steps - i) if lower_order_final else reach
        if not finite[i + 1] or not finite[i]:
            this_order = 1
        predict = _update(grid, i, this_order, variant, corrects=False)
        depth = order if corrector else order - 1
        history = np.zeros(depth + 1)
        history[:this_order] = predict.predictions
        if corrections is None:  # x_i stands as it is
            carry = Combination(x=1.0)
            following = Combination(x=predict.sample, pred=history[0], history=tuple(history[1:]))
        else:
            past = np.zeros(depth)
            past[: len(corrections.predictions)] = corrections.predictions
            carry = Combination(pred=corrections.ahead, history=tuple(past), carry=corrections.sample)
            following = Combination(
                pred=history[0] + predict.sample * carry.pred,
                history=tuple(history[1:] + predict.sample * past),
                carry=predict.sample * carry.carry,
            )
        steps.append(SolverStep(following, carry if corrector else None))
        if corrector and finite[i + 1] and finite[i]:
            corrections = _update(grid, i, this_order, variant, corrects=True)
        else:
            corrections = None
    return steps
