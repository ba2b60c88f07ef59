"""Pseudo numerical methods: Adams-Bashforth on epsilon, for three ways to begin.

Liu et al. 2022, "Pseudo numerical methods for diffusion models on manifolds": the transfer part of equation 11 is the
exact step for constant epsilon; the gradient part is that of a linear multistep method (equation 12) or, in the steps
before it has its values, of Runge-Kutta's (equation 13).
"""

from __future__ import annotations

from pygen.diffusion.solvers.base import PRED, Grid, Point, SolverStep, X, one_of, past
from pygen.diffusion.solvers.multistep import adams_bashforth_update


def _transfer(start: Point, end: Point) -> tuple[float, float]:
    """The factors of x and epsilon in the exact step for constant epsilon."""
    ratio = end.alpha / start.alpha
    return ratio, end.sigma - start.sigma * ratio


def _runge_kutta(start: Point, middle: Point, end: Point) -> list[SolverStep]:
    """Equation 13. The sample at the start is recovered from that of the stage, so that nothing need be carried."""
    half_x, half = _transfer(start, middle)
    whole_x, whole = _transfer(start, end)
    stages = [
        (start, half_x * X + half * PRED),
        (middle, X + half * (PRED - past(1))),
        (middle, whole_x / half_x * (X - half * past(1)) + whole * PRED),
        (end, X + whole / 6 * (PRED - 4.0 * past(1) + 2.0 * past(2) + past(3))),
    ]
    return [SolverStep(following, at=at, epsilon=True) for at, following in stages]


def _adams_bashforth(grid: Grid, steps: list[SolverStep], begins: list[int], i: int, order: int = 4) -> None:
    """Append step i; ``begins`` are the rows whose epsilon was evaluated at the times of the steps before."""
    begins.append(len(steps))
    ago = [len(steps) - begin for begin in begins[::-1][:order]]
    update = adams_bashforth_update(grid, i, len(ago))
    steps.append(SolverStep(update.of(ago=ago), at=grid.point(i), epsilon=True))


def pndm(grid: Grid) -> list[SolverStep]:
    """F-PNDM: three steps of Runge-Kutta, of four evaluations each, halfway in time; then one evaluation a step."""
    steps: list[SolverStep] = []
    begins: list[int] = []
    for i in range(grid.steps):
        if i < 3 and grid.sigma[i + 1] > 0:
            begins.append(len(steps))
            middle = grid.at_time((grid.point(i).time + grid.point(i + 1).time) / 2)
            steps += _runge_kutta(grid.point(i), middle, grid.point(i + 1))
        else:
            _adams_bashforth(grid, steps, begins, i)
    return steps


def plms(grid: Grid) -> list[SolverStep]:
    """As Stable Diffusion samples: the first step by the improved Euler method, of two evaluations, then by as high an
    order, up to 4, as there are values."""
    steps: list[SolverStep] = []
    begins: list[int] = []
    for i in range(grid.steps):
        _adams_bashforth(grid, steps, begins, i)
        if i == 0 and grid.sigma[1] > 0:
            end = grid.point(1)
            correction = _transfer(grid.point(0), end)[1] / 2 * (PRED - past(1))
            steps.append(SolverStep(X + correction, at=end, epsilon=True))
    return steps


def ipndm(grid: Grid, *, order: int = 4) -> list[SolverStep]:
    """Improved PNDM (Zhang & Chen 2023, appendix): as high an order, up to ``order``, as there are values."""
    one_of((1, 2, 3, 4), order=order)
    steps: list[SolverStep] = []
    begins: list[int] = []
    for i in range(grid.steps):
        _adams_bashforth(grid, steps, begins, i, order)
    return steps
