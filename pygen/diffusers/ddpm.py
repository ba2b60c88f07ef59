"""The DDPM and DDIM family: steps between training timesteps of a variance-preserving schedule."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_ddim_cogvideox import DDIMSchedulerOutput as CogVideoXDDIMSchedulerOutput
from diffusers.schedulers.scheduling_ddim_inverse import DDIMSchedulerOutput as DDIMInverseSchedulerOutput
from diffusers.schedulers.scheduling_ddim_parallel import DDIMParallelSchedulerOutput
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.schedulers.scheduling_ddpm_parallel import DDPMParallelSchedulerOutput
from diffusers.schedulers.scheduling_ddpm_wuerstchen import DDPMWuerstchenSchedulerOutput
from diffusers.schedulers.scheduling_dpm_cogvideox import DDIMSchedulerOutput as CogVideoXDPMSchedulerOutput
from diffusers.schedulers.scheduling_repaint import RePaintSchedulerOutput
from diffusers.schedulers.scheduling_unclip import UnCLIPSchedulerOutput
from diffusers.utils import BaseOutput
from torch import Tensor

from pygen.diffusers.base import Columns, FusedScheduler, HostTensor, Key, Level, OfTimestep, Rows, returned, upload
from pygen.diffusers.noise import Generators, draw_noise
from pygen.diffusion.rows import columns, conversion
from pygen.diffusion.solvers import Combination, Grid, SolverStep, ddim, euler
from pygen.diffusion.solvers.base import posterior
from pygen.diffusion.solvers.dpm import multistep_update
from pygen.ops.affine_step import make_table


def _grid(*levels: Level) -> Grid:
    alpha, sigma = np.array(levels).T
    return Grid(alpha, sigma)


class _DDPM(OfTimestep):
    """The step of Ho et al. 2020 to the next timestep of the schedule, with the variances of Nichol & Dhariwal 2021."""

    custom_timesteps: bool
    variance_type: str
    _output: type[BaseOutput]

    def _previous(self, timestep: int) -> int:
        if not (self.custom_timesteps or self.num_inference_steps):
            return timestep - 1
        times = self._host("timesteps")
        after = times.index(timestep) + 1
        return int(times[after]) if after < len(times) else -1

    def _run(self, timestep: int) -> Iterable[Key]:
        return ((t,) for t in self._host("timesteps"))

    def _row(self, timestep: int) -> Columns:
        return self._between(timestep, self._level(timestep), self._level_before(self._previous(timestep)))

    def _between(self, timestep: int, level: Level, before: Level, beta: float | None = None) -> Columns:
        if beta is None:  # rounded as diffusers rounds it, which shows in its samples where beta is small
            beta = 1.0 - float(np.float32(level[0] ** 2 / before[0] ** 2))
        of_x, of_x0, small, large = posterior(_grid(level, before), 0, beta)
        small = max(small, 1e-20)
        row = {"step": timestep, "x0": of_x, "pred0": of_x0}
        row["pred_x"], row["pred_out"] = self._conversion(level)[0]
        if timestep > 0:
            row["noise0"] = 1.0
            if self.variance_type == "learned_range":  # the output -1 means the small variance, 1 the large one
                row["log_var_shift"] = (math.log(large) + math.log(small)) / 2
                row["log_var_scale"] = (math.log(large) - math.log(small)) / 2
            elif self.variance_type != "learned":
                row["noise0"] = math.sqrt(large if self.variance_type.startswith("fixed_large") else small)
        return row | self._clip()

    def step(
        self,
        model_output: Tensor,
        timestep: int,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> Any:
        time = self._time(timestep)
        return self._step((time,), time, model_output, sample, generator, return_dict)

    def _step(
        self,
        key: Key,
        time: float,
        model_output: Tensor,
        sample: Tensor,
        generator: Generators,
        return_dict: bool,
    ) -> Any:
        how: dict[str, Any] = {}
        if self.variance_type in ("learned", "learned_range"):
            channels = sample.shape[1]
            if model_output.shape[1] == 2 * channels:
                how["noise_scale"] = model_output[:, channels:]
                how["noise_scale_kind"] = "variance" if self.variance_type == "learned" else "log_variance"
                model_output = model_output[:, :channels]
            elif time > 0:
                raise ValueError(
                    f"model_output must have {2 * channels} channels where variance_type is {self.variance_type!r}, "
                    f"got {model_output.shape[1]}"
                )
        if time > 0:
            how["noise"] = draw_noise(model_output.shape, generator, model_output.device, model_output.dtype)
        prev_sample, pred_original_sample, _ = self._fused(
            key, sample, model_output, pred=sample.dtype, threshold=self._thresholds, **how
        )
        return returned(self._output, return_dict, prev_sample=prev_sample, pred_original_sample=pred_original_sample)


class DDPMScheduler(_DDPM, diffusers.DDPMScheduler):
    """DDPM (Ho et al. 2020). The variance of "fixed_large_log", of which diffusers makes NaN, is beta."""

    _output = DDPMSchedulerOutput


class UnCLIPScheduler(_DDPM, diffusers.UnCLIPScheduler):
    """DDPM for the models of DALL-E 2 (Ramesh et al. 2022), which names the timestep that a step leads to."""

    _output = UnCLIPSchedulerOutput
    betas = HostTensor()

    def _run(self, timestep: int, before: int) -> Iterable[Key]:
        times = self._host("timesteps")
        return *itertools.pairwise(times), (times[-1], times[-1] - 1)

    def _row(self, timestep: int, before: int) -> Columns:
        beta = self._host("betas")[timestep] if before == timestep - 1 else None
        return self._between(timestep, self._level(timestep), self._level_before(before), beta)

    def step(
        self,
        model_output: Tensor,
        timestep: int,
        sample: Tensor,
        prev_timestep: int | None = None,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> UnCLIPSchedulerOutput | tuple[Tensor, Tensor]:
        time = self._time(timestep)
        before = time - 1 if prev_timestep is None else self._time(prev_timestep)
        return self._step((time, before), time, model_output, sample, generator, return_dict)


class _DDIM(OfTimestep):
    """The step of Song et al. 2021, over num_train_timesteps // num_inference_steps training timesteps."""

    _output: type[BaseOutput]

    def _before(self, timestep: int) -> int:
        if self.num_inference_steps is None:
            raise ValueError(
                "Number of inference steps is 'None', you need to run 'set_timesteps' after creating the scheduler"
            )
        return timestep - self.config.num_train_timesteps // self.num_inference_steps

    def _run(self, timestep: int, eta: float, use_clipped_model_output: bool) -> Iterable[Key]:
        return ((t, eta, use_clipped_model_output) for t in self._host("timesteps"))

    def _row(self, timestep: int, eta: float, use_clipped_model_output: bool) -> Columns:
        levels = self._level(timestep), self._level_before(self._before(timestep))
        return self._between(timestep, *levels, eta, use_clipped_model_output)

    def _between(self, timestep: int, level: Level, to: Level, eta: float, use_clipped_model_output: bool) -> Columns:
        step = ddim(_grid(level, to), eta=eta, use_clipped_model_output=use_clipped_model_output)[0]
        return columns(step, *self._conversion(level)) | {"step": timestep} | self._clip()

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
    ) -> Any:
        noise = None
        if eta > 0:
            if variance_noise is not None and generator is not None:
                raise ValueError("Cannot pass both generator and variance_noise: give one of the two")
            if variance_noise is None:
                noise = draw_noise(model_output.shape, generator, model_output.device, model_output.dtype)
            else:
                noise = {"noise": variance_noise}
        prev_sample, pred_original_sample, _ = self._fused(
            (self._time(timestep), eta, use_clipped_model_output), sample, model_output,
            pred=sample.dtype, noise=noise, threshold=self._thresholds,
        )  # fmt: skip
        return returned(self._output, return_dict, prev_sample=prev_sample, pred_original_sample=pred_original_sample)


class DDIMScheduler(_DDIM, diffusers.DDIMScheduler):
    """DDIM (Song et al. 2021)."""

    _output = DDIMSchedulerOutput


class _Parallel(OfTimestep):
    """Steps of samples at many timesteps at once (Shih et al. 2023, "Parallel sampling of diffusion models")."""

    def _batch_row(self, timestep: int) -> Columns:
        """The columns of the step from a training timestep, without noise."""
        raise NotImplementedError

    def _batch_levels(self, timestep: int) -> tuple[Level, Level]:
        """Where a step of a batch begins and ends; it ends clean, whatever set_alpha_to_one says."""
        before = timestep - self.config.num_train_timesteps // (
            self.num_inference_steps or self.config.num_train_timesteps
        )
        return self._level(timestep), self._level(before) if before >= 0 else (1.0, 0.0)

    def _batch_step(self, model_output: Tensor, timesteps: Tensor, sample: Tensor) -> Tensor:
        key = ("every training timestep",), sample.device
        if key not in self._tables:
            table = make_table([self._batch_row(t) for t in range(self.config.num_train_timesteps)])
            self._tables[key] = Rows(upload(table, sample.device), timesteps)
        table, _ = self._tables[key]
        return self._fused(
            Rows(table, timesteps), sample, model_output, dtype=torch.float32, threshold=self._thresholds
        )[0]


class DDPMParallelScheduler(_Parallel, _DDPM, diffusers.DDPMParallelScheduler):
    """DDPM, with steps of samples at many timesteps at once."""

    _output = DDPMParallelSchedulerOutput

    def _batch_row(self, timestep: int) -> Columns:
        return self._between(timestep, *self._batch_levels(timestep)) | {"noise0": 0.0}

    def batch_step_no_noise(self, model_output: Tensor, timesteps: Tensor, sample: Tensor) -> Tensor:
        """The steps of samples (batch, ...) at timesteps (batch,), less their noise."""
        return self._batch_step(model_output[:, : sample.shape[1]], timesteps, sample)


class DDIMParallelScheduler(_Parallel, _DDIM, diffusers.DDIMParallelScheduler):
    """DDIM, with steps of samples at many timesteps at once."""

    _output = DDIMParallelSchedulerOutput

    def _batch_row(self, timestep: int) -> Columns:
        return self._between(timestep, *self._batch_levels(timestep), 0.0, False)

    def batch_step_no_noise(
        self,
        model_output: Tensor,
        timesteps: Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
    ) -> Tensor:
        """The steps of samples (batch, ...) at timesteps (batch,); eta must be 0."""
        self._before(0)
        if eta != 0.0 or use_clipped_model_output:
            raise ValueError("eta and use_clipped_model_output: steps of a batch have neither")
        return self._batch_step(model_output, timesteps, sample)


class DDIMInverseScheduler(_DDIM, diffusers.DDIMInverseScheduler):
    """DDIM backwards, from an image to its noise; a step's output is taken for that of a step's length before."""

    initial_alpha_cumprod: Tensor

    @property
    def final_alpha_cumprod(self) -> Tensor:
        """Where the walk from the clean end begins."""
        return self.initial_alpha_cumprod

    def _row(self, timestep: int) -> Columns:
        origin = min(self._before(timestep), self.config.num_train_timesteps - 1)
        return self._between(timestep, self._level_before(origin), self._level(timestep), 0.0, False)

    def _run(self, timestep: int) -> Iterable[Key]:
        return ((t,) for t in self._host("timesteps"))

    def step(
        self, model_output: Tensor, timestep: int, sample: Tensor, return_dict: bool = True
    ) -> DDIMInverseSchedulerOutput | tuple[Tensor, Tensor]:
        prev_sample, pred_original_sample, _ = self._fused(
            (self._time(timestep),), sample, model_output, pred=sample.dtype
        )
        return returned(
            DDIMInverseSchedulerOutput, return_dict, prev_sample=prev_sample, pred_original_sample=pred_original_sample
        )


class CogVideoXDDIMScheduler(_DDIM, diffusers.CogVideoXDDIMScheduler):
    """DDIM without noise or clipping on CogVideoX's shifted schedule (Yang et al. 2024)."""

    def _row(self, timestep: int) -> Columns:
        level = self._level(timestep)
        step = euler(_grid(level, self._level_before(self._before(timestep))))[0]
        return columns(step, *self._conversion(level))

    def _run(self, timestep: int) -> Iterable[Key]:
        return ((t,) for t in self._host("timesteps"))

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
    ) -> CogVideoXDDIMSchedulerOutput | tuple[Tensor, Tensor]:
        prev_sample, pred_original_sample, _ = self._fused(
            (self._time(timestep),), sample, model_output, pred=sample.dtype
        )
        return returned(
            CogVideoXDDIMSchedulerOutput,
            return_dict,
            prev_sample=prev_sample,
            pred_original_sample=pred_original_sample,
        )


class CogVideoXDPMScheduler(_DDIM, diffusers.CogVideoXDPMScheduler):
    """SDE-DPM-Solver++ (2M) on CogVideoX's shifted schedule; the caller keeps the previous prediction."""

    def _row(self, timestep: int, timestep_back: int | None) -> Columns:
        levels = [self._level(timestep), self._level_before(self._before(timestep))]
        order = 1
        if timestep_back is not None:
            levels.insert(0, self._level(timestep_back))
            order = 2
        update = multistep_update(_grid(*levels), order - 1, order, algorithm_type="sde-dpmsolver++")
        of_pred, *history = update.model
        step = SolverStep(Combination(x=update.x, pred=of_pred, noise=update.noise, history=tuple(history)))
        return columns(step, *self._conversion(levels[-2])) | {"step": timestep}

    def _run(self, timestep: int, timestep_back: int | None) -> Iterable[Key]:
        times = self._host("timesteps")
        return (
            (t, back if self._before(t) >= 0 else None) for back, t in itertools.pairwise(times)
        )  # the first has none

    def step(
        self,
        model_output: Tensor,
        old_pred_original_sample: Tensor | None,
        timestep: int,
        timestep_back: int,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = False,
    ) -> CogVideoXDPMSchedulerOutput | tuple[Tensor, Tensor]:
        time = self._time(timestep)
        first_order = old_pred_original_sample is None or self._before(time) < 0
        noise = draw_noise(sample.shape, generator, sample.device, sample.dtype)
        if not first_order:  # diffusers draws for a first-order step too, and drops it
            noise = draw_noise(sample.shape, generator, sample.device, sample.dtype)
        prev_sample, pred_original_sample, _ = self._fused(
            (time, None if first_order else self._time(timestep_back)), sample, model_output,
            history=() if first_order else (old_pred_original_sample,), pred=sample.dtype, noise=noise,
        )  # fmt: skip
        if not return_dict or first_order:
            return prev_sample, pred_original_sample
        return returned(
            CogVideoXDPMSchedulerOutput, True, prev_sample=prev_sample, pred_original_sample=pred_original_sample
        )


class RePaintScheduler(_DDIM, diffusers.RePaintScheduler):
    """RePaint (Lugmayr et al. 2022): the known part of an image is noised, the unknown part denoised, in one row.

    A timestep is visited several times, so a row's key, and the number of its noise, is the visit.
    """

    _visit: int = 0

    def set_timesteps(
        self, num_inference_steps: int, jump_length: int = 10, jump_n_sample: int = 10, device: Any = None
    ) -> None:
        super().set_timesteps(num_inference_steps, jump_length, jump_n_sample, device)
        self._visit = 0

    def _run(self, kind: str, timestep: int, visit: int) -> Iterable[Key]:
        return (("step", t, visit + i) for i, t in enumerate(self._host("timesteps")[visit:]))

    def _row(self, kind: str, timestep: int, visit: int) -> Columns:
        if kind == "undo":
            beta = self.betas[timestep].item()
            return {"step": visit, "x0": math.sqrt(1.0 - beta), "noise0": math.sqrt(beta)}
        level, before = self._level(timestep), self._level_before(self._before(timestep))
        unknown = ddim(_grid(level, before), eta=self.eta, use_clipped_model_output=False)[0].next
        known = Combination(history=(before[0],), noise=before[1])
        return columns(SolverStep(unknown, known), *self._conversion(level)) | {"step": visit} | self._clip()

    def step(
        self,
        model_output: Tensor,
        timestep: int,
        sample: Tensor,
        original_image: Tensor,
        mask: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> RePaintSchedulerOutput | tuple[Tensor, Tensor]:
        prev_sample, pred_original_sample, _ = self._fused(
            self._next("step", timestep), sample, model_output, history=(original_image,), mask=mask,
            noise=draw_noise(model_output.shape, generator, model_output.device, model_output.dtype),
            pred=sample.dtype,
        )  # fmt: skip
        return returned(
            RePaintSchedulerOutput, return_dict, prev_sample=prev_sample, pred_original_sample=pred_original_sample
        )

    def undo_step(self, sample: Tensor, timestep: int, generator: Generators = None) -> Tensor:
        """A step of the forward process, back to the timestep before: one training timestep after the other."""
        time = self._time(timestep)
        for t in range(time, 2 * time - self._before(time)):
            noise = draw_noise(sample.shape, generator, sample.device, sample.dtype)
            sample = self._fused(self._next("undo", t), sample, noise=noise)[0]
        return sample

    def _next(self, kind: str, timestep: int) -> Key:
        self._visit += 1
        return kind, self._time(timestep), self._visit - 1


class DDPMWuerstchenScheduler(FusedScheduler, diffusers.DDPMWuerstchenScheduler):
    """DDPM on a cosine schedule of continuous time (Pernias et al. 2023)."""

    def _level(self, time: float) -> Level:
        if self.scaler > 1:
            time = 1 - (1 - time) ** self.scaler
        elif self.scaler < 1:
            time = time**self.scaler
        start, here = (math.cos((t + self.config.s) / (1 + self.config.s) * math.pi / 2) ** 2 for t in (0.0, time))
        squared = min(max(here / start, 0.0001), 0.9999)
        return math.sqrt(squared), math.sqrt(1.0 - squared)

    def _run(self, *key: float) -> Iterable[Key]:
        times = self._host("timesteps")
        return itertools.pairwise(times)

    def _row(self, time: float, before: float) -> Columns:
        level = self._level(time)
        of_x, of_x0, variance, _ = posterior(_grid(level, self._level(before)), 0)
        (x_in_x0, out_in_x0), _ = conversion("epsilon", *level)
        return {
            "step": self._host("timesteps").index(before),
            "x0": of_x + of_x0 * x_in_x0,
            "out0": of_x0 * out_in_x0,
            "noise0": math.sqrt(variance) if before != 0 else 0.0,
        }

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> DDPMWuerstchenSchedulerOutput | tuple[Tensor]:
        first = self._time(timestep[0])
        schedule = self._host("timesteps")
        distances = [abs(time - first) for time in schedule]
        before = schedule[distances.index(min(distances)) + 1]
        noise = draw_noise(sample.shape, generator, model_output.device, model_output.dtype)
        times = [first] if timestep.stride(0) == 0 or len(timestep) == 1 else timestep.tolist()
        if len(set(times)) == 1:
            table, rows = self._find((first, before), sample.device)
        else:
            table = upload(make_table([self._row(time, before) for time in times]), sample.device)
            rows = torch.arange(len(times), device=sample.device)
        prev_sample = self._fused(Rows(table, rows), sample, model_output, noise=noise, dtype=model_output.dtype)[0]
        return returned(DDPMWuerstchenSchedulerOutput, return_dict, prev_sample=prev_sample)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha_t x_0 + sigma_t noise, each sample at its own time."""
        noised = self._noised(original_samples, noise, [self._level(t) for t in timesteps.tolist()])
        return noised.to(original_samples.dtype)
