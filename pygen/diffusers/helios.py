"""Helios: video in stages of rising resolution on the flow path, by Euler, by UniPC, or distilled to a few steps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any

import diffusers
import numpy as np
from diffusers.schedulers.scheduling_helios import HeliosSchedulerOutput
from diffusers.schedulers.scheduling_helios_dmd import HeliosDMDScheduler as DiffusersHeliosDMDScheduler
from diffusers.schedulers.scheduling_helios_dmd import HeliosDMDSchedulerOutput
from torch import Tensor

from pygen.diffusers.base import Columns, Key, Level, OnSigmas, promoted, refuse_index, returned, tensor_table
from pygen.diffusers.noise import Generators
from pygen.diffusion.rows import Factors, columns
from pygen.diffusion.solvers.base import CARRIED, Grid, SolverStep, Update, X
from pygen.diffusion.solvers.unipc import unipc_update


class HeliosScheduler(OnSigmas, diffusers.HeliosScheduler):
    """A stage by Euler's method, or by UniPC (Zhao et al. 2023), whose corrector and predictor are one row.

    ``model_outputs`` holds the predictions of x_0, or of epsilon where predict_x0 is False; ``last_sample`` the sample
    that the last step began with, corrected.
    """

    model_outputs: Any
    timestep_list: Any
    last_sample: Any
    this_order: int
    lower_order_nums: int

    def _point(self, sigma: float) -> Level:
        """alpha and sigma, as UniPC divides by them."""
        if self.config.use_flow_sigmas:
            return 1.0 - sigma, max(sigma, 1e-8)
        alpha = (sigma**2 + 1.0) ** -0.5
        return alpha, sigma * alpha

    def _converted(self, given: float) -> Factors:
        """What UniPC reasons in, as (factor of x, factor of the model's output)."""
        prediction = self.config.prediction_type
        if self.config.thresholding:
            raise ValueError("thresholding: Helios has no ratio for it")
        alpha, sigma = np.array(self._point(given))
        if self.predict_x0:
            known = {
                "epsilon": (1.0 / alpha, -sigma / alpha),
                "sample": (0.0, 1.0),
                "v_prediction": (alpha, -sigma),
                "flow_prediction": (1.0, -given),
            }
        else:
            known = {
                "epsilon": (0.0, 1.0),
                "sample": (1.0 / sigma, -alpha / sigma),
                "v_prediction": (sigma, alpha),
            }
        if prediction not in known:
            raise ValueError(
                f"prediction_type must be one of {', '.join(known)} where predict_x0 is {self.predict_x0}, "
                f"got {prediction!r}"
            )
        return known[prediction]

    def _run(self, kind: str, index: int, *of_step: Any) -> Iterable[Key]:
        if kind == "euler":
            return ((kind, i) for i in range(index, len(self._host("sigmas")) - 1))
        corrects, predicts, *given = of_step
        if self.solver_p or any(sigma is not None for sigma in given):
            return ()
        keys, last = [], corrects
        for n, i in enumerate(range(index, len(self._host("timesteps")))):
            order = self._order(i, predicts + n)
            keys.append(
                (kind, i, last if i > 0 and i - 1 not in self.disable_corrector else 0, order, None, None, None)
            )
            last = order
        return keys

    def _order(self, index: int, most: int) -> int:
        left = len(self._host("timesteps")) - index if self.config.lower_order_final else most
        return min(self.config.solver_order, left, most)

    def _row(self, kind: str, index: int, *of_step: Any) -> Columns:
        if kind == "euler":
            sigma, following = self._interval(index)
            return {"x0": 1.0, "out0": following - sigma}
        return self._unipc(index, *of_step)

    def _unipc(
        self, index: int, corrects: int, predicts: int, before: float | None, sigma: float | None, after: float | None
    ) -> Columns:
        """The orders of the corrector, 0 for none, and of the predictor, 0 for one that is not UniPC's; and the sigmas
        of the last, the present and the next step where they are not those of the schedule."""
        sigmas = self._host("sigmas")
        here = sigmas[index] if sigma is None else sigma

        def update(*places: float, order: int, corrects: bool = False) -> Update:
            alpha, sigma = np.array([self._point(place) for place in places]).T
            grid = Grid(alpha, sigma) if self.predict_x0 else Grid(sigma, alpha)
            return unipc_update(grid, order - 1, order, self.config.solver_type, corrects)

        sample = X
        if corrects:
            past = [sigmas[index - j] for j in range(corrects, 1, -1)]
            origin = sigmas[index - 1] if before is None else before
            sample = update(*past, origin, here, order=corrects, corrects=True).of(CARRIED)
        following = sample
        if predicts:
            past = [sigmas[index - j] for j in range(predicts - 1, 0, -1)]
            end = sigmas[index + 1] if after is None else after
            following = update(*past, here, end, order=predicts).of(sample)
        row = columns(SolverStep(following, sample), self._converted(here), history=self._history(corrects, predicts))
        if not all(math.isfinite(value) for value in row.values()):
            raise ValueError(
                f"solver_type {self.config.solver_type!r}, of order {max(corrects, predicts)}, has no finite step "
                f"from sigma = {here}; see lower_order_final and use_flow_sigmas"
            )
        # Near the end the predictions' factors are large and cancel. The present one is made with more digits than a
        # factor has, so it stays, if unclamped; what float32 takes from its factor, x and the model's output add.
        for result in (0, 1):
            lost = row[f"pred{result}"] - float(np.float32(row[f"pred{result}"]))
            row[f"x{result}"] += lost * row["pred_x"]
            row[f"out{result}"] = lost * row["pred_out"]
        row["low"] = -math.inf
        return row

    @staticmethod
    def _history(corrects: int, predicts: int) -> int:
        """How many earlier predictions a step reads."""
        return max(corrects, predicts - 1, 0)

    def convert_model_output(
        self,
        model_output: Tensor,
        *args: Any,
        sample: Tensor | None = None,
        sigma: float | Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The prediction that UniPC reasons in: of x_0, or of epsilon where predict_x0 is False."""
        sample = args[1] if sample is None and len(args) > 1 else sample
        if sample is None:
            raise ValueError("sample must be given")
        of_x, of_out = self._converted(self._host("sigmas")[self._present] if sigma is None else float(sigma))
        rows = tensor_table({"x0": of_x, "out0": of_out}, sample.device)
        return self._fused(rows, sample, model_output, dtype=promoted(sample.dtype, model_output.dtype))[0]

    @property
    def _present(self) -> int:
        return 0 if self._step_index is None else self._step_index

    def step_euler(
        self,
        model_output: Tensor,
        timestep: float | Tensor | None = None,
        sample: Tensor | None = None,
        generator: Generators = None,
        sigma: Any = None,
        sigma_next: Any = None,
        return_dict: bool = True,
    ) -> Any:
        if sample is None or (sigma is None) != (sigma_next is None):
            raise ValueError("sample must be given, and both of sigma and sigma_next or none")
        index = self._present
        if sigma is None:
            if timestep is not None:
                refuse_index(timestep)
            rows = self._find(("euler", index), sample.device)
        else:
            rows = tensor_table({"x0": 1.0, "out0": sigma_next - sigma}, sample.device)
        prev_sample = self._fused(rows, sample, model_output, dtype=model_output.dtype)[0]
        self._step_index = index + 1
        return returned(HeliosSchedulerOutput, return_dict, prev_sample=prev_sample)

    def step_unipc(
        self,
        model_output: Tensor,
        timestep: float | Tensor | None = None,
        sample: Tensor | None = None,
        return_dict: bool = True,
        model_outputs: Any = None,
        timestep_list: Any = None,
        sigma_before: Any = None,
        sigma: Any = None,
        sigma_next: Any = None,
        cus_step_index: int | None = None,
        cus_lower_order_num: int | None = None,
        cus_this_order: int | None = None,
        cus_last_sample: Tensor | None = None,
    ) -> Any:
        if self.num_inference_steps is None:
            raise ValueError("num_inference_steps is None: call set_timesteps after creating the scheduler")
        if sample is None:
            raise ValueError("sample must be given")
        index = self._step_index = self._present if cus_step_index is None else cus_step_index
        if cus_lower_order_num is not None:
            self.lower_order_nums = cus_lower_order_num
        if cus_this_order is not None:
            self.this_order = cus_this_order
        if cus_last_sample is not None:
            self.last_sample = cus_last_sample
        own_lists = model_outputs is not None and timestep_list is not None  # whose last places are for this step

        corrected = index > 0 and index - 1 not in self.disable_corrector and self.last_sample is not None
        corrects = self.this_order if corrected else 0
        self.this_order = self._order(index, self.lower_order_nums + 1)
        if self.this_order < 1:
            raise ValueError(f"timestep: the run is over after {len(self.timesteps)} steps; call set_timesteps")
        predicts = 0 if self.solver_p else self.this_order
        past = model_outputs[:-1] if own_lists else self.model_outputs
        history = past[: -1 - self._history(corrects, predicts) : -1]
        given = (None if value is None else float(value) for value in (sigma_before, sigma, sigma_next))
        results: tuple[Any, Any, Any] = self._fused(
            ("unipc", index, corrects, predicts, *given), sample, model_output,
            pred=promoted(sample.dtype, model_output.dtype), second=sample.dtype,
            history=[*history, self.last_sample] if corrected else history,
        )  # fmt: skip
        prev_sample, converted, self.last_sample = results
        if own_lists:
            model_outputs[-1] = converted
            self.model_outputs, self.timestep_list = model_outputs[1:], timestep_list[1:]
        else:
            self.model_outputs = [*self.model_outputs[1:], converted]
            self.timestep_list = [*self.timestep_list[1:], timestep]
        if self.solver_p:
            prev_sample = self.solver_p.step(model_output, self.timestep_list[-1], self.last_sample).prev_sample
        if cus_lower_order_num is None and self.lower_order_nums < self.config.solver_order:
            self.lower_order_nums += 1
        if cus_step_index is None:
            self._step_index = index + 1
        return returned(
            HeliosSchedulerOutput, return_dict, prev_sample=prev_sample, model_outputs=model_outputs,
            last_sample=self.last_sample, this_order=self.this_order,
        )  # fmt: skip

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor | None = None,
        sample: Tensor | None = None,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> Any:
        if self.config.scheduler_type == "euler":
            return self.step_euler(model_output, timestep, sample, generator, return_dict=return_dict)
        if self.config.scheduler_type == "unipc":
            return self.step_unipc(model_output, timestep, sample, return_dict)
        raise NotImplementedError(f"scheduler_type must be euler or unipc, got {self.config.scheduler_type!r}")


class HeliosDMDScheduler(OnSigmas, DiffusersHeliosDMDScheduler):
    """Helios distilled by distribution matching: a flow's x_0, noised anew by the noise that the stage began with."""

    def _values(self, tensor: Tensor | None, name: str) -> list[float]:
        """The values of a schedule, which its owner need not be asked for if it is the scheduler's own."""
        if tensor is None:
            raise ValueError(f"{name} must be given")
        own = next((own for own in ("sigmas", "timesteps") if tensor is getattr(self, own)), None)
        return tensor.tolist() if own is None else self._host(own)

    def _run(self, *key: float) -> Iterable[Key]:
        times = self._host("timesteps")
        sigmas = [_nearest(time, times, self._host("sigmas")) for time in times]
        return [*itertools.pairwise(sigmas), (sigmas[-1], 0.0)]

    def _row(self, sigma: float, following: float) -> Columns:
        return {"x0": 1.0 - following, "out0": -(1.0 - following) * sigma, "noise0": following}

    def add_noise(
        self, original_samples: Tensor, noise: Tensor, timestep: Tensor, sigmas: Tensor, timesteps: Tensor
    ) -> Tensor:
        """(1 - sigma) x_0 + sigma noise, each sample at the sigma whose timestep is nearest to its own."""
        sigma = _nearest_of_each(timestep, timesteps, sigmas)
        return self._mixed(original_samples, noise, 1.0 - sigma, sigma).to(noise.dtype)

    def convert_flow_pred_to_x0(
        self, flow_pred: Tensor, xt: Tensor, timestep: Tensor, sigmas: Tensor, timesteps: Tensor
    ) -> Tensor:
        """x - sigma v, each sample at the sigma whose timestep is nearest to its own."""
        return self._mixed(xt, flow_pred, 1.0, -_nearest_of_each(timestep, timesteps, sigmas)).to(flow_pred.dtype)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor | None = None,
        sample: Tensor | None = None,
        generator: Generators = None,
        return_dict: bool = True,
        cur_sampling_step: int = 0,
        dmd_noisy_tensor: Tensor | None = None,
        dmd_sigmas: Tensor | None = None,
        dmd_timesteps: Tensor | None = None,
        all_timesteps: Tensor | None = None,
    ) -> Any:
        if timestep is None or sample is None:
            raise ValueError("timestep and sample must be given")
        sigmas, times = self._values(dmd_sigmas, "dmd_sigmas"), self._values(dmd_timesteps, "dmd_timesteps")
        visited = self._values(all_timesteps, "all_timesteps")
        sigma, following = _nearest(self._time(timestep), times, sigmas), 0.0
        noise, dtype = None, model_output.dtype
        if cur_sampling_step < len(visited) - 1:
            if dmd_noisy_tensor is None:
                raise ValueError("dmd_noisy_tensor must be given before the last step")
            following = _nearest(visited[cur_sampling_step + 1], times, sigmas)
            noise, dtype = {"noise": dmd_noisy_tensor}, dmd_noisy_tensor.dtype
        prev_sample = self._fused((sigma, following), sample, model_output, dtype=dtype, noise=noise)[0]
        return returned(HeliosDMDSchedulerOutput, return_dict, prev_sample=prev_sample)


def _nearest(time: float, times: list[float], sigmas: list[float]) -> float:
    """The sigma at the timestep that is nearest to a time, of which diffusers drops the fraction."""
    whole = int(time)
    distances = [abs(other - whole) for other in times]
    return sigmas[distances.index(min(distances))]


def _nearest_of_each(time: Tensor, times: Tensor, sigmas: Tensor) -> Tensor:
    return sigmas.double()[(times.double().unsqueeze(0) - time.unsqueeze(1)).abs().argmin(dim=1)].to(time.device)
