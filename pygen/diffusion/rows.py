"""From what a solver combines to the named columns of affine_step's table."""

from __future__ import annotations

import numpy as np

from pygen.diffusion.solvers.base import Combination, SolverStep, one_of

Factors = tuple[float, float]  # of the sample x, of the model's output

PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow")


def conversion(prediction: str, alpha: float, sigma: float) -> tuple[Factors, Factors]:
    """x_0 and epsilon as (factor of x, factor of the model's output), from x = alpha x_0 + sigma eps."""
    one_of(PREDICTIONS, prediction_type=prediction)
    with np.errstate(divide="ignore", invalid="ignore"):
        a, s = np.float64(alpha), np.float64(sigma)
        norm = a**2 + s**2  # 1 where the schedule preserves variance
        x0, eps = {
            "epsilon": ((1 / a, -s / a), (0.0, 1.0)),
            "sample": ((0.0, 1.0), (1 / s, -a / s)),
            "v_prediction": ((a / norm, -s / norm), (s / norm, a / norm)),
            "flow": ((1 / (a + s), -s / (a + s)), (1 / (a + s), a / (a + s))),
        }[prediction]
    return x0, eps


def columns(step: SolverStep, pred: Factors, epsilon: Factors = (0.0, 0.0), history: int = 0) -> dict[str, float]:
    """The columns of a step: ``pred`` makes what the solver reasons in, ``epsilon`` what its combinations call so.

    ``history``: the number of history terms before the carried one.
    """
    row = {"pred_x": pred[0], "pred_out": pred[1]}
    for result, y in enumerate((step.next, step.carry or Combination())):
        row[f"x{result}"] = y.x
        row[f"pred{result}"] = y.pred
        row[f"noise{result}"] = y.noise
        if y.epsilon:
            row[f"x{result}"] += y.epsilon * epsilon[0]
            row[f"out{result}"] = y.epsilon * epsilon[1]
        for j, coefficient in enumerate(y.history):
            row[f"h{j}_{result}"] = coefficient
        if y.carry:
            row[f"h{history}_{result}"] = y.carry
    return row


def written_out(row: dict[str, float]) -> dict[str, float]:
    """A row whose results read x and the output instead of the prediction: fewer roundings, where nothing clamps it."""
    row = dict(row)
    for result in (0, 1):
        of_pred = row.pop(f"pred{result}", 0.0)
        for column, factor in (("x", "pred_x"), ("out", "pred_out")):
            row[f"{column}{result}"] = row.get(f"{column}{result}", 0.0) + of_pred * row[factor]
    return row
