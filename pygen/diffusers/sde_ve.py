"""Samplers of variance-exploding models that are told what to do stage by stage, and consistency models."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.schedulers.deprecated.scheduling_karras_ve import KarrasVeOutput
from diffusers.schedulers.deprecated.scheduling_karras_ve import KarrasVeScheduler as DiffusersKarrasVeScheduler
from diffusers.schedulers.scheduling_consistency_models import CMStochasticIterativeSchedulerOutput
from diffusers.schedulers.scheduling_sde_ve import SdeVeOutput
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from pygen.diffusers.base import Columns, FusedScheduler, HostTensor, Key, Rows, promoted, returned
from pygen.diffusers.karras import VarianceExploding, at, preconditioning
from pygen.diffusers.noise import Generators, draw_noise
from pygen.diffusion.solvers.consistency import renoise
from pygen.ops.affine_step import COLUMNS
from pygen.ops.philox_normal import DRAW_AFFINE_STEP, philox_normal
from pygen.ops.sample_gram import sample_gram

CPU = torch.device("cpu")


class KarrasVeScheduler(FusedScheduler, DiffusersKarrasVeScheduler):
    """Karras et al. 2022, algorithm 2, as three calls: churn, Euler's step, Heun's correction.

    The correction may end at sigma 0, of which diffusers makes NaN.
    """

    schedule = HostTensor()
    _raised = HostTensor()  # the schedule with its churn

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        if num_inference_steps < 2:
            raise ValueError(f"num_inference_steps must be at least 2, got {num_inference_steps}")
        super().set_timesteps(num_inference_steps, device)
        self._raised = torch.tensor([self._churned(sigma) for sigma in self._host("schedule")], device=device)

    def _churned(self, sigma: float) -> float:
        if self.num_inference_steps is None:
            raise ValueError("num_inference_steps is None: call set_timesteps after creating the scheduler")
        churns = self.config.s_min <= sigma <= self.config.s_max
        return sigma * (1.0 + min(self.config.s_churn / self.num_inference_steps, 2**0.5 - 1)) if churns else sigma

    def _sigma(self, sigma: float | Tensor) -> float:
        """A sigma as a number, which takes no waiting for a device where it is of the schedule, or returned here."""
        if not isinstance(sigma, Tensor):
            return sigma
        for name in ("schedule", "_raised"):
            place = self._place(sigma, name)
            if place is not None:
                return self._host(name)[place]
        return sigma.item()

    def _run(self, kind: str, high: float, low: float) -> Iterable[Key]:
        schedule = self._host("schedule")
        lows = schedule if kind == "churn" else [0.0, *schedule]
        return ((kind, high, low) for high, low in zip(self._host("_raised"), lows, strict=False))

    def _row(self, kind: str, high: float, low: float) -> Columns:
        fall = high - low
        if kind == "churn":
            number = int(np.float32(low).view(np.int32))  # each level has noise of its own
            return {"step": number, "x0": 1.0, "noise0": self.config.s_noise * renoise(at(low), at(high))[1]}
        # The model's output is the derivative by sigma, with the other sign.
        if kind == "step":
            return {"pred_x": 1.0, "pred_out": high, "x0": 1.0, "out0": fall, "out1": -1.0}
        return {"pred_x": 1.0, "pred_out": low, "h0_0": 1.0, "h1_0": -fall / 2, "out0": fall / 2}

    def add_noise_to_input(
        self, sample: Tensor, sigma: float | Tensor, generator: Generators = None
    ) -> tuple[Tensor, float | Tensor]:
        """The sample raised to more noise, and its level, a tensor where ``sigma`` is one."""
        low = self._sigma(sigma)
        raised: float | Tensor
        if isinstance(sigma, Tensor):
            place = self._place(sigma, "schedule")
            raised = torch.full_like(sigma, self._churned(low)) if place is None else self._raised[place]
        else:
            raised = self._churned(low)
        noise = draw_noise(sample.shape, generator, sample.device, torch.float32, CPU)
        dtype = promoted(sample.dtype, torch.float32)
        return self._fused(("churn", self._sigma(raised), low), sample, noise=noise, dtype=dtype)[0], raised

    def step(
        self,
        model_output: Tensor,
        sigma_hat: float | Tensor,
        sigma_prev: float | Tensor,
        sample_hat: Tensor,
        return_dict: bool = True,
    ) -> KarrasVeOutput | tuple[Tensor, Tensor]:
        dtype = promoted(sample_hat.dtype, model_output.dtype)
        prev_sample, pred_original_sample, derivative = self._fused(
            ("step", self._sigma(sigma_hat), self._sigma(sigma_prev)), sample_hat, model_output,
            dtype=dtype, pred=dtype, second=dtype,
        )  # fmt: skip
        if not return_dict:
            return prev_sample, derivative
        return returned(
            KarrasVeOutput,
            True,
            prev_sample=prev_sample,
            derivative=derivative,
            pred_original_sample=pred_original_sample,
        )

    def step_correct(
        self,
        model_output: Tensor,
        sigma_hat: float | Tensor,
        sigma_prev: float | Tensor,
        sample_hat: Tensor,
        sample_prev: Tensor,
        derivative: Tensor,
        return_dict: bool = True,
    ) -> KarrasVeOutput | tuple[Tensor, Tensor]:
        """``sample_prev`` again, by the mean of the derivatives at both ends of the step."""
        pred = promoted(sample_prev.dtype, model_output.dtype)
        dtype = promoted(promoted(sample_hat.dtype, derivative.dtype), pred)
        prev_sample, pred_original_sample, _ = self._fused(
            ("correct", self._sigma(sigma_hat), self._sigma(sigma_prev)), sample_prev, model_output,
            history=(sample_hat, derivative), dtype=dtype, pred=pred,
        )  # fmt: skip
        if not return_dict:
            return prev_sample, derivative
        return returned(
            KarrasVeOutput,
            True,
            prev_sample=prev_sample,
            derivative=derivative,
            pred_original_sample=pred_original_sample,
        )


class ScoreSdeVeScheduler(FusedScheduler, diffusers.ScoreSdeVeScheduler):
    """The predictor and the corrector of Song et al. 2021, "Score-based generative modeling through stochastic
    differential equations", section 4, for the variance-exploding SDE."""

    discrete_sigmas = HostTensor()
    _corrections: int  # since set_timesteps, as many as Philox has drawn noise for

    def set_timesteps(self, num_inference_steps: int, sampling_eps: float | None = None, device: Any = None) -> None:
        super().set_timesteps(num_inference_steps, sampling_eps, device)
        self._corrections = 0

    def _run(self, kind: str, *of_step: float) -> Iterable[Key]:
        return ((kind, t) for t in self._host("timesteps")) if kind == "predict" else ()

    def _row(self, kind: str, *of_step: float) -> Columns:
        if kind == "correct":  # the device scales it
            return {"x0": 1.0, "out0": 1.0, "noise0": 1.0}
        (time,) = of_step
        index = int(np.float32(time) * np.float32(len(self._host("timesteps")) - 1))  # in float32, as diffusers
        sigmas = self._host("discrete_sigmas")
        variance = sigmas[index] ** 2 - (sigmas[index - 1] ** 2 if index else 0.0)
        row = {"step": index, "x0": 1.0, "out0": variance, "noise0": variance**0.5}
        return row | {"x1": 1.0, "out1": variance}

    def step_pred(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> SdeVeOutput | tuple[Tensor, Tensor]:
        """Predict the sample of the previous timestep, which lies at less noise."""
        self._check()
        dtype = promoted(sample.dtype, torch.float32)
        prev_sample, _, prev_sample_mean = self._fused(
            ("predict", self._time(timestep)), sample, model_output, dtype=dtype, second=dtype,
            noise=draw_noise(sample.shape, generator, sample.device, sample.dtype),
        )  # fmt: skip
        return returned(SdeVeOutput, return_dict, prev_sample=prev_sample, prev_sample_mean=prev_sample_mean)

    def step_correct(
        self, model_output: Tensor, sample: Tensor, generator: Generators = None, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """A step of Langevin dynamics, as long as the norms of the noise and of the model's output make it."""
        self._check()
        drawn = draw_noise(sample.shape, generator, sample.device, torch.float32, CPU)
        if "noise" in drawn:
            noise = drawn["noise"]
        else:  # its norm is wanted before the step, so it is stored
            noise = philox_normal(
                sample.shape, seed=drawn["seed"], step=self._corrections, sample_ids=drawn.get("sample_ids"),
                draw=DRAW_AFFINE_STEP + 1, device=sample.device,
            )  # fmt: skip
        self._corrections += 1
        # Both norms are means over the batch. These few numbers are all that is left to torch.
        norms = sample_gram([model_output, noise]).diagonal(dim1=1, dim2=2)[:, :2].sqrt().mean(dim=0)
        length = 2.0 * (self.config.snr * norms[1] / norms[0]) ** 2
        table, rows = self._find(("correct",), sample.device)
        scale = torch.ones(len(sample), table.shape[1], device=sample.device)
        scale[:, COLUMNS["out0"]] = length
        scale[:, COLUMNS["noise0"]] = (2.0 * length).sqrt()
        dtype = promoted(promoted(sample.dtype, model_output.dtype), torch.float32)
        prev_sample = self._fused(
            Rows(table, rows), sample, model_output, noise={"noise": noise}, scale=scale, dtype=dtype
        )[0]
        return returned(SchedulerOutput, return_dict, prev_sample=prev_sample)

    def _check(self) -> None:
        if self.timesteps is None:
            raise ValueError("timesteps is None: call set_timesteps after creating the scheduler")

    def add_noise(self, original_samples: Tensor, noise: Tensor | None, timesteps: Tensor) -> Tensor:
        """x_0 + sigma noise, sigma by the index ``timesteps``; float32 at least."""
        if noise is None:
            noise = torch.randn_like(original_samples)
        sigmas = self._host("discrete_sigmas")
        levels = [(1.0, sigmas[t]) for t in timesteps.reshape(-1).tolist()]
        return self._noised(original_samples, noise.to(promoted(noise.dtype, torch.float32)), levels)


class CMStochasticIterativeScheduler(VarianceExploding, diffusers.CMStochasticIterativeScheduler):
    """Multistep sampling of consistency models (Song et al. 2023, algorithm 1 and appendix C)."""

    def _step_row(self, kind: str, *of_step: Any) -> Columns:
        index, draws = of_step
        sigmas, lowest = self._host("sigmas"), self.config.sigma_min
        sigma, following = sigmas[index], sigmas[index + 1 if index + 1 < self.config.num_train_timesteps else -1]
        c_skip, _ = preconditioning(sigma - lowest, self._sigma_data)
        _, c_out = preconditioning(sigma, self._sigma_data)
        row = {"step": index, "pred_x": c_skip, "pred_out": c_out * (sigma - lowest) / sigma, "pred0": 1.0}
        if draws:
            end = at(float(np.float32(lowest)))  # as sigmas ends, so that no noise is left there
            row["noise0"] = self.config.s_noise * renoise(end, at(min(following, self.config.sigma_max)))[1]
        return row | ({"low": -1.0, "high": 1.0} if self.config.clip_denoised else {})

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> CMStochasticIterativeSchedulerOutput | tuple[Tensor]:
        self._check(timestep)
        index = self._index(timestep)
        draws = len(self.timesteps) > 1
        noise = draw_noise(model_output.shape, generator, model_output.device, model_output.dtype) if draws else None
        dtype = promoted(sample.dtype, model_output.dtype)
        prev_sample = self._fused(("step", index, draws), sample, model_output, dtype=dtype, noise=noise)[0]
        self._step_index = index + 1
        return returned(CMStochasticIterativeSchedulerOutput, return_dict, prev_sample=prev_sample)
