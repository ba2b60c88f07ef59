"""DPM-Solver and DPM-Solver++, multistep and singlestep, of the ODE and of the SDE.

Lu et al. 2022, "DPM-Solver: a fast ODE solver for diffusion probabilistic model sampling in around 10 steps" and
"DPM-Solver++: fast solver for guided sampling of diffusion probabilistic models". With lambda = log(alpha / sigma) and
h = lambda' - lambda, a step solves the linear part exactly and integrates D0 + D1 s + D2 s^2 / 2, a polynomial through
values of the model, over s from 0 to 1. "dpmsolver++" takes the prediction of x_0 for that value, "dpmsolver" that of
epsilon. The SDE ("sde-") has noise of strength ``eta``: 1 reverses the forward process, 0 would be the ODE.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from pygen.diffusion.solvers.base import (
    CARRIED,
    NOISE,
    Combination,
    Grid,
    Point,
    SolverStep,
    Update,
    X,
    ancestral,
    not_negative,
    one_of,
    past,
    phi,
    usable_order,
)

ALGORITHM_TYPES = ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++")
SINGLESTEP_TYPES = ("dpmsolver", "dpmsolver++", "sde-dpmsolver++")
SOLVER_TYPES = ("midpoint", "heun")


def multistep_update(
    grid: Grid,
    i: int,
    order: int,
    *,
    algorithm_type: str = "dpmsolver++",
    solver_type: str = "midpoint",
    previous: Sequence[int] | None = None,
    eta: float = 1.0,
    half: float = 0.5,
) -> Update:
    """From i to i + 1 by the values at i and, from order 2 on, at the times ``previous``: i - 1, i - 2 where left out.

    Order 3 has D2 / 2 in the place of D2, as in the authors' code, and knows one formula for both solver types.
    ``half``: the last term of phi_3(z) = (phi_2(z) - 1/2) / z; diffusers has -1/2 in its "sde-dpmsolver++".
    """
    nodes = tuple((i - 1, i - 2) if previous is None else previous)[: order - 1]
    midpoint = solver_type == "midpoint" and order == 2
    return _update(grid, i, i + 1, nodes, algorithm_type, midpoint, 1.0, eta, half)


def singlestep_update(
    grid: Grid,
    start: int,
    stages: Sequence[int],
    end: int,
    *,
    algorithm_type: str = "dpmsolver++",
    solver_type: str = "midpoint",
    eta: float = 1.0,
    half: float = 0.5,
) -> Update:
    """From ``start`` to ``end`` by the values at ``start`` and at ``stages`` (none, one or two) between them.

    With two stages, "midpoint" reads the later one only, as DPM-Solver-3 ends, and "heun" is the parabola's integral.
    """
    if len(stages) == 2 and solver_type == "midpoint":
        x, (at_start, at_last), noise = _update(grid, start, end, stages[1:], algorithm_type, False, 2.0, eta, half)
        return Update(x, (at_start, 0.0, at_last), noise)
    return _update(grid, start, end, tuple(stages), algorithm_type, solver_type == "midpoint", 2.0, eta, half)


def _update(
    grid: Grid,
    start: int,
    end: int,
    nodes: Sequence[int],
    algorithm_type: str,
    midpoint: bool,
    of_square: float,
    eta: float,
    half: float,
) -> Update:
    alpha, sigma = grid.alpha[start], grid.sigma[start]
    next_alpha, next_sigma = grid.alpha[end], grid.sigma[end]
    if not algorithm_type.startswith("sde-") or next_sigma == 0:  # the clean end is reached without noise
        eta = 0.0
    if algorithm_type.endswith("++"):
        shrink = next_sigma * alpha / (next_alpha * sigma)  # e^-h
        x = next_sigma / sigma * shrink**eta
        of_d0 = next_alpha - alpha * x
        noise = next_sigma * math.sqrt(1 - shrink ** (2 * eta))
    else:
        x = next_alpha / alpha
        of_d0 = (1 + eta) * (next_sigma - sigma * x)
        noise = math.sqrt(eta * ((sigma * x) ** 2 - next_sigma**2))
    if not nodes:
        return Update(x, (of_d0,), noise)

    log_snr = grid.log_snr
    h = log_snr[end] - log_snr[start]
    if algorithm_type.endswith("++"):
        z = -(1 + eta) * h
        scale = -z * next_alpha
    else:
        z = h
        scale = -(1 + eta) * h * next_sigma
    of_d1 = of_d0 / 2 if midpoint else scale * phi(2, z)  # and of_d0 = scale * phi(1, z)
    r = [(log_snr[node] - log_snr[start]) / h for node in nodes]
    if len(r) == 1:
        return Update(x, (of_d0 - of_d1 / r[0], of_d1 / r[0]), noise)
    # The parabola's factors of s and s^2, by Lagrange.
    of_d2 = of_square * scale * (phi(3, z) + (0.5 - half) / z)
    places = [0.0, *r]
    model = [of_d0, 0.0, 0.0]
    for j, place in enumerate(places):
        one, other = (places[k] for k in range(3) if k != j)
        model[j] += (of_d2 - of_d1 * (one + other)) / ((place - one) * (place - other))
    return Update(x, tuple(model), noise)


def dpm_multistep(
    grid: Grid,
    *,
    order: int = 2,
    algorithm_type: str = "dpmsolver++",
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
) -> list[SolverStep]:
    """``order``: 1 to 3. ``lower_order_final``: lower it towards the end, as it always is where sigma ends at 0."""
    one_of((1, 2, 3), order=order)
    one_of(ALGORITHM_TYPES, algorithm_type=algorithm_type)
    one_of(SOLVER_TYPES, solver_type=solver_type)
    steps = []
    for i in range(grid.steps):
        usable = usable_order(grid, i, order, lower_order_final)
        update = multistep_update(grid, i, usable, algorithm_type=algorithm_type, solver_type=solver_type)
        steps.append(SolverStep(update.of(), epsilon=not algorithm_type.endswith("++")))
    return steps


def block(points: Sequence[Point], algorithm_type: str, solver_type: str, stage_solver_type: str) -> list[SolverStep]:
    """A singlestep method of order 1 to 3 from the first point to the last, evaluated at all but the last.

    Its stages all begin at the first sample. That is carried where the history is of x_0; where it is of epsilon, the
    stage before, which has no noise, is undone.
    """
    grid = Grid.through(*points)
    data = algorithm_type.endswith("++")
    steps = []
    start = X
    for j, point in enumerate(points[:-1]):
        last = j == grid.steps - 1
        update = singlestep_update(
            grid, 0, range(1, j + 1), j + 1,
            algorithm_type=algorithm_type, solver_type=solver_type if last else stage_solver_type,
        )  # fmt: skip
        following = update.of(start, range(j, -1, -1))
        steps.append(SolverStep(following, start if data and not last else None, at=point, epsilon=not data))
        start = CARRIED if data else _undone(update, range(j + 1, 0, -1))
    return steps


def _undone(update: Update, ago: Sequence[int]) -> Combination:
    """The sample that an update without noise began at, from the one that it made."""
    known = (factor * past(k) for factor, k in zip(update.model, ago, strict=True))
    return 1 / update.x * (X - sum(known, Combination()))


def embedded_pair(grid: Grid, *, order: int = 3, eta: float = 0.0, s_noise: float = 1.0) -> list[SolverStep]:
    """One step of DPM-Solver-2 or -3, as k-diffusion's ``dpm_adaptive`` tries it: the rows of its stages, then, at the
    last of them, those of two results, of order - 1 and of ``order``, and one that adds noise to a result."""
    one_of((2, 3), order=order)
    not_negative(eta=eta, s_noise=s_noise)
    start, end = grid.point(0), grid.point(1)
    down, up = ancestral(grid, 0, eta)
    inner = [grid.at_rho(start.rho ** (1 - j / order) * down.rho ** (j / order)) for j in range(1, order)]
    points = [start, *inner, down]
    *stages, high = block(points, "dpmsolver", "midpoint", "heun")
    path = Grid.through(*points)
    made = singlestep_update(
        path, 0, range(1, order - 1), order - 1, algorithm_type="dpmsolver", solver_type="heun"
    )  # the sample at the last stage
    ago = range(order - 1, 0, -1)
    lower = singlestep_update(path, 0, range(1, order - 1), order, algorithm_type="dpmsolver")
    low = SolverStep(lower.of(_undone(made, ago), ago), at=high.at, epsilon=True)
    # The row of the lower order puts the present value in the history as well.
    high = replace(high, next=replace(high.next, history=(0.0, *high.next.history)))
    return [*stages, low, high, SolverStep(X + s_noise * up * NOISE, at=end, epsilon=True)]


def dpm_singlestep(
    grid: Grid,
    *,
    order: int = 2,
    algorithm_type: str = "dpmsolver++",
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
) -> list[SolverStep]:
    """Groups of ``order`` steps of the grid, of which each ends a step of that order from the first and its stages are
    evaluated at the others; DPM-Solver-2 and -3, and their ++ (2S) and SDE, with stages where the grid has its times.

    ``lower_order_final``: end with groups that get shorter. A step to sigma = 0 is a group of its own.
    """
    one_of((1, 2, 3), order=order)
    one_of(SINGLESTEP_TYPES, algorithm_type=algorithm_type)
    one_of(SOLVER_TYPES, solver_type=solver_type)
    orders = [order] * (grid.steps // order)
    if rest := grid.steps % order:
        orders.append(rest)
    elif lower_order_final and order > 1:
        orders[-1:] = [order - 1, 1]
    if grid.sigma[-1] == 0 and orders[-1] > 1:
        orders[-1:] = [orders[-1] - 1, 1]
    steps: list[SolverStep] = []
    for size in orders:
        points = [grid.point(len(steps) + j) for j in range(size + 1)]
        steps += block(points, algorithm_type, solver_type, solver_type)
    return steps
