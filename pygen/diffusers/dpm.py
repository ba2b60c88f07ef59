"""Exponential integrators in the logarithm of the signal-to-noise ratio: the DPM-Solvers, DEIS, UniPC and SA-Solver."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from pygen.diffusers.base import Columns, HostTensor, Key, Level, OfIndex, promoted, returned, variance_preserving
from pygen.diffusers.karras import preconditioning
from pygen.diffusers.noise import Generators, PhiloxGenerator, draw_noise
from pygen.diffusion.rows import Factors, columns, conversion
from pygen.diffusion.solvers import Combination, Grid, SolverStep
from pygen.diffusion.solvers.base import CARRIED, PRED, Update, X
from pygen.diffusion.solvers.dpm import multistep_update, singlestep_update
from pygen.diffusion.solvers.multistep import deis_update
from pygen.diffusion.solvers.sa import adams_update
from pygen.diffusion.solvers.unipc import unipc_update


class _Exponential(OfIndex):
    """What these schedulers share: the conversion of the model's output to what the solver reasons in, and its past."""

    model_outputs: list[Tensor | None]
    lower_order_nums: int

    @property
    def _noisy(self) -> bool:
        """Whether the solver is one of the SDE."""
        return self.config.get("algorithm_type", "").startswith("sde-")

    @property
    def _epsilon(self) -> bool:
        """Whether the solver reasons in epsilon instead of x_0."""
        return self.config.get("algorithm_type") in ("dpmsolver", "sde-dpmsolver", "deis", "noise_prediction")

    def _level(self, index: int) -> Level:
        sigma = self._host("sigmas")[index]
        if self.config.get("use_flow_sigmas", False):
            return 1.0 - sigma, sigma
        alpha = 1.0 / (sigma**2 + 1.0) ** 0.5
        return alpha, sigma * alpha

    def _grid(self, first: int, last: int) -> Grid:
        alpha, sigma = np.array([self._level(i) for i in range(first, last + 1)]).T
        return Grid(alpha, sigma)

    def _conversion(self, index: int) -> tuple[Factors, Factors]:
        """x_0 and epsilon from the sample and the model's output."""
        alpha, sigma = self._level(index)
        prediction = self.config.prediction_type
        if prediction == "flow_prediction" and not self._epsilon:
            return (1.0, -self._host("sigmas")[index]), (0.0, 0.0)
        if prediction not in ("epsilon", "sample", "v_prediction"):
            flow = "" if self._epsilon else " or flow_prediction"
            raise ValueError(f"prediction_type must be epsilon, sample, v_prediction{flow}, got {prediction!r}")
        return conversion(prediction, alpha, sigma)

    def _index_of_unknown(self, time: float, times: list[float]) -> int:
        return len(times) - 1

    @property
    def _thresholds(self) -> bool:
        return self.config.get("thresholding", False) and getattr(self, "predict_x0", True) is not False

    def _columns(self, index: int, following: Combination, carry: Combination | None, history: int) -> Columns:
        """The row of a step whose combinations are of what the solver reasons in.

        Where x_0 is thresholded and the solver reasons in epsilon, the prediction of the row is x_0 all the same, and
        epsilon is derived from it: the second result of such a row.
        """
        x0, epsilon = self._conversion(index)
        if not self._thresholds:
            return columns(SolverStep(following, carry), epsilon if self._epsilon else x0, history=history)
        if self._epsilon:
            alpha, sigma = self._level(index)
            derived = 1.0 / sigma * X - alpha / sigma * PRED
            following = following.pred * derived + _less_pred(following)
            carry = derived
        return columns(SolverStep(following, carry), x0, history=history) | {"low": -1.0, "high": 1.0}

    def _solve(
        self,
        key: Key,
        sample: Tensor,
        model_output: Tensor,
        history: Sequence[Tensor | None],
        *,
        second: bool = False,
        noise: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The next sample and the second result; what the solver reasoned in becomes the last of ``model_outputs``."""
        if (
            self.config.get("variance_type") in ("learned", "learned_range")
            and self.config.prediction_type == "epsilon"
        ):
            model_output = model_output[:, :3]  # as diffusers cuts it
        dtype = promoted(sample.dtype, model_output.dtype)
        derived = self._thresholds and self._epsilon
        prev_sample, pred, carried = self._fused(
            key, sample, model_output, history=history, dtype=dtype, noise=noise, threshold=self._thresholds,
            pred=None if derived else dtype, second=dtype if second or derived else None,
        )  # fmt: skip
        self.model_outputs = [*self.model_outputs[1:], carried if derived else pred]
        return prev_sample, carried

    def _needs_timesteps(self) -> None:
        if self.num_inference_steps is None:
            raise ValueError(
                "Number of inference steps is 'None', you need to run 'set_timesteps' after creating the scheduler"
            )


def _less_pred(y: Combination) -> Combination:
    return y - y.pred * PRED


class _Multistep(_Exponential):
    """Steps of an order that the number of predictions so far and of steps left allow."""

    def _update(self, grid: Grid, i: int, order: int) -> Update:
        raise NotImplementedError

    def _first_order_at_the_end(self, steps: int) -> bool:
        config = self.config
        short = config.lower_order_final and steps < 15
        return short or config.get("euler_at_final", False) or config.get("final_sigmas_type") == "zero"

    def _order(self, index: int, lower_order_nums: int) -> int:
        steps = len(self._host("timesteps"))
        order = min(self.config.solver_order, lower_order_nums + 1)
        if index == steps - 1 and self._first_order_at_the_end(steps):
            return 1
        if index == steps - 2 and self.config.lower_order_final and steps < 15:
            return min(order, 2)
        return order

    def _run(self, index: int, order: int) -> Iterable[Key]:
        known = self.lower_order_nums - index
        return ((i, self._order(i, known + i)) for i in range(index, len(self._host("timesteps"))))

    def _row(self, index: int, order: int) -> Columns:
        sigma, following = self._interval(index)
        step = X
        if not self._stands(sigma, following):
            step = self._update(self._grid(index - order + 1, index + 1), order - 1, order).of()
        return (
            self._columns(index, step, None, order - 1) | {f"h{j}_1": 0.0 for j in range(order - 1)} | {"step": index}
        )

    def _stands(self, sigma: float, following: float) -> bool:
        """Whether a step has no length, but for rounding where that is the noise's: diffusers divides by the length."""
        return sigma == following or (self._noisy and following > sigma * (1.0 - 1e-6))

    def _multistep(
        self, sample: Tensor, model_output: Tensor, timestep: Any, return_dict: bool, noise: Any = None
    ) -> SchedulerOutput | tuple[Tensor]:
        index = self._index(timestep)
        order = self._order(index, self.lower_order_nums)
        prev_sample, _ = self._solve(
            (index, order), sample, model_output, self.model_outputs[-1:-order:-1], noise=noise
        )
        if self.lower_order_nums < self.config.solver_order:
            self.lower_order_nums += 1
        self._step_index = index + 1
        return returned(SchedulerOutput, return_dict, prev_sample=prev_sample)


class _DPMSolver(_Multistep):
    """The multistep DPM-Solvers of Lu et al. 2022, of the ODE and of the SDE."""

    _noise_dtype: torch.dtype | None = None  # the sample's

    def _update(self, grid: Grid, i: int, order: int) -> Update:
        algorithm_type = self.config.get("algorithm_type", "sde-dpmsolver++")
        return multistep_update(
            grid, i, order, algorithm_type=algorithm_type, solver_type=self.config.solver_type,
            half=-0.5 if algorithm_type == "sde-dpmsolver++" else 0.5,
        )  # fmt: skip

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        self._needs_timesteps()
        noise = None
        if self._noisy:
            if variance_noise is None:
                dtype = self._noise_dtype or promoted(sample.dtype, model_output.dtype)
                noise = draw_noise(sample.shape, generator, sample.device, dtype)
            else:
                noise = {"noise": variance_noise}
        return self._multistep(sample, model_output, timestep, return_dict, noise)


class DPMSolverMultistepScheduler(_DPMSolver, diffusers.DPMSolverMultistepScheduler):
    """DPM-Solver and DPM-Solver++, multistep, of the ODE and of the SDE (Lu et al. 2022).

    sde-dpmsolver has a third order here, which diffusers lacks.
    """

    _noise_dtype = torch.float32

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        mu: float | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        if timesteps is not None and self.config.use_flow_sigmas:
            raise ValueError("timesteps cannot be chosen where use_flow_sigmas makes them")
        super().set_timesteps(num_inference_steps, device, mu, timesteps)


class DPMSolverMultistepInverseScheduler(_DPMSolver, diffusers.DPMSolverMultistepInverseScheduler):
    """DPM-Solver and DPM-Solver++ backwards, from an image to its noise; the SDE has no such inverse."""

    def _first_order_at_the_end(self, steps: int) -> bool:
        return self.config.euler_at_final or (self.config.lower_order_final and steps < 15)

    def _row(self, index: int, order: int) -> Columns:
        if self._noisy:
            raise ValueError(f"algorithm_type {self.config.algorithm_type!r} cannot go backwards: noise is not undone")
        return super()._row(index, order)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha x_0 + sigma noise, each sample at its own timestep."""
        indices = [self.index_for_timestep(t) for t in timesteps.reshape(-1)]
        return self._noised(original_samples, noise, [self._level(i) for i in indices])


class _Preconditioned(_DPMSolver):
    """DPM-Solver++ in the formulation of Karras et al. 2022, whose preconditioning makes x_0 of the model's output.

    ``precondition_inputs`` and ``precondition_outputs`` are diffusers' own: training differentiates them.
    """

    def _level(self, index: int) -> Level:
        return 1.0, self._host("sigmas")[index]

    def _conversion(self, index: int) -> tuple[Factors, Factors]:
        if self.config.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction_type must be epsilon or v_prediction, got {self.config.prediction_type!r}")
        c_skip, c_out = preconditioning(self._host("sigmas")[index], self.config.sigma_data)
        return (c_skip, c_out if self.config.prediction_type == "epsilon" else -c_out), (0.0, 0.0)

    def _run(self, *key: Any) -> Iterable[Key]:
        if key[0] == "input":
            return (("input", i) for i in range(len(self._host("timesteps"))))
        return super()._run(*key)

    def _row(self, *key: Any) -> Columns:
        if key[0] == "input":
            return {"x0": (self._host("sigmas")[key[1]] ** 2 + self.config.sigma_data**2) ** -0.5}
        return super()._row(*key)

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """x / sqrt(sigma^2 + sigma_data^2), of unit variance."""
        self.is_scale_input_called = True
        return self._fused(("input", self._index(timestep)), sample)[0]


class EDMDPMSolverMultistepScheduler(_Preconditioned, diffusers.EDMDPMSolverMultistepScheduler):
    """DPM-Solver++ multistep in the formulation of Karras et al. 2022; here its SDE has a third order too."""

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        return super().step(model_output, timestep, sample, generator, return_dict=return_dict)


class CosineDPMSolverMultistepScheduler(_Preconditioned, diffusers.CosineDPMSolverMultistepScheduler):
    """SDE-DPM-Solver++ with the noise of a Brownian path: torchsde's, which costs more than the step.

    With a ``PhiloxGenerator``, or a list of them, the step draws the path's increments itself.
    """

    noise_sampler: Any
    _noisy = True

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        self._needs_timesteps()
        index = self._index(timestep)
        sigma, following = self._interval(index)
        noise = None
        if isinstance(generator[0] if isinstance(generator, list) else generator, PhiloxGenerator):
            noise = draw_noise(sample.shape, generator, sample.device, sample.dtype)
        elif not self._stands(sigma, following):
            noise = {"noise": self._brownian(sample, index, generator)}
        return self._multistep(sample, model_output, timestep, return_dict, noise)

    def _brownian(self, sample: Tensor, index: int, generator: Generators) -> Tensor:
        """The increment of the Brownian path over the step."""
        if self.noise_sampler is None:
            from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler  # needs torchsde

            seed = None
            if generator is not None:
                generators = generator if isinstance(generator, list) else [generator]
                seeds = [one.initial_seed() for one in generators]
                seed = seeds if isinstance(generator, list) else seeds[0]
            self.noise_sampler = BrownianTreeNoiseSampler(
                sample, sigma_min=self.config.sigma_min, sigma_max=self.config.sigma_max, seed=seed
            )
        return self.noise_sampler(self.sigmas[index], self.sigmas[index + 1]).to(sample.device)


class DEISMultistepScheduler(_Multistep, diffusers.DEISMultistepScheduler):
    """DEIS, exponential integrators in log rho (Zhang & Chen 2023)."""

    def _conversion(self, index: int) -> tuple[Factors, Factors]:
        if self.config.prediction_type != "flow_prediction":
            return super()._conversion(index)
        alpha, sigma = self._level(index)
        raised = self._host("sigmas")[index]  # which is sigma on a schedule of flow
        return (1.0, -raised), ((1.0 - alpha) / sigma, alpha * raised / sigma)

    def _update(self, grid: Grid, i: int, order: int) -> Update:
        return deis_update(grid, i, range(i - 1, i - order, -1))

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        self._needs_timesteps()
        return self._multistep(sample, model_output, timestep, return_dict)


class DPMSolverSinglestepScheduler(_Exponential, diffusers.DPMSolverSinglestepScheduler):
    """DPM-Solver and DPM-Solver++, singlestep, of the ODE and of the SDE (Lu et al. 2022).

    The evaluations inside a step start again from where the step began, which ``sample`` keeps.
    """

    order_list: list[int]
    sample: Tensor | None

    def _run(self, index: int, order: int) -> Iterable[Key]:
        return ((i, self.order_list[i]) for i in range(index, len(self.order_list)))

    def _row(self, index: int, order: int) -> Columns:
        algorithm_type = self.config.algorithm_type
        update = singlestep_update(
            self._grid(index - order + 1, index + 1), 0, range(1, order), order, algorithm_type=algorithm_type,
            solver_type=self.config.solver_type, half=-0.5 if algorithm_type == "sde-dpmsolver++" else 0.5,
        )  # fmt: skip
        following = update.of(X if order == 1 else CARRIED, range(order - 1, -1, -1))
        return self._columns(index, following, None, order - 1) | {"step": index}

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        self._needs_timesteps()
        index = self._index(timestep)
        order = self.order_list[index]
        while order > 1 and self.model_outputs[1 - order] is None:
            order -= 1
        noise = None
        if self._noisy:
            dtype = promoted(sample.dtype, model_output.dtype)
            noise = draw_noise(sample.shape, generator, sample.device, dtype)
        history = self.model_outputs[-1:-order:-1]
        if order == 1:
            self.sample = sample
        else:
            history.append(self.sample)
        prev_sample, _ = self._solve((index, order), sample, model_output, history, noise=noise)
        self._step_index = index + 1
        return returned(SchedulerOutput, return_dict, prev_sample=prev_sample)


class UniPCMultistepScheduler(_Exponential, diffusers.UniPCMultistepScheduler):
    """UniPC (Zhao et al. 2023): a row corrects the sample, then predicts the next one from it."""

    predict_x0: bool
    this_order: int
    last_sample: Tensor | None
    timestep_list: list[Any]

    @property
    def _epsilon(self) -> bool:
        return not self.predict_x0

    def _orders(self, index: int, lower_order_nums: int) -> int:
        left = len(self._host("timesteps")) - index
        order = min(self.config.solver_order, lower_order_nums + 1)
        if self._interval(index)[1] == 0.0:
            return 1  # where diffusers makes NaN of a higher one
        return min(order, left) if self.config.lower_order_final else order

    def _run(self, index: int, order: int, correct: int, predicts: bool) -> Iterable[Key]:
        known = self.lower_order_nums - index
        for i in range(index, len(self._host("timesteps")) - 1):
            correct = self._orders(i, known + i)
            if i in self.disable_corrector:
                correct = 0
            yield i + 1, self._orders(i + 1, known + i + 1), correct, predicts

    def _row(self, index: int, order: int, correct: int, predicts: bool) -> Columns:
        depth = max(order - 1, correct)
        grid = self._grid(index - depth, index + 1)
        if not self.predict_x0:
            grid = Grid(grid.sigma, grid.alpha)
        variant = self.config.solver_type
        sample = X
        if correct:
            sample = unipc_update(grid, depth - 1, correct, variant, corrects=True).of(CARRIED)
        following = unipc_update(grid, depth, order, variant).of(sample) if predicts else sample
        return self._columns(index, following, sample if correct else None, depth) | {"step": index}

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        self._needs_timesteps()
        index = self._index(timestep)
        corrects = index > 0 and index - 1 not in self.disable_corrector and self.last_sample is not None
        correct = self.this_order if corrects else 0
        self.this_order = self._orders(index, self.lower_order_nums)
        depth = max(self.this_order - 1, correct)
        history = self.model_outputs[: -depth - 1 : -1]
        if corrects:
            history.append(self.last_sample)
        prev_sample, corrected = self._solve(
            (index, self.this_order, correct, self.solver_p is None), sample, model_output, history, second=corrects
        )
        self.last_sample = corrected if corrects else sample
        if self.solver_p is not None:
            prev_sample = self.solver_p.step(model_output, timestep, prev_sample).prev_sample
        self.timestep_list = [*self.timestep_list[1:], timestep]
        if self.lower_order_nums < self.config.solver_order:
            self.lower_order_nums += 1
        self._step_index = index + 1
        return returned(SchedulerOutput, return_dict, prev_sample=prev_sample)


class SASolverScheduler(_Exponential, diffusers.SASolverScheduler):
    """SA-Solver (Xue et al. 2023).

    ``last_sample`` is what the corrector of the next sample adds its new prediction to, the step's noise included, so
    that the noise is not kept.
    """

    this_predictor_order: int
    this_corrector_order: int
    last_sample: Tensor | None
    timestep_list: list[Any]
    alphas_cumprod = HostTensor()

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha x_0 + sigma noise, each sample at its own training timestep."""
        squared = self._host("alphas_cumprod")
        levels = [variance_preserving(squared[t]) for t in timesteps.reshape(-1).tolist()]
        return self._noised(original_samples, noise, levels)

    def _orders(self, index: int, lower_order_nums: int) -> tuple[int, int]:
        left = len(self._host("timesteps")) - index
        predictor = min(self.config.predictor_order, lower_order_nums + 1)
        corrector = min(self.config.corrector_order, lower_order_nums + 2)
        if self.config.lower_order_final:
            predictor, corrector = min(predictor, left), min(corrector, left + 1)
        sigma, following = self._interval(index)
        if following in (0.0, sigma):
            return 1, 0  # where diffusers makes NaN of a higher order, and of a correction
        return predictor, 0 if left == 1 else corrector  # nothing comes after the last

    def _tau(self, index: int) -> float:
        return float(self.tau_func(self._host("timesteps")[index]))

    def _run(self, index: int, order: int, correct: int, next_correct: int) -> Iterable[Key]:
        known = self.lower_order_nums - index
        for i in range(index + 1, len(self._host("timesteps"))):
            correct = next_correct
            order, next_correct = self._orders(i, known + i)
            yield i, order, correct, next_correct

    def _row(self, index: int, order: int, correct: int, next_correct: int) -> Columns:
        """The step at an order, of a sample corrected at one; the next sample's correction begins at one too."""
        if self.config.thresholding and self._epsilon:
            raise ValueError("thresholding needs algorithm_type 'data_prediction'")
        depth = max(order - 1, correct - 1, next_correct - 2, 1)
        grid = self._grid(max(index - depth, 0), index + 1)
        i = grid.steps - 1

        def update(start: int, newest: int, order: int) -> Update:
            nodes = range(newest, newest - order, -1)
            return adams_update(grid, start, nodes, self._tau(index - i + start), epsilon=self._epsilon)

        sample = X
        if correct:
            sample = CARRIED + update(i - 1, i, correct).model[0] * PRED
        following = update(i, i, order).of(sample)
        carry = None
        if next_correct:
            x, (_, *known), noise = update(i, i + 1, next_correct)
            carry = Update(x, tuple(known), noise).of(sample)
        return self._columns(index, following, carry, max(order - 1, next_correct - 2, 0)) | {"step": index}

    def step(
        self,
        model_output: Tensor,
        timestep: int,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        self._needs_timesteps()
        index = self._index(timestep)
        correct = self.this_corrector_order if index > 0 and self.last_sample is not None else 0
        order, next_correct = self._orders(index, self.lower_order_nums)
        history = self.model_outputs[: -max(order - 1, next_correct - 2, 0) - 1 : -1]
        if correct:
            history.append(self.last_sample)
        noise = draw_noise(sample.shape, generator, model_output.device, model_output.dtype)
        prev_sample, self.last_sample = self._solve(
            (index, order, correct, next_correct), sample, model_output, history, second=next_correct > 0, noise=noise
        )
        self.this_predictor_order, self.this_corrector_order = order, next_correct
        self.timestep_list = [*self.timestep_list[1:], timestep]
        if self.lower_order_nums < len(self.model_outputs):
            self.lower_order_nums += 1
        self._step_index = index + 1
        return returned(SchedulerOutput, return_dict, prev_sample=prev_sample)
