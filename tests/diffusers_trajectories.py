"""How a pipeline drives each scheduler, with model outputs that are fixed: every value that it gets back, by name."""

from __future__ import annotations

import inspect
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from tests.diffusers_configs import Configuration

SHAPE = (2, 3, 5, 7)
CLASSES = 13  # tokens, of which the last may be the mask
Values = Iterator[tuple[str, Tensor]]
Trajectory = dict[str, list[Tensor]]  # the values of each field, in time


class Feed:
    """What a pipeline gives to a scheduler: numbers that are the same for every scheduler of a configuration.

    They are drawn in float32, rounded to ``dtype``, and given in float64 to whoever computes the ``truth``.
    """

    def __init__(self, configuration: Configuration, dtype: torch.dtype, *, truth: bool = False) -> None:
        self.configuration = configuration
        self.dtype = dtype
        self.truth = truth
        self.generator = torch.Generator().manual_seed(configuration.number)

    def normal(self, name: str, shape: Sequence[int], factor: float = 1.0) -> Tensor:
        key = f"{self.configuration.name} {self.configuration.number} {name}"
        with _disable_current_modes():  # what is given is no operation of the scheduler's
            numbers = torch.Generator().manual_seed(zlib.crc32(key.encode()))
            value = torch.randn(*shape, dtype=torch.float32, generator=numbers).mul(factor).to(self.dtype)
            return value.double() if self.truth else value

    def start(self, scheduler: Any, shape: Sequence[int] = SHAPE) -> Tensor:
        sigma = float(getattr(scheduler, "init_noise_sigma", 1.0))
        # The truth starts where the others do, whose sigma may be another in its last digits.
        return self.normal("start", shape, float(f"{sigma:.3g}"))

    def output(self, name: object, shape: Sequence[int]) -> Tensor:
        """Of a model; with a second half of learned variances, between 0 and 1, where the scheduler takes them."""
        output = self.normal(f"output {name}", shape)
        if self.configuration.get("variance_type") not in ("learned", "learned_range"):
            return output
        variance = self.normal(f"variance {name}", shape).abs()
        return torch.cat([output, (variance / 8).clamp(0.01, 1)], dim=1)

    def logits(self, name: object, shape: Sequence[int]) -> Tensor:
        return 2 * self.normal(f"logits {name}", shape)

    def arguments(self, step: Callable[..., Any], **arguments: Any) -> dict[str, Any]:
        """The options of the configuration, and those of these arguments, that this step takes."""
        known = inspect.signature(step).parameters
        arguments = {"generator": self.generator, **self.configuration.step, **arguments}
        return {name: value for name, value in arguments.items() if name in known}


def fields(out: Any) -> Values:
    """The tensors of what a step returns, by their name or, in a tuple, their place."""
    items = out.items() if isinstance(out, dict) else ((str(i), value) for i, value in enumerate(out))
    for name, value in items:
        if isinstance(value, Tensor):
            yield name, value


def noised(scheduler: Any, feed: Feed) -> Values:
    """What training, image to image and inpainting ask for: each sample at its own timestep."""
    x, noise, times = feed.normal("image", SHAPE), feed.normal("noise", SHAPE), scheduler.timesteps[[0, -1]]
    for name in ("add_noise", "get_velocity"):
        if hasattr(scheduler, name):
            yield name, getattr(scheduler, name)(x, noise, times)
    if hasattr(scheduler, "scale_noise"):
        yield "scale_noise", scheduler.scale_noise(x, times[:1], noise)


def plain(scheduler: Any, feed: Feed) -> Values:
    yield from noised(scheduler, feed)
    x = feed.start(scheduler)
    for i, t in enumerate(scheduler.timesteps):
        if hasattr(scheduler, "scale_model_input"):
            yield "model_input", scheduler.scale_model_input(x, t)
        out = scheduler.step(feed.output(i, x.shape), t, x, **feed.arguments(scheduler.step))
        yield from fields(out)
        x = out[0]


def parallel(scheduler: Any, feed: Feed) -> Values:
    times = scheduler.timesteps
    x = feed.normal("batch", (len(times), *SHAPE[1:]))
    yield "batch", scheduler.batch_step_no_noise(feed.output("batch", x.shape), times, x)
    yield from plain(scheduler, feed)


def cogvideox_dpm(scheduler: Any, feed: Feed) -> Values:
    yield from noised(scheduler, feed)
    x, old, before = feed.start(scheduler), None, None
    for i, t in enumerate(scheduler.timesteps):
        out = scheduler.step(feed.output(i, x.shape), old, t, before, x, **feed.arguments(scheduler.step))
        yield from fields(out)
        x, old, before = out[0], out[1], t


def wuerstchen(scheduler: Any, feed: Feed) -> Values:
    x = feed.start(scheduler)
    for i, t in enumerate(scheduler.timesteps[:-1]):
        out = scheduler.step(feed.output(i, x.shape), t.expand(len(x)), x, **feed.arguments(scheduler.step))
        yield from fields(out)
        x = out[0]


def repaint(scheduler: Any, feed: Feed) -> Values:
    x, image = feed.start(scheduler), feed.normal("image", SHAPE)
    mask = (feed.normal("mask", SHAPE) > 0).to(x.dtype)
    last = scheduler.timesteps[0] + 1
    for i, t in enumerate(scheduler.timesteps):
        if t < last:
            out = scheduler.step(feed.output(i, x.shape), t, x, image, mask, **feed.arguments(scheduler.step))
            yield from fields(out)
            x = out[0]
        else:
            x = scheduler.undo_step(x, last, feed.generator)
            yield "undone", x
        last = t


def score_sde_ve(scheduler: Any, feed: Feed) -> Values:
    scheduler.set_sigmas(feed.configuration.steps)
    x = feed.start(scheduler)
    for i, t in enumerate(scheduler.timesteps):
        for j in range(scheduler.config.correct_steps):
            output = feed.output(f"{i} {j}", x.shape)
            out = scheduler.step_correct(output, x, **feed.arguments(scheduler.step_correct))
            yield from ((f"corrected_{name}", value) for name, value in fields(out))
            x = out[0]
        out = scheduler.step_pred(feed.output(i, x.shape), t, x, **feed.arguments(scheduler.step_pred))
        yield from fields(out)
        x = out[0]


def karras_ve(scheduler: Any, feed: Feed) -> Values:
    x = feed.start(scheduler)
    for t in scheduler.timesteps:
        sigma = scheduler.schedule[t]
        before = scheduler.schedule[t - 1] if t > 0 else 0
        noisy, sigma_hat = scheduler.add_noise_to_input(x, sigma, generator=feed.generator)
        yield "noisy", noisy
        yield "sigma_hat", torch.as_tensor(sigma_hat)
        out = scheduler.step(feed.output(f"{t}", x.shape), sigma_hat, before, noisy, **feed.arguments(scheduler.step))
        yield from fields(out)
        if before != 0:
            output, options = feed.output(f"{t}'", x.shape), feed.arguments(scheduler.step_correct)
            out = scheduler.step_correct(output, sigma_hat, before, noisy, out[0], out[1], **options)
            yield from ((f"corrected_{name}", value) for name, value in fields(out))
        x = out[0]


def helios(scheduler: Any, feed: Feed) -> Values:
    c = feed.configuration
    x = feed.start(scheduler, (2, 3, 2, 5, 7))
    for stage in range(scheduler.config.stages):
        scheduler.set_timesteps(c.steps, stage, **c.prepare)
        yield from schedule(scheduler)
        noise, times = x, scheduler.timesteps
        for i, t in enumerate(times):
            distilled = {
                "cur_sampling_step": i,
                "dmd_noisy_tensor": noise,
                "dmd_sigmas": scheduler.sigmas,
                "dmd_timesteps": times,
                "all_timesteps": times,
            }
            output = feed.output(f"{stage} {i}", x.shape)
            out = scheduler.step(output, t, x, **feed.arguments(scheduler.step, **distilled))
            yield from fields(out)
            x = out[0]


def piflow(scheduler: Any, feed: Feed) -> Values:
    x = feed.start(scheduler, (2, 5, 7))
    for i, t in enumerate(scheduler.timesteps):
        output = feed.output(i, (2, 5, 7 * scheduler.config.n_grid))
        out = scheduler.step(output, t, x, **feed.arguments(scheduler.step))
        yield from fields(out)
        x = out[0]


def rfd4_proteina(scheduler: Any, feed: Feed) -> Values:
    x = feed.start(scheduler, (2, 5, 7))
    emit = feed.normal("mask", (2, 5)) > -1
    generators = [torch.Generator().manual_seed(i) for i in range(len(x))]
    for i, t in enumerate(scheduler.timesteps):
        out = scheduler.step(
            feed.output(i, x.shape), t, x, emit, **feed.arguments(scheduler.step, generator=generators)
        )
        yield from fields(out)
        x = out[0]


def scm(scheduler: Any, feed: Feed) -> Values:
    x = feed.start(scheduler)
    for i, t in enumerate(scheduler.timesteps[:-1]):
        out = scheduler.step(feed.output(i, x.shape), t, x, **feed.arguments(scheduler.step))
        yield from fields(out)
        x = out[0]


def vq_diffusion(scheduler: Any, feed: Feed) -> Values:
    x = torch.full((2, 11), CLASSES - 1)
    for i, t in enumerate(scheduler.timesteps):
        output = feed.logits(i, (2, CLASSES - 1, 11)).log_softmax(dim=1)
        out = scheduler.step(output, t, x, **feed.arguments(scheduler.step))
        yield from fields(out)
        x = out[0]


def amused(scheduler: Any, feed: Feed) -> Values:
    x = torch.full((2, 4, 5), scheduler.config.mask_token_id)
    for i, t in enumerate(scheduler.timesteps):
        out = scheduler.step(feed.logits(i, (2, CLASSES, 4, 5)), t, x, **feed.arguments(scheduler.step))
        yield from fields(out)
        x = out[0]


def refined_blocks(scheduler: Any, feed: Feed) -> Values:
    length = scheduler.config.get("block_length", 11)
    mask = feed.configuration.get("mask_token_id")
    x = torch.full((2, length), mask) if mask else (feed.normal("tokens", (2, length)).abs() * 3).long().clamp(max=11)
    for i in range(len(scheduler.timesteps)):
        out = scheduler.step(feed.logits(i, (2, length, CLASSES)), i, x, **feed.arguments(scheduler.step))
        yield from fields(out)
        x = out[0]
        if i == len(scheduler.timesteps) - 1:
            return  # the pipeline corrects no sample that is clean
        for j in range(scheduler.config.get("corrector_steps", 0)):
            output, options = feed.logits(f"{i} {j}", (2, length, CLASSES)), feed.arguments(scheduler.step_correct)
            out = scheduler.step_correct(output, i, x, **options)
            yield from ((f"corrected_{name}", value) for name, value in fields(out))
            x = out[0]


def schedule(scheduler: Any) -> Values:
    for name in ("timesteps", "sigmas", "init_noise_sigma"):
        value = getattr(scheduler, name, None)
        if value is not None:
            yield name, torch.as_tensor(value).clone()


DRIVERS: dict[str, Callable[[Any, Feed], Values]] = {
    "AmusedScheduler": amused,
    "BlockRefinementScheduler": refined_blocks,
    "CogVideoXDPMScheduler": cogvideox_dpm,
    "DDIMParallelScheduler": parallel,
    "DDPMParallelScheduler": parallel,
    "DDPMWuerstchenScheduler": wuerstchen,
    "DiscreteDDIMScheduler": refined_blocks,
    "EntropyBoundScheduler": refined_blocks,
    "HeliosDMDScheduler": helios,
    "HeliosScheduler": helios,
    "KarrasVeScheduler": karras_ve,
    "PiflowScheduler": piflow,
    "RFD4ProteinaScheduler": rfd4_proteina,
    "RePaintScheduler": repaint,
    "SCMScheduler": scm,
    "ScoreSdeVeScheduler": score_sde_ve,
    "VQDiffusionScheduler": vq_diffusion,
}
TOKENS = {name for name, driver in DRIVERS.items() if driver in (amused, refined_blocks, vq_diffusion)}


def prepared(scheduler_class: type, c: Configuration) -> Any:
    scheduler = scheduler_class(**c.config)
    if c.name not in ("HeliosScheduler", "HeliosDMDScheduler"):  # whose driver prepares every stage
        own = any(option in c.prepare for option in ("timesteps", "sigmas"))
        scheduler.set_timesteps(*([] if own else [c.steps]), **c.prepare)
    return scheduler


def trajectory(scheduler: Any, feed: Feed) -> Trajectory:
    """Every value of a whole run; of the truth, if this runs ``in_float64`` and so does the feed."""
    found: Trajectory = defaultdict(list)
    for name, value in (*schedule(scheduler), *DRIVERS.get(feed.configuration.name, plain)(scheduler, feed)):
        found[name].append(value)
    return dict(found)
