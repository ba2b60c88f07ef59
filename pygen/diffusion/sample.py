"""The one sampling loop: a model, a plan, and a fused step between two calls of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pygen.diffusion.adaptive import ADAPTIVE, Attempts
from pygen.diffusion.guidance import Guider
from pygen.diffusion.plan import StepPlan, plan
from pygen.diffusion.schedules import Schedule, make_schedule
from pygen.ops.affine_step import affine_step, make_table
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


class Known(NamedTuple):
    """What is given of the result, for inpainting; all three broadcast to the sample.

    image: the image or latent.
    noise: what it is noised with, up to the level of each time; a step that draws noise of its own takes that, as
        RePaint does.
    mask: 1 where the model generates, 0 where the image stays; between them, or bool, as it may be.
    """

    image: Tensor
    noise: Tensor
    mask: Tensor


class Stepper:
    """A run of a plan: the previous predictions and second results, updated in place by each step.

    guider: adapts the guidance of steps that are given an unconditional output, see ``pygen.diffusion.guidance``.
    known: what is given of the result.
    """

    def __init__(
        self, plan: StepPlan, like: Tensor, guider: Guider | None = None, *, known: Known | None = None
    ) -> None:
        if guider is not None and plan.thresholding is not None:
            raise ValueError("give guider or a plan with thresholding, not both")
        self.plan = plan
        self.guide = None if guider is None else guider.begin(like)
        # Made here, so that no step waits for a GPU.
        self._rows, self._noisy = plan.rows, plan.noisy
        self._known = None if known is None else (plan.inpainting, known.mask, [known.image, known.noise])
        self.predictions = [torch.empty_like(like) for _ in range(plan.predictions)]
        self.carried = [torch.empty_like(like) for _ in range(plan.carried)]

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
        table, row = self.plan.table, self._rows[index]
        history, mask = [*self.predictions, *self.carried], None
        if self._known is not None and not self.carried:
            table, mask, known = self._known
            history += known
        # The newest takes the place of the oldest, which this step still reads.
        pred = self.predictions[-1] if self.predictions else pred
        second = self.carried[-1] if self.carried else None
        draws: dict[str, Any] = {"noise": noise, "sample_ids": sample_ids}
        draws["seed"] = seed if self._noisy[index] else None  # nothing to draw: any memory order will do
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
            mask=mask,
            out=out,
            pred=pred,
            second=second,
            **draws,
        )
        if self._known is not None and self.carried:
            table, mask, known = self._known
            affine_step(following, None, table, row, history=known, mask=mask, out=following, **draws)
        self.predictions = self.predictions[-1:] + self.predictions[:-1]
        self.carried = self.carried[-1:] + self.carried[:-1]
        return following


def noised(plan: StepPlan, image: Tensor, noise: Tensor, out: Tensor | None = None) -> Tensor:
    """alpha image + sigma noise at the first time of a plan, where image to image begins; image broadcasts to noise."""
    row = {"x0": plan.initial_scale, "h0_0": float(plan.schedule.alpha(plan.times[0]))}
    table = make_table([row], n_history=1).to(noise.device, non_blocking=True)
    first = torch.zeros(1, dtype=torch.int64, device=noise.device)
    return affine_step(noise, None, table, first, history=[image], out=out)


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
    concat: Tensor | None = None,
    init: Tensor | None = None,
    mask: Tensor | None = None,
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
        steps: how many, unless ``times`` are given.
        guidance: the factor of classifier-free guidance; with ``uncond``, model calls see both halves as one batch.
        guider: adapts it to the model's outputs: ``Rescale`` or ``APG`` of ``pygen.diffusion``.
        cond, uncond: keyword arguments of the model; tensors whose first dimension is the batch, or anything that is
            the same for both.
        concat: channels that the model is shown after those of x, (batch, channels, ...): an image to be enlarged, or
            edited, and the mask of an inpainting model.
        init: an image or latent that sampling starts from, noised to the plan's first time, which the option
            ``strength`` moves; broadcasts to ``shape``.
        mask: 1 where the model is to generate and 0 where ``init`` is to stay, or between; broadcasts to ``shape``. At
            each time what stays is ``init`` at that level of noise: Avrahami et al. 2022, "Blended latent diffusion";
            where the plan's times go up, RePaint, see ``pygen.diffusion.resampled``.
        seed: of the noise by Philox, which depends on the sample and not on the batch; drawn from torch's global
            generator where neither it nor ``generator`` is given.
        sample_ids: int64 (batch,), whose noise each sample gets; 0, 1, 2, ... where left out.
        generator: draws the noise by ``torch.randn`` instead: first the initial sample, then each noisy step.
        callback: called after each step.
        options: of ``pygen.plan``: prediction, clip, thresholding, spacing, times, strength, and the solver's own.

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
            count = steps if options.get("times") is None else None
            steps_plan = plan(solver, schedule, count, guidance=guidance, device=device, **options)
        if uncond is None and guidance != 1.0:
            raise ValueError("guidance needs uncond, the model's arguments without the condition")
    if guider is not None and uncond is None:
        raise ValueError("guider needs uncond, the model's arguments without the condition")
    if adaptive is not None and (guider is not None or callback is not None):
        raise ValueError(f"solver {ADAPTIVE!r} takes neither a guider nor a callback: its steps may be tried again")
    if seed is not None and generator is not None:
        raise ValueError("give seed or generator, not both")
    if len(shape) == 0 or min(shape) < 1:
        raise ValueError(f"shape must be positive sizes, batch first, got {tuple(shape)}")
    if mask is not None and adaptive is not None:
        raise ValueError(f"give mask or solver {ADAPTIVE!r}, not both")
    if init is None and (mask is not None or options.get("strength", 1.0) != 1.0):
        raise ValueError("mask and strength need init, the image that they keep")
    for name, tensor in {"init": init, "mask": mask}.items():
        if tensor is not None and not _broadcasts(tensor.shape, shape):
            raise ValueError(f"{name} must broadcast to shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if concat is not None and (len(shape) < 2 or concat.shape != (shape[0], *concat.shape[1:2], *shape[2:])):
        raise ValueError(f"concat must have shape {tuple(shape)} but for its channels, got {tuple(concat.shape)}")

    run = _Run(model, shape, cond, uncond, concat, seed, sample_ids, generator, dtype, device)
    x, known = run.x, None
    if init is not None:
        z = x.clone()
        noised(steps_plan, init, z, out=x)
        known = None if mask is None else Known(init, z, mask)
    elif steps_plan.initial_scale != 1.0:
        x.mul_(steps_plan.initial_scale)
    if adaptive is not None:
        _walk_adaptively(run, adaptive)
        return run.samples()
    stepper = Stepper(steps_plan, x, guider, known=known)
    pred = torch.empty_like(x) if callback is not None and not stepper.predictions else None
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
        concat: Tensor | None,
        seed: int | Tensor | None,
        sample_ids: Tensor | None,
        generator: torch.Generator | None,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.model, self.sample_ids, self.generator = model, sample_ids, generator
        batch, self.guided = shape[0], uncond is not None
        self.arguments = dict(cond or {}) if uncond is None else _join(cond or {}, uncond, batch)
        # The sample is a part of the model's input: its first channels, and, as with guidance the model sees every
        # sample twice, its first half.
        sizes = [2 * batch if self.guided else batch, *shape[1:]]
        if concat is not None:
            sizes[1] += concat.shape[1]
        self.model_input = torch.empty(sizes, dtype=dtype, device=device)
        self.state = self.model_input
        if concat is not None:
            self.state = self.model_input[:, : shape[1]]
            self.model_input[:, shape[1] :].unflatten(0, (-1, batch)).copy_(concat)
        self.x = self.state[:batch]
        self.key: Tensor | None = None
        if generator is not None:
            self.x.copy_(torch.randn(tuple(shape), generator=generator, dtype=dtype, device=device))
        else:
            self.key = index_tensor(int(torch.randint(2**63 - 1, ())) if seed is None else seed, self.x.device)
            philox_normal(seed=self.key, sample_ids=sample_ids, out=self.x)

    def evaluate(self, x: Tensor, timestep: Tensor) -> Tensor:
        """The model's output at x and, with guidance, below it, without the condition."""
        model_input = self.model_input
        if x is not self.x:
            model_input = torch.cat([x, x]) if self.guided else x
            if self.state is not self.model_input:
                model_input = torch.cat([model_input, self.model_input[:, x.shape[1] :]], dim=1)
        elif self.guided:
            self.state[len(x) :].copy_(x)
        output = self.model(model_input, timestep.expand(len(model_input)), **self.arguments)
        output = output if isinstance(output, Tensor) else output.sample
        if output.shape != self.state.shape:
            shapes = f"{tuple(output.shape)} for samples of shape {tuple(self.state.shape)}"
            raise ValueError(f"model returned shape {shapes}")
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
        return self.x if self.x.shape == self.model_input.shape else self.x.clone()


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


def _broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    """Whether a tensor of one shape expands to another."""
    return len(shape) <= len(to) and all(n in (1, size) for n, size in zip(shape[::-1], to[::-1], strict=False))


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
