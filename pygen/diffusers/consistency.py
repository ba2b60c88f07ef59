"""Few-step samplers, whose models jump to the data: x_0 is predicted, then noised anew."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.schedulers.scheduling_lcm import LCMSchedulerOutput
from diffusers.schedulers.scheduling_scm import SCMSchedulerOutput
from diffusers.schedulers.scheduling_tcd import TCDSchedulerOutput
from torch import Tensor

from pygen.diffusers.base import Columns, FusedScheduler, Key, OfTimestep, promoted, returned
from pygen.diffusers.noise import Generators, draw_noise
from pygen.diffusion.rows import columns, conversion
from pygen.diffusion.solvers.base import NOISE, PRED, Combination, Point, SolverStep, X
from pygen.diffusion.solvers.consistency import renoise


class _OfTimestepAndIndex(OfTimestep):
    """Steps that begin at the given timestep, and end at the one of the schedule that is next by count."""

    def _check(self) -> None:
        if self.num_inference_steps is None:
            raise ValueError("num_inference_steps is None: call set_timesteps after creating the scheduler")

    def _run(self, timestep: int, index: int, *options: float) -> Iterable[Key]:
        return ((t, i, *options) for i, t in enumerate(self._host("timesteps")))

    def _end(self, index: int, last: int) -> int:
        """The timestep at which the step of an index ends; ``last`` for the last."""
        times = self._host("timesteps")
        return times[index + 1] if index + 1 < len(times) else last

    def _is_last(self, index: int) -> bool:
        """Whether a step adds no noise; diffusers counts the timesteps that ``strength`` leaves out, too."""
        return self.num_inference_steps is not None and index == self.num_inference_steps - 1


class LCMScheduler(_OfTimestepAndIndex, diffusers.LCMScheduler):
    """Latent consistency models (Luo et al. 2023, algorithm 3)."""

    def _row(self, timestep: int, index: int) -> Columns:
        skip, out = self.get_scalings_for_boundary_condition_discrete(timestep)
        denoised = skip * X + out * PRED
        alpha, sigma = (1.0, 0.0) if self._is_last(index) else self._level_before(self._end(index, timestep))
        step = SolverStep(alpha * denoised + sigma * NOISE, denoised)
        of_x0, _ = self._conversion(self._level(timestep))
        return {"step": index, **columns(step, of_x0), **self._clip()}

    def step(
        self,
        model_output: Tensor,
        timestep: int,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> LCMSchedulerOutput | tuple[Tensor, Tensor]:
        self._check()
        index = self._index(timestep)
        dtype = promoted(sample.dtype, model_output.dtype)
        noise = None
        if not self._is_last(index):
            noise = draw_noise(model_output.shape, generator, model_output.device, dtype)
        prev_sample, _, denoised = self._fused(
            (self._time(timestep), index), sample, model_output,
            dtype=dtype, second=dtype, noise=noise, threshold=self._thresholds,
        )  # fmt: skip
        self._step_index = index + 1
        return returned(LCMSchedulerOutput, return_dict, prev_sample=prev_sample, denoised=denoised)


class TCDScheduler(_OfTimestepAndIndex, diffusers.TCDScheduler):
    """Trajectory consistency distillation (Zheng et al. 2024, algorithm 4): past the next timestep along the predicted
    path, and back to it by noise. As in diffusers, clip_sample and thresholding change nothing."""

    def _row(self, timestep: int, index: int, eta: float) -> Columns:
        end = self._end(index, 0)
        between = math.floor(np.float32(1.0 - eta) * np.float32(end))  # in float32, as diffusers has it
        alpha, sigma = np.array(self._level(between))
        noised = Combination(pred=alpha, epsilon=sigma)
        kept, noise = 1.0, 0.0
        if eta > 0 and not self._is_last(index):
            kept, noise = renoise(Point(alpha, sigma), Point(*np.array(self._level_before(end))))
        step = SolverStep(kept * noised + noise * NOISE, noised)
        return {"step": index, **columns(step, *conversion(self.config.prediction_type, *self._level(timestep)))}

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.3,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> TCDSchedulerOutput | tuple[Tensor, Tensor]:
        self._check()
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must lie in [0, 1], got {eta!r}")
        index = self._index(timestep)
        dtype = promoted(sample.dtype, model_output.dtype)
        noise = None
        if eta > 0 and not self._is_last(index):
            noise = draw_noise(model_output.shape, generator, model_output.device, dtype)
        prev_sample, _, pred_noised_sample = self._fused(
            (self._time(timestep), index, eta), sample, model_output, dtype=dtype, second=dtype, noise=noise
        )
        self._step_index = index + 1
        return returned(TCDSchedulerOutput, return_dict, prev_sample=prev_sample, pred_noised_sample=pred_noised_sample)


class SCMScheduler(FusedScheduler, diffusers.SCMScheduler):
    """Continuous-time consistency models (Lu & Song 2024) of TrigFlow, x = cos(t) x_0 + sin(t) z."""

    def _run(self, index: int) -> Iterable[Key]:
        return ((i,) for i in range(index, len(self._host("timesteps")) - 1))

    def _row(self, index: int) -> Columns:
        time, following = self._host("timesteps")[index : index + 2]
        return {
            "step": index,
            "x0": math.cos(following) * math.cos(time), "out0": -math.cos(following) * math.sin(time),
            "noise0": math.sin(following) * self.config.sigma_data,
            "x1": math.cos(time), "out1": -math.sin(time),
        }  # fmt: skip

    def step(
        self,
        model_output: Tensor,
        timestep: float,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> Any:
        if self.num_inference_steps is None:
            raise ValueError("num_inference_steps is None: call set_timesteps after creating the scheduler")
        if self.config.prediction_type != "trigflow":
            raise ValueError(f"prediction_type must be trigflow, got {self.config.prediction_type!r}")
        index = self._index(timestep)
        # diffusers draws in the default dtype, and its noise decides the dtype of the sample.
        of_noise = torch.get_default_dtype()
        dtype = promoted(sample.dtype, model_output.dtype)
        prev_sample, _, pred_original_sample = self._fused(
            (index,), sample, model_output, dtype=promoted(dtype, of_noise), second=dtype,
            noise=draw_noise(model_output.shape, generator, model_output.device, of_noise),
        )  # fmt: skip
        self._step_index = index + 1
        return returned(
            SCMSchedulerOutput, return_dict, prev_sample=prev_sample, pred_original_sample=pred_original_sample
        )
