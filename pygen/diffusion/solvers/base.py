"""What a solver is made of: it reads a grid of (alpha, sigma) and writes, for each step, what the step combines.

The sample stays in the coordinates the model was trained in, x = alpha x_0 + sigma eps, so that no step has to rescale
the model's input. A method written for x_0 + sigma eps, as those of Karras et al. 2022 and of k-diffusion, is one in
x / alpha and rho = sigma / alpha, and walks the same path on every schedule that has these rho.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np

from pygen.diffusion.schedules import Array, Schedule


class Point(NamedTuple):
    """A place on the path from noise to data, and the time of the schedule that the model is told there.

    Numbers of numpy's: where alpha is 0, quotients are infinite, and the plan says so.
    """

    alpha: np.float64
    sigma: np.float64
    time: float = math.nan

    @property
    def rho(self) -> np.float64:
        return self.sigma / self.alpha


@dataclass(frozen=True)
class Grid:
    """alpha and sigma at the steps + 1 times of a trajectory, noisy to clean; a step goes from i to i + 1.

    Only the solvers that evaluate the model between the times, or that ask for the time itself, need the other two.
    """

    alpha: Array
    sigma: Array
    time: Array | None = None
    schedule: Schedule | None = None

    @staticmethod
    def of(schedule: Schedule, times: Array) -> Grid:
        return Grid(schedule.alpha(times), schedule.sigma(times), times, schedule)

    @staticmethod
    def through(*points: Point) -> Grid:
        alpha, sigma, time = np.array(points).T
        return Grid(alpha, sigma, time)

    @property
    def steps(self) -> int:
        return len(self.alpha) - 1

    @cached_property
    def log_snr(self) -> Array:
        """lambda = log(alpha / sigma), infinite at the ends where sigma or alpha is 0."""
        with np.errstate(divide="ignore"):
            return np.log(self.alpha) - np.log(self.sigma)

    def point(self, i: int) -> Point:
        return Point(self.alpha[i], self.sigma[i], math.nan if self.time is None else float(self.time[i]))

    def at_time(self, time: float) -> Point:
        assert self.schedule is not None
        at = np.array(time)
        return Point(np.float64(self.schedule.alpha(at)), np.float64(self.schedule.sigma(at)), time)

    def at_rho(self, rho: float) -> Point:
        """Where sigma / alpha is rho."""
        assert self.schedule is not None
        return self.at_time(self.schedule.time_of(rho))


@dataclass(frozen=True)
class Combination:
    """x * x_i + pred * m_i + epsilon * eps_i + noise * z + sum_j history[j] * m_{i-1-j} + carry * (what was carried).

    m_i is the prediction that the solver reasons in: of x_0, clipped where the plan clips, or of epsilon where the step
    says so. eps_i is the model's own prediction of epsilon, never clipped. Combinations can be added and scaled.
    """

    x: float = 0.0
    pred: float = 0.0
    epsilon: float = 0.0
    noise: float = 0.0
    history: tuple[float, ...] = ()
    carry: float = 0.0

    __array_ufunc__ = None  # numpy's numbers leave the multiplication to __rmul__

    def __add__(self, other: Combination) -> Combination:
        return Combination(
            self.x + other.x,
            self.pred + other.pred,
            self.epsilon + other.epsilon,
            self.noise + other.noise,
            tuple(a + b for a, b in zip_longest(self.history, other.history, fillvalue=0.0)),
            self.carry + other.carry,
        )

    def __sub__(self, other: Combination) -> Combination:
        return self + -1.0 * other

    def __rmul__(self, factor: float) -> Combination:
        x, pred, epsilon, noise, carry = (
            float(factor * term) for term in (self.x, self.pred, self.epsilon, self.noise, self.carry)
        )
        return Combination(x, pred, epsilon, noise, tuple(float(factor * term) for term in self.history), carry)


X = Combination(x=1.0)
PRED = Combination(pred=1.0)
NOISE = Combination(noise=1.0)
CARRIED = Combination(carry=1.0)


def past(ago: int) -> Combination:
    """m of ``ago`` evaluations before the present one; 0 for the present one."""
    return Combination(history=(0.0,) * (ago - 1) + (1.0,)) if ago else PRED


@dataclass(frozen=True)
class SolverStep:
    """One evaluation of the model: the next sample that it is shown, and what else the next step wants to read.

    at: where the model is evaluated, if not at the grid's own time.
    epsilon: whether m is the prediction of epsilon instead of x_0, for all steps of a solver; such steps carry nothing.
    scale: standard deviation of the initial noise, if it is not the sigma of the first evaluation.
    """

    next: Combination
    carry: Combination | None = None
    at: Point | None = None
    epsilon: bool = False
    scale: float | None = None


class Update(NamedTuple):
    """x' = x * (the sample) + sum_j model[j] * (the model's value at the j-th of the update's times) + noise * z.

    The values are predictions of x_0 or of epsilon, as the update says; the first is the one at the sample.
    """

    x: float
    model: tuple[float, ...]
    noise: float = 0.0

    def of(self, sample: Combination = X, ago: Iterable[int] | None = None) -> Combination:
        """The update of a sample; its values are those of ``ago`` evaluations before: 0, 1, 2, ... where left out."""
        when = range(len(self.model)) if ago is None else ago
        terms = (factor * past(k) for factor, k in zip(self.model, when, strict=True))
        return sum(terms, self.x * sample + self.noise * NOISE)


def phi(n: int, z: float) -> float:
    """The integral of e^(z (1 - s)) s^(n-1) / (n-1)! over s from 0 to 1: phi_{n+1}(z) = (phi_n(z) - 1 / n!) / z."""
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


def ancestral(grid: Grid, i: int, eta: float) -> tuple[Point, float]:
    """A step to i + 1 as a step to less noise and then noise (k-diffusion's ancestral step): where the deterministic
    part ends, and the deviation of the noise, ``eta`` times the posterior's, at most the next sigma."""
    alpha, sigma, time = grid.point(i + 1)
    share = (sigma * grid.alpha[i] / (alpha * grid.sigma[i])) ** 2  # posterior: sigma'^2 (1 - share)
    down, up = max(1 - eta**2 + eta**2 * share, 0.0), min(eta * math.sqrt(1 - share), 1.0)
    return Point(alpha, sigma * np.sqrt(down), time), float(sigma * up)


def direction(at: Point) -> Combination:
    """epsilon as m has it where m predicts x_0: the derivative of x / alpha by sigma / alpha."""
    return 1 / at.sigma * X - at.alpha / at.sigma * PRED


def transfer(start: Point, end: Point, sample: Combination = X, pred: Combination = PRED) -> Combination:
    """The exact solution for constant m, from one point to another."""
    of_x, of_pred = first_order(Grid.through(start, end), 0)
    return of_x * sample + of_pred * pred


def with_churn(
    grid: Grid,
    step: Callable[[Point, Point], list[SolverStep]],
    s_churn: float,
    s_tmin: float,
    s_tmax: float,
    s_noise: float,
) -> list[SolverStep]:
    """The steps of ``step(start, end)`` with the noise of Karras et al. 2022, algorithm 2, lines 4 to 6.

    That raises a sample before it is evaluated; here the row before makes the raised sample at once, and the initial
    noise is as large as the first evaluation has it.
    """
    not_negative(s_churn=s_churn, s_noise=s_noise)
    points = [grid.point(i) for i in range(grid.steps + 1)]
    starts = points.copy()
    for i, point in enumerate(points[:-1]):
        if s_churn > 0 and s_tmin <= point.rho <= s_tmax:
            starts[i] = grid.at_rho(point.rho * (1 + min(s_churn / grid.steps, math.sqrt(2) - 1)))
    kept = [start.alpha / point.alpha if start != point else 1.0 for point, start in zip(points, starts, strict=True)]
    noise = [
        s_noise * math.sqrt(start.sigma**2 - (ratio * point.sigma) ** 2) if start != point else 0.0
        for point, start, ratio in zip(points, starts, kept, strict=True)
    ]
    rows: list[SolverStep] = []
    for i in range(grid.steps):
        *stages, last = step(starts[i], points[i + 1])
        rows += [*stages, replace(last, next=kept[i + 1] * last.next + noise[i + 1] * NOISE)]
    return [replace(rows[0], scale=math.hypot(kept[0] * points[0].sigma, noise[0])), *rows[1:]]


def usable_order(grid: Grid, i: int, order: int, lower_order_final: bool) -> int:
    """What a multistep method of an order may use at i: of the times before, those at finite lambda, and no slope in a
    step that ends at sigma = 0; towards the end, if asked, no more than the steps that are left."""
    finite = np.isfinite(grid.log_snr)
    if not finite[i + 1] or not finite[i]:
        return 1
    reach = next((k for k in range(1, order) if k > i or not finite[i - k]), order)
    return min(reach, grid.steps - i) if lower_order_final else reach


def not_negative(**options: float) -> None:
    for name, value in options.items():
        if not value >= 0:
            raise ValueError(f"{name} must be at least 0, got {value!r}")


def one_of(choices: Sequence[Any], **options: Any) -> None:
    for name, value in options.items():
        if value not in choices:
            raise ValueError(f"{name} must be {', '.join(map(str, choices[:-1]))} or {choices[-1]}, got {value!r}")
