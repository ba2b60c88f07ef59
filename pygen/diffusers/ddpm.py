"""The DDPM and DDIM family: steps between training timesteps of a variance-preserving schedule."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import diffusers
import numpy as np
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from torch import Tensor

from pygen.diffusers.base import Columns, Key, OfTimestep
from pygen.diffusers.noise import Generators, draw_noise
from pygen.diffusion.rows import columns, conversion
from pygen.diffusion.solvers import Grid, ddim


def _clip(config: Any) -> Columns:
    """The clamp of the predicted x_0; to [-1, 1] where a threshold made on the device scales it."""
    if config.thresholding:
        return {"low": -1.0, "high": 1.0}
    if config.clip_sample:
        return {"low": -config.clip_sample_range, "high": config.clip_sample_range}
    return {}


def _needs_timesteps(scheduler: OfTimestep) -> None:
    if scheduler.num_inference_steps is None:
        raise ValueError(
            "Number of inference steps is 'None', you need to run 'set_timesteps' after creating the scheduler"
        )


class DDIMScheduler(OfTimestep, diffusers.DDIMScheduler):
    def _run(self, timestep: int, eta: float, use_clipped_model_output: bool) -> Iterable[Key]:
        return ((t, eta, use_clipped_model_output) for t in self._host("timesteps"))

    def _row(self, timestep: int, eta: float, use_clipped_model_output: bool) -> Columns:
        level = self._level(timestep)
        before = self._level(timestep - self.config.num_train_timesteps // self.num_inference_steps)
        grid = Grid(*np.array([level, before]).T)
        step = ddim(grid, eta=eta, use_clipped_model_output=use_clipped_model_output)[0]
        return columns(step, *conversion(self.config.prediction_type, *level)) | {"step": timestep} | _clip(self.config)

    def step(
        self,
        model_output: Tensor,
        timestep: int,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        _needs_timesteps(self)
        noise = None
        if eta > 0:
            if variance_noise is not None and generator is not None:
                raise ValueError("variance_noise and generator: give one of the two")
            if variance_noise is None:
                noise = draw_noise(model_output.shape, generator, model_output.device, model_output.dtype)
            else:
                noise = {"noise": variance_noise}
        prev_sample, pred_original_sample, _ = self._fused(
            (self._time(timestep), eta, use_clipped_model_output), sample, model_output,
            pred=sample.dtype, noise=noise, threshold=self.config.thresholding,
        )  # fmt: skip
        if not return_dict:
            return prev_sample, pred_original_sample
        return DDIMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=pred_original_sample)
