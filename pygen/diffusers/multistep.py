"""Linear multistep methods: a step reads the model's last outputs (LMS, PNDM)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import diffusers
import numpy as np
from diffusers.schedulers.scheduling_lms_discrete import LMSDiscreteScheduler as DiffusersLMSDiscreteScheduler
from diffusers.schedulers.scheduling_lms_discrete import LMSDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from pygen.diffusers.base import Columns, FusedScheduler, HostTensor, Key, OfTimestep, promoted, returned
from pygen.diffusers.karras import VarianceExploding, at
from pygen.diffusion.rows import columns, conversion
from pygen.diffusion.solvers import Grid, SolverStep
from pygen.diffusion.solvers.base import PRED, X, direction, past
from pygen.diffusion.solvers.multistep import ADAMS_BASHFORTH, adams_bashforth_update, lms_update


class LMSDiscreteScheduler(VarianceExploding, DiffusersLMSDiscreteScheduler):
    """k-diffusion's linear multistep method; its coefficients need no quadrature, and no scipy."""

    def _run(self, kind: str, *of_step: Any) -> Iterable[Key]:
        if kind == "input":
            return super()._run(kind, *of_step)
        index, _, values, most = of_step
        steps = enumerate(range(index, len(self._host("timesteps"))))
        return (("step", i, min(i + 1, most), min(i + 1, most, values + n), most) for n, i in steps)

    def _step_row(self, kind: str, *of_step: Any) -> Columns:
        index, order, values, _ = of_step
        here, _ = self._interval(index)
        sigmas = self._host("sigmas")[index - order + 1 : index + 2]
        update = lms_update(Grid.through(*map(at, sigmas)), order - 1, range(order - 2, -1, -1))
        # After a start within the schedule, diffusers weighs the values there are as if there were all of the order.
        first, *others = update.model[:values]
        slope = direction(at(here))
        following = sum((weight * past(ago) for ago, weight in enumerate(others, 1)), X + first * slope)
        return columns(SolverStep(following, slope), self._pred(here))

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        order: int = 4,
        return_dict: bool = True,
    ) -> LMSDiscreteSchedulerOutput | tuple[Tensor, Tensor]:
        if not self.is_scale_input_called:
            warnings.warn(
                "scale_model_input should be called before step, or the model sees a sample of another scale",
                stacklevel=2,
            )
        if order < 1:
            raise ValueError(f"order must be at least 1, got {order}")
        index = self._index(timestep)
        dtype, pred = self._dtypes(sample, model_output)
        if len(self.derivatives) >= order:
            self.derivatives.pop(0)
        this_order = min(index + 1, order)
        previous = self.derivatives[::-1][: this_order - 1]
        prev_sample, pred_original_sample, slope = self._fused(
            ("step", index, this_order, len(previous) + 1, order), sample, model_output, history=previous,
            dtype=dtype, pred=pred, second=dtype,
        )  # fmt: skip
        self.derivatives.append(slope)
        self._step_index = index + 1
        return returned(
            LMSDiscreteSchedulerOutput, return_dict, prev_sample=prev_sample, pred_original_sample=pred_original_sample
        )


class PNDMScheduler(OfTimestep, diffusers.PNDMScheduler):
    """PNDM (Liu et al. 2022): Runge-Kutta for the first values, then Adams-Bashforth; its skip_prk_steps is PLMS.

    As in diffusers, values are the model's outputs; where they are v, their combination is taken for v at the sample
    that the step begins with.
    """

    counter: int
    ets: list[Tensor]
    cur_model_output: Tensor | int
    cur_sample: Tensor | None

    @property
    def _stride(self) -> int:
        if self.num_inference_steps is None:
            raise ValueError("num_inference_steps is None: call set_timesteps after creating the scheduler")
        return self.config.num_train_timesteps // self.num_inference_steps

    def _run(self, timestep: int, before: int, weights: tuple[float, ...], running: float) -> Iterable[Key]:
        """A step by weights of the output and the history; ``running`` adds to the running sum of outputs."""
        times = self._host("timesteps")
        if not running and weights in ADAMS_BASHFORTH:
            return ((t, t - self._stride, weights, 0.0) for t in times)
        return (self._runge_kutta(i, t, i % 4 > 0) for i, t in enumerate(times[: len(self.prk_timesteps)]))

    def _row(self, timestep: int, before: int, weights: tuple[float, ...], running: float) -> Columns:
        prediction = self.config.prediction_type
        if prediction not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction_type must be epsilon or v_prediction, got {prediction!r}")
        level = self._level(timestep)
        alpha, sigma = np.array([level, self._level_before(before)]).T
        of_sample, (of_epsilon,), _ = adams_bashforth_update(Grid(alpha, sigma), 0, 1)
        of_x, of_out = conversion(prediction, *level)[1]
        first, *others = (of_epsilon * of_out * weight for weight in weights)
        row = {"x0": of_sample + of_epsilon * of_x, "out0": first, "out1": running}
        row |= {f"h{j}_0": weight for j, weight in enumerate(others)}
        return row | ({"h0_1": 1.0} if running and others else {})

    def step(
        self, model_output: Tensor, timestep: int, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        if self._stride and self.counter < len(self.prk_timesteps) and not self.config.skip_prk_steps:
            return self.step_prk(model_output, timestep, sample, return_dict)
        return self.step_plms(model_output, timestep, sample, return_dict)

    def _runge_kutta(self, counter: int, timestep: int, sums: bool) -> Key:
        """The key of a stage; ``sums``: whether there is a running sum already."""
        stage = counter % 4
        before = timestep - (0 if counter % 2 else self._stride // 2)
        begin = int(self.prk_timesteps[counter - stage])
        weight = (1 / 6, 1 / 3, 1 / 3, 1 / 6)[stage]
        if stage == 3:
            return begin, before, (weight, 1.0)[: 1 + sums], 0.0
        return begin, before, (1.0, 0.0)[: 1 + sums], weight

    def step_prk(
        self, model_output: Tensor, timestep: int, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        stage = self.counter % 4
        sums = isinstance(self.cur_model_output, Tensor)
        key = self._runge_kutta(self.counter, self._time(timestep), sums)
        if stage == 0:
            self.ets.append(model_output)
            self.cur_sample = sample
        # cur_sample is None only for those who call this without a first stage.
        origin = sample if self.cur_sample is None else self.cur_sample
        prev_sample, _, running = self._fused(
            key, origin, model_output, history=[self.cur_model_output] if sums else [],
            dtype=promoted(origin.dtype, model_output.dtype),
            second=None if stage == 3 else model_output.dtype,
        )  # fmt: skip
        self.cur_model_output = 0 if stage == 3 else running
        self.counter += 1
        return returned(SchedulerOutput, return_dict, prev_sample=prev_sample)

    def step_plms(
        self, model_output: Tensor, timestep: int, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        stride = self._stride
        if not self.config.skip_prk_steps and len(self.ets) < 3:
            raise ValueError(f"{type(self).__name__} without skip_prk_steps needs 12 steps of step_prk first")
        time = self._time(timestep)
        before = time - stride
        weights: tuple[float, ...]
        if self.counter == 1:  # the first step again, by the mean of the outputs at its two ends
            time, before = time + stride, time
            previous, weights = self.ets[-1:], (0.5, 0.5)
            assert self.cur_sample is not None
            sample, self.cur_sample = self.cur_sample, None
        else:
            previous = self.ets[:-4:-1]
            weights = ADAMS_BASHFORTH[len(previous)]
            self.ets = [*previous[::-1], model_output]
            if self.counter == 0:
                self.cur_sample = sample
        prev_sample = self._fused(
            (time, before, weights, 0.0), sample, model_output, history=previous,
            dtype=promoted(sample.dtype, model_output.dtype),
        )[0]  # fmt: skip
        self.counter += 1
        return returned(SchedulerOutput, return_dict, prev_sample=prev_sample)


class IPNDMScheduler(FusedScheduler, diffusers.IPNDMScheduler):
    """PLMS from the first step on, by rising orders, on a schedule of its own whose outputs are v.

    ``ets`` keeps the three last values of epsilon and the present one; diffusers keeps them all.
    """

    ets: list[Tensor]
    alphas = HostTensor()
    betas = HostTensor()  # of which sigma is made in other schedulers, and which are sigma here

    def _run(self, index: int, order: int) -> Iterable[Key]:
        steps = enumerate(range(index, len(self._host("timesteps"))))
        return ((i, min(order + n, len(ADAMS_BASHFORTH))) for n, i in steps)

    def _row(self, index: int, order: int) -> Columns:
        alpha, following = self._host("alphas")[index : index + 2]
        sigma = self._host("betas")[index : index + 2]
        # diffusers divides by 1e-8 where the schedule begins without signal
        grid = Grid(np.array([max(alpha, 1e-8), following]), np.array(sigma))
        step = SolverStep(adams_bashforth_update(grid, 0, order).of(), PRED, epsilon=True)
        return columns(step, (sigma[0], alpha))  # epsilon = sigma x + alpha v

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        index = self._index(timestep)
        previous = self.ets[:-4:-1]
        dtype = promoted(sample.dtype, model_output.dtype)
        prev_sample, _, epsilon = self._fused(
            (index, len(previous) + 1), sample, model_output, history=previous, dtype=dtype, second=dtype
        )
        self.ets = [*previous[::-1], epsilon]
        self._step_index = index + 1
        return returned(SchedulerOutput, return_dict, prev_sample=prev_sample)
