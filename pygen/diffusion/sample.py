"""The one sampling loop: a model, a plan, and a fused step between two calls of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pygen.diffusion.adaptive import ADAPTIVE, Attempts
from pygen.diffusion.guidance import Guider
from pygen.diffusion.plan import StepPlan, plan
from pygen.diffusion.schedules import Schedule, make_schedule
from pygen.ops.affine_step import affine_step
from pygen.ops.dynamic_threshold import dynamic_threshold
from pygen.ops.philox_normal import philox_normal
from pygen.ops.spec import index_tensor

Model = Callable[..., Any]


@dataclass(frozen=True)
class StepInfo:
    """What a callback is shown after each step. The loop reuses the tensors: clone what is to be kept.

    prediction: of x_0, or of epsilon from a solver that reasons in it, unless the plan clips.
    """

    step: int
    steps: int
    time: float
    sample: Tensor
    prediction: Tensor
    model_output: Tensor


class Stepper:
    """A run of a plan: the previous predictions and the carried result, updated in place by each step.

    guider: adapts the guidance of steps that are given an unconditional output, see ``pygen.diffusion.guidance``.
    """

    def __init__(self, plan: StepPlan, like: Tensor, guider: Guider | None = None) -> None:
        if guider is not None and plan.thresholding is not None:
            raise ValueError("give guider or a plan with thresholding, not both")
        self.plan = plan
        self.guide = None if guider is None else guider.begin(like)
        self.predictions = [torch.empty_like(like) for _ in range(plan.history)]
        self.carried = torch.empty_like(like) if plan.carries else None

    def step(
        self,
        index: int,
        x: Tensor,
        model_output: Tensor,
        *,
        uncond: Tensor | None = None,
        negative: Tensor | None = None,
        noise: Tensor | None = None,
        seed: Tensor | None = None,
        sample_ids: Tensor | None = None,
        out: Tensor | None = None,
        pred: Tensor | None = None,
    ) -> Tensor:
        """x_{index + 1} from x_index and the model's output; see ``affine_step`` for the arguments."""
        history = self.predictions if self.carried is None else [*self.predictions, self.carried]
        second = self.carried
        if self.plan.remembers_second:
            second = self.predictions[-1]
        elif self.predictions:  # the newest takes the place of the oldest, which this step still reads
            pred = self.predictions[-1]
        table, row = self.plan.table, self.plan.rows[index]
        scale = None
        if self.plan.thresholding is not None:
            ratio, max_value = self.plan.thresholding
            scale = dynamic_threshold(
                x, model_output, table, row, uncond=uncond, negative=negative, ratio=ratio, max_value=max_value
            )
        if self.guide is not None and uncond is not None:
            uncond, scale = self.guide(table, row, model_output, uncond, negative)
        following = affine_step(
            x,
            model_output,
            table,
            row,
            uncond=uncond,
            negative=negative,
            scale=scale,
            history=history,
            noise=noise,
            seed=seed if self.plan.noisy[index] else None,  # nothing to draw: any memory order will do
            sample_ids=sample_ids,
            out=out,
            pred=pred,
            second=second,
        )
        self.predictions = self.predictions[-1:] + self.predictions[:-1]
        return following


@torch.no_grad()
def sample(
    model: Model,
    shape: Sequence[int],
    *,
    solver: str | StepPlan = "dpmpp_2m",
    schedule: Schedule | str | dict[str, Any] | None = None,
    steps: int = 20,
    guidance: float | Sequence[float] | None = None,
    guider: Guider | None = None,
    cond: Mapping[str, Any] | None = None,
    uncond: Mapping[str, Any] | None = None,
    seed: int | Tensor | None = None,
    sample_ids: Tensor | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    callback: Callable[[StepInfo], None] | None = None,
    **options: Any,
) -> Tensor:
    """Draw samples from a diffusion model.

    Args:
        model: called as ``model(x, t, **cond)`` with x (batch, ...) and t (batch,); returns a tensor of x's shape, or
            an object whose ``sample`` is one, as diffusers' models do.
        shape: of the result, batch first.
        solver: a name of ``pygen.diffusion.solvers.SOLVERS``, or a ready ``StepPlan``, which then says all that
            ``schedule``, ``steps``, ``guidance`` and ``options`` would; or "dpm_adaptive", which chooses its own steps
            by the error over the batch and has the options of ``pygen.diffusion.adaptive.Attempts``.
        schedule: the one the model was trained with: a ``Schedule``, a name, or a dict of name and arguments.
        guidance: the factor of classifier-free guidance; with ``uncond``, model calls see both halves as one batch.
        guider: adapts it to the model's outputs: ``Rescale`` or ``APG`` of ``pygen.diffusion``.
        cond, uncond: keyword arguments of the model; tensors whose first dimension is the batch, or anything that is
            the same for both.
        seed: of the noise by Philox, which depends on the sample and not on the batch; drawn from torch's global
            generator where neither it nor ``generator`` is given.
        sample_ids: int64 (batch,), whose noise each sample gets; 0, 1, 2, ... where left out.
        generator: draws the noise by ``torch.randn`` instead: first the initial sample, then each noisy step.
        callback: called after each step.
        options: of ``pygen.plan``: prediction, clip, thresholding, spacing, times, and the solver's own.

    Returns:
        The samples, (batch, ...), of ``dtype`` on ``device``.
    """
    adaptive = None
    if isinstance(solver, StepPlan):
        given = {"schedule": schedule, "guidance": guidance} | options
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{name} belongs to the plan that was given as solver")
        steps_plan = solver.to(device)
    else:
        if schedule is None:
            raise ValueError("schedule must be given: the one that the model was trained with")
        guidance = 1.0 if guidance is None else guidance
        if solver == ADAPTIVE:
            adaptive = Attempts(make_schedule(schedule), guidance=guidance, device=device, **options)
            steps_plan = adaptive.attempt(0)
        else:
            steps_plan = plan(solver, schedule, steps, guidance=guidance, device=device, **options)
        if uncond is None and guidance != 1.0:
            raise ValueError("guidance needs uncond, the model's arguments without the condition")
    if guider is not None and uncond is None:
        raise ValueError("guider needs uncond, the model's arguments without the condition")
    if guider is not None and adaptive is not None:
        raise ValueError(f"give guider or solver {ADAPTIVE!r}, not both")
    if seed is not None and generator is not None:
        raise ValueError("give seed or generator, not both")
    if len(shape) == 0 or min(shape) < 1:
        raise ValueError(f"shape must be positive sizes, batch first, got {tuple(shape)}")

    run = _Run(model, shape, cond, uncond, seed, sample_ids, generator, dtype, device)
    x = run.x
    if steps_plan.initial_scale != 1.0:
        x.mul_(steps_plan.initial_scale)
    if adaptive is not None:
        _walk_adaptively(run, adaptive)
        return run.samples()
    stepper = Stepper(steps_plan, x, guider)
    remembered = stepper.predictions and not steps_plan.remembers_second
    pred = torch.empty_like(x) if callback is not None and not remembered else None
    for i in range(steps_plan.steps):
        output = run.evaluate(x, steps_plan.timesteps[i])
        run.step(stepper, i, x, output, out=x, pred=pred)
        if callback is not None:
            prediction = stepper.predictions[0] if pred is None else pred
            callback(StepInfo(i, steps_plan.steps, float(steps_plan.times[i]), x, prediction, output))
    return run.samples()


class _Run:
    """The model and the noise of one call of ``sample``; ``x`` is the sample, at first the noise it begins with."""

    def __init__(
        self,
        model: Model,
        shape: Sequence[int],
        cond: Mapping[str, Any] | None,
        uncond: Mapping[str, Any] | None,
        seed: int | Tensor | None,
        sample_ids: Tensor | None,
        generator: torch.Generator | None,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.model, self.sample_ids, self.generator = model, sample_ids, generator
        batch, self.guided = shape[0], uncond is not None
        self.arguments = dict(cond or {}) if uncond is None else _join(cond or {}, uncond, batch)
        # With guidance the model sees every sample twice: the sample is the first half of its input.
        self.model_input = torch.empty((2 * batch if self.guided else batch, *shape[1:]), dtype=dtype, device=device)
        self.x = self.model_input[:batch]
        self.key: Tensor | None = None
        if generator is not None:
            torch.randn(tuple(shape), generator=generator, out=self.x)
        else:
            self.key = index_tensor(int(torch.randint(2**63 - 1, ())) if seed is None else seed, self.x.device)
            philox_normal(seed=self.key, sample_ids=sample_ids, out=self.x)

    def evaluate(self, x: Tensor, timestep: Tensor) -> Tensor:
        """The model's output at x and, with guidance, below it, without the condition."""
        if x is not self.x:
            model_input = torch.cat([x, x]) if self.guided else x
        else:
            model_input = self.model_input
            if self.guided:
                model_input[len(x) :].copy_(x)
        output = self.model(model_input, timestep.expand(len(model_input)), **self.arguments)
        output = output if isinstance(output, Tensor) else output.sample
        if output.shape != model_input.shape:
            raise ValueError(
                f"model returned shape {tuple(output.shape)} for an input of shape {tuple(model_input.shape)}"
            )
        return output

    def step(
        self,
        stepper: Stepper,
        index: int,
        x: Tensor,
        output: Tensor,
        out: Tensor | None = None,
        pred: Tensor | None = None,
    ) -> Tensor:
        noise = None
        if self.generator is not None and stepper.plan.noisy[index]:
            noise = torch.randn(x.shape, generator=self.generator, dtype=x.dtype, device=x.device)
        return stepper.step(
            index,
            x,
            output[: len(x)],
            uncond=output[len(x) :] if self.guided else None,
            noise=noise,
            seed=self.key,
            sample_ids=self.sample_ids,
            out=out,
            pred=pred,
        )

    def samples(self) -> Tensor:
        return self.x.clone() if self.guided else self.x


def _walk_adaptively(run: _Run, attempts: Attempts) -> None:
    """k-diffusion's ``dpm_adaptive``. The size of a step depends on values of tensors: the host waits for the device
    once a step, and no one table or graph serves a run."""
    x, previous = run.x, run.x
    drawn = 0  # rows so far, which count the noise
    output = None
    while not attempts.done:
        steps_plan = attempts.attempt(drawn)
        drawn += steps_plan.steps
        stepper = Stepper(steps_plan, x)
        stages = steps_plan.steps - 3
        if output is None:  # else the attempt before was refused, and the model has seen x
            output = run.evaluate(x, steps_plan.timesteps[0])
        at, latest = x, output
        for i in range(stages):
            at = run.step(stepper, i, at, latest)
            latest = run.evaluate(at, steps_plan.timesteps[i + 1])
        low = run.step(stepper, stages, at, latest)
        high = run.step(stepper, stages + 1, at, latest)
        # In x / alpha, where the tolerances are.
        before, after = attempts.alphas
        size = torch.maximum((low / after).abs(), (previous / before).abs())
        error = ((low - high) / after / (attempts.rtol * size).clamp_min(attempts.atol)).square().mean().sqrt()
        if attempts.accepts(float(error)):
            previous, output = low, None
            run.step(stepper, stages + 2, high, latest, out=x)
    last = attempts.denoise()
    run.step(Stepper(last, x), 0, x, run.evaluate(x, last.timesteps[0]), out=x)


def _join(cond: Mapping[str, Any], uncond: Mapping[str, Any], batch: int) -> dict[str, Any]:
    """The model's arguments for a batch of which the first half is conditional."""
    if cond.keys() != uncond.keys():
        raise ValueError(f"cond and uncond must name the same arguments, got {sorted(cond)} and {sorted(uncond)}")
    joined = {}
    for name, value in cond.items():
        other = uncond[name]
        if isinstance(value, Tensor):
            if not isinstance(other, Tensor) or value.shape[:1] != (batch,) or value.shape != other.shape:
                raise ValueError(f"cond and uncond must hold equal shapes ({batch}, ...) for {name!r}")
            value = torch.cat([value, other])
        joined[name] = value
    return joined
