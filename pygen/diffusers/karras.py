"""Samplers on a grid of sigmas, with the state x = x_0 + sigma eps (Karras et al. 2022; k-diffusion)."""

from __future__ import annotations

from collections.abc import Iterable

import diffusers
import torch
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteSchedulerOutput
from torch import Tensor

from pygen.diffusers.base import Columns, Key, OfIndex
from pygen.diffusers.noise import Generators, draw_noise
from pygen.diffusion.rows import Factors

logger = diffusers.utils.logging.get_logger(__name__)


class _VarianceExploding(OfIndex):
    """What the schedulers with the state x_0 + sigma eps share."""

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """x / sqrt(sigma^2 + 1), of unit variance, as the models with alpha^2 + sigma^2 = 1 take it."""
        self.is_scale_input_called = True
        return self._fused(("input", self._index(timestep)), sample)[0]

    def _check(self, timestep: float | Tensor) -> None:
        """Refuse the index of a step in place of its timestep, and warn of a sample that was not scaled."""
        if isinstance(timestep, int | torch.IntTensor | torch.LongTensor):
            raise ValueError(f"timestep must be one of scheduler.timesteps, not the index of a step, got {timestep!r}")
        if not self.is_scale_input_called:
            logger.warning(
                "scale_model_input should be called before step, or the model sees a sample of another scale"
            )

    def _input(self, index: int) -> Columns:
        return {"x0": (self._host("sigmas")[index] ** 2 + 1.0) ** -0.5}

    def _pred(self, sigma: float) -> Factors:
        """x_0 from the sample and the model's output; the model saw x / sqrt(sigma^2 + 1)."""
        prediction = self.config.prediction_type
        if prediction == "epsilon":
            return 1.0, -sigma
        if prediction == "v_prediction":
            return 1.0 / (sigma**2 + 1.0), -sigma / (sigma**2 + 1.0) ** 0.5
        if prediction in ("sample", "original_sample"):
            return 0.0, 1.0
        raise ValueError(f"prediction_type must be epsilon, v_prediction or sample, got {prediction!r}")


class EulerDiscreteScheduler(_VarianceExploding, diffusers.EulerDiscreteScheduler):
    def _run(self, kind: str, index: int, *of_step: float) -> Iterable[Key]:
        return ((kind, i, *of_step) for i in range(index, len(self._host("sigmas")) - 1))

    def _row(self, kind: str, index: int, *of_step: float) -> Columns:
        return self._input(index) if kind == "input" else self._euler(index, *of_step)

    def _euler(self, index: int, gamma: float, s_noise: float) -> Columns:
        sigma, following = self._host("sigmas")[index : index + 2]
        raised = sigma * (gamma + 1.0)
        noise = s_noise * (raised**2 - sigma**2) ** 0.5
        # From the raised sample x + noise z: diffusers takes v at the level before.
        of_x, of_out = self._pred(sigma if self.config.prediction_type == "v_prediction" else raised)
        ratio = following / raised
        kept = ratio + (1.0 - ratio) * of_x
        return {
            "step": index,
            "x0": kept, "out0": (1.0 - ratio) * of_out, "noise0": kept * noise,
            "x1": of_x, "out1": of_out, "noise1": of_x * noise,
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
    ) -> EulerDiscreteSchedulerOutput | tuple[Tensor, Tensor]:
        self._check(timestep)
        index = self._index(timestep)
        sigmas = self._host("sigmas")
        churns = s_churn > 0 and s_tmin <= sigmas[index] <= s_tmax
        gamma = min(s_churn / (len(sigmas) - 1), 2**0.5 - 1) if churns else 0.0
        noise = draw_noise(model_output.shape, generator, model_output.device, model_output.dtype) if gamma else None
        prev_sample, _, pred_original_sample = self._fused(
            ("step", index, gamma, s_noise), sample, model_output,
            dtype=model_output.dtype, second=torch.float32, noise=noise,
        )  # fmt: skip
        self._step_index = index + 1
        if not return_dict:
            return prev_sample, pred_original_sample
        return EulerDiscreteSchedulerOutput(prev_sample=prev_sample, pred_original_sample=pred_original_sample)
