"""What a solver is made of: it reads a grid of (alpha, sigma) and writes, for each step, what the step combines.

All solvers reason in m, the model's prediction of x_0, and keep the sample in the coordinates the model was trained in,
x = alpha x_0 + sigma eps, so that no step has to rescale the model's input.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pygen.diffusion.schedules import Array


@dataclass(frozen=True)
class Grid:
    """alpha and sigma at the steps + 1 times of a trajectory, noisy to clean; a step goes from i to i + 1."""

    alpha: Array
    sigma: Array

    @property
    def steps(self) -> int:
        return len(self.alpha) - 1

    @property
    def log_snr(self) -> Array:
        """lambda = log(alpha / sigma), infinite at the ends where sigma or alpha is 0."""
        with np.errstate(divide="ignore"):
            return np.log(self.alpha) - np.log(self.sigma)


@dataclass(frozen=True)
class Combination:
    """x * x_i + pred * m_i + epsilon * eps_i + noise * z + sum_j history[j] * m_{i-1-j} + carry * (what was carried).

    m_i is the prediction of x_0, clipped where the plan clips; eps_i is that of epsilon, never clipped.
    """

    x: float = 0.0
    pred: float = 0.0
    epsilon: float = 0.0
    noise: float = 0.0
    history: tuple[float, ...] = ()
    carry: float = 0.0


@dataclass(frozen=True)
class SolverStep:
    """The next sample, and what else the next step wants to read."""

    next: Combination
    carry: Combination | None = None


class Update(NamedTuple):
    """x' = x * (the sample) + sum_j model[j] * (the model's value at the j-th of the update's times) + noise * z.

    The values are predictions of x_0 or of epsilon, as the update says; the first is the one at the sample.
    """

    x: float
    model: tuple[float, ...]
    noise: float = 0.0


def phi(n: int, z: float) -> float:
    """The integral of e^(z (1 - s)) s^(n-1) / (n-1)! over s from 0 to 1, n >= 1: phi_{n+1} = (phi_n - 1/n!) / z."""
    if abs(z) < 1:
        return math.fsum(z**k / math.factorial(n + k) for k in range(20))
    value = math.expm1(z) / z
    for k in range(1, n):
        value = (value - 1 / math.factorial(k)) / z
    return value


def first_order(grid: Grid, i: int) -> tuple[float, float]:
    """The factors of x_i and m_i in the exact solution for constant m: sigma'/sigma and alpha' - alpha sigma'/sigma."""
    ratio = grid.sigma[i + 1] / grid.sigma[i]
    return ratio, grid.alpha[i + 1] - grid.alpha[i] * ratio


def posterior(grid: Grid, i: int, forward: float | None = None) -> tuple[float, float, float, float]:
    """x_{i+1} given x_i in the forward process, for any two times (Ho et al. 2020, equations 6 and 7 and section 3.2):
    where x_0 is known, the factors of x_i and x_0 in its mean, and its variance; then its variance where
    x_0 ~ N(0, 1), which is beta if alpha^2 + sigma^2 = 1.

    ``forward``: the variance of q(x_i | x_{i+1}), where it is known better than the grid tells it.
    """
    scale = grid.alpha[i] / grid.alpha[i + 1]
    if forward is None:
        forward = grid.sigma[i] ** 2 - (scale * grid.sigma[i + 1]) ** 2
    share = grid.sigma[i + 1] ** 2 / grid.sigma[i] ** 2
    marginal = (grid.alpha[i + 1] ** 2 + grid.sigma[i + 1] ** 2) / (grid.alpha[i] ** 2 + grid.sigma[i] ** 2)
    return scale * share, grid.alpha[i + 1] * forward / grid.sigma[i] ** 2, forward * share, forward * marginal
