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
from pygen.diffusion.solvers.consistency import renoise
from pygen.ops.affine_step import COLUMNS, HISTORY_COLUMN, MAX_HISTORY, make_table


@dataclass(frozen=True, eq=False)
class StepPlan:
    """The steps of a solver over a grid of times, as ``affine_step`` executes them: one per evaluation of the model.

    table: float64 (steps, columns), see ``pygen.ops.affine_step.COLUMNS``.
    times: float64 (steps + 1,), those of the evaluations and the end of the trajectory.
    timesteps: what the model is told at each step: int64 where the schedule counts training steps, else float32.
    predictions: how many previous predictions a row may read, as its first history terms: m_{i-1}, m_{i-2}, ...
    carried: how many previous second results a row may read, as its next history terms, the latest first.
    initial_scale: standard deviation of the sample at the first time.
    thresholding: the ratio and the largest threshold of ``dynamic_threshold``, whose factors scale the rows, or None.
    """

    solver: str
    schedule: Schedule
    times: Array
    timesteps: Tensor
    table: Tensor
    predictions: int
    carried: int
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
    def guided(self) -> bool:
        """Whether any row reads an unconditional output."""
        base, guidance, negative = (self.table[:, COLUMNS[name]] for name in ("base", "guidance", "negative"))
        return bool((base - guidance - negative != 0).any())

    @cached_property
    def rows(self) -> tuple[Tensor, ...]:
        """For each step, the index of its row as the tensor that ``affine_step`` takes; made once."""
        return torch.arange(self.steps, device=self.table.device).unbind()

    @cached_property
    def inpainting(self) -> Tensor:
        """The table whose two results a mask blends: y_0 is what is known, at the level of the next time, and y_1 the
        plan's next. What is known is the last but one history term; its noise is the last, or the row's own if it has.

        Where the plan carries second results, a row has no room: y_1 is then the sample, after the plan's own row.
        """
        if self.predictions + 2 > MAX_HISTORY:
            raise ValueError(f"solver {self.solver!r} keeps {self.predictions} tensors: no room for what is known")
        if self.carried:
            table = make_table([{"x1": 1.0}]).to(self.table).repeat(self.steps, 1)
            table[:, COLUMNS["step"]] = self.table[:, COLUMNS["step"]]
        else:
            table = self.table.clone()
            table[:, _result(1, table)] = table[:, _result(0, table)]
            table[:, _result(0, table)] = 0.0
        alpha, sigma = (
            torch.as_tensor(of(self.times[1:])).to(table) for of in (self.schedule.alpha, self.schedule.sigma)
        )
        noisy = torch.tensor(self.noisy, device=table.device)
        zero = torch.zeros_like(sigma)
        table[:, COLUMNS["noise0"]] = torch.where(noisy, sigma, zero)
        return torch.cat([table, torch.stack([alpha, zero, torch.where(noisy, zero, sigma), zero], dim=1)], dim=1)

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
    strength: float = 1.0,
    device: torch.device | str = "cpu",
    **options: Any,
) -> StepPlan:
    """The table of a solver's steps.

    Args:
        solver: a name of ``pygen.diffusion.solvers.SOLVERS``, or a function like those.
        schedule: a ``Schedule``, its name, or its name and arguments in a dict.
        steps: how many; with ``spacing`` ("leading", "linspace" or "trailing") chooses the times. Or
        times: steps + 1 times, the last the end of the trajectory. They decrease; where they go up, as ``resampled``
            makes them do, the sample is noised to that level, and the solver begins anew.
        strength: the share of the times, the last ones, that is kept: how much of an image is to be changed.
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
        moves = np.diff(grid_times) if grid_times.ndim == 1 else np.zeros(0)
        if len(moves) == 0 or not (moves[[0, -1]] < 0).all() or not (np.abs(moves) > 0).all():
            raise ValueError("times must be a decreasing sequence of at least two numbers, or go up only in between")
        if grid_times.max() > schedule.t_max or grid_times.min() < schedule.t_clean:
            raise ValueError(
                f"times must lie between {schedule.t_clean:g} and {schedule.t_max:g}, the ends of schedule "
                f"{schedule.name!r}; got {grid_times.max():g} to {grid_times.min():g}"
            )
        if steps not in (None, len(grid_times) - 1):
            raise ValueError(f"steps={steps} does not fit times, which makes {len(grid_times) - 1}")
    if not math.isfinite(negative):
        raise ValueError(f"negative must be finite, got {negative!r}")
    kept = int((len(grid_times) - 1) * strength) if 0.0 < strength <= 1.0 else 0
    if kept == 0:
        raise ValueError(
            f"strength must lie in (0, 1] and keep at least one of {len(grid_times) - 1} steps, got {strength!r}"
        )
    grid_times = grid_times[-1 - kept :]
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

    solver_steps, points = _descend(make_steps, schedule, grid_times, options)
    count = len(solver_steps)
    guidances = np.atleast_1d(np.asarray(guidance, dtype=np.float64))
    if guidances.shape not in ((1,), (count,)) or not np.isfinite(guidances).all():
        raise ValueError(f"guidance must be a finite number, or {count} of them, got {guidance!r}")
    guided = np.broadcast_to(guidances, count)
    history = max((len(y.history) for step in solver_steps for y in (step.next, step.carry) if y), default=0)
    carries = any(step.carry is not None for step in solver_steps)
    if history + carries > MAX_HISTORY:
        raise ValueError(f"solver {solver!r} keeps {history + carries} tensors, more than {MAX_HISTORY}")
    predictions, carried = history, int(carries)
    if clip is not None and solver_steps[0].epsilon:  # m is the second result then: see _by_clipped_x_0
        predictions, carried = 0, history
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
            first, last = ((float(schedule.alpha(t)), float(schedule.sigma(t))) for t in grid_times[[0, -1]])
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
        predictions=predictions,
        carried=carried,
        initial_scale=float(points[0].sigma if solver_steps[0].scale is None else solver_steps[0].scale),
        thresholding=thresholding,
    )


def _descend(
    make_steps: Callable[..., list[SolverStep]], schedule: Schedule, times: Array, options: dict[str, Any]
) -> tuple[list[SolverStep], list[Point]]:
    """A solver's steps and where each evaluates the model. What comes before times that go up makes the noised sample
    at once, in one step to the top."""
    steps: list[SolverStep] = []
    points: list[Point] = []
    bottom = None
    for part in np.split(times, np.flatnonzero(np.diff(times) > 0) + 1):
        if len(part) == 1:  # on the way up
            continue
        grid = Grid.of(schedule, part)
        with np.errstate(divide="ignore", invalid="ignore"):
            following = make_steps(grid, **options)
        at = [grid.point(i) if step.at is None else step.at for i, step in enumerate(following)]
        if bottom is not None:
            top = at[0] if following[0].scale is None else at[0]._replace(sigma=np.float64(following[0].scale))
            kept, noise = renoise(bottom, top)
            up = kept * steps[-1].next
            steps[-1] = replace(steps[-1], next=replace(up, noise=math.hypot(up.noise, noise)))
        steps += following
        points += at
        bottom = grid.point(grid.steps)
    return steps, points


def _by_clipped_x_0(step: SolverStep, at: Point) -> SolverStep:
    """A step that reasons in epsilon, by an x_0 that is clipped: epsilon is the second result, for the history."""
    epsilon = direction(at)
    following = replace(step.next, pred=0.0) + step.next.pred * epsilon
    return SolverStep(following, epsilon)


def stack_plans(plans: Sequence[StepPlan]) -> tuple[Tensor, list[int], int, int]:
    """One table for several plans, so that one batch, or one compiled graph, serves all of them.

    Returns:
        the table, the row at which each plan begins in it, and how many previous predictions and how many previous
        second results its rows expect as history terms, in this order.

    Raises:
        ValueError: where these are more than a row has room for.
    """
    predictions = max(plan.predictions for plan in plans)
    carried = max(plan.carried for plan in plans)
    if predictions + carried > MAX_HISTORY:
        raise ValueError(f"together these plans keep {predictions + carried} tensors, more than {MAX_HISTORY}")
    begins = np.cumsum([0] + [plan.steps for plan in plans])
    return torch.cat([widen(plan, predictions, carried) for plan in plans]), begins[:-1].tolist(), predictions, carried


def widen(plan: StepPlan, predictions: int, carried: int) -> Tensor:
    """A plan's table for a history of so many predictions and so many second results, at least as many as its own."""
    table = plan.table.new_zeros(plan.steps, HISTORY_COLUMN + 2 * (predictions + carried))
    own = HISTORY_COLUMN + 2 * plan.predictions
    table[:, :own] = plan.table[:, :own]
    begin = HISTORY_COLUMN + 2 * predictions
    table[:, begin : begin + 2 * plan.carried] = plan.table[:, own:]
    return table


def _result(r: int, table: Tensor) -> list[int]:
    """The columns of y_r."""
    named = [COLUMNS[f"{term}{r}"] for term in ("x", "out", "pred", "noise")]
    return named + list(range(HISTORY_COLUMN + r, table.shape[1], 2))
