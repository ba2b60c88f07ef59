"""Samplers on the flow path x = (1 - sigma) x_0 + sigma eps, of models that predict the velocity v = eps - x_0."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.schedulers.scheduling_flow_map_euler_discrete import FlowMapEulerDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_flow_match_heun_discrete import FlowMatchHeunDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_flow_match_lcm import FlowMatchLCMSchedulerOutput
from diffusers.schedulers.scheduling_ltx_euler_ancestral_rf import LTXEulerAncestralRFSchedulerOutput
from diffusers.schedulers.scheduling_minimax_h3 import MiniMaxH3SchedulerOutput
from diffusers.schedulers.scheduling_piflow import PiflowSchedulerOutput
from diffusers.schedulers.scheduling_rfd4_proteina import RFD4ProteinaSchedulerOutput
from torch import Tensor

from pygen.diffusers.base import (
    Columns,
    FusedScheduler,
    HostTensor,
    Key,
    Level,
    OnSigmas,
    Rows,
    refuse_index,
    returned,
    tensor_table,
)
from pygen.diffusers.noise import Generators, draw_noise
from pygen.ops.affine_step import MAX_HISTORY


def _renoised(sigma: Any, following: Any) -> dict[str, Any]:
    """x_0 = x - sigma v, noised anew: multistep consistency sampling (Song et al. 2023, algorithm 1)."""
    return {"x0": 1.0 - following, "out0": -(1.0 - following) * sigma, "noise0": following}


class _Flow(OnSigmas):
    def _level(self, index: int) -> Level:
        sigma = self._host("sigmas")[index]
        return 1.0 - sigma, sigma

    def _run(self, index: int) -> Iterable[Key]:
        return ((i,) for i in range(index, len(self._host("sigmas")) - 1))


class _FlowMatch(_Flow):
    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor | None = None) -> Tensor:
        """(1 - sigma) x_0 + sigma noise, at the scheduler's present or first step if it has one, else by timestep."""
        if noise is None:
            raise ValueError("noise must be given")
        return self._noised(sample, noise, self._levels(timestep))


class FlowMatchEulerDiscreteScheduler(_FlowMatch, diffusers.FlowMatchEulerDiscreteScheduler):
    """Euler's x + (sigma' - sigma) v (Liu et al. 2022; Esser et al. 2024), or x_0 noised anew: stochastic_sampling."""

    def _row(self, index: int) -> Columns:
        sigma, following = self._interval(index)
        if self.config.stochastic_sampling:
            return {"step": index, **_renoised(sigma, following)}
        return {"x0": 1.0, "out0": following - sigma}

    def _token_rows(self, index: int, timesteps: Tensor, sample: Tensor) -> Rows:
        """A row for each token, from its own sigma to the next lower one of the schedule; the host knows of neither."""
        if sample.dim() < 2 or timesteps.dim() != 2:
            raise ValueError(
                f"per_token_timesteps must have shape (batch, tokens), as sample (batch, tokens, ...); "
                f"got {tuple(timesteps.shape)} and {tuple(sample.shape)}"
            )
        sigma = timesteps.double().expand(sample.shape[:2]) / self.config.num_train_timesteps
        schedule = torch.nn.functional.pad(self.sigmas.to(sigma), (1, 0)).sort().values  # from 0 up
        following = schedule[(torch.searchsorted(schedule, sigma - 1e-6) - 1).clamp(min=0)]
        if self.config.stochastic_sampling:
            columns = {"step": index, **_renoised(sigma, following)}
        else:  # of the opposite sign, as diffusers has it: its callers negate the model's output
            columns = {"x0": 1.0, "out0": sigma - following}
        return tensor_table(columns, sample.device)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: Generators = None,
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        refuse_index(timestep)
        index = self._index(timestep)
        noise = None
        if self.config.stochastic_sampling:
            noise = draw_noise(sample.shape, generator, sample.device, torch.float32)
        if per_token_timesteps is None:
            rows, dtype = self._find((index,), sample.device), model_output.dtype
        else:
            rows, dtype = self._token_rows(index, per_token_timesteps, sample), torch.float32
        prev_sample = self._fused(rows, sample, model_output, dtype=dtype, noise=noise)[0]
        self._step_index = index + 1
        return returned(FlowMatchEulerDiscreteSchedulerOutput, return_dict, prev_sample=prev_sample)


class FlowMatchHeunDiscreteScheduler(_Flow, diffusers.FlowMatchHeunDiscreteScheduler):
    """Heun's method: a step of Euler's, made again with the mean of the derivatives at its two ends (Karras et al.
    2022, algorithm 2). With churn, the noise of the second stage is drawn, and cancels."""

    dt: float | None
    sample: Any

    def scale_noise(self, sample: Tensor, timestep: float | Tensor, noise: Tensor) -> Tensor:
        """(1 - sigma) x_0 + sigma noise at the present step, which ``timestep`` may be the first to name."""
        return self._noised(sample, noise, [self._level(self._index(timestep))])

    def _raised(self, index: int, gamma: float) -> tuple[float, float, float, float]:
        """sigma at an index, where its noise raises it to, the factor of that noise, and the way to the next sigma."""
        sigma, following = self._interval(index)
        raised = sigma * (gamma + 1.0)
        return sigma, raised, (raised**2 - sigma**2) ** 0.5, following - raised

    def _run(self, *key: Any) -> Iterable[Key]:
        if key[0] == "first":
            _, start, gamma, s_noise = key
            for index in range(start, len(self._host("sigmas")) - 1, 2):
                yield "first", index, gamma, s_noise
                yield "second", self._raised(index, gamma)[3]

    def _row(self, *key: Any) -> Columns:
        if key[0] == "second":  # x is the sample of the first stage
            return {"x0": 1.0, "out0": key[1] / 2, "h0_0": key[1] / 2}
        _, index, gamma, s_noise = key
        sigma, raised, noise, dt = self._raised(index, gamma)
        return {
            "step": index, "pred_out": sigma / raised, "x0": 1.0, "pred0": dt, "noise0": s_noise * noise,
            "x1": 1.0, "noise1": s_noise * noise,
        }  # fmt: skip

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> Any:
        refuse_index(timestep)
        index = self._index(timestep)
        first = self.state_in_first_order
        sigmas = self._host("sigmas")
        churns = s_churn > 0 and s_tmin <= sigmas[index if first else index - 1] <= s_tmax
        gamma = min(s_churn / (len(sigmas) - 1), 2**0.5 - 1) if churns else 0.0
        noise = draw_noise(model_output.shape, generator, model_output.device, model_output.dtype) if gamma else None
        if first:
            prev_sample, self.prev_derivative, raised = self._fused(
                ("first", index, gamma, s_noise), sample, model_output, dtype=model_output.dtype,
                pred=torch.float32, second=torch.float32 if gamma else None, noise=noise,
            )  # fmt: skip
            self.dt = self._raised(index, gamma)[3]
            self.sample = raised if gamma else sample
        else:
            prev_sample = self._fused(
                ("second", self.dt), self.sample, model_output, dtype=model_output.dtype, history=[self.prev_derivative]
            )[0]
            self.prev_derivative = self.dt = self.sample = None
        self._step_index = index + 1
        return returned(FlowMatchHeunDiscreteSchedulerOutput, return_dict, prev_sample=prev_sample)


class FlowMatchLCMScheduler(_FlowMatch, diffusers.FlowMatchLCMScheduler):
    """Latent consistency models on the flow path. Scale-wise generation (Starodubcev et al. 2025) resizes x_0 between
    two calls: the noise is of the new size."""

    _init_size: Any

    def _run(self, kind: str, index: int) -> Iterable[Key]:
        return ((kind, i) for i in range(index, len(self._host("sigmas")) - 1))

    def _row(self, kind: str, index: int) -> Columns:
        sigma, following = self._interval(index)
        if kind == "denoise":
            return {"x0": 1.0, "out0": -sigma}
        if kind == "noise":
            return {"step": index, "x0": 1.0 - following, "noise0": following}
        return {"step": index, **_renoised(sigma, following)}

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> Any:
        refuse_index(timestep)
        factors = self._scale_factors if self._upscale_mode else None
        if factors and len(self.timesteps) != len(factors) + 1:
            raise ValueError(f"scale_factors must be one less than the {len(self.timesteps)} timesteps: {len(factors)}")
        if self._init_size is None or self._step_index is None:
            self._init_size = model_output.size()[2:]
        index = self._index(timestep)
        kind = "step"
        out: Tensor | None = model_output
        if factors and index < len(factors):
            kind, out = "noise", None
            sample = self._fused(("denoise", index), sample, model_output, dtype=torch.float32)[0]
            size = [round(factors[index] * extent) for extent in self._init_size]
            sample = torch.nn.functional.interpolate(sample, size=size, mode=self._upscale_mode)
        noise = draw_noise(sample.shape, generator, sample.device, torch.float32)
        prev_sample = self._fused((kind, index), sample, out, dtype=model_output.dtype, noise=noise)[0]
        self._step_index = index + 1
        return returned(FlowMatchLCMSchedulerOutput, return_dict, prev_sample=prev_sample)


class FlowMapEulerDiscreteScheduler(_Flow, diffusers.FlowMapEulerDiscreteScheduler):
    """Flow maps, of which one step leads from any time to any other (Gu et al. 2026, "AnyFlow")."""

    def index_for_timestep(self, timestep: float | Tensor) -> int | None:
        """The index of the nearest timestep of the schedule, if it is less than 1e-3 away; of a batch, the first's."""
        if isinstance(timestep, Tensor) and timestep.dim():
            timestep = timestep.reshape(-1)[0]
        time, times = self._time(timestep), self._host("timesteps")
        if time in times:
            return times.index(time)
        nearest = min(range(len(times)), key=lambda i: abs(times[i] - time))
        return nearest if abs(times[nearest] - time) <= 1e-3 else None

    def _run(self, *key: float) -> Iterable[Key]:
        return itertools.pairwise(self._host("sigmas"))

    def _row(self, sigma: float, following: float) -> Columns:
        return {"x0": 1.0, "out0": following - sigma}

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor | None = None) -> Tensor:
        """(1 - sigma) x_0 + sigma noise, with sigma = timestep / num_train_timesteps."""
        if noise is None:
            raise ValueError("noise must be given")
        sigma = timestep.double() / self.config.num_train_timesteps
        return self._mixed(sample, noise, 1.0 - sigma, sigma)

    def _sigma(self, index: int | None, timestep: Any) -> Any:
        """sigma at an index, or at a time that the schedule does not hold."""
        if index is not None:
            return self._host("sigmas")[index]
        return (timestep.double() if isinstance(timestep, Tensor) else timestep) / self.config.num_train_timesteps

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        r_timestep: float | Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        here = self.index_for_timestep(timestep)
        if self._step_index is None:
            first = 0 if here is None else here
            self._step_index = first if self._begin_index is None else self._begin_index
        if r_timestep is not None:
            there = self.index_for_timestep(r_timestep)
        elif here is not None:
            there = here + 1
        else:
            raise ValueError("r_timestep must be given where timestep is none of scheduler.timesteps")
        sigma, following = self._sigma(here, timestep), self._sigma(there, r_timestep)
        if here is None or there is None:
            rows = tensor_table({"x0": 1.0, "out0": following - sigma}, sample.device)
        else:
            rows = self._find((sigma, following), sample.device)
        prev_sample = self._fused(rows, sample, model_output, dtype=model_output.dtype)[0]
        self._step_index += 1
        return returned(FlowMapEulerDiscreteSchedulerOutput, return_dict, prev_sample=prev_sample)


class LTXEulerAncestralRFScheduler(_Flow, diffusers.LTXEulerAncestralRFScheduler):
    """Euler's ancestral sampler on the flow path: down past the next sigma, and up to it by noise."""

    def _row(self, index: int) -> Columns:
        if index == len(self._host("sigmas")) - 1:  # past the end: the sample as it is
            return {"x0": 1.0}
        sigma, following = self._interval(index)
        eta, s_noise = self.config.eta, self.config.s_noise
        if following < 1e-8:
            return {"x0": 1.0, "out0": -sigma}
        if sigma == 0:
            raise ValueError(f"sigmas must be positive but for the last, got 0 and then {following}")
        down = following * (1.0 + (following / sigma - 1.0) * eta)
        if not (eta > 0 and s_noise > 0):
            return {"x0": 1.0, "out0": down - sigma}
        alpha, alpha_down = 1.0 - following, 1.0 - down
        scale = alpha / (alpha_down + 1e-12)
        noise = max(following**2 - (down * alpha) ** 2 / (alpha_down**2 + 1e-12), 0.0) ** 0.5
        return {"step": index, "x0": scale, "out0": scale * (down - sigma), "noise0": s_noise * noise}

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> Any:
        refuse_index(timestep)
        if self.sigmas is None or self.timesteps is None:
            raise ValueError("set_timesteps must be called before step")
        index, sigmas = self._index(timestep), self._host("sigmas")
        after = min(index + 1, len(sigmas) - 1)
        noise = None
        if index < after and sigmas[after] >= 1e-8 and self.config.eta > 0 and self.config.s_noise > 0:
            noise = draw_noise(sample.shape, generator, sample.device, torch.float32)
        prev_sample = self._fused((index,), sample, model_output, noise=noise)[0]
        self._step_index = after
        return returned(LTXEulerAncestralRFSchedulerOutput, return_dict, prev_sample=prev_sample)


class MiniMaxH3Scheduler(_Flow, diffusers.MiniMaxH3Scheduler):
    """Euler's method for models that predict -v at the time 1 - sigma: x_0 is from the time, the step from sigma."""

    def scale_noise(self, sample: Tensor, timestep: float | Tensor, noise: Tensor) -> Tensor:
        """t x_0 + (1 - t) noise."""
        return self._mixed(sample, noise, timestep, 1.0 - timestep)

    def _init_step_index(self, timestep: float | Tensor) -> None:
        self._step_index = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index

    def _run(self, index: int, time: float) -> Iterable[Key]:
        return enumerate(self._host("timesteps"))

    def _row(self, index: int, time: Any) -> dict[str, Any]:
        sigma, following = self._interval(index)
        return {"x0": 1.0, "out0": (1.0 - following / sigma) * (1.0 - time)}

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        return_dict: bool = True,
    ) -> Any:
        if isinstance(timestep, int) or (isinstance(timestep, Tensor) and not timestep.is_floating_point()):
            raise ValueError(f"timestep must be one of scheduler.timesteps, not the index of a step, got {timestep!r}")
        index = self._index(timestep)
        if isinstance(timestep, Tensor) and timestep.numel() > 1:  # of each sample
            rows = tensor_table(self._row(index, timestep.double()), sample.device)
        else:
            rows = self._find((index, self._time(timestep)), sample.device)
        prev_sample = self._fused(rows, sample, model_output)[0]
        self._step_index = index + 1
        return returned(MiniMaxH3SchedulerOutput, return_dict, prev_sample=prev_sample)


class PiflowScheduler(_Flow, diffusers.PiflowScheduler):
    """Pi-Flow (Chen et al. 2025): the output of the model is a policy, which is walked in many substeps.

    The policy is affine in the sample and the predictions of its grid, and so is the walk: all of its substeps are one
    row.
    """

    _piflow_raw_timesteps = HostTensor()

    def _policy(self, index: int) -> list[float]:
        """The factors of the predicted velocities of the grid in x' - x."""
        sigma = source = self._interval(index)[0]
        times = [*self._host("_piflow_raw_timesteps"), self.eps]
        time, end = times[index : index + 2]
        shift, last = float(self.config.shift), self.n_grid - 1
        segment = max(time - end, self.eps)
        # diffusers rounds the number of substeps from a float32 length.
        substeps = max(round(float((np.float32(time) - np.float32(end)) * np.float32(self.num_policy_substeps))), 1)
        length = (time - end) / substeps
        weights = np.zeros(self.n_grid)  # of the x_0 of the grid, which leave 1 - sum(weights) to the sample
        for _ in range(substeps):
            place = min(max((time - end) / segment, 0.0), 1.0) * last
            before = min(int(place), last - 1)
            time = max(time - length, 0.0)
            following = shift * time / (1.0 + (shift - 1.0) * time)
            change = (following - sigma) / max(sigma, self.eps)  # of x - x_0
            weights *= 1.0 + change
            weights[before] -= change * (before + 1 - place)
            weights[before + 1] -= change * (place - before)
            sigma = following
        return (-source * weights).tolist()

    def _run(self, index: int, start: int) -> Iterable[Key]:
        for i in range(index, self.num_inference_steps or 0):
            yield from ((i, start) for start in range(0, self.n_grid, MAX_HISTORY))

    def _row(self, index: int, start: int) -> Columns:
        factors = self._policy(index)[start : start + MAX_HISTORY]
        return {"x0": 1.0, **{f"h{j}_0": factor for j, factor in enumerate(factors)}}

    def _step_index_for(self, timestep: float | Tensor) -> int:
        if self._step_index is None:
            self._step_index = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index
        return super()._step_index_for(timestep)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        return_dict: bool = True,
    ) -> Any:
        refuse_index(timestep)
        index = self._step_index_for(timestep)
        grid = self._to_grid(model_output, sample).unbind(1)
        prev_sample = sample
        for start in range(0, self.n_grid, MAX_HISTORY):
            dtype = sample.dtype if start + MAX_HISTORY >= self.n_grid else torch.float32
            part = grid[start : start + MAX_HISTORY]
            prev_sample = self._fused((index, start), prev_sample, dtype=dtype, history=part)[0]
        self._step_index = index + 1
        return returned(PiflowSchedulerOutput, return_dict, prev_sample=prev_sample)


class RFD4ProteinaScheduler(FusedScheduler, diffusers.RFD4ProteinaScheduler):
    """Flow from noise at t = 0 to data at t = 1 at a low temperature: the score rescaled in time, noise in a window."""

    _times = HostTensor()
    _noise = HostTensor()

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: float | Tensor) -> Tensor:
        """(1 - t) noise + t x_0, at one time or one per sample, in [0, 1)."""
        times = timesteps.tolist() if isinstance(timesteps, Tensor) else timesteps
        levels = [(t, 1.0 - t) for t in (times if isinstance(times, list) else [times])]
        batch = len(original_samples)
        if len(levels) != (batch if isinstance(times, list) else 1) or not all(0 <= t < 1 for t, _ in levels):
            raise ValueError(f"timesteps must have shape ({batch},), with values in [0, 1)")
        return self._noised(original_samples, noise, levels)

    def _draws(self, time: float) -> bool:
        """Whether a step from this time has noise; diffusers compares in float32."""
        begin, end = np.float32(self.config.t_lim_ode_below), np.float32(self.config.t_lim_ode)
        return time != 0 and bool(begin <= time <= end)

    def _run(self, index: int) -> Iterable[Key]:
        return ((i,) for i in range(index, len(self._host("timesteps"))))

    def _row(self, index: int) -> Columns:
        """y_1, where tokens are emitted, and 0 elsewhere."""
        time = self._host("timesteps")[index]
        if time == 0:  # where the score is undefined: the sample is held
            return {"x1": 1.0}
        start, end = self._host("_times")[index : index + 2]
        snr = (time / (1.0 - time)) ** 2 * self.config.tsr_sigma**2
        ratio = (snr + 1.0) / (snr / self.config.tsr_k + 1.0)
        # The velocity of the rescaled score; then the score that is followed against the noise.
        of_x, of_out = (1.0 - ratio) / time, ratio
        noise = 0.0
        if self._draws(time):
            strength = self._host("_noise")[index]
            of_x -= strength * ratio / (1.0 - time)
            of_out += strength * ratio * time / (1.0 - time)
            noise = (2.0 * strength * (end - start)) ** 0.5
        return {"step": index, "x1": 1.0 + (end - start) * of_x, "out1": (end - start) * of_out, "noise1": noise}

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor,
        sample: Tensor,
        emit_mask: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> Any:
        index = self._step_index
        if index is None:
            raise ValueError("set_timesteps must be called before step")
        times = self._host("timesteps")
        if index >= len(times):
            raise ValueError("timestep: the trajectory is complete; call set_timesteps to start another")
        time = times[index]
        if self._time(timestep) != time:
            raise ValueError(f"timestep must be the next of scheduler.timesteps, {time}, got {timestep}")
        generators = self._generators(generator, len(sample))
        noise = None
        if self._draws(time):
            generator = None if generators is None else list(generators)
            noise = draw_noise(sample.shape, generator, sample.device, sample.dtype)
        prev_sample = self._fused(
            (index,), sample, model_output, mask=emit_mask[..., None], noise=noise,
            dtype=sample.dtype if time == 0 else torch.float32,
        )[0]  # fmt: skip
        self._step_index = index + 1
        return returned(RFD4ProteinaSchedulerOutput, return_dict, prev_sample=prev_sample)
