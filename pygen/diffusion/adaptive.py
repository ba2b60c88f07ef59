"""DPM-Solver with steps that the error chooses: k-diffusion's ``dpm_adaptive``, but for what it does to tensors."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from pygen.diffusion.plan import StepPlan, plan
from pygen.diffusion.schedules import Schedule
from pygen.diffusion.solvers import SOLVERS
from pygen.diffusion.solvers.dpm import embedded_pair
from pygen.ops.affine_step import COLUMNS

ADAPTIVE = "dpm_adaptive"


class StepSize:
    """A PID controller with a smooth limiter (Soderlind & Wang 2006)."""

    def __init__(self, h: float, order: float, gains: tuple[float, float, float], accept_safety: float) -> None:
        p, i, d = gains
        self.h = h
        self.powers = ((p + i + d) / order, -(p + 2 * d) / order, d / order)
        self.accept_safety = accept_safety
        self.inverse_errors: list[float] = []

    def accepts(self, error: float) -> bool:
        """Whether a step of this error stands; sets the size of the next attempt."""
        inverse = 1 / (error + 1e-8)
        self.inverse_errors = [inverse, *(self.inverse_errors or [inverse] * 3)[1:]]
        factor = math.prod(e**power for e, power in zip(self.inverse_errors, self.powers, strict=True))
        factor = 1 + math.atan(factor - 1)
        accepted = factor >= self.accept_safety
        if accepted:
            self.inverse_errors = [inverse, *self.inverse_errors[:2]]
        self.h *= factor
        return accepted


class Attempts:
    """The steps of a run from t_max to t_min, each a plan of its own: the stages, two results, and noise.

    order: 2 or 3. rtol, atol: of the error of a step in x / alpha, its root mean square over the batch.
    h_init: the first step in log(alpha / sigma). pcoeff, icoeff, dcoeff, accept_safety: of the controller.
    eta, s_noise: ancestral noise. options: of ``pygen.plan``.
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        order: int = 3,
        rtol: float = 0.05,
        atol: float = 0.0078,
        h_init: float = 0.05,
        pcoeff: float = 0.0,
        icoeff: float = 1.0,
        dcoeff: float = 0.0,
        accept_safety: float = 0.81,
        eta: float = 0.0,
        s_noise: float = 1.0,
        **options: Any,
    ) -> None:
        if "times" in options:
            raise ValueError(f"solver {ADAPTIVE!r} chooses its times, and takes none")
        self.schedule, self.rtol, self.atol = schedule, rtol, atol
        self.options = options
        self.of_pair: dict[str, Any] = {"order": order, "eta": eta, "s_noise": s_noise}
        self.size = StepSize(h_init, 1.5 if eta else order, (pcoeff, icoeff, dcoeff), accept_safety)
        self.time = self.next_time = schedule.t_max
        self.end = schedule.t_min

    def _rho(self, time: float) -> float:
        alpha, sigma = self._alpha(time), float(self.schedule.sigma(np.array(time)))
        if alpha == 0:
            raise ValueError(
                f"solver {ADAPTIVE!r} cannot begin where alpha is 0, as schedule {self.schedule.name!r} does"
            )
        return sigma / alpha

    def _alpha(self, time: float) -> float:
        return float(self.schedule.alpha(np.array(time)))

    @property
    def done(self) -> bool:
        return self.time <= self.end

    @property
    def alphas(self) -> tuple[float, float]:
        """alpha where the attempt begins and where it ends."""
        return self._alpha(self.time), self._alpha(self.next_time)

    def attempt(self, step: int) -> StepPlan:
        """The plan of the next step, whose rows draw their noise as steps from ``step`` on."""
        rho = self._rho(self.time) * math.exp(-self.size.h)
        last = rho <= self._rho(self.end) * (1 + 1e-5)
        self.next_time = self.end if last else self.schedule.time_of(rho)
        made = plan(embedded_pair, self.schedule, times=[self.time, self.next_time], **self.of_pair, **self.options)
        table = made.table.clone()
        table[:, COLUMNS["step"]] += step
        return replace(made, table=table)

    def accepts(self, error: float) -> bool:
        accepted = self.size.accepts(error)
        if accepted:
            self.time = self.next_time
        return accepted

    def denoise(self) -> StepPlan:
        """The last step, from t_min to clean data."""
        return plan(SOLVERS["euler"], self.schedule, times=[self.end, self.schedule.t_clean], **self.options)
