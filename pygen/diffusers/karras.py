"""Samplers on a grid of sigmas, with the state x = x_0 + sigma eps (Karras et al. 2022; k-diffusion)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.schedulers.scheduling_edm_euler import EDMEulerSchedulerOutput
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_k_dpm_2_ancestral_discrete import KDPM2AncestralDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_k_dpm_2_discrete import KDPM2DiscreteSchedulerOutput
from torch import Tensor

from pygen.diffusers.base import Columns, HostTensor, Key, OfIndex, promoted, refuse_index, returned
from pygen.diffusers.noise import Generators, PhiloxGenerator, draw_noise
from pygen.diffusion.rows import Factors, columns, conversion, written_out
from pygen.diffusion.solvers import Grid, SolverStep, ddpm
from pygen.diffusion.solvers.base import NOISE, PRED, Point, X, direction, past, posterior, transfer
from pygen.diffusion.solvers.consistency import renoise

logger = diffusers.utils.logging.get_logger(__name__)


def at(sigma: float) -> Point:
    return Point(np.float64(1.0), np.float64(sigma))


def preconditioning(sigma: float, sigma_data: float) -> Factors:
    """c_skip and c_out (Karras et al. 2022, table 1)."""
    variance = sigma**2 + sigma_data**2
    return sigma_data**2 / variance, sigma * sigma_data / variance**0.5


class VarianceExploding(OfIndex):
    """What the schedulers with the state x_0 + sigma eps share."""

    @property
    def _sigma_data(self) -> float:
        return self.config.get("sigma_data", 1.0)

    def _model_sigma(self, index: int) -> float:
        """The noise level of the sample that the model is shown."""
        return self._host("sigmas")[index]

    def _model_sigmas(self) -> Iterable[float]:
        return self._host("sigmas")

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """x / sqrt(sigma^2 + sigma_data^2), of unit variance."""
        self.is_scale_input_called = True
        return self._fused(("input", self._model_sigma(self._index(timestep))), sample)[0]

    def _run(self, kind: str, *of_step: Any) -> Iterable[Key]:
        if kind == "input":
            return (("input", sigma) for sigma in self._model_sigmas())
        index, *rest = of_step
        return ((kind, i, *rest) for i in range(index, len(self._host("timesteps"))))

    def _row(self, kind: str, *of_step: Any) -> Columns:
        if kind == "input":
            return {"x0": (of_step[0] ** 2 + self._sigma_data**2) ** -0.5}
        return self._step_row(kind, *of_step)

    def _step_row(self, kind: str, *of_step: Any) -> Columns:
        raise NotImplementedError

    def _check(self, timestep: float | Tensor) -> None:
        """Refuse the index of a step in place of its timestep, and warn of a sample that was not scaled."""
        refuse_index(timestep)
        if not self.is_scale_input_called:
            logger.warning(
                "scale_model_input should be called before step, or the model sees a sample of another scale"
            )

    def _pred(self, sigma: float) -> Factors:
        """x_0 from the sample and the model's output; the model saw the scaled sample."""
        prediction = self.config.prediction_type
        if prediction == "v_prediction":
            c_skip, c_out = preconditioning(sigma, self._sigma_data)
            return c_skip, -c_out
        if prediction in ("epsilon", "sample"):
            return conversion(prediction, 1.0, sigma)[0]
        raise ValueError(f"prediction_type must be epsilon, v_prediction or sample, got {prediction!r}")

    def _dtypes(self, sample: Tensor, model_output: Tensor) -> tuple[torch.dtype, torch.dtype]:
        """Those of the next sample and of the predicted x_0, where diffusers computes in what it is given."""
        dtype = promoted(sample.dtype, model_output.dtype)
        return dtype, model_output.dtype if self.config.prediction_type == "sample" else dtype


class _Churned(VarianceExploding):
    """Euler's step from a sample raised by noise (Karras et al. 2022, algorithm 2 without its correction)."""

    def _raised_pred(self, sigma: float, raised: float) -> Factors:
        return self._pred(raised)

    def _step_row(self, kind: str, *of_step: Any) -> Columns:
        index, gamma, s_noise, known = of_step
        sigma, following = self._interval(index)
        raised = sigma * (gamma + 1.0)
        pred = (0.0, 1.0) if known else self._raised_pred(sigma, raised)
        row = written_out(columns(SolverStep(transfer(at(raised), at(following)), PRED), pred))
        noise = s_noise * renoise(at(sigma), at(raised))[1]  # the row is one of the raised sample, x + noise z
        return row | {"step": index, "noise0": row["x0"] * noise, "noise1": row["x1"] * noise}

    def _churned(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float,
        s_tmin: float,
        s_tmax: float,
        s_noise: float,
        generator: Generators,
        known: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The next sample and the predicted x_0, a copy of ``known`` where that is given."""
        self._check(timestep)
        index = self._index(timestep)
        sigmas = self._host("sigmas")
        churns = s_churn > 0 and s_tmin <= sigmas[index] <= s_tmax
        gamma = min(s_churn / (len(sigmas) - 1), 2**0.5 - 1) if churns else 0.0
        noise = draw_noise(model_output.shape, generator, model_output.device, model_output.dtype) if gamma else None
        prev_sample, _, pred_original_sample = self._fused(
            ("step", index, gamma, s_noise, known is not None), sample, model_output if known is None else known,
            dtype=model_output.dtype, second=torch.float32 if known is None else known.dtype, noise=noise,
        )  # fmt: skip
        self._step_index = index + 1
        return prev_sample, pred_original_sample


class EulerDiscreteScheduler(_Churned, diffusers.EulerDiscreteScheduler):
    """Euler on the probability flow ODE, with churn (Karras et al. 2022, algorithm 2)."""

    alphas_cumprod = HostTensor()

    def _raised_pred(self, sigma: float, raised: float) -> Factors:
        # diffusers takes v at the level before the raise
        return self._pred(sigma if self.config.prediction_type == "v_prediction" else raised)

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
    ) -> EulerDiscreteSchedulerOutput | tuple[Tensor, Tensor]:
        known = model_output if self.config.prediction_type in ("sample", "original_sample") else None
        prev_sample, pred_original_sample = self._churned(
            model_output, timestep, sample, s_churn, s_tmin, s_tmax, s_noise, generator, known
        )
        return returned(
            EulerDiscreteSchedulerOutput,
            return_dict,
            prev_sample=prev_sample,
            pred_original_sample=pred_original_sample,
        )

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha noise - sigma x_0, where diffusers takes alpha at the index of the step for that at its timestep."""
        if isinstance(timesteps, int | torch.IntTensor | torch.LongTensor):
            raise ValueError(f"timesteps must be some of scheduler.timesteps, not indices of steps, got {timesteps!r}")
        squares = [self._host("alphas_cumprod")[self.index_for_timestep(t)] for t in timesteps.reshape(-1)]
        return self._noised(sample, noise, [(-math.sqrt(1.0 - square), math.sqrt(square)) for square in squares])


class EDMEulerScheduler(_Churned, diffusers.EDMEulerScheduler):
    """Euler in the formulation of Karras et al. 2022, whose preconditioning makes x_0 of the model's output.

    ``precondition_inputs`` and ``precondition_outputs`` are diffusers' own: training differentiates them.
    """

    def _pred(self, sigma: float) -> Factors:
        c_skip, c_out = preconditioning(sigma, self._sigma_data)
        return c_skip, c_out if self.config.prediction_type == "epsilon" else -c_out

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
        pred_original_sample: Tensor | None = None,
    ) -> EDMEulerSchedulerOutput | tuple[Tensor, Tensor]:
        prev_sample, pred_original_sample = self._churned(
            model_output, timestep, sample, s_churn, s_tmin, s_tmax, s_noise, generator, pred_original_sample
        )
        return returned(
            EDMEulerSchedulerOutput, return_dict, prev_sample=prev_sample, pred_original_sample=pred_original_sample
        )


class EulerAncestralDiscreteScheduler(VarianceExploding, diffusers.EulerAncestralDiscreteScheduler):
    """k-diffusion's Euler ancestral, which is DDPM's posterior in x_0 + sigma eps; prediction_type may be "sample"."""

    def _step_row(self, kind: str, *of_step: Any) -> Columns:
        (index,) = of_step
        sigma, following = self._interval(index)
        step = ddpm(Grid.through(at(sigma), at(following)))[0]
        return columns(step, self._pred(sigma)) | {"step": index}

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> EulerAncestralDiscreteSchedulerOutput | tuple[Tensor, Tensor]:
        self._check(timestep)
        index = self._index(timestep)
        prev_sample, pred_original_sample, _ = self._fused(
            ("step", index), sample, model_output, dtype=model_output.dtype, pred=torch.float32,
            noise=draw_noise(model_output.shape, generator, model_output.device, model_output.dtype),
        )  # fmt: skip
        self._step_index = index + 1
        return returned(
            EulerAncestralDiscreteSchedulerOutput,
            return_dict,
            prev_sample=prev_sample,
            pred_original_sample=pred_original_sample,
        )


class _TwoStage(VarianceExploding):
    """Schedulers that evaluate the model twice in a step, "first" at its beginning and "second" within it."""

    state_in_first_order: bool
    sample: Tensor | None

    def _run(self, kind: str, *of_step: Any) -> Iterable[Key]:
        if kind == "input":
            return super()._run(kind, *of_step)
        index, *rest = of_step
        return ((kind, i, *rest) for i in range(index, len(self._host("timesteps")), 2))


class HeunDiscreteScheduler(_TwoStage, diffusers.HeunDiscreteScheduler):
    """Heun's method (Karras et al. 2022, algorithm 1)."""

    def _step_row(self, kind: str, *of_step: Any) -> Columns:
        (index,) = of_step
        if kind == "first":
            here, following = self._interval(index)
            step = SolverStep(transfer(at(here), at(following)), direction(at(here)))
        else:
            before, here = self._interval(index - 1)
            half = (here - before) / 2
            step = SolverStep(past(1) + half * (past(2) + direction(at(here))))
        row = columns(step, self._pred(here))
        if not self.config.clip_sample:
            return row
        return row | {"low": -self.config.clip_sample_range, "high": self.config.clip_sample_range}

    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, return_dict: bool = True
    ) -> HeunDiscreteSchedulerOutput | tuple[Tensor, Tensor]:
        index = self._index(timestep)
        dtype, pred = self._dtypes(sample, model_output)
        if self.state_in_first_order:
            prev_sample, pred_original_sample, self.prev_derivative = self._fused(
                ("first", index), sample, model_output, dtype=dtype, pred=pred, second=dtype
            )
            sigmas = self._host("sigmas")
            self.dt = sigmas[index + 1] - sigmas[index]
            self.sample = sample
        else:
            prev_sample, pred_original_sample, _ = self._fused(
                ("second", index), sample, model_output, history=(self.sample, self.prev_derivative),
                dtype=dtype, pred=pred,
            )  # fmt: skip
            self.prev_derivative = self.dt = self.sample = None
        self._step_index = index + 1
        return returned(
            HeunDiscreteSchedulerOutput, return_dict, prev_sample=prev_sample, pred_original_sample=pred_original_sample
        )


class _MidPoint(_TwoStage):
    """DPM-Solver-2 in sigma, as k-diffusion has it: Euler to a sigma in between, whose derivative makes the step."""

    sigmas_interpol = HostTensor()

    def _model_sigma(self, index: int) -> float:
        return self._host("sigmas")[index] if self.state_in_first_order else self._stage_sigmas(index - 1)[1]

    def _model_sigmas(self) -> Iterable[float]:
        return [*self._host("sigmas"), *self._host("sigmas_interpol")]

    def _stage_sigmas(self, index: int) -> tuple[float, float, float, float]:
        """Of the step that begins at an index: sigma, that in between, that at the end, and the noise added there."""
        raise NotImplementedError

    def _step_row(self, kind: str, *of_step: Any) -> Columns:
        (index,) = of_step
        if kind == "first":
            sigma, between, _, _ = self._stage_sigmas(index)
            return columns(SolverStep(transfer(at(sigma), at(between))), self._pred(sigma))
        sigma, between, end, noise = self._stage_sigmas(index - 1)
        step = SolverStep(past(1) + (end - sigma) * direction(at(between)) + noise * NOISE)
        return columns(step, self._pred(between)) | {"step": index}

    def _stage(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, noise: dict[str, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        index = self._index(timestep)
        dtype, pred = self._dtypes(sample, model_output)
        if self.state_in_first_order:
            prev_sample, pred_original_sample, _ = self._fused(
                ("first", index), sample, model_output, dtype=dtype, pred=pred
            )
            self.sample = sample
        else:
            prev_sample, pred_original_sample, _ = self._fused(
                ("second", index), sample, model_output, history=(self.sample,), dtype=dtype, pred=pred, noise=noise
            )
            self.sample = None
        self._step_index = index + 1
        return prev_sample, pred_original_sample


class KDPM2DiscreteScheduler(_MidPoint, diffusers.KDPM2DiscreteScheduler):
    """k-diffusion's DPM-2 (Karras et al. 2022, algorithm 2 with its step at the geometric mean)."""

    def _stage_sigmas(self, index: int) -> tuple[float, float, float, float]:
        sigma, following = self._interval(index)
        return sigma, self._host("sigmas_interpol")[index + 1], following, 0.0

    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, return_dict: bool = True
    ) -> KDPM2DiscreteSchedulerOutput | tuple[Tensor, Tensor]:
        prev_sample, pred_original_sample = self._stage(model_output, timestep, sample, None)
        return returned(
            KDPM2DiscreteSchedulerOutput,
            return_dict,
            prev_sample=prev_sample,
            pred_original_sample=pred_original_sample,
        )


class KDPM2AncestralDiscreteScheduler(_MidPoint, diffusers.KDPM2AncestralDiscreteScheduler):
    """k-diffusion's DPM-2 ancestral: DPM-2 to less noise than the step's end has, then noise."""

    sigmas_up = HostTensor()
    sigmas_down = HostTensor()

    def _stage_sigmas(self, index: int) -> tuple[float, float, float, float]:
        sigma, between, down, up = (
            self._host(name)[index] for name in ("sigmas", "sigmas_interpol", "sigmas_down", "sigmas_up")
        )
        if math.isnan(between):
            raise ValueError(
                f"sigma falls from {sigma:g} too far for float32 to hold an ancestral step: more num_inference_steps "
                "or another beta_schedule is needed"
            )
        return sigma, between, down, up

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> KDPM2AncestralDiscreteSchedulerOutput | tuple[Tensor, Tensor]:
        noise = None
        if not self.state_in_first_order:
            noise = draw_noise(model_output.shape, generator, model_output.device, model_output.dtype)
        prev_sample, pred_original_sample = self._stage(model_output, timestep, sample, noise)
        return returned(
            KDPM2AncestralDiscreteSchedulerOutput,
            return_dict,
            prev_sample=prev_sample,
            pred_original_sample=pred_original_sample,
        )


class DPMSolverSDEScheduler(_TwoStage, diffusers.DPMSolverSDEScheduler):
    """k-diffusion's DPM-Solver++ (SDE), whose noise is of a Brownian path: torchsde's, which costs more than the step.

    With a ``PhiloxGenerator``, or a list of them, as ``scheduler.noise_sampler_seed``, the step draws the path's
    increments itself. prediction_type may be "sample".
    """

    noise_sampler: Any
    noise_sampler_seed: Any
    mid_point_sigma: float | None
    _increment: Tensor | None = None  # of the path over the first half of a step, where Philox draws it

    def _model_sigma(self, index: int) -> float:
        return self._host("sigmas")[index] if self.mid_point_sigma is None else self.mid_point_sigma

    def _model_sigmas(self) -> Iterable[float]:
        sigmas = self._host("sigmas")
        return [*sigmas, *(self._between(i) for i in range(0, len(sigmas) - 1, 2))]

    def _between(self, index: int) -> float:
        sigma, following = self._interval(index)
        return math.sqrt(sigma * following)

    def _step_row(self, kind: str, *of_step: Any) -> Columns:
        index, s_noise, philox = of_step
        begin = index if kind == "first" else index - 1
        sigma, end = self._interval(begin)
        between = self._between(begin)
        grid = Grid.through(at(sigma), at(between if kind == "first" else end))
        of_x, of_x0, variance, _ = posterior(grid, 0)
        noise = s_noise * math.sqrt(variance) * NOISE
        if kind == "first":
            step = SolverStep(of_x * X + of_x0 * PRED + noise, NOISE if philox else None)
            return columns(step, self._pred(sigma)) | {"step": index}
        if philox:  # the increment over the whole step is that over its first half and a new one
            known, new = (math.sqrt(part / (sigma - end)) for part in (sigma - between, between - end))
            noise = s_noise * math.sqrt(variance) * (known * past(2) + new * NOISE)
        step = SolverStep(of_x * past(1) + of_x0 * PRED + noise)
        return columns(step, self._pred(between)) | {"step": index}

    def _brownian(self, sample: Tensor, index: int) -> Tensor:
        """The increment of the Brownian path, at the times that diffusers asks for, to the last bit."""
        if self.noise_sampler is None:
            from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler

            positive = [sigma for sigma in self._host("sigmas") if sigma > 0]
            self.noise_sampler = BrownianTreeNoiseSampler(sample, min(positive), max(positive), self.noise_sampler_seed)
        begin = index if self.sample is None else index - 1
        t, end = self.sigmas[begin].log().neg(), self.sigmas[begin + 1].log().neg()
        if self.sample is None:
            end = t + (end - t) * 0.5
        return self.noise_sampler(t.neg().exp(), end.neg().exp())

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        return_dict: bool = True,
        s_noise: float = 1.0,
    ) -> Any:
        from diffusers.schedulers.scheduling_dpmsolver_sde import DPMSolverSDESchedulerOutput  # needs torchsde

        index = self._index(timestep)
        dtype, pred = self._dtypes(sample, model_output)
        first = self.sample is None
        to_zero = first and self._host("sigmas")[index + 1] == 0  # in one stage and without noise
        seeds = self.noise_sampler_seed
        philox = isinstance(seeds[0] if isinstance(seeds, list) else seeds, PhiloxGenerator)
        noise = None
        if philox:
            noise = draw_noise(sample.shape, seeds, sample.device, sample.dtype)
        elif not to_zero:
            noise = {"noise": self._brownian(sample, index)}
        prev_sample, pred_original_sample, increment = self._fused(
            ("first" if first else "second", index, s_noise, philox), sample, model_output,
            history=[held for held in (self.sample, self._increment) if held is not None],
            dtype=dtype, pred=pred, second=torch.float32 if philox and first else None, noise=noise,
        )  # fmt: skip
        if first and not to_zero:
            self.sample, self.mid_point_sigma, self._increment = sample, self._between(index), increment
        else:
            self.sample = self.mid_point_sigma = self._increment = None
        self._step_index = index + 1
        return returned(
            DPMSolverSDESchedulerOutput, return_dict, prev_sample=prev_sample, pred_original_sample=pred_original_sample
        )
