"""pygen.sample from images: image to image, inpainting, RePaint and concatenated channels, beside plain loops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pygen
from pygen.diffusion import Stepper, StepPlan, make_schedule, resampled
from pygen.diffusion import sample as loop
from pygen.ops.philox_normal import DRAW_AFFINE_STEP
from tests.error_rule import assert_error_rule

SHAPE = (3, 4, 5, 7)
SEED = 11
SCHEDULE = make_schedule("scaled_linear")


def model(x: Tensor, t: Tensor) -> Tensor:
    x = x.clamp(-1.5, 1.5)
    return 0.5 * x - 0.125 * x * x * x


def image() -> Tensor:
    return torch.randn(SHAPE[1:], generator=torch.Generator().manual_seed(1))


def mask(*, soft: bool = False) -> Tensor:
    """Of one channel, for all samples."""
    values = torch.rand(1, *SHAPE[2:], generator=torch.Generator().manual_seed(2))
    return values if soft else (values > 0.5).float()


def noise(dtype: torch.dtype, step: int | None = None) -> Tensor:
    """The initial noise, or that of a step, by Philox's definition."""
    with pygen.backend("reference"):
        if step is None:
            return pygen.philox_normal(SHAPE, seed=SEED, dtype=dtype)
        return pygen.philox_normal(SHAPE, seed=SEED, step=step, draw=DRAW_AFFINE_STEP, dtype=dtype)


def levels(times: Any) -> Iterator[tuple[float, float]]:
    return zip(SCHEDULE.alpha(times).tolist(), SCHEDULE.sigma(times).tolist(), strict=True)


def assert_as(plain: Callable[[torch.dtype], Tensor], **arguments: Any) -> Tensor:
    arguments = {"schedule": SCHEDULE, "seed": SEED} | arguments
    result = pygen.sample(model, SHAPE, **arguments)
    assert_error_rule([(result, plain(torch.float32), plain(torch.float64))])
    return result


@pytest.mark.parametrize("strength", [0.1, 0.55, 1.0])
def test_image_to_image(strength: float) -> None:
    def plain(dtype: torch.dtype) -> Tensor:
        times = SCHEDULE.times(10)[10 - int(10 * strength) :]
        (alpha, sigma), *rest = levels(times)
        x = alpha * image().to(dtype) + sigma * noise(dtype)
        for following_alpha, following_sigma in rest:
            epsilon = model(x, x)
            x_0 = (x - sigma * epsilon) / alpha
            alpha, sigma = following_alpha, following_sigma
            x = alpha * x_0 + sigma * epsilon
        return x

    assert_as(plain, solver="ddim", steps=10, strength=strength, init=image())


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(
    ("solver", "options"),
    [
        ("ddim", {}),
        ("dpmpp_2m", {"strength": 0.7}),
        ("ddpm", {}),  # what is known takes the noise of each step
        ("ipndm", {"clip": (-2.0, 2.0)}),  # remembers second results, so that there is no room for the mask
        ("unipc", {"thresholding": (0.9, 2.0)}),  # carries one, as Heun's method does
        ("heun", {"s_churn": 2.0, "s_tmax": 5.0}),
    ],
)
def test_inpainting(solver: str, options: dict[str, Any], soft: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = pygen.plan(solver, SCHEDULE, 8, **options)

    def plain(dtype: torch.dtype) -> Tensor:
        known, m = image().to(dtype), mask(soft=soft).to(dtype)
        alpha = float(SCHEDULE.alpha(plan.times[0]))
        x = alpha * known + plan.initial_scale * noise(dtype)
        stepper = Stepper(plan, x)
        with pygen.backend("reference"):
            for i, (alpha, sigma) in enumerate(levels(plan.times[1:])):
                x = stepper.step(i, x, model(x, x), seed=torch.tensor([SEED]))
                z = noise(dtype, i) if plan.noisy[i] else noise(dtype)
                x = (1 - m) * (alpha * known + sigma * z) + m * x
        return x

    calls = []
    monkeypatch.setattr(
        loop, "affine_step", lambda *tensors, **named: calls.append(0) or pygen.affine_step(*tensors, **named)
    )
    result = assert_as(plain, solver=plan, schedule=None, init=image(), mask=mask(soft=soft))
    passes = len(calls) - 1 - 2 * plan.steps  # less the start, and both plain loops
    assert passes == (2 if plan.carried else 1) * plan.steps
    if not soft:
        kept = (mask() == 0).expand(SHAPE)
        assert torch.equal(result[kept], image().expand(SHAPE)[kept])
        boolean = pygen.sample(model, SHAPE, solver=plan, seed=SEED, init=image(), mask=mask() > 0)
        assert torch.equal(boolean, result)


def get_schedule_jump(t_T: int, jump_length: int, jump_n_sample: int) -> list[int]:
    """RePaint's times, as its appendix B lists them: t counts the steps that are left, less one."""
    jumps = dict.fromkeys(range(0, t_T - jump_length, jump_length), jump_n_sample - 1)
    t, ts = t_T, []
    while t >= 1:
        t -= 1
        ts.append(t)
        if jumps.get(t, 0) > 0:
            jumps[t] -= 1
            for _ in range(jump_length):
                t += 1
                ts.append(t)
    return [*ts, -1]


@pytest.mark.parametrize(("steps", "length", "count"), [(250, 10, 10), (20, 3, 2), (7, 1, 3), (5, 8, 2), (1, 1, 1)])
def test_resampled_times_are_repaints(steps: int, length: int, count: int) -> None:
    times = SCHEDULE.times(steps)
    papers = times[[steps - 1 - t for t in get_schedule_jump(steps, length, count)]]
    moves = np.sign(np.diff(papers))
    on_the_way_up = np.append(False, (moves[:-1] > 0) & (moves[1:] > 0))
    assert resampled(times, length, count).tolist() == papers[np.append(~on_the_way_up, True)].tolist()


def test_repaint() -> None:
    """Lugmayr et al. 2022, algorithm 1, with jumps: q(x_t | x_s) after p(x_s | x_t), whose two normals are one sum."""
    times = resampled(SCHEDULE.times(8), 3, 2)
    ups = np.diff(times) > 0

    def plain(dtype: torch.dtype) -> Tensor:
        known, m = image().to(dtype), mask().to(dtype)
        at = list(levels(times))
        x = at[0][0] * known + at[0][1] * noise(dtype)
        row = 0
        for i, ((alpha, sigma), (alpha_next, sigma_next)) in enumerate(pairwise(at)):
            if ups[i]:  # already there
                continue
            x_0 = (x - sigma * model(x, x)) / alpha
            ratio = alpha / alpha_next
            forward = sigma**2 - ratio**2 * sigma_next**2
            x = ratio * sigma_next**2 / sigma**2 * x + alpha_next * forward / sigma**2 * x_0
            variance = forward * sigma_next**2 / sigma**2
            if i + 1 < len(ups) and ups[i + 1]:
                alpha_up, sigma_up = at[i + 2]
                back = alpha_up / alpha_next
                x = back * x
                variance = back**2 * variance + sigma_up**2 - back**2 * sigma_next**2
                alpha_next, sigma_next = alpha_up, sigma_up
            z = noise(dtype, row)
            x = (1 - m) * (alpha_next * known + sigma_next * z) + m * (x + variance**0.5 * z)
            row += 1
        return x

    assert ups.sum() == 2
    assert_as(plain, solver="ddpm", times=times, init=image(), mask=mask())


@pytest.mark.parametrize("solver", ["dpmpp_2m", "unipc", "heun"])
def test_a_solver_begins_anew_where_times_go_up(solver: str) -> None:
    times = SCHEDULE.times(8)
    parts = [times[:6], times[3:]]
    plan = pygen.plan(solver, SCHEDULE, times=np.concatenate(parts), clip=(-1, 1))
    first, second = (pygen.plan(solver, SCHEDULE, times=part, clip=(-1, 1)) for part in parts)
    assert plan.steps == first.steps + second.steps
    assert torch.equal(plan.table[: first.steps - 1], first.table[:-1])
    assert torch.equal(plan.table[first.steps :, 1:], second.table[:, 1:])
    assert plan.noisy == tuple(i == first.steps - 1 for i in range(plan.steps))
    assert plan.times.tolist() == [*first.times[:-1], *second.times]


@pytest.mark.parametrize("solver", ["ddpm", "dpm_adaptive"])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("by_generator", [False, True])
def test_concatenated_channels_are_shown_to_the_model(solver: str, guided: bool, by_generator: bool) -> None:
    extra = torch.randn(3, 2, 5, 7, generator=torch.Generator().manual_seed(4))
    options: dict[str, Any] = {"solver": solver, "schedule": "cosine", "init": image()}
    seen = []

    def wide(x: Tensor, t: Tensor, factor: Tensor | float = 1.0) -> Tensor:
        seen.append(x.data_ptr())
        assert x.shape[1] == SHAPE[1] + 2
        assert all(torch.equal(half, extra) for half in x[:, SHAPE[1] :].split(3))
        return factor * model(x[:, : SHAPE[1]] + x[:, -1:], t)

    def narrow(x: Tensor, t: Tensor, factor: Tensor | float = 1.0) -> Tensor:
        return factor * model(x + extra[:, -1:].repeat(len(x) // 3, 1, 1, 1), t)

    if guided:
        ones = torch.ones(3, 1, 1, 1)
        options |= {"guidance": 3.0, "cond": {"factor": ones}, "uncond": {"factor": 0.5 * ones}}
    key = (lambda: {"generator": torch.Generator().manual_seed(5)}) if by_generator else (lambda: {"seed": 5})
    result = pygen.sample(wide, SHAPE, concat=extra, **options, **key())
    assert torch.equal(result, pygen.sample(narrow, SHAPE, **options, **key()))
    assert len(set(seen)) == 1 or solver == "dpm_adaptive"  # written once, not copied
    assert result.is_contiguous()


def plan(**arguments: Any) -> StepPlan:
    return pygen.plan("ddim", SCHEDULE, **arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plan(steps=10, strength=0.0), "strength must lie in"),
        (lambda: plan(steps=10, strength=1.5), "strength must lie in"),
        (lambda: plan(steps=10, strength=0.05), "keep at least one of 10 steps"),
        (lambda: plan(times=[5.0, 9.0, 3.0]), "go up only in between"),
        (lambda: plan(times=[5.0, 3.0, 4.0]), "go up only in between"),
        (lambda: plan(times=[5.0, 3.0, 3.0, 1.0]), "go up only in between"),
        (lambda: plan(times=[5.0, 3.0, float("nan"), 2.0, 1.0]), "go up only in between"),
        (lambda: plan(times=[5.0, 3.0, 1000.0, 1.0]), "times must lie between"),
        (lambda: resampled([3.0, 2.0, 1.0], length=0), "length must be a whole number"),
        (lambda: resampled([3.0, 2.0, 1.0], count=1.5), "count must be a whole number"),  # type: ignore[arg-type]
        (lambda: pygen.plan("pndm", SCHEDULE, 5).inpainting, "solver 'pndm' keeps 12 tensors"),
        (lambda: pygen.sample(model, SHAPE, schedule=SCHEDULE, mask=mask()), "need init"),
        (lambda: pygen.sample(model, SHAPE, schedule=SCHEDULE, strength=0.5), "need init"),
        (
            lambda: pygen.sample(model, SHAPE, solver="dpm_adaptive", schedule=SCHEDULE, init=image(), mask=mask()),
            "give mask or solver 'dpm_adaptive'",
        ),
        (lambda: pygen.sample(model, SHAPE, schedule=SCHEDULE, init=torch.ones(2, 1, 1, 1)), "init must broadcast"),
        (
            lambda: pygen.sample(model, SHAPE, schedule=SCHEDULE, init=image(), mask=torch.ones(6)),
            "mask must broadcast",
        ),
        (
            lambda: pygen.sample(model, SHAPE, schedule=SCHEDULE, concat=torch.ones(3, 1, 5, 8)),
            "concat must have",
        ),
        (lambda: pygen.sample(model, (3,), schedule=SCHEDULE, concat=torch.ones(3)), "concat must have"),
        (
            lambda: pygen.sample(model, SHAPE, solver=plan(steps=5), init=image(), strength=0.5),
            "strength belongs to the plan",
        ),
    ],
)
def test_wrong_arguments(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
