"""A solver as a table of numbers: from a schedule and a grid of times to one row of coefficients per step."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from pygen.diffusion.rows import PREDICTIONS, columns, conversion
from pygen.diffusion.schedules import Array, Schedule, make_schedule
from pygen.diffusion.solvers import SOLVERS, Grid, SolverStep
from pygen.diffusion.solvers.base import Point, direction
from pygen.ops.affine_step import COLUMNS, HISTORY_COLUMN, MAX_HISTORY, make_table


@dataclass(frozen=True, eq=False)
class StepPlan:
    """The steps of a solver over a grid of times, as ``affine_step`` executes them: one per evaluation of the model.

    table: float64 (steps, columns), see ``pygen.ops.affine_step.COLUMNS``.
    times: float64 (steps + 1,), those of the evaluations and the end of the trajectory.
    timesteps: what the model is told at each step: int64 where the schedule counts training steps, else float32.
    history: how many previous predictions a row may read: m_{i-1}, m_{i-2}, ...
    carries: whether each row makes a second result that the next row reads, as its last history term.
    remembers_second: whether the history is of second results instead of predictions.
    initial_scale: standard deviation of the sample at the first time.
    thresholding: the ratio and the largest threshold of ``dynamic_threshold``, whose factors scale the rows, or None.
    """

    solver: str
    schedule: Schedule
    times: Array
    timesteps: Tensor
    table: Tensor
    history: int
    carries: bool
    remembers_second: bool
    initial_scale: float
    thresholding: tuple[float, float] | None

    @property
    def steps(self) -> int:
        return len(self.table)

    @cached_property
    def noisy(self) -> tuple[bool, ...]:
        """For each step, whether its row adds noise."""
        columns = [COLUMNS["noise0"], COLUMNS["noise1"]]
        return tuple((self.table[:, columns] != 0).any(dim=1).tolist())

    @cached_property
    def rows(self) -> tuple[Tensor, ...]:
        """For each step, the index of its row as the tensor that ``affine_step`` takes; made once."""
        return torch.arange(self.steps, device=self.table.device).unbind()

    def to(self, device: torch.device | str) -> StepPlan:
        """This plan with its tensors on a device."""
        return replace(self, timesteps=self.timesteps.to(device), table=self.table.to(device))


def plan(
    solver: str | Callable[..., list[SolverStep]],
    schedule: Schedule | str | dict[str, Any],
    steps: int | None = None,
    *,
    prediction: str = "epsilon",
    guidance: float | Sequence[float] = 1.0,
    negative: float = 0.0,
    clip: tuple[float, float] | None = None,
    thresholding: tuple[float, float] | None = None,
    spacing: str = "trailing",
    times: ArrayLike | None = None,
    device: torch.device | str = "cpu",
    **options: Any,
) -> StepPlan:
    """The table of a solver's steps.

    Args:
        solver: a name of ``pygen.diffusion.solvers.SOLVERS``, or a function like those.
        schedule: a ``Schedule``, its name, or its name and arguments in a dict.
        steps: how many; with ``spacing`` ("leading", "linspace" or "trailing") chooses the times. Or
        times: steps + 1 decreasing times, the last the end of the trajectory.
        prediction: what the model returns: "epsilon", "sample" (x_0), "v_prediction" (alpha eps - sigma x_0; Salimans &
            Ho 2022) or "flow" (eps - x_0).
        guidance: the factor of classifier-free guidance (Ho & Salimans 2022), one or one per evaluation of the model;
            takes effect in steps that are given an unconditional output. Where it is 1, only the conditional one is
            read: guidance in an interval (Kynkäänniemi et al. 2024).
        negative: the factor of a third output less the unconditional one, for steps that are given one.
        clip: range that the predicted x_0 is clamped to. Or
        thresholding: the ratio and the largest threshold of dynamic thresholding (Saharia et al. 2022, section 2.3): a
            sample's predicted x_0 is clamped to [-s, s] and divided by s, where s is that quantile of its magnitudes,
            but at least 1.
        device: where the table will lie.
        options: the solver's own, see its file.

    Raises:
        ValueError: naming the argument that is wrong.
    """
    if isinstance(solver, str) and solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
    make_steps = SOLVERS[solver] if isinstance(solver, str) else solver
    solver = make_steps.__name__
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction must be one of {', '.join(PREDICTIONS)}, got {prediction!r}")
    known = list(inspect.signature(make_steps).parameters)[1:]
    for option in options:
        if option not in known:
            raise ValueError(f"solver {solver!r} has no option {option!r}; it takes {', '.join(known) or 'none'}")
    schedule = make_schedule(schedule)
    if times is None:
        if steps is None:
            raise ValueError("steps or times must be given")
        grid_times = schedule.times(steps, spacing)
    else:
        grid_times = np.asarray(times, dtype=np.float64)
        if grid_times.ndim != 1 or len(grid_times) < 2 or not (np.diff(grid_times) < 0).all():
            raise ValueError("times must be a decreasing sequence of at least two numbers")
        if grid_times[0] > schedule.t_max or grid_times[-1] < schedule.t_clean:
            raise ValueError(
                f"times must lie between {schedule.t_clean:g} and {schedule.t_max:g}, the ends of schedule "
                f"{schedule.name!r}; got {grid_times[0]:g} to {grid_times[-1]:g}"
            )
        if steps not in (None, len(grid_times) - 1):
            raise ValueError(f"steps={steps} does not fit times, which makes {len(grid_times) - 1}")
    if not math.isfinite(negative):
        raise ValueError(f"negative must be finite, got {negative!r}")
    if clip is not None and not (np.shape(clip) == (2,) and clip[0] < clip[1]):
        raise ValueError(f"clip must be a pair (low, high) with low < high, got {clip!r}")
    if thresholding is not None:
        if not (np.shape(thresholding) == (2,) and 0.0 <= thresholding[0] <= 1.0 <= thresholding[1]):
            raise ValueError(
                f"thresholding must be a pair (ratio in [0, 1], largest threshold of at least 1), got {thresholding!r}"
            )
        if clip is not None:
            raise ValueError("give clip or thresholding, not both")
        clip = (-1.0, 1.0)
    low, high = (-math.inf, math.inf) if clip is None else clip

    grid = Grid.of(schedule, grid_times)
    with np.errstate(divide="ignore", invalid="ignore"):
        solver_steps = make_steps(grid, **options)
    count = len(solver_steps)
    guidances = np.atleast_1d(np.asarray(guidance, dtype=np.float64))
    if guidances.shape not in ((1,), (count,)) or not np.isfinite(guidances).all():
        raise ValueError(f"guidance must be a finite number, or {count} of them, got {guidance!r}")
    guided = np.broadcast_to(guidances, count)
    points = [grid.point(i) if step.at is None else step.at for i, step in enumerate(solver_steps)]
    history = max((len(y.history) for step in solver_steps for y in (step.next, step.carry) if y), default=0)
    carries = any(step.carry is not None for step in solver_steps)
    if history + carries > MAX_HISTORY:
        raise ValueError(f"solver {solver!r} keeps {history + carries} tensors, more than {MAX_HISTORY}")
    remembers_second = clip is not None and history > 0 and solver_steps[0].epsilon
    rows = []
    for i, (step, point) in enumerate(zip(solver_steps, points, strict=True)):
        x_0, epsilon = conversion(prediction, point.alpha, point.sigma)
        if step.epsilon and clip is None:
            row = columns(step, epsilon, history=history)
        elif step.epsilon:
            row = columns(_by_clipped_x_0(step, point), x_0, history=history)
        else:
            row = columns(step, x_0, epsilon, history)
        if not all(map(math.isfinite, row.values())):
            first, last = ((float(grid.alpha[k]), float(grid.sigma[k])) for k in (0, -1))
            raise ValueError(
                f"solver {solver!r} has no finite coefficients for prediction {prediction!r} on these times: "
                f"(alpha, sigma) runs from {first} to {last}"
            )
        rows.append(row | {"step": i, "guidance": guided[i], "negative": negative, "low": low, "high": high})

    evaluated = np.array([point.time for point in points])
    whole = schedule.num_train_timesteps is not None and (evaluated == np.round(evaluated)).all()
    return StepPlan(
        solver=solver,
        schedule=schedule,
        times=np.append(evaluated, grid_times[-1]),
        timesteps=torch.tensor(evaluated, dtype=torch.int64 if whole else torch.float32, device=device),
        table=make_table(rows, history + carries).to(device),
        history=history,
        carries=carries,
        remembers_second=remembers_second,
        initial_scale=float(points[0].sigma if solver_steps[0].scale is None else solver_steps[0].scale),
        thresholding=thresholding,
    )


def _by_clipped_x_0(step: SolverStep, at: Point) -> SolverStep:
    """A step that reasons in epsilon, by an x_0 that is clipped: epsilon is the second result, for the history."""
    epsilon = direction(at)
    following = replace(step.next, pred=0.0) + step.next.pred * epsilon
    return SolverStep(following, epsilon)


def stack_plans(plans: Sequence[StepPlan]) -> tuple[Tensor, list[int], int]:
    """One table for several plans, so that one batch, or one compiled graph, serves all of them.

    Returns:
        the table, the row at which each plan begins in it, and the number of previous predictions that its rows expect;
        one more history term, the carried one, comes last.

    Raises:
        ValueError: where a plan remembers second results, since the others remember predictions; where the plans
            together need more history than a row has.
    """
    for plan in plans:
        if plan.remembers_second:
            raise ValueError(f"solver {plan.solver!r} with clip remembers what others do not, and cannot be stacked")
    history = max(plan.history for plan in plans)
    if history + 1 > MAX_HISTORY:
        raise ValueError(f"the plans keep {history} predictions and one more tensor, more than {MAX_HISTORY}")
    begins = np.cumsum([0] + [plan.steps for plan in plans])
    table = plans[0].table.new_zeros(int(begins[-1]), HISTORY_COLUMN + 2 * (history + 1))
    for begin, plan in zip(begins, plans, strict=False):
        part = table[begin : begin + plan.steps]
        own = HISTORY_COLUMN + 2 * plan.history
        part[:, :own] = plan.table[:, :own]
        if plan.carries:
            part[:, -2:] = plan.table[:, -2:]
    return table, begins[:-1].tolist(), history
